"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mmbase.errors import MmbaseError


def write_atomically(path: str | Path, content: str | bytes | Callable[[IO[bytes]], object]) -> Path:
    """Write through a temporary file beside ``path`` that replaces it only when all is on the disk.

    Args:
        path: the file; its folder is made.
        content: text (UTF-8), bytes, or a function that writes to the open binary file.

    Raises:
        MmbaseError: the disk is full or the place cannot be written; what was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror or str(error)
        raise MmbaseError(f"cannot write {str(path)!r}: {reason}; free space or choose another folder") from error
    return path
