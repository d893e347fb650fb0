"""One picture made ready for a shard: checked, turned upright, resized, encoded, and its fingerprints taken."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from mmbase.data.image import open_image, to_rgb
from mmbase.data.perceptual import signature
from mmbase.errors import MmbaseError

Encoding = Literal["auto", "jpg", "png", "webp"]
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
_LARGEST_FILE = 1 << 30


class PictureConfig(BaseModel):
    """How pictures lie in the shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int | None = Field(
        None, ge=8, description="side in pixels that larger pictures are shrunk to, never enlarged; null: as they are"
    )
    resize: Literal["shortest", "longest", "square"] = Field(
        "shortest", description="which side becomes size; square: the centre is cut out first"
    )
    format: Encoding = Field(
        "auto",
        description="auto: the bytes as they are where nothing is changed, else JPEG, or WebP where there is "
        "transparency; jpg, png or webp: all in that one",
    )
    quality: int = Field(90, ge=1, le=100, description="of JPEG and WebP; of WebP, 100 is lossless")
    min_side: int = Field(1, ge=1, description="pictures whose shorter side is below this are left out")
    upright: bool = Field(
        True, description="turn pictures as their camera noted, which OpenCLIP's loader and ours ignore"
    )


class Prepared(NamedTuple):
    """What of a picture goes into a shard."""

    data: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int
    digest: bytes
    """16 bytes of BLAKE2b of the file as it was found."""
    signature: bytes | None
    """See perceptual.py; only where asked for."""


def prepare_picture(source: bytes | Path, config: PictureConfig, *, sign: bool = False) -> Prepared:
    """Read, check and encode one picture; a pure function of its bytes and ``config``.

    Raises:
        MmbaseError: missing, empty, corrupt or absurdly large file, a picture below ``config.min_side``.
    """
    data = source if isinstance(source, bytes) else _read(source)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    found, turned, animated = _header(data)
    image = open_image(data, exif=config.upright)
    original = image.size
    if min(original) < config.min_side:
        raise MmbaseError(f"smaller than min_side={config.min_side}: {original[0]} x {original[1]} pixels")
    small = _resized(image, config)
    changed = small is not image or (turned and config.upright) or animated
    if config.format == "auto" and found in _KEPT and not changed:
        extension = _KEPT[found]
    else:
        extension = config.format if config.format != "auto" else "webp" if _is_transparent(small) else "jpg"
        data = _encoded(small, extension, config.quality)
    return Prepared(
        data=data,
        extension=extension,
        width=small.width,
        height=small.height,
        original_width=original[0],
        original_height=original[1],
        digest=digest,
        signature=signature(small) if sign else None,
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_FILE:
                raise MmbaseError(f"the file has {size / 2**30:.1f} GiB, above the limit of 1 GiB")
            return file.read()
    except OSError as error:
        raise MmbaseError(f"the file {str(path)!r} cannot be read: {error.strerror or error}") from error


def _header(data: bytes) -> tuple[str | None, bool, bool]:
    """Format, whether the camera was turned, whether it is animated; unreadable pictures are left to open_image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
            return image.format, turned, getattr(image, "n_frames", 1) > 1
    except Exception:  # Pillow raises many kinds on broken data; open_image says what is wrong
        return None, False, False


def _resized(image: Image.Image, config: PictureConfig) -> Image.Image:
    """``image`` itself where it is small enough already."""
    if config.size is None:
        return image
    if config.resize == "square" and image.width != image.height:
        side = min(image.size)
        target = min(side, config.size)
        return ImageOps.fit(_smooth(image), (target, target), Image.Resampling.BICUBIC)
    reference = max(image.size) if config.resize == "longest" else min(image.size)
    if reference <= config.size:
        return image
    width, height = (max(1, round(side * config.size / reference)) for side in image.size)
    return _smooth(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _smooth(image: Image.Image) -> Image.Image:
    """In a mode that can be resampled: palettes and single bits cannot."""
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else to_rgb(image)


def _is_transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _encoded(image: Image.Image, extension: str, quality: int) -> bytes:
    """The picture as a file without metadata; JPEG shows transparency on white."""
    if extension == "jpg":
        image = to_rgb(image, "white") if image.mode != "L" else image
        return _saved(image, format="JPEG", quality=quality, optimize=True)
    image = image.convert("RGBA") if _is_transparent(image) else image if image.mode == "L" else to_rgb(image)
    if extension == "png":
        return _saved(image, format="PNG", compress_level=6)
    return _saved(image, format="WEBP", quality=quality, method=4, lossless=quality == 100, exact=False)


def _saved(image: Image.Image, **options: Any) -> bytes:
    bare = image.copy()
    bare.info = {}
    with _scratch() as file:
        bare.save(file, **options)
        file.seek(0)
        return file.read()


@contextmanager
def _scratch() -> Iterator[IO[bytes]]:
    """A file in memory with a number of its own: Pillow lets other threads run while it encodes to one."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("mmbase"), "w+b") as file:
            yield file
    else:
        with tempfile.TemporaryFile() as file:
            yield file
