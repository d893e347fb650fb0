"""How many samples each shard holds: from whoever wrote it down, else from an index."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmbase.data.index_store import in_parallel
from mmbase.data.selected import selected_rows
from mmbase.data.shard_list import scheme_of
from mmbase.data.sizes import CONNECTIONS, declared_sizes, named_sizes
from mmbase.data.tar_index import TarIndex
from mmbase.errors import MmbaseError

if TYPE_CHECKING:
    from mmbase.data.shards import Shards

NOTES = 5
"""Shards of which it is said what is wrong with them; of the others, how many they are."""


class NoSizes(MmbaseError):
    """The numbers of samples cannot be had without reading more than the cache holds, or running commands."""


class Counted(NamedTuple):
    """What the index of a shard says."""

    size: int
    removed: Counter[str]
    note: str | None


def count_samples(shards: Shards, table: Mapping[str, int] | str | Path | None, progress: bool) -> None:
    """Fill in ``sizes``, ``removed``, ``notes`` and where they are from.

    Raises:
        MmbaseError: shards that cannot be read or hold nothing.
        NoSizes: numbers that are not to be had at a bearable price.
    """
    urls = shards.urls
    known: dict[str, int] = {}
    if shards.select is None:
        known = named_sizes(urls, table) if table is not None else {}
        given = len(known)
        known |= declared_sizes([url for url in urls if url not in known], shards.config)
        shards.origins = {"the table given": given, "sizes beside them": len(known) - given}
    unknown = [number for number, url in enumerate(urls) if url not in known]
    remembered = _afford(shards, [urls[number] for number in unknown], progress)
    counted = in_parallel(
        lambda number: _count(shards, number, remembered),
        unknown,
        workers=shards.config.parallel if any(map(shards.needs_cache, urls[:1])) else 2 * (os.cpu_count() or 1),
        progress=progress,
        title="Indexing shards",
    )
    removed: Counter[str] = Counter()
    notes: list[str] = []
    sizes = np.array([known.get(url, 0) for url in urls], np.int64)
    for number, found in zip(unknown, counted, strict=True):
        sizes[number] = found.size
        removed += found.removed
        notes += [f"{urls[number]}: {found.note}"] if found.note else []
    shards.sizes, shards.removed = sizes, dict(removed.most_common())
    shards.origins["their index"] = len(unknown)
    shards.origins = {origin: count for origin, count in shards.origins.items() if count}
    shards.notes = notes[:NOTES] + ([f"and {len(notes) - NOTES} shards more"] if len(notes) > NOTES else [])
    if not sizes.sum() and not removed:
        raise MmbaseError(f"the {len(urls)} shards hold no samples: {notes[0] if notes else urls[0]}; check the list")


def _count(shards: Shards, number: int, remembered: Mapping[str, TarIndex]) -> Counted:
    url = shards.urls[number]
    if url in remembered:
        index = remembered[url]
        return Counted(len(index), Counter(), _note(index))
    try:
        tar = shards.opened(number)
    except OSError as error:
        raise MmbaseError(
            f"cannot read the shard {url!r}: {error.strerror}; check it or take it off the list"
        ) from error
    try:
        removed: Counter[str] = Counter()
        if shards.select is not None:
            removed = selected_rows(tar, shards.select, shards.cache.folder).removed
        return Counted(len(tar), removed, _note(tar.index))
    finally:
        shards.done(tar)
        shards.release()


def _note(index: TarIndex) -> str | None:
    return index.damage or (None if index.ended else "it lacks the mark of its end and may be cut")


def _afford(shards: Shards, unknown: list[str], progress: bool) -> dict[str, TarIndex]:
    """See that what must be fetched to be counted fits the cache; the indices kept of shards that are not here now.

    Raises:
        NoSizes: it does not, or a command would have to run.
    """
    absent = [url for url in unknown if shards.needs_cache(url) and not shards.cache.has(url)]
    piped = [url for url in absent if scheme_of(url) == "pipe"]
    if piped:
        raise NoSizes(f"the command {piped[0]!r} tells no number of samples; give data.sizes, a table like sizes.json")
    remembered: dict[str, TarIndex] = {}
    total = 0
    asked = in_parallel(
        shards.cache.recall, absent, workers=CONNECTIONS, progress=progress, title="Asking for the sizes of shards"
    )
    for url, (size, index) in zip(absent, asked, strict=True):
        if index is not None and shards.select is None:
            remembered[url] = index
        else:
            total += size or 0
    if total > shards.config.max_bytes:
        raise NoSizes(
            f"{len(absent) - len(remembered)} shards tell no number of samples, the first {absent[0]!r}, and their "
            f"{total >> 20:,} MiB exceed data.cache.max_bytes={shards.config.max_bytes}; put a sizes.json beside them "
            "or raise it"
        )
    return remembered
