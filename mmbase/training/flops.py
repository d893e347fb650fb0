"""FLOPs of our towers' matrix products, exact, at any image size, keep-rate and text length. Torch-free.

Counted is what ``torch.utils.flop_counter`` counts: two for each multiply-add of linear layers, convolutions and
attention, whose products are those of all queries and keys, causal or not. Norms, activations, optimisers and anything
computed twice to save memory are left out, so these are the FLOPs that MFU is a share of (PaLM, arXiv:2204.02311).

The backward pass of a product costs two of it, one for each factor's gradient; those of factors that have none (pixels,
locked layers) are not counted.

Letters: B batch, N tokens, D width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mmbase.models.config import CLIPConfig, TextConfig, TowerConfig, VisionConfig


class Work(NamedTuple):
    """FLOPs of a forward and a backward pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Of a training step."""
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:  # pyrefly: ignore[bad-override]
        """Of two parts together."""
        return Work(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Shapes:
    """What a training step's FLOPs depend on, beside the model."""

    batch: int
    """pairs"""
    image_hw: tuple[int, int]
    """pixels"""
    patch_keep: float = 1.0
    """share of the patches that are not dropped"""
    text_length: float = 77
    """tokens computed of each text: the context, or the mean of what packing leaves"""
    packed: bool = False
    """whether texts are packed: attention in the last block is then that of all tokens"""
    lock_vision: int = 0
    """groups of layers without gradients, from the input: the stem, each block, the head"""
    lock_text: int = 0
    """groups of the text tower: embeddings, each block, the head"""


class StepWork(NamedTuple):
    """FLOPs of one training step on a batch."""

    image: Work
    text: Work
    loss: Work

    @property
    def total(self) -> Work:
        """Of all parts."""
        return self.image + self.text + self.loss


def step_work(model: CLIPConfig, shapes: Shapes) -> StepWork:
    """FLOPs of one training step: both towers and the logits of every image with every text."""
    loss = 2.0 * shapes.batch**2 * model.embed_dim
    locked = [shapes.lock_vision >= groups(model.vision), shapes.lock_text >= groups(model.text)]
    return StepWork(
        image_work(model.vision, model.embed_dim, shapes),
        text_work(model.text, model.embed_dim, shapes),
        Work(loss, loss * (2 - sum(locked))),
    )


def groups(tower: TowerConfig) -> int:
    """Groups of layers that can be locked: stem or embeddings, the blocks, norm and projection."""
    return tower.layers + 2


def kept_tokens(vision: VisionConfig, image_hw: tuple[int, int], patch_keep: float) -> int:
    """Tokens of an image in the blocks, a class token included."""
    rows, columns = vision.grid_of(*image_hw)
    patches = rows * columns
    if patch_keep < 1:
        patches = max(1, int(patches * (1.0 - (1.0 - patch_keep))))  # rounded as PatchDropout rounds
    return patches + int(vision.class_token)


def image_work(vision: VisionConfig, embed_dim: int, shapes: Shapes) -> Work:
    """FLOPs of the image tower on a batch."""
    batch, width = shapes.batch, vision.width
    tokens = kept_tokens(vision, shapes.image_hw, shapes.patch_keep)
    one = vision.pool == "class"
    blocks = []
    for place in range(vision.layers):
        asking = 1 if one and place == vision.layers - 1 else tokens
        blocks.append(batch * _block(vision, tokens, asking, asking))
    head = 2.0 * batch * width * embed_dim * vision.projection
    if vision.pool == "attention":
        hidden = int(width * vision.mlp_ratio)
        # keys and values, scores and their sum, output, MLP; the query is projected once for the whole batch
        head += 2.0 * batch * (2 * tokens * width**2 + 2 * tokens * width + width**2 + 2 * width * hidden)
        head += 2.0 * width**2
    return _tower(list(_stem(vision, shapes)), blocks, head, shapes.lock_vision)


def text_work(text: TextConfig, embed_dim: int, shapes: Shapes) -> Work:
    """FLOPs of the text tower on a batch; attention of texts of unequal lengths as if all had the mean."""
    batch, tokens = shapes.batch, shapes.text_length
    one = text.pool != "mean"
    blocks = []
    for place in range(text.layers):
        asking = 1 if one and place == text.layers - 1 else tokens
        blocks.append(batch * _block(text, tokens, tokens if shapes.packed else asking, asking))
    return _tower([], blocks, 2.0 * batch * text.width * embed_dim * text.projection, shapes.lock_text)


def _block(tower: TowerConfig, tokens: float, queries: float, outputs: float) -> float:
    """Forward FLOPs of a block on one sequence: ``queries`` attend, ``outputs`` of them go on."""
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    projections = 3 * tokens * width**2 + outputs * width**2
    return 2.0 * (projections + 2 * tokens * queries * width + 2 * outputs * width * hidden)


def _stem(vision: VisionConfig, shapes: Shapes) -> Iterator[float]:
    """Forward FLOPs of each layer of the stem on a batch; the first reads pixels."""
    rows, columns = vision.grid_of(*shapes.image_hw)
    if vision.stem == "patch":
        ph, pw = vision.patch_hw
        yield 2.0 * shapes.batch * rows * columns * 3 * ph * pw * vision.width
        return
    before, stages = 3, len(vision.stem_channels)
    for stage, (now, depth) in enumerate(zip(vision.stem_channels, vision.stem_blocks)):
        h, w = (_side(vision, pixels, stage) for pixels in shapes.image_hw)
        first = 3 if vision.stem_stride <= 2 else vision.stem_stride
        kernel = first if stage == 0 else 2
        pixels = 2.0 * shapes.batch * h * w
        yield pixels * before * now * kernel**2
        yield from [pixels * now * now * 9] * (2 * depth)
        before = now
    if before != vision.width:
        h, w = (_side(vision, pixels, stages - 1) for pixels in shapes.image_hw)
        yield 2.0 * shapes.batch * h * w * before * vision.width


def _side(vision: VisionConfig, pixels: int, stage: int) -> int:
    """Rows or columns after a stage of the conv stem; its first convolution is padded up to stride 2."""
    stride = vision.stem_stride
    side = -(-pixels // stride) if stride <= 2 else pixels // stride
    return side // 2**stage


def _tower(stem: list[float], blocks: list[float], head: float, locked: int) -> Work:
    """Forward and backward of a tower whose first ``locked`` groups have no gradients."""
    parts = [sum(stem), *blocks, head]
    backward = 2 * sum(parts[locked:])
    if stem and locked == 0:
        backward -= stem[0]  # nobody asks for the gradient of pixels
    return Work(sum(parts), backward)
