"""Attention in Triton's interpreter against float64; run by test_triton_interpreted.py."""

import pytest
import torch

from mmbase_kernels import attention_triton, attention_tuning
from mmbase_kernels.attention import attention

from ..sequences import assert_close_to_float64, boundaries, output_and_gradient, qkv_and_gradient


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel forgot to write is NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def kernel_names(length, width=64, dtype=torch.float16, ragged=False):
    steps = ("forward", "backward")
    return [attention_tuning.plan(s, dtype, width, length, "sm_90", ragged=ragged).kernel for s in steps]


@pytest.mark.parametrize("length", [1, 7, 49, 50, 64, 65, 77, 128, 197, 256, 257])
def test_lengths(length):
    assert_close_to_float64(*qkv_and_gradient((1, length), 2, 64, torch.float16, seed=length), impl="triton")


@pytest.mark.parametrize("length", [7, 77, 128, 150])
def test_causal(length):
    qkv, grad = qkv_and_gradient((1, length), 2, 64, torch.float16, seed=length)
    assert_close_to_float64(qkv, grad, impl="triton", causal=True)


@pytest.mark.parametrize("length", [577, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(length, causal):
    qkv, grad = qkv_and_gradient((1, length), 1, 64, torch.float16, seed=length)
    assert_close_to_float64(qkv, grad, impl="triton", causal=causal)


@pytest.mark.parametrize(("length", "causal"), [(1, False), (7, True), (50, False), (77, True)])
def test_float32(length, causal):
    qkv, grad = qkv_and_gradient((1, length), 1, 64, torch.float32, seed=length)
    assert_close_to_float64(qkv, grad, impl="triton", causal=causal)


@pytest.mark.parametrize("width", [32, 40, 72, 80, 88, 96, 104, 128])
def test_head_widths(width):
    assert_close_to_float64(*qkv_and_gradient((2, 20), 2, width, torch.float16, seed=width), impl="triton")
    assert_close_to_float64(*qkv_and_gradient((1, 70), 1, width, torch.float16, seed=width), impl="triton", causal=True)


@pytest.mark.parametrize("length", [128, 140])
def test_the_widest_head_in_long_sequences(length):
    assert_close_to_float64(*qkv_and_gradient((1, length), 1, 104, torch.float16, seed=4), impl="triton")


def test_float32_of_a_wide_head():
    assert_close_to_float64(*qkv_and_gradient((1, 33), 1, 80, torch.float32, seed=5), impl="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "longest"), [([0, 5, 77, 0, 1, 64], 77), ([3, 33], 64), ([0, 130, 12, 0], 130), ([0, 0], 5), ([9], 9)]
)
def test_sequences_of_different_lengths(lengths, longest, causal, dtype):
    if dtype == torch.float32 and max(lengths) > 64:
        lengths, longest = [min(length, 40) for length in lengths], 40
    qkv, grad = qkv_and_gradient((sum(lengths),), 1, 64, dtype, seed=6)
    cu_seqlens = boundaries(lengths)
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": longest, "causal": causal}
    assert_close_to_float64(qkv, grad, impl="triton", **options)


@pytest.mark.parametrize("length", [50, 77, 197, 300])
def test_saturated_softmax(length):
    """Logits of standard deviation 30: most queries look at one key."""
    qkv, grad = qkv_and_gradient((1, length), 1, 64, torch.float16, seed=length)
    assert_close_to_float64(qkv, grad, impl="triton", scale=30 / 8)


@pytest.mark.parametrize("scale", [30 / 8, 1e-3])
def test_scales_in_float32(scale):
    qkv, grad = qkv_and_gradient((1, 50), 1, 64, torch.float32, seed=8)
    assert_close_to_float64(qkv, grad, impl="triton", scale=scale)


@pytest.mark.parametrize("length", [50, 100, 197])
def test_very_negative_logits(length):
    """A log-sum-exp of -1,000: a key past the end, whose logit would be 0, must not be exponentiated."""
    qkv, grad = qkv_and_gradient((1, length), 1, 64, torch.float16, seed=9)
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 40.0, -200.0
    # 200 times the rounding of dS, whose sum over the keys is 0, is part of dQ.
    assert_close_to_float64(qkv, grad, impl="triton", tolerance=2e-3)


@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
@pytest.mark.parametrize(("length", "width"), [(77, 64), (77, 80), (200, 64)])
def test_plans_of_other_devices(architecture, length, width, monkeypatch):
    monkeypatch.setattr(attention_triton, "architecture", lambda device: architecture)
    assert_close_to_float64(*qkv_and_gradient((1, length), 1, width, torch.float16, seed=12), impl="triton")


def test_every_kernel_is_reached():
    reached = {name for length in (50, 128, 197, 577) for name in kernel_names(length)}
    assert reached == {"forward", "forward_loop", "backward_tile", "backward_queries", "grad_queries"}
    assert kernel_names(197, ragged=True) == ["forward_loop", "grad_queries"]
    assert kernel_names(50, dtype=torch.float32) == ["forward_loop", "grad_queries"]


@pytest.mark.parametrize("length", [50, 128, 197, 300])
def test_two_runs_are_bitwise_equal(length):
    qkv, grad = qkv_and_gradient((1, length), 1, 64, torch.float16, seed=10)
    first, second = (output_and_gradient(qkv, grad, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert first[1].is_contiguous()


def test_inputs_that_are_not_contiguous_or_aligned():
    qkv, grad = qkv_and_gradient((2, 20), 2, 64, torch.float16, seed=11)
    want = output_and_gradient(qkv, grad, impl="triton")
    strided = qkv.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    shifted = torch.empty(qkv.numel() + 1, dtype=qkv.dtype)[1:].view_as(qkv).copy_(qkv)
    assert not strided.is_contiguous() and shifted.data_ptr() % 16
    for other in (strided, shifted):
        got = output_and_gradient(other, grad, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    got = output_and_gradient(qkv, grad.transpose(1, 2).contiguous().transpose(1, 2), impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_boundaries_that_are_not_contiguous():
    lengths = [9, 0, 70, 33]
    qkv, grad = qkv_and_gradient((sum(lengths),), 2, 32, torch.float32)
    apart = torch.stack([boundaries(lengths), boundaries([1, 2, 3, 4])], dim=1)[:, 0]
    assert not apart.is_contiguous()
    for causal in (False, True):
        assert_close_to_float64(qkv, grad, impl="triton", cu_seqlens=apart, max_seqlen=70, causal=causal)


def test_nothing_to_do():
    for shape, options in (((0, 5), {}), ((3, 0), {}), ((0,), {"cu_seqlens": boundaries([0, 0])})):
        qkv, grad = qkv_and_gradient(shape, 2, 64, torch.float16)
        out, gradient = output_and_gradient(qkv, grad, impl="triton", **options)
        assert out.shape == grad.shape and gradient.shape == qkv.shape


@pytest.mark.parametrize("length", [50, 197])
@pytest.mark.parametrize("varlen", [False, True])
def test_opcheck(length, varlen):
    qkv, _ = qkv_and_gradient((2 * length,), 1, 64, torch.float16)
    cu_seqlens = boundaries([length, length]) if varlen else None
    arguments = qkv.requires_grad_(), cu_seqlens, length, varlen, 0.125
    torch.library.opcheck(torch.ops.mmbase_kernels.attention.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    torch._dynamo.reset()

    def function(qkv):
        return attention(qkv, causal=True, impl="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (12, 17, 12):
        qkv, grad = qkv_and_gradient((2, length), 1, 64, torch.float16, seed=length)
        want, got = (output_and_gradient(qkv, grad, of=f) for f in (function, compiled))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, qkv, cu_seqlens):
            return attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=20, impl="triton")

    qkv, _ = qkv_and_gradient((30,), 1, 64, torch.float16)
    program = torch.export.export(Layer(), (qkv, boundaries([20, 10])))
    assert "mmbase_kernels.attention" in program.graph_module.code
    other = boundaries([13, 17])
    assert torch.equal(program.module()(qkv, other), Layer()(qkv, other))


def test_a_graph_is_used_twice_and_second_derivatives_are_refused():
    qkv, grad = qkv_and_gradient((1, 20), 1, 64, torch.float16)
    out = attention(qkv.requires_grad_(), impl="triton")
    first, second = (torch.autograd.grad(out, qkv, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad((out**2).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; impl='reference' has one"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    qkv, _ = qkv_and_gradient((1, 20), 1, 64, torch.float32)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: attention(x, impl="triton"), (qkv,), (qkv,))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 4, 3, 2, 20), torch.float32, "head widths of 32 to 128 in steps of 8, not 20"),
        ((1, 4, 3, 2, 136), torch.float32, "head widths of 32 to 128 in steps of 8, not 136"),
        ((1, 4, 3, 2, 64), torch.float64, "takes float32, float16 or bfloat16, not torch.float64"),
        ((1, 1025, 3, 1, 64), torch.float16, "up to 1024 tokens a sequence, not 1025"),
    ],
)
def test_what_triton_does_not_take(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(shape, dtype=dtype), impl="triton")


def test_no_statistics_where_they_are_computed_again():
    qkv, _ = qkv_and_gradient((77,), 2, 64, torch.float16)
    assert attention_triton.forward(qkv, None, 77, causal=True, scale=0.125)[1].numel() == 0
    assert attention_triton.forward(qkv.float(), None, 77, causal=True, scale=0.125)[1].shape == (2, 77)
