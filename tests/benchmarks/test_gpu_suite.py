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
PARTS = ["environment", "correctness", "ceilings", "offline", "loss", "train_step"]


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


@pytest.mark.slow
def test_all_parts(tmp_path):
    started = time.monotonic()
    done = suite(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 600
    assert states(tmp_path) == dict.fromkeys(PARTS, "ok")
    files = sorted(tmp_path.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 16 << 20 for file in files)
    record = json.loads((tmp_path / "loss.json").read_text())
    assert "on a CPU" in record["measures"] and {row["contender"] for row in record["results"]} >= {"openclip"}
    assert json.loads((tmp_path / "train_step.json").read_text())["results"][0]["model"] == "ViT-B-32"
