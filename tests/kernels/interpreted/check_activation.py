"""The activation in Triton's interpreter against float64; run by test_triton_interpreted.py."""

import pytest
import torch

from mmbase_kernels import activation_triton, choice
from mmbase_kernels.activation import bias_activation, uses_fused
from mmbase_kernels.activation_tiles import ACTIVATIONS as SHIPPED

from ..activations import ACTIVATIONS, assert_close_to_float64, exact, numbers, output_and_gradients

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore:overflow encountered")]
ALL = pytest.mark.parametrize("activation", ACTIVATIONS)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@ALL
@BOTH
@pytest.mark.parametrize("width", [1, 7, 33, 100, 256, 257, 768, 1000, 1280, 1664, 4096])
def test_widths(width, dtype, activation):
    assert_close_to_float64(*numbers((3, 7, width), dtype, seed=width), activation, impl="triton")


@ALL
@pytest.mark.parametrize("rows", [1, 8, 9, 127, 128, 129, 300])
def test_rows(rows, activation):
    assert_close_to_float64(*numbers((rows, 33), torch.float16, seed=rows), activation, impl="triton")


def test_spans_cover_the_rows_and_are_not_too_short():
    for rows in (1, 7, 64, 65, 127, 128, 1000, 12_800, 201_728, 2**31):
        for width in (1, 256, 257, 3072, 8192, 10**6):
            span = activation_triton.span_of(rows, width)
            spans = -(-rows // span)
            assert span % activation_triton.BACKWARD["BLOCK_M"] == 0
            assert spans == 1 or span >= activation_triton.SHORTEST
            assert spans * -(-width // activation_triton.BACKWARD["BLOCK_D"]) <= max(2112, -(-width // 256))
    assert -(-201_728 // activation_triton.span_of(201_728, 3072)) > 150


@ALL
@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (2, 3, 4, 5)])
def test_any_leading_shape(shape, activation):
    assert_close_to_float64(*numbers(shape, torch.float16), activation, impl="triton")


@ALL
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.float64, None])
def test_a_bias_of_another_dtype_or_none(bias_dtype, activation):
    for dtype in (torch.float32, torch.float16):
        x, bias, grad = numbers((9, 33), dtype, bias_dtype=bias_dtype)
        assert_close_to_float64(x, None if bias_dtype is None else bias, grad, activation, impl="triton")


@ALL
@pytest.mark.parametrize("trained", ["x", "bias"])
def test_what_is_not_trained_gets_no_gradient(trained, activation):
    x, bias, grad = numbers((9, 33), torch.float32)
    _, *want = output_and_gradients(x, bias, grad, activation, impl="triton")
    leaves = {"x": x, "bias": bias}
    leaves[trained].requires_grad_()
    bias_activation(x, bias, activation, impl="triton").backward(grad)
    assert torch.equal(leaves.pop(trained).grad, want[trained == "bias"])
    assert next(iter(leaves.values())).grad is None


@ALL
def test_every_float16(activation):
    """Each number on its own, to a unit of its last place."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()][None]
    got = output_and_gradients(x, None, torch.ones_like(x), activation, impl="triton")
    want = exact(x, None, torch.ones_like(x), activation)
    for ours, b, near_zero in zip(got, want, (0, 4e-6)):
        # the derivative passes through 0 near -0.75, where its terms cancel
        assert ((ours.double() - b).abs() <= 2.0**-10 * b.abs() + 2.0**-24 + near_zero).all()


@ALL
def test_large_numbers_and_tails_in_float32(activation):
    """Neither squares nor exponentials of what float32 holds become infinite or NaN; tails keep their digits."""
    large = torch.tensor([[-3e38, -1e30, -1e10, -1e4, -50.0, 50.0, 1e4, 1e10, 1e30, 3e38]])
    out, slope = output_and_gradients(large, None, torch.ones_like(large), activation, impl="triton")
    torch.testing.assert_close(out, large.clamp(min=0), rtol=0, atol=1e-27)
    torch.testing.assert_close(slope, (large > 0).float(), rtol=0, atol=1e-27)
    tail = torch.linspace(-6, -1, 1000)[None]
    got = output_and_gradients(tail, None, torch.ones_like(tail), activation, impl="triton")
    for ours, b in zip(got, exact(tail, None, torch.ones_like(tail), activation)):
        assert ((ours.double() - b).abs() <= 5e-6 * b.abs()).all()


@ALL
def test_nan_and_infinity_pass_through(activation):
    x = torch.tensor([[torch.nan, torch.inf, 1.0]])
    out, slope = output_and_gradients(x, None, torch.ones_like(x), activation, impl="triton")
    assert out[0, 0].isnan() and slope[0, 0].isnan() and out[0, 1] == torch.inf and out[0, 2].isfinite()


@ALL
@BOTH
def test_two_runs_are_bitwise_equal(dtype, activation):
    values = numbers((200, 300), dtype)
    first, second = (output_and_gradients(*values, activation, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_inputs_that_are_not_contiguous_or_aligned():
    x, bias, grad = numbers((20, 64), torch.float16)
    want = output_and_gradients(x, bias, grad, "gelu", impl="triton")
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    strided_bias = torch.stack([bias, bias], 1)[:, 0]
    expanded = grad[:1].expand(20, 64)
    for other in (x.T.contiguous().T, shifted):
        got = output_and_gradients(other, strided_bias, grad.T.contiguous().T, "gelu", impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    want = output_and_gradients(x, bias, expanded.contiguous(), "gelu", impl="triton")
    got = output_and_gradients(x, bias, expanded, "gelu", impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@ALL
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias, activation):
    x, bias, _ = numbers((6, 8), torch.float32)
    arguments = x.requires_grad_(), bias.requires_grad_() if with_bias else None, activation
    torch.library.opcheck(torch.ops.mmbase_kernels.bias_activation.default, arguments)


@pytest.mark.parametrize("by_environment", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic, by_environment, monkeypatch):
    torch._dynamo.reset()
    impl = "auto" if by_environment else "triton"
    if by_environment:
        monkeypatch.setenv(choice.ENVIRONMENT, "triton")

    def layer(x, bias, activation):
        assert uses_fused(x, activation, width=x.shape[-1], impl=impl)
        return bias_activation(x, bias, activation, impl=impl)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (12, 17, 12):
        values = numbers((2, rows, 33), torch.float16, seed=rows)
        want, got = (output_and_gradients(*values, "quick_gelu", of=f) for f in (layer, compiled))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_exports_with_any_number_of_rows():
    class Layer(torch.nn.Module):
        def forward(self, x, bias):
            return bias_activation(x, bias, "gelu", impl="triton")

    x, bias, _ = numbers((6, 8), torch.float16)
    shapes = {"x": {0: torch.export.Dim("rows", min=2)}, "bias": None}
    program = torch.export.export(Layer(), (x, bias), dynamic_shapes=shapes)
    assert "mmbase_kernels.bias_activation" in program.graph_module.code
    x, bias, _ = numbers((11, 8), torch.float16, seed=1)
    assert torch.equal(program.module()(x, bias), Layer()(x, bias))


def test_a_graph_is_used_twice_and_second_derivatives_are_refused():
    x, bias, grad = numbers((6, 8), torch.float32)
    out = bias_activation(x.requires_grad_(), bias, "gelu", impl="triton")
    first, second = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; impl='reference' has one"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    x, bias, _ = numbers((6, 8), torch.float32)
    for place in (0, 1):
        with pytest.raises(RuntimeError, match="bias_activation has no forward-mode derivative"):
            torch.func.jvp(
                lambda v, place=place: bias_activation(*((v, bias) if place == 0 else (x, v)), "gelu", impl="triton"),
                ((x, bias)[place],),
                ((x, bias)[place],),
            )


def test_other_dtypes_are_named():
    with pytest.raises(
        ValueError, match=r"^impl='triton' takes float32, float16 or bfloat16, not torch\.float64: use impl='torch'"
    ):
        bias_activation(torch.zeros(2, 3, dtype=torch.float64), None, "gelu", impl="triton")


def test_every_activation_is_compiled_by_the_offline_check():
    assert SHIPPED == ACTIVATIONS
