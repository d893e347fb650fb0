"""In which order rows are packed, and what a row's JSON member says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmbase.data.pack_pictures import Prepared
from mmbase.data.pack_sources import Row, Source


def order(source: Source, seed: int, shuffle: bool, start: int = 0) -> Iterator[int]:
    """Row numbers from the ``start``-th on: pieces shuffled, then the rows of every ``window`` pieces among themselves.

    A source in one piece is shuffled as a whole. Depends on ``seed`` and the sizes of the pieces alone.
    """
    sizes = np.asarray(source.sizes, np.int64)
    if not shuffle:
        yield from range(start, int(sizes.sum()))
        return
    begins = np.concatenate([[0], sizes.cumsum()])
    pieces = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(sizes))
    done = 0
    for number in range(0, len(pieces), source.window):
        chosen = pieces[number : number + source.window]
        count = int(sizes[chosen].sum())
        if done + count > start:
            rows = np.concatenate([np.arange(begins[p], begins[p] + sizes[p]) for p in chosen])
            rows = np.random.Generator(np.random.Philox(key=[seed, number + 1])).permutation(rows)[
                max(0, start - done) :
            ]
            for block in np.array_split(rows, max(1, len(rows) // 65_536)):
                yield from block.tolist()
        done += count


def described(row: Row, picture: Prepared, captions: list[str]) -> dict[str, Any]:
    """The JSON member of a pair: its caption or captions, sizes, origin, and the row's further columns."""
    fields: dict[str, Any] = {"caption": captions[0]}
    if len(captions) > 1:
        fields["captions"] = captions
    for name, value in row.fields.items():
        if name not in fields and not isinstance(value, bytes):
            fields[name] = _plain(value)
    return fields | {
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "origin": row.origin,
    }


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; what JSON does not know as text, bytes and numbers that are not finite as null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, bytes | bytearray | memoryview) else str(value)
