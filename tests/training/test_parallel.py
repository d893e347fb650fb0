"""Training over ranks: the weights of one process with the whole batch, whichever way ranks share the work."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmbase.errors import MmbaseError
from mmbase.models.layers import Block
from mmbase.training.distributed import Ranks
from mmbase.training.parallel import Parallel, choose_kind
from mmbase.training.parallel_config import ParallelConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("parallel_worker.py")
WORLDS = (2, 4)
gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo")

spec = importlib.util.spec_from_file_location("training_parallel_worker", WORKER)
assert spec is not None and spec.loader is not None
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """``ranks(world)``: what every rank found, from one start of all processes."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), str(folder), *map(str, WORLDS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]

    @functools.cache
    def of(world):
        return [torch.load(folder / f"{rank} of {world}.pt") for rank in range(world)]

    return of


@functools.cache
def one_process(loss, norm, lock, steps):
    """Of a model that is neither wrapped, nor sharded, nor compiled, and of whole batches."""
    case = next(
        name
        for name, options in worker.CASES.items()
        if [options.get("loss"), options.get("norm"), options.get("lock"), worker.steps_of(name)]
        == [loss, norm, lock, steps]
        and not options.keys() & {"dtype", "compile"}
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return worker.train(case, Ranks())
    finally:
        torch.set_num_threads(threads)


def reference(case):
    options = worker.CASES[case]
    return one_process(options.get("loss"), options.get("norm"), options.get("lock"), worker.steps_of(case))


def errors(found, expected, steps):
    """Of all weights together; and the worst of one tensor, relative to its size or to how far steps can move it.

    Some gradients are 0 but for rounding (biases of keys, and before a batch normalisation): Adam steps by the rest.
    """
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), value.double()) for name, value in expected.items()]
    everything = torch.cat([value.flatten() for _, value in pairs]).norm()
    together = torch.stack([(got - value).norm() for got, value in pairs]).norm() / everything
    reach = worker.LEARNING_RATE * steps
    each = max((got - value).norm() / max(value.norm(), reach * value.numel() ** 0.5) for got, value in pairs)
    return float(together), float(each)


@gloo
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in WORLDS for case in worker.cases_of(world)])
def test_ranks_train_as_one_process(ranks, world, case):
    expected, (first, *others) = reference(case), [rank[case] for rank in ranks(world)]
    loose, biases = "bf16" in case, 1e-4 if "batch norm" in case else 1e-5
    together, each = errors(first["weights"], expected["weights"], worker.steps_of(case))
    assert together <= (5e-3 if loose else 1e-6) and each <= (2e-1 if loose else biases), (together, each)
    assert first["losses"] == pytest.approx(expected["losses"], rel=2e-2 if loose else 1e-5)
    assert first["norms"] == pytest.approx(expected["norms"], rel=1e-1 if loose else 1e-4)
    assert len(first["losses"]) == worker.steps_of(case) and max(expected["norms"]) > 1  # gradients were clipped
    for other in others:
        assert other["losses"] == first["losses"] and other["norms"] == first["norms"] and other["weights"] == {}


@gloo
def test_a_rank_holds_its_shard_and_gathers_a_tower_that_is_called_alone(ranks):
    found = [rank["other"] for rank in ranks(2)]
    parameters = found[0]["parameters"]
    assert sum(rank["shards"] for rank in found) == parameters + 1  # the scale is on both
    assert all(rank["shards"] == pytest.approx(parameters / 2, rel=0.01) for rank in found)
    with torch.no_grad():
        expected = worker.build().encode_image(worker.whole_batch(0)["image"])
    for rank in found:
        torch.testing.assert_close(rank["tower"], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["again"], torch.nn.functional.normalize(expected, dim=1), rtol=1e-5, atol=1e-5)
        assert rank["norm"] != rank["norm"]  # not a number, on the rank too whose gradients are


@gloo
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_locks_may_change_between_steps(ranks, kind):
    names = {name for name, _ in worker.build().named_parameters()}
    for rank in ranks(2):
        locked, unlocked = (set(told) for told in rank["other"][f"locks, {kind}"])
        assert locked == {name for name in names if not name.startswith("text.")} and unlocked == names


def test_one_process_needs_nothing():
    for kind in ("auto", "none", "ddp", "fsdp", "hsdp"):
        assert choose_kind(kind, Ranks()) == "none"
    parallel = Parallel(worker.build(), Ranks(), kind="fsdp", checkpoint_activations=True)
    assert parallel.module is parallel.model and not parallel.sharded
    assert parallel.describe() == ["one process", "activations of blocks computed again"]
    assert parallel.model.text.transformer.checkpoint_activations


def test_choices_that_cannot_be():
    eight = Ranks(0, 8, 0, 4)
    assert choose_kind("auto", eight) == "ddp" and choose_kind("hsdp", eight) == "hsdp"
    with pytest.raises(MmbaseError, match="8 models side by side"):
        choose_kind("none", eight)
    with pytest.raises(MmbaseError, match="did you mean 'fsdp'"):
        choose_kind("fsdpp", Ranks())
    with pytest.raises(MmbaseError, match="is for several machines"):
        choose_kind("hsdp", Ranks(0, 4, 0, 4))
    with pytest.raises(MmbaseError, match=r"training\.compile must be one of none, blocks"):
        Parallel(worker.build(), Ranks(), compile="block")


def test_weights_of_another_model_are_refused():
    parallel = Parallel(worker.build(), Ranks())
    weights = parallel.state_dict()
    parallel.load_state_dict(weights)
    with pytest.raises(MmbaseError, match="lack logit_scale"):
        parallel.load_state_dict({name: value for name, value in weights.items() if name != "logit_scale"})
    with pytest.raises(MmbaseError, match=r"logit_scale is \[2\] in the weights and \[\] in the model"):
        parallel.load_state_dict(weights | {"logit_scale": torch.zeros(2)})
    with pytest.raises(MmbaseError, match="hold more, which"):
        parallel.load_state_dict(weights | {"more": torch.zeros(2)})


def test_compiled_blocks_keep_their_names(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    parallel = Parallel(worker.build(), Ranks(), compile="blocks")
    assert len(compiled) == 4 and all(isinstance(function.__self__, Block) for function in compiled)
    assert parallel.state_dict().keys() == worker.build().state_dict().keys()


def test_the_defaults_are_for_one_process():
    assert ParallelConfig().parallel == "auto" and ParallelConfig(parallel="fsdp", compile="blocks").hang_seconds == 600
