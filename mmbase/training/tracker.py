"""What a run tells while it goes: metrics.jsonl, further sinks, and a progress line with the numbers people look at."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmbase.config import RunConfig
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically
from mmbase.training.checkpoint import Progress as Place
from mmbase.training.curriculum import Curriculum
from mmbase.training.devices import peak_of
from mmbase.training.distributed import Ranks
from mmbase.training.sinks import Sink, open_sinks
from mmbase.training.units import say_bytes, say_count, say_flops, say_seconds

_PLAIN_EVERY = 30.0
"""Seconds between lines where the output is no terminal, so that a job's log says how far it is."""

_RECENT = 20
"""Rows that the time left is judged by: about so many."""


class Tracker:
    """Appends to ``metrics.jsonl`` and shows progress; rank 0 has one.

    Values may be tensors on the device; they are read only when a line is written, so that the loop never waits for
    the device in between.

    Args:
        path: metrics.jsonl; lines after ``step`` are dropped.
        steps: of the whole training.
        step: steps done before.
        seconds: of training before.
        console: shows progress.
        samples: seen before ``step``.
        total_samples: of the whole training; None: steps are taken as equal.
        flops: matrix FLOPs of the first n samples of the training (:meth:`mmbase.training.curriculum.Curriculum
            .flops_until`); None: neither FLOP/s nor MFU are told, and the time left counts samples.
        peak: FLOP/s of all devices of the training together, for MFU; None: not told.
        device: whose memory is told; None or a CPU: the most that this process had resident.
        sinks: take each row as well.
        stop_at_nonfinite: raise when the loss is not finite; False where a guard watches over that.
    """

    def __init__(
        self,
        path: Path,
        *,
        steps: int,
        step: int,
        seconds: float,
        console: Console,
        samples: int = 0,
        total_samples: int | None = None,
        flops: Callable[[float], float] | None = None,
        peak: float | None = None,
        device: torch.device | None = None,
        sinks: Sequence[Sink] = (),
        stop_at_nonfinite: bool = True,
    ) -> None:
        self.path, self.console, self.steps = path, console, steps
        self.total_samples, self.flops, self.peak, self.device = total_samples, flops, peak, device
        self.sinks, self.stop_at_nonfinite = list(sinks), stop_at_nonfinite
        _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._started = time.perf_counter() - seconds
        self._last = (samples, time.perf_counter())
        self._speed: float | None = None
        self._said = time.perf_counter()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            console=console,
        )
        self._task = self._bar.add_task("training", total=steps, completed=step, told="")

    def __enter__(self) -> Tracker:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()
        for sink in self.sinks:
            sink.close()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier parts of a resumed run included."""
        return time.perf_counter() - self._started

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, samples: int, **values: float | torch.Tensor) -> None:
        """Write one line of metrics: these values, speed, MFU, memory and the time left.

        ``data_wait``, seconds since the line before, is shown as a share of the time. What is not finite is written as
        null.

        Raises:
            MmbaseError: the loss is not finite (unless a guard watches), or the file cannot be written.
        """
        read = {name: float(f"{float(value):.6g}") for name, value in values.items()}  # waits for the device
        now = time.perf_counter()
        seconds = now - self._last[1]
        row: dict[str, Any] = {"step": step, "samples": samples, "time": round(self.seconds, 3)} | read
        row |= self._rates(step, samples, seconds)
        self._last = (samples, now)
        self._write(row)
        loss = read.get("loss", 0.0)
        if self.stop_at_nonfinite and not math.isfinite(loss):
            raise MmbaseError(
                f"the loss is {loss} at step {step}; lower training.learning_rate or set training.precision=fp32"
            )
        numbers = {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}
        for sink in self.sinks:
            sink.write(step, numbers)
        self._show(step, row, seconds)

    def rewind(self, step: int, samples: int) -> None:
        """Go back to where ``step`` steps and ``samples`` samples were done: later lines are dropped.

        Raises:
            MmbaseError: the file cannot be written.
        """
        self._file.close()
        _drop_after(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._last = (samples, time.perf_counter())
        for sink in self.sinks:
            sink.rewind(step)
        self._bar.update(self._task, completed=step)

    def _rates(self, step: int, samples: int, seconds: float) -> dict[str, float]:
        """Speed since the line before, memory, and the time left at the recent speed."""
        rates: dict[str, float] = {"samples_per_second": 0.0}
        done = samples - self._last[0]
        if seconds > 0 and done > 0:
            rates["samples_per_second"] = round(done / seconds, 1)
            work = self.flops(samples) - self.flops(self._last[0]) if self.flops else float(done)
            if self.flops:
                rates["flops_per_second"] = float(f"{work / seconds:.4g}")
                if self.peak:
                    rates["mfu"] = float(f"{work / seconds / self.peak:.4g}")
            share = 2 / (_RECENT + 1)
            speed = work / seconds
            self._speed = speed if self._speed is None else (1 - share) * self._speed + share * speed
        rates["memory_bytes"] = float(_memory(self.device))
        if self._speed:
            total = max(self.total_samples or samples * self.steps / step, samples)
            left = self.flops(total) - self.flops(samples) if self.flops else float(total - samples)
            rates["seconds_left"] = round(left / self._speed, 1)
        return rates

    def _write(self, row: dict[str, Any]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        except OSError as error:
            raise MmbaseError(f"cannot write {str(self.path)!r}: {error.strerror}; free space and run again") from error

    def _show(self, step: int, row: dict[str, Any], seconds: float) -> None:
        told = tell(row, seconds)
        self._bar.update(self._task, completed=step, told=told)
        now = time.perf_counter()
        if not self.console.is_terminal and now - self._said >= _PLAIN_EVERY:
            self._said = now
            self.console.print(f"step {step:,} of {self.steps:,}  {told}", soft_wrap=True, highlight=False)


class Untracked(Tracker):
    """What ranks other than the first have: it counts the time, and tells nothing."""

    def __init__(self, seconds: float) -> None:
        self._started = time.perf_counter() - seconds

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def advance(self, step: int) -> None:
        """Nothing to move."""

    def log(self, step: int, samples: int, **values: float | torch.Tensor) -> None:
        """Values stay on the device."""

    def rewind(self, step: int, samples: int) -> None:
        """Nothing to drop."""


def open_tracker(
    config: RunConfig,
    curriculum: Curriculum,
    progress: Place,
    ranks: Ranks,
    dtype: torch.dtype | None,
    folder: Path,
    console: Console,
) -> Tracker:
    """The tracker of a run in ``folder`` that goes on from ``progress``; on ranks above 0 one that is silent."""
    if not ranks.is_first:
        return Untracked(progress.seconds)
    peak = peak_of(ranks.device, dtype)
    console.print(f"  MFU        of {say_flops(peak.flops)}/s: {peak.source}", soft_wrap=True, highlight=False)
    values = config.model_dump(mode="json")
    return Tracker(
        folder / "metrics.jsonl",
        steps=curriculum.step_count(),
        step=progress.step,
        seconds=progress.seconds,
        console=console,
        samples=progress.samples,
        total_samples=curriculum.total,
        flops=curriculum.flops_until,
        peak=peak.flops * ranks.world_size,
        device=ranks.device,
        sinks=open_sinks(config.tracking, folder, console, step=progress.step, values=values),
        stop_at_nonfinite=config.training.guard.policy == "off",
    )


def tell(row: dict[str, Any], seconds: float) -> str:
    """The numbers of a line of metrics that people look at, as one line; ``seconds`` since the line before."""
    parts = [f"loss {row['loss']:.3f}"] if "loss" in row else []
    parts.append(f"{say_count(row['samples_per_second'])} images/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    elif "flops_per_second" in row:
        parts.append(f"{say_flops(row['flops_per_second'])}/s")
    if "data_wait" in row and seconds > 0:
        parts.append(f"data wait {min(1.0, row['data_wait'] / seconds):.0%}")
    parts.append(say_bytes(row["memory_bytes"]))
    if "seconds_left" in row:
        parts.append(f"{say_seconds(row['seconds_left'])} left")
    return "  ".join(parts)


def _memory(device: torch.device | None) -> int:
    """Most bytes that were taken so far: of the GPU's by tensors, or of this process's resident ones."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``: what a killed run wrote after its last checkpoint is written anew."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line torn by the kill
    if (whole := "".join(kept)) != text:
        write_atomically(path, whole)
