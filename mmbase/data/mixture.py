"""Several datasets as one sequence, by weights that may change over training; again a pure function of position.

Positions are cut into blocks. A block holds a fixed number of samples of each source, in an order drawn for the block;
how many, follows from the weights at its place. Which sample of a source comes next depends on how many of that source
came before, a running sum over blocks: 15,000 of them for a billion samples. Nothing else is remembered.

Letters: K sources, n positions asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Real

import numpy as np

from mmbase.data.draws import SOURCES, mix64, permutation
from mmbase.data.order import Places, Recent, SampleOrder
from mmbase.errors import MmbaseError

BLOCK = 1 << 16
"""Positions of a block: the shares of the sources hold within one of this many samples."""

_AHEAD = 256
"""Blocks whose counts are computed at a time."""

Weight = float | Sequence[tuple[float, float]]
"""A constant share, or points (position, share) between which it goes in straight lines."""


class MixtureOrder:
    """The order of several datasets mixed by weights.

    Args:
        orders: one of each source, in the order of the sources' shards in the common list.
        weights: of each source, relative to the others: a number, or points ``(position, weight)`` between which the
            weight goes in a straight line; before the first and after the last point it stays.
        seed: of the order of sources.

    A source is gone through epoch by epoch of its own, each at its own pace; ``len`` is the samples of all sources.

    Raises:
        MmbaseError: numbers of orders and weights that differ, a negative weight, points out of order, or a place where
            all weights are 0.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[Weight], seed: int = 0) -> None:
        if len(orders) != len(weights) or not orders:
            raise MmbaseError(f"a mixture of {len(orders)} sources needs as many weights, not {len(weights)}")
        self.orders, self.seed = list(orders), seed
        self.points = [_points(weight) for weight in weights]
        corners = sorted({place for points in self.points for place, _ in points})
        totals = self.shares(np.array(corners), normalised=False).sum(0)
        if totals.min() <= 0:
            raise MmbaseError(
                f"all weights of the mixture are 0 at position {corners[int(totals.argmin())]:.0f}; give one source a "
                "positive weight everywhere"
            )
        self._block = Recent(self._block_sources)
        self._before = np.zeros((1, len(orders)), np.int64)  # samples of each source before each block

    def __len__(self) -> int:
        """Samples of all sources."""
        return sum(len(order) for order in self.orders)

    def shares(self, position: np.ndarray, normalised: bool = True) -> np.ndarray:
        """Float64 ``[K, n]``: each source's share at ``position``, or its weight if not ``normalised``."""
        weights = np.array(
            [np.interp(position, [p for p, _ in points], [w for _, w in points]) for points in self.points]
        )
        return weights / weights.sum(0) if normalised else weights

    def span(self, start: int, stop: int) -> Places:
        """Where the samples of positions ``start`` to ``stop`` (exclusive) lie; epochs are those of their source."""
        if start < 0:
            raise MmbaseError(f"position {start} is below 0; positions count samples consumed")
        parts = [Places(*np.zeros((3, 0), np.int64))]
        while start < stop:
            block, place = divmod(start, BLOCK)
            count = min(stop - start, BLOCK - place)
            parts.append(self._within(block, place, count))
            start += count
        return Places(*map(np.concatenate, zip(*parts)))

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards of the windows that each source is in and of its next, sources with positive weight only."""
        before = self._counts(position // BLOCK + 1)[position // BLOCK]
        share = self.shares(np.array([position, position + BLOCK])).max(1)
        lists = [o.upcoming_shards(int(n)) for o, n, s in zip(self.orders, before, share) if s > 0]
        return [shard for number in range(max(map(len, lists))) for row in lists for shard in row[number : number + 1]]

    def neighbours(self, epoch: int, shard: int, picks: np.ndarray, *, wide: bool = False) -> Places:
        """For integers ``picks`` of any size: samples of the window of ``shard``; ``wide``: of its whole source."""
        order = next(o for o in reversed(self.orders) if o.first_shard <= shard)
        return order.neighbours(epoch, shard, picks, wide=wide)

    def _within(self, block: int, place: int, count: int) -> Places:
        """The samples at ``place`` to ``place + count`` of a block."""
        before, source = self._counts(block)[block], self._block(block)
        chosen = source[place : place + count]
        result = Places(*np.zeros((3, count), np.int64))
        for number, order in enumerate(self.orders):
            where = np.flatnonzero(chosen == number)
            if len(where):
                first = int(before[number]) + int((source[:place] == number).sum())
                for column, values in zip(result, order.span(first, first + len(where))):
                    column[where] = values
        return result

    def _block_sources(self, block: int) -> np.ndarray:
        """Int64 ``[BLOCK]``: the source of each position of a block."""
        before, after = self._counts(block + 1)[block : block + 2]
        return np.repeat(np.arange(len(self.orders)), after - before)[permutation(BLOCK, self.seed, SOURCES, block)]

    def _counts(self, block: int) -> np.ndarray:
        """``_before``, long enough to tell what comes before ``block``."""
        while len(self._before) <= block:
            first = len(self._before) - 1
            numbers = np.arange(first, max(first + _AHEAD, block))
            edges = np.cumsum(self.shares((numbers + 0.5) * BLOCK), axis=0)
            # Edges are rounded with a draw per block, so that the smallest share gets its due over many blocks.
            draw = mix64(np.uint64(self.seed) + mix64(numbers.astype(np.uint64))).astype(np.float64) / 2.0**64
            edges = np.minimum(np.floor(edges * BLOCK + draw), BLOCK).astype(np.int64)
            edges[-1] = BLOCK
            counts = np.diff(edges, axis=0, prepend=0).T
            self._before = np.concatenate([self._before, self._before[-1] + np.cumsum(counts, axis=0)])
        return self._before


def _points(weight: Weight) -> list[tuple[float, float]]:
    points = (
        [(0.0, float(weight))] if isinstance(weight, int | float | Real) else [(float(p), float(w)) for p, w in weight]
    )
    places = [place for place, _ in points]
    if not points or places != sorted(set(places)):
        raise MmbaseError(f"a weight that changes needs points in rising order of position, not {list(points)}")
    if not all(map(math.isfinite, itertools.chain(*points))):
        raise MmbaseError(f"a weight of a mixture is no finite number: {weight}; weights are shares of the samples")
    if min(w for _, w in points) < 0:
        raise MmbaseError(f"a weight of a mixture is negative: {min(w for _, w in points)}; weights are 0 or more")
    return points
