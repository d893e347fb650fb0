"""Writes tar shards whose bytes depend on their samples alone, and which can be taken up again where they stopped."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from mmbase.errors import MmbaseError

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)


def tar_member(name: str, data: bytes) -> bytes:
    """One member of a tar: a USTAR header without time, owner or host, the data, and zeros up to the next block."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    return header + data + bytes(-len(data) % _BLOCK)


class ShardWriter:
    """The shards of one split: ``00000.tar``, ``00001.tar``, ... of ``shard_size`` samples each.

    A shard is written into ``workspace`` and moved into ``folder`` when it is complete.

    Args:
        folder: where complete shards go.
        workspace: where the open shard lies; on the same file system.
        shard_size: samples per shard.
        state: what :meth:`checkpoint` returned, to go on from there; what was written after it is cut off.
    """

    def __init__(self, folder: Path, workspace: Path, shard_size: int, state: Mapping[str, Any] | None = None) -> None:
        self.folder, self.workspace, self.shard_size = folder, workspace, shard_size
        self.shards: list[dict[str, Any]] = [dict(shard) for shard in (state or {}).get("shards", [])]
        """``name``, ``samples``, ``bytes``, ``sha256`` of every complete shard."""
        self._count = self._bytes = 0
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._discard_later_shards()
        if state and state["open"]["samples"]:
            self._take_up(int(state["open"]["samples"]), int(state["open"]["bytes"]))

    def __len__(self) -> int:
        return sum(shard["samples"] for shard in self.shards) + self._count

    @property
    def _name(self) -> str:
        return f"{len(self.shards):05d}.tar"

    @property
    def _open_path(self) -> Path:
        return self.workspace / self._name

    def _discard_later_shards(self) -> None:
        """Take back shards that were completed after the state was kept: the open one among them is needed again."""
        number = len(self.shards)
        if (finished := self.folder / self._name).is_file():
            self.workspace.mkdir(parents=True, exist_ok=True)
            finished.replace(self._open_path)
        for path in (self.folder, self.workspace):
            for later in path.glob("[0-9]*.tar"):
                if later.stem.isdigit() and int(later.stem) > number:
                    later.unlink()

    def _take_up(self, samples: int, length: int) -> None:
        path = self._open_path
        if not path.is_file() or path.stat().st_size < length:
            raise MmbaseError(f"{str(path)!r} is shorter than when packing stopped; pack anew with --restart")
        self._file = path.open("r+b")
        self._file.truncate(length)
        while chunk := self._file.read(1 << 20):
            self._hash.update(chunk)
        self._count, self._bytes = samples, length

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: ``members`` maps an extension to its bytes."""
        if self._file is None:
            self.workspace.mkdir(parents=True, exist_ok=True)
            self._file = self._open_path.open("wb")
        self._write(b"".join(tar_member(f"{key}.{extension}", data) for extension, data in members.items()))
        self._count += 1
        if self._count == self.shard_size:
            self.close_shard()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close_shard(self) -> None:
        """End the open shard, if there is one, and move it into place."""
        if self._file is None:
            return
        self._write(_END)
        self.flush()
        self._file.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open_path.replace(self.folder / self._name)
        self.shards.append(
            {"name": self._name, "samples": self._count, "bytes": self._bytes, "sha256": self._hash.hexdigest()}
        )
        self._file, self._count, self._bytes, self._hash = None, 0, 0, hashlib.sha256()

    def flush(self) -> None:
        """Have everything written so far on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def checkpoint(self) -> dict[str, Any]:
        """Everything on the disk; a JSON-able state to go on from."""
        self.flush()
        return {"shards": self.shards, "open": {"samples": self._count, "bytes": self._bytes}}

    def abandon(self) -> None:
        """Close the open file as it is."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
