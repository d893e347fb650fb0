"""LayerNorm through PyTorch's own, the reference, what is asked of the table of measurements, and what is refused."""

import sys

import pytest
import torch
import torch.nn.functional as F

from mmbase_kernels import add_layer_norm, layer_norm

from .rows import NARROW, WIDTHS, assert_close_to_float64, norm_case

module = sys.modules[layer_norm.__module__]  # the package's attribute of that name is the function
DTYPES = [torch.float32, *NARROW]
BOTH = pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])


@BOTH
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_error_against_float64(impl, dtype, width, add):
    assert_close_to_float64(norm_case((3, 5), width, dtype, add=add, seed=width), impl=impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_of_one_column_the_bias_is_left(impl):
    """Its gradient is nothing, of which PyTorch's leaves the rounding times 1 / sqrt(eps)."""
    case = norm_case((3, 5), 1, torch.float32, add=False)
    out, grad_x, grad_weight, _ = case.run(impl=impl)
    assert torch.equal(out, case.leaves[2].expand_as(out))
    assert grad_x.abs().max() <= 1e-4 and grad_weight.abs().max() <= 1e-4


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_it_is_pytorchs_to_the_bit(dtype, add):
    case = norm_case((3, 5), 100, dtype, add=add)
    for ours, theirs in zip(case.run(), case.by_pytorch(), strict=True):
        assert torch.equal(ours, theirs)


@BOTH
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("dtype", "weights"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_weights_of_another_dtype(impl, dtype, weights, add):
    assert_close_to_float64(norm_case((9,), 100, dtype, add=add, weights=weights), impl=impl)


def test_gradients_of_float32_weights_are_added_up_in_float32():
    """On a CPU PyTorch's kernel for 16-bit tokens adds them up in 16 bits: off by some percent over many rows."""
    assert_close_to_float64(norm_case((2000,), 64, torch.bfloat16, add=False, weights=torch.float32), impl="torch")


@BOTH
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_without_a_bias_and_with_another_eps(impl, add):
    assert_close_to_float64(norm_case((9,), 33, torch.float32, add=add, bias=False, eps=0.3), impl=impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4)])
def test_any_leading_shape(impl, shape):
    for add in (False, True):
        assert_close_to_float64(norm_case(shape, 33, torch.float32, add=add), impl=impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_dtype_stays_under_autocast(impl):
    case = norm_case((4,), 32, torch.bfloat16, add=True, weights=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = add_layer_norm(*case.leaves, impl=impl)
    assert total.dtype == normed.dtype == torch.bfloat16
    assert torch.equal(total, case.leaves[0] + case.leaves[1])


def test_the_reference_is_the_equation_and_has_second_derivatives():
    case = norm_case((3,), 5, torch.float64, add=True)
    for ours, b in zip(case.run(impl="reference"), case.by_pytorch(), strict=True):
        torch.testing.assert_close(ours, b, rtol=0, atol=1e-12)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    assert torch.autograd.gradgradcheck(lambda *a: add_layer_norm(*a, impl="reference"), leaves)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_compiles_as_one_graph_and_exports(impl):
    torch._dynamo.reset()
    case = norm_case((4, 5), 16, torch.float32, add=True)

    class Layer(torch.nn.Module):
        def forward(self, x, branch, weight, bias):
            total, normed = add_layer_norm(x, branch, weight, bias, impl=impl)
            return total, normed + layer_norm(normed, weight, None, impl=impl)

    want = Layer()(*case.leaves)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    batch = {0: torch.export.Dim("batch")}
    shapes = {"x": batch, "branch": batch, "weight": None, "bias": None}
    program = torch.export.export(Layer(), tuple(case.leaves), dynamic_shapes=shapes)
    for got in (compiled(*case.leaves), program.module()(*case.leaves)):
        torch.testing.assert_close(got, want)
    fewer = [leaf[:2] for leaf in case.leaves[:2]] + case.leaves[2:]
    torch.testing.assert_close(program.module()(*fewer), Layer()(*fewer))


@BOTH
def test_what_the_table_of_measurements_is_asked(monkeypatch, add):
    asked = []
    monkeypatch.setattr(module, "choose_measured", lambda *a, **k: asked.append((a, k)) or "torch")
    case = norm_case((3, 5), 16, torch.float32, add=add)
    case.run()
    ((operator, impl, x), rest), *_ = asked
    assert (operator, impl, tuple(x.shape)) == ("layer_norm", "auto", (3, 5, 16))
    assert rest == {"size": 15, "case": "add" if add else "plain", "obstacle": ""}


def test_the_environment_stands_in_for_auto_alone(monkeypatch):
    monkeypatch.setenv("MMBASE_KERNELS", "reference")
    x, weight = torch.randn(40, 100), torch.randn(100)
    assert torch.equal(layer_norm(x, weight, None), layer_norm(x, weight, None, impl="reference"))
    assert torch.equal(layer_norm(x, weight, None, impl="torch"), F.layer_norm(x, (100,), weight))
    monkeypatch.setenv("MMBASE_KERNELS", "triton")
    with pytest.raises(ValueError, match="MMBASE_KERNELS=triton cannot run: it needs a CUDA device"):
        layer_norm(x, weight, None)


X, WEIGHT = torch.zeros(3, 16), torch.ones(16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [1.0]}, "x must be a dense tensor, not <class 'list'>"),
        ({"x": torch.zeros(3, 16).to_sparse()}, "x must be a dense tensor, not torch.sparse_coo"),
        ({"x": torch.zeros(())}, r"x must be \[..., D\] with a width, not \[\]"),
        ({"x": torch.zeros(3, 0)}, r"x must be \[..., D\] with a width, not \[3, 0\]"),
        ({"x": torch.zeros(3, 16).int()}, "x must be floating point, not torch.int32: convert it"),
        ({"weight": None}, "weight must be a tensor, not <class 'NoneType'>"),
        ({"weight": torch.ones(8)}, r"weight must be \[16\], as wide as x \[3, 16\], not \[8\]"),
        ({"bias": torch.ones(1, 16)}, r"bias must be \[16\], as wide as x \[3, 16\], not \[1, 16\]"),
        ({"weight": WEIGHT.int()}, "weight must be floating point, not torch.int32"),
        ({"weight": WEIGHT.to("meta")}, "devices differ: weight on meta, x on cpu; move one of them"),
        ({"bias": WEIGHT.half()}, "dtypes differ: weight torch.float32, bias torch.float16"),
        ({"eps": -1e-5}, "eps must be finite and not negative, not -1e-05"),
        ({"eps": torch.nan}, "eps must be finite and not negative, not nan"),
        ({"impl": "tritn"}, "impl must be one of auto, triton, torch, reference, not 'tritn'; did you mean 'triton'"),
        ({"impl": "triton"}, "impl='triton' cannot run: it needs a CUDA device, and the tensors are on cpu; use impl="),
        ({"branch": None}, "branch must be a dense tensor, not <class 'NoneType'>"),
        ({"branch": torch.zeros(16)}, r"shapes differ: x \[3, 16\], branch \[16\]; they are added without more"),
        ({"branch": X.bfloat16()}, "dtypes differ: x torch.float32, branch torch.bfloat16; convert one of them"),
        ({"branch": X.to("meta")}, "devices differ: branch on meta, x on cpu; move one of them"),
    ],
)
def test_bad_input_is_named(arguments, message):
    function = add_layer_norm if "branch" in arguments else layer_norm
    defaults = {"x": X, "weight": WEIGHT, "bias": None}
    with pytest.raises(ValueError, match=message) as caught:
        function(**defaults | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_on_a_gpu(dtype, width, add):
    for rows in (1, 50, 5000):
        case = norm_case((rows,), width, dtype, add=add, seed=width, device="cuda")
        assert_close_to_float64(case, impl="triton")
        for a, b in zip(case.run(impl="triton"), case.run(impl="triton"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_weights_and_large_means_on_a_gpu(dtype, add):
    assert_close_to_float64(
        norm_case((500,), 768, dtype, add=add, mean=1e3, weights=torch.float32, device="cuda"), impl="triton"
    )


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """Rows at both ends, against the same rows alone."""
    width, rows = 8192, (1 << 18) + 40
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_()
    weight = torch.randn(width, dtype=torch.bfloat16, device="cuda", generator=generator)
    out = layer_norm(x, weight, None, impl="triton")
    (grad,) = torch.autograd.grad(out, x, out.detach())
    for part in (slice(0, 64), slice(rows - 64, rows)):
        leaf = x.detach()[part].requires_grad_()
        alone = layer_norm(leaf, weight, None, impl="triton")
        assert torch.equal(alone, out[part])
        assert torch.equal(torch.autograd.grad(alone, leaf, alone.detach())[0], grad[part])


@pytest.mark.gpu
def test_autocast_changes_nothing_in_triton():
    case = norm_case((40,), 256, torch.bfloat16, add=True, weights=torch.float32, device="cuda")
    plain = case.run(impl="triton")
    with torch.autocast("cuda", torch.bfloat16):
        again = case.run(impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
