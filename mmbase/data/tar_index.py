"""Where each sample of a tar lies: one fast pass over its headers, so that any sample is read by its offset.

Reads ustar, GNU long names and sizes, and pax headers. Members are grouped into samples as webdataset groups them:
consecutive members that share all before the first dot of the file name. Nothing a tar says is acted on: no path is
ever opened or made, a size is believed only where the file is that long, and a member that is refused (a link, a
device, a name with ``..``, one cut off by the file's end) spoils its own sample and no other.

Letters: R samples (rows), M members.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK = 512
FORMAT = "mmbase tar index 2"
NAME_LIMIT = 1 << 20
"""Bytes of a long name or pax header that are read; a longer one ends the scan as damage."""

_META = re.compile(r"__[^/]*__($|/)")
_UNREADABLE = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_REGULAR = frozenset({b"0", b"\0", b"7"})
_IGNORED = frozenset({b"5", b"g", b"K", b"V", b"N", b"M", b"D"})
"""Directories, global pax headers, names of link targets, volume labels and incremental-backup records."""


class Member(NamedTuple):
    """Where one file of a sample lies."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar. Arrays, so that ten million rows of indices cost what their numbers cost."""

    size: int
    """bytes of the tar this was made from"""
    mtime_ns: int
    """its time of last change; 0 in an index that travels with its tar, which copying dates anew"""
    fingerprint: str
    """digest of the size and of some headers, see :func:`fingerprint`"""
    damage: str | None
    """why the scan ended before the tar's end, where it did; the rows before are good"""
    ended: bool
    """whether the end-of-archive mark was met; a tar cut between two members lacks it"""
    refusals: dict[int, tuple[int, str]]
    """row -> where and why that sample cannot be had"""
    extensions: list[str]
    keys: bytes
    """UTF-8 of all keys, one after the other"""
    key_end: np.ndarray
    """int64 [R], where each row's key ends in ``keys``"""
    first: np.ndarray
    """int64 [R + 1], the row's first member; the last entry is M"""
    offset: np.ndarray
    """int64 [M], byte at which each member's content begins"""
    length: np.ndarray
    """int64 [M], bytes of content"""
    extension: np.ndarray
    """int32 [M], which of ``extensions``"""

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, row: int) -> str:
        """The key of a row."""
        begin = int(self.key_end[row - 1]) if row else 0
        return self.keys[begin : int(self.key_end[row])].decode("utf-8", "surrogateescape")

    def members(self, row: int) -> list[Member]:
        """The members of a row, in their order in the tar."""
        span = range(int(self.first[row]), int(self.first[row + 1]))
        return [Member(self.extensions[self.extension[m]], int(self.offset[m]), int(self.length[m])) for m in span]

    def begins(self, row: int) -> int:
        """Byte at which the content of the row's first member begins."""
        member = int(self.first[row])
        return int(self.offset[member]) if member < self.first[row + 1] else self.refusals[row][0]

    def to_bytes(self) -> bytes:
        """The index as a file: a line of JSON, then the arrays; sealed by a digest."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        payload = b"".join(np.ascontiguousarray(a).astype(_ARRAYS[n]).tobytes() for n, a in arrays.items()) + self.keys
        header = {
            "format": FORMAT,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "fingerprint": self.fingerprint,
            "damage": self.damage,
            "ended": self.ended,
            "refusals": {str(row): refusal for row, refusal in self.refusals.items()},
            "extensions": self.extensions,
            "lengths": {name: len(array) for name, array in arrays.items()},
        }
        line = json.dumps(header).encode()
        return line + b"\n" + hashlib.blake2b(line + payload, digest_size=16).digest() + payload

    @classmethod
    def from_bytes(cls, content: bytes) -> TarIndex:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: it is of another format, cut or altered.
        """
        line, newline, rest = content.partition(b"\n")
        seal, payload = rest[:16], rest[16:]
        if not newline or seal != hashlib.blake2b(line + payload, digest_size=16).digest():
            raise ValueError("no index, or a damaged one")
        header: dict[str, Any] = json.loads(line)
        if header["format"] != FORMAT:
            raise ValueError(f"an index of another format, {header['format']!r}")
        arrays, at = {}, 0
        for name, kind in _ARRAYS.items():
            arrays[name] = np.frombuffer(payload, kind, header["lengths"][name], at)
            at += arrays[name].nbytes
        refusals = {int(row): (where, reason) for row, (where, reason) in header["refusals"].items()}
        plain = {name: header[name] for name in ("size", "mtime_ns", "fingerprint", "damage", "ended", "extensions")}
        return cls(**plain, refusals=refusals, keys=payload[at:], **arrays)


_ARRAYS = {"key_end": "<i8", "first": "<i8", "offset": "<i8", "length": "<i8", "extension": "<i4"}


def scan_tar(path: str | Path) -> TarIndex:
    """Index a tar by its headers alone.

    A tar that is damaged, cut or no tar at all is no error: the index holds the rows before the damage and says what
    it was in ``damage``.

    Raises:
        OSError: the file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        scan = _Scan(descriptor, facts.st_size)
        for name, offset, size, refusal in scan.entries():
            scan.add(name, offset, size, refusal)
        offsets = np.array(scan.offset, np.int64)
        return scan.index(facts, offsets, fingerprint(descriptor, facts.st_size, offsets))
    finally:
        os.close(descriptor)


def fingerprint(descriptor: int, size: int, offset: np.ndarray) -> str:
    """Tells a copy of a tar from another tar of the same size: a digest of its size and of up to 64 members' headers.

    Args:
        descriptor: the open tar.
        size: its bytes.
        offset: int64 [M], where members' contents begin; each header lies just before its content.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for place in np.linspace(0, len(offset) - 1, min(64, len(offset)), dtype=np.int64):
        digest.update(os.pread(descriptor, BLOCK, int(offset[place]) - BLOCK))
    return digest.hexdigest()


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) of a member's name; None for what belongs to no sample.

    As webdataset splits, but that hidden files (``._x.jpg`` beside each file of an archive made on a Mac) are left out
    wherever they lie.
    """
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash:
        return None
    if name.startswith("__") and (_META.match(name) or (not slash and name.endswith("__"))):
        return None
    return name[:dot], name[dot + 1 :].lower()


class _Damage(Exception):
    """Why the scan cannot go on."""


class _Scan:
    """One pass over the headers of an open tar."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.damage: str | None = None
        self.ended = False
        self.refusals: dict[int, tuple[int, str]] = {}
        self.extensions: dict[str, int] = {}
        self.keys: list[bytes] = []
        self.first: list[int] = []
        self.offset: list[int] = []
        self.length: list[int] = []
        self.extension: list[int] = []
        self._key: str | None = None
        self._seen: set[str] = set()

    def entries(self) -> Iterator[tuple[str, int, int, str | None]]:
        """Name, offset and size of each file, and why it is refused, where it is."""
        position = 0
        override: dict[str, str] = {}
        try:
            while header := self._header(position):
                kind, size = header[156:157], _size(header, override)
                content = position + BLOCK
                if size < 0:
                    raise _Damage(f"the header at byte {position} claims a size below zero")
                position = content + -(-size // BLOCK) * BLOCK
                if kind in _REGULAR:
                    name = override.get("path") or _name(header)
                    if content + size > self.size:
                        reason = f"cut off: it should end at byte {content + size}, the shard ends at {self.size}"
                        yield name, content, 0, reason
                        raise _Damage(f"the shard is cut off at byte {self.size}, within {name!r}")
                    sparse = any(field.startswith("GNU.sparse.") for field in override)
                    yield name, content, size, "a sparse file" if sparse else None
                    override = {}
                elif kind == b"L":
                    override["path"] = _text(self._read(content, size).partition(b"\0")[0])
                elif kind == b"x":
                    override.update(_pax(self._read(content, size)))
                elif kind in _IGNORED:
                    # A directory may declare a size and have no content; all else is skipped with its content.
                    position = content if kind == b"5" else position
                    override = {} if kind == b"5" else override
                else:
                    position = self._after_refused(kind, header, content, position)
                    reason = _UNREADABLE.get(kind, "a sparse file" if kind == b"S" else f"of unknown type {kind!r}")
                    yield override.get("path") or _name(header), content, 0, reason
                    override = {}
        except _Damage as damage:
            self.damage = str(damage)

    def _after_refused(self, kind: bytes, header: bytes, content: int, position: int) -> int:
        """Where the next header lies: links and devices have no content, whatever size they declare."""
        if kind in _UNREADABLE:
            return content
        extended = kind == b"S" and header[482] != 0
        while extended:
            block = self._read(content, BLOCK)
            content, position, extended = content + BLOCK, position + BLOCK, block[504] != 0
        return position

    def _header(self, position: int) -> bytes | None:
        """The header at a byte, its checksum verified; None at the archive's end."""
        if position > self.size:  # by any amount: a header may claim more than an offset can say
            raise _Damage(f"the shard is cut off at byte {self.size}")
        header = os.pread(self.descriptor, BLOCK, position)
        if len(header) < BLOCK:
            if header.strip(b"\0") or not self.size:
                raise _Damage("the file is empty" if not self.size else f"the shard is cut off at byte {self.size}")
            return None
        if not header[0] and header.count(0) == BLOCK:
            self.ended = True
            return None
        if not _sums_up(header):
            what = "is damaged" if position else "is that of no tar"
            left = self.size - position
            raise _Damage(f"the header at byte {position} {what}; the {left} bytes from there on are not read")
        return header

    def _read(self, offset: int, size: int) -> bytes:
        """Content that belongs to the archive rather than to a sample."""
        if size > NAME_LIMIT:
            raise _Damage(f"a name of {size} bytes at byte {offset}")
        content = os.pread(self.descriptor, size, offset)
        if len(content) < size:
            raise _Damage(f"the shard is cut off at byte {self.size}")
        return content

    def add(self, name: str, offset: int, size: int, refusal: str | None) -> None:
        """Put a member into its row, which it opens where its key differs from the last one's."""
        split = split_name(name)
        if split is None:
            return
        key, extension = split
        if key != self._key:
            self.first.append(len(self.offset))
            self.keys.append(key.encode("utf-8", "surrogateescape"))
            self._key, self._seen = key, set()
        if refusal is None and ".." in name and ".." in name.split("/"):
            refusal = "its name leads out of the archive"
        if refusal is None and extension in self._seen:
            refusal = "a second one in the same sample"
        if refusal is not None:
            self.refusals.setdefault(len(self.keys) - 1, (offset, f"the member {name!r} is refused: {refusal}"))
            return
        self._seen.add(extension)
        self.offset.append(offset)
        self.length.append(size)
        self.extension.append(self.extensions.setdefault(extension, len(self.extensions)))

    def index(self, facts: os.stat_result, offset: np.ndarray, fingerprint: str) -> TarIndex:
        """What was found."""
        return TarIndex(
            size=facts.st_size,
            mtime_ns=facts.st_mtime_ns,
            fingerprint=fingerprint,
            damage=self.damage,
            ended=self.ended,
            refusals=self.refusals,
            extensions=list(self.extensions),
            keys=b"".join(self.keys),
            key_end=np.cumsum([len(key) for key in self.keys], dtype=np.int64),
            first=np.array([*self.first, len(self.offset)], np.int64),
            offset=offset,
            length=np.array(self.length, np.int64),
            extension=np.array(self.extension, np.int32),
        )


def _sums_up(header: bytes) -> bool:
    """Whether the checksum of a header is right.

    Adler-32's lower half is one plus the sum of all bytes, modulo 65521: a sum in C instead of a loop in Python.
    """
    field = header[148:156]
    try:
        declared = int(field[:6].rstrip(b"\0") or b"0", 8)
    except ValueError:
        try:
            declared = int(field.split(b"\0")[0], 8)
        except ValueError:
            return False
    if zlib.adler32(header) & 0xFFFF == (1 + declared + sum(field) - 8 * 32) % 65521:
        return True
    # Some old programs summed signed bytes.
    signed = np.frombuffer(header, np.int8).astype(np.int64)
    return declared == int(signed.sum() - signed[148:156].sum()) + 8 * 32


def _size(header: bytes, override: dict[str, str]) -> int:
    """Bytes of content: pax before the header's field, which is octal text, or binary where its first bit is set."""
    if "size" in override:
        digits = override["size"]
        if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
            raise _Damage(f"a pax header claims a size of {digits[:40]!r}")
        return int(digits)
    field = header[124:136]
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") if field[0] != 0xFF else -1
    try:
        return int(field[:11], 8)
    except ValueError:
        digits = field.partition(b"\0")[0].strip()
        try:
            return int(digits or b"0", 8)
        except ValueError:
            raise _Damage(f"a header claims a size of {field!r}") from None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _pax(content: bytes) -> dict[str, str]:
    """The records ``LENGTH KEY=VALUE\\n`` of a pax header; what is not of that form ends it."""
    fields: dict[str, str] = {}
    while content:
        digits, space, _ = content[:20].partition(b" ")
        if not space or not digits.isdigit():
            break
        length = int(digits)
        if length <= len(digits) + 1 or length > len(content):
            break
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if equals:
            fields[_text(key)] = _text(value)
        content = content[length:]
    return fields
