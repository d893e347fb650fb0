"""Where the time of loading goes, and whether training starves.

Stages are seconds added up: those of :data:`mmbase.data.prepare.STAGES` over all workers, ``wait`` of the training
process for the next batch, ``copy`` to the device.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from mmbase.data.prepare import STAGES

WAIT, COPY = "wait", "copy"
STARVING = 0.1
"""Share of the time spent waiting for data from which a run counts as data-bound."""

_DOING = {"read": "reading", "decode": "decoding", "tokenise": "tokenising", "collate": "collating"}


class Watched(Protocol):
    """What is asked of a stream."""

    times: StageTimes
    workers: int

    @property
    def counts(self) -> dict[str, Any]:
        """Good and bad samples."""
        ...


class StageTimes:
    """Seconds per stage, since the start and since the last look."""

    overlapped = False
    """whether batches are taken by a thread, whose waiting for them is not training's"""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*STAGES, WAIT, COPY), 0.0)
        self._looked = dict(self.seconds)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add to the stages named."""
        for stage, value in seconds.items():
            self.seconds[stage] += value

    def taken(self, seconds: float) -> None:
        """Account for the time in which a stream made its next batch."""
        if not self.overlapped:
            self.seconds[WAIT] += seconds

    def lap(self) -> dict[str, float]:
        """Seconds per stage since the last call."""
        passed = {stage: value - self._looked[stage] for stage, value in self.seconds.items()}
        self._looked = dict(self.seconds)
        return passed


class DataWatch:
    """Watches a stream while training uses it.

    Attributes:
        verdict: what to print after the last :meth:`lap`, or None; said once for each stage that training waits for.
    """

    def __init__(self, stream: Watched) -> None:
        self.stream = stream
        self.verdict: str | None = None
        self._last: float | None = None
        self._said: set[str] = set()
        stream.times.lap()

    def lap(self) -> dict[str, float]:
        """Seconds per stage since the last call, as ``data_STAGE``, and ``data_bad``, the bad samples so far."""
        now, seconds = time.perf_counter(), self.stream.times.lap()
        self.verdict = None
        if self._last is not None:  # the first stretch holds the start of the workers
            told = verdict(seconds, now - self._last, self.stream.workers)
            slowest = max(STAGES, key=lambda name: seconds[name])
            if told and slowest not in self._said:
                self._said.add(slowest)
                self.verdict = told
        self._last = now
        used = {f"data_{stage}": value for stage, value in seconds.items() if value}
        return used | {"data_bad": self.stream.counts["bad"]}


def verdict(seconds: Mapping[str, float], elapsed: float, workers: int) -> str | None:
    """One line for a starving run: how much it waits, for which stage, and what to try; None where it does not.

    Args:
        seconds: per stage, over ``elapsed`` seconds of training.
        elapsed: seconds of training.
        workers: decoding processes; 0 where the training process loads.
    """
    share = seconds[WAIT] / elapsed if elapsed > 0 else 0.0
    work = sum(seconds[stage] for stage in STAGES)
    if share < STARVING or work <= 0:
        return None
    stage = max(STAGES, key=lambda name: seconds[name])
    who = f"{workers} worker{'s' * (workers > 1)}" if workers else "no workers"
    return (
        f"data-bound: training waits for data {share:.0%} of the time; {_DOING[stage]} takes "
        f"{seconds[stage] / work:.0%} of {'worker' if workers else 'loading'} time; {who}; "
        f"try {_remedy(stage, share, workers)}"
    )


def _remedy(stage: str, share: float, workers: int) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Waiting shrinks with workers until data comes as fast as it is used.
    wanted = max(workers + 1, round(max(workers, 1) / max(1 - share, 0.1)))
    if stage == "read":
        return "a faster disk or data.cache on a local one, fewer and larger shards" + (
            f", data.workers={wanted}" if wanted <= 4 * cores else ""
        )
    if wanted <= cores:
        return f"data.workers={wanted} ({cores} cores)"
    if stage == "decode":
        if importlib.util.find_spec("simplejpeg") is None:
            return f"`pip install 'mmbase[fast]'`, all {cores} cores are in use"
        return f"smaller pictures (`mmbase data pack` with a resize), all {cores} cores are in use"
    return f"a machine with more than {cores} cores"
