"""Shards on anything fsspec knows: S3, Google Cloud Storage, Azure, SFTP, ...; every call to it has an end."""

from __future__ import annotations

import base64
import binascii
import datetime
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from mmbase.data.cache_config import CacheConfig
from mmbase.data.checksums import told_by
from mmbase.data.remote import Facts, Interrupted, Transfer, Unavailable
from mmbase.data.shard_list import scheme_of
from mmbase.errors import MmbaseError

SMALLEST, LARGEST = 1 << 20, 16 << 20
"""Bytes asked for at a time: more as long as they come quickly."""
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, KeyError, TypeError)
FINAL_NAMES = frozenset({"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"})
"""Errors of botocore that no further try changes, by name, since it need not be installed."""

Result = TypeVar("Result")


class FsspecSource:
    """One file of a file system that fsspec opens."""

    def __init__(self, url: str, config: CacheConfig) -> None:
        self.url, self.config = url, config
        self._opened: tuple[Any, str] | None = None

    def open(self, offset: int, validator: str | None) -> Transfer:
        """Begin at a byte; see :class:`mmbase.data.remote.Source`."""
        facts = self.facts()
        if facts.size is None:
            raise Unavailable(f"{scheme_of(self.url)}: tells no size")
        start = offset if validator is None or validator == facts.validator else 0
        return Transfer(facts, start, self._pieces(start, facts))

    def facts(self) -> Facts:
        """Size, date and checksums."""
        file_system, path = self._file_system()
        info = self._bounded(lambda: file_system.info(path), "what the server knows of the file")
        if info.get("type") == "directory":
            raise Unavailable("it is a folder")
        validator = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime")
        modified = info.get("LastModified") or info.get("updated") or info.get("last_modified") or info.get("mtime")
        validator = str(validator or modified or "") or None
        return Facts(info.get("size"), validator, _nanoseconds(modified), self._checksums(info))

    def listing(self) -> list[str]:
        """URLs of the files in this folder, in name order."""
        file_system, path = self._file_system()
        found = self._bounded(lambda: file_system.ls(path, detail=False), "a list of the folder")
        return sorted(file_system.unstrip_protocol(name) for name in found)

    def _pieces(self, start: int, facts: Facts) -> Generator[bytes, None, None]:
        file_system, path = self._file_system()
        size, at, ask = facts.size or 0, start, SMALLEST
        while at < size:
            end = min(at + ask, size)
            begun = time.monotonic()
            # By keyword: s3fs has the version where others have the start.
            piece = self._bounded(lambda b=at, e=end: file_system.cat_file(path, start=b, end=e), f"bytes {at}-{end}")
            if len(piece) != end - at:
                raise Interrupted(f"cut: {len(piece)} of {end - at} bytes from byte {at}")
            yield piece
            at = end
            quick = time.monotonic() - begun < self.config.stall_timeout / 8
            ask = min(2 * ask, LARGEST) if quick else SMALLEST
        if start < size and not facts.checksums and self.facts().validator != facts.validator:
            raise Interrupted("changed while it was read")

    def _file_system(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec

            try:
                # An instance of our own: those that fsspec shares must not cross a fork, nor a time-out.
                options = {"skip_instance_cache": True, "use_listings_cache": False, **self.config.storage_options}
                file_system, path = fsspec.url_to_fs(self.url, **options)
            except ImportError as error:
                raise MmbaseError(f"{self.url!r} needs another package: {_one_line(error)}") from error
            except ValueError as error:
                raise MmbaseError(f"{self.url!r} is of no kind that fsspec knows: {_one_line(error)}") from error
            self._opened = file_system, path
        return self._opened

    def _checksums(self, info: dict[str, Any]) -> dict[str, bytes]:
        """MD5 as Google and Azure tell it; for S3 what the object's own headers say."""
        for name in ("md5Hash", "content_md5"):
            try:
                digest = base64.b64decode(info.get(name) or "", validate=True)
            except (binascii.Error, ValueError, TypeError):
                continue
            if len(digest) == 16:
                return {"md5": digest}
        file_system, path = self._file_system()
        kinds = file_system.protocol
        if "s3" not in ([kinds] if isinstance(kinds, str) else kinds):
            return {}
        bucket, _, key = path.partition("/")
        ask = {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED"}
        try:
            answer = self._bounded(lambda: file_system.call_s3("head_object", **ask), "checksums")
        except Unavailable:
            return {}  # a store that knows no ChecksumMode
        return told_by(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}))

    def _bounded(self, call: Callable[[], Result], what: str) -> Result:
        """The result of a call that may hang: done in a thread, which is left behind when its time is up."""
        seconds = self.config.first_byte_timeout
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.extend((True, call()))
            except BaseException as error:
                outcome.extend((False, error))

        thread = threading.Thread(target=run, name="mmbase-fsspec", daemon=True)
        thread.start()
        thread.join(seconds)
        if not outcome or thread.is_alive():
            self._opened = None  # its connections may be stuck as well
            raise Interrupted(f"timed out: waited {seconds:g} s for {what}")
        done, value = outcome
        if done:
            return value
        if isinstance(value, MmbaseError):
            raise value
        reason = f"{type(value).__name__}: {_one_line(value)}"
        if isinstance(value, FINAL) or type(value).__name__ in FINAL_NAMES:
            raise Unavailable(reason) from value
        raise Interrupted(f"failed: {reason}") from value


def _nanoseconds(moment: Any) -> int | None:
    if isinstance(moment, str):
        try:
            moment = datetime.datetime.fromisoformat(moment)
        except ValueError:
            return None
    if isinstance(moment, datetime.datetime):
        moment = moment.timestamp()
    return int(moment) * 10**9 if isinstance(moment, (int, float)) else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
