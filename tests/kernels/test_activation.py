"""The activation through PyTorch's operations, the reference, when it is fused, and what is refused."""

import sys

import pytest
import torch
import torch.nn.functional as F

from mmbase_kernels import bias_activation, choice
from mmbase_kernels.activation import activate, uses_fused

from .activations import (
    ACTIVATIONS,
    assert_close_to_float64,
    equation,
    exact,
    numbers,
    output_and_gradients,
    pytorch,
)

module = sys.modules[bias_activation.__module__]
WIDTHS = [1, 7, 33, 100, 768, 1000, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = pytest.mark.parametrize("activation", ACTIVATIONS)


@ALL
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_error_against_float64(width, dtype, impl, activation):
    assert_close_to_float64(*numbers((3, 5, width), dtype, seed=width), activation, impl=impl)


@ALL
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (0, 5), (2, 0, 5), (2, 3, 4, 5)])
def test_any_leading_shape(shape, impl, activation):
    for bias_dtype in (torch.float32, torch.float64, torch.float16):
        assert_close_to_float64(*numbers(shape, torch.float32, bias_dtype=bias_dtype), activation, impl=impl)
    x, _, grad = numbers(shape, torch.float32)
    assert_close_to_float64(x, None, grad, activation, impl=impl)


@ALL
def test_on_a_cpu_auto_is_pytorchs_to_the_bit(activation):
    x, bias, grad = numbers((4, 7), torch.float32)
    got, want = (output_and_gradients(x, bias, grad, activation, of=of) for of in (bias_activation, pytorch))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@ALL
def test_the_reference_is_the_equation_and_has_second_derivatives(activation):
    x, bias, grad = numbers((2, 3), torch.float64)
    got = output_and_gradients(x, bias, grad, activation, impl="reference")
    for ours, b in zip(got, exact(x, bias, grad, activation)):
        torch.testing.assert_close(ours, b, rtol=1e-13, atol=1e-14)
    leaves = x.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *v: bias_activation(*v, activation, impl="reference"), leaves)


def test_the_activations_are_those_of_pytorch_and_openclip():
    h = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    torch.testing.assert_close(equation(h, None, "gelu"), F.gelu(h))
    torch.testing.assert_close(equation(h, None, "gelu_tanh"), F.gelu(h, approximate="tanh"))
    torch.testing.assert_close(activate(h, "quick_gelu"), h * torch.sigmoid(1.702 * h))
    torch.testing.assert_close(equation(h, None, "quick_gelu"), h * torch.sigmoid(1.702 * h))


@ALL
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_and_exports_as_one_graph(impl, activation):
    torch._dynamo.reset()

    class Layer(torch.nn.Module):
        def forward(self, x, bias):
            return bias_activation(x, bias, activation, impl=impl)

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 6):
        values = numbers((2, rows, 8), torch.float32, seed=rows)
        want, got = (
            output_and_gradients(*values, activation, of=lambda x, b, _, f=f: f(x, b)) for f in (layer, compiled)
        )
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
    x, bias, _ = numbers((4, 8), torch.float32)
    rows = {"x": {0: torch.export.Dim("rows", min=2)}, "bias": None}
    program = torch.export.export(layer, (x, bias), dynamic_shapes=rows)
    x, bias, _ = numbers((9, 8), torch.float32, seed=1)
    torch.testing.assert_close(program.module()(x, bias), layer(x, bias))


def win(**fields):
    base = {"operator": "activation", "architecture": "sm_90", "dtype": torch.bfloat16, "case": "gelu", "width": 3072}
    limits = {"smallest": 6000, "largest": None, "compiled": False, "result": "activation.csv"}
    return choice.Win(**{**base, **limits, **fields})


@pytest.fixture
def on_gpu(monkeypatch):
    """The questions that are asked of a CUDA device, answered as an H200 would."""
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_90")
    monkeypatch.setattr("mmbase_kernels.dispatch.hindrance", lambda device: "")

    class Input:
        device, dtype = torch.device("cuda"), torch.bfloat16

        def __init__(self, *shape):
            self.shape = torch.Size(shape)

    return Input


def test_it_is_fused_where_it_was_measured_to_win(on_gpu, monkeypatch):
    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    assert not uses_fused(on_gpu(128, 50, 768), "gelu", width=3072)
    monkeypatch.setattr(choice, "WINS", (win(),))
    assert uses_fused(on_gpu(128, 50, 768), "gelu", width=3072)
    assert not uses_fused(on_gpu(100, 50, 768), "gelu", width=3072)
    assert not uses_fused(on_gpu(128, 50, 768), "gelu", width=3080)
    assert not uses_fused(on_gpu(128, 50, 768), "quick_gelu", width=3072)
    assert uses_fused(on_gpu(1, 768), "quick_gelu", width=8, impl="triton")
    assert not uses_fused(on_gpu(128, 50, 768), "gelu", width=3072, impl="torch")


def test_autocast_says_which_dtype_is_activated(on_gpu, monkeypatch):
    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    monkeypatch.setattr(choice, "WINS", (win(),))
    x = on_gpu(128, 50, 768)
    x.dtype = torch.float32
    assert not uses_fused(x, "gelu", width=3072)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert uses_fused(x, "gelu", width=3072)


def test_a_device_without_autocast_is_asked_for_none():
    x = torch.empty(2, 3, device="meta")
    assert not uses_fused(x, "gelu", width=5)
    assert bias_activation(x, None, "gelu").is_meta


@pytest.mark.parametrize("value", [None, "torch", "reference"])
def test_the_environment_decides_in_a_compiled_layer_too(value, monkeypatch):
    torch._dynamo.reset()
    if value is None:
        monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    else:
        monkeypatch.setenv(choice.ENVIRONMENT, value)

    def layer(x, weight, bias):
        if uses_fused(x, "gelu", width=weight.shape[0]):
            return bias_activation(F.linear(x, weight), bias, "gelu")
        return activate(F.linear(x, weight, bias), "gelu")

    x, weight, bias = torch.randn(5, 4), torch.randn(8, 4), torch.randn(8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(compiled(x, weight, bias), layer(x, weight, bias))
    assert uses_fused(x, "gelu", width=8) == (value == "reference")


X = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "relu"}, "one of gelu, gelu_tanh, quick_gelu, not 'relu'; did you mean 'gelu'"),
        ({"activation": "gelu_tan"}, "not 'gelu_tan'; did you mean 'gelu_tanh'"),
        ({"impl": "tritn"}, "one of auto, triton, torch, reference, not 'tritn'; did you mean 'triton'"),
        ({"impl": "triton"}, "impl='triton' cannot run: it needs a CUDA device.*on cpu; use impl='torch' or 'auto'"),
        ({"x": X.int()}, "x must be floating point, not torch.int32: convert it"),
        ({"x": [0.0]}, "x must be a dense tensor, not <class 'list'>"),
        ({"x": torch.zeros(())}, r"x must be \[..., D\] with a width, not \[\]"),
        ({"x": torch.zeros(2, 0)}, r"x must be \[..., D\] with a width, not \[2, 0\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[5\], as the last axis of x \[2, 5\], not \[4\]"),
        ({"bias": torch.zeros(2, 5)}, r"bias must be \[5\].*not \[2, 5\]"),
        ({"bias": torch.zeros(5).int()}, "bias must be floating point, not torch.int32"),
        ({"bias": torch.zeros(5, device="meta")}, "devices differ: bias on meta, x on cpu; move one of them"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        bias_activation(**{"x": X, "bias": None, "activation": "gelu", **arguments})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        uses_fused(X, "gellu", width=5)


@pytest.mark.gpu
@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (77, 33), (300, 1000), (12_800, 3072), (3, 8192), (100_000, 64)])
def test_triton_on_a_gpu(rows, width, dtype, activation):
    x, bias, grad = numbers((rows, width), dtype, seed=width, device="cuda")
    assert_close_to_float64(x, bias, grad, activation, impl="triton")
    assert_close_to_float64(x, bias.float(), grad, activation, impl="triton")
    first, second = (output_and_gradients(x, bias, grad, activation, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
def test_more_than_2_31_numbers_on_a_gpu():
    rows, width = 530_000, 4096
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda", generator=generator)
    bias = torch.randn(width, device="cuda", generator=generator)
    out, grad_x, grad_bias = output_and_gradients(x, bias, x, "quick_gelu", impl="triton")
    total = torch.zeros_like(bias, dtype=torch.float64)
    for start in range(0, rows, 50_000):
        part = slice(start, min(rows, start + 50_000))
        want = exact(x[part], bias, x[part], "quick_gelu")
        for ours, b in zip((out[part], grad_x[part]), want):
            assert (ours.double() - b).norm() <= 8e-3 * b.norm()
        total += want[2]
    assert (grad_bias.double() - total).norm() <= 1e-5 * total.norm()
