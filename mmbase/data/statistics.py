"""Statistics of image-text pairs, gathered one pair at a time; exact, and small whatever the number of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmbase.data.filters import find_field

_MOST_NAMES = 1000
"""Distinct names counted one by one; what comes later is counted under one heading."""
_OTHERS = "(others)"


class Statistics:
    """Sizes, captions, formats, fields, languages and licences of the pairs added."""

    def __init__(self) -> None:
        self.samples = 0
        self.bytes = 0
        """of the encoded pictures"""
        self.numbers: dict[str, Counter[int]] = {
            name: Counter() for name in ("width", "height", "caption_characters", "caption_words", "picture_bytes")
        }
        self.names: dict[str, Counter[str]] = {name: Counter() for name in ("format", "field", "language", "licence")}

    def add(
        self, *, extension: str, size: int, width: int, height: int, caption: str, fields: Mapping[str, Any]
    ) -> None:
        """Count one pair: a picture of ``size`` bytes and ``width`` x ``height`` pixels, and its text."""
        self.samples += 1
        self.bytes += size
        for name, value in (
            ("width", width),
            ("height", height),
            ("caption_characters", len(caption)),
            ("caption_words", len(caption.split())),
            ("picture_bytes", _two_digits(size)),
        ):
            self.numbers[name][value] += 1
        self._count("format", "jpg" if extension == "jpeg" else extension)
        for name in fields:
            self._count("field", str(name))
        for name in ("language", "licence"):
            value = find_field(name, fields)
            if isinstance(value, str):
                self._count(name, value)

    def _count(self, what: str, name: str, times: int = 1) -> None:
        counter = self.names[what]
        counter[name if name in counter or len(counter) < _MOST_NAMES else _OTHERS] += times

    def merge(self, other: Statistics) -> None:
        """Count what ``other`` has counted."""
        self.samples += other.samples
        self.bytes += other.bytes
        for name, counter in other.numbers.items():
            self.numbers[name].update(counter)
        for name, counts in other.names.items():
            for value, count in counts.items():
                self._count(name, value, count)

    def state(self) -> dict[str, Any]:
        """Everything, JSON-able, for :meth:`restored`."""
        return {
            "samples": self.samples,
            "bytes": self.bytes,
            "numbers": {name: list(counter.items()) for name, counter in self.numbers.items()},
            "names": {name: list(counter.items()) for name, counter in self.names.items()},
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Statistics:
        """Statistics from what :meth:`state` gave."""
        made = cls()
        made.samples, made.bytes = int(state["samples"]), int(state["bytes"])
        for name, items in state["numbers"].items():
            made.numbers[name].update({int(value): int(count) for value, count in items})
        for name, items in state["names"].items():
            made.names[name].update({str(value): int(count) for value, count in items})
        return made

    def summary(self) -> dict[str, Any]:
        """JSON-able: counts, quantiles of the numbers, the names with their counts, most frequent first."""
        told: dict[str, Any] = {"samples": self.samples, "picture_bytes_total": self.bytes}
        told |= {name: quantiles(counter) for name, counter in self.numbers.items() if counter}
        for name, counter in self.names.items():
            if counter:
                told[name] = dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
        return told


def _two_digits(value: int) -> int:
    """Rounded to two digits, so that few distinct values are kept."""
    scale = 10 ** max(0, len(str(value)) - 2)
    return round(value / scale) * scale


def quantiles(counter: Mapping[int, int]) -> dict[str, float]:
    """Smallest, 5 %, median, mean, 95 % and largest of counted values."""
    total = sum(counter.values())
    told: dict[str, float] = {}
    wanted = [("min", 0.0), ("p5", 0.05), ("median", 0.5), ("p95", 0.95), ("max", 1.0)]
    seen = 0
    for value in sorted(counter):
        seen += counter[value]
        while wanted and seen >= max(1, wanted[0][1] * total):
            told[wanted.pop(0)[0]] = value
    told["mean"] = round(sum(value * count for value, count in counter.items()) / total, 2)
    return {name: told[name] for name in ("min", "p5", "median", "mean", "p95", "max")}
