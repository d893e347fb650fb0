"""Position embeddings: resampling and sine-cosine tables against OpenCLIP's."""

from __future__ import annotations

import copy

import pytest
import torch

from mmbase.errors import MmbaseError
from mmbase.models.openclip import from_openclip
from mmbase.models.positions import resize_grid, sincos_2d

from .shrunk import build_openclip, inputs, relative, shrunk_config


@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_resampled_at_load_as_openclip_does(size: int) -> None:
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    small = shrunk_config("ViT-B-16")
    small["vision_cfg"]["image_size"] = 64
    large = copy.deepcopy(small)
    large["vision_cfg"]["image_size"], large["text_cfg"]["context_length"] = size, 17
    state = build_openclip(small).state_dict()
    theirs, expected = build_openclip(large), dict(state)
    resize_pos_embed(expected, theirs)
    resize_text_pos_embed(expected, theirs)
    theirs.load_state_dict(expected)
    ours = from_openclip(large, state).eval()
    image, text = inputs((size, size), ours.config.text)
    with torch.no_grad():
        assert relative(ours.encode_image(image), theirs.encode_image(image)) <= 1e-5
        assert relative(ours.encode_text(text), theirs.encode_text(text)) <= 1e-5


@pytest.mark.parametrize("hw", [(64, 64), (96, 64), (32, 80), (65, 79)])
def test_other_input_sizes_are_taken_as_they_are(hw: tuple[int, int]) -> None:
    cfg = shrunk_config("ViT-B-16")
    cfg["vision_cfg"]["image_size"] = 64
    state = build_openclip(cfg).state_dict()
    ours = from_openclip(cfg, state).eval()
    resized = from_openclip(cfg | {"vision_cfg": cfg["vision_cfg"] | {"image_size": hw}}, state).eval()
    image = torch.randn(2, 3, *hw)
    with torch.no_grad():
        assert relative(ours.encode_image(image), resized.encode_image(image)) <= 1e-6


def test_same_size_is_left_alone_and_the_class_token_is_kept() -> None:
    table = torch.randn(1 + 6, 4)
    assert resize_grid(table, (2, 3), (2, 3)) is table
    larger = resize_grid(table, (2, 3), (4, 5))
    assert larger.shape == (21, 4)
    assert torch.equal(larger[0], table[0])


def test_a_grid_that_is_not_square_is_refused() -> None:
    cfg = shrunk_config("ViT-B-16")
    state = build_openclip(cfg).state_dict()
    state["visual.positional_embedding"] = torch.randn(1 + 6, 128)
    with pytest.raises(MmbaseError, match="6 patches"):
        from_openclip(cfg, state)


@pytest.mark.parametrize(("side", "width"), [(3, 8), (7, 64), (16, 768)])
def test_sincos_table_is_openclips(side: int, width: int) -> None:
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    expected = torch.from_numpy(get_2d_sincos_pos_embed(width, side, cls_token=True)).float()
    assert torch.allclose(sincos_2d((side, side), width, class_token=True), expected, atol=1e-6)
    assert torch.allclose(sincos_2d((side, side), width, class_token=False), expected[1:], atol=1e-6)
