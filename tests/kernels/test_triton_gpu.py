"""The Triton kernels on a CUDA device: bfloat16, which the interpreter cannot do, and sizes it has no time for."""

import pytest
import torch

from mmbase_kernels import clip_loss, sigmoid_loss

from .pairs import pair, sigmoid64, softmax64, value_and_gradients

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def on_gpu(*leaves):
    return [leaf.cuda() for leaf in leaves]


def assert_close(got, want, dtype):
    for name, ours, exact in zip(("loss", "images", "texts", "scale", "bias"), got, want):
        # A gradient is returned in the features' dtype, whose own rounding no kernel can avoid.
        rounding = (exact.to(ours.dtype).double() - exact).norm()
        assert (ours.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm() + 1.01 * rounding, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("stash_bytes", [0, 1 << 30])
@pytest.mark.parametrize(
    ("rows", "columns", "width", "offset"),
    [(1, 1, 64, 0), (1000, 1777, 500, 77), (2048, 2048, 768, 0), (513, 300, 1152, -250)],
)
def test_softmax_loss(dtype, scale, stash_bytes, rows, columns, width, offset):
    images, texts = pair(rows, columns, width, seed=1, dtype=dtype, offset=offset, duplicates=True)
    leaves = on_gpu(images, texts, torch.tensor(scale))
    got = value_and_gradients(
        lambda i, t, s: clip_loss(i, t, s, offset=offset, stash_bytes=stash_bytes, impl="triton"), leaves
    )
    want = value_and_gradients(lambda i, t, s: softmax64_on_gpu(i, t, s, offset), [leaf.double() for leaf in leaves])
    assert_close(got, want, dtype)


def softmax64_on_gpu(images, texts, scale, offset):
    """Float64 on the CPU, where the reference's indices live; gradients flow back."""
    return softmax64(images.cpu(), texts.cpu(), scale.cpu(), offset=offset).to(images.device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -15.0)])
@pytest.mark.parametrize(
    ("rows", "columns", "width", "offset"),
    [(1, 1, 64, 0), (1000, 1777, 500, 77), (2048, 2048, 768, 0), (513, 300, 1152, -250)],
)
def test_sigmoid_loss(dtype, scale, bias, rows, columns, width, offset):
    images, texts = pair(rows, columns, width, seed=2, dtype=dtype, offset=offset, duplicates=True)
    leaves = on_gpu(images, texts, torch.tensor(scale), torch.tensor(bias))
    got = value_and_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, offset=offset, impl="triton"), leaves)
    want = value_and_gradients(
        lambda i, t, s, b: sigmoid64(i.cpu(), t.cpu(), s.cpu(), b.cpu(), offset=offset).to(i.device),
        [leaf.double() for leaf in leaves],
    )
    assert_close(got, want, dtype)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_identities(loss):
    images, texts = pair(700, 900, 256, seed=3, dtype=torch.bfloat16)
    image_ids, text_ids = torch.arange(700) % 411, torch.arange(900) % 411
    leaves = on_gpu(images, texts, torch.tensor(20.0), torch.tensor(-9.0))
    ids = {"image_ids": image_ids.cuda(), "text_ids": text_ids.cuda()}
    if loss == "softmax":
        got = value_and_gradients(lambda i, t, s: clip_loss(i, t, s, impl="triton", **ids), leaves[:3])
        want = value_and_gradients(lambda i, t, s: softmax64(i, t, s, **ids), [leaf.double() for leaf in leaves[:3]])
    else:
        got = value_and_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, impl="triton", **ids), leaves)
        want = value_and_gradients(lambda i, t, s, b: sigmoid64(i, t, s, b, **ids), [leaf.double() for leaf in leaves])
    assert_close(got, want, torch.bfloat16)


@pytest.mark.parametrize("loss", ["softmax", "stash", "sigmoid"])
def test_more_than_2_31_logits(loss):
    """49,152 squared: against the PyTorch operations, which walk the same matrix tile by tile."""
    generator = torch.Generator("cuda").manual_seed(4)
    shape = 49_152, 64
    images, texts = (
        torch.nn.functional.normalize(torch.randn(shape, device="cuda", generator=generator), dim=1).bfloat16()
        for _ in range(2)
    )
    leaves = images, texts, torch.tensor(14.0, device="cuda"), torch.tensor(-10.0, device="cuda")

    def run(impl):
        budget = 1 << 40 if loss == "stash" and impl == "triton" else 0
        if loss == "sigmoid":
            return value_and_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, impl=impl), leaves)
        return value_and_gradients(lambda i, t, s: clip_loss(i, t, s, stash_bytes=budget, impl=impl), leaves[:3])

    for ours, theirs in zip(run("triton"), run("torch")):
        assert (ours.double() - theirs.double()).norm() <= 4e-3 * theirs.double().norm()


def test_trap_8_two_runs_are_bitwise_equal():
    leaves = on_gpu(*pair(3000, 3001, 384, seed=5, dtype=torch.bfloat16), torch.tensor(50.0))

    def once():
        return value_and_gradients(lambda i, t, s: clip_loss(i, t, s, offset=0, impl="triton"), leaves)

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_autocast_and_tf32_change_nothing():
    leaves = on_gpu(*pair(300, 300, 256, seed=6), torch.tensor(50.0))

    def once():
        return value_and_gradients(lambda i, t, s: clip_loss(i, t, s, impl="triton"), leaves)

    plain = once()
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        allowed = once()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(previous)
    assert all(torch.equal(a, b) for a, b in zip(plain, allowed))
