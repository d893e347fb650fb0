"""The losses as operators: opcheck, compile, export, graphs used twice, second derivatives, no gradients."""

import pytest
import torch
from torch import nn

from mmbase_kernels import clip_loss, dispatch, sigmoid, sigmoid_loss, softmax
from mmbase_kernels.targets import plan_targets

from .pairs import pair, value_and_gradients

LOSSES = {
    "softmax": lambda i, t, s, b: clip_loss(i, t, s, logit_bias=b),
    "softmax, no stash": lambda i, t, s, b: clip_loss(i, t, s, stash_bytes=0) + 0 * b,
    "sigmoid": lambda i, t, s, b: sigmoid_loss(i, t, s, b),
}


def inputs(rows=12, columns=12, seed=0):
    return [*pair(rows, columns, 16, seed=seed), torch.tensor(9.0), torch.tensor(-4.0)]


def clip_arguments(*, ids, smoothing, stash_bytes, dtype=None):
    images, texts = pair(10, 14, 16, seed=1)
    image_ids, text_ids = (torch.arange(10) % 6, torch.arange(14) % 7) if ids else (None, None)
    targets = plan_targets(10, 14, images.device, image_ids=image_ids, text_ids=text_ids, label_smoothing=smoothing)
    weights = (
        targets.row_weight_M,
        targets.column_weight_N,
        targets.row_share_M,
        targets.column_share_N,
        targets.row_smooth_M,
        targets.column_smooth_N,
    )
    leaves = images.requires_grad_(), texts.requires_grad_(), torch.tensor(9.0, requires_grad=True)
    return (*leaves, *weights, image_ids, text_ids, 0, dtype, stash_bytes, "torch")


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("smoothing", "stash_bytes"), [(0.0, 0), (0.1, 1 << 20)])
def test_opcheck_of_the_softmax_loss(ids, smoothing, stash_bytes):
    arguments = clip_arguments(ids=ids, smoothing=smoothing, stash_bytes=stash_bytes)
    torch.library.opcheck(torch.ops.mmbase_kernels.clip_loss.default, arguments)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_opcheck_of_the_sigmoid_loss(gradients, ids):
    images, texts, scale, bias = inputs(10, 14)
    leaves = [value.requires_grad_(gradients) for value in (images, texts, scale, bias)]
    identities = (torch.arange(10) % 6, torch.arange(14) % 7) if ids else (None, None)
    arguments = (*leaves, *identities, 2 if not ids else 0, None, gradients, "torch")
    torch.library.opcheck(torch.ops.mmbase_kernels.sigmoid_loss.default, arguments)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(kind, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[kind], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (12, 17, 12):
        values = inputs(rows, rows, seed=rows)
        want, got = value_and_gradients(LOSSES[kind], values), value_and_gradients(compiled, values)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("kind", LOSSES)
def test_exports(kind):
    class Loss(nn.Module):
        def forward(self, images, texts, scale, bias):
            return LOSSES[kind](images, texts, scale, bias)

    program = torch.export.export(Loss(), tuple(inputs()))
    assert "mmbase_kernels" in program.graph_module.code
    other = inputs(seed=5)
    assert torch.equal(program.module()(*other), LOSSES[kind](*other))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_graph_is_used_twice(kind):
    leaves = [value.requires_grad_() for value in inputs()]
    loss = LOSSES[kind](*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("kind", LOSSES)
def test_second_derivatives_are_refused(kind):
    leaves = [value.requires_grad_() for value in inputs()]
    (gradient,) = torch.autograd.grad(LOSSES[kind](*leaves) ** 2, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; impl='reference' has one"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", LOSSES)
def test_forward_mode_is_refused(kind):
    """An operator of torch.library drops tangents: the derivative would be 0."""
    values = inputs()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda images: LOSSES[kind](images, *values[1:]), (values[0],), (values[0],))


def test_the_reference_has_second_derivatives():
    images, texts, scale, bias = (value.double().requires_grad_() for value in inputs(4, 4))
    for function in (lambda *v: clip_loss(*v[:3], impl="reference"), lambda *v: sigmoid_loss(*v, impl="reference")):
        assert torch.autograd.gradcheck(function, (images, texts, scale, bias))
        assert torch.autograd.gradgradcheck(function, (images, texts, scale, bias))


@pytest.mark.parametrize("kind", LOSSES)
def test_twice_is_equal_to_the_bit(kind):
    values = inputs(300, 300)
    first, second = (value_and_gradients(LOSSES[kind], values) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("locked", [0, 1])
def test_a_locked_tower_gets_no_gradient(kind, locked):
    values = inputs()
    want = value_and_gradients(LOSSES[kind], values, grad_output=1.0)[1:]
    leaves = [value.requires_grad_(place != locked) for place, value in enumerate(values)]
    LOSSES[kind](*leaves).backward()
    assert leaves[locked].grad is None
    assert all(torch.equal(leaf.grad, w) for k, (leaf, w) in enumerate(zip(leaves, want)) if k != locked)


def test_numbers_serve_as_scale_and_bias():
    images, texts, scale, bias = inputs()
    assert torch.equal(sigmoid_loss(images, texts, 9.0, -4.0), sigmoid_loss(images, texts, scale, bias))
    assert torch.equal(clip_loss(images, texts, 9.0), clip_loss(images, texts, scale.reshape(1)))


@pytest.mark.parametrize("kind", LOSSES)
def test_no_gradient_work_without_need(kind, monkeypatch):
    """Under no_grad, and where nothing asks for a gradient, logits are not stashed and derivatives not computed."""
    asked = []
    statistics, one_pass = softmax.statistics, sigmoid.sigmoid_pass
    monkeypatch.setattr(softmax, "statistics", lambda *v, **k: asked.append(k["stash_bytes"]) or statistics(*v, **k))
    monkeypatch.setattr(sigmoid, "sigmoid_pass", lambda *v, **k: asked.append(k["gradients"]) or one_pass(*v, **k))
    LOSSES[kind](*inputs())
    leaves = [value.requires_grad_() for value in inputs()]
    with torch.no_grad():
        assert not LOSSES[kind](*leaves).requires_grad
    assert asked == [0, 0]  # no bytes, or False
    assert LOSSES[kind](*leaves).requires_grad
    assert bool(asked[2]) == (kind != "softmax, no stash")


def test_the_choice_of_an_implementation_is_no_graph_break():
    """What ``auto`` asks on a GPU, asked here."""
    torch._dynamo.reset()

    def asked(tensor):
        return tensor + len(dispatch.hindrance(tensor.device))

    compiled = torch.compile(asked, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), asked(torch.zeros(2)))
    assert "needs a CUDA device" in dispatch.hindrance(torch.device("cpu"))
