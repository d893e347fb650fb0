"""Runs the checks of the Triton kernels in a process where Triton's interpreter stands in for a GPU.

The interpreter must be asked for before Triton is imported, and then holds for the whole process, which would take it
from tests that compile. It multiplies bfloat16 wrongly: float32 and float16 are checked here, bfloat16 on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize(
    "name",
    [
        "check_softmax.py",
        "check_sigmoid.py",
        "check_attention.py",
        "check_activation.py",
        "check_head.py",
        "check_layer_norm.py",
    ],
)
def test_kernels_in_the_interpreter(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
