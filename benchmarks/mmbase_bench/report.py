"""Measurements as a console table, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmbase.files import write_atomically
from mmbase.training.run import environment
from mmbase_bench.harness import Measurement

COLOURS = {"ours": "#1f6fb4", "peer": "#9a9a9a"}


def record_environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, driver, commit, date and command, so that a figure can be understood later.

    ``MMBASE_COMMIT`` names the commit where the code lies without its repository.
    """
    found = environment(device)
    found["commit"] = found["commit"] or os.environ.get("MMBASE_COMMIT")
    found["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if device.type == "cuda":
        found["driver"] = _driver()
        found["cuda"] = torch.version.cuda
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def table(measurements: Sequence[Measurement]) -> str:
    """The rows of one case, aligned; a row without figures says why."""
    names = list(dict.fromkeys(name for row in measurements for name in row.errors))
    heads = ["contender", "p50 ms", "p20..p80", "x floor", "x base", "peak MB", "noise", *(f"{n} err" for n in names)]
    lines = [heads]
    for row in measurements:
        timing = row.timing
        lines.append(
            [
                row.contender,
                _number(timing.p50_ms if timing else None),
                f"{_number(timing.p20_ms)}..{_number(timing.p80_ms)}" if timing else "-",
                _number(row.ratio_to_floor),
                _number(row.ratio_to_baseline),
                _number(row.peak_bytes / 1e6 if row.peak_bytes is not None else None),
                f"{timing.noise:.1%}" if timing else "-",
                *(f"{row.errors[name]:.1e}" if name in row.errors else "-" for name in names),
            ]
        )
    for row, line in zip(measurements, lines[1:], strict=True):
        line.append("; ".join(filter(None, (row.problem, row.note))))
    return align(lines)


def align(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells in columns under a line of heads, the first `left` flush left; a cell beyond the heads is a remark."""
    heads = lines[0]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    texts = []
    for line in lines:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ]
        texts.append("  ".join([*cells, *line[len(heads) :]]).rstrip())
    return "\n".join(texts)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def write_results(
    folder: Path, name: str, measurements: Sequence[Measurement], header: dict[str, Any], title: str
) -> list[Path]:
    """Write ``NAME.csv``, ``NAME.json`` (with `header`: environment, ceilings) and ``NAME.png`` into `folder`.

    Raises:
        MmbaseError: the folder cannot be written.
    """
    rows = [row.flat() | _rounds(row) for row in measurements]
    written = write_rows(folder, name, rows, header)
    return [*written, write_atomically(folder / f"{name}.png", lambda file: plot(file, measurements, title))]


def write_rows(folder: Path, name: str, rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> list[Path]:
    """Write ``NAME.csv`` (plain values) and ``NAME.json`` (everything, after `header`) into `folder`."""
    columns = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return [
        write_atomically(folder / f"{name}.csv", text.getvalue()),
        write_atomically(folder / f"{name}.json", json.dumps({**header, "results": rows}, indent=2) + "\n"),
    ]


def _rounds(measurement: Measurement) -> dict[str, Any]:
    return {"rounds_ms": list(measurement.timing.rounds_ms)} if measurement.timing else {}


def plot(file: Any, measurements: Sequence[Measurement], title: str) -> None:
    """One row of panels per case: median time with p20 to p80 and each method's floor, and peak memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases: dict[str, list[Measurement]] = {}
    for row in measurements:
        cases.setdefault(", ".join(f"{key} {value}" for key, value in row.case.items()), []).append(row)
    heights = [len(rows) + 1.5 for rows in cases.values()]
    figure = Figure(figsize=(12, 0.6 + 0.3 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(len(cases), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (time_panel, memory_panel), (case, rows) in zip(panels, cases.items()):
        _time_panel(time_panel, rows)
        time_panel.set_title(case, fontsize=9, loc="left")
        _memory_panel(memory_panel, rows)
    figure.savefig(file, format="png", dpi=110)


def _time_panel(panel: Any, rows: Sequence[Measurement]) -> None:
    for place, row in enumerate(rows):
        if row.timing is None:
            panel.text(0, place, " " + row.problem[:70], va="center", fontsize=7, color="#a03030")
            continue
        timing = row.timing
        spread = [[timing.p50_ms - timing.p20_ms], [timing.p80_ms - timing.p50_ms]]
        panel.barh(place, timing.p50_ms, color=_colour(row), xerr=spread, error_kw={"elinewidth": 1})
        panel.text(timing.p80_ms, place, f" {_number(timing.p50_ms)}", va="center", fontsize=7)
        if row.floor_ms:
            panel.plot([row.floor_ms] * 2, [place - 0.45, place + 0.45], color="black", linestyle=":", linewidth=1.5)
    panel.set_yticks(range(len(rows)), [row.contender for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(0, 1.1 * max([row.timing.p80_ms for row in rows if row.timing] or [1]))
    panel.set_xlabel("ms per call; dotted: floor", fontsize=8)


def _memory_panel(panel: Any, rows: Sequence[Measurement]) -> None:
    for place, row in enumerate(rows):
        if row.peak_bytes is not None:
            panel.barh(place, row.peak_bytes / 1e6, color=_colour(row))
            panel.text(row.peak_bytes / 1e6, place, f" {_number(row.peak_bytes / 1e6)}", va="center", fontsize=7)
    panel.set_yticks(range(len(rows)), [""] * len(rows))
    panel.set_ylim(len(rows) - 0.4, -0.6)
    if taken := [row.peak_bytes / 1e6 for row in rows if row.peak_bytes]:
        panel.set_xscale("log")
        panel.set_xlim(min(taken) / 2, max(taken) * 2)
    panel.set_xlabel("peak MB beyond inputs (log)", fontsize=8)


def _colour(row: Measurement) -> str:
    return COLOURS["ours" if row.contender.startswith("mmbase") else "peer"]
