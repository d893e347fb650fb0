"""Memory shared by a loader and its workers: batches being filled, and what each worker is doing.

Pictures lie channels last, as the resize leaves them and as convolutions on a device like them. The memory is an
anonymous file mapped by all processes, so that no pixel is copied between processes, nothing is left behind
when one is killed, and the size of ``/dev/shm`` does not matter.

Letters: B batch, H height, W width, T tokens.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import tempfile
import weakref
from typing import NamedTuple

import numpy as np

from mmbase.data.prepare import Report, Slab

_ALIGNMENT = 4096


class ArenaShape(NamedTuple):
    """What an arena holds."""

    workers: int
    slots: int
    """batches"""
    batch: int
    height: int
    width: int
    tokens: int
    alpha: bool
    """whether batches have a plane for transparency"""


class Arena:
    """The memory, mapped. Made by the loader; workers map the same file by its descriptor.

    ``status`` is int64 ``[workers, 4]``: stage, shard, row and a count that grows with every report.
    """

    def __init__(self, shape: ArenaShape, descriptor: int | None = None) -> None:
        self.shape = shape
        pixels = shape.batch * shape.height * shape.width
        self._parts = [3 * pixels, pixels if shape.alpha else 0, shape.batch * shape.tokens * 8]
        self._slot = sum(map(_aligned, self._parts))
        head = _aligned(shape.workers * 4 * 8)
        size = head + shape.slots * self._slot
        self.descriptor = anonymous_file(size) if descriptor is None else descriptor
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)
        self._memory = mmap.mmap(self.descriptor, size)
        self.status = np.frombuffer(self._memory, np.int64, shape.workers * 4).reshape(-1, 4)
        self._starts = [head + slot * self._slot for slot in range(shape.slots)]

    def slab(self, slot: int) -> Slab:
        """The rows of a batch."""
        shape = self.shape
        views = []
        start = self._starts[slot]
        for size in self._parts:
            views.append(np.frombuffer(self._memory, np.uint8, size, start))
            start += _aligned(size)
        plane = shape.batch, shape.height, shape.width
        return Slab(
            views[0].reshape(*plane, 3).transpose(0, 3, 1, 2),
            views[1].reshape(plane) if shape.alpha else None,
            views[2].view(np.int64).reshape(shape.batch, shape.tokens),
        )

    def report(self, worker: int) -> Report:
        """What worker number ``worker`` calls before each step."""
        pack, offset, count = struct.Struct("=4q").pack_into, worker * 4 * 8, itertools.count(1)
        return lambda stage, shard, row: pack(self._memory, offset, stage, shard, row, next(count))

    def close(self) -> None:
        """Give up the file; the memory goes when the last batch in it does."""
        self._finalizer()


def part(slab: Slab, first: int, last: int) -> Slab:
    """Rows ``first`` to ``last`` of a slab."""
    alpha = None if slab.alpha is None else slab.alpha[first:last]
    return Slab(slab.image[first:last], alpha, slab.text[first:last])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def anonymous_file(size: int) -> int:
    """Descriptor of a file of ``size`` bytes that has no name and is gone with its last user."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("mmbase-batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
