"""A dataset that fits in memory: decoded once, then batched in an order that is a function of seed and epoch.

Letters: N pictures, C channels (4 where a picture has transparency), S side of a picture.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmbase.data.captions import CaptionSampler
from mmbase.data.collate import Batch, Collator
from mmbase.data.decode import decode_training
from mmbase.data.draws import generator, sample_keys
from mmbase.data.shards import Sample
from mmbase.data.timing import StageTimes
from mmbase.errors import MmbaseError

logger = logging.getLogger(__name__)


@dataclass
class Pictures:
    """A decoded dataset in memory."""

    images: torch.Tensor
    """uint8 [N, C, S, S]"""
    fields: list[dict[str, Any]]
    keys: list[str]
    skipped: list[str] = field(default_factory=list)
    """keys that could not be decoded, with the reason"""

    def __len__(self) -> int:
        return len(self.keys)


def stack_pictures(arrays: list[np.ndarray], size: int) -> torch.Tensor:
    """uint8 ``[B, C, S, S]`` of pictures ``[3 or 4, S, S]``; where one has alpha, the others get an opaque one."""
    channels = max(len(array) for array in arrays)
    stacked = torch.full((len(arrays), channels, size, size), 255, dtype=torch.uint8)
    for row, array in zip(stacked, arrays):
        row[: len(array)] = torch.from_numpy(array)
    return stacked


def load_pictures(samples: Iterable[Sample], size: int, errors: str = "replace") -> Pictures:
    """Decode samples into memory as squares of ``size`` pixels; bad ones are left out.

    Raises:
        MmbaseError: no sample is left, or ``errors="raise"`` and a picture is broken.
    """
    arrays: list[np.ndarray] = []
    fields: list[dict[str, Any]] = []
    keys: list[str] = []
    skipped: list[str] = []
    for sample in samples:
        try:
            arrays.append(decode_training(sample.image, (size, size), fast=False))
        except MmbaseError as error:
            if errors == "raise":
                raise MmbaseError(f"sample {sample.key!r}: {error}") from error
            skipped.append(f"{sample.key}: {error}")
            continue
        fields.append(sample.fields)
        keys.append(sample.key)
    if skipped:
        logger.warning("left out %d pictures that could not be decoded, the first: %s", len(skipped), skipped[0])
    if not arrays:
        raise MmbaseError("the shards hold no usable image-caption pair; check data.caption_field and the pictures")
    return Pictures(stack_pictures(arrays, size), fields, keys, skipped)


class MemoryStream:
    """Batches of a dataset in memory, in an order that is a function of seed and epoch.

    Args:
        pictures: the dataset.
        captions: words a sample.
        collator: makes batches.
        batch_size: pairs per batch.
        seed: of order and wording.
        start: samples consumed before, by all ranks together.
        rank: of this process.
        world_size: processes; each takes its part of every global batch.
        group_by: None: an epoch shows every picture once. A field: it shows each of the field's values once, by one of
            its pictures drawn anew, so that no value stands twice in a batch except where an epoch ends within it.
    """

    workers = 0

    def __init__(
        self,
        pictures: Pictures,
        captions: CaptionSampler,
        collator: Collator,
        *,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        group_by: str | None = None,
    ) -> None:
        groups: dict[str, list[int]] = {}
        for row, fields in enumerate(pictures.fields):
            groups.setdefault(str(row) if group_by is None else str(fields.get(group_by)), []).append(row)
        self.groups = list(groups.values())
        if batch_size * world_size > len(self.groups):
            raise MmbaseError(
                f"training.batch_size={batch_size * world_size} is larger than the {len(self.groups)} training "
                f"{'pairs' if group_by is None else 'identities'}; make it smaller"
            )
        self.pictures, self.captions, self.collator = pictures, captions, collator
        self.batch_size, self.seed, self.position = batch_size, seed, start
        self.rank, self.world_size = rank, world_size
        self.times = StageTimes()
        self._orders: dict[int, np.ndarray] = {}

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return len(self.groups)

    @property
    def counts(self) -> dict[str, Any]:
        """Good and bad samples: the bad ones were left out when the dataset was decoded."""
        bad = {"left out": len(self.pictures.skipped)} if self.pictures.skipped else {}
        return {"good": len(self.pictures), "bad": len(self.pictures.skipped), "reasons": bad}

    def describe(self) -> list[str]:
        """What was chosen, one line each."""
        skipped = f", {len(self.pictures.skipped)} left out that cannot be decoded" * bool(self.pictures.skipped)
        return [f"in memory, {len(self.pictures)} pairs{skipped}"]

    def close(self) -> None:
        """Nothing to end."""

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.groups))
        if epoch not in self._orders:
            self._orders = {epoch: generator(self.seed, epoch).permutation(len(self.groups))}
        group = self.groups[self._orders[epoch][place]]
        return group[int(generator(self.seed, 5, position).integers(len(group)))] if len(group) > 1 else group[0]

    def batches(self) -> Iterator[Batch]:
        """Batches from ``position`` on, without end."""
        return self

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        started = time.perf_counter()
        first = self.position + self.rank * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        rows = [self._row(position) for position in positions.tolist()]
        fields = [self.pictures.fields[row] for row in rows]
        texts = [self.captions(f, generator(self.seed, 1, p)) for f, p in zip(fields, positions.tolist())]
        batch: Batch = {
            "image": self.pictures.images[rows],
            **{name: torch.from_numpy(array) for name, array in self.collator(texts, fields).items()},
            "draw": torch.from_numpy(sample_keys(self.seed, positions // len(self.groups), np.array(rows))),
            "key": [self.pictures.keys[row] for row in rows],
        }
        self.position += self.batch_size * self.world_size
        self.times.taken(time.perf_counter() - started)
        return batch
