"""The held-out split: a seeded share of the distinct values of a field."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class Holdout(BaseModel):
    """A seeded share of the distinct values of one field, taken evenly from every group, kept out of training."""

    model_config = ConfigDict(extra="forbid")

    field: str = Field("unicode", description="samples that share this field's value are held out together")
    group: str = Field("group", description="the share is taken within every value of this field")
    fraction: float = Field(0.1, gt=0, lt=1, description="share of the distinct values held out")
    seed: int = Field(0, description="which values: independent of the training seed")

    def covers(self, fields: dict[str, Any], values: Collection[str]) -> bool:
        """Whether a sample with these fields is one of the held-out ``values``."""
        return str(fields.get(self.field)) in values

    def values(self, fields: Iterable[dict[str, Any]]) -> set[str]:
        """The values held out among these samples; the same for any order of them."""
        groups: dict[str, set[str]] = defaultdict(set)
        for row in fields:
            if self.field in row:
                groups[str(row.get(self.group, ""))].add(str(row[self.field]))
        chosen: set[str] = set()
        for name in sorted(groups):
            values = sorted(groups[name])
            order = np.random.Generator(np.random.Philox(key=[self.seed, stable_id(name)])).permutation(len(values))
            chosen.update(values[i] for i in order[: round(self.fraction * len(values))])
        return chosen


def stable_id(text: str) -> int:
    """A 63-bit number of a string, the same in every process and release (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1
