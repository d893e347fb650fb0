"""Every kernel compiles for GPUs that are not here; what is reported is what the binaries say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
from mmbase_kernels import offline

KERNELS = {
    "statistics", "gradient", "merge", "match", "sigmoid", "attention_forward", "attention_forward_loop",
    "attention_backward_tile", "attention_backward_queries", "attention_grad_queries", "attention_grad_keys",
    "activation", "activation_backward",
    "layer_norm_forward", "layer_norm_backward", "sum_partials", "unit_length", "unit_length_backward",
}  # fmt: skip
WITHOUT_PRODUCTS = {
    "match", "activation", "activation_backward",
    "layer_norm_forward", "layer_norm_backward", "sum_partials", "unit_length", "unit_length_backward",
}  # fmt: skip


def run(*arguments):
    """``python -m mmbase_kernels.offline`` in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package = str(Path(offline.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "mmbase_kernels.offline", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow  # .ci/run compiles everything for every target
def test_sm_90_in_bfloat16_neither_spills_nor_misses_hgmma(tmp_path):
    report = tmp_path / "report.json"
    done = run("--targets", "sm_90", "--dtypes", "bf16", "--jobs", "2", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert {row["kernel"] for row in rows} == KERNELS - {"merge"}
    for row in rows:
        assert row["registers"] > 0 and row["spilled"] == 0 and row["programs"] >= 1, row
        multiplies = row["kernel"] not in WITHOUT_PRODUCTS and not (
            "stash" in row["config"] and row["kernel"] == "gradient"
        )
        assert (row["matrix"] == "HGMMA") == multiplies, row
    assert done.stdout.startswith("kernel ")


@pytest.mark.slow  # as above
def test_everything_for_every_target(tmp_path):
    report = tmp_path / "report.json"
    done = run("--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
    for row in rows:
        if row["kernel"] == "sigmoid" and "fp32" not in row["config"]:
            assert row["matrix"] == wanted[row["target"]], row


def test_a_spill_a_missing_hgmma_and_too_much_shared_memory_are_problems(monkeypatch):
    class Kernel:
        asm, metadata = {}, type("Metadata", (), {"shared": 228 << 10})

    one = next(one for one in offline.shipped(["sm_90"], ["sigmoid"]) if one.matrix)
    monkeypatch.setattr("triton.compile", lambda *a, **k: Kernel())
    monkeypatch.setattr(offline, "_read_nvidia", lambda kernel: (255, 16, "HMMA"))
    problem = offline.compile_one(one).problem
    assert "16 bytes spilled" in problem and "HMMA instead of HGMMA" in problem and "shared memory" in problem
    report = offline.compile_one(one)
    monkeypatch.setattr(offline, "reports", lambda *a: [report])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert offline.main(["--targets", "sm_90"]) == 1


def test_what_does_not_compile_is_a_row_of_the_table(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no such\n layout")

    monkeypatch.setattr("triton.compile", refuse)
    one = next(offline.shipped(["sm_90"], ["merge"]))
    assert offline.compile_one(one).problem == "does not compile: no such layout"


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "programs"),
    [("sm_90", 128, 8, 98_328, 2), ("sm_90", 129, 8, 98_328, 1), ("sm_90", 32, 4, 0, 16), ("sm_80", 128, 8, 98_328, 1),
     ("gfx942", 128, 8, 16_384, 2), ("gfx942", 512, 4, 0, 1)],
)  # fmt: skip
def test_programs_per_multiprocessor(architecture, registers, warps, shared, programs):
    assert offline.programs_per_multiprocessor(architecture, registers, warps, shared) == programs


def test_unknown_kernel_and_interpreter_are_refused_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        offline.main(["--kernels", "sigmod"])
    assert "no kernel 'sigmod'" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        offline.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
