"""The loader: batches in an exact order, prepared here or by workers. Its whole state is the samples consumed.

Global batch k holds the positions ``start + k G`` to ``start + (k + 1) G`` of the order, G being the batch sizes of all
ranks; rank r takes the r-th part. Workers take pieces of the rank's batch as they come free and write them in place, so
neither the number of ranks, nor of workers, nor where a run was interrupted can change what is in it.

Letters: B batch of this rank, G batch of all ranks, H height, W width, T tokens.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import TracebackType
from typing import Any

import numpy as np
import torch

from mmbase.data.arena import Arena, ArenaShape, part
from mmbase.data.collate import Batch
from mmbase.data.order import Order
from mmbase.data.prepare import Fault, Rows, Slab
from mmbase.data.quarantine import Quarantine
from mmbase.data.shards import Shards
from mmbase.data.timing import StageTimes
from mmbase.data.worker import Piece, Prepares
from mmbase.data.workers import WorkerPool
from mmbase.errors import MmbaseError

_LENT = 2
"""Batches that may lie in shared memory while they are used: one in work, and the last one, not yet let go."""

_LARGEST_PIECE, _PIECES_PER_WORKER = 64, 4


@dataclass
class _Filling:
    """A batch on its way."""

    slot: int
    missing: int
    """pieces not yet back"""
    pieces: dict[int, Rows] = field(default_factory=dict)
    """by their first row"""


class Loader:
    """An iterator of batches; :func:`mmbase.data.loader` makes one.

    Args:
        preparation: fills rows.
        shards: where samples are read; for names and fetching ahead.
        order: which sample stands at which position; None where samples are streamed without an order.
        shape: of batches: height, width, tokens, whether transparency is kept.
        batch_size: of this rank.
        rank: of this process, from 0.
        world_size: processes.
        start: samples consumed before, by all ranks together.
        stop: position at which the loader ends; None: never.
        workers: processes that prepare; 0: this one.
        prefetch: batches prepared ahead by workers.
        timeout: seconds without any progress after which a worker counts as stuck.
        quarantine: account of bad samples.
        described: lines of :meth:`describe`.
        fingerprint: equal for loaders whose positions name the same samples.

    Attributes:
        times: seconds per stage.
    """

    def __init__(
        self,
        preparation: Prepares,
        *,
        shards: Shards | None,
        urls: Sequence[str],
        order: Order | None,
        shape: tuple[int, int, int, bool],
        batch_size: int,
        quarantine: Quarantine,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        timeout: float = 300.0,
        described: Sequence[str] = (),
        fingerprint: str = "",
    ) -> None:
        _check(batch_size=batch_size, rank=rank, world_size=world_size, start=start, workers=workers, prefetch=prefetch)
        self.preparation, self.shards, self.order = preparation, shards, order
        self.batch_size, self.rank, self.world_size, self.workers = batch_size, rank, world_size, workers
        self.stop, self.timeout, self.quarantine, self.times = stop, timeout, quarantine, StageTimes()
        self._described, self.fingerprint = list(described), fingerprint
        slots = (prefetch if workers else 1) + _LENT
        self._shape = ArenaShape(workers, slots, batch_size, *shape)
        self._position, self._consumed = start, start
        self._pool: WorkerPool | None = None
        self._free: deque[int] = deque()
        self._lent: set[int] = set()
        self._filling: dict[int, _Filling] = {}
        self._waiting: deque[Piece] = deque()
        self._started = self._delivered = self._turn = 0
        self._window: list[int] = []
        self._closed = False
        self._arena = Arena(self._shape)
        self._let_go = weakref.finalize(self, _let_go, os.getpid(), shards)
        self._free.extend(range(slots))
        if workers:
            self._pool = WorkerPool(preparation, self._arena, urls=urls, timeout=timeout)
        else:
            preparation.open(0, 1)

    # ---------------------------------------------------------------------------------------------- what one sees

    @property
    def position(self) -> int:
        """Samples consumed by all ranks: the whole state. Setting it continues from there."""
        return self._consumed

    @position.setter
    def position(self, value: int) -> None:
        if value < 0:
            raise MmbaseError(f"position {value} is below 0; it counts samples consumed")
        if value == self._consumed:
            return
        self._waiting.clear()
        while self._pool and self._pool.outstanding:
            self._pool.take()
        for filling in self._filling.values():
            self._free.append(filling.slot)
        self._filling.clear()
        self._position = self._consumed = value
        self._started = self._delivered

    @property
    def counts(self) -> dict[str, Any]:
        """``good``, ``bad``, and bad samples by reason."""
        return {"good": self.quarantine.good, "bad": self.quarantine.bad, "reasons": dict(self.quarantine.reasons)}

    @property
    def samples(self) -> int | None:
        """Samples of an epoch; None where nobody knows."""
        return None if self.order is None else len(self.order)

    def describe(self) -> list[str]:
        """What was chosen, one line each."""
        where = f"by {self.workers} worker process{'es' * (self.workers > 1)}" if self.workers else "in this process"
        return [*self._described, f"prepared {where}, {self._shape.height} x {self._shape.width} px"]

    def batches(self) -> Iterator[Batch]:
        """The loader itself."""
        return self

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch: see :data:`mmbase.data.collate.Batch`.

        Raises:
            MmbaseError: a worker died or is stuck, too many samples are bad, or whatever else keeps data away.
        """
        if self._closed:
            raise MmbaseError("this loader is closed; make another")
        before = time.perf_counter()
        try:
            batch = self._next_from_workers() if self._pool else self._next_here()
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise
        self.times.taken(time.perf_counter() - before)
        return batch

    def close(self) -> None:
        """End the workers, close the shards, give up what is being fetched. Batches handed out stay valid."""
        if self._closed:
            return
        self._closed = True
        if self._pool:
            self._pool.close()
        self._arena.close()
        self._let_go()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- how it is made

    def _share(self, batch: int) -> tuple[int, int]:
        """Positions of this rank's rows in the ``batch``-th batch counted from the last known position."""
        whole = self.batch_size * self.world_size
        first = self._position + (batch - self._delivered) * whole + self.rank * self.batch_size
        last = first + self.batch_size
        return (first, last) if self.stop is None else (min(first, self.stop), min(last, self.stop))

    def _next_here(self) -> Batch:
        first, last = self._share(self._delivered)
        if first == last:
            raise StopIteration
        self._fetch_ahead(first)
        slot = self._free.popleft()
        slab = part(self._arena.slab(slot), 0, last - first)
        rows = self.preparation.rows(first, last, slab, lambda *_: None)
        return self._deliver(self._taken(slot), {0: rows}, last - first)

    def _next_from_workers(self) -> Batch:
        assert self._pool
        first, last = self._share(self._delivered)
        if first == last:
            raise StopIteration
        self._plan()
        self._hand_out()
        filling = self._filling[self._delivered]
        while filling.missing:
            for piece, rows in self._pool.take():
                target = self._filling[piece.batch]
                target.pieces[piece.first] = rows
                target.missing -= 1
            self._hand_out()
        del self._filling[self._delivered]
        return self._deliver(self._taken(filling.slot), filling.pieces, last - first)

    def _plan(self) -> None:
        """Start as many batches as there is room for."""
        while self._free:
            first, last = self._share(self._started)
            if first == last:
                return
            self._fetch_ahead(first)
            slot = self._free.popleft()
            size = _piece_size(last - first, self.workers)
            pieces = [
                Piece(self._started, slot, row, first + row, min(size, last - first - row))
                for row in range(0, last - first, size)
            ]
            self._filling[self._started] = _Filling(slot, len(pieces))
            self._waiting.extend(pieces)
            self._started += 1

    def _hand_out(self) -> None:
        """Queue all pieces there is room for, so that workers go on while nobody asks for a batch."""
        assert self._pool
        while self._waiting and self._pool.give(self._waiting[0], self._turn):
            self._waiting.popleft()
            self._turn += 1

    def _taken(self, slot: int) -> Slab:
        """A full batch as it lies in shared memory, free again when the last tensor of it is gone; or a copy.

        The copy is made where the user holds on to batches, which are the user's to keep.
        """
        if len(self._lent) >= _LENT:
            lying = self._arena.slab(slot)
            alpha = None if lying.alpha is None else lying.alpha.copy()
            copy = Slab(lying.image.copy("K"), alpha, lying.text.copy())
            self._free.append(slot)
            return copy
        self._lent.add(slot)
        slab = self._arena.slab(slot)
        holders = [array for array in slab if array is not None]
        left = [len(holders)]

        def let_go() -> None:
            left[0] -= 1
            if not left[0]:
                self._lent.discard(slot)
                self._free.append(slot)

        for array in holders:
            finalizer = weakref.finalize(array, let_go)
            finalizer.atexit = False  # type: ignore[attr-defined]
        return slab

    def _deliver(self, slab: Slab, pieces: dict[int, Rows], rows: int) -> Batch:
        """The batch as tensors, accounted for."""
        ordered = [pieces[first] for first in sorted(pieces)]
        faults: list[Fault] = [fault for piece in ordered for fault in piece.faults]
        for piece in ordered:
            self.times.add(piece.seconds)
        kept = sum(len(piece.keys) for piece in ordered)
        chosen: slice | np.ndarray = slice(0, rows)
        if kept < rows:  # evaluation leaves bad samples out
            chosen = np.concatenate([first + np.arange(len(pieces[first].keys)) for first in sorted(pieces)])
        image = torch.from_numpy(slab.image)[chosen]
        if any(piece.transparent for piece in ordered):
            assert slab.alpha is not None
            image = torch.cat([image, torch.from_numpy(slab.alpha)[chosen][:, None]], 1)
        batch: Batch = {
            "image": image,
            "text": torch.from_numpy(slab.text)[chosen],
            "caption_id": torch.from_numpy(np.concatenate([piece.caption_id for piece in ordered])),
            "may_flip": torch.from_numpy(np.concatenate([piece.may_flip for piece in ordered])),
            "draw": torch.from_numpy(np.concatenate([piece.draw for piece in ordered])),
            "key": [key for piece in ordered for key in piece.keys],
        }
        self.quarantine.add(kept, faults)
        whole = self.batch_size * self.world_size
        self._position = self._consumed = self._position + whole
        if self.stop is not None:
            self._consumed = min(self._consumed, self.stop)
        self._delivered += 1
        return batch

    def _fetch_ahead(self, position: int) -> None:
        if self.order is None or self.shards is None:
            return
        upcoming = self.order.upcoming_shards(position)
        if upcoming != self._window:
            self._window = upcoming
            self.shards.prefetch(upcoming)


def _let_go(owner: int, shards: Shards | None) -> None:
    if shards is not None and os.getpid() == owner:  # in a fork, files and locks are still the parent's
        shards.close()


def _piece_size(rows: int, workers: int) -> int:
    """Rows given to a worker at a time: several pieces each, so that all end a batch together."""
    return max(1, min(_LARGEST_PIECE, -(-rows // (_PIECES_PER_WORKER * workers))))


def _check(**given: int) -> None:
    lowest = {"batch_size": 1, "world_size": 1, "prefetch": 1}
    for name, value in given.items():
        if not isinstance(value, Integral):
            raise MmbaseError(f"{name}={value!r} is no whole number")
        if value < lowest.get(name, 0):
            raise MmbaseError(f"{name}={value} must be at least {lowest.get(name, 0)}")
    if given["rank"] >= given["world_size"]:
        raise MmbaseError(f"rank={given['rank']} of world_size={given['world_size']}: ranks count from 0")
