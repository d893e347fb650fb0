"""The sigmoid loss in Triton's interpreter against float64; run by test_triton_interpreted.py."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mmbase_kernels import chunks, launch, sigmoid_loss, sigmoid_tiles
from mmbase_kernels.sigmoid_pass import sigmoid_pass

from ..pairs import magnitudes, pair, sigmoid64, sigmoid64_of, value_and_gradients
from .demands import assert_close_to_float64

NAMES = ("loss", "images", "texts", "scale", "bias")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel forgot to write is NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def check(images, texts, scale, bias, **matches):
    """Loss and gradients of Triton, against float64 and beside those of PyTorch in the same dtype."""
    leaves = images, texts, torch.tensor(float(scale)), torch.tensor(float(bias))

    def ours(i, t, s, b):
        return sigmoid_loss(i, t, s, b, impl="triton", **matches)

    def peer(i, t, s, b):
        return sigmoid64_of((s.to(i.dtype) * i @ t.T + b.to(i.dtype)).float(), **matches)

    def exact(i, t, s, b):
        return sigmoid64(i, t, s, b, **matches)

    got = value_and_gradients(ours, leaves)
    want = value_and_gradients(exact, [leaf.double() for leaf in leaves])
    size = magnitudes(lambda logits: sigmoid64_of(logits, **matches), *leaves)
    assert_close_to_float64(got, want, value_and_gradients(peer, leaves), size, images.dtype, NAMES, scale)


SHAPES = [
    (1, 1, 64, 0),
    (130, 130, 500, 0),
    (100, 201, 64, 40),
    (201, 100, 768, -101),
    (9, 5, 1152, 0),
    (60, 70, 512, 500),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (14.0, -10.0), (100.0, -15.0)])
@pytest.mark.parametrize(("rows", "columns", "width", "offset"), SHAPES)
def test_error_against_float64(dtype, scale, bias, rows, columns, width, offset):
    kind = "aligned" if scale == 14.0 else "random"
    images, texts = pair(rows, columns, width, seed=rows, dtype=dtype, kind=kind, offset=offset, duplicates=scale > 14)
    check(images, texts, scale, bias, offset=offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_identities(dtype):
    images, texts = pair(100, 150, 64, seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-(1 << 60), 1 << 60, (40,), generator=generator)
    image_ids, text_ids = (ids[torch.randint(0, 40, (n,), generator=generator)] for n in (100, 150))
    check(images, texts, 20.0, -8.0, image_ids=image_ids, text_ids=text_ids)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_tiles_of_other_devices(architecture, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    check(*pair(131, 150, 100, seed=5, dtype=torch.float16), 30.0, -10.0, offset=2)


def test_chunks_of_many_launches(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128 * 128 * 2)
    check(*pair(300, 290, 64, seed=6, dtype=torch.float16, duplicates=True), 50.0, -10.0, offset=-7)


def test_no_gradient_work_without_gradients(monkeypatch):
    images, texts = pair(30, 30, 64, seed=7)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    want = sigmoid_pass(images, texts, scale, bias, gradients=True, impl="triton")
    monkeypatch.setattr("mmbase_kernels.sigmoid_triton.add_product", None)
    got = sigmoid_pass(images, texts, scale, bias, gradients=False, impl="triton")
    assert torch.equal(got.loss, want.loss)
    assert all(part.numel() == 0 for part in got[1:])


def test_nan_in_one_feature_reaches_the_loss_and_the_gradients():
    images, texts = pair(20, 20, 64, seed=11)
    texts[3, 5] = torch.nan
    leaves = images, texts, torch.tensor(9.0), torch.tensor(-3.0)
    loss, *gradients = value_and_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, impl="triton"), leaves)
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_trap_8_two_runs_are_bitwise_equal():
    leaves = *pair(150, 140, 64, seed=19, dtype=torch.float16), torch.tensor(40.0), torch.tensor(-9.0)

    def once():
        return value_and_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, offset=3, impl="triton"), leaves)

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@triton.jit
def log1p_kernel(source, result, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(result + place, sigmoid_tiles.log1p(tl.load(source + place)))


def test_trap_9_log1p_keeps_the_digits_of_small_arguments():
    t = torch.cat((torch.logspace(-30, 0, 2047, base=2), torch.zeros(1)))
    result = torch.full_like(t, torch.nan)
    log1p_kernel[(1,)](t, result, BLOCK=2048)
    want = t.double().log1p()
    assert ((result - want).abs() <= 4e-7 * want).all()
    assert ((1 + t).log() - want).abs().max() > 0  # what it replaces is not exact either
    assert (((1 + t).log() - want).abs() > 1e-3 * want).any()


def test_trap_9_loss_near_minus_ten():
    """Where a sigmoid loss starts: 10,000 negatives of 4.5e-5 each."""
    images, texts = pair(100, 100, 64, seed=20)
    got = sigmoid_pass(
        images, texts, torch.tensor(1.0), torch.tensor(-10.0), offset=500, gradients=False, impl="triton"
    )
    want = F.softplus(images.double() @ texts.double().T - 10).sum()
    assert abs(got.loss - want) < 1e-6 * want
