"""One tar, open: a sample by its row, in one read where its members lie together."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from mmbase.data.samples import RawSample, SampleFault
from mmbase.data.tar_index import BLOCK, TarIndex

GAP = 8 * BLOCK
"""Bytes between two members up to which they are read in one go: headers, a long name, padding."""


class OpenTar:
    """A descriptor with its index. Not safe to close while another thread reads: the owner counts.

    Args:
        shard: as the shard list names it; goes into samples and faults.
        descriptor: closed by ``close``.
        index: of this very file.
        rows: the selected ones, int64; None for all.
        member_bytes: larger members are refused unread.
        close: what ends the use of the descriptor.
    """

    def __init__(
        self,
        shard: str,
        descriptor: int,
        index: TarIndex,
        rows: np.ndarray | None,
        member_bytes: int,
        close: Callable[[int], None] = os.close,
    ) -> None:
        self.shard, self.descriptor, self.index, self.rows = shard, descriptor, index, rows
        self.member_bytes, self.users, self._close = member_bytes, 0, close
        # A memoryview gives a Python integer in a third of the time that an array takes for its scalar.
        self._first, self._offset, self._length = (a.data for a in (index.first, index.offset, index.length))
        self._extension = [index.extensions[number] for number in index.extension.tolist()]

    def __len__(self) -> int:
        return len(self.index) if self.rows is None else len(self.rows)

    def close(self) -> None:
        """Let go of the file."""
        self._close(self.descriptor)

    def sample(self, row: int, extensions: frozenset[str] | None = None) -> RawSample:
        """Read a sample.

        Args:
            row: among the selected ones.
            extensions: members to read; None for all.

        Raises:
            SampleFault: there is no such row, the sample is refused, or the file no longer is what was indexed.
        """
        index = self.index
        if not 0 <= row < len(self):
            left = f"; {index.damage}" if index.damage else ""
            raise SampleFault(self.shard, f"#{row}", index.size, f"the shard holds {len(self)} samples{left}")
        if self.rows is not None:
            row = int(self.rows[row])
        if row in index.refusals:
            where, reason = index.refusals[row]
            raise SampleFault(self.shard, index.key(row), where, reason)
        first, end = self._first[row], self._first[row + 1]
        members = [(self._extension[m], self._offset[m], self._length[m]) for m in range(first, end)]
        begin, key, wanted = members[0][1], index.key(row), 0
        if extensions is not None:
            members = [member for member in members if member[0] in extensions]
        for extension, offset, size in members:
            wanted += size
            if size > self.member_bytes:
                reason = f"its .{extension} has {size} bytes, over data.cache.member_bytes={self.member_bytes}"
                raise SampleFault(self.shard, key, offset, reason)
        if not members:
            return RawSample(key, {}, self.shard, begin)
        start, stop = members[0][1], members[-1][1] + members[-1][2]
        if stop - start - wanted <= GAP * len(members):
            block = self._read(key, start, stop - start)
            found = {name: block[offset - start : offset - start + size] for name, offset, size in members}
        else:
            found = {name: self._read(key, offset, size) for name, offset, size in members}
        return RawSample(key, found, self.shard, begin)

    def _read(self, key: str, offset: int, size: int) -> bytes:
        try:
            content = os.pread(self.descriptor, size, offset)
            while len(content) < size and (
                more := os.pread(self.descriptor, size - len(content), offset + len(content))
            ):
                content += more
        except OSError as error:
            raise SampleFault(self.shard, key, offset, f"cannot be read: {error.strerror or error}") from None
        if len(content) < size:
            ends = os.fstat(self.descriptor).st_size
            reason = f"it should end at byte {offset + size}, the shard ends at {ends}: cut or replaced after indexing"
            raise SampleFault(self.shard, key, offset, reason)
        return content
