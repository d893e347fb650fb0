"""Text towers over packed tokens: the same features and gradients as over padded texts, and OpenCLIP's."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.models import text as text_tower
from mmbase.models.config import TextConfig
from mmbase.models.layers import attention
from mmbase.models.openclip import from_openclip, openclip_table
from mmbase.models.packing import Packing
from mmbase.models.text import PackedText, TextTransformer

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
    assert packing.start_B.tolist() == [4, 0, 2, 1]
    x_PD = torch.tensor([[0.0, 6], [1, 5], [2, 4], [3, 3], [4, 2], [5, 1], [6, 0]])
    assert packing.sums(x_PD).tolist() == [[15, 3], [0, 6], [5, 7], [1, 5]]
    assert packing.maxima(x_PD).tolist() == [[6, 2], [0, 6], [3, 4], [1, 5]]
    counts = torch.tensor([True, False, True, False, True, True, False])
    assert packing.means(x_PD, counts).tolist() == [[4.5, 1.5], [0, 6], [2, 4], [0, 0]]


def test_packing_of_known_lengths_is_the_same() -> None:
    lengths = [3, 1, 2, 1, 3]
    packing = Packing.end_to_end([1, 3, 2, 0, 4], [1, 1, 2, 3, 3], torch.device("cpu"))
    expected = Packing.of(torch.arange(3) < torch.tensor(lengths)[:, None])
    for field in dataclasses.fields(Packing):
        value, want = getattr(packing, field.name), getattr(expected, field.name)
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(want)), field.name
        assert not isinstance(want, Tensor) or value.dtype == want.dtype


def test_packed_texts_move_as_tensors_do() -> None:
    packed = tower_of().pack(captions())
    moved = packed.to("meta", non_blocking=True)
    assert type(moved) is PackedText and len(moved) == len(packed) == 10
    parts = torch.utils._pytree.tree_leaves(moved)
    assert [part.device.type for part in parts if isinstance(part, Tensor)] == ["meta"] * 6
    assert moved.packing.max_seqlen == packed.packing.max_seqlen == CONTEXT
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b))
               for a, b in zip(*map(torch.utils._pytree.tree_leaves, (packed, packed.to("cpu")))))  # fmt: skip


@pytest.mark.parametrize("options", PACKED)
def test_texts_packed_beforehand_have_the_features_of_ids(options) -> None:
    """On a CPU, where ids are packed in the tower, to the bit; a tower that must not wait for its device reads none."""
    tower, ids = tower_of(**options), captions(options.get("pad_id", 0))
    packed = tower.pack(ids)
    assert isinstance(packed, PackedText)
    assert torch.equal(tower(packed), tower(ids))
    trimmed = tower.pack(tower.trim(ids))
    assert torch.equal(tower(trimmed), tower(ids))
    everything = tower.to("meta")(packed.to("meta"))  # raises where a value is read
    assert everything.shape == (10, 16)


@pytest.mark.parametrize("options", UNPACKED)
def test_towers_that_see_their_padding_are_given_ids(options) -> None:
    tower, ids = tower_of(**options), captions()
    assert tower.pack(ids) is ids


def test_texts_without_padding_are_left_alone_and_long_ones_refused() -> None:
    tower, ids = tower_of(), captions()
    assert tower.pack(ids[1:2]) is not ids and isinstance(tower.pack(ids[1:2]), Tensor)
    assert tower.pack(ids[:0]).shape == (0, CONTEXT)
    with pytest.raises(MmbaseError, match="texts have 13 tokens but the model's context_length is 12; cut them"):
        tower.pack(torch.ones(2, 13, dtype=torch.int64))


@pytest.mark.parametrize("options", [{"pool": "eot"}, {"pool": "mean"}, PADDED | {"pool": "mean"}])
@pytest.mark.parametrize("marked", [False, True])
def test_one_compiled_graph_serves_packed_texts_of_all_sizes(options, marked) -> None:
    """Forward and backward; marked: every size and number is dynamic from the first call, none is specialised."""
    tower, ids = tower_of(**options), captions()
    torch._dynamo.reset()
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tower, fullgraph=True, backend=backend, dynamic=True if marked else None)
    for rows in ([0, 1, 2, 3], [4, 2, 3, 5, 7], [9, 8, 7, 6, 5, 3], list(range(10))):
        packed = tower.pack(ids[rows])
        if marked:
            text, packing = packed.text_P, packed.packing
            for tensor in (text, packing.row_P, packing.position_P, packing.start_B, packing.cu_seqlens):
                torch._dynamo.mark_dynamic(tensor, 0)
        found = []
        for run in (compiled, tower):
            tower.zero_grad()
            features = run(packed)
            features.square().sum().backward()
            found.append([features.detach(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)])
        assert all(relative(ours, theirs) <= 2e-6 for ours, theirs in zip(*found) if theirs.norm() > 1e-6)
    assert len(compiled_graphs) <= (1 if marked else 2)


def test_exported_with_packed_texts_of_any_size() -> None:
    tower, ids = tower_of().eval(), captions()
    first, second = tower.pack(ids[:7]), tower.pack(ids[3:])
    any_size = {0: torch.export.Dim.AUTO}
    any_packing = [any_size, any_size, any_size, any_size, torch.export.Dim.DYNAMIC]
    program = torch.export.export(tower, (first,), dynamic_shapes=([any_size, any_packing, any_size],)).module()
    for packed in (first, second):
        assert relative(program(packed), tower(packed)) <= 2e-6
