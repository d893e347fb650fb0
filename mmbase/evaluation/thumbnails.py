"""Small versions of a sample's image for reports: from a path, a PIL image or an array to PIL, and to a data URL."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmbase.errors import MmbaseError


def as_pil(image: Any) -> Image.Image:
    """RGB or RGBA picture of a path, a PIL image, or an array.

    Arrays are [H, W], [H, W, 1 | 3 | 4] or [1 | 3 | 4, H, W]; uint8, or floats in [0, 1].

    Raises:
        MmbaseError: something else, or a file that is no image.
    """
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as opened:
                return as_pil(opened.copy())
        except OSError as error:
            raise MmbaseError(f"cannot show image {str(image)!r}: {error}; give a readable image file") from error
    if isinstance(image, Image.Image):
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        return image.convert("RGBA" if transparent else "RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
        raise MmbaseError(f"cannot show an image of shape {pixels.shape}; give [H, W, 3] uint8 or a PIL image")
    if pixels.dtype != np.uint8:
        pixels = (np.nan_to_num(pixels.astype(np.float32)).clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
    return as_pil(Image.fromarray(pixels))


def thumbnail(image: Any, side: int) -> Image.Image:
    """The picture with its longer side at most ``side`` pixels; never enlarged."""
    picture = as_pil(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def data_url(image: Any, side: int = 144) -> str:
    """The thumbnail as a ``data:image/webp;base64,...`` address, to stand in a page by itself."""
    buffer = io.BytesIO()
    thumbnail(image, side).save(buffer, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
