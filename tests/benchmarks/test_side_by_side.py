"""The engine of the benchmarks of operators: directions, errors, failing contenders, time, resuming, lost devices."""

import json
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from mmbase.errors import MmbaseError
from mmbase_bench import session, side_by_side
from mmbase_bench.ceilings import Ceilings
from mmbase_bench.harness import Work
from mmbase_bench.row_case import SAMPLED, Quantities, RowCase, sampled
from mmbase_bench.side_by_side import DIRECTIONS, Built, Contender, DeviceLostError, Inputs, Settings, measure

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e12, 1e10, {})


def scaled(x, weight):
    return x * weight


def no_backward(x, weight):
    return torch.from_numpy((x * weight).detach().numpy())


def raising(case, device, mode):
    raise ImportError("no module named 'peer'")


def out_of_memory(x, weight):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def not_finite(x, weight):
    return (x * weight).index_fill(0, torch.tensor([12]), torch.nan)  # beyond the sample


def pinned_backend(x, weight):
    warnings.warn("Flash attention kernel not used because:", stacklevel=1)
    warnings.warn("Only 16 bits. (Triggered internally at x.cpp:1.)", stacklevel=1)
    raise RuntimeError("No available kernel. Aborting execution.")


def of(function):
    return lambda case, device, mode: Built(function)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("plain", of(scaled)),
        Contender("wrong", of(lambda x, w: x * w * 1.1)),
        Contender("no-backward", of(no_backward)),
        Contender("missing", raising),
        Contender("large", of(out_of_memory)),
        Contender("not-finite", of(not_finite)),
        Contender("pinned", of(pinned_backend)),
        Contender("mmbase-triton", of(scaled), rival=False, note="ours"),
    )
}


@dataclass(frozen=True)
class Scaled(RowCase):
    """y = x * weight."""

    batch: int = 40
    dtype: str = "fp32"

    @property
    def title(self):
        return f"scaled {self.batch} {self.dtype}"

    def labels(self):
        return {"batch": self.batch, "dtype": self.dtype}

    def quantities(self):
        return Quantities(("out",), ("dx",), ("dweight",))

    def contenders(self, device):
        return CONTENDERS

    def inputs(self, device, seed):
        generator = torch.Generator().manual_seed(seed)
        x, grad = torch.randn(self.batch, 3, generator=generator), torch.randn(self.batch, 3, generator=generator)
        return Inputs((x.requires_grad_(),), (torch.tensor([1.0, 2.0, 3.0], requires_grad=True),), (grad,))

    def equation(self, index, *leaves):
        return scaled(*leaves)

    def scratch(self, inputs):
        return 256 << 17  # two rows a chunk

    def work(self, direction):
        return Work(0.0, {"forward": 10e6, "backward": 20e6, "forward+backward": 30e6}[direction])


def settings(*names, **options):
    return Settings("scaled", CPU, contenders=names or tuple(CONTENDERS), **{"rounds": 2} | options)


def test_rows_of_all_contenders_and_why_some_have_no_figures():
    found = measure(Scaled(), settings(), CEILINGS)
    assert len(found) == 3 * len(CONTENDERS)
    rows = {(row.case["direction"], row.contender): row for row in found}
    for direction in DIRECTIONS:
        plain, ours = rows[direction, "plain"], rows[direction, "mmbase-triton"]
        assert plain.timing and ours.timing and plain.problem == ours.problem == "" and ours.note == "ours"
        assert set(plain.errors) == ({"out"} if direction == "forward" else {"out", "dx", "dweight"})
        assert max(plain.errors.values()) < 1e-7
        assert rows[direction, "wrong"].errors["out"] == pytest.approx(0.1)
        assert plain.floor_ms == pytest.approx({"forward": 1, "backward": 2, "forward+backward": 3}[direction])
        assert rows[direction, "missing"].problem == "ImportError: no module named 'peer'"
        assert rows[direction, "large"].problem == "out of memory"
        assert rows[direction, "pinned"].problem == (
            "RuntimeError: No available kernel. Aborting execution.; Only 16 bits."
        )
        assert "not finite" in rows[direction, "not-finite"].problem
        baseline = {row.baseline for (d, _), row in rows.items() if d == direction and row.timing}
        assert len(baseline) == 1 and baseline <= {"plain", "wrong", "not-finite", "no-backward"}
    assert rows["forward", "no-backward"].timing and not rows["backward", "no-backward"].timing
    assert "does not require grad" in rows["forward+backward", "no-backward"].problem


def test_a_named_baseline_and_directions():
    found = measure(
        Scaled(), settings("plain", "mmbase-triton", directions=("forward",), baseline="mmbase-triton"), CEILINGS
    )
    assert [(row.contender, row.case["direction"]) for row in found] == [
        ("plain", "forward"),
        ("mmbase-triton", "forward"),
    ]
    assert found[1].ratio_to_baseline == 1 and found[0].baseline == "mmbase-triton"


def test_float64_in_chunks_and_of_a_sample():
    case = Scaled()
    inputs = case.inputs(CPU, 3)
    wanted = dict(case.exact(inputs))
    index = sampled(40, CPU)
    assert index.tolist() == [*range(SAMPLED), *range(40 - SAMPLED, 40)] and sampled(5, CPU).tolist() == [*range(5)]
    x, weight, grad = inputs.rows[0].double(), inputs.parameters[0].double(), inputs.gradients[0].double()
    torch.testing.assert_close(wanted["out"], (x * weight)[index].detach(), rtol=1e-15, atol=0)
    torch.testing.assert_close(wanted["dx"], (grad * weight)[index].detach(), rtol=1e-15, atol=0)
    torch.testing.assert_close(wanted["dweight"], (grad * x).sum(0).detach(), rtol=1e-13, atol=1e-13)


def test_errors_of_one_name_are_measured_together_and_shapes_are_looked_at():
    wanted = [("dw", torch.tensor([3.0], dtype=torch.float64)), ("dw", torch.tensor([4.0], dtype=torch.float64))]
    found = [torch.tensor([3.0]), torch.tensor([4.5])]
    assert side_by_side.relative_errors(found, wanted) == {"dw": pytest.approx(0.1)}
    with pytest.raises(ValueError, match=r"dw has shape \[2\]"):
        side_by_side.relative_errors([torch.zeros(2)], wanted)


def test_a_case_that_cannot_be_set_up_keeps_its_rows(monkeypatch):
    monkeypatch.setattr(Scaled, "exact", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    found = measure(Scaled(), settings("plain"), CEILINGS)
    assert [row.problem for row in found] == ["the case could not be set up: out of memory"] * 3


def run(cases, tmp_path, *names, output=True, monkeypatch, **options):
    monkeypatch.setattr(session, "_ceilings", lambda *_: CEILINGS)
    given = {"output": tmp_path / "out" if output else None, "resume": False, "seconds": None, "threads": 1} | options
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def verdict(rows, _, result):
        return [f"verdict of {len(rows)} for {result}"], [{"width": 1}]

    asked = settings(*(names or ("plain", "mmbase-triton")))
    return session.run_cases("scaling", asked, cases, SimpleNamespace(**given), verdict)


def record(tmp_path):
    return json.loads((tmp_path / "out" / "scaled.json").read_text())


def test_files_and_what_they_say(tmp_path, monkeypatch, capsys):
    rows = run([Scaled(), Scaled(7)], tmp_path, monkeypatch=monkeypatch)
    written, printed = record(tmp_path), capsys.readouterr().out
    assert written["results"] == json.loads(json.dumps(rows)) and len(rows) == 12
    assert "on a CPU (cpu), 1 threads" in written["measures"] and "no GPU kernel is measured" in printed
    assert written["verdict"] == ["verdict of 12 for benchmarks/results/out/scaled.json"]
    assert written["wins"] == [{"width": 1}] and written["ceilings"]["fp32"]["copy_bytes"] == 1e10
    assert rows[0]["ratio_to_floor"] == pytest.approx(rows[0]["p50_ms"] / 3) and len(rows[0]["rounds_ms"]) == 2
    assert (tmp_path / "out" / "scaled.csv").read_text().count("\n") == 13
    assert (tmp_path / "out" / "scaled.png").read_bytes().startswith(b"\x89PNG")
    assert "scaled 7 fp32, backward; x base: over plain" in printed and "verdict of 12" in printed


def test_time_ends_and_the_next_run_goes_on(tmp_path, monkeypatch, capsys):
    cases = [Scaled(), Scaled(7), Scaled(8)]
    ticks = iter([0.0, 0.0, 5.0])
    monkeypatch.setattr(session.time, "monotonic", lambda: next(ticks))
    with pytest.raises(SystemExit) as ended:
        run(cases, tmp_path, monkeypatch=monkeypatch, seconds=2.0)
    assert ended.value.code == session.LEFT
    assert "not measured, for --seconds=2 are over: scaled 7 fp32, scaled 8 fp32" in capsys.readouterr().out
    first = record(tmp_path)["results"]
    assert {row["in_case"] for row in first} == {"scaled 40 fp32"}
    monkeypatch.undo()
    rows = run(cases, tmp_path, monkeypatch=monkeypatch, resume=True)
    assert "scaled 40 fp32: measured before, kept" in capsys.readouterr().out
    assert rows[: len(first)] == first and len(rows) == 3 * len(first)
    run(cases, tmp_path, "plain", monkeypatch=monkeypatch, resume=True)
    assert "is begun anew: it was measured with another settings" in capsys.readouterr().out
    (tmp_path / "out" / "scaled.json").write_text("{}")
    run(cases[:1], tmp_path, monkeypatch=monkeypatch, resume=True)
    assert "is begun anew: it cannot be read (KeyError: 'settings')" in capsys.readouterr().out


class Replaced(Exception):
    """In place of a new process."""


def test_a_lost_device_costs_its_contender_alone(tmp_path, monkeypatch, capsys):
    commands = []

    def replaced(command):
        commands.append(command)
        raise Replaced

    def lose(device, suspect, error):
        raise DeviceLostError(suspect, "illegal memory access")

    monkeypatch.setattr(session, "replace_process", replaced)
    monkeypatch.setattr(side_by_side, "_require_device", lose)
    monkeypatch.setattr(session.sys, "argv", ["mmbase bench scaled", "--batch", "7", "--resume"])
    names = ("plain", "large", "mmbase-triton")
    with pytest.raises(Replaced):
        run([Scaled(), Scaled(7)], tmp_path, *names, monkeypatch=monkeypatch, seconds=100.0)
    assert commands[0][1:5] == ["-m", "mmbase_bench.scaled", "--batch", "7"] and commands[0][-1] == "--resume"
    assert 0 < float(commands[0][commands[0].index("--seconds") + 1]) <= 100
    assert record(tmp_path)["lost"] == [["scaled 40 fp32", "large", "large lost the device: illegal memory access"]]
    with pytest.raises(Replaced):  # the first case stands now, with the reason in the row; the second loses it again
        run([Scaled(), Scaled(7)], tmp_path, *names, monkeypatch=monkeypatch, resume=True)
    rows = record(tmp_path)["results"]
    assert {r["contender"]: r["problem"] for r in rows}["large"] == "large lost the device: illegal memory access"
    assert all(r["p50_ms"] for r in rows if r["contender"] == "plain") and len(record(tmp_path)["lost"]) == 2
    with pytest.raises(MmbaseError, match="with --output the run would go on"):
        run([Scaled()], tmp_path, *names, monkeypatch=monkeypatch, output=False)
    monkeypatch.setattr(session, "measure", lambda *_: lose(CPU, "large", None))
    with pytest.raises(MmbaseError, match="for the second time"):
        run([Scaled(7)], tmp_path, *names, monkeypatch=monkeypatch, resume=True)


def test_what_no_rival_ran_for_has_no_ratio():
    found = measure(Scaled(), settings("mmbase-triton"), CEILINGS)
    assert [row.ratio_to_baseline for row in found] == [None] * 3
    assert replace(found[0], baseline="x").flat()["baseline"] == "x" and "baseline" not in found[0].flat()
