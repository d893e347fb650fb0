"""Every model our towers cover: the same weights give OpenCLIP's features, in both directions of conversion."""

from __future__ import annotations

import gc

import pytest
import torch

from mmbase.models import zoo
from mmbase.models.clip import CLIP
from mmbase.models.openclip import from_openclip, openclip_table, to_openclip, to_openclip_state
from mmbase.models.openclip_config import from_openclip_config, to_openclip_config

from .shrunk import build_openclip, inputs, our_config, randomise, relative, shrunk_config

NATIVE = zoo.native_names()
TOLERANCE = 1e-5


def assert_same_features(ours: CLIP, theirs: torch.nn.Module) -> None:
    image, text = inputs(ours.image_size, ours.config.text)
    with torch.no_grad():
        assert relative(ours.encode_image(image), theirs.encode_image(image)) <= TOLERANCE
        assert relative(ours.encode_text(text), theirs.encode_text(text)) <= TOLERANCE
        out = ours(image, text)
    assert torch.equal(out["logit_scale"], theirs.logit_scale.exp().reshape(()))
    assert ("logit_bias" in out) == (theirs.logit_bias is not None)


@pytest.mark.parametrize("name", NATIVE)
def test_shrunk_openclip_to_ours_and_back(name: str) -> None:
    cfg = shrunk_config(name)
    theirs = build_openclip(cfg)
    config = our_config(cfg)
    ours = from_openclip(config, theirs.state_dict()).eval()
    assert_same_features(ours, theirs)
    fresh = randomise(CLIP(config)).eval()
    theirs.load_state_dict(to_openclip_state(fresh), strict=True)
    assert_same_features(fresh, theirs)


@pytest.mark.parametrize("name", [name for name in NATIVE if "SigLIP" not in name])
def test_exported_config_builds_the_same_openclip_model(name: str) -> None:
    fresh = randomise(CLIP(our_config(shrunk_config(name)))).eval()
    cfg, state = to_openclip(fresh)
    theirs = build_openclip(cfg)
    theirs.load_state_dict(state, strict=True)
    assert_same_features(fresh, theirs)


@pytest.mark.parametrize("name", NATIVE)
def test_full_size_names_shapes_and_config_round_trip(name: str) -> None:
    from open_clip.model import CLIP as OpenClip
    from open_clip.model import CustomTextCLIP

    cfg = zoo.openclip_config_of(name)
    config = zoo.config_of(name)
    assert config is not None
    custom_text = cfg.pop("custom_text", False)
    with torch.device("meta"):
        theirs = (CustomTextCLIP if custom_text else OpenClip)(**cfg)
        ours = CLIP(config)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    table = openclip_table(config, custom_text=custom_text)
    exported = {key: tensor.shape for key, tensor in to_openclip_state(ours).items()}
    assert exported == shapes
    assert {key for source in table.values() for key in source.keys} == set(shapes)
    assert zoo.count_parameters(config) == sum(p.numel() for p in theirs.parameters())
    assert from_openclip_config(to_openclip_config(config)) == config


def test_custom_text_layout_of_a_plain_clip() -> None:
    from open_clip.model import CustomTextCLIP

    cfg = shrunk_config("ViT-B-32")
    theirs = randomise(CustomTextCLIP(**cfg)).eval()
    assert_same_features(from_openclip(cfg, theirs.state_dict()).eval(), theirs)


@pytest.mark.parametrize("name", ["ViT-H-14-CLIPA", "ViT-B-32"])
@pytest.mark.parametrize("extra", [{"ls_init_value": 0.1}, {"pos_embed_type": "sin_cos_2d"}, {"pool_type": "avg"},
                                   {"no_ln_pre": True}, {"final_ln_after_pool": True, "pool_type": "avg"}])  # fmt: skip
def test_options_of_openclips_vit(name: str, extra: dict[str, object]) -> None:
    cfg = shrunk_config(name)
    cfg["vision_cfg"] |= extra
    theirs = build_openclip(cfg)
    assert_same_features(from_openclip(cfg, theirs.state_dict()).eval(), theirs)


def test_gradients_equal_openclips() -> None:
    cfg = shrunk_config("ViT-B-16-quickgelu")
    theirs = build_openclip(cfg)
    ours = from_openclip(cfg, theirs.state_dict())
    image, text = inputs(ours.image_size, ours.config.text)
    for model in (theirs, ours):
        model.train()
        weight = torch.linspace(-1, 1, 24)
        (model.encode_image(image) @ weight + model.encode_text(text) @ weight).sum().backward()
    table = openclip_table(ours.config, custom_text=False)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.startswith("logit"):
            continue
        gradient = expected[table[name].keys[0]].grad
        assert relative(parameter.grad, gradient.T if table[name].transpose else gradient) <= 2e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in zoo.list_models() if (entry.parameters or 9e9) < 2.6e9])
def test_full_size_features(name: str) -> None:
    """Numeric parity at full size, one image and one text; larger models are covered by the shrunk and shape tests."""
    from open_clip.model import CLIP as OpenClip
    from open_clip.model import CustomTextCLIP

    cfg = zoo.openclip_config_of(name)
    custom_text = cfg.pop("custom_text", False)
    with torch.device("meta"):
        theirs = (CustomTextCLIP if custom_text else OpenClip)(**cfg)
    theirs = theirs.to_empty(device="cpu").eval()
    for key, parameter in theirs.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02
        parameter.data.uniform_(-std, std).add_(float(parameter.ndim == 1 and key.endswith("weight")))
    for module in theirs.modules():
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, torch.Tensor):
            mask.fill_(float("-inf")).triu_(1)
    theirs.logit_scale.data.fill_(1.0)
    ours = from_openclip(zoo.openclip_config_of(name), theirs.state_dict()).eval()
    image, text = inputs(ours.image_size, ours.config.text, batch=1)
    try:
        with torch.no_grad():
            assert relative(ours.encode_image(image), theirs.encode_image(image)) <= TOLERANCE
            assert relative(ours.encode_text(text), theirs.encode_text(text)) <= TOLERANCE
    finally:
        del ours, theirs
        gc.collect()
