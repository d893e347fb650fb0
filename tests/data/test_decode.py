"""Decoding for training: the fast route against the exact one, boxes, and every kind of bad or odd picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter, ImageOps

from mmbase.data import decode
from mmbase.data.decode import covering_box, decode_training, describe_decoders, random_box
from mmbase.errors import MmbaseError


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: smooth colours with soft detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).filter(ImageFilter.GaussianBlur(2))
    return Image.blend(coarse, noise, 0.3)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def error_of(data: bytes, **options) -> str:
    with pytest.raises(MmbaseError) as caught:
        decode_training(data, (16, 16), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    """Both ways to decode a JPEG."""
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


# -------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("size", [(224, 224), (96, 128)])
def test_exact_pixels_are_torchvisions_crop_and_resize(size):
    functional = pytest.importorskip("torchvision.transforms.functional")
    picture = photo(401, 330)
    data = encoded(picture)
    rng = np.random.default_rng(0)
    for _ in range(4):
        left, top, right, bottom = box = random_box(rng)(401, 330)
        ours = decode_training(data, size, box=lambda *_, box=box: box, fast=False)
        theirs = functional.resized_crop(
            Image.open(io.BytesIO(data)), top, left, bottom - top, right - left, list(size),
            functional.InterpolationMode.BICUBIC,
        )  # fmt: skip
        np.testing.assert_array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height", "mean", "most"), [(401, 330, 1.5, 24), (1500, 1200, 2.0, 30)])
def test_fast_pixels_are_close_to_exact_ones(decoder, width, height, mean, most):
    data = encoded(photo(width, height), quality=90)
    box = random_box(np.random.default_rng(1))(width, height)
    exact, fast = (decode_training(data, (224, 224), box=lambda *_: box, fast=f).astype(int) for f in (False, True))
    difference = np.abs(exact - fast)
    assert difference.mean() < mean and difference.max() <= most
    assert decode_training(data, (224, 224)).shape == (3, 224, 224)


def test_the_result_lies_channels_last_and_is_the_callers_own():
    data = encoded(photo(300, 260))
    first, second = decode_training(data, (64, 64)), decode_training(data, (64, 64))
    assert first.dtype == np.uint8 and first.transpose(1, 2, 0).flags.c_contiguous
    kept = second.copy()
    first[:] = 0
    np.testing.assert_array_equal(second, kept)


@pytest.mark.parametrize(
    ("width", "target", "factor"), [(300, 224, 1), (447, 224, 1), (448, 224, 2), (896, 224, 4), (1792, 224, 8)]
)
def test_a_jpeg_is_decoded_smaller_but_never_smaller_than_the_result(width, target, factor, monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    shapes = []

    class Spy:
        decode_jpeg_header = staticmethod(simplejpeg.decode_jpeg_header)

        @staticmethod
        def decode_jpeg(data, **options):
            pixels = simplejpeg.decode_jpeg(data, **options)
            shapes.append(pixels.shape)
            return pixels

    monkeypatch.setattr(decode, "simplejpeg", Spy)
    decode_training(encoded(Image.new("RGB", (width, width), (9, 99, 199))), (target, target))
    assert shapes == [(width // factor, width // factor, 3)]


def test_scaled_boxes_show_the_same_part(decoder):
    ramp = np.zeros((1200, 1600, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 1600), np.linspace(0, 255, 1200)[:, None]
    data = encoded(Image.fromarray(ramp), quality=95)
    fast = decode_training(data, (50, 50), box=lambda w, h: (w // 2, h // 4, w, 3 * h // 4)).astype(int)
    assert abs(fast[0, 25, 0] - 128) <= 4 and abs(fast[0, 25, -1] - 254) <= 4
    assert abs(fast[1, 0, 25] - 65) <= 4 and abs(fast[1, -1, 25] - 190) <= 4


def test_every_size_and_box_works(decoder):
    rng = np.random.default_rng(3)
    for _ in range(120):
        width, height, out_height, out_width = rng.integers(1, 60, 4).tolist()
        data = encoded(Image.new("RGB", (width, height), (10, 20, 30)), ("JPEG", "BMP")[width % 2], quality=95)
        for box in (None, random_box(rng, (0.01, 1.0)), covering_box(rng, (0.01, 1.0), out_width / out_height)):
            for fast in (True, False):
                pixels = decode_training(data, (out_height, out_width), box=box, fast=fast).astype(int)
                assert pixels.shape == (3, out_height, out_width)
                assert np.abs(pixels - np.array([10, 20, 30])[:, None, None]).max() <= 4


# ------------------------------------------------------------------------------------------------ boxes


def test_random_boxes_have_torchvisions_distribution():
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for width, height, scale, ratio in [(400, 330, (0.9, 1), (3 / 4, 4 / 3)), (300, 500, (0.08, 1), (3 / 4, 4 / 3))]:
        picture = Image.new("RGB", (width, height))
        theirs = np.array(
            [transforms.RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in range(2500)]
        )
        choose = random_box(rng, scale, ratio)
        ours = np.array([choose(width, height) for _ in range(2500)])
        ours = np.stack(
            [ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], 1
        )  # top, left, h, w
        for mine, other in zip(ours.T, theirs.T):
            assert abs(mine.mean() - other.mean()) < 5 * other.std() / 35 + 0.5
            np.testing.assert_allclose(
                np.quantile(mine, [0.1, 0.5, 0.9]), np.quantile(other, [0.1, 0.5, 0.9]), atol=0.05 * max(width, height)
            )


@pytest.mark.parametrize(("width", "height"), [(100, 500), (500, 100), (1, 400), (400, 1)])
def test_a_picture_that_no_draw_fits_is_cut_to_the_nearest_ratio_in_its_middle(width, height):
    transforms = pytest.importorskip("torchvision.transforms")
    top, left, box_height, box_width = transforms.RandomResizedCrop.get_params(
        Image.new("RGB", (width, height)), [0.9, 1.0], [3 / 4, 4 / 3]
    )
    expected = left, top, left + box_width, top + box_height
    assert random_box(np.random.default_rng(0))(width, height) == expected


def test_covering_boxes_are_a_share_of_the_largest_one_of_their_aspect():
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = covering_box(rng, (0.5, 0.8), 2.0)(300, 200)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        assert (right - left) / (bottom - top) == pytest.approx(2)
        assert 0.5 <= (right - left) * (bottom - top) / (300 * 150) <= 0.8


# ------------------------------------------------------------------------------------- odd and bad pictures


def test_kinds_of_jpeg(decoder):
    """Grey, CMYK (Adobe's are inverted), progressive, every subsampling, and one that ends in rubbish."""
    picture = photo(120, 90)
    expected = decode_training(encoded(picture, "PNG"), (48, 64), fast=False).astype(int)
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"optimize": True}):
        pixels = decode_training(encoded(picture, quality=95, **options), (48, 64))
        assert np.abs(pixels - expected).mean() < 3, options
    assert np.abs(decode_training(encoded(picture, quality=95) + b"rubbish" * 9, (48, 64)) - expected).mean() < 3
    grey = decode_training(encoded(picture.convert("L"), quality=95), (48, 64))
    assert grey.shape == (3, 48, 64) and (grey[0] == grey[1]).all() and (grey[0] == grey[2]).all()
    cmyk = decode_training(encoded(picture.convert("CMYK"), quality=95), (48, 64))
    assert np.abs(cmyk - expected).mean() < 4


def test_modes_deeper_than_8_bits_palettes_and_alpha():
    ramp = np.broadcast_to((np.arange(64, dtype=np.uint16) * 1040)[None], (64, 64))
    deep = decode_training(encoded(Image.fromarray(ramp.copy()), "PNG"), (64, 64))
    assert deep.shape == (3, 64, 64) and np.abs(deep[1, 5].astype(int) - np.arange(64) * 1040 / 257).max() <= 1
    palette = decode_training(encoded(photo(40, 40).quantize(200), "PNG"), (20, 20)).astype(int)
    full = decode_training(encoded(photo(40, 40), "PNG"), (20, 20))
    assert np.abs(palette - full).mean() < 12
    opaque = photo(30, 30).convert("RGBA")
    assert decode_training(encoded(opaque, "PNG"), (20, 20)).shape == (3, 20, 20)
    opaque.putalpha(100)
    assert decode_training(encoded(opaque, "PNG"), (20, 20)).shape == (4, 20, 20)
    assert decode_training(encoded(photo(9, 9).convert("LA"), "PNG"), (8, 8)).shape == (3, 8, 8)
    see_through = photo(30, 30).quantize(16)
    pixels = decode_training(encoded(see_through, "PNG", transparency=int(see_through.getpixel((5, 5)))), (30, 30))
    assert pixels.shape == (4, 30, 30) and pixels[3].min() == 0


def test_hidden_colour_does_not_bleed():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 1] = 255  # hidden green
    pixels[16:48, 16:48] = (255, 0, 0, 255)
    small = decode_training(encoded(Image.fromarray(pixels), "PNG"), (13, 13))
    seen = small[3] > 8
    assert small[1][seen].max() <= 8 and small[0][seen].min() >= 247


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = decode_training(data, (4, 4))[:, 2, 2]
    assert red > 240 and blue < 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_only_when_asked(decoder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(1400, 1000), exif=exif, quality=95)
    plain = decode_training(data, (60, 60)).astype(int)
    untagged = decode_training(encoded(photo(1400, 1000), quality=95), (60, 60))
    np.testing.assert_array_equal(plain, untagged)

    def corner(width: int, height: int) -> tuple[float, float, float, float]:
        assert (width, height) == ((1000, 1400) if orientation >= 5 else (1400, 1000))
        return 0, 0, 700, 700

    turned = decode_training(data, (60, 60), box=corner, exif=True).astype(int)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).crop((0, 0, 700, 700)).resize((60, 60), 3)
    assert np.abs(turned - np.asarray(expected).transpose(2, 0, 1)).mean() < 2


def test_an_embedded_colour_profile_is_ignored_as_open_clip_does(decoder):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_it, without = (decode_training(encoded(photo(50, 50), **options), (32, 32))
                        for options in ({"icc_profile": profile}, {}))  # fmt: skip
    np.testing.assert_array_equal(with_it, without)


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def resized_header(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header tells another size."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_faults_are_one_line_each(decoder):
    jpeg = encoded(photo(200, 200))
    assert error_of(b"").startswith("an empty picture: 0 bytes")
    assert "is not a picture that Pillow can read" in error_of(b"GIF is not what this is")
    assert "is not a picture that Pillow can read" in error_of(b"\xff\xd8\xff" + bytes(300))
    assert "corrupt or truncated" in error_of(jpeg[:3000])
    assert "corrupt or truncated" in error_of(encoded(photo(200, 200), "PNG")[:3000])
    for corrupt in (encoded(photo(200, 200), "WEBP")[:900], encoded(photo(200, 200), "TIFF")[:900]):
        assert "picture of 900 bytes is" in error_of(corrupt)
    assert "too large to decode" in error_of(png(60_000, 60_000))
    assert "above the limit of 89478485" in error_of(png(9_400, 9_600))
    assert "too large to decode" in error_of(resized_header(jpeg, 65_000, 65_000))
    assert "above the limit of 89478485" in error_of(resized_header(jpeg, 9_400, 9_600))


def test_a_bomb_is_refused_before_any_pixel_is_decoded(decoder):
    import tracemalloc

    data = resized_header(encoded(photo(200, 200)), 60_000, 60_000)
    tracemalloc.start()
    try:
        error_of(data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:::PIL")
def test_which_damaged_jpegs_are_refused_does_not_depend_on_the_decoder(monkeypatch):
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(5)
    whole = encoded(photo(90, 70), quality=80)
    damaged = []
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(2, len(data), int(rng.integers(0, 4)))] = rng.integers(0, 256)
        damaged.append(data.tobytes()[: int(rng.choice([len(data), rng.integers(4, len(data))]))])

    def refused() -> list[bool]:
        verdicts = []
        for data in damaged:
            try:
                decode_training(data, (32, 32))
                verdicts.append(False)
            except MmbaseError as error:
                assert "\n" not in str(error)
                verdicts.append(True)
        return verdicts

    with_simplejpeg = refused()
    monkeypatch.setattr(decode, "simplejpeg", None)
    without = refused()
    assert 60 < sum(without) < 290
    assert with_simplejpeg == without


def test_the_banner_says_which_decoder_was_found(monkeypatch):
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert "pip install 'mmbase[fast]'" in describe_decoders() and "Pillow" in describe_decoders()
    monkeypatch.undo()
    pytest.importorskip("simplejpeg")
    assert describe_decoders().startswith("JPEG: simplejpeg")
