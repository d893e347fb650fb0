import numpy as np
import pytest
from PIL import Image

from mmbase.evaluation.curves import plot_geometry, read_curves, short_number, ticks, write_curves

HISTORY = [
    {"step": s, "samples": 8 * s, "loss": 5 / s, "learning_rate": 1e-3 * s, "logit_scale": 14 + s / 50}
    for s in range(1, 101)
]


def test_curves_in_a_fixed_order_over_samples():
    curves = read_curves(HISTORY)
    assert [curve.key for curve in curves] == ["loss", "learning_rate", "logit_scale"]
    np.testing.assert_allclose(curves[0].x, [8.0 * s for s in range(1, 101)])
    np.testing.assert_allclose(curves[1].y, [1e-3 * s for s in range(1, 101)])
    assert curves[0].x_title == "samples seen"
    assert curves[1].smooth is None


def test_missing_keys_and_values_that_are_no_numbers_are_left_out():
    history = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": None},
               {"step": 5, "loss": 1.0, "logit_scale": 3.0}]  # fmt: skip
    (curve,) = read_curves(history)
    assert (curve.x.tolist(), curve.y.tolist(), curve.x_title) == ([1.0, 5.0], [2.0, 1.0], "step")
    assert read_curves([]) == []


def test_smoothing_keeps_a_line_and_removes_a_lone_spike():
    line = [{"step": s, "loss": 100.0 - s + (50 if s == 37 else 0)} for s in range(1, 101)]
    (curve,) = read_curves(line)
    # The median moves by one place beside the spike; a plain mean would rise by ten.
    np.testing.assert_allclose(curve.smooth[2:-2], 100.0 - curve.x[2:-2], atol=1.0)


def test_long_runs_are_thinned_but_keep_their_ends():
    (curve,) = read_curves([{"step": s, "logit_scale": float(s)} for s in range(5000)])
    assert len(curve.x) == 600
    assert (curve.x[0], curve.x[-1]) == (0.0, 4999.0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.98), (-3, 7), (0, 204800), (1e-6, 3e-5), (99.9, 100.1)])
def test_ticks_are_round_evenly_spaced_and_inside(low, high):
    values = ticks(low, high)
    assert 3 <= len(values) <= 8
    assert low - 1e-9 <= values[0]
    assert values[-1] <= high + 1e-9
    step = values[1] - values[0]
    np.testing.assert_allclose(np.diff(values), step, rtol=1e-6)
    assert round(step / 10 ** np.floor(np.log10(step * 1.0001)), 6) in (1, 2, 5, 10)


def test_ticks_of_a_constant():
    assert ticks(3.0, 3.0) == [3.0]


def test_short_numbers():
    assert [short_number(v) for v in (0.0, 0.001, 3e-5, 450.2, 204800, 1_400_065, 2.5e9)] == [
        "0", "0.001", "3e-05", "450", "204.8k", "1.4M", "2.5G",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-2.0, 3.0], [1e-4, 5e-4]])
def test_geometry_stays_in_the_box(values):
    (curve,) = read_curves([{"step": s, "logit_scale": v} for s, v in enumerate(values)])
    drawn = plot_geometry(curve)
    numbers = [float(part) for point in drawn["line"][1:].split("L") for part in point.split()]
    assert all(0 <= number <= 1000 for number in numbers)
    assert all(-1e-6 <= at <= 100 + 1e-6 for at, _ in drawn["x_ticks"] + drawn["y_ticks"])


def test_png(tmp_path):
    path = write_curves(tmp_path / "curves.png", read_curves(HISTORY))
    with Image.open(path) as picture:
        assert picture.width == 1500
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20
    assert write_curves(tmp_path / "none.png", []) is None
    assert not (tmp_path / "none.png").exists()
