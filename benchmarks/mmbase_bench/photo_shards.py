"""Shards of photographs to measure loading with: WebDataset tars of JPEGs with captions, built from two photographs.

scikit-learn comes with two real photographs (640 x 427). Each sample is a random part of one of them, resized to sides
of 250 to 550 pixels and encoded, so that no two are alike.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmbase.errors import MmbaseError
from mmbase.files import write_atomically
from mmbase_bench.caption_texts import captions

SIDES = (250, 550)
SMALLEST_PART = 0.5
"""Least share of a photograph's side that a sample shows."""


@dataclass(frozen=True)
class PhotoShards:
    """What lies in a folder of shards."""

    samples: int
    shards: int
    seed: int
    qualities: list[int]
    """of the JPEGs, drawn evenly"""
    bytes_per_picture: float
    pixels_per_picture: float
    seconds: float
    """that building took, on one core"""

    def describe(self) -> str:
        """All of it in a line."""
        return (
            f"{self.samples} JPEGs of quality {', '.join(map(str, self.qualities))}, on average "
            f"{self.bytes_per_picture / 1e3:.0f} kB and {self.pixels_per_picture / 1e3:.0f} kilopixels, "
            f"in {self.shards} shards, built in {self.seconds:.1f} s on one core"
        )

    def urls(self, folder: Path) -> str:
        """A brace pattern that names all of them."""
        return str(folder / f"{{00000..{self.shards - 1:05d}}}.tar")


def photo_shards(
    folder: Path, *, samples: int, shards: int, seed: int = 0, qualities: Sequence[int] = (75,)
) -> PhotoShards:
    """The shards in ``folder``, built where they are not there yet.

    Raises:
        MmbaseError: scikit-learn is not installed, or the folder holds other shards.
    """
    record = folder / "photo_shards.json"
    if record.is_file():
        found = PhotoShards(**json.loads(record.read_text()))
        if (found.samples, found.shards, found.seed, found.qualities) == (samples, shards, seed, [*qualities]):
            return found
        raise MmbaseError(
            f"{str(folder)!r} holds {found.samples} samples of seed {found.seed} and qualities {found.qualities} in "
            f"{found.shards} shards; name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    texts = captions("ordinary", samples, seed)
    sizes: dict[str, int] = {}
    encoded = pixels = 0
    pictures = enumerate(_pictures(samples, seed, qualities))
    for shard, rows in enumerate(np.array_split(np.arange(samples), shards)):
        name = f"{shard:05d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for row, (data, area) in (next(pictures) for _ in rows):
                _add(tar, f"{row:08d}.jpg", data)
                _add(tar, f"{row:08d}.txt", texts[row].encode())
                encoded, pixels = encoded + len(data), pixels + area
        sizes[name] = len(rows)
    write_atomically(folder / "sizes.json", json.dumps(sizes))
    seconds = time.perf_counter() - start
    made = PhotoShards(samples, shards, seed, [*qualities], encoded / samples, pixels / samples, seconds)
    write_atomically(record, json.dumps(asdict(made)))
    return made


def _pictures(samples: int, seed: int, qualities: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """Encoded pictures and their pixels."""
    photographs = _photographs()
    rng = np.random.default_rng((seed, 1))
    for _ in range(samples):
        photograph = photographs[rng.integers(len(photographs))]
        width, height = rng.integers(SIDES[0], SIDES[1] + 1, 2).tolist()
        scale = min(photograph.width / width, photograph.height / height) * rng.uniform(SMALLEST_PART, 1)
        left = rng.uniform(0, photograph.width - width * scale)
        top = rng.uniform(0, photograph.height - height * scale)
        box = left, top, min(left + width * scale, photograph.width), min(top + height * scale, photograph.height)
        picture = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.choice(qualities)))
        yield file.getvalue(), width * height


def _photographs() -> list[Image.Image]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise MmbaseError(
            "the photographs come with scikit-learn; pip install scikit-learn, or give --shards"
        ) from None
    return [Image.fromarray(array) for array in load_sample_images().images]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
