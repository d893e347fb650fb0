"""Bytes from elsewhere: HTTP servers, what fsspec knows (S3, GCS, ...), and commands, as one kind of source.

A source opens at an offset and yields chunks; :func:`download` makes a whole file of them through cuts, stalls, errors
and restarts of the server. Every wait has an end, and its error says what was waited for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import Any, NamedTuple, Protocol, TypeVar

from mmbase.data.cache_config import CacheConfig
from mmbase.data.checksums import blocks_of, verify
from mmbase.data.shard_list import scheme_of
from mmbase.errors import MmbaseError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

GROWTH = 64 << 20
"""Bytes of a file of unknown size between two looks at the room that is left."""
MISMATCHES = 3
"""Times a file is fetched whole before its wrong checksum is final."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries at most, unless the server asks for more."""
SLOWEST = 1024
"""Bytes a second under which a transfer counts as stalled."""


class RemoteError(MmbaseError):
    """A remote file that could not be had; the message says why, and after what."""


class Unavailable(Exception):
    """What no further try will change: not there, not allowed."""


class Interrupted(Exception):
    """What a further try may mend: cut, stalled, overloaded."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause
        """seconds that the server asked to wait"""


@dataclass(frozen=True)
class Facts:
    """What a server says of a file."""

    size: int | None = None
    """bytes of the whole file"""
    validator: str | None = None
    """changes where the content does: an ETag or a date"""
    modified_ns: int | None = None
    checksums: dict[str, bytes] = field(default_factory=dict)
    """algorithm, such as md5, -> digest of the whole file"""


class Transfer(NamedTuple):
    """An answer that has begun."""

    facts: Facts
    start: int
    """byte of the file at which the chunks begin: the one asked for, or 0 where the file has changed or no range is
    served"""
    chunks: Generator[bytes, None, None]


class Source(Protocol):
    """A file elsewhere. Its methods raise :class:`Unavailable` or :class:`Interrupted`, and never wait without end."""

    url: str
    config: CacheConfig

    def open(self, offset: int, validator: str | None) -> Transfer:
        """Begin at a byte, if the file still is what ``validator`` was told for."""
        ...

    def facts(self) -> Facts:
        """What the server says of the file, without its content."""
        ...


def source_of(url: str, config: CacheConfig) -> Source:
    """The source for a URL."""
    scheme = scheme_of(url)
    if scheme in ("http", "https"):
        from mmbase.data.http_source import HttpSource

        return HttpSource(url, config)
    if scheme == "pipe":
        from mmbase.data.pipe_source import PipeSource

        return PipeSource(url, config)
    from mmbase.data.fsspec_source import FsspecSource

    return FsspecSource(url, config)


def list_folder(url: str) -> list[str]:
    """URLs of the files in a remote folder, in name order.

    Raises:
        MmbaseError: it cannot be listed.
    """
    from mmbase.data.fsspec_source import FsspecSource

    return persist(FsspecSource(url, CacheConfig()).listing, CacheConfig(), f"a list of {url!r}")


class Patience:
    """How long to go on trying: pauses that grow while nothing comes, and an end.

    Args:
        config: tries in a row, the first pause.
        what: what is waited for, as errors say it.
        seconds: until the end of all tries.
        counts: how often each kind of trouble was met.
        stop: set to give up from outside.
    """

    def __init__(
        self,
        config: CacheConfig,
        what: str,
        seconds: float,
        counts: Counter[str] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.config, self.what, self.seconds = config, what, seconds
        self.deadline = time.monotonic() + seconds
        self.failures = 0
        self.counts = Counter() if counts is None else counts
        self.stop = stop or threading.Event()

    def check(self) -> None:
        """Raise once the time is up."""
        if self.stop.is_set():
            raise RemoteError(f"{self.what} was given up: the loader closed")
        if time.monotonic() > self.deadline:
            raise RemoteError(f"{self.what} did not come within {self.seconds:.0f} s (data.cache.total_timeout)")

    def pause(self, trouble: Interrupted, progressed: bool) -> None:
        """Wait before the next try, longer each time nothing came.

        Raises:
            RemoteError: too many tries in a row, or no time left.
        """
        self.counts[_kind(str(trouble))] += 1
        self.failures = 1 if progressed else self.failures + 1
        if self.failures == 2:  # one trouble is nothing to speak of
            logger.warning("%s: %s; trying again, %d times in all", self.what, trouble, self.config.attempts)
        if self.failures >= self.config.attempts:
            raise RemoteError(f"{self.what} failed {self.failures} times in a row, last: {trouble}")
        pause = min(LONGEST_PAUSE, self.config.backoff * 2 ** (self.failures - 1)) * SystemRandom().uniform(0.5, 1.5)
        pause = max(pause, trouble.pause)
        if time.monotonic() + pause > self.deadline:
            raise RemoteError(f"{self.what} did not come within {self.seconds:.0f} s, last: {trouble}")
        self.stop.wait(pause)
        self.check()


def persist(call: Callable[[], Result], config: CacheConfig, what: str, counts: Counter[str] | None = None) -> Result:
    """The result of a short request, tried again while that may help.

    Raises:
        RemoteError: it could not be had.
    """
    patience = Patience(config, what, config.total_timeout, counts)
    while True:
        try:
            return call()
        except Unavailable as error:
            raise RemoteError(f"{what} cannot be had: {error}") from error
        except Interrupted as trouble:
            patience.pause(trouble, progressed=False)


def read_small(url: str, config: CacheConfig, limit: int = 64 << 20) -> bytes | None:
    """The content of a small remote file; None where there is none.

    Raises:
        RemoteError: it cannot be read, or is longer than ``limit`` bytes.
    """
    source = source_of(url, config)

    def read() -> bytes | None:
        content = b""
        try:
            transfer = source.open(0, None)
        except Unavailable:
            return None
        for chunk in transfer.chunks:
            content += chunk
            if len(content) > limit:
                raise Unavailable(f"it is longer than {limit} bytes")
        if transfer.facts.size is not None and len(content) != transfer.facts.size:
            raise Interrupted(f"cut after {len(content)} of {transfer.facts.size} bytes")
        wrong = verify([content], transfer.facts.checksums)
        if wrong is not None:
            raise Interrupted(wrong)
        return content

    return persist(read, config, repr(url))


def chunks(
    source: Source,
    patience: Patience,
    *,
    offset: int = 0,
    validator: str | None = None,
    restart: Callable[[Facts, int], None] | None = None,
) -> Iterator[bytes]:
    """The bytes of a file from ``offset`` on, whole, through as many answers as it takes.

    Args:
        source: the file.
        patience: how long to go on trying.
        offset: the first byte wanted.
        validator: what the file was when the bytes before ``offset`` were read.
        restart: called as each answer begins, with its facts and the byte at which the next chunk begins, which may be
            0 again; None: the bytes given out cannot be taken back, so a file that changed is an error.

    Raises:
        RemoteError: it could not be had; :class:`Unavailable` becomes one too.
    """
    furthest = offset
    while True:
        reached = furthest  # what was had before, and is had again after a restart, is no progress
        try:
            transfer = source.open(offset, validator)
            if transfer.start != offset and restart is None:
                raise Unavailable("it cannot be read on after a cut: it has changed, or the server serves no ranges")
            offset, validator = transfer.start, transfer.facts.validator
            if restart is not None:
                restart(transfer.facts, offset)
            for chunk in _flowing(transfer.chunks, source.config.stall_timeout):
                offset += len(chunk)
                furthest = max(furthest, offset)
                yield chunk
                patience.check()
            size = transfer.facts.size
            if size is None or offset == size:
                return
            raise Interrupted(f"cut after {offset} of {size} bytes")
        except Unavailable as error:
            raise RemoteError(f"{patience.what} cannot be had: {error}") from error
        except Interrupted as trouble:
            patience.pause(trouble, progressed=furthest > reached)


def download(
    source: Source, part: Path, patience: Patience, reserve: Callable[[int | None, int], None] | None = None
) -> Facts:
    """Fetch a file into ``part``, going on from what an earlier try left there; verified where the server tells how.

    Args:
        source: the file.
        part: where its bytes go; what they were part of is remembered beside it.
        patience: how long to go on trying.
        reserve: called with the whole size, where it is known, and the bytes there are, before they are written.

    Raises:
        RemoteError: it could not be had; what came stays for the next try.
    """
    memory = part.with_name(f"{part.name}.of")
    offset, validator = _resumable(part, memory)
    facts = Facts()
    for _ in range(MISMATCHES):
        with part.open("r+b" if offset else "wb") as file:

            def restart(found: Facts, at: int, file: Any = file) -> None:
                nonlocal facts
                facts = found
                file.seek(at)
                file.truncate()
                memory.write_text(found.validator or "")
                if at:
                    patience.counts["resumed"] += 1
                if reserve is not None:
                    reserve(found.size, at)

            written = offset
            for chunk in chunks(source, patience, offset=offset, validator=validator, restart=restart):
                file.write(chunk)
                if facts.size is None and reserve is not None and file.tell() // GROWTH != written // GROWTH:
                    reserve(None, file.tell())
                written = file.tell()
            file.flush()
            os.fsync(file.fileno())
        wrong = verify(blocks_of(part), facts.checksums)
        if wrong is None:
            memory.unlink(missing_ok=True)
            return facts
        patience.counts["checksum wrong"] += 1
        part.unlink()
        offset, validator = 0, None
        patience.pause(Interrupted(wrong), progressed=False)
    raise RemoteError(f"{patience.what} came {MISMATCHES} times with a wrong checksum")


def _resumable(part: Path, memory: Path) -> tuple[int, str | None]:
    """Bytes there and what they are part of; none where that is not known."""
    try:
        validator = memory.read_text()
        return (part.stat().st_size, validator) if validator else (0, None)
    except OSError:
        return 0, None


def _flowing(pieces: Iterator[bytes], stall: float) -> Iterator[bytes]:
    """The pieces, as long as they come faster than a trickle."""
    begun, seen = time.monotonic(), 0
    for piece in pieces:
        yield piece
        seen += len(piece)
        passed = time.monotonic() - begun
        if passed > stall:
            if seen < SLOWEST * passed:
                raise Interrupted(f"stalled: {seen} bytes in {passed:.0f} s")
            begun, seen = time.monotonic(), 0


def _kind(trouble: str) -> str:
    """The first word of a trouble, which says its kind."""
    return trouble.partition(" ")[0].rstrip(":,")
