"""Pictures to uint8 pixels: opening anything a user has, and the transform a model is evaluated with.

Letters in comments: B batch, C channels, H height, W width. Arrays are channels first, uint8; normalising to
float is a step of its own, done on the device when training. Pillow and numpy only: nothing here loads torch.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mmbase.errors import MmbaseError

MAX_PIXELS = 89_478_485
"""Largest picture decoded, in pixels: 256 MiB as RGB, Pillow's own threshold for a decompression bomb."""

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "random": Image.Resampling.BICUBIC,  # as in OpenCLIP, which draws a filter in training only
}


class PreprocessConfig(BaseModel):
    """How a picture becomes the input of a model; the defaults are OpenCLIP's ``PreprocessCfg``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int | tuple[int, int] = Field(224, description="side of the square input, or (height, width), in pixels")
    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="per channel (RGB), subtracted from pixels in 0..1"
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="per channel, what pixels are divided by after the mean"
    )
    interpolation: Literal["bicubic", "bilinear", "nearest", "random"] = Field(
        "bicubic", description="filter of the resize, antialiased; random is bicubic in evaluation"
    )
    resize_mode: Literal["shortest", "longest", "squash"] = Field(
        "shortest", description="shortest: cover and cut the centre; longest: fit and pad; squash: stretch"
    )
    fill_color: int = Field(0, ge=0, le=255, description="grey value of the padding of resize_mode longest")
    alpha: Literal["drop", "white", "black"] = Field(
        "drop", description="transparency: drop it as OpenCLIP does, or put the picture on white or black"
    )

    @field_validator("size")
    @classmethod
    def _positive(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError(f"must be at least 1 pixel, not {size}")
        return size

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) * 3 if isinstance(value, int | float) else value

    @field_validator("std")
    @classmethod
    def _divisor(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError(f"must be above 0, not {std}")
        return std

    @property
    def height_width(self) -> tuple[int, int]:
        """(H, W) of the model's input."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


# ----------------------------------------------------------------------------------------------- opening


def open_image(
    source: Any,
    *,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    prepare: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """A decoded 8-bit picture from whatever a user has; of an animation, the first frame.

    ``source``: a path, the bytes of an image file, an open binary file, a ``PIL.Image``, a numpy array (HW or
    HWC with 1, 3 or 4 channels) or a torch tensor (HW or CHW); arrays and tensors hold uint8, or floats in 0..1.

    The mode is the file's own (``P``, ``CMYK``, ``LA``, ...), since OpenCLIP resizes before it converts; pixels
    deeper than 8 bits are scaled down to grey ``L`` (Pillow, and so OpenCLIP, would clip them to white).
    ``exif=True`` turns the picture as its camera noted; OpenCLIP does not. ``prepare`` is called when the size is known
    and within the limit, and no pixel decoded yet.

    Raises:
        MmbaseError: missing, empty, corrupt or truncated file, more than ``max_pixels``, or a wrong array.
    """
    if isinstance(source, Image.Image):
        return _finish(source, "the picture", exif, max_pixels, prepare)
    if isinstance(source, np.ndarray):
        return _from_array(source, "HWC")
    if type(source).__module__.split(".")[0] == "torch" and hasattr(source, "detach"):
        tensor = source.detach().cpu()
        return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), "CHW")
    if isinstance(source, bytes | bytearray | memoryview):
        name, file = f"the picture of {len(source)} bytes", io.BytesIO(source)
        if not len(source):
            raise MmbaseError("an empty picture: 0 bytes; check where it was read")
    elif isinstance(source, str | os.PathLike):
        name, file = repr(os.fspath(source)), _readable(Path(source))
    elif hasattr(source, "read"):
        name, file = repr(getattr(source, "name", "the open file")), source
    else:
        raise MmbaseError(
            f"cannot read a picture from {type(source).__name__}; give a path, bytes, a file, PIL, numpy or torch"
        )
    try:
        return _finish(Image.open(file), name, exif, max_pixels, prepare)
    except MmbaseError:
        raise
    except Image.DecompressionBombError as error:
        raise MmbaseError(f"{name} is too large to decode: {error}") from error
    except UnidentifiedImageError as error:
        raise MmbaseError(f"{name} is not a picture that Pillow can read; check the file") from error
    except Exception as error:  # on broken data Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise MmbaseError(f"{name} is corrupt or truncated: {_one_line(error)}") from error
    finally:
        if isinstance(source, str | os.PathLike):
            file.close()


def _readable(path: Path) -> Any:
    if path.is_dir():
        raise MmbaseError(f"{str(path)!r} is a folder, not a picture; give the files in it")
    try:
        file = path.open("rb")
    except OSError as error:
        raise MmbaseError(f"cannot open the picture {str(path)!r}: {error.strerror}; check the path") from error
    if not os.fstat(file.fileno()).st_size and path.is_file():
        file.close()
        raise MmbaseError(f"{str(path)!r} is an empty file, not a picture")
    return file


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _finish(
    image: Image.Image, name: str, exif: bool, max_pixels: int, prepare: Callable[[Image.Image], None] | None
) -> Image.Image:
    """``image`` decoded, checked and brought to 8 bits; the size is checked before any pixel is decoded."""
    width, height = image.size
    if width * height > max_pixels:
        raise MmbaseError(f"{name} has {width} x {height} pixels, above the limit of {max_pixels}; make it smaller")
    if not width * height:
        raise MmbaseError(f"{name} has no pixels: {width} x {height}")
    if prepare:
        prepare(image)
    try:
        image.load()
    except OSError as error:
        raise MmbaseError(f"{name} is corrupt or truncated: {_one_line(error)}") from error
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBa", "La"):
        return image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_8_bits(image)
    return image


def _deep_to_8_bits(image: Image.Image) -> Image.Image:
    """16 bits by 1/257, floats in 0..1 by 255; integers and floats of 8-bit range as they are."""
    values_HW = np.nan_to_num(np.asarray(image).astype(np.float64))
    highest = values_HW.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and highest > 255):
        values_HW = values_HW / 257
    elif image.mode == "F" and highest <= 1:
        values_HW = values_HW * 255
    return Image.fromarray(np.rint(values_HW.clip(0, 255)).astype(np.uint8))


def _from_array(array: np.ndarray, layout: Literal["HWC", "CHW"]) -> Image.Image:
    """A picture from an array in ``layout``, or a grey one from HW."""
    given = f"{'numpy array' if layout == 'HWC' else 'tensor'} of shape {tuple(array.shape)} and type {array.dtype}"
    channels_last = np.moveaxis(array, 0, -1) if layout == "CHW" and array.ndim == 3 else array
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and channels_last.shape[-1] not in (1, 3, 4)):
        raise MmbaseError(f"a {given} is not one picture; expected {layout} with 1, 3 or 4 channels, or HW")
    if array.dtype.kind == "f":
        lowest, highest = float(channels_last.min()), float(channels_last.max())
        if not (lowest >= 0.0 and highest <= 1.0):  # NaN fails too
            raise MmbaseError(
                f"a {given} has values in {lowest:g}..{highest:g}; floats must be within 0..1, or pass uint8"
            )
        channels_last = np.rint(channels_last.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MmbaseError(f"a {given} is not uint8 or float; convert it to uint8 (0..255) or float (0..1)")
    if channels_last.ndim == 3 and channels_last.shape[-1] == 1:
        channels_last = channels_last[..., 0]
    return Image.fromarray(np.ascontiguousarray(channels_last))


def to_rgb(image: Image.Image, alpha: Literal["drop", "white", "black"] = "drop") -> Image.Image:
    """``image`` as RGB: its transparency dropped (``PIL.Image.convert``), or composited on white or black."""
    if alpha != "drop" and image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, alpha), layer).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise MmbaseError(f"a picture of mode {image.mode} cannot become RGB; convert it first") from error


# --------------------------------------------------------------------------------------------- evaluation


def eval_transform(image: Any, config: PreprocessConfig) -> np.ndarray:
    """Pixels uint8 [3, H, W] that a model is evaluated on; equal to OpenCLIP's ``image_transform_v2`` up to ``/ 255``.

    ``image``: anything :func:`open_image` takes. OpenCLIP's order is kept: resize and crop in the picture's own
    mode, convert to RGB last; only with ``alpha`` white or black is the picture composited first. For a target
    that is not square, ``resize_mode="shortest"`` is bicubic whatever the config says, as in OpenCLIP.
    """
    image = open_image(image)
    if config.alpha != "drop":
        image = to_rgb(image, config.alpha)
    height, width = config.height_width
    resample = _FILTERS[config.interpolation]
    fill = 0
    if config.resize_mode == "squash":
        size = (width, height)
    elif config.resize_mode == "longest":
        size, fill = _scaled(image.size, height, width, max), config.fill_color
    elif height == width:
        shorter, longer = sorted(image.size)
        long_side = int(height * longer / shorter)  # torchvision rounds down, where the other branches round
        size = (height, long_side) if image.width <= image.height else (long_side, height)
    else:
        size, resample = _scaled(image.size, height, width, min), _FILTERS["bicubic"]
    if size[0] * size[1] > MAX_PIXELS:
        raise MmbaseError(
            f"a picture of {image.width} x {image.height} pixels is too thin to cover {width} x {height}; cut it"
        )
    return _channels_first(to_rgb(_centre(image.resize(size, resample), height, width, fill)))


def _scaled(size: tuple[int, int], height: int, width: int, pick: Any) -> tuple[int, int]:
    """(W, H) with the aspect kept, so that the ``pick`` (max: fitting, min: covering) side meets its target."""
    ratio = pick(size[1] / height, size[0] / width)
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _centre(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    """The central ``height`` x ``width`` pixels; what is missing is padded with ``fill`` in every band."""
    if image.width < width or image.height < height:
        padded_size = max(image.width, width), max(image.height, height)
        bands = len(image.getbands())
        padded = Image.new(image.mode, padded_size, fill if bands == 1 else (fill,) * bands)
        if image.mode == "P":
            padded.putpalette(image.getpalette("RGB") or b"")
        padded.paste(image, ((padded_size[0] - image.width) // 2, (padded_size[1] - image.height) // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def normalise(image: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """float32 of uint8 pixels [..., 3, H, W]: ``(x / 255 - mean) / std`` per channel."""
    mean, std = (np.array(value, np.float32)[:, None, None] for value in (config.mean, config.std))
    return (image.astype(np.float32) / np.float32(255) - mean) / std


def load_batch(images: Sequence[Any], config: PreprocessConfig, threads: int = 0) -> np.ndarray:
    """Pixels uint8 [B, 3, H, W] of ``images`` (anything :func:`open_image` takes), in ``threads`` threads if above 1.

    Pillow gives up the interpreter lock while it decodes and resizes, so threads help on several cores.
    """
    batch = np.empty((len(images), 3, *config.height_width), np.uint8)

    def load(index: int) -> None:
        batch[index] = eval_transform(images[index], config)

    if threads > 1 and len(images) > 1:
        with ThreadPoolExecutor(min(threads, len(images))) as pool:
            list(pool.map(load, range(len(images))))
    else:
        for index in range(len(images)):
            load(index)
    return batch
