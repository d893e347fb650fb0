"""What is too large for a value that wanders: a running median and how far values usually lie from it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""

_RECENT = 16
"""Values whose median is what the next one is expected to be near: few, for a loss falls."""


class RunningLimit:
    """The value above which the next one counts as a spike.

    A value is expected near the median of the last few. How far values lie from that expectation is known from as many
    as ``window`` of them, by the median absolute deviation: neither moves when a few are outliers, so that a spike
    cannot hide the one after it, and a loss that falls does not look as if it varied (Huber 1981, "Robust Statistics").

    Args:
        score: robust standard deviations above the expectation.
        window: deviations that are remembered.
        warmup: values before which nothing is a spike.
        logarithmic: compare logarithms, for values that vary by factors, such as gradient norms.
        floor: smallest standard deviation; relative to the expectation, or of the logarithm.
    """

    def __init__(self, score: float, window: int, warmup: int, *, logarithmic: bool, floor: float) -> None:
        self.score, self.warmup, self.logarithmic, self.floor = score, warmup, logarithmic, floor
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._deviations: deque[float] = deque(maxlen=window)
        self._limit = math.inf

    @property
    def limit(self) -> float:
        """The largest value that is no spike; infinite while too few are known."""
        return self._limit

    def add(self, value: float) -> None:
        """Remember a value that was no spike."""
        value = math.log(max(value, 1e-30)) if self.logarithmic else value
        if self._recent:
            self._deviations.append(value - statistics.median(self._recent))
        self._recent.append(value)
        self._limit = self._compute()

    def forget(self) -> None:
        """Begin anew: what follows is of another kind."""
        self._recent.clear()
        self._deviations.clear()
        self._limit = math.inf

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"recent": list(self._recent), "deviations": list(self._deviations)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.forget()
        self._recent.extend(state["recent"])
        self._deviations.extend(state["deviations"])
        self._limit = self._compute()

    def _compute(self) -> float:
        if len(self._deviations) < self.warmup:
            return math.inf
        expected, usual = statistics.median(self._recent), statistics.median(self._deviations)
        deviation = _TO_SIGMA * statistics.median(abs(value - usual) for value in self._deviations)
        least = self.floor if self.logarithmic else self.floor * abs(expected)
        highest = expected + self.score * max(deviation, least)
        return math.exp(min(highest, 700.0)) if self.logarithmic else highest
