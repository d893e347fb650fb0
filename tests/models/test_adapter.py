"""OpenCLIP's other models behind our interface, shrunk so that they stay small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mmbase.errors import MmbaseError
from mmbase.models import zoo
from mmbase.models.adapter import OpenClipAdapter
from mmbase.models.weights import build, load_weights

from .shrunk import randomise

ADAPTERS = [entry.name for entry in zoo.list_models() if entry.route == "adapter"]
TIMM_SIZES: dict[str, dict[str, Any]] = {  # how each family of timm's is made small
    "eva": {"embed_dim": 64, "depth": 1, "num_heads": 2},
    "vit_base_mci": {"depth": 1},
    "vit_pe_core": {"embed_dim": 64, "depth": 1, "num_heads": 2},
    "vit_large": {"embed_dim": 64, "depth": 1, "num_heads": 2},
    "vit_medium": {"embed_dim": 64, "depth": 1, "num_heads": 2},
    "vit_relpos": {"embed_dim": 64, "depth": 1, "num_heads": 2},
    "vit_base_patch16_siglip": {"embed_dim": 64, "depth": 1, "num_heads": 2},
    "vit_so400m": {"embed_dim": 64, "depth": 1, "num_heads": 2},
    "vitamin": {"depth": 1, "img_size": 64},
    "fastvit_mci3": {"layers": (1,) * 5},
    "fastvit_mci4": {"layers": (1,) * 5},
    "fastvit": {"layers": (1,) * 4},
    "convnext": {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)},
    "swin": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
}


def shrunk(name: str) -> dict[str, Any]:
    cfg = zoo.openclip_config_of(name)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    sections = [text, cfg["multimodal_cfg"]] if "multimodal_cfg" in cfg else [text]
    for section in sections:
        if "hf_model_name" not in section:
            section.update(width=32, heads=2, layers=1, vocab_size=97, context_length=11)
    if isinstance(vision.get("layers"), list):
        vision.update(layers=[1, 1, 1, 1], width=8, head_width=16, image_size=64)
    elif vision.get("timm_model_name", "").startswith("vitamin"):
        vision.update(image_size=64)
    elif "timm_model_name" not in vision:
        vision.update(layers=1, width=32, head_width=16, image_size=2 * vision["patch_size"])
    cfg["embed_dim"] = 64 if vision.get("timm_proj") == "none" else 24
    return cfg


@pytest.fixture(autouse=True)
def small_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timm's towers small, and have Hugging Face's text towers read a small local config instead of the hub's."""
    import timm
    from transformers import AutoConfig, M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

    create = timm.create_model

    def create_small(name: str, **given: Any) -> torch.nn.Module:
        sizes = next(sizes for prefix, sizes in TIMM_SIZES.items() if name.startswith(prefix))
        return create(name, **(given | sizes))

    monkeypatch.setattr(timm, "create_model", create_small)
    roberta = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    local = {
        "roberta": RobertaConfig(vocab_size=97, **roberta),
        "xlm-roberta": XLMRobertaConfig(vocab_size=97, **roberta),
        "google/mt5": MT5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=40),
        "facebook/nllb": M2M100Config(vocab_size=97, d_model=32, encoder_ffn_dim=40, decoder_ffn_dim=40, **layers),
    }

    def read_local(name: str, **_: Any) -> Any:
        return next(config for prefix, config in local.items() if name.startswith(prefix))

    monkeypatch.setattr(AutoConfig, "from_pretrained", read_local)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_other_model_runs_behind_our_interface(name: str) -> None:
    cfg = shrunk(name)
    adapter = OpenClipAdapter(cfg).eval()
    image = torch.randn(2, 3, *adapter.image_size)
    text = torch.randint(3, 96, (2, adapter.context_length))
    pairs = ((adapter.model.encode_image, image), (adapter.model.encode_text, text))
    with torch.no_grad():
        out = adapter(image, text)
        expected = [encode(x, normalize=False) for encode, x in pairs]
        assert torch.equal(adapter.encode_image(image), expected[0])
        assert torch.equal(adapter.encode_text(text), expected[1])
    assert adapter.embed_dim == cfg["embed_dim"]
    assert out["image_features"].shape == out["text_features"].shape == (2, adapter.embed_dim)
    for features, raw in zip((out["image_features"], out["text_features"]), expected, strict=True):
        assert torch.allclose(features, torch.nn.functional.normalize(raw, dim=-1), atol=1e-6)
    assert ("logit_bias" in out) == ("init_logit_bias" in cfg)
    assert out["logit_scale"].ndim == 0


def test_local_weights_load_and_strangers_are_refused(tmp_path: Path) -> None:
    cfg = shrunk("RN50")
    source = OpenClipAdapter(cfg)
    randomise(source)
    torch.save({"state_dict": source.model.state_dict()}, tmp_path / "weights.pt")
    loaded = OpenClipAdapter(cfg)
    loaded.load_file(tmp_path / "weights.pt")
    expected = source.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())
    torch.save({"weight": torch.zeros(1)}, tmp_path / "stranger.pt")
    with pytest.raises(MmbaseError, match=r"stranger\.pt' does not fit this model") as caught:
        loaded.load_file(tmp_path / "stranger.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(MmbaseError, match="no weights file"):
        loaded.load_file(tmp_path / "absent.pt")


def test_folder_of_a_model_our_towers_do_not_cover(tmp_path: Path) -> None:
    cfg = shrunk("coca_ViT-B-32")
    source = OpenClipAdapter(cfg).eval()
    torch.save(source.model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    loaded, info = load_weights(tmp_path)
    assert isinstance(loaded, OpenClipAdapter)
    image = torch.randn(1, 3, *loaded.image_size)
    with torch.no_grad():
        assert torch.equal(loaded.eval().encode_image(image), source.encode_image(image))
    assert info["preprocess"] == {"size": loaded.image_size[0], "mean": [0.5] * 3}


def test_names_are_routed_to_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = dict(zoo._configs()) | {"RN50": shrunk("RN50")}
    monkeypatch.setattr(zoo, "_configs", lambda: configs)
    module, info = build("RN50")
    assert isinstance(module, OpenClipAdapter)
    assert info["preprocess"]["size"] == 64 and info["tokenizer"] == {"kind": "clip", "context_length": 11}


def test_missing_text_tower_config_names_the_file() -> None:
    with (
        mock.patch("transformers.AutoConfig.from_pretrained", side_effect=OSError("offline")),
        pytest.raises(MmbaseError, match=r"config.json of 'xlm-roberta-base' from the Hugging Face hub"),
    ):
        build("xlm-roberta-base-ViT-B-32")


def test_configs_open_clip_refuses() -> None:
    cfg = shrunk("RN50")
    cfg["vision_cfg"]["wdith"] = 3
    with pytest.raises(MmbaseError, match=r"open_clip cannot build this model.*wdith"):
        OpenClipAdapter(cfg)
