"""Checksums that servers tell of a whole file, and whether the bytes that came agree."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ORDER = ("sha256", "sha1", "md5", "crc32c", "crc32")
"""The first of these that is told, and that can be computed here, is verified."""


def told_by(headers: Mapping[str, str]) -> dict[str, bytes]:
    """Checksums in the headers of an HTTP answer or of an S3 object: algorithm -> digest of the whole file.

    Content-MD5, x-goog-hash, x-amz-checksum-*; an ETag only where an S3 server says it, and where it is an MD5 there:
    of one part, not encrypted with a key of the customer's or of KMS.
    """
    told = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    found: dict[str, bytes | None] = {}
    if "content-md5" in told and "content-range" not in told:
        found["md5"] = _base64(told["content-md5"], 16)
    for entry in told.get("x-goog-hash", "").split(","):
        name, _, digest = entry.strip().partition("=")
        if name in ("md5", "crc32c"):
            found[name] = _base64(digest, 16 if name == "md5" else 4)
    if told.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
        for name, length in (("sha256", 32), ("sha1", 20), ("crc32c", 4), ("crc32", 4)):
            if "-" not in told.get(f"x-amz-checksum-{name}", "-"):
                found[name] = _base64(told[f"x-amz-checksum-{name}"], length)
    etag = told.get("etag", "").strip('"')
    encrypted = told.get("x-amz-server-side-encryption", "AES256") != "AES256"
    customer = "x-amz-server-side-encryption-customer-algorithm" in told
    if "x-amz-request-id" in told and re.fullmatch(r"[0-9a-f]{32}", etag) and not encrypted and not customer:
        found.setdefault("md5", bytes.fromhex(etag))
    return {name: digest for name, digest in found.items() if digest is not None}


def verify(blocks: Iterable[bytes], checksums: Mapping[str, bytes]) -> str | None:
    """What is wrong with a content by the strongest checksum that is told and can be computed here; None: nothing."""
    for name in ORDER:
        digest = _digest(name) if name in checksums else None
        if digest is None:
            continue
        size = 0
        for block in blocks:
            digest.update(block)
            size += len(block)
        found, told = digest.digest(), checksums[name]
        return None if found == told else f"checksum of {size} bytes is {name} {found.hex()}, not {told.hex()} as told"
    return None


def blocks_of(path: Path) -> Iterator[bytes]:
    """The content of a file, a mebibyte at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


class _Crc32:
    def __init__(self) -> None:
        self.value = 0

    def update(self, block: bytes) -> None:
        self.value = zlib.crc32(block, self.value)

    def digest(self) -> bytes:
        return self.value.to_bytes(4, "big")


def _digest(name: str) -> Any:
    """An object with update and digest; None where this Python lacks the algorithm."""
    if name == "crc32":
        return _Crc32()
    if name == "crc32c":
        try:
            import google_crc32c  # pyrefly: ignore[missing-import]  (comes with gcsfs)
        except ImportError:
            return None
        return google_crc32c.Checksum()
    make: Callable[..., Any] = getattr(hashlib, name)
    return make(usedforsecurity=False)


def _base64(text: str, length: int) -> bytes | None:
    try:
        digest = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    return digest if len(digest) == length else None
