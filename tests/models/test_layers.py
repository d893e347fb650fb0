"""Attention against float64, patch dropout, stems, pooling, checkpointing, compilation, construction on meta."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.models.attention_pool import AttentionPool
from mmbase.models.clip import CLIP, CLIPConfig
from mmbase.models.config import TextConfig, VisionConfig
from mmbase.models.layers import Block, Transformer, attention
from mmbase.models.noise import DropPath, PatchDropout

from .shrunk import randomise, relative

TEXT = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 50, "context_length": 12}
VISION = {"width": 32, "heads": 2, "layers": 2, "image_size": 32, "patch_size": 8}


def small(vision: dict | None = None, text: dict | None = None) -> CLIP:
    torch.manual_seed(0)
    towers = VisionConfig(**(VISION | (vision or {}))), TextConfig(**(TEXT | (text or {})))
    return randomise(CLIP(CLIPConfig(embed_dim=16, vision=towers[0], text=towers[1])))


def exact_attention(qkv_BN3HD: Tensor, causal: bool, keep_BN: Tensor | None) -> Tensor:
    q, k, v = qkv_BN3HD.double().permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    n = scores.shape[-1]
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    if keep_BN is not None:
        scores = scores.masked_fill(~keep_BN[:, None, None, :], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 7, 3, 2, 8), (1, 1, 3, 1, 16), (2, 33, 3, 3, 5)])
def test_attention_and_its_gradient_against_float64(shape, causal, masked, dtype, tolerance) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(shape).to(dtype)
    keep = None
    if masked:
        keep = torch.rand(shape[:2]) > 0.4
        keep[:, 0] = True
    grad = torch.randn(shape[0], shape[1], *shape[3:])
    ours, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    with torch.no_grad():
        assert (
            relative(attention(qkv, causal=causal, keep_BN=keep).double(), exact_attention(qkv, causal, keep))
            <= tolerance
        )
    out, expected = attention(ours, causal=causal, keep_BN=keep), exact_attention(exact, causal, keep)
    assert out.dtype == dtype
    assert relative(out.double(), expected) <= tolerance
    out.backward(grad.to(dtype))
    expected.backward(grad.double())
    assert relative(ours.grad.double(), exact.grad) <= 2 * tolerance


@pytest.mark.parametrize("token", [0, 5, torch.tensor([2, 0, 6])])
@pytest.mark.parametrize("causal", [False, True])
def test_last_block_computes_only_the_wanted_token(token: int | Tensor, causal: bool) -> None:
    torch.manual_seed(0)
    tower = randomise(Transformer(32, 3, 2))
    x = torch.randn(3, 7, 32)
    keep = torch.tensor([[True] * 7, [True] * 6 + [False], [True] * 7])
    every = tower(x, causal=causal, keep_BN=keep)
    one = tower(x, causal=causal, keep_BN=keep, token=token)
    assert one.shape == (3, 1, 32)
    wanted = every[torch.arange(3), token]
    assert relative(one[:, 0], wanted) <= 1e-6


def test_attention_pool_equals_timms() -> None:
    from timm.layers import AttentionPoolLatent

    theirs = randomise(AttentionPoolLatent(24, num_heads=3, norm_layer=torch.nn.LayerNorm)).eval()
    ours = AttentionPool(24, 3, 4.0, "gelu", norm_eps=1e-5)
    state = {key.replace("latent", "query"): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state | {"query": state["query"].reshape(24)})
    x = torch.randn(2, 9, 24)
    assert relative(ours(x), theirs(x)) <= 1e-6


def test_quick_gelu_is_openais() -> None:
    from mmbase.models.layers import activate

    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert torch.allclose(activate(x, "quick_gelu"), x * torch.sigmoid(1.702 * x), atol=1e-14)


def test_patch_dropout_keeps_a_random_subset_and_repeats_with_the_generator() -> None:
    x = torch.arange(20.0).reshape(1, 20, 1).expand(4, 20, 3).contiguous()
    drop = PatchDropout(0.6)
    torch.manual_seed(3)
    first = drop(x)
    torch.manual_seed(3)
    assert torch.equal(first, drop(x))
    assert first.shape == (4, 8, 3)
    kept = [sorted(row[:, 0].tolist()) for row in first]
    assert all(len(set(row)) == 8 for row in kept)
    assert any(row != kept[0] for row in kept)
    assert torch.equal(drop.eval()(x), x)
    assert PatchDropout(0.99)(x).shape == (4, 1, 3)


def test_patch_dropout_keeps_the_class_token() -> None:
    model = small({"patch_dropout": 0.75})
    tokens = model.visual.embed(torch.randn(2, 3, 32, 32))
    expected = model.visual.class_embedding + model.visual.positional_embedding[0]
    assert tokens.shape == (2, 1 + 4, 32)
    assert torch.allclose(tokens[:, 0], expected.expand(2, -1))


def test_drop_path_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(20000, 1))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("channels", [[8, 12], [8, 16, 32]])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_conv_stem_has_the_grid_its_config_says(norm: str, channels: list[int], stride: int) -> None:
    vision = {"stem": "conv", "stem_channels": channels, "stem_blocks": [1] * len(channels), "stem_norm": norm,
              "stem_stride": stride, "image_size": (34, 50), "class_token": False, "pool": "average"}  # fmt: skip
    model = small(vision)
    tokens, grid = model.visual.stem(torch.randn(2, 3, 34, 50))
    assert grid == model.config.vision.grid_hw
    assert tokens.shape == (2, grid[0] * grid[1], 32)
    features = model.encode_image(torch.randn(2, 3, 34, 50), normalize=True)
    features.sum().backward()
    assert torch.allclose(features.norm(dim=-1), torch.ones(2))
    assert all(p.grad is not None for p in model.visual.parameters())


VARIANTS = [
    ({}, {}),
    (
        {"pool": "attention", "class_token": False, "norm_pre": False, "patch_bias": True, "patch_dropout": 0.5},
        {"pool": "last", "causal": False},
    ),
    (
        {"pool": "average", "position_embedding": "sincos", "layer_scale": 0.1, "norm_after_pool": True},
        {"pool": "mean", "causal": False, "mask_padding": True},
    ),
    (
        {"stem": "conv", "stem_channels": [8, 16], "stem_blocks": [1, 1], "pool": "average", "class_token": False},
        {"pool": "first", "causal": False},
    ),
    ({"activation": "quick_gelu", "drop_path": 0.2, "dropout": 0.1}, {"pool": "eos", "eos_id": 49, "layers": 0}),
]


@pytest.mark.parametrize(("vision", "text"), VARIANTS)
def test_compiles_without_graph_breaks(vision: dict, text: dict) -> None:
    model = small(vision | {"checkpoint_activations": True}, text)
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 12))
    for training in (False, True):
        model.train(training)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        out = compiled(image, ids)
        if not training:
            expected = model(image, ids)
            assert relative(out["image_features"], expected["image_features"]) <= 1e-6
            assert relative(out["text_features"], expected["text_features"]) <= 1e-6
        (out["image_features"].sum() + out["text_features"].sum()).backward()


@pytest.mark.parametrize(("vision", "text"), VARIANTS)
def test_activation_checkpointing_changes_nothing(vision: dict, text: dict) -> None:
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 12))
    gradients = []
    for flag in (False, True):
        model = small(vision | {"checkpoint_activations": flag}, text | {"checkpoint_activations": flag}).train()
        torch.manual_seed(5)
        out = model(image, ids)
        (out["image_features"][0] @ out["text_features"][0]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][name], atol=1e-6) for name, g in gradients[0].items())


@pytest.mark.parametrize(("vision", "text"), VARIANTS)
def test_bf16_autocast_trains_every_parameter(vision: dict, text: dict) -> None:
    model = small(vision, text).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 12)))
        loss = (out["image_features"] @ out["text_features"].T * out["logit_scale"]).square().mean()
    loss.backward()
    assert loss.isfinite()
    unused = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not unused


def test_meta_construction_takes_weights_by_assignment() -> None:
    model = small({"stem": "conv", "stem_channels": [8, 16], "stem_blocks": [1, 1], "position_embedding": "sincos"})
    with torch.device("meta"):
        empty = CLIP(model.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 12))
    out, expected = empty.eval()(image, ids), model.eval()(image, ids)
    assert all(torch.equal(out[key], expected[key]) for key in expected)
    assert not empty.visual.positional_embedding.requires_grad


def test_meta_construction_does_not_load_the_compiler() -> None:
    code = """
import sys, torch
from mmbase.models.clip import CLIP, CLIPConfig
from mmbase.models.config import VisionConfig
for vision in (VisionConfig(), VisionConfig(stem="conv", pool="attention", class_token=False, layer_scale=0.1)):
    with torch.device("meta"):
        CLIP(CLIPConfig(vision=vision))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_initial_weights_are_openais() -> None:
    torch.manual_seed(0)
    block = Block(256, 4, depth=8)
    assert block.attn.qkv.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert block.mlp.fc1.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert block.attn.proj.weight.std().item() == pytest.approx(256**-0.5 * 16**-0.5, rel=0.02)
    assert not block.attn.qkv.bias.any()
    x = torch.randn(2, 5, 256)
    assert torch.equal(Block(256, 4, branch_init=0.0)(x), x)


def test_trimmed_texts_have_the_same_features() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 48, (3, 12))
    ids[:, 5:] = 0
    ids[0, 3], ids[1, 4], ids[2, 1] = 49, 49, 49
    padded = {"causal": False, "mask_padding": True, "pad_id": 0, "pool": "mean"}
    for text in ({"pool": "eot"}, {"pool": "eos", "eos_id": 49}, padded, padded | {"pool": "first"}):
        tower = small(text=text).eval().text
        trimmed = tower.trim(ids)
        assert trimmed.shape == (3, 5)
        assert relative(tower(trimmed), tower(ids)) <= 1e-6
    assert small(text={"pool": "last"}).text.trim(ids).shape == (3, 12)


def test_padding_is_not_looked_at_where_it_is_masked() -> None:
    tower = small(text={"causal": False, "mask_padding": True, "pad_id": 7, "pool": "mean"}).eval().text
    ids = torch.randint(10, 50, (2, 6))
    padded = torch.cat([ids, torch.full((2, 4), 7)], dim=1)
    assert relative(tower(padded), tower(ids)) <= 1e-6


def test_rows_of_nothing_but_padding_have_finite_features() -> None:
    tower = small(text={"causal": False, "mask_padding": True, "pad_id": 0, "pool": "mean"}).train().text
    ids = torch.randint(1, 50, (2, 6))
    ids[1] = 0
    features = tower(ids)
    features.sum().backward()
    assert features.isfinite().all()
    assert all(p.grad.isfinite().all() for p in tower.parameters())


def test_texts_longer_than_the_context_are_refused() -> None:
    with pytest.raises(MmbaseError, match="texts have 13 tokens but the model's context_length is 12"):
        small().encode_text(torch.ones(1, 13, dtype=torch.long))


def test_features_have_unit_length_in_float32_under_autocast():
    """Rounded to bfloat16, cosines would be off by up to 0.4 %, times the logit scale."""
    config = CLIPConfig(
        embed_dim=32,
        vision=VisionConfig(image_size=32, patch_size=16, width=32, heads=2, layers=1),
        text=TextConfig(width=32, heads=2, layers=1),
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = CLIP(config)(torch.randn(3, 3, 32, 32), torch.randint(1, 100, (3, 77)))
    for name in ("image_features", "text_features"):
        assert out[name].dtype == torch.float32
        assert torch.allclose(out[name].norm(dim=1), torch.ones(3), atol=1e-6)
