"""A tiny picture dataset and a recipe that trains on it in a second."""

import colorsys
import io
import json
import tarfile

import pytest
import yaml
from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "bar")
COLOURS = {"red": 0.0, "yellow": 0.16, "green": 0.33, "blue": 0.62}


def draw(shape, hue, vendor):
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9, 0.9 - 0.2 * vendor))
    box = [(4, 4, 27, 27), (6, 5, 26, 26), (3, 12, 28, 19)][SHAPES.index(shape)]
    (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=colour)
    return picture


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folder of three shards (vendors) of twelve pairs each: three shapes in four colours."""
    folder = tmp_path_factory.mktemp("shapes")
    for vendor in range(3):
        with tarfile.open(folder / f"vendor-{vendor}.tar", "w") as tar:
            for shape in SHAPES:
                for name, hue in COLOURS.items():
                    key = f"{vendor}-{name}-{shape}"
                    buffer = io.BytesIO()
                    draw(shape, hue, vendor).save(buffer, "PNG")
                    fields = {
                        "caption": f"{name} {shape}",
                        "unicode": f"{name} {shape}",
                        "group": shape,
                        "keywords": [name, shape],
                        "vendor": f"vendor {vendor}",
                    }
                    for ending, data in (("png", buffer.getvalue()), ("json", json.dumps(fields).encode())):
                        info = tarfile.TarInfo(f"{key}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture
def recipe(shapes, tmp_path):
    """Path of a YAML recipe: both towers tiny, patch dropout, stochastic depth and every kind of state in play."""
    values = {
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": {
            "embed_dim": 16,
            "vision": {
                "image_size": 16, "stem": "conv", "stem_channels": [8, 16], "stem_blocks": [1, 1], "width": 16,
                "heads": 2, "layers": 2, "class_token": False, "pool": "average", "patch_dropout": 0.25,
                "drop_path": 0.1,
            },
            "text": {"width": 16, "heads": 2, "layers": 1, "causal": False, "pool": "mean", "mask_padding": True},
        },
        "preprocess": {"alpha": "white"},
        "tokenizer": {"kind": "learned", "vocab_size": 300, "context_length": 12, "fields": ["keywords"]},
        "data": {
            "shards": [str(shapes / "vendor-0.tar"), str(shapes / "vendor-1.tar")],
            "captions": [{"template": "{caption}"}, {"template": "{keywords}"}],
            "identity": "unicode",
            "holdout": {"fraction": 0.25},
            "source_size": 32,
            "memory": "always",
            "source_field": "vendor",
            "sources": [{"name": "vendor 0", "licence": "CC0-1.0"}, {"name": "vendor 1", "licence": "MIT"}],
        },
        "augment": {"flip": 0.5, "rotation": 5, "hue": 0.1, "noise": 0.05},
        "training": {
            "steps": 24, "batch_size": 8, "warmup_steps": 4, "optimizer": "muon", "ema_decay": 0.9,
            "log_every": 4, "checkpoints": {"every_samples": 48}, "precision": "fp32",
        },
        "evaluation": {
            "tasks": [
                {"name": "unseen_vendor", "shards": str(shapes / "vendor-2.tar"), "breakdown": ["group"]},
                {
                    "name": "described", "shards": str(shapes / "vendor-2.tar"), "retrieval": False,
                    "wordings": ["{caption}, {keywords}", "{group}: {caption}"],
                },
                {
                    "name": "unseen_concepts", "split": "held_out",
                    "shards": [str(shapes / "vendor-0.tar"), str(shapes / "vendor-1.tar")],
                },
            ]
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
