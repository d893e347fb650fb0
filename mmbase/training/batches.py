"""What each step of the loop takes: batches of the stream cut and joined as the curriculum and the memory ask.

The stream gives batches of one size for the whole run. A step takes as many of them as its batch size asks for, in
parts of at most ``training.micro_batch`` pairs, with texts cut to the step's length and packed. Steps whose samples are
stepped over never come.

Letters: B pairs, C channels, S side of a picture, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbase.data.collate import Batch
from mmbase.data.pictures import MemoryStream
from mmbase.data.prefetch import on_device
from mmbase.data.stream import Loader
from mmbase.models.text import PackedText, TextTransformer
from mmbase.training.big_batch import Part
from mmbase.training.curriculum import Curriculum, Stage, Step
from mmbase.training.distributed import Ranks
from mmbase.training.shorten import shorten


class StepBatch(NamedTuple):
    """One step's data of this rank, and where in the training the step stands."""

    step: int
    """from 0"""
    samples: int
    """seen before it, by all ranks"""
    end: int
    """position after its last sample"""
    done: int
    """steps done after it; of the last step, all"""
    seen: int
    """samples seen after it; of the last step, all"""
    is_last: bool
    stage: Stage
    is_new_level: bool
    """whether it differs from the step before in what moves the loss for good"""
    parts: list[Part]
    """``inputs``: image uint8 [B, C, S, S], text, keys and may_flip; ``ids``: what is the same thing"""
    key: list[str]
    """of this rank's samples"""

    @property
    def text_tokens(self) -> float | None:
        """Mean tokens of a packed text of the first part."""
        text = self.parts[0]["inputs"]["text"]
        return len(text.text_P) / len(text) if isinstance(text, PackedText) else None


class Feed:
    """Where steps come from.

    Args:
        stream: gives the pairs of ``curriculum.loader_batch`` at a time.
        curriculum: how each step is taken.
        text: the tower, which says what of a text it needs.
        ranks: whose device, and how many share a batch.
        micro_batch: most pairs in a part; None: one part.
        steps_over: whether the samples from one position to another are left out.
    """

    def __init__(
        self,
        stream: MemoryStream | Loader,
        curriculum: Curriculum,
        text: TextTransformer,
        ranks: Ranks,
        *,
        micro_batch: int | None = None,
        steps_over: Callable[[int, int], bool] = lambda first, last: False,
    ) -> None:
        self.stream, self.curriculum, self.text, self.ranks = stream, curriculum, text, ranks
        self.micro_batch, self.steps_over = micro_batch, steps_over

    def batches(self, start: int) -> Generator[StepBatch]:
        """The steps from ``start`` samples on, their tensors on the device.

        Each is to be used before the next is asked for. Close it before the stream is used otherwise.
        """
        items = self._on_host(start)
        moved = on_device(items, self.ranks.device, self.stream.times)
        try:
            for item in moved:
                yield StepBatch(**item)
        finally:
            moved.close()
            items.close()

    def _on_host(self, start: int) -> Generator[dict[str, Any]]:
        """Runs in the thread that feeds a GPU."""
        self.stream.position = start
        batches, unit = self.stream.batches(), self.curriculum.loader_batch(self.ranks.world_size)
        before = self._stage_before(start)
        for step, is_last in _with_last(self._steps(start)):
            if self.stream.position != step.samples:
                self.stream.position = step.samples
            stage, end = self.curriculum.at(step.samples), step.samples + step.batch_size
            batch = _joined([next(batches) for _ in range(step.batch_size // unit)])
            rows = len(batch["key"])
            size = min(self.micro_batch or rows, rows)
            yield {
                "step": step.step,
                "samples": step.samples,
                "end": end,
                "done": self.curriculum.step_count() if is_last else step.step + 1,
                "seen": max(end, self.curriculum.total) if is_last else end,
                "is_last": is_last,
                "stage": stage,
                "is_new_level": before is not None and _level(stage) != _level(before),
                "parts": [_part(batch, slice(row, row + size), stage, self.text) for row in range(0, rows, size)],
                "key": batch["key"],
            }
            before = stage

    def _steps(self, start: int) -> Iterator[Step]:
        for step in self.curriculum.steps(start):
            if not self.steps_over(step.samples, step.samples + step.batch_size):
                yield step

    def _stage_before(self, start: int) -> Stage | None:
        """That of the step which ended at ``start``."""
        if start == 0 or self.curriculum.constant:
            return None
        steps = self.curriculum.steps(0, start)
        return self.curriculum.at(deque(steps, maxlen=1)[0].samples)


def _level(stage: Stage) -> tuple[Any, ...]:
    """What moves the loss for good when it changes."""
    return stage.image_size, stage.text_length, stage.batch_size


def _part(batch: Batch, rows: slice, stage: Stage, text: TextTransformer) -> Part:
    ids_BT = shorten(batch["text"][rows], stage.text_length, text.config)
    inputs = {"image": batch["image"][rows], "text": text.pack(ids_BT)}
    return {
        "inputs": inputs | {"keys": batch["draw"][rows], "may_flip": batch["may_flip"][rows]},
        "ids": batch["caption_id"][rows],
    }


def _with_last(steps: Iterator[Step]) -> Iterator[tuple[Step, bool]]:
    """Each step, and whether none follows it."""
    step = next(steps, None)
    while step is not None:
        following = next(steps, None)
        yield step, following is None
        step = following


def _joined(batches: list[Batch]) -> Batch:
    """Several batches of a stream as one."""
    if len(batches) == 1:
        return batches[0]
    channels = max(batch["image"].shape[1] for batch in batches)
    whole: Batch = {"key": [key for batch in batches for key in batch["key"]]}
    whole["image"] = torch.cat([_with_channels(batch["image"], channels) for batch in batches])
    for name in ("text", "caption_id", "may_flip", "draw"):
        whole[name] = torch.cat([batch[name] for batch in batches])
    return whole


def _with_channels(image_BCSS: Tensor, channels: int) -> Tensor:
    """Opaque where the others of a batch have transparency."""
    missing = channels - image_BCSS.shape[1]
    if not missing:
        return image_BCSS
    return torch.cat([image_BCSS, torch.full_like(image_BCSS[:, :missing], 255)], 1)
