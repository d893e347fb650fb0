"""The sigmoid loss of PyTorch operations against float64 and against PyTorch's own, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmbase_kernels import bands, sigmoid_loss
from mmbase_kernels.sigmoid_pass import sigmoid_pass

from .pairs import assert_close_to_float64, errors, magnitudes, pair, sigmoid64, sigmoid64_of, value_and_gradients
from .test_clip_loss import SHAPES, Largest

NAMES = ("loss", "images", "texts", "scale", "bias")


def pytorch(images, texts, scale, bias, *, offset=0):
    """The loss as everyone writes it, in the dtype of the inputs."""
    logits = scale.to(images.dtype) * images @ texts.T + bias.to(images.dtype)
    match = torch.arange(len(images))[:, None] + offset == torch.arange(len(texts))
    return -F.logsigmoid((2.0 * match - 1).to(logits.dtype) * logits).float().sum() / len(images)


@pytest.fixture(params=[None, 16], ids=["one tile", "tiles of 16"])
def side(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(bands, "CPU_SIDE", request.param)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -10.0), (100.0, -60.0)])
@pytest.mark.parametrize("kind", ["random", "aligned"])
@pytest.mark.parametrize(("rows", "columns", "width", "offset"), [*SHAPES, (6, 9, 64, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_against_float64(side, dtype, scale, bias, kind, rows, columns, width, offset):
    images, texts = pair(rows, columns, width, seed=rows, dtype=dtype, kind=kind, offset=offset, duplicates=True)
    values = [images, texts, torch.tensor(scale), torch.tensor(bias)]
    want = value_and_gradients(lambda i, t, s, b: sigmoid64(i, t, s, b, offset=offset), [v.double() for v in values])
    peer = value_and_gradients(lambda i, t, s, b: pytorch(i, t, s, b, offset=offset), values)
    got = value_and_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, offset=offset, impl="torch"), values)
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype, torch.float32, torch.float32]
    size = magnitudes(lambda logits: sigmoid64_of(logits, offset=offset), *values)
    assert_close_to_float64(got, want, peer, size, dtype, NAMES, scale)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_ids(side, impl):
    images, texts = pair(33, 50, 32, seed=7)
    ids = {"image_ids": torch.arange(33) % 20, "text_ids": torch.arange(50) % 17 + 2}
    values = [images, texts, torch.tensor(20.0), torch.tensor(-5.0)]
    want = value_and_gradients(lambda i, t, s, b: sigmoid64(i, t, s, b, **ids), [v.double() for v in values])
    got = value_and_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, impl=impl, **ids), values)
    assert max(errors(got, want)) < 3e-6


def test_equal_to_openclip():
    from open_clip.loss import SigLipLoss

    images, texts = pair(48, 48, 32, seed=9)
    values = [images, texts, torch.tensor(20.0), torch.tensor(-10.0)]
    want = value_and_gradients(SigLipLoss(), values)
    got = value_and_gradients(sigmoid_loss, values)
    for a, b in zip(got, want):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_no_gradient_work_without_need():
    images, texts = pair(20, 20, 32, seed=3)
    images.requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        without = sigmoid_pass(images, texts, scale, bias, gradients=False)
    with FlopCounterMode(display=False) as both, torch.no_grad():
        sigmoid_pass(images, texts, scale, bias, gradients=True)
    assert forward.get_total_flops() == 2 * 20 * 20 * 32
    assert both.get_total_flops() == 6 * 20 * 20 * 32
    assert not any(len(part.reshape(-1)) for part in without[1:])
    with torch.no_grad():
        assert not sigmoid_loss(images, texts, scale, bias).requires_grad


def test_memory_is_flat():
    images, texts = pair(6000, 6000, 16, seed=0)
    with Largest() as largest:
        sigmoid_pass(images, texts, torch.tensor(10.0), torch.tensor(-10.0), gradients=True)
    assert largest.bytes == 4 * 1536**2 == 4 * bands.CPU_SIDE**2


@pytest.mark.parametrize("where", ["images", "texts", "scale", "bias"])
def test_nan_passes_through(where):
    images, texts = pair(30, 30, 16, seed=6)
    scale, bias = torch.tensor(9.0), torch.tensor(-9.0)
    {"images": images[7], "texts": texts[7], "scale": scale, "bias": bias}[where].fill_(torch.nan)
    loss, *gradients = value_and_gradients(sigmoid_loss, [images, texts, scale, bias])
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize(
    ("bias", "extra", "message"),
    [
        (None, {}, "needs a logit_bias"),
        (torch.ones(2), {}, r"logit_bias must hold one number, not \[2\]"),
        (torch.ones(()), {"impl": "cuda"}, "'cuda'"),
        (torch.ones(()), {"text_ids": torch.arange(3)}, "or neither"),
    ],
)
def test_bad_input(bias, extra, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(torch.randn(3, 4), torch.randn(3, 4), torch.tensor(1.0), bias, **extra)
