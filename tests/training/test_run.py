"""A run from the command line: complete folder, exact resume after kill -9, mistakes that lose nothing."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from rich.console import Console

import mmbase
from mmbase.errors import MmbaseError
from mmbase.training.checkpoint import Checkpointer

FILES = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "README.md", "report.html", "model.json"}


def command(recipe, *overrides, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "mmbase", "train", str(recipe), *overrides]
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_kill_and_resume_give_the_same_bits(recipe, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    output = finish(command(recipe, f"output={whole}"))
    assert "top-1" in output and "unseen_vendor" in output

    process = command(recipe, f"output={broken}")
    deadline = time.monotonic() + 240
    while not list(broken.glob("checkpoints/0*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "model.safetensors").exists()
    resumed = finish(command(recipe, f"output={broken}"))
    assert "resuming at step" in resumed.replace("\n", " ")

    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    last = [torch.load(r / "checkpoints/00000024/state.pt", weights_only=True) for r in (whole, broken)]
    for a, b in zip(*(part["state"].values() for part in (last[0]["optimizer"][1], last[1]["optimizer"][1]))):
        assert torch.equal(a["momentum"], b["momentum"])
    steps, again = ([row["step"] for row in rows(run)] for run in (whole, broken))
    assert steps == again == [4, 8, 12, 16, 20, 24]
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(broken)]


def test_folder_is_complete_and_loads(recipe, tmp_path):
    run = mmbase.train(recipe)
    assert FILES | {"model.safetensors", "metrics.json", "tokenizer.json"} <= {path.name for path in run.iterdir()}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["00000018", "00000024"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tasks"]["unseen_vendor"]["zero_shot"]["classes"] == 12
    assert metrics["tasks"]["unseen_concepts"]["zero_shot"]["classes"] == 3
    assert metrics["tasks"]["described"]["zero_shot"]["classes"] == 12
    card = (run / "README.md").read_text()
    assert "CC0-1.0" in card and "mmbase.load" in card
    model = mmbase.load(run, device="cpu")
    assert model.encode_text(["red disc"]).shape == (1, 16)
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["training"]["betas"] == [0.9, 0.98]
    older = mmbase.load(run / "checkpoints" / "00000018", device="cpu")
    assert (older.encode_text(["red disc"]) != model.encode_text(["red disc"])).any()
    weights = (run / "model.safetensors").read_bytes()
    assert mmbase.train(recipe) == run  # trained already: evaluated again, not trained again
    assert (run / "model.safetensors").read_bytes() == weights


def test_sigterm_leaves_a_checkpoint_and_the_code_for_again(recipe, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    long = ["evaluation.tasks=[]", "training.steps=80", "training.checkpoints.every_samples=null"]
    finish(command(recipe, f"output={whole}", *long))
    process = command(recipe, f"output={broken}", *long)
    deadline = time.monotonic() + 240
    while not (broken / "metrics.jsonl").exists() or not rows(broken):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75 and "stopped by SIGTERM" in output, output
    assert not (broken / "model.safetensors").exists()
    finish(command(recipe, f"output={broken}", *long))
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


def test_it_learns(recipe):
    run = mmbase.train(
        recipe, "training.steps=150", "data.holdout=null", "evaluation.tasks=[]", "training.log_every=10"
    )
    losses = [row["loss"] for row in rows(run)]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_centred_projections_and_smaller_pictures_first(recipe):
    import mmbase.training.loop as loop

    seen, real = [], loop.center_projections

    def watch(forward, parts):
        real(forward, parts)
        given = parts[0]["inputs"]
        image, text = forward.show(given["image"], given["may_flip"], given["keys"]), given["text"]
        seen.extend([forward.model.visual(image).mean(0).norm(), forward.model.text(text).mean(0).norm()])
        seen.append(image.shape[-1])

    options = ["training.steps=8", "evaluation.tasks=[]", "training.center_projections=true"]
    with pytest.raises(MmbaseError, match=r"model\.vision\.projection_bias=true"):
        mmbase.train(recipe, *options, "output=" + str(recipe.parent / "refused"))
    # Patch dropout and stochastic depth would draw anew in the second pass.
    calm = ["model.vision.patch_dropout=0", "model.vision.drop_path=0", "training.image_sizes=[{until: 0.5, size: 8}]"]
    biases = ["model.vision.projection_bias=true", "model.text.projection_bias=true"]
    loop.center_projections = watch
    try:
        mmbase.train(recipe, *options, *calm, *biases)
    finally:
        loop.center_projections = real
    assert max(seen[:2]) < 1e-5 and seen[2:] == [8]


@pytest.mark.parametrize(
    "options", [["training.loss=sigmoid", "model.init_logit_bias=-10"], ["training.optimizer=adamw"]]
)
def test_other_losses_and_optimisers(recipe, options):
    run = mmbase.train(recipe, "training.steps=6", "training.warmup_steps=1", "evaluation.tasks=[]", *options)
    assert (run / "model.safetensors").exists()


def test_streaming_run_resumes_to_the_same_weights(recipe, tmp_path, monkeypatch):
    options = ["data.memory=never", "training.warmup_steps=1", "evaluation.tasks=[]"]
    whole = mmbase.train(recipe, f"output={tmp_path / 'whole'}", *options)
    config = mmbase.load_config(recipe, [f"output={tmp_path / 'split'}", *options])
    real, calls = Checkpointer.save, []

    def stop_after_the_second(*arguments):
        real(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", stop_after_the_second)
        with pytest.raises(KeyboardInterrupt):
            mmbase.train(config)
    split = mmbase.train(config)
    assert (whole / "model.safetensors").read_bytes() == (split / "model.safetensors").read_bytes()


def test_another_configuration_in_the_same_folder_is_refused(recipe):
    run = mmbase.train(recipe, "training.steps=6", "evaluation.tasks=[]")
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(MmbaseError, match=r"another training\.learning_rate"):
        mmbase.train(recipe, "training.steps=6", "training.learning_rate=1", "evaluation.tasks=[]")
    assert (run / "config.yaml").read_bytes() == before


def test_folders_that_cannot_be_used(recipe, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(MmbaseError, match="exists and is no run"):
        mmbase.train(recipe, f"output={tmp_path / 'full'}")
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below", "/proc/run"):
        with pytest.raises(MmbaseError, match=r"another output=|another folder"):
            mmbase.train(recipe, f"output={output}")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipe):
    console = Console(file=io.StringIO(), width=200)
    run = mmbase.train(recipe, "evaluation.tasks=[]")
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    damaged = run / "checkpoints" / "00000024" / "state.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    mmbase.train(recipe, "evaluation.tasks=[]", console=console)
    told = console.file.getvalue()
    assert "checkpoint 00000024 is damaged: state.pt" in told and "resuming at step 18" in told
    assert (run / "model.safetensors").read_bytes() == weights


def test_a_loss_that_is_not_finite_stops_the_run(recipe):
    with pytest.raises(MmbaseError, match=r"the (loss|gradient norm) is (nan|inf).*lower training"):
        mmbase.train(recipe, "training.learning_rate=1e30", "training.optimizer=adamw", "training.gradient_clip=null")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.tasks.0.shards=nowhere.tar", r"no shard 'nowhere\.tar'"),
        ("evaluation.tasks.0.label=captoin", r"task 'unseen_vendor' has no field 'captoin'.*did you mean 'caption'"),
        ("evaluation.tasks.0.label=x", r"has no field 'x'; set its label to one of caption, group, "),
        ("data.holdout=null", r"'unseen_concepts' asks for split=held_out"),
    ],
)
def test_a_task_that_cannot_be_evaluated_is_refused_before_training(recipe, tmp_path, override, message):
    with pytest.raises(MmbaseError, match=message):
        mmbase.train(recipe, override)
    assert not (tmp_path / "run").exists()


def test_wordings_of_a_class(recipe, tmp_path):
    from mmbase.data.shards import expand_shards, read_samples
    from mmbase.pipeline import build_task

    config = mmbase.load_config(recipe)
    training = list(read_samples(expand_shards(config.data.shards)))
    task = build_task(config.evaluation.tasks[1], config.data, training)
    assert ["red disc", "red disc, red, disc", "disc: red disc"] in list(task.class_names)
    wrong = config.evaluation.tasks[1].model_copy(update={"wordings": ["{keyword}"]})
    with pytest.raises(MmbaseError, match="'keyword'; did you mean 'keywords'"):
        build_task(wrong, config.data, training)
