"""Pictures for training: decoded small, cropped, then resized, as uint8.

The fast route decodes a JPEG with libjpeg-turbo (simplejpeg where it is installed, else Pillow), at 1/2, 1/4 or 1/8
where the picture is far larger than needed, cuts the box out before anything else, and resizes with torch's
antialiased bicubic filter on bytes. Everything else, and every picture that simplejpeg has a complaint about, goes
through Pillow, whose verdict counts: which pictures are refused does not depend on what is installed.

Letters: C channels (3, or 4 with alpha), H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
from PIL import Image

from mmbase.data.image import MAX_PIXELS, open_image, to_rgb

try:
    import simplejpeg as _simplejpeg
except ImportError:  # optional: describe_decoders says so
    _simplejpeg = None
simplejpeg: Any = _simplejpeg

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels, right and bottom excluded."""
ChooseBox = Callable[[int, int], Box]
"""The box of a picture of this width and height."""

SCALE_MARGIN = 1.0
"""A JPEG is decoded at 1/2, 1/4, 1/8 where that leaves the box at least so many times larger than the result.

1 is what ``draft`` means in Pillow. Against bicubic on the full picture (two photographs) the result then has 34 and 41
dB where it only just applies, 39 and 46 dB where the box is 1.5 times larger, 44 and 49 dB at 2; a bilinear filter has
37 to 42 dB."""

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_TRIES = 10


def describe_decoders() -> str:
    """Which decoders :func:`decode_training` uses here, for a run's banner."""
    others = f"others: Pillow {PIL.__version__}"
    if simplejpeg is None:
        return f"JPEG: Pillow {PIL.__version__} (scaled; pip install 'mmbase[fast]' for a faster one), {others}"
    return f"JPEG: simplejpeg {simplejpeg.__version__} (scaled), {others}"


# ------------------------------------------------------------------------------------------------- boxes


def random_box(
    rng: np.random.Generator, scale: tuple[float, float] = (0.9, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> ChooseBox:
    """Whole-pixel boxes distributed as torchvision's ``RandomResizedCrop`` has them, which OpenCLIP trains with.

    Args:
        rng: drawn from when a box is asked for, at most once per try.
        scale: share of the picture's area, lowest and highest, uniform.
        ratio: width over height, lowest and highest, uniform in its logarithm.

    Where no draw in ten fits into the picture, the largest centred box of an allowed ratio.
    """
    narrowest, widest = ratio
    log_narrow, log_range = math.log(narrowest), math.log(widest / narrowest)

    def choose(width: int, height: int) -> Box:
        # Far beyond the ratios no draw can fit; the margin covers boxes that fit by rounding.
        aspect = width / height
        hopeless = aspect * scale[0] * (1 - 2 / width) > widest or aspect * (1 + 2 / width) < narrowest * scale[0]
        for _ in range(0 if hopeless else _TRIES):
            share, shape, x, y = rng.random(4).tolist()
            area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
            aspect = math.exp(log_narrow + log_range * shape)
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                left, top = int(x * (width - box_width + 1)), int(y * (height - box_height + 1))
                return left, top, left + box_width, top + box_height
        box_width, box_height = width, height
        if width < narrowest * height:
            box_height = max(1, round(width / narrowest))
        elif width > widest * height:
            box_width = max(1, round(height * widest))
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return left, top, left + box_width, top + box_height

    return choose


def covering_box(rng: np.random.Generator, scale: tuple[float, float] = (0.9, 1.0), aspect: float = 1.0) -> ChooseBox:
    """Boxes of one aspect (width over height): a uniform share of the area of the largest such box, placed anywhere."""
    share, x, y = rng.random(3).tolist()
    return lambda width, height: _placed(width, height, aspect, scale[0] + (scale[1] - scale[0]) * share, x, y)


def _placed(width: int, height: int, aspect: float, share: float, x: float, y: float) -> Box:
    box_height = min(width / aspect, height) * math.sqrt(share)
    box_width = box_height * aspect
    left, top = max((width - box_width) * x, 0.0), max((height - box_height) * y, 0.0)
    # rounding may leave the picture by a hair, which Pillow refuses
    return left, top, min(left + box_width, width), min(top + box_height, height)


# ---------------------------------------------------------------------------------------------- decoding


def decode_training(
    data: bytes, size: tuple[int, int], *, box: ChooseBox | None = None, fast: bool = True, exif: bool = False
) -> np.ndarray:
    """Pixels uint8 [3, H, W], or [4, H, W] where any pixel is transparent; in memory the channels may lie last.

    Args:
        data: an encoded picture; of an animation, the first frame.
        size: (H, W) of the result.
        box: which part of the picture; default: the largest centred one of the result's aspect.
        fast: whole-pixel boxes, scaled decoding, fast inverse DCT and chroma upsampling, torch's resize. Where nothing
            is scaled, that is within 1.1 levels of 255 of the exact pixels on average (44 dB; encoding a picture again
            at quality 85 costs as much). Else Pillow's bicubic on the fully decoded picture: what torchvision's crop
            and resize give for a whole-pixel box.
        exif: turn the picture as its camera noted; OpenCLIP does not.

    Deep pictures and transparency are treated as :func:`mmbase.data.image.open_image` does; transparent pixels do not
    bleed their hidden colour into others.

    Raises:
        MmbaseError: one line on why the picture cannot be used: empty, corrupt, truncated, too many pixels, ...
    """
    height, width = size
    choose: ChooseBox = box or (lambda w, h: _placed(w, h, width / height, 1.0, 0.5, 0.5))
    if fast and simplejpeg is not None and data[:3] == b"\xff\xd8\xff" and not (exif and b"Exif\0\0" in data[:65536]):
        pixels = _decode_jpeg(data, size, choose)
        if pixels is not None:
            return pixels
    return _decode_any(data, size, choose, fast, exif)


def _decode_jpeg(data: bytes, size: tuple[int, int], choose: ChooseBox) -> np.ndarray | None:
    """The fast route; ``None`` where simplejpeg has any complaint or the colours are not RGB or grey."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray") or not 0 < width * height <= MAX_PIXELS:
            return None
        chosen = choose(width, height)
        factor = _factor(chosen, size)
        least = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
        pixels_HWC = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True, **least)
    except ValueError:
        return None
    return _resized(pixels_HWC, _whole(chosen, (width, height), pixels_HWC.shape[1::-1]), size)


def _decode_any(data: bytes, size: tuple[int, int], choose: ChooseBox, fast: bool, exif: bool) -> np.ndarray:
    original: list[tuple[int, int]] = []
    chosen: list[Box] = []

    def prepare(image: Image.Image) -> None:
        """Choose the box on the size as the picture will be seen, then have the decoder scale where it can."""
        turned = exif and image.getexif().get(_ORIENTATION) in _SIDEWAYS
        seen = image.size[::-1] if turned else image.size
        original.append(seen)
        chosen.append(choose(*seen))
        if fast and (factor := _factor(chosen[0], size)) > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))

    image = _opaque_where_possible(open_image(data, exif=exif, prepare=prepare))
    if fast and image.mode == "RGB":
        box = _whole(chosen[0], original[0], image.size)
        return _resized(np.array(image.crop(box)), (0, 0, box[2] - box[0], box[3] - box[1]), size)
    return _resized_by_pillow(image, chosen[0], original[0], size)


def _opaque_where_possible(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return to_rgb(image)
    image = image.convert("RGBA")
    return image.convert("RGB") if image.getchannel("A").getextrema() == (255, 255) else image


def _factor(box: Box, size: tuple[int, int]) -> int:
    """How many times smaller the picture may be decoded."""
    larger = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / SCALE_MARGIN
    return 1 if larger < 2 else 2 if larger < 4 else 4 if larger < 8 else 8


def _whole(box: Box, original: tuple[int, int], decoded: tuple[int, int]) -> tuple[int, int, int, int]:
    """``box`` of a picture of ``original`` width and height in whole pixels, at least one, of the decoded one."""
    scale_x, scale_y = decoded[0] / original[0], decoded[1] / original[1]
    left, top = min(round(box[0] * scale_x), decoded[0] - 1), min(round(box[1] * scale_y), decoded[1] - 1)
    right, bottom = min(round(box[2] * scale_x), decoded[0]), min(round(box[3] * scale_y), decoded[1])
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _resized(pixels_HWC: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    import torch  # here, so that whoever only names what this module holds does not load it
    from torch.nn.functional import interpolate

    left, top, right, bottom = box
    crop_HWC = np.ascontiguousarray(pixels_HWC[top:bottom, left:right])
    # the batch axis is added before the channels move: only then does torch see channels last and keep them so
    image_1CHW = torch.from_numpy(crop_HWC)[None].permute(0, 3, 1, 2)
    return interpolate(image_1CHW, size, mode="bicubic", antialias=True)[0].numpy()


def _resized_by_pillow(image: Image.Image, box: Box, original: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    if image.size != original:
        scale_x, scale_y = image.width / original[0], image.height / original[1]
        left, top = box[0] * scale_x, box[1] * scale_y
        box = left, top, min(box[2] * scale_x, image.width), min(box[3] * scale_y, image.height)
    target, bicubic = (size[1], size[0]), Image.Resampling.BICUBIC
    if all(float(edge).is_integer() for edge in box):  # cut first, so that nothing outside the box has a say
        left, top, right, bottom = map(int, box)
        resized = image.crop((left, top, right, bottom)).resize(target, bicubic)
    else:
        resized = image.resize(target, bicubic, box=box)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
