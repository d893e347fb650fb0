"""Augmentation: off means a plain resize; each strength changes what it says; a sample's key decides everything."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmbase.data.augment import Augment, _Draw
from mmbase.data.augment_config import AugmentConfig
from mmbase.data.draws import mix64, sample_keys

HALF = ([0.5] * 3, [0.25] * 3)


def pictures(batch=6, channels=4, size=16):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, channels, size, size), generator=generator, dtype=torch.uint8)
    if channels == 4:
        images[:, 3, :, : size // 2] = 0
        images[:, 3, :, size // 2 :] = 255
    return images


def run(config, images, size=(16, 16), flips=True, seed=0):
    return Augment(config, size, *HALF)(images, torch.full((len(images),), flips), keys(len(images), seed))


def keys(count, seed=0):
    return torch.from_numpy(sample_keys(seed, np.zeros(count, int), np.arange(count)))


def test_off_is_a_resize_over_white():
    images = pictures()
    out = run(AugmentConfig(), images, size=(8, 8))
    rgba = images.float() / 255
    rgb = rgba[:, :3] * rgba[:, 3:]
    resized = F.interpolate(torch.cat([rgb, rgba[:, 3:]], 1), (8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(out, (resized[:, :3] + 1 - resized[:, 3:] - 0.5) / 0.25, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_no_alpha_channel_means_opaque():
    images = pictures(channels=3)
    assert torch.allclose(run(AugmentConfig(), images), (images.float() / 255 - 0.5) / 0.25, atol=1e-5)


def test_flip_only_where_allowed():
    images = pictures(channels=3)
    plain = run(AugmentConfig(), images)
    assert torch.equal(run(AugmentConfig(flip=1.0), images), plain.flip(3))
    assert torch.equal(run(AugmentConfig(flip=1.0), images, flips=False), plain)
    both = run(AugmentConfig(flip=1.0, rotation=1e-6), images)
    assert (both - plain.flip(3)).abs().mean() < (both - plain).abs().mean() / 5


STRENGTHS = {
    "scale": 0.3, "aspect": 0.3, "rotation": 20, "shear": 0.3, "shift": 0.3, "hue": 0.5, "saturation": 0.5,
    "contrast": 0.5, "brightness": 0.5, "edge": 1.0, "blur": 1.0, "gamma": 0.5, "posterise": 1.0, "cutout": 1.0,
    "noise": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_strength_changes_pictures_and_repeats(name):
    images = pictures(channels=3)
    config = AugmentConfig(**{name: STRENGTHS[name]})
    one, again, other = run(config, images), run(config, images), run(config, images, seed=1)
    assert torch.equal(one, again)
    assert torch.isfinite(one).all() and one.shape == (6, 3, 16, 16)
    assert not torch.allclose(one, run(AugmentConfig(), images), atol=1e-3)
    if name not in ("blur", "edge"):  # whose draw is a weight only
        assert not torch.allclose(one, other, atol=1e-4)


def test_a_picture_is_varied_the_same_in_any_batch():
    config = AugmentConfig(flip=0.5, line=0.5, white=0.5, **STRENGTHS | {"edge": 0.5, "blur": 0.5, "cutout": 0.5})
    images, key, size = pictures(16), keys(16), (20, 20)
    augment = Augment(config, size, *HALF)
    whole = augment(images, torch.ones(16, dtype=torch.bool), key)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:5], order[:1]):
        part = augment(images[rows], torch.ones(len(rows), dtype=torch.bool), key[rows])
        assert (part - whole[rows]).abs().max() < 1e-5


def test_draws_are_splitmix64_of_the_key_and_uniform():
    key, step = keys(4000), 0x9E3779B97F4A7C15
    draw = _Draw(key)
    counters = np.arange(1, 4, dtype=np.uint64) * np.uint64(step)
    expected = mix64(key.numpy().astype(np.uint64)[:, None] + counters) >> np.uint64(40)
    assert np.array_equal(draw.table[:, :3].double().numpy() * 2**24, expected)
    values = torch.cat([draw.uniform(0, 1, 3).flatten(), draw.uniform(0, 1)]).double()
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    assert ((counts - 800).abs() < 5 * 800**0.5).all()
    normal = draw.normal().double()
    assert abs(normal.mean()) < 0.08 and abs(normal.std() - 1) < 0.06
    assert abs(torch.corrcoef(draw.table[:, :2].T)[0, 1]) < 0.06


def test_line_drawings_fade_the_fill():
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    drawn = run(AugmentConfig(edge=1.0, line=1.0), images) * 0.25 + 0.5
    assert drawn.mean() > 0.6


def test_hue_keeps_grey_and_turns_colour():
    grey = torch.full((5, 3, 8, 8), 100, dtype=torch.uint8)
    assert torch.allclose(run(AugmentConfig(hue=1.0), grey, (8, 8)), run(AugmentConfig(), grey, (8, 8)), atol=1e-4)
    red = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    assert not torch.allclose(run(AugmentConfig(hue=1.0), red, (8, 8)), run(AugmentConfig(), red, (8, 8)), atol=0.1)


def test_background_is_white_grey_or_coloured():
    clear = torch.zeros(200, 4, 4, 4, dtype=torch.uint8)
    out = run(AugmentConfig(white=0.5), clear, (4, 4)) * 0.25 + 0.5
    white = (out > 0.999).all((1, 2, 3))
    grey = (out.amax(1) - out.amin(1)).amax((1, 2)) < 1e-4
    assert 70 < int(white.sum()) < 130
    assert 20 < int((grey & ~white).sum()) < 80
    assert int((~grey).sum()) > 20


def test_transparent_pixels_do_not_bleed():
    images = torch.zeros(1, 4, 16, 16, dtype=torch.uint8)
    images[:, 1] = 255  # hidden green under full transparency
    images[:, :, 4:12, 4:12] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).view(1, 4, 1, 1)
    out = run(AugmentConfig(rotation=10, scale=0.2), images) * 0.25 + 0.5
    assert (out[:, 1] <= out.amax(1) + 1e-4).all()
    assert (out[:, 1] - out[:, 2]).abs().max() < 1e-4  # white fades to red: green and blue stay alike


def test_ramp_grows_style_and_leaves_geometry():
    config = AugmentConfig(hue=0.4, scale=0.2, ramp=0.5, ramp_start=0.25)
    assert (config.at(0.0).hue, config.at(0.25).hue, config.at(0.5).hue) == pytest.approx((0.1, 0.25, 0.4))
    assert config.at(0.0).scale == 0.2
    smaller = Augment(config, (16, 16), *HALF).at(0.0, (12, 12))
    assert smaller(pictures(), torch.ones(6, dtype=torch.bool), keys(6)).shape == (6, 3, 12, 12)
    assert smaller.config.hue == pytest.approx(0.1)
