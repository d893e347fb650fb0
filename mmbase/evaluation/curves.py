"""Training curves of a run: points and ticks for the report's inline SVG, and the same curves as a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmbase.files import write_atomically

# Key in metrics.jsonl -> heading, unit, whether it is noisy enough to be smoothed.
_CURVES = {
    "loss": ("Loss", "", True),
    "learning_rate": ("Learning rate", "", False),
    "logit_scale": ("Logit scale", "", False),
    "samples_per_second": ("Throughput", "samples/s", True),
    "gradient_norm": ("Gradient norm", "", True),
}
_MOST_POINTS = 600
_INK, _MUTED, _GRID, _LINE = "#1d1c1a", "#6f6b64", "#e4e1da", "#14746f"


@dataclass(frozen=True)
class Curve:
    """One quantity over training: ``x`` samples seen (or steps), ``y`` its values, ``smooth`` their running mean."""

    key: str
    title: str
    unit: str
    x_title: str
    x: np.ndarray
    y: np.ndarray
    smooth: np.ndarray | None

    @property
    def summary(self) -> str:
        """The value that one asks for first: the peak of a schedule, else where the (smoothed) curve ends."""
        unit = f" {self.unit}" if self.unit else ""
        if self.key == "learning_rate":
            return f"{short_number(float(self.y.max()))} at its peak"
        last = float((self.y if self.smooth is None else self.smooth)[-1])
        return f"{last:.2f}{unit} at the end" if 0.01 <= abs(last) < 100 else f"{short_number(last)}{unit} at the end"

    def y_range(self) -> tuple[float, float]:
        """Limits of the y axis: from zero where the curve comes near it, and not stretched by a few spikes."""
        low, high = float(self.y.min()), float(self.y.max())
        if self.smooth is not None:
            high = max(float(np.percentile(self.y, 99)), float(self.smooth.max()))
        if 0 <= low < 0.4 * high:
            low = 0.0
        pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return (low if low == 0.0 else low - pad), high + pad


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the curve, of medians of five so that a lone spike leaves no step.

    The window narrows towards the ends, where a wider one would bend the curve flat.
    """
    y = np.median(np.lib.stride_tricks.sliding_window_view(np.pad(y, 2, mode="reflect"), 5), axis=1)
    index = np.arange(len(y))
    half = np.minimum(max(1, len(y) // 40), np.minimum(index, len(y) - 1 - index))
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def read_curves(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The curves that ``history`` (see ``read_history``) has at least two finite points of, in a fixed order.

    Drawn over ``samples`` where every record has it, else over ``step``. Long runs are thinned to 600 points after
    smoothing.
    """
    x_key = "samples" if history and all(_number(record.get("samples")) is not None for record in history) else "step"
    curves = []
    for key, (title, unit, noisy) in _CURVES.items():
        points = [(_number(record.get(x_key)), _number(record.get(key))) for record in history]
        kept = [(x, y) for x, y in points if x is not None and y is not None]
        if len(kept) < 2:
            continue
        x, y = np.array(kept, dtype=np.float64).T
        smooth = _smooth(y) if noisy and len(y) >= 20 else None
        rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int))
        x_title = "samples seen" if x_key == "samples" else "step"
        curves.append(Curve(key, title, unit, x_title, x[rows], y[rows], None if smooth is None else smooth[rows]))
    return curves


def _number(value: Any) -> float | None:
    """``value`` as a float where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) between ``low`` and ``high``, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * magnitude / raw)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def short_number(value: float) -> str:
    """``value`` in few letters: 204.8k, 1.5M, 0.001, 3e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.3g}"


def plot_geometry(curve: Curve) -> dict[str, Any]:
    """What the page needs to draw ``curve`` in a box of 1000 x 1000 that stretches: paths, and ticks in per cent.

    The x axis starts at zero; values beyond ``Curve.y_range`` are cut off at the edge.
    """
    low, high = curve.y_range()
    right = float(curve.x[-1]) or 1.0

    def path(values: np.ndarray) -> str:
        x = curve.x / right * 1000
        y = np.clip((high - values) / (high - low), 0, 1) * 1000
        return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))

    return {
        "key": curve.key,
        "title": curve.title,
        "x_title": curve.x_title,
        "summary": curve.summary,
        "raw": path(curve.y) if curve.smooth is not None else None,
        "line": path(curve.y if curve.smooth is None else curve.smooth),
        "x_ticks": [(value / right * 100, short_number(value)) for value in ticks(0.0, right, 5)],
        "y_ticks": [((high - value) / (high - low) * 100, short_number(value)) for value in ticks(low, high)],
    }


def write_curves(path: str | Path, curves: Sequence[Curve]) -> Path | None:
    """Draw the first four curves into one PNG, 1,500 pixels wide; None where there are no curves."""
    curves = curves[:4]
    if not curves:
        return None
    # The figure is used directly: pyplot would pick a backend and keep figures for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(10, 2.5 * rows + 0.1), dpi=150, facecolor="#fbfaf8", layout=layout)
    FigureCanvasAgg(figure)
    number = FuncFormatter(lambda value, _: short_number(value))
    for position, curve in enumerate(curves):
        axes = figure.add_subplot(rows, columns, position + 1, facecolor="#ffffff")
        if curve.smooth is not None:
            axes.plot(curve.x, curve.y, color=_LINE, alpha=0.25, linewidth=0.8)
        axes.plot(curve.x, curve.y if curve.smooth is None else curve.smooth, color=_LINE, linewidth=1.8)
        title = f"{curve.title} ({curve.unit})" if curve.unit else curve.title
        axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
        axes.set_xlabel(curve.x_title, fontsize=8, color=_MUTED)
        axes.tick_params(labelsize=8, colors=_MUTED, length=0)
        axes.xaxis.set_major_formatter(number)
        axes.yaxis.set_major_formatter(number)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(0, float(curve.x[-1]) or 1.0)
        axes.set_ylim(*curve.y_range())
        for spine in axes.spines.values():
            spine.set_color(_GRID)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_atomically(path, buffer.getvalue())
