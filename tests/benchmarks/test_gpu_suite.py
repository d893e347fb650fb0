"""The GPU suite's way on a machine without a GPU, at tiny sizes."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.sh"
PARTS = [
    *("environment", "correctness", "attention", "loss", "layer_norm", "block"),
    *("train_step", "ceilings", "offline"),
]
"""The most important first."""


def suite(*arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        ["bash", str(SUITE), *map(str, arguments)], capture_output=True, text=True, timeout=600, env=environment
    )


def states(out):
    return dict(line.split("\t")[:2] for line in (out / "parts.tsv").read_text().splitlines())


def test_parts_are_recorded_and_skipped_the_next_time(tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "suite_probe-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", "import os, pathlib\npathlib.Path(os.environ['PROBE']).write_text('found')")
    probe = tmp_path / "probe"
    done = suite(out, "ceilings", MMBASE_WHEELS=str(wheels), PROBE=str(probe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert probe.read_text() == "found"
    assert states(out) == {"ceilings": "ok"}
    assert json.loads((out / "ceilings.json").read_text())["copy_bytes"] > 0
    assert "TFLOP/s" in (out / "suite.log").read_text()
    again = suite(out, "ceilings")
    assert again.returncode == 0 and "skip  ceilings: done before" in again.stdout
    wrong = suite(out, "celings")
    assert wrong.returncode == 2 and "there is no part 'celings'" in wrong.stderr


def test_usage():
    done = suite()
    assert done.returncode == 2 and "gpu_suite.sh OUT" in done.stderr


def test_a_call_stops_by_itself_and_the_next_goes_on(tmp_path):
    """A stand-in for the interpreter ends well, fails or leaves cases."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in\n'
        "*is_available*) echo 0 ;;\n"
        '*layer_norm*) echo layer_norm >>"$RAN"; exit 3 ;;\n'
        '*"bench block"*) echo block >>"$RAN"; exit 1 ;;\n'
        '*train_step*) echo train_step >>"$RAN" ;;\n'
        '*ceilings*) echo ceilings >>"$RAN" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    ran, out = tmp_path / "ran", tmp_path / "out"
    given = {"PYTHON": str(python), "RAN": str(ran)}
    first = suite(out, "layer_norm", "train_step", "ceilings", MMBASE_SUITE_SECONDS="200", **given)
    assert first.returncode == 3, first.stdout + first.stderr
    assert ran.read_text().split() == ["layer_norm", "train_step", "ceilings"]
    assert states(out) == {"layer_norm": "cases are left", "train_step": "ok", "ceilings": "ok"}
    second = suite(out, "layer_norm", "block", "train_step", MMBASE_SUITE_SECONDS="201", **given)
    assert second.returncode == 1 and "skip  train_step: done before" in second.stdout
    assert ran.read_text().split()[3:] == ["block", "layer_norm"]  # what was never run comes first
    assert states(out)["block"] == "failed, exit 1"
    ran.unlink()
    third = suite(out, "train_step", "block", "attention", MMBASE_SUITE_SECONDS="341", **given)
    assert third.returncode == 1 and ran.read_text().split() == ["block"] and states(out)["attention"] == "ok"
    short = suite(out, MMBASE_SUITE_SECONDS="100", **given)
    assert short.returncode == 2 and "MMBASE_SUITE_SECONDS=100 is too little for correctness" in short.stderr


def test_a_part_that_does_not_fit_any_more_is_left(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\ncase "$*" in\n*is_available*) echo 0 ;;\n*ceilings*) sleep 5 ;;\nesac\n')
    python.chmod(0o755)
    done = suite(tmp_path / "out", "ceilings", "train_step", MMBASE_SUITE_SECONDS="104", PYTHON=str(python))
    assert done.returncode == 3 and "left  train_step: it may take 90 s" in done.stdout
    assert states(tmp_path / "out") == {"ceilings": "ok"}


@pytest.mark.slow
def test_all_parts(tmp_path):
    started = time.monotonic()
    done = suite(tmp_path)
    if done.returncode == 3:  # as on a busy machine
        done = suite(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 1200
    assert states(tmp_path) == dict.fromkeys(PARTS, "ok")
    files = sorted(tmp_path.iterdir())
    assert all(file.is_file() and file.stat().st_size < 1 << 20 for file in files)
    for subject in ("attention", "layer_norm", "block", "loss"):
        assert {tmp_path / f"{subject}.{ending}" for ending in ("csv", "json", "png")} <= set(files)
        assert "on a CPU" in json.loads((tmp_path / f"{subject}.json").read_text())["measures"]
    record = json.loads((tmp_path / "loss.json").read_text())
    assert "on a CPU" in record["measures"] and {row["contender"] for row in record["results"]} >= {"openclip"}
    assert json.loads((tmp_path / "train_step.json").read_text())["results"][0]["model"] == "ViT-B-32"
