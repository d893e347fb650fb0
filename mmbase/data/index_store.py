"""Tar indices kept on disk: beside the shard where somebody put them there, else in the cache folder.

An index in the cache is valid while the tar's size and time of change are what they were. One beside its tar travels
with it, and copying dates files anew: that one is valid while the size and a sample of the headers are. Any other is
made anew. Training never writes into a folder of shards: indices beside them come from ``mmbase data index`` and
``mmbase data pack``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mmbase.data.tar_index import TarIndex, fingerprint, scan_tar
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

logger = logging.getLogger(__name__)

SUFFIX = ".index"
Item = TypeVar("Item")
Result = TypeVar("Result")


def cache_folder(folder: str | None = None) -> Path:
    """Where mmbase keeps what it can make again: ``folder``, else $MMBASE_CACHE, else ~/.cache/mmbase."""
    named = folder or os.environ.get("MMBASE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmbase"


def digest_of(text: str) -> str:
    """32 hexadecimal digits that stand for a path or URL in the cache."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def load_index(tar: Path, cache: Path) -> TarIndex:
    """The index of a local tar: the one kept, where it is valid, else one made now and kept.

    Args:
        tar: the file.
        cache: the cache folder; where it cannot be written, the index is made again by the next process.

    Raises:
        OSError: the tar cannot be opened or read.
    """
    kept = _kept_path(tar, cache)
    index = _valid(Path(f"{tar}{SUFFIX}"), tar) or _valid(kept, tar)
    if index is not None:
        return index
    index = scan_tar(tar)
    try:
        write_atomically(kept, index.to_bytes())
    except MmbaseError as error:
        logger.debug("index of %s is not kept: %s", tar, error)
    return index


def kept_index(tar: Path, cache: Path) -> TarIndex | None:
    """The index kept of a tar that may be gone meanwhile; the caller knows whether it still holds."""
    try:
        return TarIndex.from_bytes(_kept_path(tar, cache).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(tar: str | Path) -> TarIndex:
    """Make the index of a tar and put it beside it, as ``NAME.tar.index``.

    Raises:
        MmbaseError: the tar cannot be read or its folder cannot be written.
    """
    try:
        index = scan_tar(tar)
    except OSError as error:
        raise MmbaseError(f"cannot read the shard {str(tar)!r}: {error.strerror or error}; check the path") from error
    write_atomically(f"{tar}{SUFFIX}", dataclasses.replace(index, mtime_ns=0).to_bytes())
    return index


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int, progress: bool, title: str
) -> Iterator[Result]:
    """``work`` of every item, in the items' order, in threads; with a progress bar where asked.

    The first failure is raised once what runs has ended; what has not begun is not begun.
    """
    with ThreadPoolExecutor(max(1, min(workers, len(items))), "mmbase-index") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            yield from (future.result() for future in shown(futures, progress, title))
        finally:
            for future in futures:
                future.cancel()


def shown(items: Sequence[Item], progress: bool, title: str) -> Iterable[Item]:
    """The items, under a progress bar on stderr where ``progress``."""
    if not progress or len(items) < 2:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, console=Console(stderr=True), transient=True)


def _valid(place: Path, tar: Path) -> TarIndex | None:
    """The index in a file, if it is one of the tar as it is now."""
    try:
        index = TarIndex.from_bytes(place.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("index %s is of no use: %s", place, error)
        return None
    descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if index.size != facts.st_size:
            return None
        if index.mtime_ns:
            return index if index.mtime_ns == facts.st_mtime_ns else None
        return index if index.fingerprint == fingerprint(descriptor, facts.st_size, index.offset) else None
    finally:
        os.close(descriptor)


def _kept_path(tar: Path, cache: Path) -> Path:
    digest = digest_of(str(tar.absolute()))
    return cache / "indices" / digest[:2] / f"{digest}{SUFFIX}"
