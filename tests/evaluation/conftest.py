"""A small model without torch, and real pictures, for the tests of evaluation."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmbase

EMOJI = Path(mmbase.__path__[0]) / "data" / "emoji"


class FakeModel:
    """Texts by a hash of their letters, images by a random projection of their pixels: deterministic, and no torch."""

    def __init__(self, width: int = 24, logit_bias: float | None = None) -> None:
        self.name = "fake"
        self.image_size = 8
        self.logit_scale = 20.0
        self.logit_bias = logit_bias
        self.text_calls: list[int] = []
        self.image_calls: list[int] = []
        self._width = width
        self._projection = np.random.default_rng(0).standard_normal((8 * 8 * 3, width)).astype(np.float32)

    def encode_image(self, images: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        self.image_calls.append(len(images))
        rows = []
        for image in images:
            picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
            pixels = np.asarray(picture.convert("RGB").resize((8, 8)), dtype=np.float32) / 255 - 0.5
            rows.append(pixels.reshape(-1) @ self._projection)
        features = np.stack(rows)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        self.text_calls.append(len(texts))
        seeds = [zlib.crc32(text.encode()) for text in texts]
        features = np.stack([np.random.default_rng(seed).standard_normal(self._width) for seed in seeds])
        return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)

    def parameter_counts(self) -> dict[str, int]:
        return {"image": 4608, "text": 0, "total": 4608}


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def sigmoid_model() -> FakeModel:
    return FakeModel(logit_bias=-10.0)


def read_emoji(shard: str, count: int | None = None) -> list[dict[str, Any]]:
    """Samples of an embedded shard as evaluation takes them."""
    samples: list[dict[str, Any]] = []
    with tarfile.open(EMOJI / shard) as archive:
        members = {member.name: member for member in archive}
        for name, member in members.items():
            if not name.endswith(".webp"):
                continue
            if count is not None and len(samples) == count:
                break
            stem = name.removesuffix(".webp")
            meta = json.load(archive.extractfile(members[stem + ".json"]))  # type: ignore[arg-type]
            image = Image.open(io.BytesIO(archive.extractfile(member).read()))  # type: ignore[union-attr]
            image.load()
            samples.append({"key": stem, "image": image, "caption": meta.pop("caption"), "meta": meta})
    return samples


@pytest.fixture(scope="session")
def emoji_samples() -> list[dict[str, Any]]:
    return read_emoji("fxemoji-000.tar", 40)
