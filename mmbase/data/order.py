"""Which sample comes next: a pure function of seed and position, so that the state of a loader is one integer.

Every epoch permutes the shards, cuts that order into windows of a few shards, and permutes all samples of each window
together. Neither step looks at what came before, so any position is reached at once; nothing longer than the list of
shards and the samples of a few windows is ever built.

Letters: S shards, N samples of all shards, W windows of an epoch, n positions asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from mmbase.data.draws import SHARDS, WINDOW, permutation
from mmbase.errors import MmbaseError

T = TypeVar("T")
FEWEST, MOST, ENOUGH = 16, 256, 1 << 17
"""Shards of a window that is not given: at least, at most, and as many in between as hold so many samples."""

_KEPT = 3
"""Epochs, and windows, whose order is kept at hand."""


class Places(NamedTuple):
    """Where samples lie, each int64 ``[n]``."""

    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray


class Order(Protocol):
    """What a loader asks of an order; :class:`SampleOrder`, or a mixture of several."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def span(self, start: int, stop: int) -> Places:
        """Where the samples of positions ``start`` to ``stop`` (exclusive) lie."""
        ...

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards that are read at ``position`` and soon after it, the first needed first."""
        ...

    def neighbours(self, epoch: int, shard: int, picks: np.ndarray, *, wide: bool = False) -> Places:
        """For integers ``picks`` of any size: samples read together with those of ``shard``; ``wide``: any."""
        ...


def default_window(sizes: np.ndarray) -> int:
    """Shards that are shuffled together unless somebody says: 16 of the usual 10,000 samples, more of smaller ones."""
    used = np.count_nonzero(sizes)
    mean = float(np.sum(sizes)) / used if used else 1.0
    return int(min(max(FEWEST, -(-ENOUGH // mean)), MOST))


class SampleOrder:
    """The order of one dataset: every sample once per epoch, without end.

    Args:
        sizes: samples per shard, ``[S]``; empty shards are allowed.
        seed: another seed is another order.
        window: shards whose samples are shuffled together, and so open at once. Larger shuffles better and needs more
            local storage where shards are fetched. None: see :func:`default_window`.
        shuffle: False reads shard after shard.
        first_shard: number of the first shard, where these shards are a part of a longer list.

    Position counts over all epochs: the epoch is ``position // N``. Reaching a position costs sorting S numbers and the
    samples of one window.

    Raises:
        MmbaseError: no samples, a negative size, a window below 1.
    """

    def __init__(
        self,
        sizes: np.ndarray | list[int],
        seed: int = 0,
        window: int | None = None,
        *,
        shuffle: bool = True,
        first_shard: int = 0,
    ) -> None:
        self.sizes = np.asarray(sizes, np.int64).reshape(-1)
        if len(self.sizes) and self.sizes.min() < 0:
            raise MmbaseError(f"shard {int(self.sizes.argmin())} has size {self.sizes.min()}; sizes count samples")
        window = default_window(self.sizes) if window is None else window
        if window < 1:
            raise MmbaseError(f"window={window} must be at least 1 shard")
        self.samples = int(self.sizes.sum())
        if not self.samples:
            raise MmbaseError(f"the {len(self.sizes)} shards hold no sample; check data.shards and data.filters")
        self.seed, self.window, self.shuffle, self.first_shard = seed, window, shuffle, first_shard
        windows = -(-len(self.sizes) // window)
        # Windows of equal length, give or take one: a short last one would be shuffled worse than the rest.
        self._bounds = np.arange(windows + 1) * len(self.sizes) // windows
        self._epoch = Recent(self._epoch_order)
        self._window = Recent(self._window_order)

    def __len__(self) -> int:
        """N, the samples of an epoch."""
        return self.samples

    def at(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of the sample at ``position``."""
        epoch, shard, row = self.span(position, position + 1)
        return int(epoch[0]), int(shard[0]), int(row[0])

    def span(self, start: int, stop: int) -> Places:
        """Where the samples of positions ``start`` to ``stop`` (exclusive) lie.

        Raises:
            MmbaseError: a negative position.
        """
        if start < 0:
            raise MmbaseError(f"position {start} is below 0; positions count samples consumed")
        parts = [Places(*np.zeros((3, 0), np.int64))]
        while start < stop:
            epoch, place = divmod(start, self.samples)
            order, ends = self._epoch(epoch)
            window = int(np.searchsorted(ends[self._bounds[1:] - 1], place, side="right"))
            first = int(ends[self._bounds[window] - 1]) if window else 0
            last = int(ends[self._bounds[window + 1] - 1])
            count = min(stop - start, last - place)
            mixed = self._window(epoch, window)[place - first : place - first + count]
            parts.append(self._places(epoch, first + mixed, order, ends))
            start += count
        return Places(*map(np.concatenate, zip(*parts)))

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards of the window that ``position`` is in and of the next, the first needed first."""
        epoch, place = divmod(position, self.samples)
        order, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends[self._bounds[1:] - 1], place, side="right"))
        shards = order[self._bounds[window] : self._bounds[min(window + 2, len(self._bounds) - 1)]].tolist()
        if window + 2 == len(self._bounds):
            following, _ = self._epoch(epoch + 1)
            shards = list(dict.fromkeys([*shards, *following[: self._bounds[1]].tolist()]))
        return [shard + self.first_shard for shard in shards if self.sizes[shard]]

    def neighbours(self, epoch: int, shard: int, picks: np.ndarray, *, wide: bool = False) -> Places:
        """For integers ``picks`` of any size: samples of the window that holds ``shard`` in that epoch.

        With ``wide``, of all shards.
        """
        order, ends = self._epoch(epoch)
        if wide:
            return self._places(epoch, np.asarray(picks) % self.samples, order, ends)
        rank = int(np.flatnonzero(order == shard - self.first_shard)[0])
        window = int(np.searchsorted(self._bounds, rank, side="right")) - 1
        first = int(ends[self._bounds[window] - 1]) if window else 0
        last = int(ends[self._bounds[window + 1] - 1])
        return self._places(epoch, first + np.asarray(picks) % (last - first), order, ends)

    def _places(self, epoch: int, place: np.ndarray, order: np.ndarray, ends: np.ndarray) -> Places:
        """Where the samples lie that stand at ``place`` before windows are shuffled."""
        rank = np.searchsorted(ends, place, side="right")
        shard = order[rank]
        row = place - (ends[rank] - self.sizes[shard])
        return Places(np.full(len(place), epoch, np.int64), shard + self.first_shard, row)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order and, of each, where its samples end; int64 ``[S]`` both."""
        shards = len(self.sizes)
        order = permutation(shards, self.seed, SHARDS, epoch) if self.shuffle else np.arange(shards)
        return order, np.cumsum(self.sizes[order])

    def _window_order(self, epoch: int, window: int) -> np.ndarray:
        """The order of a window's samples, counted from its first."""
        _, ends = self._epoch(epoch)
        low, high = self._bounds[window], self._bounds[window + 1]
        count = int(ends[high - 1]) - (int(ends[low - 1]) if low else 0)
        return permutation(count, self.seed, WINDOW, epoch, window) if self.shuffle else np.arange(count)


class Recent(Generic[T]):
    """Results of a pure function, the last few kept; copies made for other processes start empty."""

    def __init__(self, function: Callable[..., T]) -> None:
        self.function = function
        self.kept: OrderedDict[tuple[int, ...], T] = OrderedDict()

    def __call__(self, *key: int) -> T:
        """The result for ``key``."""
        if key not in self.kept:
            self.kept[key] = self.function(*key)
            if len(self.kept) > _KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function,)
