"""mmbase plan: its parts against what really happens, and the command line."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

from mmbase.cli import app
from mmbase.config import load_config, validate
from mmbase.errors import MmbaseError
from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.losses.traffic import Traffic
from mmbase.models.clip import CLIP
from mmbase.plan import communication, make_plan, planned_model
from mmbase.plan_memory import saved_activations
from mmbase.plan_setup import Setup
from mmbase.plan_text import describe
from mmbase.training.curriculum import Curriculum
from mmbase.training.measured import MEASURED

ROOT = Path(__file__).parents[1]
MODEL = {
    "embed_dim": 24,
    "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2},
    "text": {"width": 32, "layers": 2, "heads": 2, "vocab_size": 50, "context_length": 12, "causal": False},
}


def config(**training):
    values = {"model": MODEL, "tokenizer": {"kind": "clip", "context_length": 12}, "data": {"shards": "x.tar"}}
    return validate(values | {"training": {"steps": 100, "batch_size": 64, "warmup_steps": 0, **training}})


def setup(gpus, **changes):
    given = {"gpu": "h200", "precision": "fp32", "kind": "ddp", "micro_batch": None}
    given |= {"checkpoint_activations": False, "reshard_after_forward": True}
    return Setup(gpus=gpus, **(given | changes))


def test_measured_figures_are_those_of_their_files():
    for one in MEASURED:
        stored = json.loads((ROOT / one.result).read_text())
        if "results" in stored:
            row = next(r for r in stored["results"] if (r["model"], r["precision"]) == (one.model, one.precision))
            assert row["batch"] == one.batch
            speed = one.batch / row["ours_s"]
        else:
            speed = stored["samples"] / stored["training_seconds"]
        assert one.samples_per_second == pytest.approx(speed, rel=1e-3), one


def test_what_was_measured_is_planned_again():
    """The plan of the recipe on the machine that ran it gives the time that it took."""
    plan = make_plan(load_config("emoji"), device="cpu", recipe="emoji")
    took = json.loads((ROOT / "benchmarks/results/emoji/environment.json").read_text())["training_seconds"]
    assert plan.seconds == pytest.approx(took, rel=1e-3) and plan.speed_source.startswith("measured: emoji")
    assert plan.curriculum.step_count() == 800 and not plan.communication


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_losss_communication_is_what_it_sends(world):
    """Collectives of a group that exists in name only are counted, not run."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        features = [torch.nn.functional.normalize(torch.randn(8, 24), dim=-1).requires_grad_() for _ in range(2)]
        with Traffic() as traffic:
            ContrastiveLoss(equal_rows=True)(*features, torch.tensor(10.0, requires_grad=True)).backward()
    finally:
        dist.destroy_process_group()
    planned = communication(setup(world), planned_model(config(), []), 8 * world, 1000)
    of_loss = sum(size for name, size in planned.items() if name != "gradients summed")
    assert of_loss <= traffic.bytes <= of_loss + 64 * world  # beside numbers of a few bytes
    assert planned["gradients summed"] == 2 * (world - 1) / world * 4000


def test_communication_of_shards():
    model = planned_model(config(), [])
    sent = communication(setup(4, kind="fsdp", precision="bf16"), model, 64, 1000)
    assert sent["weights gathered"] == 2 * 3 / 4 * 2000 and sent["gradients reduced"] == 3 / 4 * 4000
    parts = communication(setup(4, kind="fsdp", precision="bf16", micro_batch=8), model, 64, 1000)
    assert parts["weights gathered"] == 2 * 3 * 3 / 4 * 2000  # two parts, three times each


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True])
def test_activations_are_those_that_autograd_keeps(precision, again):
    model = planned_model(config(), [])
    stage = Curriculum([], model, config().training).at(0)
    each, copies = saved_activations(model, stage, precision, again=again)
    towers = CLIP(model).train()
    for tower in (towers.visual, towers.text):
        tower.transformer.checkpoint_activations = again
    own = {tensor.untyped_storage()._cdata for tensor in towers.parameters()}
    sizes, kept = {}, []

    def pack(value):
        kept.append(value)
        if value.untyped_storage()._cdata not in own:
            sizes[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        towers(torch.randn(5, 3, 32, 32), torch.randint(1, 49, (5, 12)))
    assert sum(sizes.values()) == pytest.approx(5 * each + copies, rel=0.02)
    matrices = sum(p.numel() for name, p in towers.named_parameters() if p.ndim > 1 and "blocks" in name)
    if precision == "fp32":
        assert copies < 100
    elif not again:  # copies of the blocks' weights are made again
        assert copies >= 2 * matrices


def test_memory_time_and_where_they_go():
    one, many = make_plan(config()), make_plan(config(batch_size=512), gpus=8)
    parameters = sum(p.numel() for p in CLIP(one.model).parameters())
    assert one.parameters["all"] == parameters and one.memory["weights"] == 4 * parameters
    assert one.memory["adamw state"] == 8 * parameters and "averaged weights" not in one.memory
    assert one.speed_source.startswith("assumed: 40%") and not one.communication
    assert many.samples_per_second < 8 * one.samples_per_second and many.compute_share < 1
    shards = make_plan(config(batch_size=512), gpus=8, kind="fsdp", micro_batch=16)
    assert shards.memory["weights"] == 4 * parameters / 8 and "activations of 16 pairs" in shards.memory
    assert shards.seconds > many.seconds  # features twice, weights gathered
    again = make_plan(config(ema_decay=0.99, optimizer="muon"))
    assert again.memory["averaged weights"] == 4 * parameters
    assert 4 * parameters < again.memory["muon state"] < 8 * parameters


def test_a_speed_that_is_given():
    plan = make_plan(config(), measured=123.0)
    assert plan.samples_per_second == pytest.approx(123.0) and plan.seconds == pytest.approx(6400 / 123.0)
    assert plan.speed_source.startswith("given: 123 samples/s of one device")
    parts = make_plan(config(), measured=123.0, micro_batch=16)
    assert parts.samples_per_second == pytest.approx(123.0) and parts.speed > plan.speed


def test_cpu_processes_share_the_cores():
    one, four = (make_plan(config(precision="fp32"), gpus=n, device="cpu") for n in (1, 4))
    assert four.seconds == pytest.approx(one.seconds) and "another model, so a guess" in four.speed_source


def test_a_curriculum_is_planned_by_stage():
    small = make_plan(config(image_sizes=[{"until": 0.5, "size": 16}]))
    whole = make_plan(config())
    assert small.seconds < 0.9 * whole.seconds and small.samples_per_second == whole.samples_per_second
    text = "\n".join(describe(small))
    assert "16 px" in text and "32 px" in text and "x that of the model's own sizes" in text


def test_what_does_not_fit_is_said():
    plan = make_plan(load_config("emoji", ["training.batch_size=2000000"]))
    assert "does not fit H200" in plan.notes[0]


def test_command_line(tmp_path):
    runner = CliRunner()
    result = runner.invoke(app, ["plan", "emoji", "--gpus", "4", "--parallel", "fsdp", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["gpus"] == 4 and found["parallel"] == "fsdp" and found["samples"] == 204800
    result = runner.invoke(app, ["plan", "emoji", "training.steps=100", "--gpu", "cpu"])
    assert "parameters     image tower 3.37 M" in result.output and "time " in result.output
    for options, message in (
        (["--gpu", "h20"], "there is no GPU 'h20'"),
        (["--parallel", "fsdq"], "must be one of ddp, fsdp"),
        (["--gpus", "3"], "256 pairs cannot be divided among 3 ranks"),
    ):
        with pytest.raises(MmbaseError, match=message):
            runner.invoke(app, ["plan", "emoji", *options], catch_exceptions=False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    assert "Loss" in runner.invoke(app, ["watch", str(tmp_path), "--once"]).output
