"""Attention through PyTorch's own, the reference, the choice between them, and what is refused."""

import sys

import pytest
import torch

from mmbase_kernels import attention_sdpa as sdpa
from mmbase_kernels import choice
from mmbase_kernels.attention import attention

from .sequences import (
    TOLERANCE,
    assert_close_to_float64,
    boundaries,
    exact,
    output_and_gradient,
    qkv_and_gradient,
)

attention_module = sys.modules[attention.__module__]  # the package's attribute of that name is the function
LENGTHS = [1, 7, 49, 50, 64, 65, 77, 197, 257, 577, 1000]
RAGGED = [
    ([0, 5, 77, 0, 1, 64], 77),
    ([3, 33], 64),
    ([20, 20, 20, 7, 7, 20], None),
    ([0, 0], 5),
    ([30], 30),
    ([], None),
]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_error_against_float64(length, dtype, causal):
    qkv, grad = qkv_and_gradient((2 if length < 100 else 1, length), 2, 64, dtype, seed=length)
    assert_close_to_float64(qkv, grad, impl="sdpa", causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "longest"), RAGGED, ids=str)
def test_sequences_of_different_lengths(lengths, longest, causal, dtype):
    qkv, grad = qkv_and_gradient((sum(lengths),), 2, 16, dtype, seed=6)
    cu_seqlens = boundaries(lengths)
    if not lengths:
        assert attention(qkv, cu_seqlens=cu_seqlens).shape == grad.shape
        return
    assert_close_to_float64(qkv, grad, impl="sdpa", causal=causal, cu_seqlens=cu_seqlens, max_seqlen=longest)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_grouping_are_the_same(causal):
    lengths = [4, 0, 9, 4, 9, 0, 4, 1]
    qkv, grad = qkv_and_gradient((sum(lengths),), 2, 16, torch.float64, seed=1)
    cu_seqlens, distinct = boundaries(lengths), [1, 4, 9]

    def by_length(x):
        return sdpa._by_length(x, cu_seqlens, cu_seqlens.diff(), distinct, causal, None)

    def padded(x):
        return sdpa._padded(x, cu_seqlens, 12, causal, None)

    want = exact(qkv, grad, causal=causal, cu_seqlens=cu_seqlens)
    for way in (by_length, padded):
        for got, b in zip(output_and_gradient(qkv, grad, of=way), want):
            torch.testing.assert_close(got, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_saturated_softmax(dtype):
    """Logits of standard deviation 30: exponentials magnify the roundings of scores kept in 16 bits on the CPU."""
    qkv, grad = qkv_and_gradient((1, 77), 2, 64, dtype, seed=2)
    want = exact(qkv, grad, scale=30 / 8)
    got = output_and_gradient(qkv, grad, impl="sdpa", scale=30 / 8)
    with torch.no_grad():
        fused = attention(qkv, impl="sdpa", scale=30 / 8)
    bound = {torch.float32: 3e-5, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]
    for ours, b in zip(got, want):
        assert (ours.double() - b).norm() <= bound * b.norm()
    assert (fused.double() - want[0]).norm() <= 3 * TOLERANCE[dtype] * want[0].norm()


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_the_equation_and_has_second_derivatives(varlen, causal):
    options = {"causal": causal, "scale": 0.4, "cu_seqlens": boundaries([3, 0, 4]) if varlen else None}
    qkv, grad = qkv_and_gradient((7,) if varlen else (2, 4), 2, 3, torch.float64, seed=3)
    got = output_and_gradient(qkv, grad, impl="reference", **options)
    for ours, b in zip(got, exact(qkv, grad, **options)):
        torch.testing.assert_close(ours, b, rtol=0, atol=1e-13)
    leaf = qkv.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: attention(x, impl="reference", **options), (leaf,))
    assert attention(qkv.half(), impl="reference", **options).dtype == torch.float16


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(varlen, dtype):
    torch._dynamo.reset()
    options = {"cu_seqlens": boundaries([8, 0, 4]), "max_seqlen": 9} if varlen else {}

    def function(x, options):
        return attention(x, causal=True, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    qkv, grad = qkv_and_gradient((12,) if varlen else (2, 12), 2, 16, dtype, seed=4)
    want, got = (output_and_gradient(qkv, grad, of=f, options=options) for f in (function, compiled))
    for a, b in zip(got, want):
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * b.double().norm()


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_exports_with_any_boundaries(impl):
    class Layer(torch.nn.Module):
        def forward(self, qkv, cu_seqlens):
            return attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=20, impl=impl)

    qkv, _ = qkv_and_gradient((30,), 2, 16, torch.float32)
    program = torch.export.export(Layer(), (qkv, boundaries([20, 10])))
    for other in ([13, 17], [11, 19]):
        got = program.module()(qkv, boundaries(other))
        torch.testing.assert_close(got, Layer()(qkv, boundaries(other)))


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_lies_as_the_projection_wants_it(causal):
    """Packed and contiguous: otherwise the projection's backward copies it once more."""
    qkv = torch.randn(2, 7, 3, 2, 32, requires_grad=True)
    out = attention(qkv, causal=causal)
    (gradient,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert gradient.is_contiguous()


def test_twice_is_equal_to_the_bit():
    qkv, grad = qkv_and_gradient((60,), 2, 16, torch.float32)
    options = {"cu_seqlens": boundaries([13, 7, 13, 27]), "causal": True}
    first, second = (output_and_gradient(qkv, grad, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_auto_asks_the_table_for_what_the_kernels_take(monkeypatch):
    asked = []
    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    monkeypatch.setattr("mmbase_kernels.dispatch.hindrance", lambda device: "")
    monkeypatch.setattr("mmbase_kernels.dispatch.measured_faster", lambda *a, **k: asked.append(k) or True)

    class Projection:
        device, dtype = torch.device("cuda"), torch.bfloat16

        def __init__(self, width):
            self.shape = (2, 5, 3, 4, width)

    def chosen(width=64, length=50, causal=False, varlen=False):
        return attention_module._choose("auto", Projection(width), length, causal, varlen)

    assert [chosen(), chosen(causal=True), chosen(varlen=True), chosen(80, 9, True, True)] == ["triton"] * 4
    assert [one["case"] for one in asked] == ["", "causal", "varlen", "causal varlen"]
    assert asked[3] == {"width": 80, "size": 9, "case": "causal varlen"}
    assert [chosen(20), chosen(136), chosen(length=1025)] == ["sdpa"] * 3 and len(asked) == 4


QKV = torch.zeros(10, 3, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 96)}, r"must be \[B, N, 3, H, D\] not \[2, 5, 96\]: unflatten"),
        ({"qkv": torch.zeros(2, 5, 2, 4, 16)}, r"not \[2, 5, 2, 4, 16\]"),
        ({"qkv": torch.zeros(2, 5, 3, 0, 16)}, r"must have heads and a width, not \[2, 5, 3, 0, 16\]"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 16).int()}, "floating point, not torch.int32"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 16), "max_seqlen": 5}, "max_seqlen=5 goes with cu_seqlens"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 16), "scale": -1.0}, "positive and finite, not -1.0: negate"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 16), "scale": torch.inf}, "positive and finite, not inf"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 16), "impl": "flash"}, "one of auto, triton, sdpa, reference, not 'flash'"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 64), "impl": "triton"}, "needs a CUDA device.*on cpu; use impl='sdpa'"),
        ({"qkv": QKV[None], "cu_seqlens": boundaries([10])}, r"must be \[total, 3, H, D\], with cu_seqlens, not"),
        ({"cu_seqlens": boundaries([10]).long()}, r"int32 tensor, not torch.int64: convert it with .int\(\)"),
        ({"cu_seqlens": [0, 10]}, "int32 tensor, not <class 'list'>"),
        ({"cu_seqlens": boundaries([10])[None]}, r"must be \[B \+ 1\], not \[1, 2\]"),
        ({"cu_seqlens": boundaries([10])[:0]}, r"must be \[B \+ 1\], not \[0\]"),
        ({"cu_seqlens": boundaries([10]).to("meta")}, "devices differ: cu_seqlens on meta, qkv on cpu"),
        ({"cu_seqlens": boundaries([10])[1:]}, "must start at 0, not at 10: prepend"),
        ({"cu_seqlens": boundaries([4, 5])}, "ends at 9, but qkv has 10 tokens"),
        ({"cu_seqlens": boundaries([6, -2, 6])}, "must not decrease, as from 6 to 4 at 2"),
        ({"cu_seqlens": boundaries([8, 2]), "max_seqlen": 7}, "max_seqlen=7, but a sequence has 8 tokens"),
        ({"cu_seqlens": boundaries([8, 2]), "max_seqlen": -1}, "must not be negative, not -1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        attention(**{"qkv": QKV, **arguments})
    assert "\n" not in str(caught.value)


def test_a_compiled_graph_needs_the_longest_length():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, c: attention(x, cu_seqlens=c), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="max_seqlen"):
        compiled(QKV, boundaries([10]))


@pytest.mark.parametrize("lengths", [[4, 5], [6, -2, 6], [8, 2], [11, -1]])
def test_the_assertion_of_gpus_finds_wrong_boundaries(lengths):
    """On the CPU it raises at once."""
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the total, in steps of at most max_seqlen"):
        attention_module._assert_boundaries(boundaries(lengths), 7, 10)


def test_the_assertion_is_made_again_when_something_changes(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "_assert_async", lambda good, message: made.append(bool(good)))
    cu_seqlens = boundaries([7, 3])
    for _ in range(2):
        attention_module._assert_boundaries(cu_seqlens, 7, 10)
    attention_module._assert_boundaries(cu_seqlens, 8, 10)
    cu_seqlens[1] = 9
    attention_module._assert_boundaries(cu_seqlens, 8, 10)
    assert made == [True, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_triton_on_a_gpu(length, dtype, causal):
    qkv, grad = qkv_and_gradient((3, length), 5, 64, dtype, seed=length, device="cuda")
    assert_close_to_float64(qkv, grad, impl="triton", causal=causal)
    first, second = (output_and_gradient(qkv, grad, impl="triton", causal=causal) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(32, 129, 8))
@pytest.mark.parametrize("length", [50, 77, 197, 577])
def test_head_widths_on_a_gpu(width, length):
    qkv, grad = qkv_and_gradient((2, length), 3, width, torch.bfloat16, seed=width, device="cuda")
    assert_close_to_float64(qkv, grad, impl="triton", causal=length == 77)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "longest"), [*RAGGED[:5], ([0, 577, 130, 12, 0, 300], 600)], ids=str)
def test_sequences_of_different_lengths_on_a_gpu(lengths, longest, causal, dtype):
    qkv, grad = qkv_and_gradient((sum(lengths),), 3, 64, dtype, seed=7, device="cuda")
    options = {"cu_seqlens": boundaries(lengths, "cuda"), "max_seqlen": longest, "causal": causal}
    assert_close_to_float64(qkv, grad, impl="triton", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [50, 77, 197, 257, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_saturated_softmax_on_a_gpu(length, dtype):
    qkv, grad = qkv_and_gradient((2, length), 3, 64, dtype, seed=length, device="cuda")
    assert_close_to_float64(qkv, grad, impl="triton", scale=30 / 8)


@pytest.mark.gpu
def test_wrong_devices_are_named():
    with pytest.raises(ValueError, match="devices differ: cu_seqlens on cpu, qkv on cuda:0"):
        attention(QKV.cuda(), cu_seqlens=boundaries([10]))
