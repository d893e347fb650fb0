"""What a run tells while it goes: metrics.jsonl, and a progress bar with the numbers people look at."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmbase.errors import MmbaseError


class Tracker:
    """Appends to ``metrics.jsonl`` and draws a progress bar.

    Values may be tensors on the device; they are read only when a line is written, so that the loop never waits for
    the device in between.
    """

    def __init__(self, path: Path, *, steps: int, step: int, seconds: float, console: Console) -> None:
        self.path, self.console = path, console
        _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._started = time.perf_counter() - seconds
        self._last = (step, time.perf_counter())
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} images/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=steps, completed=step, loss="-", speed="-")

    def __enter__(self) -> Tracker:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier parts of a resumed run included."""
        return time.perf_counter() - self._started

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, samples: int, **values: float | torch.Tensor) -> None:
        """Write one line of metrics.

        Raises:
            MmbaseError: the loss is not finite, or the file cannot be written.
        """
        now = time.perf_counter()
        steps, seconds = step - self._last[0], now - self._last[1]
        self._last = (step, now)
        batch = samples / step
        row: dict[str, Any] = {"step": step, "samples": samples, "time": round(self.seconds, 3)}
        row |= {name: float(f"{float(value):.6g}") for name, value in values.items()}
        row["samples_per_second"] = round(steps * batch / seconds, 1) if seconds else 0.0
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise MmbaseError(f"cannot write {str(self.path)!r}: {error.strerror}; free space and run again") from error
        if not math.isfinite(row.get("loss", 0.0)):
            raise MmbaseError(
                f"the loss is {row['loss']} at step {step}; lower training.learning_rate or set training.precision=fp32"
            )
        self._bar.update(
            self._task, completed=step, loss=f"{row.get('loss', 0):.3f}", speed=f"{row['samples_per_second']:.0f}"
        )


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``: what a killed run wrote after its last checkpoint is written anew."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line torn by the kill
    path.write_text("".join(kept), encoding="utf-8")
