"""The zoo against open_clip itself: names, routes, tags, preprocessing; and that it imports neither it nor torch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from mmbase.errors import MmbaseError
from mmbase.models import zoo


def test_lists_all_of_openclips_models_with_a_route() -> None:
    import open_clip

    entries = zoo.list_models()
    assert [entry.name for entry in entries] == open_clip.list_models()
    assert len(entries) == 144
    assert Counter(entry.route for entry in entries) == {"native": 71, "adapter": 73}
    assert all(entry.reason and entry.image_size and entry.context_length for entry in entries)


@pytest.mark.parametrize(
    ("name", "route", "reason", "needs_hub"),
    [
        ("ViT-B-32", "native", "CLIP", None),
        ("ViT-H-14-worldwide", "native", "CLIP", "tokenizer facebook/xlm-v-base"),
        ("ViT-L-14-CLIPA", "native", "CLIP", "tokenizer bert-base-uncased"),
        ("ViT-B-16-SigLIP2", "native", "SigLIP", "tokenizer timm/ViT-B-16-SigLIP2"),
        ("RN50", "adapter", "ResNet image tower", None),
        ("coca_ViT-L-14", "adapter", "captioning decoder (CoCa)", None),
        ("convnext_base", "adapter", "timm image tower convnext_base", None),
        (
            "roberta-ViT-B-32",
            "adapter",
            "Hugging Face text tower roberta-base",
            "text tower and tokenizer roberta-base",
        ),
        ("MobileCLIP2-L-14", "adapter", "timm image tower vit_large_patch14_clip_224", None),
    ],
)
def test_routes(name: str, route: str, reason: str, needs_hub: str | None) -> None:
    entry = zoo.model_entry(name)
    assert (entry.route, entry.reason, entry.needs_hub) == (route, reason, needs_hub)
    assert (zoo.config_of(name) is not None) == (route == "native")


def test_pretrained_registry_is_openclips() -> None:
    from open_clip.pretrained import list_pretrained, list_pretrained_tags_by_model

    models = {model for model, _ in list_pretrained()} & {entry.name for entry in zoo.list_models()}
    for model in models:
        assert zoo.pretrained_tags(model) == list_pretrained_tags_by_model(model)
    assert zoo.pretrained_tags("ViT-B-32-plus-256") == []


def test_preprocessing_of_every_tag_is_openclips() -> None:
    from dataclasses import asdict

    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    checked = 0
    for entry in zoo.list_models():
        for tag in entry.pretrained:
            expected = merge_preprocess_dict(asdict(PreprocessCfg()), get_pretrained_cfg(entry.name, tag))
            ours = zoo.preprocess_of(entry.name, tag)
            assert ours["size"] == entry.image_size
            assert {key: ours[key] for key in zoo.PREPROCESS_KEYS} == {
                key: expected[key] for key in zoo.PREPROCESS_KEYS
            }
            checked += 1
    assert checked > 100


def test_preprocessing_without_a_tag_is_what_the_tags_agree_on() -> None:
    siglip = zoo.preprocess_of("ViT-B-16-SigLIP-384")
    assert siglip == {
        "size": 384,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    assert zoo.preprocess_of("ViT-B-32-plus-256")["mean"] == zoo.OPENAI_MEAN


def test_slashes_are_accepted_and_misspelt_names_get_the_nearest() -> None:
    assert zoo.canonical_name("ViT-B/32") == "ViT-B-32"
    with pytest.raises(MmbaseError, match="unknown model 'ViT-B-23'; did you mean 'ViT-B-32'"):
        zoo.config_of("ViT-B-23")
    with pytest.raises(MmbaseError, match="did you mean 'laion2b_s34b_b79k'"):
        zoo.preprocess_of("ViT-B-32", "laion2b_s34b_b97k")
    with pytest.raises(MmbaseError, match="OpenCLIP knows no weights of this model"):
        zoo.pretrained_of("ViT-B-32-plus-256", "openai")


def test_configs_are_copies() -> None:
    zoo.openclip_config_of("ViT-B-32")["embed_dim"] = 1
    config = zoo.config_of("ViT-B-32")
    assert config is not None
    config.vision.layers = 1
    again = zoo.config_of("ViT-B-32")
    assert again is not None and again.vision.layers == 12 and again.embed_dim == 512


def test_imports_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys; from mmbase.models import zoo; zoo.list_models(); zoo.preprocess_of('ViT-B-32', 'openai'); "
        "assert not {'torch', 'open_clip', 'timm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
