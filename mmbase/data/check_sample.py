"""What ``mmbase data check`` looks at: samples from all over a dataset, as many as fit a time.

Shards are taken in a drawn order. Of a local tar the headers are read and then rows drawn from all of it; of anything
remote, compressed or piped only the beginning is had. Rounds over the shards go on until the time is up, or until
everything has been seen.

Letters: S shards.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmbase.data.cache_config import CacheConfig
from mmbase.data.compressed import decompress, is_compressed
from mmbase.data.datasheet_scan import read_row
from mmbase.data.remote import Patience, RemoteError, chunks, source_of
from mmbase.data.samples import RawSample, SampleFault
from mmbase.data.shard_list import local_path, scheme_of
from mmbase.data.tar_index import TarIndex, scan_tar
from mmbase.errors import MmbaseError

MOST_SHARDS = 512
"""Shards opened at most: more tell little more."""
_PREFIX_BYTES = 8 << 20
_ROWS_A_ROUND = 16
_OPENING_SHARE = 0.4
"""Of the time, for opening shards."""


@dataclass
class OpenShard:
    """A shard, or the beginning of one, as a local tar."""

    url: str
    path: Path
    index: TarIndex
    bytes: int | None
    """of the whole shard, where known"""
    is_partial: bool
    """only its beginning is here"""
    damage: str | None

    @property
    def rows(self) -> int:
        """Samples that can be looked at: of a cut beginning, all but the last, which may be cut itself."""
        return max(0, len(self.index) - 1) if self.is_partial else len(self.index)


@dataclass
class Failed:
    """A shard that cannot be opened."""

    url: str
    reason: str


class Sampler:
    """Draws samples; use it as a context, and read :attr:`opened` and :attr:`failed` afterwards.

    Args:
        urls: the S shards.
        seconds: for everything.
        seed: of the choice.
    """

    def __init__(self, urls: list[str], seconds: float, seed: int = 0) -> None:
        self.urls, self.seconds = urls, seconds
        self.opened: list[OpenShard] = []
        self.failed: list[Failed] = []
        self.is_complete = False
        """every sample of every shard was given out"""
        self.started = time.monotonic()
        self._rng = np.random.default_rng(seed)
        self._scratch = tempfile.TemporaryDirectory(prefix="mmbase-check-", ignore_cleanup_errors=True)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.started)

    def open(self) -> None:
        """Open shards in a drawn order, until enough are open or their share of the time is up."""
        order = [self.urls[i] for i in self._rng.permutation(len(self.urls))[:MOST_SHARDS]]
        deadline = time.monotonic() + self.seconds * _OPENING_SHARE
        is_remote = any(scheme_of(url) not in ("", "file") for url in order)
        pool = ThreadPoolExecutor(8 if is_remote else 2, "check")
        futures = [pool.submit(self._open, number, url, deadline) for number, url in enumerate(order)]
        with contextlib.suppress(OutOfTime):
            for future in as_completed(futures, timeout=max(0.1, self.seconds)):
                result = future.result()
                if isinstance(result, OpenShard):
                    self.opened.append(result)
                elif result is not None:
                    self.failed.append(result)
        pool.shutdown(wait=False, cancel_futures=True)
        for future, url in zip(futures, order):
            if not future.done() or future.cancelled():
                self.failed.append(Failed(url, f"did not open within {self.seconds:.0f} s"))
        self.opened.sort(key=lambda shard: order.index(shard.url))

    def _open(self, number: int, url: str, deadline: float) -> OpenShard | Failed | None:
        if number and time.monotonic() > deadline:
            return None  # not looked at
        try:
            return _open_shard(url, Path(self._scratch.name) / f"{number}.tar", self.seconds)
        except (MmbaseError, OSError) as error:
            return Failed(url, getattr(error, "strerror", None) or str(error))

    def __iter__(self) -> Iterator[RawSample | SampleFault]:
        """Samples, a few of each shard in turn; stops when the time is up, but never before the first round's first."""
        rows = [iter(self._rng.permutation(shard.rows).tolist()) for shard in self.opened]
        going = list(range(len(rows)))
        given = 0
        while going:
            for number in list(going):
                taken = list(itertools.islice(rows[number], _ROWS_A_ROUND))
                if not taken:
                    going.remove(number)
                for row in taken:
                    if self.left <= 0 and given >= _ROWS_A_ROUND:
                        return
                    given += 1
                    yield self._read(self.opened[number], row)
        whole = not self.failed and not any(shard.is_partial for shard in self.opened)
        self.is_complete = whole and len(self.opened) == len(self.urls)

    def _read(self, shard: OpenShard, row: int) -> RawSample | SampleFault:
        try:
            return read_row(shard.path, shard.index, row)._replace(shard=shard.url)
        except SampleFault as fault:
            return SampleFault(shard.url, fault.key, fault.offset, fault.reason)
        except OSError as error:
            return SampleFault(shard.url, f"#{row}", 0, f"the shard cannot be read: {error.strerror or error}")


def _open_shard(url: str, scratch: Path, seconds: float) -> OpenShard:
    if scheme_of(url) in ("", "file"):
        path = local_path(url)
        if not is_compressed(path):
            index = scan_tar(path)
            return OpenShard(url, path, index, index.size, False, index.damage or _unended(index))
        begin, whole = _first_decompressed(path, scratch)
    else:
        begin, whole = _first_bytes(url, scratch, seconds)
        if is_compressed(begin):
            plain = scratch.with_suffix(".plain")
            _, whole_too = _first_decompressed(begin, plain)
            begin, whole = plain, whole and whole_too
    index = scan_tar(begin)
    if not whole and len(index) <= 1 and index.damage and "cut off" not in index.damage:
        return OpenShard(url, begin, index, None, True, index.damage)
    return OpenShard(url, begin, index, None, not whole, (index.damage or _unended(index)) if whole else None)


def _unended(index: TarIndex) -> str | None:
    return (
        None if index.ended or not len(index) else "it has no end-of-archive mark: it may have been cut between samples"
    )


class _Enough(Exception):
    """The beginning is long enough."""


def _first_decompressed(path: Path, target: Path) -> tuple[Path, bool]:
    def grown(size: int) -> None:
        if size > 4 * _PREFIX_BYTES:
            raise _Enough

    try:
        why = decompress(path, target, grown)
    except _Enough:
        return target, False
    return target, why is None


def _first_bytes(url: str, target: Path, seconds: float) -> tuple[Path, bool]:
    """The beginning of a remote shard, and whether that is all of it."""
    config = CacheConfig(
        attempts=2, backoff=0.2, connect_timeout=seconds, first_byte_timeout=seconds, stall_timeout=seconds
    )
    patience = Patience(config, repr(url), seconds)
    size = 0
    with target.open("wb") as file:
        try:
            for chunk in chunks(source_of(url, config), patience):
                file.write(chunk)
                size += len(chunk)
                if size >= _PREFIX_BYTES:
                    return target, False
        except RemoteError:
            if not size:
                raise
            return target, False
    return target, True
