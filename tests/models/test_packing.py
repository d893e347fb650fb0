"""Text towers over packed tokens: the same features and gradients as over padded texts, and OpenCLIP's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mmbase.models import text as text_tower
from mmbase.models.config import TextConfig
from mmbase.models.layers import attention
from mmbase.models.openclip import from_openclip, openclip_table
from mmbase.models.packing import Packing
from mmbase.models.text import TextTransformer

from .shrunk import build_openclip, our_config, randomise, relative, shrunk_config

CONTEXT, VOCABULARY, END = 12, 50, 49
PADDED = {"causal": False, "mask_padding": True}
PACKED = [
    {"pool": "eot"},
    {"pool": "eos", "eos_id": END},
    {"pool": "eos", "eos_id": END, "pad_id": END},
    {"pool": "mean"},
    {"pool": "first"},
    {"pool": "eot", "mask_padding": True},
    {"pool": "mean", "mask_padding": True, "layer_scale": 0.3},
    {"pool": "eos", "eos_id": END, "pad_id": END, "mask_padding": True},
    PADDED | {"pool": "mean"},
    PADDED | {"pool": "first"},
    PADDED | {"pool": "eot", "activation": "quick_gelu"},
    PADDED | {"pool": "eos", "eos_id": END},
    PADDED | {"pool": "eos", "eos_id": END, "pad_id": END},
    {"pool": "eot", "layers": 0},
    PADDED | {"pool": "mean", "layers": 0},
]
"""Towers whose padding is never computed."""
UNPACKED = [
    {"pool": "last"},
    {"pool": "last", "mask_padding": True},
    {"pool": "last", "causal": False},
    {"pool": "mean", "causal": False},
    {"pool": "eot", "causal": False},
]
"""Towers whose features depend on their padding, or whose pooled token lies in it."""


def tower_of(**options: object) -> TextTransformer:
    torch.manual_seed(0)
    config = {"width": 32, "heads": 2, "layers": 3, "vocab_size": VOCABULARY, "context_length": CONTEXT} | options
    return randomise(TextTransformer(TextConfig(**config), 16))


def captions(pad: int = 0) -> Tensor:
    """Texts of every length from one token to the whole context, some with padding inside, one without an end."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, CONTEXT, 5, 3, 5, 1, 2, 12, 7, 5]
    ids = torch.randint(1, END, (len(lengths), CONTEXT), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length - 1] = END
        ids[row, length:] = pad
    ids[2, 1] = ids[8, 3] = pad
    ids[3, 2] = 7
    return ids


def features_and_gradients(
    tower: TextTransformer, ids: Tensor, monkeypatch: pytest.MonkeyPatch, *, packed: bool, bf16: bool = False
) -> list[Tensor]:
    tower.zero_grad()
    with monkeypatch.context() as patch:
        if not packed:
            patch.setattr(text_tower, "_packable", lambda text_BT: False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = tower(ids)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features.float() * weight).sum().backward()
    return [features.detach().float(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)]


def computed_tokens(tower: TextTransformer, ids: Tensor) -> int:
    """How many tokens enter the blocks."""
    shapes = []
    handle = tower.transformer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    tower(ids)
    handle.remove()
    return math.prod(shapes[0][:-1])


@pytest.mark.parametrize("options", PACKED)
def test_features_and_gradients_are_the_padded_ones(options, monkeypatch) -> None:
    tower, ids = tower_of(**options), captions(options.get("pad_id", 0))
    packed = features_and_gradients(tower, ids, monkeypatch, packed=True)
    padded = features_and_gradients(tower, ids, monkeypatch, packed=False)
    assert len(packed) == len(padded) > 1
    assert computed_tokens(tower, ids) < ids.numel()
    assert all(relative(ours, theirs) <= 2e-6 for ours, theirs in zip(packed, padded) if theirs.any())
    assert all(bool(ours.any()) == bool(theirs.any()) for ours, theirs in zip(packed, padded))


@pytest.mark.parametrize("options", PACKED)
def test_bf16_features_and_gradients_are_as_close_to_float32_as_the_padded_ones(options, monkeypatch) -> None:
    tower, ids = tower_of(**options), captions(options.get("pad_id", 0))
    exact = features_and_gradients(tower, ids, monkeypatch, packed=False)
    padded = features_and_gradients(tower, ids, monkeypatch, packed=False, bf16=True)
    packed = features_and_gradients(tower, ids, monkeypatch, packed=True, bf16=True)
    everything = [torch.cat([part.flatten() for part in parts[1:]]) for parts in (packed, padded, exact)]
    for ours, theirs, expected in ([parts[0] for parts in (packed, padded, exact)], everything):
        assert relative(ours, expected) <= 1.3 * relative(theirs, expected) + 1e-3


@pytest.mark.parametrize("options", UNPACKED)
def test_towers_that_see_their_padding_compute_it(options) -> None:
    tower, ids = tower_of(**options), captions()
    assert computed_tokens(tower, ids) == ids.numel()
    assert torch.equal(tower.trim(ids), ids)


def test_what_is_computed_ends_at_the_end_token() -> None:
    ids = captions()
    ends = sum(int(row.argmax()) + 1 for row in ids)
    assert computed_tokens(tower_of(pool="eot"), ids) == ends
    assert computed_tokens(tower_of(pool="eot", mask_padding=True), ids) == ends - 2
    assert computed_tokens(tower_of(pool="first"), ids) == len(ids)
    words = int((ids != 0).sum())
    assert computed_tokens(tower_of(pool="mean", **PADDED), ids) == words


@pytest.mark.parametrize("options", PACKED)
def test_trimmed_texts_have_the_same_features(options) -> None:
    tower, ids = tower_of(**options), captions(options.get("pad_id", 0))[[0, 2, 4]]
    trimmed = tower.trim(ids)
    assert trimmed.shape == (3, 1 if options["pool"] == "first" and options.get("causal", True) else 5)
    assert relative(tower(trimmed), tower(ids)) <= 1e-6


@pytest.mark.parametrize("ids", [captions()[:1], captions()[1:2], captions()[[0, 5]], captions()[[1, 7]]])
@pytest.mark.parametrize("options", [{"pool": "eot"}, PADDED | {"pool": "mean"}])
def test_single_texts_and_batches_of_one_length(ids, options, monkeypatch) -> None:
    tower = tower_of(**options)
    packed = features_and_gradients(tower, ids, monkeypatch, packed=True)
    padded = features_and_gradients(tower, ids, monkeypatch, packed=False)
    assert all(relative(ours, theirs) <= 2e-6 for ours, theirs in zip(packed, padded) if theirs.norm() > 1e-5)


@pytest.mark.parametrize("options", [{"pool": "eot"}, PADDED | {"pool": "mean"}])
def test_rows_of_padding_and_no_rows_at_all(options, monkeypatch) -> None:
    tower, ids = tower_of(**options), captions()
    ids[4] = 0
    packed = features_and_gradients(tower, ids, monkeypatch, packed=True)
    padded = features_and_gradients(tower, ids, monkeypatch, packed=False)
    assert all(relative(ours, theirs) <= 2e-6 for ours, theirs in zip(packed, padded))
    assert tower(ids[:0]).shape == (0, 16)


@pytest.mark.parametrize("options", [{"pool": "eot"}, PADDED | {"pool": "mean"}])
def test_stochastic_depth_drops_the_same_texts_as_in_the_padded_batch(options, monkeypatch) -> None:
    tower, ids = tower_of(drop_path=0.5, **options).train(), captions()
    found = []
    for packed in (True, False):
        torch.manual_seed(3)
        found.append(features_and_gradients(tower, ids, monkeypatch, packed=packed))
    assert all(relative(ours, theirs) <= 2e-6 for ours, theirs in zip(*found))
    assert relative(found[0][0], tower.eval()(ids)) > 1e-2


@pytest.mark.parametrize("options", [{"pool": "eot"}, PADDED | {"pool": "mean"}])
def test_dropout_repeats_with_the_generator_also_under_activation_checkpointing(options, monkeypatch) -> None:
    tower, ids = tower_of(dropout=0.2, drop_path=0.2, **options).train(), captions()
    found = []
    for checkpointed in (False, False, True):
        tower.transformer.checkpoint_activations = checkpointed
        torch.manual_seed(3)
        found.append(features_and_gradients(tower, ids, monkeypatch, packed=True))
    assert all(torch.equal(first, second) for first, second in zip(*found[:2]))
    assert all(torch.equal(first, second) for first, second in zip(*found[1:]))
    assert relative(found[0][0], tower.eval()(ids)) > 1e-2


def test_bfloat16_weights_average_in_float32(monkeypatch) -> None:
    tower, ids = tower_of(pool="mean", **PADDED), captions()
    exact = tower(ids)
    tower.bfloat16()
    packed = tower(ids)
    monkeypatch.setattr(text_tower, "_packable", lambda text_BT: False)
    padded = tower(ids)
    assert packed.dtype == padded.dtype == torch.bfloat16
    assert relative(packed.float(), exact) <= 1.2 * relative(padded.float(), exact)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-H-14-CLIPA", "ViT-B-16-SigLIP"])
def test_features_and_gradients_are_openclips(name, bf16) -> None:
    """In bf16 both are held to OpenCLIP's in float32. CLIP's kind of tower is packed, CLIPA's and SigLIP's are not."""
    cfg = shrunk_config(name)
    theirs = build_openclip(cfg)
    ours = from_openclip(our_config(cfg), theirs.state_dict()).eval()
    config = ours.config.text
    ids = captions()[:, : config.context_length].clamp(max=config.vocab_size - 1)
    weight = torch.randn(len(ids), ours.embed_dim, generator=torch.Generator().manual_seed(2))

    def step(model: torch.nn.Module, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = model.encode_text(ids).float()
        (features * weight).sum().backward()
        return features.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    table = openclip_table(ours.config, custom_text=cfg.get("custom_text", False))
    exact, peer, found = step(theirs, False), step(theirs, bf16), step(ours, bf16)

    gradients = []
    for key, gradient in found[1].items():
        source, transpose = table[key].keys[0], table[key].transpose
        expected, peers = ((g.T if transpose else g) for g in (exact[1][source], peer[1][source]))
        gradients.append((gradient, peers, expected))
    everything = [torch.cat([part.flatten() for part in parts]) for parts in zip(*gradients)]
    for mine, peers, expected in ((found[0], peer[0], exact[0]), everything):
        assert relative(mine, expected) <= (1.3 * relative(peers, expected) + 1e-3 if bf16 else 1e-5)
    assert bf16 or all(relative(mine, expected) <= 2e-5 for mine, _, expected in gradients)


@pytest.mark.parametrize("options", [{"pool": "eot"}, PADDED | {"pool": "mean"}])
def test_compiled_and_exported_towers_run_padded_to_the_same_features(options) -> None:
    tower, ids = tower_of(**options).eval(), captions()
    expected = tower(ids)
    torch._dynamo.reset()
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    assert relative(compiled(ids), expected) <= 2e-6
    exported = torch.export.export(tower, (ids,)).module()
    assert relative(exported(ids), expected) <= 2e-6
    other = ids.flip(0)
    assert relative(exported(other), tower(other)) <= 2e-6
    assert copy.deepcopy(tower).to("meta")(ids.to("meta")).shape == expected.shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("lengths", [[5, 5, 1, 0, 7, 7, 7, 2], [4], [3, 3, 3], [0, 0], []])
def test_attention_of_packed_sequences_against_float64(lengths, dtype, tolerance, causal) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 8).to(dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = attention(qkv, causal=causal, cu_seqlens=cu_seqlens, max_seqlen=max(lengths, default=0))
    assert out.shape == (sum(lengths), 2, 8) and out.dtype == dtype
    exact = qkv.detach().double().requires_grad_()
    rows = []
    for part in exact.split(lengths):
        q_HND, k_HND, v_HND = part.permute(1, 2, 0, 3)
        scores = q_HND @ k_HND.mT / math.sqrt(8)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        rows.append((scores.softmax(-1) @ v_HND).transpose(0, 1))
    expected = torch.cat(rows) if rows else exact[:, 0]
    if not sum(lengths):
        return
    grad = torch.randn(expected.shape, dtype=torch.float64)
    out.backward(grad.to(dtype))
    expected.backward(grad)
    assert relative(out.double(), expected) <= tolerance
    assert relative(qkv.grad.double(), exact.grad) <= 2 * tolerance


def test_packing_orders_by_length_and_finds_tokens_again() -> None:
    needed = torch.tensor([[True, True, True], [True, False, False], [True, False, True], [True, False, False]])
    packing = Packing.of(needed)
    assert packing.row_P.tolist() == [1, 3, 2, 2, 0, 0, 0]
    assert packing.position_P.tolist() == [0, 0, 0, 2, 0, 1, 2]
    assert packing.cu_seqlens.tolist() == [0, 1, 2, 4, 7] and packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == 3 and packing.rows == 4
    assert packing.places(torch.tensor([2, 0, 2, 0])).tolist() == [6, 0, 3, 1]
    assert packing.places(0).tolist() == [4, 0, 2, 1]
    assert packing.sums(torch.arange(7.0)[:, None]).flatten().tolist() == [15, 0, 5, 1]
