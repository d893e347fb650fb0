"""metrics.jsonl, progress, sinks and the curves in the terminal."""

import io
import json
import math
import sys
import types

import pytest
import torch
from rich.console import Console

from mmbase.errors import MmbaseError
from mmbase.training import tracker as tracker_module
from mmbase.training.sinks import open_sinks
from mmbase.training.tracker import Tracker, tell
from mmbase.training.tracking_config import TrackingConfig
from mmbase.training.units import say_bytes, say_count, say_flops, say_seconds
from mmbase.training.watch import History, frame, plot, watch


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracker_module, "time", clock)
    return clock


def quiet():
    return Console(file=io.StringIO(), width=120)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def track(path, **options):
    given = {"steps": 100, "step": 0, "seconds": 0.0, "console": quiet()} | options
    return Tracker(path, **given)


def test_speed_mfu_and_time_left(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"
    with track(path, total_samples=1000, flops=lambda n: 2.0 * n, peak=400.0) as tracker:
        clock.now += 2
        tracker.log(5, 100, loss=torch.tensor(1.5), data_wait=0.5)
        clock.now += 1
        tracker.log(10, 200, loss=1.25)
    first, second = rows(path)
    assert first | {"memory_bytes": 0} == {
        "step": 5,
        "samples": 100,
        "time": 2.0,
        "loss": 1.5,
        "data_wait": 0.5,
        "samples_per_second": 50.0,
        "flops_per_second": 100.0,
        "mfu": 0.25,
        "memory_bytes": 0,
        "seconds_left": 18.0,
    }
    assert first["memory_bytes"] > 1e7
    assert second["samples_per_second"] == 100.0 and second["mfu"] == 0.5
    assert 8.0 < second["seconds_left"] < 18.0  # judged by several rows
    told = tell(first, 2.0)
    assert all(part in told for part in ("loss 1.500", "50 images/s", "MFU 25.0%", "data wait 25%", "18 s left"))


def test_time_left_knows_that_later_stages_cost_more(tmp_path, clock):
    with track(tmp_path / "metrics.jsonl", total_samples=200, flops=lambda n: min(n, 100) + 4 * max(n - 100, 0)) as t:
        clock.now += 10
        t.log(1, 100)
    assert rows(tmp_path / "metrics.jsonl")[0]["seconds_left"] == 40.0


def test_speed_is_of_the_samples_since_the_last_line(tmp_path, clock):
    """A resumed run, and one whose batches grow, do not tell the mean over all steps."""
    path = tmp_path / "metrics.jsonl"
    with track(path, step=50, samples=50 * 8, seconds=30.0) as tracker:
        clock.now += 1
        tracker.log(60, 50 * 8 + 10 * 64)
    assert rows(path)[0]["samples_per_second"] == 640.0 and rows(path)[0]["time"] == 31.0


def test_time_left_without_a_number_of_samples(tmp_path, clock):
    with track(tmp_path / "metrics.jsonl") as tracker:
        clock.now += 5
        tracker.log(10, 40)
    assert rows(tmp_path / "metrics.jsonl")[0]["seconds_left"] == 45.0


def test_rewind_drops_rows(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"
    with track(path) as tracker:
        for step in (10, 20, 30):
            clock.now += 1
            tracker.log(step, step * 4, loss=step)
        tracker.rewind(20, 80)
        clock.now += 1
        tracker.log(30, 120, loss=0.5)
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(10, 10), (20, 20), (30, 0.5)]
    assert rows(path)[-1]["samples_per_second"] == 40.0


def test_resume_drops_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n{"step": 15, "lo')
    with track(path, step=10):
        pass
    assert path.read_text() == '{"step": 10, "loss": 1}\n'


def test_a_loss_that_is_not_finite(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"
    with track(path) as tracker, pytest.raises(MmbaseError, match="the loss is nan at step 3; lower"):
        tracker.log(3, 12, loss=math.nan)
    with track(path, step=3, stop_at_nonfinite=False) as tracker:
        tracker.log(4, 16, loss=math.inf, logit_scale=2.0)
    assert [row["loss"] for row in rows(path)] == [None, None] and rows(path)[1]["logit_scale"] == 2.0


def test_a_log_without_a_terminal_says_how_far_it_is(tmp_path, clock, capsys):
    with track(tmp_path / "metrics.jsonl", console=Console(width=200)) as tracker:
        for step in (1, 2, 3):
            clock.now += 20
            tracker.log(step, step * 4, loss=1.0)
    out = capsys.readouterr().out
    assert out.count("step 2 of 100  loss 1.000") == 1 and "step 1 of" not in out and "step 3 of" not in out


class Writer:
    """Stands for SummaryWriter."""

    made: list = []  # noqa: RUF012

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard(tmp_path, monkeypatch, clock):
    Writer.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    sinks = open_sinks(TrackingConfig(tensorboard=True), tmp_path, quiet(), step=7, values={})
    with track(tmp_path / "metrics.jsonl", step=7, sinks=sinks) as tracker:
        tracker.log(10, 40, loss=1.5)
        tracker.rewind(8, 32)
        tracker.log(10, 40, loss=2.5)
    first, second = Writer.made
    assert (first.folder, first.purge_step, second.purge_step) == (str(tmp_path / "tensorboard"), 8, 9)
    assert ("loss", 1.5, 10) in first.scalars and ("samples", 40, 10) in first.scalars
    assert ("loss", 2.5, 10) in second.scalars and first.closed and second.closed


def test_wandb_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    started, logged = [], []

    class Run:
        def define_metric(self, name, step_metric):
            assert step_metric == "samples"

        def log(self, row):
            logged.append(row)

        def finish(self):
            logged.append("finished")

    def init(**options):
        started.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = TrackingConfig.model_validate({"wandb": {"project": "p", "mode": "offline"}})
    for _ in range(2):
        (sink,) = open_sinks(config, tmp_path / "run", quiet(), step=0, values={"seed": 1})
        sink.write(3, {"samples": 12, "loss": 1.0})
        sink.close()
    assert started[0] == started[1] and started[0]["resume"] == "allow" and started[0]["name"] == "run"
    assert started[0]["config"] == {"seed": 1} and started[0]["mode"] == "offline"
    assert logged == [{"samples": 12, "loss": 1.0, "step": 3}, "finished"] * 2


@pytest.mark.parametrize(
    ("config", "module"), [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": {}}, "wandb")]
)
def test_a_missing_package_is_said(config, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MmbaseError, match=r"pip install 'mmbase\[track\]'"):
        open_sinks(TrackingConfig.model_validate(config), tmp_path, quiet(), step=0, values={})


def test_a_sink_that_fails_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    class Broken(Writer):
        def add_scalar(self, name, value, step):
            raise ConnectionError("gone [for good]")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Broken))
    console = Console(width=200)
    sinks = open_sinks(TrackingConfig(tensorboard=True), tmp_path, console, step=0, values={})
    with track(tmp_path / "metrics.jsonl", sinks=sinks) as tracker:
        tracker.log(1, 4, loss=1.0)
        tracker.log(2, 8, loss=1.0)
    assert capsys.readouterr().out.count("TensorBoard failed (ConnectionError: gone [for good])") == 1
    assert len(rows(tmp_path / "metrics.jsonl")) == 2


def line(step, **values):
    return json.dumps({"step": step, "samples": step * 4, "time": step / 2, **values}) + "\n"


def test_watch_reads_what_is_new(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    assert not history.update()
    with history.path.open("a") as file:
        file.write(line(1, loss=1.0) + '{"step": 2, "lo')
    assert history.update() and len(history.rows) == 1 and not history.update()
    with history.path.open("a") as file:
        file.write('ss": 0.5}\n')
    assert history.update() and history.rows[-1] == {"step": 2, "loss": 0.5}
    history.path.write_text(line(1, loss=3.0))  # rolled back
    assert history.update() and [row["loss"] for row in history.rows] == [3.0]


def test_watch_draws(tmp_path, capsys):
    values = [line(n, loss=2.0 - n / 10, learning_rate=1e-3, logit_scale=20.0, mfu=0.4) for n in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(values) + line(11, loss=None))
    watch(tmp_path, once=True, console=Console(width=100))
    out = capsys.readouterr().out
    assert "step 11  44 samples" in out and "Loss  1" in out and "Learning rate  0.001" in out
    assert any(0x2800 < ord(letter) < 0x2900 for letter in out) and "Throughput" not in out
    assert max(map(len, out.splitlines())) <= 100
    with pytest.raises(MmbaseError, match="there is no run at"):
        watch(tmp_path / "nowhere", once=True)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(MmbaseError, match="has no line yet"):
        watch(tmp_path, once=True)
    assert "waiting" in str(frame(tmp_path, History(tmp_path / "metrics.jsonl"), 80))


def dots(text):
    """Column and row of every dot."""
    bits = {
        0x01: (0, 0),
        0x08: (1, 0),
        0x02: (0, 1),
        0x10: (1, 1),
        0x04: (0, 2),
        0x20: (1, 2),
        0x40: (0, 3),
        0x80: (1, 3),
    }
    return {
        (2 * x + dx, 4 * y + dy)
        for y, row in enumerate(text)
        for x, letter in enumerate(row)
        for bit, (dx, dy) in bits.items()
        if (ord(letter) - 0x2800) & bit
    }


def test_plot_is_a_straight_line_where_the_curve_is():
    lines = plot([(0, 0.0), (1, 1.0)], 20, 4)
    drawn = dots([line[-18:] for line in lines[:4]])
    columns = sorted({column for column, _ in drawn})
    assert columns == list(range(36)) and {(0, 15), (35, 0)} <= drawn
    assert all(abs(row - (15 - 15 * column / 35)) <= 1 for column, row in drawn)
    assert lines[0].startswith("1 ") and lines[3].startswith("0 ") and len({len(line) for line in lines[:4]}) == 1
    assert len(plot([(5, 2.0)], 20, 4)) == 5  # one point
    assert len(dots([line[-18:] for line in plot([(0, 3.0), (9, 3.0)], 20, 4)[:4]])) == 36  # a flat curve


def test_numbers_in_words():
    assert [say_flops(x) for x in (0, 999.0, 4.4335e12, 99.96e9, 1e18)] == [
        "0 FLOP", "999 FLOP", "4.43 TFLOP", "100 GFLOP", "1.00 EFLOP",
    ]  # fmt: skip
    assert [say_count(x) for x in (12, 9999, 12_800_000)] == ["12", "9,999", "12.8 M"]
    assert [say_bytes(x) for x in (512, 1.5e9)] == ["512 B", "1.50 GB"]
    assert [say_seconds(x) for x in (0.4, 59.6, 725, 11525, 270000)] == ["0 s", "1:00", "12:05", "3:12:05", "3 d 03 h"]
