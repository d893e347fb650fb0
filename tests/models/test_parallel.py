"""Towers under DistributedDataParallel and FSDP2: two processes equal to one that has the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from . import parallel_worker as worker
from .shrunk import relative
from .tiny import WAYS, assert_equal_to_rounding, step

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found in every case."""
    folder = tmp_path_factory.mktemp("gloo")
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", str(Path(worker.__file__)), str(folder)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(worker.WORLD)]


def one_process(case, way):
    """Features of each rank's rows, and the mean of the gradients, from a model that is neither wrapped nor sharded."""
    model = worker.model_of(case)
    steps = [step(model, model, worker.batch_of(model, way, [rank])) for rank in range(worker.WORLD)]
    features = [{key: found.pop(key) for key in ("image_features", "text_features")} for found in steps]
    return [own | {key: sum(found[key] for found in steps) / len(steps) for key in steps[0]} for own in features]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_are_one(ranks, case, way) -> None:
    for found, expected in zip([rank[case, way] for rank in ranks], one_process(case, way)):
        if "bf16" not in case:
            assert_equal_to_rounding(found, expected, 5e-6)
            continue
        assert found.keys() == expected.keys()
        features = "image_features", "text_features"
        assert all(relative(found[key], expected[key]) <= 0.02 for key in features)
        gradients = [torch.cat([v.flatten() for k, v in of.items() if k not in features]) for of in (found, expected)]
        assert relative(*gradients) <= 0.05
