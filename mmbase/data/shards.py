"""Any sample of any shards by number: every shard becomes a plain local tar with an index of its members.

Letters: S shards, R samples (rows) of a shard.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmbase.data.cache_config import CacheConfig
from mmbase.data.compressed import is_compressed
from mmbase.data.counting import NoSizes, count_samples
from mmbase.data.filters import Selection
from mmbase.data.holdout import Holdout, stable_id
from mmbase.data.index_store import load_index
from mmbase.data.open_tar import OpenTar
from mmbase.data.prefetching import Prefetcher
from mmbase.data.remote import RemoteError
from mmbase.data.samples import IMAGE_EXTENSIONS, RawSample, SampleFault, fields_of, image_of
from mmbase.data.selected import selected_rows
from mmbase.data.shard_cache import CacheFull, ShardCache, release
from mmbase.data.shard_list import EMBEDDED, expand_shards, scheme_of
from mmbase.data.sizes import declared_sizes
from mmbase.errors import MmbaseError

__all__ = [
    "EMBEDDED",
    "IMAGE_EXTENSIONS",
    "CacheConfig",
    "Holdout",
    "NoSizes",
    "RawSample",
    "Sample",
    "SampleFault",
    "Shards",
    "declared_sizes",
    "expand_shards",
    "fields_of",
    "image_of",
    "read_samples",
    "stable_id",
]

logger = logging.getLogger(__name__)

OPEN_AT_ONCE = 64
"""Shards that a process holds open unless told; the least recently used one is closed for another."""
SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that are the process's and not the shard's."""
REPLACED = 3
"""Times a shard may be replaced under the one who opens it."""
TIMEOUT = 600.0
"""Seconds for which reading a sample waits for its shard."""


class Shards:
    """Samples by (shard, row). Pickles to a list and its sizes; each process opens files on its own, when it reads.

    Attributes:
        urls: the S shards, as :func:`expand_shards` lists them.
        sizes: int64 [S], samples of each, after the selection. Declared sizes are believed until a shard is opened:
            rows that it then lacks are faults.
        removed: reason -> samples that the selection left out.
        origins: where sizes are from -> number of shards.
        notes: what was found wrong with whole shards, one line each.
        timeout: seconds for which a read waits for its shard at most.
        open_at_once: shards that a process holds open; a window of the order should fit.
    """

    def __init__(
        self,
        urls: list[str],
        sizes: np.ndarray,
        *,
        cache: CacheConfig | None = None,
        timeout: float = TIMEOUT,
        select: Selection | None = None,
        removed: Mapping[str, int] | None = None,
        origins: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.urls, self.sizes, self.timeout = urls, sizes, timeout
        self.removed, self.notes = dict(removed or {}), list(notes)
        self.config, self.select = cache or CacheConfig(), select
        self.origins = dict(origins or {})
        self.open_at_once = OPEN_AT_ONCE
        self._begin()

    @classmethod
    def open(
        cls,
        spec: str | Sequence[str],
        *,
        cache: CacheConfig | None = None,
        progress: bool = False,
        timeout: float = TIMEOUT,
        select: Selection | None = None,
        sizes: Mapping[str, int] | str | Path | None = None,
    ) -> Shards:
        """Shards with the number of samples in each.

        Numbers come from ``sizes``, ``sizes.json`` or ``_stats.json`` beside the shards, in this order, else from an
        index, which is made where there is none; a selection always needs the index.

        Args:
            spec: as :func:`expand_shards` takes.
            cache: for shards that are no plain local tars.
            progress: show a bar on stderr while indices are made.
            timeout: seconds for which a read waits for its shard.
            select: which samples take part; decided here, once.
            sizes: a table of sizes, or the path or URL of one, for shards that none lies beside.

        Raises:
            MmbaseError: shards that are not there, cannot be read or hold nothing.
            NoSizes: numbers would need more read than the cache holds, or commands run.
        """
        shards = cls(expand_shards(spec), np.zeros(0, np.int64), cache=cache, timeout=timeout, select=select)
        try:
            count_samples(shards, sizes, progress)
        finally:
            shards.release()
        return shards

    def __len__(self) -> int:
        return len(self.urls)

    def read(self, shard: int, row: int) -> RawSample:
        """Read one sample.

        Raises:
            SampleFault: it cannot be had; whatever waits has an end that says what was waited for.
            MmbaseError: no sample can be had as things stand: a cache too small, a disk that is full.
        """
        try:
            tar = self.opened(shard)
        except RemoteError as error:
            raise SampleFault(self.urls[shard], f"#{row}", 0, str(error)) from None
        except OSError as error:
            if error.errno in SCARCE:
                raise MmbaseError(
                    f"cannot open the shard {self.urls[shard]!r}: {error.strerror}; raise the limit (ulimit -n) or "
                    "lower data.window"
                ) from error
            reason = f"the shard cannot be read: {error.strerror or error}"
            raise SampleFault(self.urls[shard], f"#{row}", 0, reason) from None
        try:
            return tar.sample(row)
        finally:
            self.done(tar)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these in the background, the first needed first; what was asked for before is forgotten."""
        urls = [self.urls[shard] for shard in shards if self.needs_cache(self.urls[shard])]
        if urls:
            self._prefetcher.want(urls)

    def opened(self, shard: int) -> OpenTar:
        """The open tar of a shard; it stays open until the caller says :meth:`done`.

        Raises:
            OSError: a local file that cannot be opened.
            MmbaseError: a shard that cannot be fetched.
        """
        if self._process != os.getpid():  # forked: what the parent has open stays the parent's
            for tar in self._open.values():
                os.close(tar.descriptor)
            self._begin()
        with self._lock:
            tar = self._open.get(shard)
            if tar is not None:
                self._open.move_to_end(shard)
                tar.users += 1
                return tar
        try:
            new = self._open_tar(self.urls[shard])  # may take long: other threads read on meanwhile
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            self.release()
            new = self._open_tar(self.urls[shard])
        with self._lock:
            tar = self._open.setdefault(shard, new)
            tar.users += 1
            if tar is not new:
                new.close()
            self._close_idle(self.open_at_once)
            return tar

    def done(self, tar: OpenTar) -> None:
        """Take back one use of what :meth:`opened` returned."""
        with self._lock:
            tar.users -= 1

    def needs_cache(self, url: str) -> bool:
        """Whether a shard is anything but a plain local tar."""
        if url not in self._cached:
            try:
                self._cached[url] = bool(scheme_of(url)) or is_compressed(Path(url))
            except OSError:
                return False  # gone: opening it says so
        return self._cached[url]

    def describe(self) -> list[str]:
        """Lines for the banner: shards, samples, where their number is from, what was left out, the cache."""
        known = ", ".join(f"{count} from {origin}" for origin, count in self.origins.items())
        lines = [f"{len(self.urls)} shards, {int(self.sizes.sum()):,} samples ({known})"]
        if self.removed:
            lines.append("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.removed.items()))
        cached = sum(1 for url in self.urls if scheme_of(url))
        if cached:
            size = f"{self.config.max_bytes / (1 << 30):.3g} GiB"
            lines.append(f"{cached} shards fetched into {str(self.cache.folder)!r}, at most {size}")
        return lines + self.notes

    def release(self) -> None:
        """Close all files that no read is using."""
        with self._lock:
            self._close_idle(0)

    def close(self) -> None:
        """Close files and give up what is being fetched."""
        self._prefetcher.close()
        self.cache.close()
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        names = ("urls", "sizes", "timeout", "removed", "notes", "config", "select", "origins", "open_at_once")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        """What belongs to one process."""
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._open: OrderedDict[int, OpenTar] = OrderedDict()
        self._cached: dict[str, bool] = {}
        self.cache = ShardCache(self.config)
        cache, timeout = self.cache, self.timeout  # not self: who is forgotten closes its files at once
        self._prefetcher = Prefetcher(lambda url: cache.fetch(url, timeout, wait=False), self.config.parallel)
        weakref.finalize(self, _forgotten, self._open, self._process)

    def _open_tar(self, url: str) -> OpenTar:
        path = self.cache.place(url).data if self.needs_cache(url) else Path(url)
        for _ in range(REPLACED):
            descriptor, close = self._descriptor(url)
            try:
                index = load_index(path, self.cache.folder)
                if _is_at(descriptor, path):
                    tar = OpenTar(url, descriptor, index, None, self.config.member_bytes, close)
                    if self.select is not None:
                        tar.rows = selected_rows(tar, self.select, self.cache.folder).rows
                    return tar
            except BaseException:
                close(descriptor)
                raise
            close(descriptor)  # the index is that of a file which another process has put there meanwhile
        raise RemoteError(f"the shard {url!r} was replaced {REPLACED} times while it was opened")

    def _descriptor(self, url: str) -> tuple[int, Callable[[int], None]]:
        """The shard as an open tar, and how to close it."""
        if self.needs_cache(url):
            return self._from_cache(url), release
        return os.open(url, os.O_RDONLY | os.O_CLOEXEC), os.close

    def _from_cache(self, url: str) -> int:
        """A descriptor of a cached shard; where the cache is full of what this process no longer uses, let go of it."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return self.cache.open(url, deadline - time.monotonic())
            except CacheFull:
                self.release()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _close_idle(self, most: int) -> None:
        """Close the least recently used files beyond ``most``, other than those a read is using."""
        for shard in [shard for shard, tar in self._open.items() if not tar.users]:
            if len(self._open) <= most:
                return
            self._open.pop(shard).close()


def _forgotten(opened: OrderedDict[int, OpenTar], process: int) -> None:
    """Close the files of shards that nobody holds any more, other than those inherited by a fork."""
    if process == os.getpid():
        for tar in opened.values():
            tar.close()
        opened.clear()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open is what lies at the path now, unchanged."""
    mine, there = os.fstat(descriptor), os.stat(path)
    return (mine.st_ino, mine.st_size, mine.st_mtime_ns) == (there.st_ino, there.st_size, there.st_mtime_ns)


class Sample(NamedTuple):
    """One image-text pair as it lies in a shard: still encoded."""

    key: str
    image: bytes
    fields: dict[str, Any]
    """Everything of the JSON member; the ``txt`` member, where there is one, is ``fields["caption"]``."""


def read_samples(
    shards: Iterable[str],
    caption_field: str = "caption",
    *,
    cache: CacheConfig | None = None,
    on_fault: Callable[[SampleFault], object] | None = None,
) -> Iterator[Sample]:
    """The samples of shards in their order, encoded as they lie there; those without picture or caption are left out.

    Args:
        shards: paths and URLs, as :func:`expand_shards` gives them.
        caption_field: the field without which a sample is left out.
        cache: for shards that are no plain local tars.
        on_fault: called for each sample that cannot be read; None: the first one ends it.

    Raises:
        MmbaseError: a shard or sample that cannot be read, naming it.
    """
    urls = list(shards)
    source = Shards(urls, np.zeros(len(urls), np.int64), cache=cache)
    for number, url in enumerate(urls):
        try:
            tar = source.opened(number)
        except (OSError, MmbaseError) as error:
            raise MmbaseError(f"cannot read the shard {url!r}: {error}; replace it or take it off the list") from error
        try:
            for row in range(len(tar)):
                try:
                    raw = tar.sample(row)
                    fields = fields_of(raw)
                except SampleFault as fault:
                    if on_fault is None:
                        raise MmbaseError(f"{fault}; mend it or take the shard off the list") from fault
                    on_fault(fault)
                    continue
                image = next((raw.members[name] for name in IMAGE_EXTENSIONS if name in raw.members), None)
                if image is not None and caption_field in fields:
                    yield Sample(raw.key, image, fields)
            if tar.index.damage and on_fault is None:
                raise MmbaseError(
                    f"cannot read the shard {url!r}: {tar.index.damage}; replace it or take it off the list"
                )
        finally:
            source.done(tar)
            source.release()
