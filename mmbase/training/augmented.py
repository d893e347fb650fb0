"""The model as the loop calls it: it follows the curriculum, and pictures are varied and normalised on their way in.

Only the pictures that go through the towers are ever held as floats, one part of a batch at a time; those of a large
batch are varied anew in its second pass, alike, since how follows from (seed, epoch, sample).

Letters: B pairs, C channels, S side of a picture, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbase.data.augment import Augment
from mmbase.errors import MmbaseError
from mmbase.keyed import IMAGE, TEXT, draw
from mmbase.models.text import PackedText
from mmbase.training.big_batch import Output, Part
from mmbase.training.curriculum import Stage
from mmbase.training.depth import TowerLocks
from mmbase.training.full_state import shard_like
from mmbase.training.parallel import Parallel


class Augmented(nn.Module):
    """Calls a model on pictures as they are stored; give it to :func:`~mmbase.training.big_batch.contrastive_step`.

    Args:
        parallel: the model.
        augment: how pictures are varied.
    """

    def __init__(self, parallel: Parallel, augment: Augment) -> None:
        super().__init__()
        self.model, self.parallel = parallel.model, parallel
        self._whole, self.augment = augment, augment
        self._locks = TowerLocks(parallel.model)

    def at(self, progress: float, stage: Stage) -> None:
        """Follow the curriculum to ``progress`` (0 to 1) of the training; the model is in training mode after it."""
        self.augment = self._whole.at(progress, stage.image_size)
        self.model.visual.patch_dropout.rate = round(1.0 - stage.patch_keep, 9)
        self.model.train()
        if self._locks.set(stage.lock_vision, stage.lock_text):
            self.parallel.locks_changed()

    def forward(
        self,
        *,
        keys: Tensor,
        may_flip: Tensor,
        image: Tensor | None = None,
        text: Tensor | PackedText | None = None,
    ) -> Output:
        """What the model returns.

        Args:
            keys: int64 [B], from which pictures are varied and the towers drop.
            may_flip: bool [B], whose mirror image means the same.
            image: uint8 [B, C, S, S] with or without transparency.
            text: ids, packed or not.
        """
        shown = None if image is None else self.show(image, may_flip, keys)
        return self.parallel.module(image=shown, text=text, keys=keys)

    @torch.no_grad()
    def show(self, image: Tensor, may_flip: Tensor, keys: Tensor) -> Tensor:
        """The pictures as the tower gets them, float32, whatever the towers run in."""
        with torch.autocast(image.device.type, enabled=False):
            return self.augment(image, may_flip, keys)


@torch.no_grad()
def center_projections(model: Augmented, parts: Sequence[Part]) -> None:
    """Take the first batch's mean feature, over all ranks, off the biases of both output projections.

    Features of an untrained tower share a large common part, which a contrastive loss has to unlearn first.

    Raises:
        MmbaseError: a tower whose projection has no bias.
    """
    towers, ranks = model.model, model.parallel.ranks
    rows = sum(len(part["inputs"]["keys"]) for part in parts)
    for name, tower, place in (("vision", towers.visual, IMAGE), ("text", towers.text, TEXT)):
        bias = getattr(tower.proj, "bias", None)
        if bias is None:
            raise MmbaseError(f"training.center_projections needs model.{name}.projection_bias=true")
        sum_E = torch.zeros(bias.shape, device=ranks.device)
        for part in parts:
            given = part["inputs"]
            show = place == IMAGE
            inputs = model.show(given["image"], given["may_flip"], given["keys"]) if show else given["text"]
            sum_E += tower(inputs, keys_B=draw(given["keys"], place)).float().sum(0)
        mean_E = ranks.all_reduce_sum(sum_E / rows) / ranks.world_size
        bias.sub_(shard_like(mean_E, bias))
