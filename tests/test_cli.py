"""The command line as a person meets it: output, exit codes, one-line errors, no torch before it is needed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import mmbase
from mmbase.cli import spread_lists
from mmbase.models.config import CLIPConfig, TextConfig, VisionConfig

CONFIG = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, heads=2, layers=1),
    text=TextConfig(width=32, heads=2, layers=1),
)


def mm(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mmbase", *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "openclip"
    mmbase.create(CONFIG, device="cpu").export("openclip", folder)
    return folder


@pytest.fixture
def images(tmp_path):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_spread_lists():
    assert spread_lists(["a.png", "--labels", "cat", "dog", "--top", "1"]) == [
        "a.png", "--labels", "cat", "--labels", "dog", "--top", "1",
    ]  # fmt: skip
    assert spread_lists(["--labels", "cat", "--", "-x.png"]) == ["--labels", "cat", "--", "-x.png"]
    assert spread_lists(["x", "--json"]) == ["x", "--json"]


def test_help_and_version_free_imports_load_no_torch():
    code = "import sys, mmbase, mmbase.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    help_text = mm("--help")
    assert help_text.returncode == 0
    for verb in ("train", "eval", "zeroshot", "embed", "export", "models", "config", "doctor", "bench"):
        assert verb in help_text.stdout


def test_zeroshot(exported, images):
    done = mm("zeroshot", *images, "--labels", "cat", "dog", "bird", "--model", exported, "--top", 2, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    model = mmbase.load(exported, device="cpu")
    assert [row["image"] for row in rows] == [str(image) for image in images]
    for row, image in zip(rows, images):
        expected = model.classify(image, ["cat", "dog", "bird"], k=2)
        assert [(one["label"], pytest.approx(one["probability"], abs=1e-5)) for one in row["labels"]] == expected
    assert "%" in mm("zeroshot", images[0], "--labels", "cat", "--model", exported).stdout


def test_embed(exported, images, tmp_path):
    out = tmp_path / "features.npz"
    done = mm("embed", *images, "--text", "a cat", "a dog", "-m", exported, "-o", out)
    assert done.returncode == 0, done.stderr
    arrays = np.load(out)
    assert arrays["image"].shape == arrays["text"].shape == (2, 16)
    assert list(arrays["texts"]) == ["a cat", "a dog"]


def test_models():
    done = mm("models")
    assert done.returncode == 0 and "144 models: 71 native, 73 through OpenCLIP" in done.stdout
    rows = {row["name"]: row for row in json.loads(mm("models", "--json").stdout)}
    assert len(rows) == 144
    assert rows["ViT-B-32"]["route"] == "native" and rows["RN50"]["route"] == "adapter"
    assert "timm/ViT-B-16-SigLIP" in rows["ViT-B-16-SigLIP"]["needs_hub"]
    assert "laion2b_s34b_b79k" in rows["ViT-B-32"]["pretrained"]


def test_config_and_doctor():
    assert "learning_rate: 0.5" in mm("config", "emoji", "training.learning_rate=0.5").stdout
    assert "emoji" in mm("config").stdout
    assert "training.steps" in mm("config", "--keys").stdout
    done = mm("doctor")
    assert done.returncode == 0, done.stdout
    assert "144, 71 native" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zeroshot", "nothing.png", "--labels", "cat"], "no image 'nothing.png'"),
        (["zeroshot", "README.md"], "no labels given"),
        (["models", "no-such-thing"], "no model's name contains"),
        (["config", "emojy"], "did you mean 'emoji'"),
        (["config", "emoji", "training.stepps=3"], "did you mean 'steps'"),
        (["train", "emoji", "training.steps=soon"], "training.steps"),
        (["eval", "runs/none"], "no run"),
        (["embed", "-o", "x.npz"], "nothing to embed"),
        (["export", "runs/none", "--format", "openclip"], "runs/none"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(arguments, message, tmp_path):
    done = mm(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_corrupt_image_and_corrupt_weights(exported, images, tmp_path):
    images[0].write_bytes(images[0].read_bytes()[:100])
    done = mm("zeroshot", images[0], "--labels", "cat", "-m", exported)
    assert done.returncode == 2 and str(images[0]) in done.stderr and "Traceback" not in done.stderr
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"garbage")
    done = mm("zeroshot", images[1], "--labels", "cat", "-m", "ViT-B-32", "--pretrained", weights)
    assert done.returncode == 2 and "w.pt" in done.stderr and "Traceback" not in done.stderr


def test_unwritable_output(exported, images):
    done = mm("embed", images[0], "-m", exported, "-o", "/proc/features.npz")
    assert done.returncode == 2 and "cannot write '/proc/features.npz'" in done.stderr
