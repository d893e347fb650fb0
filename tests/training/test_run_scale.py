"""Training at scale through the real loop: ranks, micro-batches, curricula, guard, evaluation on the way."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import mmbase
from mmbase.data.pictures import MemoryStream
from mmbase.errors import MmbaseError

# Group norm, for batch norm cannot be split; AdamW with an epsilon that rounding of a gradient near zero does not pass.
EXACT = ["model.vision.stem_norm=group", "training.optimizer=adamw", "training.epsilon=1e-4", "training.steps=20"]
EVALUATED = ["training.evaluate_every=80", "evaluation.batch_size=5"]


def start(recipe, *overrides, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, *launcher, "-m", "mmbase", "train", str(recipe), *overrides]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(run, other, *, tolerance=1e-5):
    """Whether two runs logged the same losses, and their weights are equal but for rounding."""
    for a, b in zip(rows(run), rows(other), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    ours, theirs = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    for name, value in theirs.items():
        assert torch.linalg.vector_norm(ours[name] - value) <= tolerance * torch.linalg.vector_norm(value), name


def test_ranks_and_micro_batches_give_the_weights_of_one_process(recipe, tmp_path):
    whole = mmbase.train(recipe, *EXACT, *EVALUATED, f"output={tmp_path / 'whole'}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    cases = {
        "ddp": (["devices=2"], ()),
        "fsdp": (["training.parallel=fsdp", "training.micro_batch=2"], torchrun),
        "micro": (["training.micro_batch=3"], ()),
    }
    scores = [row["score"] for row in rows(whole) if "score" in row]
    assert len(scores) == 2
    for name, (options, launcher) in cases.items():
        run = tmp_path / name
        output = finish(start(recipe, *EXACT, *EVALUATED, *options, f"output={run}", launcher=launcher))
        assert output.count("report.html") == 1  # one rank reports
        same(run, whole)
        assert [row["score"] for row in rows(run) if "score" in row] == scores
        assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("data", [[], ["data.memory=never", "data.workers=1"]], ids=["memory", "streamed"])
def test_two_and_four_ranks_of_every_kind(recipe, tmp_path, data):
    options = [*EXACT, *data, "training.log_every=1", "evaluation.tasks=[]"]
    whole = mmbase.train(recipe, *options, f"output={tmp_path / 'whole'}")
    for ranks in (2, 4):
        for kind in ("ddp", "fsdp"):
            for micro in ("null", 8 // ranks // 2):
                run = tmp_path / f"{kind}-{ranks}-{micro}"
                own = [f"devices={ranks}", f"training.parallel={kind}", f"training.micro_batch={micro}"]
                finish(start(recipe, *options, *own, f"output={run}"))
                same(run, whole)


def test_two_ranks_that_were_stopped_go_on_as_one(recipe, tmp_path):
    options = [*EXACT, "training.steps=80", "evaluation.tasks=[]", "training.checkpoints.every_samples=null"]
    whole = mmbase.train(recipe, *options, f"output={tmp_path / 'whole'}")
    run = tmp_path / "run"
    process = start(recipe, *options, f"output={run}", "devices=2")
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or not rows(run):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    console = Console(file=io.StringIO(), width=200)
    mmbase.train(recipe, *options, f"output={run}", "training.micro_batch=2", console=console)
    assert "written by 2 ranks" in console.file.getvalue()
    same(run, whole, tolerance=1e-4)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_the_same_command_goes_on(recipe, tmp_path):
    options = [*EXACT, "training.steps=80", "evaluation.tasks=[]", "devices=2"]
    finish(start(recipe, *options, f"output={tmp_path / 'whole'}"))
    run = tmp_path / "run"
    process = start(recipe, *options, f"output={run}")
    deadline = time.monotonic() + 240
    while not list(run.glob("checkpoints/0*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output = finish(process, code=2)
    assert "rank 1 of 2 was ended by SIGKILL" in output and "Traceback" not in output.rpartition("error:")[2]
    assert not (run / "model.safetensors").exists()
    finish(start(recipe, *options, f"output={run}"))
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_mistake_on_ranks_is_one_line(recipe):
    output = finish(start(recipe, "training.batch_size=9", "devices=2"), code=2)
    assert "a batch of 9 pairs cannot be divided among 2 ranks" in output and "Traceback" not in output


CURRICULUM = [
    {"what": "image_size", "values": [[0, 8], [0.4, 16]]},
    {"what": "patch_keep", "shape": "linear", "values": [[0, 0.5], [1, 1.0]]},
    {"what": "text_length", "values": [[0, 6], [0.5, 12]]},
    {"what": "batch_size", "values": [[0, 4], [0.5, 12]]},
    {"what": "learning_rate", "shape": "constant", "values": 0.5},
    {"what": "lock_vision", "values": [[0, "all"], [0.3, 2], [0.6, 0]]},
]


def test_a_curriculum_changes_steps_and_is_resumed_into(recipe, tmp_path, monkeypatch):
    import mmbase.training.loop as loop

    seen, real = [], loop.contrastive_step

    def watch(forward, parts, *arguments, **options):
        model, given = forward.model, parts[0]["inputs"]
        shown = forward.show(given["image"], given["may_flip"], given["keys"])
        trains = [p.requires_grad for p in model.visual.parameters()]
        lengths = given["text"].packing.max_seqlen
        rate = 1 - model.visual.patch_dropout.rate
        seen.append((shown.shape[-1], len(shown), lengths, round(rate, 3), any(trains), all(trains)))
        return real(forward, parts, *arguments, **options)

    monkeypatch.setattr(loop, "contrastive_step", watch)
    options = ["evaluation.tasks=[]", "training.log_every=1", f"training.curriculum={json.dumps(CURRICULUM)}"]
    options += ["training.checkpoints.every_samples=40", "training.checkpoints.keep_last=9", "training.steps=12"]
    console = Console(file=io.StringIO(), width=200)
    whole = mmbase.train(recipe, *options, f"output={tmp_path / 'whole'}", console=console)
    # 96 samples: 12 steps of 4, then 4 of 12
    assert [size for _, size, *_ in seen] == [4] * 12 + [12] * 4
    assert [side for side, *_ in seen] == [8] * 10 + [16] * 6
    assert all(length <= 6 for _, _, length, *_ in seen[:12])
    assert seen[0][3] == 0.5 and [keep for _, _, _, keep, *_ in seen] == sorted(keep for _, _, _, keep, *_ in seen)
    assert [any_ for *_, any_, _ in seen] == [False] * 8 + [True] * 8
    assert [all_ for *_, all_ in seen] == [False] * 13 + [True] * 3
    assert "8 px" in console.file.getvalue() and "in all" in console.file.getvalue()
    told = rows(whole)
    assert [row["samples"] for row in told] == [*range(4, 49, 4), 60, 72, 84, 96]

    for name in ("00000012", "00000015"):  # as if killed after the checkpoint between
        split = tmp_path / name
        mmbase.train(recipe, *options, f"output={split}")
        (split / "model.safetensors").unlink()
        for path in (split / "checkpoints").iterdir():
            if path.name >= name:
                for file in path.rglob("*"):
                    file.unlink()
                path.rmdir()
        del seen[:]
        mmbase.train(recipe, *options, f"output={split}")
        assert seen and (split / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_sample_that_is_no_number_does_no_harm_and_is_named(recipe, tmp_path, monkeypatch, policy):
    import mmbase.training.augmented as augmented

    real = augmented.Augmented.show

    def spoil(self, image, may_flip, keys):
        shown = real(self, image, may_flip, keys)
        return torch.where(keys[:, None, None, None] == bad[0], torch.nan, shown)

    options = [*EXACT, "evaluation.tasks=[]", f"training.guard.policy={policy}", "training.log_every=1"]
    bad, taken = [-1, ""], MemoryStream.__next__

    def note(self):
        batch = taken(self)
        if self.position == 88 and bad[0] == -1:  # the third of the eleventh step
            bad[:] = [batch["draw"][2].item(), batch["key"][2]]
        return batch

    monkeypatch.setattr(MemoryStream, "__next__", note)
    monkeypatch.setattr(augmented.Augmented, "show", spoil)
    run = mmbase.train(recipe, *options)
    events = [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]
    assert [(e["step"], e["action"], e["suspects"]) for e in events] == [(10, policy, [bad[1]])]
    told = rows(run)
    assert [row["step"] for row in told if row["loss"] is None] == ([11] if policy == "skip" else [])
    assert [row["step"] for row in told] == [step for step in range(1, 21) if policy == "skip" or step != 11]
    assert all(torch.isfinite(value).all() for value in load_file(run / "model.safetensors").values())


@pytest.mark.parametrize(
    "options",
    [
        ["training.precision=fp16", "training.layer_decay=0.8", "training.guard.policy=off"],
        ["training.precision=bf16", "training.checkpoint_activations=true", "training.micro_batch=4"],
        ["data.memory=never", "data.workers=1", "training.micro_batch=4"],
    ],
)
def test_other_ways_run(recipe, options):
    run = mmbase.train(recipe, "model.vision.stem_norm=group", "evaluation.tasks=[]", *options)
    assert [row["step"] for row in rows(run)] == [4, 8, 12, 16, 20, 24]


def test_running_statistics_survive_a_step_that_is_left_out(recipe, monkeypatch):
    import mmbase.training.augmented as augmented

    real, calls = augmented.Augmented.show, []

    def spoil(self, image, may_flip, keys):
        calls.append(1)
        return real(self, image, may_flip, keys) * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(augmented.Augmented, "show", spoil)
    run = mmbase.train(recipe, "model.vision.stem_norm=batch", "evaluation.tasks=[]")
    assert len(calls) == 24
    weights = load_file(run / "model.safetensors")
    assert any("running_mean" in name for name in weights)
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_patience_ends_a_run_and_keeps_its_best_weights(recipe, monkeypatch):
    import mmbase.pipeline as pipeline

    scores = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(pipeline, "ask_tasks", lambda config: lambda model: {"score": next(scores)})
    options = ["training.evaluate_every=40", "training.patience=2", "training.log_every=100"]
    console = Console(file=io.StringIO(), width=200)
    run = mmbase.train(recipe, *options, "training.checkpoints.every_samples=null", console=console)
    told = console.file.getvalue()
    assert "after step 10: score 50.0% (the best so far)" in told and "no better score in 2 evaluations" in told
    assert [(row["samples"], row["score"]) for row in rows(run)] == [(40, 0.2), (80, 0.5), (120, 0.4), (160, 0.3)]
    best = load_file(run / "checkpoints" / "00000010" / "average.safetensors")
    kept = load_file(run / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in best.items())
    with pytest.raises(MmbaseError, match="set evaluate_every"):
        mmbase.load_config(recipe, ["training.patience=2"])
    with pytest.raises(MmbaseError, match="evaluate_every needs evaluation"):
        monkeypatch.undo()
        mmbase.train(recipe, "training.evaluate_every=40", "evaluation.tasks=[]", f"output={run.parent / 'other'}")
