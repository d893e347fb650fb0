"""Which rows of the table of choices (:mod:`mmbase_kernels.choice`) a result justifies.

At a size our kernel wins where, forward and backward together, it is faster than every rival that ran, and forward
alone not slower than any, both by more than the noise of the two; its errors are within what is demanded, and no row
of it has a problem. A range of sizes wins where every size that was measured in it does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mmbase_bench.side_by_side import BOTH, FORWARD

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}
"""Relative errors against float64 that are demanded of our kernels."""
OURS, OURS_COMPILED = "mmbase-triton", "mmbase-triton-compiled"
TORCH_DTYPES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a case stands in the table of choices."""

    operator: str
    case: str
    width: int
    size: int


@dataclass(frozen=True)
class Rivals:
    """Whom our kernel has to beat."""

    eager: Sequence[str]
    """What an eager call would run in its place."""
    compiled: Sequence[str]
    """What a compiled graph would."""
    ours_compiled: str = OURS
    """Our kernel's row that stands for it in a compiled graph."""
    grows: bool = True
    """Whether more than the largest size behaves as the largest: time is linear in rows, but not in tokens."""


def judge(
    rows: Sequence[Row], place_of: Callable[[Row], Place], rivals: Rivals, architecture: str, result: str
) -> tuple[list[str], list[Row]]:
    """Lines for people, and the rows of the table as dictionaries of its fields.

    Args:
        rows: flat rows, of any number of cases.
        place_of: the place of a row.
        rivals: whom to beat.
        architecture: of the GPU that was measured; empty where it was a CPU.
        result: the file that will be committed; empty where none was written.
    """
    if not architecture:
        return ["verdict: no row for mmbase_kernels/choice.py: only a GPU's result justifies one"], []
    if not result:
        return ["verdict: no row for mmbase_kernels/choice.py: a row names its result file; measure with --output"], []
    lines, wins = [], []
    groups: dict[tuple[str, str, str, int], dict[int, list[Row]]] = {}
    for row in rows:
        at = place_of(row)
        groups.setdefault((row["dtype"], at.operator, at.case, at.width), {}).setdefault(at.size, []).append(row)
    for (dtype, operator, case, width), sizes in sorted(groups.items()):
        found: list[tuple[int, bool | None]] = []
        for size, some in sorted(sizes.items()):
            where = " ".join(filter(None, (operator, case, f"width {width}", f"size {size}", dtype)))
            why = obstacle(some, OURS, rivals.eager)
            why_compiled = obstacle(some, rivals.ours_compiled, rivals.compiled)
            found.append((size, None if why else not why_compiled))
            remark = f", but in a compiled graph {why_compiled}" if why_compiled else ""
            lines.append(f"{where}: {why or 'wins' + remark}")
        for smallest, largest, compiled in ranges(found):
            open_ended = rivals.grows and largest == found[-1][0]
            wins.append(
                {
                    "operator": operator,
                    "architecture": architecture,
                    "dtype": dtype,
                    "case": case,
                    "width": width,
                    "smallest": smallest,
                    "largest": None if open_ended else largest,
                    "compiled": compiled,
                    "result": result,
                }
            )
    pasted = [source(win) for win in wins] or ["(none)"]
    return ["verdict, by size:", *lines, "rows for WINS in mmbase_kernels/choice.py:", *pasted], wins


def source(win: Row) -> str:
    """A row as it is written into the table."""
    values = [
        *(f'"{win[key]}"' for key in ("operator", "architecture")),
        TORCH_DTYPES[win["dtype"]],
        f'"{win["case"]}"',
        *(repr(win[key]) for key in ("width", "smallest", "largest", "compiled")),
        f'"{win["result"]}"',
    ]
    return f"    Win({', '.join(values)}),"


def ranges(found: Iterable[tuple[int, bool | None]]) -> list[tuple[int, int, bool]]:
    """Runs of sizes that win alike, as (smallest, largest, whether also in a compiled graph).

    Args:
        found: sizes in rising order; None: it does not win, else whether also in a compiled graph.
    """
    runs = []
    for won, run in groupby(found, key=lambda item: item[1]):
        sizes = [size for size, _ in run]
        if won is not None:
            runs.append((sizes[0], sizes[-1], won))
    return runs


def obstacle(rows: Sequence[Row], ours: str, rivals: Sequence[str]) -> str:
    """Why our kernel does not win at one size, or an empty string."""
    if not rivals:
        return "nobody to compare with was measured"
    for case in dict.fromkeys(row["in_case"] for row in rows):
        for direction in (BOTH, FORWARD):
            some = {r["contender"]: r for r in rows if r["in_case"] == case and r["direction"] == direction}
            mine = some.get(ours)
            if mine is None:
                return f"{ours} was not measured {direction}"
            if mine["problem"] or not mine.get("rounds_ms"):
                return f"{direction}: {mine['problem'] or 'not timed'}"
            if why := inexact(mine):
                return f"{direction}: {why}"
            timed = [some[name] for name in rivals if name in some and some[name].get("rounds_ms")]
            if not timed:
                return f"{direction}: no rival ran"
            for rival in timed:
                times = ratio(mine, rival)
                noise = max(mine["noise"], rival["noise"])
                if (times > 1 + noise) if direction == FORWARD else (times >= 1 - noise):
                    return f"{direction}: {times:.3f} x {rival['contender']} (noise {noise:.1%})"
    return ""


def inexact(row: Row) -> str:
    """Which error is above what is demanded, or an empty string."""
    errors = {key: value for key, value in row.items() if key.endswith("_error")}
    if not errors:
        return "no error against float64 is known"
    for name, value in errors.items():
        if value is None or not math.isfinite(value) or value > TOLERANCE[row["dtype"]]:
            return f"{name} {value} is above {TOLERANCE[row['dtype']]:g}"
    return ""


def ratio(row: Row, other: Row) -> float:
    """Median over rounds of one row's time divided by another's."""
    return statistics.median(a / b for a, b in zip(row["rounds_ms"], other["rounds_ms"], strict=True))


def against_best(rows: Sequence[Row], ours: str, rivals: Sequence[str], direction: str = BOTH) -> dict[str, float]:
    """By case, how many times faster than the fastest rival our row is."""
    speedups = {}
    for case in dict.fromkeys(row["in_case"] for row in rows):
        some = {r["contender"]: r for r in rows if r["in_case"] == case and r["direction"] == direction}
        timed = [some[name] for name in rivals if name in some and some[name].get("rounds_ms")]
        if timed and some.get(ours, {}).get("rounds_ms"):
            speedups[case] = 1 / ratio(some[ours], min(timed, key=lambda row: row["p50_ms"]))
    return speedups


def summary(speedups: dict[str, float], ours: str, of: str) -> list[str]:
    """One line: geometric mean and the worst case."""
    if not speedups:
        return []
    mean = math.exp(statistics.fmean(math.log(value) for value in speedups.values()))
    worst = min(speedups, key=lambda case: speedups[case])
    return [
        f"{ours} over {of}, {BOTH}: {mean:.2f} x as fast (geometric mean of {len(speedups)}), "
        f"least {speedups[worst]:.2f} ({worst})"
    ]
