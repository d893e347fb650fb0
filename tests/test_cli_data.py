"""``mmbase data`` as a person meets it: four verbs, their output, their refusals; a run's card that tells its data."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

import mmbase
from mmbase.errors import MmbaseError


def mm(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mmbase", "data", *map(str, arguments)],
        capture_output=True, text=True, timeout=180, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An ImageFolder of three classes with eight pictures each, and one that is broken."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, label in enumerate(("red_fox", "crow", "carp")):
        (root / label).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(100 * number + i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(root / label / f"{i}.png")
    (root / "crow" / "broken.png").write_bytes(b"\x89PNG")
    return root


def test_pack_check_card_index(photos, tmp_path):
    out = tmp_path / "shards"
    done = mm("pack", photos, out, "--template", "a photo of a {label}", "--size", 32, "--split", "val=0.25",
              "--licence", "CC0-1.0", "--source", "drawn by a program", "--name", "noise", "--seed", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out 1 of 25 rows: " in done.stdout and f"data.shards={out}/train" in done.stdout
    again = mm("pack", photos, out, "--template", "a photo of a {label}", "--size", 32, "--split", "val=0.25",
               "--seed", 1, "--json")  # fmt: skip
    told = json.loads(again.stdout)
    assert told["complete_before"] and told["splits"]["train"]["samples"] + told["splits"]["val"]["samples"] == 24

    done = mm("check", out / "train", "--seconds", 5, "--batch-size", 4, "--image-size", 32, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["is_complete"] and report["bad_share"] == 0 and report["sources"][0]["licence"] == "CC0-1.0"
    assert report["looked_at"] == told["splits"]["train"]["samples"]
    shown = mm("check", out / "train", "--seconds", 5, "--filter", "width>=1000")
    assert shown.returncode == 2 and "width below 1000" in shown.stdout and "filters leave nothing" in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1

    done = mm("card", out / "train", "--attribution", "nobody")
    assert done.returncode == 0 and "licence CC0-1.0" in done.stdout, done.stderr
    sheet = json.loads((out / "train" / "datasheet.json").read_text())
    assert sheet["sources"][0]["attribution"] == "nobody" and sheet["sources"][0]["name"] == "noise"
    (out / "train" / "sizes.json").unlink()
    done = mm("index", out / "train", "--json")
    assert sum(row["samples"] for row in json.loads(done.stdout)) == sum(
        json.loads((out / "train" / "sizes.json").read_text()).values()
    )


def test_help_loads_no_torch():
    done = mm("--help")
    assert all(verb in done.stdout for verb in ("check", "pack", "card", "index"))
    modules = "mmbase.cli_data, mmbase.data.pack, mmbase.data.datasheet_scan, mmbase.data.check_sample"
    code = f"import sys, {modules}; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere"], "there is no shard 'nowhere'"),
        (["pack", "nowhere", "out"], "there is no 'nowhere'"),
        (["pack", ".", "out"], "holds no pictures"),
        (["pack", ".", "out", "--format", "jpeg2000"], "--format: input should be 'auto', 'jpg', 'png' or 'webp'"),
        (["pack", ".", "out", "--size", "3"], "--size: input should be greater than or equal to 8 (given: 3)"),
        (["pack", ".", "out", "--split", "val"], "write for example --split val=0.05"),
        (["pack", ".", "out", "--split", "val=2"], "--split: the share 2 of the split 'val'"),
        (["pack", ".", "out", "--filter", "width"], "'width' is no filter"),
        (["pack", ".", "out", "--dedupe", "all"], "--dedupe"),
        (["pack", ".", "out", "--kind", "images"], "unknown kind 'images'; did you mean 'imagefolder'"),
        (["card", "https://example.com/0.tar"], "copy them here first"),
        (["index", "pipe:cat x"], "reads local shards"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(arguments, message, tmp_path):
    done = mm(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_runs_card_tells_what_it_was_trained_on(recipe, photos, tmp_path):
    """Packed with its licence, trained on without naming any source, without evaluation tasks."""
    from mmbase.data.pack import pack
    from mmbase.data.pack_config import PackConfig

    pack(photos, tmp_path / "shards", PackConfig(licence="CC-BY-4.0", source="a camera", attribution="by us"))
    quiet = Console(file=io.StringIO())
    options = ["training.steps=2", "training.warmup_steps=1", "data.holdout=null", "evaluation.tasks=[]",
               "data.sources=[]", "data.source_field=null", "data.identity=null",
               "data.captions=[{template: '{caption}'}]", "tokenizer.fields=[]", "tokenizer.vocab_size=270",
               f"data.shards={tmp_path / 'shards'}"]  # fmt: skip
    run = mmbase.train(recipe, *options, f"output={tmp_path / 'run-a'}", console=quiet)
    card = (run / "README.md").read_text()
    assert "CC-BY-4.0" in card and "a camera" in card and "by us" in card and "Not evaluated" in card
    assert json.loads((run / "provenance.json").read_text())["sources"][0]["pictures"] == 24
    (tmp_path / "shards" / "datasheet.json").unlink()
    assert (
        "CC-BY-4.0"
        in (mmbase.train(recipe, *options, f"output={tmp_path / 'run-a'}", console=quiet) / "README.md").read_text()
    )
    run = mmbase.train(recipe, *options, f"output={tmp_path / 'run-b'}", console=quiet)
    assert "is not known" in (run / "README.md").read_text()
    (run / "provenance.json").write_text("{")
    with pytest.raises(MmbaseError, match=r"provenance\.json' is damaged"):
        mmbase.train(recipe, *options, f"output={tmp_path / 'run-b'}", console=quiet)


def test_a_run_asked_by_another_recipe_keeps_its_own_sources(recipe, tmp_path):
    quiet = Console(file=io.StringIO())
    run = mmbase.train(recipe, "training.steps=2", "training.warmup_steps=1", "evaluation.tasks=[]", console=quiet)
    (run / "provenance.json").unlink()
    other = tmp_path / "other.yaml"
    values = yaml.safe_load(recipe.read_text())
    values["data"]["sources"] = [{"name": "never seen", "licence": "GPL-3.0"}]
    other.write_text(yaml.safe_dump(values))
    mmbase.evaluate(run, recipe=other, output=tmp_path / "report", console=quiet)
    card = (tmp_path / "report" / "README.md").read_text()
    assert "vendor 1" in card and "GPL-3.0" not in card
    assert not (run / "provenance.json").exists() and not (tmp_path / "report" / "provenance.json").exists()
