"""What changes while a model is trained, as data: one schedule for each quantity. Torch-free."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

What = Literal[
    "image_size",
    "patch_keep",
    "text_length",
    "batch_size",
    "learning_rate",
    "source_weight",
    "lock_vision",
    "lock_text",
]
Shape = Literal["steps", "linear", "cosine", "constant"]

WHOLE = ("image_size", "text_length", "batch_size", "lock_vision", "lock_text")
"""Quantities that are whole numbers."""

_LOWEST = {"image_size": 1, "text_length": 1, "batch_size": 1}
_MOST = 1.0
"""A place up to this is a share of the training; above it, a number of samples."""


class Schedule(BaseModel):
    """One quantity over the samples seen: ``{what: image_size, values: [[0, 112], [0.8, 224]]}``."""

    model_config = ConfigDict(extra="forbid")

    what: What = Field(
        description="image_size (pixels), patch_keep (share of the patches), text_length (tokens), batch_size (pairs), "
        "learning_rate (factor on the schedule), source_weight, lock_vision, lock_text (groups of layers from the "
        "input; all: the whole tower)"
    )
    shape: Shape = Field(
        "steps",
        description="between the points of values: steps holds each until the next, linear and cosine (half a wave) go "
        "from one to the next; constant: values is one number",
    )
    values: float | Literal["all"] | list[tuple[float, float | Literal["all"]]] = Field(
        description="points [place, value]; a place up to 1 is a share of the training, above it a number of samples"
    )
    source: int | None = Field(None, ge=0, description="source_weight: which part of data.mixture, from 0")
    multiple: float | None = Field(
        None,
        gt=0,
        description="values in between are rounded to multiples of this; null: a patch for image_size, 1/16 for "
        "patch_keep, the largest power of two up to 64 that divides training.batch_size for batch_size, else 1 or none",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        points = isinstance(self.values, list)
        if points == (self.shape == "constant"):
            wanted = "one number" if self.shape == "constant" else "points [place, value]"
            raise ValueError(f"shape={self.shape} takes {wanted} as values, not {self.values}")
        if (self.source is None) == (self.what == "source_weight"):
            raise ValueError("source names a part of data.mixture: give it with what=source_weight, and only there")
        places = [place for place, _ in self.points]
        if not places or places[0] < 0 or any(b <= a for a, b in itertools.pairwise(places)):
            raise ValueError(f"places of values must rise from 0 on, not {places}")
        if self.what.startswith("lock") and self.shape in ("linear", "cosine"):
            raise ValueError(f"what={self.what} goes in steps, not shape={self.shape}")
        for _, value in self.points:
            self._check(value)
        return self

    def _check(self, value: float | Literal["all"]) -> None:
        if value == "all":
            if not self.what.startswith("lock"):
                raise ValueError(f"all is a value of lock_vision and lock_text, not of {self.what}")
            return
        if self.what in WHOLE and value != int(value):
            raise ValueError(f"{self.what} takes whole numbers, not {value}")
        low = _LOWEST.get(self.what, 0)
        if not math.isfinite(value) or value < low or (self.what == "patch_keep" and not 0 < value <= 1):
            wanted = "above 0 and at most 1" if self.what == "patch_keep" else f"{low} or more"
            raise ValueError(f"{self.what} must be {wanted}, not {value}")

    @property
    def points(self) -> list[tuple[float, float | Literal["all"]]]:
        """The values as points, a constant as one."""
        return self.values if isinstance(self.values, list) else [(0.0, self.values)]

    def sample_points(self, total: int) -> list[tuple[int, float]]:
        """The points with places in samples of a training of ``total``, and ``all`` as infinity.

        Raises:
            ValueError: two points at one place, or out of order, once shares and samples are put together.
        """
        points = [
            (round(place * total) if place <= _MOST else round(place), math.inf if value == "all" else float(value))
            for place, value in self.points
        ]
        places = [place for place, _ in points]
        if any(b <= a for a, b in itertools.pairwise(places)):
            raise ValueError(f"curriculum: {self.what} has points at {places} of {total} samples; they must rise")
        return points


def value_at(shape: Shape, points: list[tuple[int, float]], samples: float) -> float:
    """Where a schedule with these points is after ``samples`` samples: the first value before, the last after them."""
    before = next((i for i in reversed(range(len(points))) if points[i][0] <= samples), None)
    if before is None:
        return points[0][1]
    if before == len(points) - 1 or shape in ("steps", "constant"):
        return points[before][1]
    (first, low), (last, high) = points[before : before + 2]
    share = (samples - first) / (last - first)
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return low + (high - low) * share
