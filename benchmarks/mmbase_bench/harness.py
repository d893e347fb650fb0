"""Time of contenders on the same work, set against the floor that the machine's own ceilings leave.

A floor is the larger of FLOPs over the matrix product ceiling and bytes over the copy ceiling, both measured on the
spot (:mod:`mmbase_bench.ceilings`); every measurement names its floor and its ratio to it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mmbase_bench.ceilings import Ceilings

Call = Callable[[int], object]
"""Does the work once, on the input set of this number (modulo the sets there are)."""


@dataclass(frozen=True)
class Staged:
    """Work of which the first part comes before the clock starts: the forward pass where the backward is timed."""

    prepare: Callable[[int], Any]
    """On the input set of this number."""
    timed: Callable[[Any], object]
    """Takes what `prepare` returned."""

    def __call__(self, index: int) -> object:
        """Both parts."""
        return self.timed(self.prepare(index))


CUDA_BURST = 5
"""Timed calls per round on a GPU; one on a CPU, where peers alternate call by call."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    noise: float
    """The same version timed twice: relative difference between the medians of even and odd rounds."""
    rounds_ms: tuple[float, ...]
    """The median of each round; rounds of two contenders with one index ran side by side."""


@dataclass(frozen=True)
class Work:
    """The least a contender's method has to do in one call."""

    flops: float
    """Of matrix products."""
    bytes: float
    """Moved to or from device memory, each input read once and each output written once."""


@dataclass
class Measurement:
    """One contender on one case: one row of a result."""

    subject: str
    case: dict[str, Any]
    contender: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    """Highest memory in use during a call beyond its inputs; gradients and outputs count."""
    floor_ms: float | None = None
    floor_by: str = ""
    """``matmul`` or ``copy``: the ceiling that sets the floor."""
    ratio_to_baseline: float | None = None
    """Median over rounds of the time divided by the baseline's of the same round; below 1 is faster."""
    baseline: str = ""
    """The contender that it was compared with, where a result's head does not name one for all."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative errors against float64, by quantity."""
    problem: str = ""
    """Why it did not run, did not finish or lacks a figure; empty where all is well."""
    note: str = ""

    @property
    def ratio_to_floor(self) -> float | None:
        """Median time over the floor; 1 is the least the method allows on this machine."""
        return self.timing.p50_ms / self.floor_ms if self.timing and self.floor_ms else None

    def set_floor(self, work: Work, ceilings: Ceilings) -> None:
        """Fill the floor of `work` in."""
        self.floor_ms, self.floor_by = floor(work, ceilings)

    def set_errors(self, errors: dict[str, float]) -> None:
        """Fill the errors in; one that is not finite is a problem too, though the time stands."""
        self.errors = errors
        wrong = [name for name, value in errors.items() if not math.isfinite(value)]
        if wrong:
            self.problem = "; ".join(filter(None, (self.problem, "not finite: " + ", ".join(wrong))))

    def flat(self) -> dict[str, Any]:
        """One level of plain values, for CSV and JSON."""
        timing = self.timing
        return {
            "subject": self.subject,
            **self.case,
            "contender": self.contender,
            "p20_ms": timing.p20_ms if timing else None,
            "p50_ms": timing.p50_ms if timing else None,
            "p80_ms": timing.p80_ms if timing else None,
            "noise": timing.noise if timing else None,
            "peak_bytes": self.peak_bytes,
            "floor_ms": self.floor_ms,
            "floor_by": self.floor_by,
            "ratio_to_floor": self.ratio_to_floor,
            "ratio_to_baseline": self.ratio_to_baseline,
            **({"baseline": self.baseline} if self.baseline else {}),
            **{f"{name}_error": value if math.isfinite(value) else None for name, value in self.errors.items()},
            "problem": self.problem,
            "note": self.note,
        }


def floor(work: Work, ceilings: Ceilings) -> tuple[float, str]:
    """Milliseconds that `work` takes at the machine's ceilings, and which of the two binds."""
    matmul_ms = 1e3 * work.flops / ceilings.matmul_flops
    copy_ms = 1e3 * work.bytes / ceilings.copy_bytes
    return (matmul_ms, "matmul") if matmul_ms >= copy_ms else (copy_ms, "copy")


def percentile(samples: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0 to 100) by linear interpolation between the closest ranks."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def describe(rounds: Sequence[Sequence[float]]) -> Timing:
    """The figures of a contender from the milliseconds of its calls, round by round."""
    medians = tuple(statistics.median(calls) for calls in rounds)
    everything = [call for calls in rounds for call in calls]
    noise = abs(statistics.median(medians[::2]) / statistics.median(medians[1::2]) - 1)
    return Timing(*(percentile(everything, q) for q in (20, 50, 80)), noise=noise, rounds_ms=medians)


def ratio(timing: Timing, baseline: Timing) -> float:
    """Median over rounds of one contender's time divided by another's: swings of the machine's speed cancel."""
    return statistics.median(ours / theirs for ours, theirs in zip(timing.rounds_ms, baseline.rounds_ms, strict=True))


def time_alternating(
    contenders: Mapping[str, Call], *, device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, Timing | str]:
    """Time the contenders in rounds, in swapped order from round to round.

    On a CPU a round is one call each by ``perf_counter``; on CUDA a burst of calls each, every one between two events,
    on rotating inputs. A contender that raises is out, its reason in place of its figures.

    Args:
        rounds: at least 2, so that each version is timed twice.
        warmup: calls of each contender before the first round; on CUDA one more before each burst.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, not {rounds}: the same version timed twice gives the noise")
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    failures: dict[str, str] = {}
    names = list(contenders)
    for index in range(-1, rounds):
        for name in names if index % 2 == 0 else reversed(names):
            if name in failures:
                continue
            try:
                if index < 0:
                    for call in range(warmup):
                        contenders[name](call)
                    synchronise(device)
                else:
                    samples[name].append(_round(contenders[name], device, index))
            except Exception as error:
                failures[name] = reason(error)
                release(device)
    return {name: failures[name] if name in failures else describe(samples[name]) for name in names}


def _round(call: Call, device: torch.device, index: int) -> list[float]:
    if device.type != "cuda":
        timed = _timed(call, index)
        start = time.perf_counter()
        timed()
        return [1e3 * (time.perf_counter() - start)]
    call(index)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(CUDA_BURST)]
    for offset, (start, end) in enumerate(events, index * CUDA_BURST + 1):
        timed = _timed(call, offset)
        start.record()
        timed()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _timed(call: Call, index: int) -> Callable[[], object]:
    """What is timed of a call, after what comes before it was started."""
    return partial(call.timed, call.prepare(index)) if isinstance(call, Staged) else partial(call, index)


def reason(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = (str(error).strip() or "no message").splitlines()
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # the backend of torch.compile: cause second
    for line in lines:  # its tracer: the cause comes last
        if "Developer debug context: " in line:
            first = line.strip().removeprefix("Developer debug context: ")
    return f"{type(error).__name__}: {first}"[:300]


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory that a failed contender left in the cache back to the device, if that answers."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
