"""Reads shards from end to end: their statistics and hashes for a datasheet, their sizes and indices."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmbase.data.datasheet import Datasheet, DataSource, ShardFacts, read_datasheet, write_datasheet
from mmbase.data.index_store import write_index
from mmbase.data.reasons import kind_of
from mmbase.data.samples import RawSample, SampleFault, fields_of, image_of
from mmbase.data.shard_list import expand_shards, local_path, scheme_of
from mmbase.data.statistics import Statistics
from mmbase.data.tar_index import TarIndex, scan_tar
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

_MEMBER_LIMIT = 1 << 28
Step = Callable[[], object]
"""Called whenever a shard is done."""


@dataclass
class ScannedShard:
    """What one shard holds."""

    path: Path
    facts: ShardFacts
    faults: dict[str, int]
    """kind of fault -> samples"""
    damage: str | None
    """what is wrong with the tar as a whole"""


def local_tars(spec: str | Sequence[str], what: str) -> list[Path]:
    """The plain local tars of a specification.

    Raises:
        MmbaseError: nothing there, or something remote or compressed, which ``what`` cannot do.
    """
    paths = []
    for shard in expand_shards(spec):
        if scheme_of(shard) not in ("", "file"):
            raise MmbaseError(f"{what} reads local shards, not {shard!r}; copy them here first")
        if not shard.endswith(".tar"):
            raise MmbaseError(f"{what} reads plain tars, not {shard!r}; unpack it first, as with gunzip")
        paths.append(local_path(shard))
    return paths


def read_row(path: Path, index: TarIndex, row: int, limit: int = _MEMBER_LIMIT) -> RawSample:
    """One sample of a local tar.

    Raises:
        SampleFault: a member that was refused, is too large, or is not all there.
    """
    key, begins = index.key(row), index.begins(row)
    if row in index.refusals:
        raise SampleFault(str(path), key, *index.refusals[row])
    members: dict[str, bytes] = {}
    with path.open("rb") as file:
        for member in index.members(row):
            if member.size > limit:
                reason = f"the member .{member.extension} of {member.size} bytes is above the limit of {limit}"
                raise SampleFault(str(path), key, member.offset, reason)
            file.seek(member.offset)
            members[member.extension] = file.read(member.size)
            if len(members[member.extension]) != member.size:
                raise SampleFault(str(path), key, member.offset, f"the member .{member.extension} is cut off")
    return RawSample(key, members, str(path), begins)


def scan_shards(
    paths: Sequence[Path], *, caption_field: str = "caption", workers: int = 4, step: Step | None = None
) -> tuple[list[ScannedShard], Statistics]:
    """Every sample of local tars: statistics of the good ones, hashes of the shards; the same for any ``workers``.

    Pictures are looked at by their headers, not decoded.

    Raises:
        MmbaseError: a shard that cannot be read at all.
    """
    statistics = Statistics()
    scanned = []
    with ThreadPoolExecutor(workers, "scan") as pool:
        for shard, part in pool.map(lambda path: _scan(path, caption_field), paths):
            scanned.append(shard)
            statistics.merge(part)
            if step:
                step()
    return scanned, statistics


def _scan(path: Path, caption_field: str) -> tuple[ScannedShard, Statistics]:
    statistics, faults = Statistics(), Counter[str]()
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        index = scan_tar(path)
        for row in range(len(index)):
            try:
                raw = read_row(path, index, row)
                _count(raw, caption_field, statistics)
            except SampleFault as fault:
                faults[kind_of(fault.reason)] += 1
    except OSError as error:
        raise MmbaseError(f"cannot read the shard {str(path)!r}: {error.strerror or error}; check the path") from error
    facts = ShardFacts(samples=len(index), bytes=index.size, sha256=digest.hexdigest())
    return ScannedShard(path, facts, dict(faults), index.damage), statistics


def _count(raw: RawSample, caption_field: str, statistics: Statistics) -> None:
    fields = fields_of(raw, caption_field)
    data = image_of(raw)
    extension = next(name for name, member in raw.members.items() if member is data)
    width, height = picture_size(data, raw)
    statistics.add(
        extension=extension,
        size=len(data),
        width=width,
        height=height,
        caption=str(fields[caption_field]),
        fields=fields,
    )


def picture_size(data: bytes, raw: RawSample) -> tuple[int, int]:
    """Width and height by the picture's header.

    Raises:
        SampleFault: it is no picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # Pillow raises many kinds on broken data
        raise SampleFault(raw.shard, raw.key, raw.offset, "not a picture that Pillow can read") from error


def describe_shards(
    paths: Sequence[Path],
    folder: Path,
    given: Mapping[str, str | None],
    *,
    description: str | None = None,
    caption_field: str = "caption",
    workers: int = 4,
    step: Step | None = None,
) -> tuple[Datasheet, list[ScannedShard]]:
    """Write the datasheet of local tars into ``folder``.

    Args:
        paths: the tars.
        folder: whose ``datasheet.json``, where there is one, is brought up to date: what it says of sources stays.
        given: ``name``, ``source``, ``licence``, ``attribution``; None leaves what was there. They are of the one
            source of the sheet.
        description: a sentence or two; None leaves what was there.
        caption_field: the JSON field with the caption.
        workers: threads.
        step: called whenever a shard is done.

    Raises:
        MmbaseError: unreadable shards, only some of a folder's, a broken datasheet, several sources and yet ``given``.
    """
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MmbaseError(f"two shards are called {twice!r}; describe one folder at a time")
    before = read_datasheet(folder)
    others = {path.name for path in folder.glob("*.tar")} - set(names)
    if others and all(path.parent == folder for path in paths):
        raise MmbaseError(
            f"{str(folder)!r} holds other shards too, such as {min(others)!r}; name the folder, or write "
            "elsewhere with --output"
        )
    sources = [source.model_copy() for source in before.sources] if before else []
    changes = {key: value for key, value in given.items() if value is not None}
    if len(sources) > 1 and set(changes) - {"name"}:
        raise MmbaseError(
            f"{str(folder / 'datasheet.json')!r} names {len(sources)} sources; change their "
            f"{min(set(changes) - {'name'})} in that file"
        )
    name = changes.get("name") or (before.name if before else folder.resolve().name)
    if len(sources) <= 1:
        sources = [(sources[0] if sources else DataSource(name=name)).model_copy(update=changes)]
    scanned, statistics = scan_shards(paths, caption_field=caption_field, workers=workers, step=step)
    sheet = Datasheet(
        name=name,
        description=description if description is not None else before.description if before else "",
        sources=sources,
        shards=dict(sorted((shard.path.name, shard.facts) for shard in scanned)),
        statistics=statistics.summary(),
        removed=before.removed if before else {},
        made_with=before.made_with if before else {},
    )
    write_datasheet(sheet, folder)
    return sheet, scanned


def index_shards(paths: Sequence[Path], *, workers: int = 4, step: Step | None = None) -> list[ScannedShard]:
    """Write ``NAME.tar.index`` beside every local tar and ``sizes.json`` into its folder.

    Entries of a ``sizes.json`` for other shards stay.

    Raises:
        MmbaseError: a shard that cannot be read, a folder that cannot be written, a broken ``sizes.json``.
    """
    scanned: list[ScannedShard] = []
    with ThreadPoolExecutor(workers, "index") as pool:
        for path, index in zip(paths, pool.map(write_index, paths)):
            faults = Counter(kind_of(reason) for _, reason in index.refusals.values())
            scanned.append(
                ScannedShard(path, ShardFacts(samples=len(index), bytes=index.size), dict(faults), index.damage)
            )
            if step:
                step()
    for folder in dict.fromkeys(path.parent for path in paths):
        table = folder / "sizes.json"
        sizes: dict[str, int] = {}
        if table.is_file():
            try:
                sizes = dict(json.loads(table.read_bytes()))
            except (ValueError, TypeError) as error:
                raise MmbaseError(f"{str(table)!r} is no table of sizes: {error}; remove it") from error
        sizes |= {shard.path.name: shard.facts.samples for shard in scanned if shard.path.parent == folder}
        write_atomically(table, json.dumps(dict(sorted(sizes.items())), indent=1) + "\n")
    return scanned
