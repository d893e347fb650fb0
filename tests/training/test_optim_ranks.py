"""AdamW, Muon, their skipped steps, locks, averages and keyed noise over ranks: the weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import optim_worker  # noqa: E402

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of each world saved."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "optim_worker.py"), str(folder), *map(str, WORLDS)]
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {(rank, world): torch.load(folder / f"{rank} of {world}.pt") for world in WORLDS for rank in range(world)}


PAIRS = [(case, 2) for case in optim_worker.CASES] + [(case, 3) for case in optim_worker.UNEVEN] + [("hsdp, muon", 4)]


@pytest.mark.parametrize(("case", "world"), PAIRS, ids=[f"{case} over {world}" for case, world in PAIRS])
def test_weights_are_those_of_one_process(found, case, world):
    expected = found[0, 1]["ddp, muon" if world == 4 else case]
    ours = found[0, world][case]
    assert all(found[rank, world][case]["untouched"] for rank in range(world)), "a skipped step changed something"
    assert all(found[rank, world][case]["alike"] for rank in range(world)), "replicas have drifted apart"
    assert ours["factor"] == expected["factor"] == 512.0, "the scaler saw the one overflow on all ranks"
    whole_losses = [
        sum(found[rank, world][case]["losses"][step] for rank in range(world)) / world
        for step in range(optim_worker.STEPS)
    ]
    assert whole_losses == pytest.approx(expected["losses"], rel=1e-4)
    for kind in ("weights", "average"):
        assert ours[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert (ours[kind][name] - value).abs().max() <= 2e-4 * value.abs().max().clamp(min=0.01), f"{kind} {name}"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_functions_of_matrices_in_pieces(found, world):
    assert all(max(found[rank, world]["matrices"]) < 0.5 for rank in range(world))
