"""A folder of checkpoints: each appears whole or not at all, and says itself whether it is still whole. Torch-free.

A checkpoint is a folder named after its step. What is written lies in a hidden folder first; its files are flushed to
the disk, ``manifest.json`` lists their sizes and SHA-256 sums and seals itself, and one rename makes it appear. A
process killed at any moment leaves every earlier checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmbase.training.checkpoint_config import CheckpointConfig

MANIFEST = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 20
_DAMAGED = ".damaged"


class Torn(Exception):
    """A checkpoint that is not whole; the message says which file and why."""


class Entry(NamedTuple):
    """What the manifest of a checkpoint says about it."""

    step: int
    samples: int
    """consumed by all ranks together"""
    seconds: float
    """of training"""
    world_size: int
    """ranks that wrote it"""
    score: float | None
    """of the evaluation at this step, higher is better; None: none was made"""
    files: Mapping[str, tuple[int, str]]
    """bytes and SHA-256 by path within the checkpoint"""


class Store:
    """The checkpoints of one run.

    Args:
        folder: made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ------------------------------------------------------------------------------------------------------- writing

    def begin(self, step: int) -> Path:
        """An empty hidden folder to write the checkpoint of ``step`` into; of an earlier attempt nothing is left.

        Raises:
            OSError: it cannot be made.
        """
        temporary = self.folder / f".{name_of(step)}.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, temporary: Path, entry: Entry) -> Path:
        """Make what lies in ``temporary`` appear as the checkpoint of ``entry``; its files are flushed already.

        Raises:
            OSError: the disk is full or fails; the checkpoint does not appear.
        """
        _write_durably(temporary / MANIFEST, encode(entry))
        for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            sync(folder)
        final = self.folder / name_of(entry.step)
        replaced = self.folder / f".{final.name}.replaced"
        if final.exists():  # the same step a second time, after a run went back: folders cannot be swapped
            shutil.rmtree(replaced, ignore_errors=True)
            final.replace(replaced)
        temporary.replace(final)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def abandon(self, temporary: Path) -> None:
        """Remove what was written so far."""
        shutil.rmtree(temporary, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- reading

    def paths(self) -> list[Path]:
        """Checkpoints by name, oldest first, whole or not."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())

    def entries(self) -> list[Entry]:
        """Of all whose manifest can be read, oldest first; files are not verified."""
        found = []
        for path in self.paths():
            with contextlib.suppress(Torn):
                found.append(read_entry(path))
        return found

    def path(self, entry: Entry) -> Path:
        """Where the checkpoint lies."""
        return self.folder / name_of(entry.step)

    # ------------------------------------------------------------------------------------------------------ removing

    def clean(self) -> None:
        """Remove what a killed process left half-written or half-removed."""
        for path in self.folder.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint; killed on the way it leaves no half of one behind that looks whole."""
        doomed = self.folder / f".{path.name}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint, so that nobody takes it for one but its files can be looked at."""
        aside = path.with_name(path.name + _DAMAGED)
        if aside.exists():
            shutil.rmtree(aside)
        return path.rename(aside)

    def prune(self, policy: CheckpointConfig, protected: Iterable[str] = ()) -> list[str]:
        """Remove what the policy does not keep, ``protected`` names aside; the names removed."""
        entries = self.entries()
        spared = {name_of(entry.step) for entry in kept(entries, policy)} | set(protected)
        doomed = [name_of(entry.step) for entry in entries if name_of(entry.step) not in spared]
        for name in doomed:
            self.remove(self.folder / name)
        return doomed


def name_of(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"{step:08d}"


def kept(entries: Iterable[Entry], policy: CheckpointConfig) -> list[Entry]:
    """The newest, the best, and the first of every ``keep_every`` samples: which stay, oldest first."""
    ordered = sorted(entries, key=lambda entry: entry.samples)
    steps = {entry.step for entry in ordered[-policy.keep_last :]}
    scored = [entry for entry in ordered if entry.score is not None]
    # Sorting is stable: among equal scores the earlier one stays.
    best = sorted(scored, key=lambda entry: entry.score or 0.0, reverse=True)
    steps |= {entry.step for entry in best[: policy.keep_best]}
    if policy.keep_every:
        first: dict[int, int] = {}
        for entry in ordered:
            first.setdefault(entry.samples // policy.keep_every, entry.step)
        steps |= {step for part, step in first.items() if part}
    return [entry for entry in ordered if entry.step in steps]


def encode(entry: Entry) -> bytes:
    """The manifest: JSON with a SHA-256 of all its other fields."""
    values: dict[str, Any] = {"format": _FORMAT} | entry._asdict() | {"files": dict(entry.files)}
    return json.dumps(values | {"seal": _seal(values)}, indent=1).encode()


def decode(manifest: bytes) -> Entry:
    """What a manifest says.

    Raises:
        Torn: it is cut off, altered, or of a format of which this version knows nothing.
    """
    try:
        values = json.loads(manifest)
        seal = values.pop("seal")
        if seal != _seal(values):
            raise Torn(f"{MANIFEST} does not agree with its own SHA-256")
        if values.pop("format") != _FORMAT:
            raise Torn(f"{MANIFEST} is of another version of mmbase")
        files = {name: (int(size), str(digest)) for name, (size, digest) in values.pop("files").items()}
        return Entry(**values, files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Torn(f"{MANIFEST} cannot be read ({type(error).__name__})") from error


def read_entry(path: Path) -> Entry:
    """What the manifest of the checkpoint at ``path`` says; its files are not looked at.

    Raises:
        Torn: see :func:`decode`; or there is no manifest.
    """
    try:
        manifest = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise Torn(f"{MANIFEST}: {error.strerror}") from error
    entry = decode(manifest)
    if name_of(entry.step) != path.name:
        raise Torn(f"{MANIFEST} is that of step {entry.step}")
    return entry


def verify(path: Path) -> Entry:
    """Read every byte of a checkpoint; what its manifest says, if all is as it was written.

    Raises:
        Torn: names the first file that is missing, short or altered.
    """
    entry = read_entry(path)
    for name, (size, digest) in entry.files.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise Torn(f"{name} has {found:,} bytes of {size:,}")
            if digest_of(path / name) != digest:
                raise Torn(f"{name} does not agree with its SHA-256")
        except OSError as error:
            raise Torn(f"{name}: {error.strerror}") from error
    return entry


def seal_files(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Flush files to the disk; of each its bytes and SHA-256, for a manifest.

    Raises:
        OSError: the disk is full or fails.
    """
    sealed = {}
    for name in names:
        sync(folder / name)
        sealed[name] = ((folder / name).stat().st_size, digest_of(folder / name))
    return sealed


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
