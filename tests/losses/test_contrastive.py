"""The losses against float64 and against OpenCLIP's own, gradients included."""

import pytest
import torch
import torch.nn.functional as F

import mmbase_kernels.dispatch
from mmbase_kernels import clip_loss, sigmoid_loss


def pair(rows, columns, width, seed, dtype=torch.float32, near=0.0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)
    texts = F.normalize(torch.randn(columns, width, generator=generator, dtype=torch.float64), dim=1)
    if near:
        texts = F.normalize(images[:columns] + near * texts, dim=1)
    return images.to(dtype), texts.to(dtype)


def float64_loss(kind, images, texts, scale, bias, image_ids, text_ids, smoothing=0.0):
    logits = scale * images @ texts.T + (0 if bias is None else bias)
    match = torch.eye(*logits.shape, dtype=torch.bool) if image_ids is None else image_ids[:, None] == text_ids
    if kind == "sigmoid":
        return -F.logsigmoid(torch.where(match, 1.0, -1.0) * logits).sum() / len(logits)
    loss = 0.0
    for one, m in ((logits, match), (logits.T, match.T)):
        target = (1 - smoothing) * m.double() / m.sum(1, keepdim=True).clamp(min=1) + smoothing / m.shape[1]
        loss = loss - (target * one.log_softmax(1)).sum(1).mean() / 2
    return loss


def gradients(function, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    (3 * loss).backward()  # grad_output is not one
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(
    ("rows", "columns", "width", "ids"), [(1, 1, 8, False), (37, 37, 65, False), (33, 50, 24, True)]
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_against_float64(kind, scale, rows, columns, width, ids, impl, monkeypatch):
    monkeypatch.setattr(mmbase_kernels.dispatch, "WORKSPACE_BYTES", 4 * columns * 7)  # seven rows a chunk
    images, texts = pair(rows, columns, width, seed=rows, near=0.3 * (rows == columns))
    if rows > 2:
        texts[1] = texts[0]
    image_ids = text_ids = None
    if ids:
        image_ids, text_ids = torch.arange(rows) % 20, torch.arange(columns) % 20
    values = [images, texts, torch.tensor(scale), torch.tensor(-3.0)]

    def ours(i, t, s, b):
        if kind == "sigmoid":
            return sigmoid_loss(i, t, s, b, image_ids=image_ids, text_ids=text_ids, impl=impl)
        return clip_loss(i, t, s, logit_bias=b, image_ids=image_ids, text_ids=text_ids, impl=impl)

    got = gradients(ours, values)
    want = gradients(
        lambda i, t, s, b: float64_loss(kind, i, t, s, b, image_ids, text_ids), [v.double() for v in values]
    )
    for a, b in zip(got[:4], want[:4]):
        assert a.dtype == torch.float32
        # The floor of the scale: a gradient that vanishes (one pair, softmax) is compared absolutely.
        assert (a.double() - b).norm() <= 2e-5 * b.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_sixteen_bit_inputs_are_as_good_as_pytorch(dtype, kind):
    images, texts = pair(96, 96, 64, seed=5, dtype=dtype, near=2.0)
    values = [images, texts, torch.tensor(50.0), torch.tensor(-5.0)]
    want = gradients(lambda i, t, s, b: float64_loss(kind, i, t, s, b, None, None), [v.double() for v in values])
    ours = {
        "softmax": lambda i, t, s, b: clip_loss(i, t, s, logit_bias=b, impl="torch"),
        "sigmoid": lambda i, t, s, b: sigmoid_loss(i, t, s, b, impl="torch"),
    }[kind]
    plain = gradients(lambda i, t, s, b: float64_loss(kind, i, t, s.to(dtype), b.to(dtype), None, None), values)
    got = gradients(ours, values)
    for name, a, b, c in zip(("loss", "images", "texts", "scale"), got, want, plain):
        error, peer = (a.double() - b).norm() / b.norm(), (c.double() - b).norm() / b.norm()
        assert error <= 1.5 * peer + 2e-3, (name, float(error), float(peer))


def test_label_smoothing_equals_cross_entropy():
    images, texts = pair(20, 20, 16, seed=1)
    logits = 10 * images @ texts.T
    labels = torch.arange(20)
    want = sum(F.cross_entropy(x, labels, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    for impl in ("torch", "reference"):
        got = clip_loss(images, texts, torch.tensor(10.0), label_smoothing=0.1, impl=impl)
        assert torch.allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_equal_to_openclip(kind):
    from open_clip.loss import ClipLoss, SigLipLoss

    images, texts = pair(48, 48, 32, seed=9)
    values = [images, texts, torch.tensor(20.0), torch.tensor(-10.0)]
    if kind == "softmax":
        want = gradients(ClipLoss(), values[:3])
        got = gradients(lambda i, t, s: clip_loss(i, t, s), values[:3])
    else:
        want = gradients(SigLipLoss(), values)
        got = gradients(sigmoid_loss, values)
    for a, b in zip(got, want):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_concept_that_stands_twice_is_no_false_negative():
    images, texts = pair(4, 4, 8, seed=2)
    texts[3] = F.normalize(texts[0] + 0.2 * texts[3], dim=0)  # the same concept in other words
    ids = torch.tensor([0, 1, 2, 0])
    images.requires_grad_()
    clip_loss(images, texts, torch.tensor(5.0), image_ids=ids, text_ids=ids).backward()
    with_ids = images.grad.clone()
    images.grad = None
    clip_loss(images, texts, torch.tensor(5.0)).backward()
    # Descent moves image 0 towards the other wording, more than plain InfoNCE, which counts it a negative.
    assert with_ids[0] @ texts[3] < min(images.grad[0] @ texts[3], 0)


def test_memory_is_flat():
    """No intermediate of the chunked loss reaches the size of the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in [out] if isinstance(out, torch.Tensor) else []:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return out

    images, texts = pair(6000, 6000, 16, seed=0)
    images.requires_grad_()
    with Largest() as largest:
        clip_loss(images, texts, torch.tensor(10.0)).backward()
    assert largest.bytes <= mmbase_kernels.dispatch.WORKSPACE_BYTES < 6000 * 6000 * 4


def test_second_derivative_is_refused():
    images, texts = pair(5, 5, 8, seed=0)
    images.requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip_loss(images, texts, scale) ** 2, images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("images", "texts", "extra", "message"),
    [
        (torch.randn(3, 4), torch.randn(3, 5), {}, "widths differ: images 4, texts 5"),
        (torch.randn(3, 4), torch.randn(2, 4), {}, "3 images and 2 texts"),
        (torch.randn(0, 4), torch.randn(0, 4), {}, r"\[0, 4\]"),
        (torch.randn(3, 4), torch.randn(3, 4).half(), {}, "dtypes differ"),
        (torch.randn(3, 4), torch.randn(3, 4), {"impl": "tritn"}, "tritn"),
        (torch.randn(3, 4), torch.randn(3, 4), {"image_ids": torch.arange(3)}, "or neither"),
        (torch.randn(3, 4), torch.randn(3, 4), {"label_smoothing": 1.5}, "1.5"),
    ],
)
def test_bad_input(images, texts, extra, message):
    with pytest.raises(ValueError, match=message):
        clip_loss(images, texts, torch.tensor(1.0), **extra)
