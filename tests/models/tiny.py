"""A tiny model, what it is given in each of the ways, and one step of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmbase.models.clip import CLIP, CLIPConfig
from mmbase.models.config import TextConfig, VisionConfig

from .shrunk import randomise

END, CONTEXT = 49, 12
SIZES = [(16, 16), (8, 24), (24, 8), (16, 16)]
"""Images of the mixed batch, with patches of 8: 4, 3, 3 and 4 of them."""
WAYS = ["dense", "packed"]


def tiny_model(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> CLIP:
    """Two blocks each, heads of 32 channels, the least that the kernels take."""
    torch.manual_seed(0)
    tower = {"width": 64, "heads": 2, "layers": 2}
    given_vision = tower | {"image_size": 16, "patch_size": 8} | (vision or {})
    given_text = tower | {"vocab_size": END + 1, "context_length": CONTEXT} | (text or {})
    config = CLIPConfig(embed_dim=16, vision=VisionConfig(**given_vision), text=TextConfig(**given_text))
    return randomise(CLIP(config))


def tiny_batch(model: CLIP, way: str, rows: int = 4, seed: int = 1) -> tuple[Any, Any]:
    """Images and texts: ``dense``, of one size and padded, or ``packed``, of several sizes and without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END, (rows, CONTEXT), generator=generator)
    for row in range(rows):
        length = 2 + (3 * row + seed) % (CONTEXT - 2)
        ids[row, length - 1] = END
        ids[row, length:] = 0
    sizes = [SIZES[row % len(SIZES)] if way == "packed" else SIZES[0] for row in range(rows)]
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    return (images, model.text.pack(ids)) if way == "packed" else (torch.stack(images), ids)


def loss_of(out: dict[str, Tensor]) -> Tensor:
    """A number that depends on every feature, as a mean over pairs of one row."""
    similarity_B = (out["image_features"] * out["text_features"]).sum(1)
    return (similarity_B * out["logit_scale"] - 1).square().mean()


def step(model: nn.Module, run: Callable[..., dict[str, Tensor]], batch: tuple[Any, Any]) -> dict[str, Tensor]:
    """Features, and the gradient of every parameter by its name."""
    model.zero_grad()
    out = run(*batch)
    loss_of(out).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {key: out[key].detach() for key in ("image_features", "text_features")} | gradients


def assert_equal_to_rounding(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's error, relative to its norm or, of gradients that nearly cancel, to a ten-thousandth of all."""
    assert found.keys() == expected.keys()
    everything = torch.cat([value.double().flatten() for value in expected.values()]).norm()
    for key, value in expected.items():
        error = (found[key].double() - value.double()).norm()
        assert error <= tolerance * max(value.double().norm(), 1e-4 * everything), (key, error, value.norm())
