import base64
import io

import numpy as np
import pytest
from PIL import Image

from mmbase.errors import MmbaseError
from mmbase.evaluation.thumbnails import as_pil, data_url, thumbnail

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "image",
    [PIXELS, np.moveaxis(PIXELS, -1, 0), PIXELS.astype(np.float32) / 255, Image.fromarray(PIXELS)],
    ids=["HWC", "CHW", "float", "PIL"],
)
def test_every_kind_gives_the_same_picture(image):
    np.testing.assert_array_equal(np.asarray(as_pil(image)), PIXELS)


def test_path_grey_and_transparency(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(as_pil(tmp_path / "a.png")), PIXELS)
    np.testing.assert_array_equal(np.asarray(as_pil(PIXELS[..., :1]))[..., 2], PIXELS[..., 0])
    assert as_pil(Image.new("RGBA", (2, 2))).mode == "RGBA"
    assert as_pil(Image.new("LA", (2, 2))).mode == "RGBA"
    assert as_pil(np.full((2, 2), np.nan, np.float32)).getpixel((0, 0)) == (0, 0, 0)


def test_thumbnails_shrink_and_never_grow():
    assert thumbnail(np.zeros((100, 50, 3), np.uint8), 20).size == (10, 20)
    assert thumbnail(PIXELS, 20).size == (9, 6)


def test_data_url_holds_the_picture():
    head, _, body = data_url(Image.new("RGBA", (300, 150), (200, 30, 30, 255))).partition(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as picture:
        assert picture.size == (144, 72)
        assert np.abs(np.array(picture.convert("RGB").getpixel((50, 30))) - (200, 30, 30)).max() < 8


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for image, message in ((tmp_path / "a.png", "cannot show"), (tmp_path / "b.png", "cannot show"),
                           (np.zeros((2, 3, 4, 5)), "shape"), (np.zeros((5, 5, 7)), "shape")):  # fmt: skip
        with pytest.raises(MmbaseError, match=message):
            as_pil(image)
