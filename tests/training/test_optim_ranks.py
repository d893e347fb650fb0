"""AdamW, Muon, their skipped steps, locks, averages and keyed noise over ranks: the weights of one process."""

from pathlib import Path

import pytest

from ..worlds import run_worker
from . import optim_worker

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of each world saved."""
    of = run_worker(Path(optim_worker.__file__), tmp_path_factory.mktemp("ranks"), WORLDS, timeout=240)
    return {(rank, world): saved for world in WORLDS for rank, saved in enumerate(of(world))}


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
