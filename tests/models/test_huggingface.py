"""Hugging Face folders against transformers' own classes, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmbase.errors import MmbaseError
from mmbase.models import zoo
from mmbase.models.clip import CLIP, CLIPConfig
from mmbase.models.config import TextConfig, VisionConfig
from mmbase.models.huggingface import from_huggingface_config, save_huggingface, to_huggingface
from mmbase.models.weights import load_weights

from .shrunk import randomise, relative

PREPROCESS = {"size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear",
              "resize_mode": "shortest"}  # fmt: skip


def small(vocab_size: int = 60, **text: object) -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(
        embed_dim=16,
        vision=VisionConfig(width=32, heads=2, layers=2, image_size=32, patch_size=8, activation="quick_gelu"),
        text=TextConfig(width=24, heads=3, layers=2, vocab_size=vocab_size, context_length=9, mlp_ratio=3, **text),
    )
    return randomise(CLIP(config)).eval()


def ids(vocab_size: int, end: int) -> torch.Tensor:
    out = torch.randint(3, vocab_size - 2, (3, 9), generator=torch.Generator().manual_seed(0))
    out[torch.arange(3), torch.tensor([4, 8, 2])] = end
    return out


def assert_same(theirs: torch.nn.Module, ours: CLIP, text: torch.Tensor) -> None:
    image = torch.randn(3, 3, *ours.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, out = theirs(input_ids=text, pixel_values=image), ours(image, text)
    assert relative(out["image_features"], expected.image_embeds) <= 1e-5
    assert relative(out["text_features"], expected.text_embeds) <= 1e-5
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T + out.get("logit_bias", 0.0)
    assert relative(logits, expected.logits_per_image) <= 1e-5


@pytest.mark.parametrize(
    ("vocab_size", "text", "end"),
    [(49408, {}, 49407), (60, {}, 59), (60, {"pool": "eos", "eos_id": 5, "activation": "gelu_tanh"}, 5)],
)
def test_exported_folder_gives_equal_features_there_and_back(
    tmp_path: Path, vocab_size: int, text: dict, end: int
) -> None:
    from transformers import CLIPModel

    ours = small(vocab_size, **text)
    save_huggingface(ours, tmp_path / "hf", PREPROCESS, {"kind": "clip", "context_length": 9})
    theirs, loading = CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())
    tokens = ids(vocab_size, end)
    assert_same(theirs.eval(), ours, tokens)
    again, info = load_weights(tmp_path / "hf")
    assert_same(theirs, again.eval(), tokens)
    assert info["preprocess"] == PREPROCESS | {"size": (32, 32)}
    assert info["tokenizer"]["kind"] == ("clip" if vocab_size == 49408 else "hf")


def test_transformers_own_model_loads_with_equal_features(tmp_path: Path) -> None:
    from transformers import CLIPConfig as TheirConfig
    from transformers import CLIPModel

    text = {"hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 70, "max_position_embeddings": 9, "hidden_act": "gelu"}
    text |= {"eos_token_id": 69, "bos_token_id": 68, "pad_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 60, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 24, "patch_size": 6}
    config = TheirConfig(text_config=text, vision_config=vision, projection_dim=20)
    theirs = randomise(CLIPModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_weights(tmp_path)
    assert_same(theirs, ours.eval(), ids(70, 69))
    assert to_huggingface(ours)[0]["text_config"]["eos_token_id"] == 69


def test_transformers_siglip_loads_with_equal_features(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=tower | {"vocab_size": 70, "max_position_embeddings": 9, "projection_size": 24, "bos_token_id": 2,
                             "eos_token_id": 1, "pad_token_id": 1},
        vision_config=tower | {"image_size": 24, "patch_size": 6},
    )  # fmt: skip
    theirs = randomise(SiglipModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = load_weights(tmp_path)
    assert_same(theirs, ours.eval(), ids(70, 69))
    assert info["tokenizer"] == {"kind": "hf", "source": str(tmp_path), "context_length": 9, "clean": "canonicalize"}


def test_processor_loads_the_tokenizer_and_prepares_images(tmp_path: Path) -> None:
    import numpy as np
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image
    from transformers import CLIPProcessor

    save_huggingface(small(49408), tmp_path, PREPROCESS, {"kind": "clip", "context_length": 9})
    processor = CLIPProcessor.from_pretrained(tmp_path)
    texts = ['A photo of "two" naïve dogs', "it's 3 o'clock 😀!", "straße 東京 10,000", ""]
    tokens = processor.tokenizer(texts, padding="max_length", max_length=40).input_ids
    expected = open_clip.tokenize(texts, context_length=40)
    for row, wanted in zip(tokens, expected.tolist(), strict=True):
        end = wanted.index(49407)
        assert row[: end + 1] == wanted[: end + 1]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    pixels = torch.as_tensor(np.array(processor.image_processor(image)["pixel_values"]))[0]
    transform = image_transform_v2(PreprocessCfg(**PREPROCESS), is_train=False)
    assert (pixels - transform(image)).abs().max() * 0.6 <= 1.5 / 255


@pytest.mark.parametrize(
    ("vision", "text", "field"),
    [
        ({"stem": "conv"}, {}, "vision.stem='conv'"),
        ({"norm_pre": False}, {}, "vision.norm_pre=False"),
        ({"pool": "average"}, {}, "vision.pool='average'"),
        ({"image_size": (32, 64)}, {}, r"vision.image_size=\(32, 64\)"),
        ({}, {"pool": "mean"}, "text.pool='mean'"),
        ({}, {"causal": False}, "text.causal=False"),
    ],
)
def test_fields_without_an_equivalent_are_named_and_nothing_is_written(
    tmp_path: Path, vision: dict, text: dict, field: str
) -> None:
    tower = {"width": 32, "heads": 2, "layers": 1}
    config = CLIPConfig(
        embed_dim=8, vision=VisionConfig(**tower, **vision), text=TextConfig(**tower, vocab_size=50, **text)
    )
    with pytest.raises(MmbaseError, match=f"{field} has no equivalent"):
        save_huggingface(CLIP(config), tmp_path / "hf", PREPROCESS)
    assert not (tmp_path / "hf").exists()
    with pytest.raises(MmbaseError, match="resize_mode='longest'"):
        save_huggingface(small(), tmp_path / "hf", PREPROCESS | {"resize_mode": "longest"})
    assert not (tmp_path / "hf").exists()


def test_sigmoid_models_and_other_folders_are_refused(tmp_path: Path) -> None:
    biased = small().config.model_copy(update={"init_logit_bias": -10.0})
    with pytest.raises(MmbaseError, match="init_logit_bias"):
        to_huggingface(CLIP(biased))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(MmbaseError, match="model_type='bert'"):
        load_weights(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MmbaseError, match="no JSON object"):
        load_weights(tmp_path)


def test_defaults_of_a_sparse_config_are_transformers_own() -> None:
    config = from_huggingface_config({"model_type": "clip"})
    expected = zoo.config_of("ViT-B-32-quickgelu")
    assert expected is not None
    text = expected.text.model_copy(update={"pool": "eos", "eos_id": 49407})
    assert config.model_copy(update={"init_logit_scale": expected.init_logit_scale}) == expected.model_copy(
        update={"text": text}
    )
