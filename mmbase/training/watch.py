"""``mmbase watch RUN``: curves of metrics.jsonl drawn in the terminal and redrawn as lines come. Torch-free.

Each character is a cell of 2 x 4 Braille dots. Only what was appended is read anew; a file that became shorter (a run
that was rolled back, or started afresh) is read from the start.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from mmbase.errors import MmbaseError
from mmbase.training.units import say_bytes, say_count, say_flops, say_seconds

CURVES = {
    "loss": ("Loss", ""),
    "logit_scale": ("Logit scale", ""),
    "samples_per_second": ("Throughput", "images/s"),
    "learning_rate": ("Learning rate", ""),
}
"""What is drawn: key in metrics.jsonl, heading, unit."""

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a Braille character by row and column of its dots."""

_BRAILLE = 0x2800
_STALE = 120.0
"""Seconds without a new line after which that is said."""


class History:
    """The rows of a metrics.jsonl that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._at, self._file = 0, -1
        self.changed = 0.0
        """when the file was last written, seconds since 1970"""

    def update(self) -> bool:
        """Read what is new; whether there was any."""
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return False
        self.changed = state.st_mtime
        if state.st_size < self._at or state.st_ino != self._file:
            self.rows, self._at, self._file = [], 0, state.st_ino
        if state.st_size == self._at:
            return False
        with self.path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line that is half written is left for the next time
        self._at += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                self.rows.append(row)
        return bool(whole)


def watch(run: str | Path, *, every: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Draw the curves of a run until interrupted.

    Args:
        run: the run's folder.
        every: seconds between looks.
        once: draw once and return.
        console: where; the terminal.

    Raises:
        MmbaseError: no run lies there, or with ``once`` nothing was logged yet.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise MmbaseError(f"there is no run at {str(run)!r}; name the folder that `mmbase train` writes")
    history = History(folder / "metrics.jsonl")
    history.update()
    console = console or Console()
    if once:
        if not history.rows:
            raise MmbaseError(
                f"{str(history.path)!r} has no line yet; training.log_every says how often one is written"
            )
        console.print(frame(folder, history, console.width))
        return
    with Live(frame(folder, history, console.width), console=console, screen=console.is_terminal) as live:
        try:
            while True:
                time.sleep(every)
                history.update()
                live.update(frame(folder, history, console.width), refresh=True)
        except KeyboardInterrupt:
            return


def frame(folder: Path, history: History, width: int) -> RenderableType:
    """All that is shown: a line on how far the run is, and the curves, side by side where there is room."""
    rows = history.rows
    if not rows:
        return Text(f"{folder}: waiting for the first line of metrics.jsonl")
    across = 2 if width >= 90 else 1
    inner = max(20, width // across - 4)
    panels = []
    for key, (title, unit) in CURVES.items():
        points = [(_place(row), row[key]) for row in rows if _is_number(row.get(key))]
        if points:
            last = f"{_short(points[-1][1])} {unit}".strip()
            panels.append(Panel(Text("\n".join(plot(points, inner, 8))), title=f"{title}  {last}", width=inner + 4))
    age = max(0.0, time.time() - history.changed)
    head = [Text(headline(folder, rows), style="bold")]
    if age > _STALE and rows[-1].get("seconds_left", 1):
        head.append(Text(f"no new line for {say_seconds(age)}: the run ended, stopped or hangs", style="yellow"))
    return Group(*head, Columns(panels, padding=0))


def headline(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Step, samples, time and the last line's other numbers."""
    last = rows[-1]
    parts = [str(folder), f"step {last['step']:,}"]
    if _is_number(last.get("samples")):
        parts.append(f"{say_count(last['samples'])} samples")
    if _is_number(last.get("time")):
        parts.append(f"{say_seconds(last['time'])} so far")
    if last.get("seconds_left"):
        parts.append(f"{say_seconds(last['seconds_left'])} left")
    if _is_number(last.get("mfu")):
        parts.append(f"MFU {last['mfu']:.1%}")
    elif _is_number(last.get("flops_per_second")):
        parts.append(f"{say_flops(last['flops_per_second'])}/s")
    if _is_number(last.get("data_wait")) and len(rows) > 1 and last.get("time", 0) > rows[-2].get("time", 0):
        parts.append(f"data wait {min(1.0, last['data_wait'] / (last['time'] - rows[-2]['time'])):.0%}")
    if _is_number(last.get("memory_bytes")):
        parts.append(say_bytes(last["memory_bytes"]))
    return "  ".join(parts)


def plot(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """A curve as ``height`` lines of ``width`` characters, its limits on the left, and a line below with those of x.

    Points are joined by straight lines; several in one column of dots fill it from the least to the greatest.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    labels = [_short(high), _short(low)]
    margin = max(map(len, labels))
    columns, lines = max(1, width - margin - 1) * 2, height * 4
    dots = [
        (
            round((x - left) / (right - left) * (columns - 1)) if right > left else 0,
            round((high - y) / (high - low) * (lines - 1)) if high > low else lines // 2,
        )
        for x, y in points
    ]
    spans: dict[int, tuple[int, int]] = {}
    for (first, up), (last, down) in zip([dots[0], *dots], dots):
        for column in range(first, last + 1):  # of the line to the next point, what lies in this column
            begin, end = (min(max(column + half, first), last) - first for half in (-0.5, 0.5))
            slope = (down - up) / max(1, last - first)
            ends = (up, down) if first == last else (up + slope * begin, up + slope * end)
            top, bottom = spans.get(column, (lines, -1))
            spans[column] = min(top, round(min(ends))), max(bottom, round(max(ends)))
    cells = [[0] * (columns // 2) for _ in range(height)]
    for column, (first, last) in spans.items():
        for dot in range(first, last + 1):
            cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
    text = ["".join(chr(_BRAILLE + bits) for bits in row) for row in cells]
    edge = {0: labels[0], height - 1: labels[1]}
    drawn = [f"{edge.get(number, ''):>{margin}} {line}" for number, line in enumerate(text)]
    start, end = say_count(left), say_count(right)
    return [*drawn, f"{'':>{margin}} {start}{end:>{max(0, columns // 2 - len(start))}}"]


def _place(row: Mapping[str, Any]) -> float:
    """Where a row stands: samples seen, or the step where these are not told."""
    return float(row["samples"] if _is_number(row.get("samples")) else row["step"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> str:
    return say_count(value) if abs(value) >= 1000 else f"{value:.3g}"
