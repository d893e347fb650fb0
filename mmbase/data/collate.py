"""Samples to one batch, and random numbers that depend on a place alone.

Letters: B batch, C channels (4 where a picture has transparency), S side of a picture, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mmbase.data.shards import stable_id
from mmbase.data.tokenizer import Tokenizer

Batch = dict[str, Any]
"""``image`` uint8 [B, C, S, S], ``text`` int64 [B, T], ``caption_id`` int64 [B], ``may_flip`` bool [B],
``key`` list[str]."""


def generator(seed: int, *position: int) -> np.random.Generator:
    """Random numbers that depend on the seed and a place alone, never on what was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *position))))


def stack_pictures(arrays: list[np.ndarray], size: int) -> torch.Tensor:
    """uint8 ``[B, C, S, S]`` of pictures ``[3 or 4, S, S]``; where one has alpha, the others get an opaque one."""
    channels = max(len(array) for array in arrays)
    stacked = torch.full((len(arrays), channels, size, size), 255, dtype=torch.uint8)
    for row, array in zip(stacked, arrays):
        row[: len(array)] = torch.from_numpy(array)
    return stacked


class Collator:
    """Makes batches of decoded pictures, their texts and their fields.

    Args:
        tokenizer: text to ids.
        identity: field whose equal values are one thing, never negatives of each other; None: the text itself.
        keep_orientation: field to regular expression; a sample whose field matches is never mirrored.
    """

    def __init__(
        self, tokenizer: Tokenizer, identity: str | None = None, keep_orientation: Mapping[str, str] | None = None
    ) -> None:
        self.tokenizer, self.identity = tokenizer, identity
        self.patterns = {name: re.compile(text, re.IGNORECASE) for name, text in (keep_orientation or {}).items()}

    def __call__(self, images: torch.Tensor, texts: list[str], fields: list[dict[str, Any]], keys: list[str]) -> Batch:
        """The batch of uint8 ``[B, C, S, S]`` pictures."""
        names = [str(f.get(self.identity, t)) if self.identity else t for f, t in zip(fields, texts)]
        return {
            "image": images,
            "text": torch.from_numpy(self.tokenizer(texts)),
            "caption_id": torch.tensor([stable_id(name) for name in names]),
            "may_flip": torch.tensor([self._may_flip(f) for f in fields]),
            "key": keys,
        }

    def _may_flip(self, fields: Mapping[str, Any]) -> bool:
        return not any(pattern.search(str(fields.get(name, ""))) for name, pattern in self.patterns.items())
