"""Which shards are read and in which order: opened, laid down, described."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmbase.data.cache_config import CacheConfig
from mmbase.data.filters import Selection, explain_removed
from mmbase.data.mixture import MixtureOrder, Weight
from mmbase.data.order import Order, SampleOrder
from mmbase.data.shards import NoSizes, Shards, expand_shards
from mmbase.data.streamed import StreamedPreparation
from mmbase.errors import MmbaseError

_MOST_OPEN = 512
"""Shards held open at most: a process may usually open 1,024 files."""


@dataclass
class Sources:
    """Which shards are read, in which order."""

    urls: list[str]
    shards: Shards | None
    """None: sizes cannot be had, so samples are streamed"""
    order: Order | None
    described: list[str]
    cache: CacheConfig | None
    fingerprint: str
    """equal where the same positions name the same samples"""


def open_sources(
    specs: Sequence[str | Sequence[str]],
    weights: Sequence[Weight] | None,
    *,
    seed: int,
    window: int | None,
    shuffle: bool,
    cache: CacheConfig | None,
    sizes: str | Path | Mapping[str, int] | None,
    timeout: float,
    selection: Selection | None,
) -> Sources:
    """Open the shards and lay down the order.

    Args:
        specs: of shards, one per source.
        weights: of the sources, constant or points (position, weight); None: there is one source.
        seed: of the order.
        window: shards shuffled together; None: by their sizes.
        shuffle: False reads them as they are stored.
        cache: for shards that are no plain local tars.
        sizes: samples per shard, or where to find that.
        timeout: seconds a read waits for its shard.
        selection: which samples take part.

    Raises:
        MmbaseError: shards that are missing or unreadable, or of which nothing is left.
    """
    parts = [expand_shards(spec) for spec in specs]
    urls = [url for part in parts for url in part]
    if weights is not None and not shuffle:
        raise MmbaseError("weights mix sources for training; with train=False read them one by one")
    try:
        shards = Shards.open(urls, cache=cache, progress=True, timeout=timeout, select=selection, sizes=sizes)
    except NoSizes as reason:
        if weights is not None or not shuffle or selection is not None:
            raise MmbaseError(
                f"{reason}; a mixture, filters and train=False need them: keep the shards in files or give sizes.json"
            ) from reason
        return Sources(
            urls, None, None, [f"streamed from {len(urls)} shards: {reason}", StreamedPreparation.lost], cache, ""
        )
    described = list(shards.describe())
    if shards.removed and not shards.sizes.any():
        explain_removed(shards.removed, 0)  # says which filter left nothing
    if weights is None:
        orders = [SampleOrder(shards.sizes, seed, window, shuffle=shuffle)]
        order: Order = orders[0]
    else:
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        orders = [
            SampleOrder(shards.sizes[low:high], seed + number, window, first_shard=low)
            for number, (low, high) in enumerate(itertools.pairwise(ends))
        ]
        order = MixtureOrder(orders, weights, seed)
        described.append(
            "mixture: " + ", ".join(f"{len(o):,} samples weighted {w}" for o, w in zip(orders, weights, strict=True))
        )
    together = sum(min(one.window, len(one.sizes)) for one in orders)
    shards.open_at_once = min(together + 16, _MOST_OPEN)
    described.append(
        f"order: exact, {len(order):,} samples an epoch, {together} of {len(urls)} shards shuffled together"
        if shuffle
        else f"order: as stored, {len(order):,} samples"
    )
    names = [url.rpartition("/")[2] for url in urls]
    state = json.dumps([names, shards.sizes.tolist(), seed, [one.window for one in orders], weights], default=float)
    return Sources(urls, shards, order, described, cache, hashlib.blake2b(state.encode(), digest_size=16).hexdigest())
