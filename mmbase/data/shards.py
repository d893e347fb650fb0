"""Shard lists and the samples in them: names, braces, folders, the embedded set; read through webdataset."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mmbase.errors import MmbaseError, nearest

EMBEDDED = {"emoji": Path(__file__).parent / "emoji"}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class Sample(NamedTuple):
    """One image-text pair as it lies in a shard: still encoded."""

    key: str
    image: bytes
    fields: dict[str, Any]
    """Everything of the JSON member; the ``txt`` member, where there is one, is ``fields["caption"]``."""


class Holdout(BaseModel):
    """A seeded share of the distinct values of one field, taken evenly from every group, kept out of training."""

    model_config = ConfigDict(extra="forbid")

    field: str = Field("unicode", description="samples that share this field's value are held out together")
    group: str = Field("group", description="the share is taken within every value of this field")
    fraction: float = Field(0.1, gt=0, lt=1, description="share of the distinct values held out")
    seed: int = Field(0, description="which values: independent of the training seed")

    def covers(self, fields: dict[str, Any], values: Collection[str]) -> bool:
        """Whether a sample with these fields is one of the held-out ``values``."""
        return str(fields.get(self.field)) in values

    def values(self, fields: Iterable[dict[str, Any]]) -> set[str]:
        """The values held out among these samples; the same for any order of them."""
        groups: dict[str, set[str]] = defaultdict(set)
        for row in fields:
            if self.field in row:
                groups[str(row.get(self.group, ""))].add(str(row[self.field]))
        chosen: set[str] = set()
        for name in sorted(groups):
            values = sorted(groups[name])
            order = np.random.Generator(np.random.Philox(key=[self.seed, stable_id(name)])).permutation(len(values))
            chosen.update(values[i] for i in order[: round(self.fraction * len(values))])
        return chosen


def stable_id(text: str) -> int:
    """A 63-bit number of a string, the same in every process and release (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """Shard paths of one or several specifications, in order.

    A specification is a tar file, a folder (all its ``.tar`` in name order), ``emoji:NAME`` for a shard that comes with
    mmbase (``emoji:`` alone for all), a URL that webdataset opens (``https:``, ``pipe:``), each with brace patterns
    such as ``noto-{000..001}.tar``.

    Raises:
        MmbaseError: a file or folder that does not exist, a folder without tars, an empty list.
    """
    import braceexpand

    shards: list[str] = []
    for item in [spec] if isinstance(spec, str) else spec:
        for name in braceexpand.braceexpand(str(item)):
            scheme, _, rest = name.partition(":")
            if scheme in EMBEDDED:
                name = str(EMBEDDED[scheme] / rest) if rest else str(EMBEDDED[scheme])
            elif rest and len(scheme) > 1:
                shards.append(name)
                continue
            shards.extend(_local_shards(Path(name)))
    if not shards:
        raise MmbaseError("no shards given: name tar files or a folder of them, such as data.shards=shards/")
    return shards


def _local_shards(path: Path) -> list[str]:
    path = path.expanduser()
    if path.is_dir():
        found = sorted(str(p) for p in path.glob("*.tar"))
        if not found:
            raise MmbaseError(f"the folder {str(path)!r} holds no .tar shards; name a folder of WebDataset tars")
        return found
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.tar")] if path.parent.is_dir() else []
        raise MmbaseError(f"there is no shard {str(path)!r}{nearest(path.name, beside) or '; check the path'}")
    return [str(path)]


def read_samples(shards: Iterable[str], caption_field: str = "caption") -> Iterator[Sample]:
    """The samples of shards in their order, encoded as they lie there.

    Raises:
        MmbaseError: a shard that cannot be read, naming it.
    """
    import webdataset

    for shard in shards:
        # One pipeline a shard, so that an error names the shard it came from.
        pipeline = webdataset.DataPipeline(webdataset.SimpleShardList([shard]), webdataset.tarfile_to_samples())
        try:
            for raw in pipeline:
                sample = _sample(raw, caption_field)
                if sample is not None:
                    yield sample
        except MmbaseError:
            raise
        except Exception as error:
            # tarfile, the pipe: command and the decompressors raise kinds of their own.
            raise MmbaseError(
                f"cannot read the shard {shard!r}: {error}; replace it or take it off the list"
            ) from error


def _sample(raw: dict[str, Any], caption_field: str) -> Sample | None:
    image = next((raw[name] for name in IMAGE_EXTENSIONS if name in raw), None)
    if image is None:
        return None
    fields: dict[str, Any] = {}
    if "json" in raw:
        try:
            fields.update(json.loads(raw["json"]))
        except ValueError as error:
            raise MmbaseError(f"sample {raw['__key__']!r} of {raw['__url__']!r} has a broken .json: {error}") from error
    if "txt" in raw:
        fields["caption"] = raw["txt"].decode("utf-8", "replace").strip()
    if caption_field not in fields:
        return None
    return Sample(raw["__key__"], image, fields)


def declared_sizes(shards: Iterable[str]) -> dict[str, int]:
    """Samples per shard where a ``sizes.json`` (OpenCLIP's) beside it tells; shards without one are left out."""
    known: dict[str, int] = {}
    tables: dict[Path, dict[str, int]] = {}
    for shard in shards:
        path = Path(shard)
        if path.parent not in tables:
            table = path.parent / "sizes.json"
            tables[path.parent] = json.loads(table.read_text()) if table.is_file() else {}
        if path.name in tables[path.parent]:
            known[shard] = int(tables[path.parent][path.name])
    return known
