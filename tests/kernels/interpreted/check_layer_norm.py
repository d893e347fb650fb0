"""LayerNorm in Triton's interpreter against float64; run by test_triton_interpreted.py."""

import pytest
import torch

from mmbase_kernels import add_layer_norm, layer_norm, layer_norm_triton, partials

from ..rows import WIDTHS, assert_close_to_float64, norm_case, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16]
BOTH = pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])


@BOTH
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(dtype, width, add):
    assert_close_to_float64(norm_case((2, 3), width, dtype, add=add, seed=width), impl="triton")


def test_the_widest():
    assert_close_to_float64(norm_case((1,), 8192, torch.float32, add=True), impl="triton")


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5, 3, 4)])
def test_any_leading_shape(shape, add):
    assert_close_to_float64(norm_case(shape, 33, torch.float32, add=add), impl="triton")


@BOTH
@pytest.mark.parametrize(("dtype", "weights"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_weights_of_another_dtype(dtype, weights, add):
    assert_close_to_float64(norm_case((9,), 100, dtype, add=add, weights=weights), impl="triton")


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_bias_and_with_another_eps(dtype, add):
    assert_close_to_float64(norm_case((9,), 33, dtype, add=add, bias=False, eps=0.3), impl="triton")


@BOTH
@pytest.mark.parametrize("mean", [1e3, -3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_far_from_zero(dtype, mean, add):
    """In float32 too within 1e-5, at which PyTorch's is off by 1e-4: float32 itself rounds these rows by less."""
    assert_close_to_float64(norm_case((4,), 768, dtype, add=add, mean=mean), impl="triton")


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_variance(dtype, value):
    case = norm_case((3,), 100, dtype, add=False)
    case.leaves[0].fill_(value)
    out, grad_x, _, _ = case.run(impl="triton")
    torch.testing.assert_close(out, case.leaves[2].expand_as(out), rtol=0, atol=2e-6)
    want = case.exactly()[1]
    assert (grad_x.double() - want).norm() <= 1e-3 * want.norm()


def test_what_is_not_finite_stays_so_in_its_row():
    case = norm_case((4,), 40, torch.float32, add=False)
    case.leaves[0][1, 3], case.leaves[0][2, 0] = torch.nan, torch.inf
    out = layer_norm(*case.leaves, impl="triton")
    assert out[1:3].isnan().all() and torch.equal(
        out[::3], layer_norm(case.leaves[0][::3], *case.leaves[1:], impl="triton")
    )


@BOTH
@pytest.mark.parametrize("width", [33, 768])
def test_programs_that_have_many_rows(width, add, monkeypatch):
    """Three of them, the last blocks of rows ragged; and the sums over rows do not depend on who computes them."""
    rows = 151 if width == 33 else 17
    case = norm_case((rows,), width, torch.float32, add=add)
    apart = case.run(impl="triton")
    monkeypatch.setattr(partials, "MULTIPROCESSORS", {"sm_90": 1})
    monkeypatch.setattr(partials, "WARPS_PER_MULTIPROCESSOR", 12)
    assert_close_to_float64(case, impl="triton")
    for a, b in zip(apart, case.run(impl="triton"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_more_programs_than_one_step_of_the_second_stage_adds():
    partials_KPD = torch.randn(2, 200, 70)
    first, second = partials.sum_partials(partials_KPD, torch.float32)
    torch.testing.assert_close(torch.stack([first, second]), partials_KPD.sum(1))
    (alone,) = partials.sum_partials(partials_KPD[1:], torch.float16)
    assert torch.equal(alone, second.half())


@BOTH
def test_two_runs_are_bitwise_equal(add):
    case = norm_case((20,), 100, torch.float16, add=add)
    for a, b in zip(case.run(impl="triton"), case.run(impl="triton"), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


@BOTH
def test_inputs_that_are_not_contiguous_or_aligned(add):
    case = norm_case((4, 3), 24, torch.float16, add=add)
    want = case.run(impl="triton")

    def turned(tensor):
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else torch.stack([tensor] * 2, 1)[:, 0]

    def shifted(tensor):
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor).copy_(tensor)

    for change in (turned, shifted):
        other = case._replace(
            leaves=[change(leaf) for leaf in case.leaves], grads=[change(grad) for grad in case.grads]
        )
        assert not other.leaves[0].is_contiguous() or other.leaves[0].data_ptr() % 16
        assert all(torch.equal(a, b) for a, b in zip(other.run(impl="triton"), want, strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used):
    case = norm_case((6,), 40, torch.float32, add=True)

    def gradients(of, dtype, **options):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves]
        return torch.autograd.grad(of(*leaves, **options)[used], leaves, case.grads[0].to(dtype), allow_unused=True)

    want = gradients(case.equation, torch.float64)
    for name, ours, b in zip(case.names, gradients(add_layer_norm, torch.float32, impl="triton"), want, strict=True):
        assert (ours is None) == (b is None) == (used == 0 and name in ("weight", "bias")), name
        if b is not None:
            torch.testing.assert_close(ours.double(), b, rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("bias",), ("weight",), ("x",)])
def test_leaves_without_gradients(frozen, add, monkeypatch):
    sums = []
    monkeypatch.setattr(
        layer_norm_triton, "sum_partials", lambda p, dtype: sums.append(len(p)) or partials.sum_partials(p, dtype)
    )
    case = norm_case((6,), 40, torch.float32, add=add)
    want = dict(zip(case.names, case.run(impl="triton")[len(case.grads) :], strict=True))
    sums.clear()
    leaves = [leaf.detach().requires_grad_(name not in frozen) for name, leaf in zip(case.names, case.leaves)]
    outs = case.operator(*leaves, impl="triton")
    wanted = {name: leaf for name, leaf in zip(case.names, leaves) if leaf.requires_grad}
    got = torch.autograd.grad(outs, list(wanted.values()), case.grads)
    for name, ours in zip(wanted, got, strict=True):
        assert torch.equal(ours, want[name]), name
    assert sums == {("weight", "bias"): [], ("bias",): [1]}.get(frozen, [2])


@BOTH
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(add, bias):
    case = norm_case((2, 3), 20, torch.float16, add=add, bias=bias)
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in case.leaves]
    operators = torch.ops.mmbase_kernels
    operator = operators.add_layer_norm if add else operators.layer_norm
    torch.library.opcheck(operator.default, (*leaves, 1e-5))
    total = leaves[0].detach()
    statistics = torch.zeros(2, 3), torch.ones(2, 3)
    arguments = (case.grads[0], case.grads[1] if add else None, total, leaves[1 + add].detach(), *statistics, 1 + bias)
    torch.library.opcheck(operators.layer_norm_backward.default, arguments)


@BOTH
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic, add):
    torch._dynamo.reset()
    case = norm_case((2, 5), 20, torch.float16, add=add)
    compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 3, 5):
        leaves = [leaf[:, :rows] if leaf.ndim > 1 else leaf for leaf in case.leaves]
        grads = [grad[:, :rows] for grad in case.grads]
        want, got = (
            outputs_and_gradients(lambda *a, f=f: f(*a, impl="triton"), leaves, grads)
            for f in (case.operator, compiled)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("returned", ["one", "both"])
def test_compiles_where_one_output_is_used(used, returned):
    """The other's gradient is None in eager mode, and zeros where a compiled graph returns both."""
    torch._dynamo.reset()
    case = norm_case((4,), 20, torch.float32, add=True)

    def function(*leaves):
        outs = add_layer_norm(*leaves, impl="triton")
        return outs if returned == "both" else outs[used]

    def run(f):
        leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
        out = f(*leaves)
        out = out[used] if returned == "both" else out
        return [out, *torch.autograd.grad(out, leaves, case.grads[used], materialize_grads=True)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(function), strict=True):
        assert torch.equal(got, want)


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, x, branch, weight, bias):
            total, normed = add_layer_norm(x, branch, weight, bias, impl="triton")
            return total, layer_norm(normed, weight, None, impl="triton")

    case = norm_case((4, 5), 16, torch.float32, add=True)
    batch = {0: torch.export.Dim("batch")}
    shapes = {"x": batch, "branch": batch, "weight": None, "bias": None}
    program = torch.export.export(Layer(), tuple(case.leaves), dynamic_shapes=shapes)
    assert "mmbase_kernels.add_layer_norm" in program.graph_module.code
    fewer = [leaf[:3] for leaf in case.leaves[:2]] + case.leaves[2:]
    for got, want in zip(program.module()(*fewer), Layer()(*fewer), strict=True):
        assert torch.equal(got, want)


@BOTH
def test_a_graph_is_used_twice_and_second_derivatives_are_refused(add):
    case = norm_case((3,), 20, torch.float32, add=add)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    outs = case.operator(*leaves, impl="triton")
    first, second = (torch.autograd.grad(outs, leaves, case.grads, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    out = outs[1] if add else outs
    (gradient,) = torch.autograd.grad((out**2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"layer_norm .* no second derivative; impl='torch' has one"):
        gradient.sum().backward()


@BOTH
def test_forward_mode_is_refused(add):
    case = norm_case((3,), 20, torch.float32, add=add)
    with pytest.raises(RuntimeError, match="layer_norm has no forward-mode derivative"):
        torch.func.jvp(
            lambda x: case.operator(x, *case.leaves[1:], impl="triton"), (case.leaves[0],), (case.leaves[0],)
        )


def test_recomputed_in_a_checkpoint():
    case = norm_case((3,), 20, torch.float32, add=True)
    want = case.run(impl="triton")

    def again(*leaves, **options):
        return torch.utils.checkpoint.checkpoint(add_layer_norm, *leaves, use_reentrant=False, **options)

    assert all(torch.equal(a, b) for a, b in zip(case._replace(operator=again).run(impl="triton"), want, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 8193), torch.float16, "impl='triton' takes up to 8,192 columns, not 8,193: use impl='torch'"),
        ((2, 16), torch.float64, "impl='triton' takes float32, float16 or bfloat16, not torch.float64"),
    ],
)
def test_what_triton_does_not_take(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(torch.zeros(shape, dtype=dtype), torch.ones(shape[-1:], dtype=dtype), None, impl="triton")
