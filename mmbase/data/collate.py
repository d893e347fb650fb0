"""The texts and fields of samples as the arrays of a batch. Torch-free: workers run it.

Letters: B batch, C channels (4 where a picture has transparency), S side of a picture, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmbase.data.shards import stable_id
from mmbase.data.tokenizer_base import Tokenizer

Batch = dict[str, Any]
"""``image`` uint8 [B, C, S, S], ``text`` int64 [B, T], ``caption_id`` int64 [B], ``may_flip`` bool [B], ``draw`` int64
[B] (what everything random about a showing follows from), ``key`` list[str]."""


class Collator:
    """Makes the text side of batches.

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

    def __call__(self, texts: list[str], fields: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """``text``, ``caption_id`` and ``may_flip`` of samples with these texts and fields."""
        names = [str(f.get(self.identity, t)) if self.identity else t for f, t in zip(fields, texts)]
        return {
            "text": self.tokenizer(texts),
            "caption_id": np.array([stable_id(name) for name in names], np.int64),
            "may_flip": np.array([self._may_flip(f) for f in fields], bool),
        }

    def _may_flip(self, fields: Mapping[str, Any]) -> bool:
        return not any(pattern.search(str(fields.get(name, ""))) for name, pattern in self.patterns.items())
