"""A sample as it lies in a shard, still encoded, and the one fault that anything wrong with it becomes."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class RawSample(NamedTuple):
    """The members of one sample, read and not decoded."""

    key: str
    members: dict[str, bytes]
    """extension without its dot, in lower case -> content"""
    shard: str
    """path or URL, as the shard list names it"""
    offset: int
    """byte at which the sample's first member begins in the (uncompressed) tar"""


class SampleFault(Exception):
    """A sample that cannot be had, whatever the cause: damaged, refused, on a shard that is gone."""

    def __init__(self, shard: str, key: str, offset: int, reason: str) -> None:
        super().__init__(shard, key, offset, reason)
        self.shard, self.key, self.offset, self.reason = shard, key, offset, reason

    def __str__(self) -> str:
        return f"sample {self.key!r} of {self.shard!r} at byte {self.offset}: {self.reason}"


def fields_of(raw: RawSample, caption_field: str | None = None) -> dict[str, Any]:
    """What the text members of a sample say: the JSON member's fields, and ``txt`` as ``"caption"``.

    Args:
        raw: the sample.
        caption_field: a field that must be there; None asks for none.

    Raises:
        SampleFault: JSON that is broken or no object, text that is not UTF-8, no ``caption_field``.
    """
    fields: dict[str, Any] = {}
    if "json" in raw.members:
        try:
            loaded = json.loads(raw.members["json"])
        except (ValueError, RecursionError) as error:
            raise SampleFault(raw.shard, raw.key, raw.offset, f"broken .json: {_one_line(error)}") from None
        if not isinstance(loaded, dict):
            reason = f"the .json holds a {type(loaded).__name__}, not fields"
            raise SampleFault(raw.shard, raw.key, raw.offset, reason)
        fields = loaded
    if "txt" in raw.members:
        try:
            fields["caption"] = raw.members["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            reason = f"the caption is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})"
            raise SampleFault(raw.shard, raw.key, raw.offset, reason) from None
    if caption_field is not None and caption_field not in fields:
        raise SampleFault(raw.shard, raw.key, raw.offset, f"no caption: neither .txt nor the field {caption_field!r}")
    return fields


def image_of(raw: RawSample) -> bytes:
    """The encoded picture of a sample.

    Raises:
        SampleFault: it has none.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in raw.members:
            return raw.members[extension]
    found = ", ".join(sorted(raw.members)) or "nothing"
    raise SampleFault(raw.shard, raw.key, raw.offset, f"no picture: it holds {found}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
