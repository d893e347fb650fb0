"""Compressed tars, told by their first bytes whatever they are called, and written out plain."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmbase.errors import MmbaseError

_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
CHUNK = 4 << 20


def is_compressed(path: Path) -> bool:
    """Whether a file is gzip, bzip2, xz or Zstandard.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        begin = file.read(6)
    return begin.startswith((*_OPENERS, _ZSTANDARD))


def decompress(source: Path, target: Path, grown: Callable[[int], None]) -> str | None:
    """Write the content of a compressed file to ``target``.

    Args:
        source: the compressed file.
        target: where its content goes.
        grown: called with the bytes there will be, before they are written; may raise.

    Returns:
        None, or why it ends early: what is before a damage or a cut is kept.

    Raises:
        MmbaseError: compressed in a way that this Python does not read.
        OSError: it cannot be read, or written.
    """
    with source.open("rb") as file:
        begin = file.read(6)
    opener = next((open_it for magic, open_it in _OPENERS.items() if begin.startswith(magic)), None)
    if opener is None:
        raise MmbaseError(f"{str(source)!r} is compressed with Zstandard; recompress it with gzip, or use plain tars")
    size = 0
    with opener(source) as content, target.open("wb") as out:
        while True:
            try:
                # One inner read at a time: of a damaged file, all that comes before the damage.
                chunk = content.read1(CHUNK)
            except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, ValueError) as error:
                return f"its compression ends after {size} bytes: {' '.join(str(error).split())}"
            except OSError as error:
                if error.errno is not None:
                    raise
                return f"its compression ends after {size} bytes: {error}"
            if not chunk:
                return None
            size += len(chunk)
            grown(size)
            out.write(chunk)
