"""How many samples each shard has, where somebody has written it down."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmbase.data.cache_config import CacheConfig
from mmbase.data.index_store import in_parallel
from mmbase.data.shard_list import SHARD_SUFFIXES, local_path, scheme_of
from mmbase.errors import MmbaseError

CONNECTIONS = 16
"""Small files of statistics asked for at a time."""


def declared_sizes(shards: Iterable[str], cache: CacheConfig | None = None) -> dict[str, int]:
    """Samples per shard where a file beside it tells: OpenCLIP's ``sizes.json``, else img2dataset's ``_stats.json``.

    Shards of which nothing tells are left out. For remote shards one ``sizes.json`` a folder is asked for, and
    statistics only where the folder's first shard has them.

    Args:
        shards: paths and URLs.
        cache: time-outs and options of remote requests; None: nothing remote is asked.

    Raises:
        MmbaseError: a table that is no JSON of sizes, or a server that does not answer.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        if scheme_of(shard) != "pipe" and (cache is not None or not scheme_of(shard)):
            folders[_beside(shard, "")].append(shard)
    known: dict[str, int] = {}
    for folder, members in folders.items():
        table = _sizes_table(f"{folder}sizes.json", cache)
        known.update((shard, table[name]) for shard in members if (name := _name(shard)) in table)
        missing = [shard for shard in members if shard not in known]
        if missing and (first := _statistics(missing[0], cache)) is not None:
            known[missing[0]] = first
            counts = in_parallel(
                lambda shard: _statistics(shard, cache), missing[1:], workers=CONNECTIONS, progress=False, title=""
            )
            known.update((shard, count) for shard, count in zip(missing[1:], counts, strict=True) if count is not None)
    return known


def named_sizes(shards: Iterable[str], sizes: Mapping[str, int] | str | Path) -> dict[str, int]:
    """Samples per shard by a table given by hand: a mapping or a ``sizes.json``; names are URLs or file names.

    Raises:
        MmbaseError: the table cannot be read.
    """
    table = _checked(sizes, "data.sizes") if isinstance(sizes, Mapping) else _sizes_table(str(sizes), CacheConfig())
    if not table and not isinstance(sizes, Mapping):
        raise MmbaseError(f"there is no table of sizes {str(sizes)!r}; check the path")
    known: dict[str, int] = {}
    for shard in shards:
        # Of a command, the first word that names a shard.
        words = shard.split() if scheme_of(shard) == "pipe" else [shard]
        names = [shard, *(name for word in words for name in (word, _name(word)))]
        found = next((table[name] for name in names if name in table), None)
        if found is not None:
            known[shard] = int(found)
    return known


def _sizes_table(place: str, cache: CacheConfig | None) -> dict[str, int]:
    """File name -> samples; empty where there is no table."""
    table = _read_json(place, cache)
    if table is None:
        return {}
    return _checked(table, place)


def _checked(table: Any, place: str) -> dict[str, int]:
    if not isinstance(table, Mapping) or not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in table.values()):
        raise MmbaseError(f"{place!r} is no table of sizes: it should map shard names to numbers of samples")
    return dict(table)


def _statistics(shard: str, cache: CacheConfig | None) -> int | None:
    table = _read_json(_beside(shard, f"{_stem(shard)}_stats.json"), cache)
    successes = table.get("successes") if isinstance(table, dict) else None
    return successes if isinstance(successes, int) and 0 <= successes < 1 << 40 else None


def _read_json(place: str, cache: CacheConfig | None) -> Any:
    if scheme_of(place) and scheme_of(place) != "file":
        from mmbase.data.remote import read_small

        content = read_small(place, cache or CacheConfig())
    else:
        path = local_path(place)
        content = path.read_bytes() if path.is_file() else None
    if content is None:
        return None
    try:
        return json.loads(content)
    except ValueError as error:
        raise MmbaseError(f"{place!r} is no JSON: {error}; mend it or remove it") from error


def _name(shard: str) -> str:
    return shard.partition("?")[0].rpartition("/")[2]


def _stem(shard: str) -> str:
    name = _name(shard)
    return next((name.removesuffix(suffix) for suffix in SHARD_SUFFIXES if name.endswith(suffix)), name)


def _beside(shard: str, name: str) -> str:
    """A file beside a shard; a query, such as a signature, stays."""
    path, mark, query = shard.partition("?") if scheme_of(shard) else (shard, "", "")
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{name}{mark}{query}" if name else f"{folder}{slash}"
