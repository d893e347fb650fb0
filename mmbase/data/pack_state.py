"""What a packing keeps on the disk so that it goes on after a kill: a position, and the lengths files had at it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

_DONE = "pack.json"


@dataclass
class PackState:
    """How far a packing is, after its ``position``-th row."""

    position: int = 0
    bad: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    writers: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    """of the logs, in bytes"""


class Workspace:
    """``OUTPUT/.pack`` while packing, ``OUTPUT/pack.json`` afterwards; and ``OUTPUT/rejected.jsonl``.

    Args:
        output: the folder that is packed into.
        identity: what the shards' bytes depend on; a folder belongs to one.
        restart: throw away what an earlier packing left.

    Raises:
        MmbaseError: the folder holds something else.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.output, self.folder, self.identity = output, output / ".pack", dict(identity)
        self.rejected, self._seen = output / "rejected.jsonl", self.folder / "seen.bin"
        self._files: dict[Path, IO[bytes]] = {}
        if output.exists() and not output.is_dir():
            raise MmbaseError(f"{str(output)!r} is a file; name a folder to pack into")
        if restart and ((output / _DONE).exists() or self.folder.exists()):
            _remove_packed(output)
        elif (before := self._read(output / _DONE) or self._read(self.folder / "state.json")) is not None:
            self._compare(before.get("identity", {}))
        elif output.exists() and any(p.name not in (".pack", "rejected.jsonl") for p in output.iterdir()):
            raise MmbaseError(f"{str(output)!r} is not empty and no packing of mmbase; name a new folder")

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise MmbaseError(f"{str(path)!r} is damaged: {error}; pack anew with --restart") from error

    def _compare(self, before: Mapping[str, Any]) -> None:
        for name, value in self.identity.items():
            if before.get(name) != value:
                told = "" if name == "source" else f" ({before.get(name)!r}, now {value!r})"
                raise MmbaseError(
                    f"{str(self.output)!r} was packed with another {name}{told}; name another folder, or pack anew "
                    "with --restart"
                )

    def finished(self) -> dict[str, Any] | None:
        """What :meth:`finish` was given, where an earlier packing ended; None: there is something to do."""
        done = self._read(self.output / _DONE)
        return None if done is None else done["result"]

    @contextlib.contextmanager
    def locked(self) -> Iterator[PackState]:
        """The state to go on from, while no other process packs into the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MmbaseError(f"cannot make {str(self.folder)!r}: {error.strerror}; choose another folder") from error
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MmbaseError(f"another process is packing into {str(self.output)!r}; wait for it") from error
            stored = self._read(self.folder / "state.json")
            state = PackState(**stored["state"]) if stored else PackState()
            if stored is None:
                self.keep(state)  # from here on the folder is known for a packing
            self._open(state)
            try:
                yield state
            finally:
                for file in self._files.values():
                    with contextlib.suppress(OSError):
                        file.close()

    def _open(self, state: PackState) -> None:
        """The logs, cut back to the lengths they had at the state."""
        for path in (self.rejected, self._seen):
            length = state.lengths.get(path.name, 0)
            file = path.open("r+b" if path.exists() else "w+b")
            if file.seek(0, os.SEEK_END) < length:
                raise MmbaseError(f"{str(path)!r} is shorter than when packing stopped; pack anew with --restart")
            file.truncate(length)
            file.seek(length)
            self._files[path] = file

    def seen_records(self, width: int) -> Iterator[bytes]:
        """The records of ``width`` bytes remembered before."""
        file = self._files[self._seen]
        file.seek(0)
        while record := file.read(width):
            yield record

    def remember(self, record: bytes) -> None:
        """Append what tells a pair that was written."""
        self._files[self._seen].write(record)

    def reject(self, origin: str, reason: str) -> None:
        """Append a row that was left out."""
        line = json.dumps({"row": origin, "reason": reason}, ensure_ascii=False) + "\n"
        self._files[self.rejected].write(line.encode("utf-8", "replace"))

    def keep(self, state: PackState) -> None:
        """Have the logs and the state on the disk; the shards already are."""
        for path, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            state.lengths[path.name] = file.tell()
        write_atomically(self.folder / "state.json", json.dumps({"identity": self.identity, "state": asdict(state)}))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the packing as ended, and tidy up."""
        self._files[self.rejected].flush()
        told = {"identity": self.identity, "result": dict(result)}
        write_atomically(self.output / _DONE, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self) -> None:
        """Take away what a packing that wrote nothing left; the list of rejected rows stays."""
        self._files[self.rejected].flush()
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove_packed(output: Path) -> None:
    """Take away what a packing wrote, and nothing else."""
    for place in [output, *(p for p in output.iterdir() if p.is_dir() and _is_split(p))]:
        shards = [p for p in place.iterdir() if re.fullmatch(r"\d{5,}\.tar(\.index)?", p.name)]
        for path in [*shards, *(place / name for name in ("sizes.json", "datasheet.json", "DATASHEET.md"))]:
            path.unlink(missing_ok=True)
        if place != output:
            with contextlib.suppress(OSError):
                place.rmdir()  # only where nothing else is in it
    shutil.rmtree(output / ".pack", ignore_errors=True)
    for name in (_DONE, "rejected.jsonl"):
        (output / name).unlink(missing_ok=True)


def _is_split(folder: Path) -> bool:
    """Whether a packing into the folder above made this one: its datasheet says so, or it is under way."""
    if (folder.parent / ".pack" / folder.name).is_dir():
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return "mmbase data pack" in json.loads((folder / "datasheet.json").read_bytes()).get("made_with", {})
    return False
