"""The head in Triton's interpreter against float64; run by test_triton_interpreted.py."""

import pytest
import torch
import torch.nn.functional as F

from mmbase_kernels import head, head_triton

from ..rows import assert_close_to_float64, head_case, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16]
TOKENS = torch.tensor([4, 0, 2])
PLACES = torch.tensor([11, 3, 5, 3])
"""Of a packed batch; one of them twice."""
KINDS = {
    "tokens": ((3, 5), TOKENS),
    "narrow tokens": ((3, 5), TOKENS.int()),
    "first": ((3, 5), 0),
    "last": ((3, 5), -1),
    "the only one": ((4, 1), 0),
    "packed": ((12,), PLACES),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_tokens(kind, dtype, normalize):
    shape, token = KINDS[kind]
    assert_close_to_float64(head_case(shape, 100, 33, token, dtype, normalize=normalize), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "embed"), [(7, 5), (33, 7), (768, 512), (1280, 1000), (1664, 1280), (4096, 33)])
def test_widths(width, embed, dtype):
    assert_close_to_float64(head_case((2, 3), width, embed, TOKENS[1:], dtype, seed=width), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("embed", "bias", "eps"), [(None, True, 1e-5), (24, False, 0.2), (None, False, 1e-5)])
def test_without_a_projection_or_biases(dtype, embed, bias, eps):
    assert_close_to_float64(head_case((3, 5), 40, embed, TOKENS, dtype, bias=bias, eps=eps), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(dtype):
    case = head_case((3, 5), 40, None, TOKENS, dtype, weights=torch.float32)
    assert_close_to_float64(case, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_beyond_its_sequence(dtype):
    """Where values are not looked at, as on a GPU: its features are NaN, and nothing else is touched."""
    case = head_case((3, 5), 40, None, TOKENS, dtype)
    x, weight, bias = case.leaves[:3]
    forward = torch.ops.mmbase_kernels.gather_layer_norm
    right, wrong = (forward(x, tokens, 0, weight, bias, 1e-5) for tokens in (TOKENS, torch.tensor([5, 0, -1])))
    assert wrong[0][[0, 2]].isnan().all() and torch.equal(wrong[0][1], right[0][1])
    backward = torch.ops.mmbase_kernels.gather_layer_norm_backward
    grad = case.grads[0].to(dtype)
    got = backward(grad, x, torch.tensor([5, 0, -1]), 0, weight, *wrong[1:], 2)
    alone = backward(grad[1:2], x[1:2], TOKENS[1:2], 0, weight, *(statistic[1:2] for statistic in right[1:]), 2)
    assert torch.equal(got[0][1:2], alone[0]) and not got[0][[0, 2]].any()
    assert all(torch.equal(a, b) for a, b in zip(got[1:], alone[1:], strict=True))


@pytest.mark.parametrize("length", [0.0, 1e-13, 1e-9, 1e15])
def test_rows_of_any_length(length):
    """Shorter than 1e-12 they are divided by that, which counts as a constant."""
    x = length * F.normalize(torch.randn(3, 40, dtype=torch.float64), dim=-1)
    grad = torch.randn(3, 40)
    want = outputs_and_gradients(lambda x: F.normalize(x, dim=-1), [x.float().double()], [grad.double()])
    out, inverse = head_triton.unit_length(x.float())
    for ours, b in zip((out, head_triton.backward(grad, x.float(), inverse)), want, strict=True):
        assert (ours.double() - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("kind", ["tokens", "packed"])
def test_two_runs_are_bitwise_equal(kind):
    shape, token = KINDS[kind]
    case = head_case(shape, 100, 33, token, torch.float16)
    for a, b in zip(case.run(impl="triton"), case.run(impl="triton"), strict=True):
        assert torch.equal(a, b)


def test_tokens_that_are_not_contiguous():
    case = head_case((3, 5), 24, 16, TOKENS, torch.float16)
    want = case.run(impl="triton")
    leaves = [case.leaves[0].transpose(0, 1).contiguous().transpose(0, 1), *case.leaves[1:]]
    strided = torch.stack([TOKENS] * 2, 1)[:, 0]
    assert not leaves[0].is_contiguous() and not strided.is_contiguous()
    other = case._replace(leaves=leaves, constants={"token": strided})
    assert all(torch.equal(a, b) for a, b in zip(other.run(impl="triton"), want, strict=True))


def test_no_sequences():
    for shape, token in (((0, 5), 1), ((0, 5), TOKENS[:0]), ((7,), TOKENS[:0])):
        out, grad_x, *grads = head_case(shape, 16, 8, token, torch.float32).run(impl="triton")
        assert out.shape == (0, 8) and not grad_x.any() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("tokens", [TOKENS, None])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(tokens, bias):
    case = head_case((3, 5), 20, 8, TOKENS, torch.float32, bias=bias)
    x, weight, norm_bias = case.leaves[:3]
    for leaf in (x, weight, norm_bias):
        if leaf is not None:
            leaf.requires_grad_()
    operators = torch.ops.mmbase_kernels
    torch.library.opcheck(operators.gather_layer_norm.default, (x, tokens, 1, weight, norm_bias, 1e-5))
    statistics = torch.zeros(3), torch.ones(3)
    arguments = torch.randn(3, 20), x.detach(), tokens, 1, weight.detach(), *statistics, 1 + bias
    torch.library.opcheck(operators.gather_layer_norm_backward.default, arguments)
    features = torch.randn(3, 8, dtype=torch.float16)
    torch.library.opcheck(operators.unit_length.default, (features.clone().requires_grad_(),))
    torch.library.opcheck(operators.unit_length_backward.default, (torch.randn(3, 8), features, torch.ones(3)))


@pytest.mark.parametrize("kind", ["tokens", "last", "packed"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(kind, dynamic):
    torch._dynamo.reset()
    shape, token = KINDS[kind]
    case = head_case(shape, 24, 16, token, torch.float16)
    compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = case.run(impl="triton"), case._replace(operator=compiled).run(impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, x, token, *weights):
            return head(x, token, *weights, impl="triton")

    x, *weights = head_case((3, 5), 40, 24, TOKENS, torch.float32).leaves
    batch = {0: torch.export.Dim("batch")}
    shapes = {"x": batch, "token": batch, "weights": (None,) * len(weights)}
    program = torch.export.export(Layer(), (x, TOKENS, *weights), dynamic_shapes=shapes)
    for name in ("gather_layer_norm", "unit_length"):
        assert f"mmbase_kernels.{name}" in program.graph_module.code
    fewer = x[:2], TOKENS[:2], *weights
    assert torch.equal(program.module()(*fewer), Layer()(*fewer))


def test_under_autocast_the_projection_alone_has_16_bits():
    case = head_case((3, 5), 40, 24, TOKENS, torch.float32)
    with torch.autocast("cpu", torch.float16):
        ours, theirs = (case.operator(*case.leaves, token=TOKENS, impl=impl) for impl in ("triton", "torch"))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_second_derivatives_and_forward_mode_are_refused():
    case = head_case((3, 5), 20, 8, TOKENS, torch.float32)
    x, *weights = (leaf.requires_grad_() for leaf in case.leaves)
    for normalize in (True, False):
        out = case.operator(x, *weights, token=0, normalize=normalize, impl="triton")
        (gradient,) = torch.autograd.grad((out**2 * case.grads[0]).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"head .* no second derivative; impl='torch' has one"):
            gradient.sum().backward()
    with pytest.raises(RuntimeError, match="head has no forward-mode derivative"):
        torch.func.jvp(
            lambda x: case.operator(x, *case.leaves[1:], token=0, impl="triton"), (x.detach(),), (x.detach(),)
        )


@pytest.mark.parametrize(
    ("width", "embed", "widest"), [(8193, 8, "8,193"), (16, 8200, "8,200")]
)  # fmt: skip
def test_what_triton_does_not_take(width, embed, widest):
    with pytest.raises(ValueError, match=f"impl='triton' takes up to 8,192 columns, not {widest}: use impl='torch'"):
        head_case((1, 2), width, embed, 0, torch.float16).run(impl="triton")
