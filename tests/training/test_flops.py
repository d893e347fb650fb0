"""FLOPs of the towers against what torch counts while they run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.devices import GPUS, measured_product, recognise
from mmbase.training.flops import Shapes, groups, image_work, kept_tokens, step_work, text_work

VISION = {
    "class": {"patch_size": 8},
    "average": {"patch_size": [8, 4], "class_token": False, "pool": "average", "projection": False, "width": 24},
    "attention": {"patch_size": 8, "class_token": False, "pool": "attention", "mlp_ratio": 3.7},
    "dropped": {"patch_size": 8, "patch_dropout": 0.6},
    "conv": {"stem": "conv", "stem_channels": [8, 16], "stem_blocks": [1, 2], "class_token": False, "pool": "average"},
    "conv stride 4": {"stem": "conv", "stem_channels": [8, 32], "stem_blocks": [0, 1], "stem_stride": 4},
    "no blocks": {"patch_size": 8, "layers": 0},
}
TEXT = {
    "eot": {},
    "mean": {"pool": "mean", "causal": False},
    "last": {"pool": "last", "causal": False, "mlp_ratio": 3.0},
    "one layer": {"pool": "first", "layers": 1, "causal": False},
}


def counted(function):
    counter = FlopCounterMode(display=False)
    with counter:
        result = function()
    return counter.get_total_flops(), result


def build(vision=None, text=None):
    config = CLIPConfig.model_validate(
        {
            "embed_dim": 24,
            "vision": {"image_size": 32, "width": 32, "layers": 2, "heads": 2, **(vision or {})},
            "text": {"width": 48, "layers": 2, "heads": 2, "context_length": 12, "vocab_size": 50, **(text or {})},
        }
    )
    return config, CLIP(config).train()


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("size", [(32, 32), (40, 56), (33, 47)], ids=str)
def test_image_tower(name, size):
    config, model = build(vision=VISION[name])
    batch = 3
    with sdpa_kernel(SDPBackend.MATH):  # its backward pass computes nothing twice
        forward, features = counted(lambda: model.visual(torch.randn(batch, 3, *size)))
        backward, _ = counted(lambda: features.sum().backward())
    work = image_work(config.vision, 24, Shapes(batch, size, patch_keep=1 - config.vision.patch_dropout))
    assert (forward, backward) == work


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("length", [12, 7])
def test_text_tower(name, length):
    config, model = build(text=TEXT[name])
    ids = torch.randint(1, 49, (3, length))
    ids[:, -1] = 49  # of full length: nothing to pack
    with sdpa_kernel(SDPBackend.MATH):
        forward, features = counted(lambda: model.text(ids))
        backward, _ = counted(lambda: features.sum().backward())
    assert (forward, backward) == text_work(config.text, 24, Shapes(3, (32, 32), text_length=length))


def test_packed_texts_compute_no_padding():
    config, model = build()
    ids = torch.zeros(4, 12, dtype=torch.int64)
    ids[:, :4], ids[:, 4] = 7, 49
    with sdpa_kernel(SDPBackend.MATH):
        forward, _ = counted(lambda: model.text(model.text.pack(ids)))
    assert forward == text_work(config.text, 24, Shapes(4, (32, 32), text_length=5, packed=True)).forward


@pytest.mark.parametrize("locked", [1, 2, 3, 4])
def test_locked_groups_have_no_backward_pass(locked):
    config, model = build()
    tower = model.visual
    parts = [
        [tower.stem, tower.norm_pre],
        *[[block] for block in tower.transformer.blocks],
        [tower.norm, tower.proj],
    ]
    assert len(parts) == groups(config.vision)
    tower.class_embedding.requires_grad_(False)
    tower.positional_embedding.requires_grad_(False)
    for part in parts[:locked]:
        for module in part:
            module.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        features = tower(torch.randn(2, 3, 32, 32))
        backward = counted(lambda: features.sum().backward())[0] if locked < len(parts) else 0
    assert backward == image_work(config.vision, 24, Shapes(2, (32, 32), lock_vision=locked)).backward


def test_step_with_its_loss():
    config, model = build()
    ids = torch.randint(1, 49, (5, 12))
    ids[:, -1] = 49

    def step():
        # the reference computes each gradient from one product, as the FLOPs are counted
        z = model(torch.randn(5, 3, 32, 32), ids)
        logits = z["logit_scale"] * z["image_features"] @ z["text_features"].T
        return torch.nn.functional.cross_entropy(logits, torch.arange(5)).backward()

    with sdpa_kernel(SDPBackend.MATH):
        total, _ = counted(step)
    assert total == step_work(config, Shapes(5, (32, 32), text_length=12)).total.both
    assert ContrastiveLoss()(**model(torch.randn(5, 3, 32, 32), ids)).ndim == 0  # the model is one that trains


def test_kept_tokens_as_patch_dropout_keeps():
    for rate in (0.1, 0.3, 0.45, 0.5, 0.75, 0.9):
        config, model = build(vision={"patch_size": 4, "patch_dropout": rate})
        tokens = model.visual.embed(torch.randn(1, 3, 32, 32)).shape[1]
        assert kept_tokens(config.vision, (32, 32), 1 - rate) == tokens


def test_gpus_are_recognised():
    assert recognise("NVIDIA H200") is GPUS["h200"]
    assert recognise("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert recognise("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert recognise("NVIDIA H100 PCIe") is None and recognise("NVIDIA H200 NVL") is None
    assert measured_product(torch.device("cpu"), torch.float32, 64, tries=2) > 0
