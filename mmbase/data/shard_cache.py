"""A folder of plain local tars standing for shards that are elsewhere, compressed, or made by a command.

Shared by all processes of a node, through file locks that the kernel gives back when a process dies:

- ``DIGEST.lock``, exclusive: one process makes the shard, the others wait for it;
- the shard itself, shared, while a process has it open: such a shard is never evicted;
- ``room.lock``, exclusive and short: who counts bytes and evicts.

A shard appears whole, by a rename. ``DIGEST.part`` is what has come so far; the next process goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmbase.data.cache_config import CacheConfig
from mmbase.data.compressed import CHUNK, decompress, is_compressed
from mmbase.data.index_store import cache_folder, digest_of, kept_index
from mmbase.data.remote import GROWTH, Facts, Patience, RemoteError, download, persist, source_of
from mmbase.data.shard_list import scheme_of
from mmbase.data.tar_index import TarIndex
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

logger = logging.getLogger(__name__)

POLL = 0.02
"""Seconds between two looks at a lock that another process holds; grows to half a second."""
LOST_FOR = 300.0
"""Seconds for which a shard that could not be had is not tried again."""


class CacheFull(MmbaseError):
    """No room: all that is kept is in use, or on its way."""


class Place(NamedTuple):
    """The files of one shard in the cache."""

    url: str
    data: Path
    part: Path
    facts: Path
    lock: Path


class ShardCache:
    """Shards by URL or path, fetched where they are not there yet. Safe to use from threads.

    Args:
        config: where, how much, how patiently.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.folder = cache_folder(config.folder)
        self.counts: Counter[str] = Counter()
        """fetched, resumed, evicted, and each kind of trouble met, in this process"""
        self.closed = threading.Event()
        self._lost: dict[str, tuple[float, MmbaseError]] = {}

    def place(self, url: str) -> Place:
        """Where a shard's files are or will be."""
        digest = digest_of(url if scheme_of(url) else os.path.abspath(url))
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", url.rstrip("/").rpartition("/")[2])[-60:]
        base = self.folder / "shards" / digest[:2] / digest
        data = base.with_name(f"{digest}-{name.split('.tar')[0]}.tar")
        return Place(url, data, base.with_suffix(".part"), base.with_suffix(".json"), base.with_suffix(".lock"))

    def open(self, url: str, timeout: float) -> int:
        """A descriptor of the shard as a plain tar, fetched first where need be; in use until it is closed.

        Raises:
            MmbaseError: it could not be had; the same error at once for the next minutes.
            CacheFull: there is no room for it.
        """
        place, deadline = self.place(url), time.monotonic() + timeout
        if self._is_due(place):
            self.fetch(url, timeout)
        while (descriptor := _open_shared(place.data)) is None:
            self.fetch(url, max(deadline - time.monotonic(), 0.0))
        os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
        return descriptor

    def has(self, url: str) -> bool:
        """Whether the shard is here."""
        return self.place(url).data.exists()

    def recall(self, url: str) -> tuple[int | None, TarIndex | None]:
        """Bytes of a shard that is not here, and the index of when it was, if it has not changed since.

        Raises:
            RemoteError: it is not to be had.
        """
        place = self.place(url)
        if not scheme_of(url):
            return os.stat(url).st_size, None
        facts = persist(source_of(url, self.config).facts, self.config, f"the shard {url!r}", self.counts)
        index = kept_index(place.data, self.folder)
        try:
            known = json.loads(place.facts.read_text())
            same = (known["validator"], known["size"]) == (facts.validator, facts.size)
            return facts.size, index if index is not None and same and index.size == known["bytes"] else None
        except (OSError, ValueError, KeyError):
            return facts.size, None

    def fetch(self, url: str, timeout: float, wait: bool = True) -> bool:
        """Make sure that a shard is here.

        Args:
            url: which.
            timeout: seconds in which it must have come, this process or another fetching it.
            wait: whether to wait where another process is at it.

        Returns:
            Whether it is here; False only without ``wait``.

        Raises:
            MmbaseError: as for :meth:`open`.
        """
        self._raise_if_lost(url)
        place = self.place(url)
        try:
            with _locked(place.lock, timeout if wait else 0, self.closed) as held:
                if held:
                    self._fetch_locked(place, timeout)
                elif wait:
                    raise RemoteError(
                        f"waited {timeout:.0f} s for another process to fetch the shard {url!r}; see whether it runs"
                    )
                return held
        except OSError as error:
            raise MmbaseError(
                f"cannot keep the shard {url!r} in {str(self.folder)!r}: {error.strerror or error}; free space or "
                "choose another data.cache.folder"
            ) from error

    def close(self) -> None:
        """Make all that waits or fetches here give up."""
        self.closed.set()

    def _raise_if_lost(self, url: str) -> None:
        until, error = self._lost.get(url, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error

    def _fetch_locked(self, place: Place, timeout: float) -> None:
        """Have a shard here; its lock is held."""
        self._raise_if_lost(place.url)
        if place.data.exists() and not self._has_changed(place):
            return
        try:
            self._make(place, timeout)
        except RemoteError as error:
            if not self.closed.is_set():
                self._lost[place.url] = (time.monotonic() + LOST_FOR, error)
            raise
        finally:
            place.part.with_suffix(".wants").unlink(missing_ok=True)

    def _make(self, place: Place, timeout: float) -> None:
        """Fetch or decompress one shard; its lock is held."""
        begun = time.monotonic()
        place.part.parent.mkdir(parents=True, exist_ok=True)
        what = f"the shard {place.url!r}"
        patience = Patience(self.config, what, min(timeout, self.config.total_timeout), self.counts, self.closed)
        if scheme_of(place.url):
            reserve = lambda size, have: self._reserve(place, size, have)  # noqa: E731
            facts, packed = download(source_of(place.url, self.config), place.part, patience, reserve), place.part
        else:
            try:
                status = os.stat(place.url)
            except OSError as error:
                raise RemoteError(f"{what} cannot be read: {error.strerror}") from error
            facts, packed = Facts(status.st_size, _stamp(status), status.st_mtime_ns), Path(place.url)
        ready = packed
        if is_compressed(packed):
            ready = place.part.with_suffix(".plain")
            damage = decompress(packed, ready, lambda size: self._grown(place, size, patience))
            if damage:
                logger.warning("%s is cut: %s", what, damage)
        known = {"url": place.url, "validator": facts.validator, "size": facts.size, "bytes": ready.stat().st_size}
        modified = facts.modified_ns or time.time_ns()
        os.utime(ready, ns=(time.time_ns(), modified))
        # What is known comes after what it is known of: a process that dies between them leaves it to be asked again.
        place.facts.unlink(missing_ok=True)
        os.replace(ready, place.data)
        write_atomically(place.facts, json.dumps(known))
        if ready != place.part:
            place.part.unlink(missing_ok=True)
        self.counts["fetched"] += 1
        logger.debug("%s came in %.1f s, %d bytes", what, time.monotonic() - begun, known["bytes"])

    def _is_due(self, place: Place) -> bool:
        """Whether it is time to ask whether a kept shard still is what it was; a local one is asked every time."""
        try:
            if not scheme_of(place.url):
                return json.loads(place.facts.read_text())["validator"] != _stamp(os.stat(place.url))
            return time.time() - place.facts.stat().st_mtime > self.config.revalidate
        except (OSError, ValueError, KeyError):
            return True

    def _has_changed(self, place: Place) -> bool:
        """Ask the server where it is time; where it does not answer, what is here is good."""
        if not self._is_due(place):
            return False
        try:
            known: dict[str, Any] = json.loads(place.facts.read_text())
        except (OSError, ValueError):
            return True
        if not scheme_of(place.url):
            return True
        try:
            source = source_of(place.url, self.config)
            facts = persist(source.facts, self.config.model_copy(update={"attempts": 2}), repr(place.url), self.counts)
        except MmbaseError as error:
            logger.warning("using the kept copy of %r, unasked whether it has changed: %s", place.url, error)
            facts = Facts()
        told = [(facts.validator, known.get("validator")), (facts.size, known.get("size"))]
        changed = any(new is not None and old is not None and new != old for new, old in told)
        if not changed:
            os.utime(place.facts)
        return changed

    def _grown(self, place: Place, size: int, patience: Patience) -> None:
        """Make room while a shard is decompressed, beside what it is decompressed from."""
        patience.check()
        if size % GROWTH < CHUNK:
            packed = place.part.stat().st_size if place.part.exists() else 0
            self._reserve(place, None, packed + size)

    def _reserve(self, place: Place, size: int | None, have: int) -> None:
        """Make room for a shard of ``size`` bytes, or for what comes next of one whose size nobody knows."""
        wanted = size if size is not None else max(have, min(have + GROWTH, self.config.max_bytes))
        if wanted > self.config.max_bytes:
            raise MmbaseError(
                f"the shard {place.url!r} of {'' if size else 'over '}{wanted} bytes is larger than the cache; raise "
                f"data.cache.max_bytes={self.config.max_bytes}"
            )
        with _locked(self.folder / "room.lock", 60, self.closed) as held:
            if not held:
                raise RemoteError(f"waited 60 s to count the bytes in {str(self.folder)!r}; is the disk stuck?")
            place.part.with_suffix(".wants").write_text(str(wanted))
            self._evict(place)

    def _evict(self, place: Place) -> None:
        """Delete the least recently used until what is kept and what is coming fit; the count's lock is held."""
        kept: list[tuple[int, int, Path]] = []
        total = 0
        for file in (self.folder / "shards").glob("*/*"):
            with contextlib.suppress(OSError, ValueError):
                status = file.stat()
                if file.suffix == ".wants":
                    coming = _held(file.with_suffix(".lock"))
                    total += int(file.read_text()) if coming else 0
                elif file.suffix == ".tar" or (
                    file.suffix in (".part", ".plain") and not _held(file.with_suffix(".lock"))
                ):
                    kept.append((status.st_atime_ns, status.st_size, file))
                    total += status.st_size
        for _, size, file in sorted(kept):
            if total <= self.config.max_bytes:
                return
            if _unlink_unused(file):
                self.counts["evicted"] += 1
                total -= size
        if total > self.config.max_bytes:
            raise CacheFull(
                f"the cache {str(self.folder)!r} of {self.config.max_bytes} bytes holds only shards in use; raise "
                "data.cache.max_bytes or lower data.window"
            )


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _open_shared(path: Path) -> int | None:
    """A descriptor that keeps a shard from being evicted; None where it is not there, or just going."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        time.sleep(POLL)
    os.close(descriptor)
    return None


def release(descriptor: int) -> None:
    """Close what :meth:`ShardCache.open` returned; its lock goes even where a forked child still holds a copy."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _held(lock: Path) -> bool:
    """Whether some process, this one included, holds a lock."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _unlink_unused(path: Path) -> bool:
    """Delete a shard unless some process has it open, or what has come of one unless some process fetches it."""
    try:
        descriptor = os.open(path if path.suffix == ".tar" else path.with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def _locked(lock: Path, timeout: float, closed: threading.Event) -> Iterator[bool]:
    """Hold a lock between processes and threads; yields whether it could be had in time."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline, pause, held = time.monotonic() + timeout, POLL, False
    try:
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= deadline or closed.wait(pause):
                    break
                pause = min(2 * pause, 0.5)
        yield held
    finally:
        if held:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
