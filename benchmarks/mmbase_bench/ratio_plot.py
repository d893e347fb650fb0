"""Many cases and contenders in one picture: how many times the floor each took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OURS = {"mmbase-triton": "#1f6fb4", "mmbase-auto": "#4fa3d9"}
MARKERS = "osD^vP*Xd<>"


def plot_ratios(file: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """One panel per direction, one line of marks per case: time over floor, from the 20th to the 80th percentile.

    Args:
        file: open for writing bytes; PNG.
        rows: flat rows with ``in_case``, ``direction``, ``contender``, ``floor_ms`` and the percentiles.
        title: over the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["in_case"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    height = 0.3 * max(len(contenders), 3) * len(cases) * 0.45
    figure = Figure(figsize=(4.6 * len(directions) + 2.4, 1.6 + max(height, 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    for panel, direction in zip(panels, directions):
        _panel(panel, [row for row in rows if row["direction"] == direction], cases, contenders)
        panel.set_title(direction, fontsize=9)
    panels[0].set_yticks(range(len(cases)), cases, fontsize=8)
    panels[0].set_ylim(len(cases) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.savefig(file, format="png", dpi=110)


def _panel(panel: Any, rows: Sequence[dict[str, Any]], cases: Sequence[str], contenders: Sequence[str]) -> None:
    for place, contender in enumerate(contenders):
        offset = 0.7 * (place + 0.5) / len(contenders) - 0.35
        some = [row for row in rows if row["contender"] == contender and row.get("p50_ms") and row.get("floor_ms")]
        middle = [row["p50_ms"] / row["floor_ms"] for row in some]
        spread = [
            [(row["p50_ms"] - row["p20_ms"]) / row["floor_ms"] for row in some],
            [(row["p80_ms"] - row["p50_ms"]) / row["floor_ms"] for row in some],
        ]
        style = {"color": OURS.get(contender, f"C{place % 10}"), "markersize": 7 if contender in OURS else 5}
        panel.errorbar(
            middle,
            [cases.index(row["in_case"]) + offset for row in some],
            xerr=spread,
            linestyle="",
            elinewidth=1,
            marker=MARKERS[place % len(MARKERS)],
            label=contender,
            **style,
        )
    for border in range(1, len(cases)):
        panel.axhline(border - 0.5, color="#dddddd", linewidth=0.8)
    panel.axvline(1, color="black", linestyle=":", linewidth=1.2)
    panel.set_xscale("log")
    panel.set_xlabel("median time over the floor (log)", fontsize=8)
