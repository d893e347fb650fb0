"""The softmax loss of PyTorch operations against float64 and against PyTorch's own, gradients included."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mmbase_kernels import bands, clip_loss, softmax
from mmbase_kernels.targets import gradient_unit, plan_targets

from .pairs import assert_close_to_float64, errors, magnitudes, pair, softmax64, softmax64_of, value_and_gradients

NAMES = ("loss", "images", "texts", "scale")


def pytorch(images, texts, scale, *, offset=0):
    """The loss as everyone writes it, in the dtype of the inputs."""
    logits = scale.to(images.dtype) * images @ texts.T
    here = torch.arange(max(0, -offset), min(len(images), len(texts) - offset))
    by_row = F.cross_entropy(logits[here].float(), here + offset)
    return (by_row + F.cross_entropy(logits.T[here + offset].float(), here)) / 2


@pytest.fixture(params=[None, 16], ids=["one tile", "tiles of 16"])
def side(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(bands, "CPU_SIDE", request.param)


SHAPES = [(1, 1, 64, 0), (48, 48, 500, 0), (37, 53, 64, 9), (53, 37, 768, -16), (20, 70, 65, 50), (5, 3, 1152, 0)]


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("kind", ["random", "aligned"])
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(("rows", "columns", "width", "offset"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_against_float64(side, dtype, scale, kind, duplicates, rows, columns, width, offset):
    images, texts = pair(
        rows, columns, width, seed=rows + columns, dtype=dtype, kind=kind, offset=offset, duplicates=duplicates
    )
    values = [images, texts, torch.tensor(scale)]
    want = value_and_gradients(lambda i, t, s: softmax64(i, t, s, offset=offset), [v.double() for v in values])
    peer = value_and_gradients(lambda i, t, s: pytorch(i, t, s, offset=offset), values)
    got = value_and_gradients(lambda i, t, s: clip_loss(i, t, s, offset=offset, impl="torch"), values)
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype, torch.float32]
    size = magnitudes(lambda logits: softmax64_of(logits, offset=offset), *values)
    assert_close_to_float64(got, want, peer, size, dtype, NAMES, scale)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("rows", "columns", "offset"), [(24, 24, None), (33, 50, 7)])
def test_ids_and_label_smoothing(side, impl, smoothing, ids, rows, columns, offset):
    images, texts = pair(rows, columns, 32, seed=7, kind="aligned", offset=offset or 0)
    matches = {"offset": offset or 0}
    arguments = {"offset": offset}
    if ids:  # some identities stand several times, some on one side only
        matches = arguments = {"image_ids": torch.arange(rows) % 20, "text_ids": torch.arange(columns) % 17 + 2}
    values = [images, texts, torch.tensor(20.0)]
    want = value_and_gradients(
        lambda i, t, s: softmax64(i, t, s, smoothing=smoothing, **matches), [v.double() for v in values]
    )
    got = value_and_gradients(
        lambda i, t, s: clip_loss(i, t, s, label_smoothing=smoothing, impl=impl, **arguments), values
    )
    assert max(errors(got, want)) < 3e-6


def test_a_small_loss_with_ids_at_a_large_scale(side):
    """Positives near 90, losses near 0: their sum rounded to float32 would be off by 4e-6."""
    ids = {"image_ids": torch.arange(30), "text_ids": torch.arange(30)}
    for seed in range(8):
        images, texts = pair(30, 30, 64, seed=seed, kind="aligned")
        images[1], texts[1] = images[0], texts[0]
        want = softmax64(images, texts, torch.tensor(100.0), **ids)
        assert (clip_loss(images, texts, 100.0, **ids) - want).abs() <= 1e-6 * want


def test_label_smoothing_equals_cross_entropy():
    images, texts = pair(20, 20, 16, seed=1)
    logits = 10 * images @ texts.T
    labels = torch.arange(20)
    want = sum(F.cross_entropy(x, labels, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    for impl in ("torch", "reference"):
        got = clip_loss(images, texts, torch.tensor(10.0), label_smoothing=0.1, impl=impl)
        assert torch.allclose(got, want, rtol=1e-6)


def test_autocast_rounds_nothing():
    values = [*pair(20, 20, 16, seed=1), torch.tensor(30.0)]
    want = value_and_gradients(lambda *v: clip_loss(*v, label_smoothing=0.1), values)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(lambda *v: clip_loss(*v, label_smoothing=0.1), values)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_both_signs_fit_16_bits(dtype):
    """As over ranks whose losses take gradients of different signs: G / norm is at most 1, or 2^14 in float16."""
    targets = plan_targets(4, 6, torch.device("cpu"))
    targets = dataclasses.replace(
        targets, row_weight_M=torch.full((4,), -0.125), column_weight_N=torch.tensor([0.125, -0.25, 0, 0, 0, 0.1])
    )
    norm = gradient_unit(targets, dtype)
    assert norm * (2**14 if dtype == torch.float16 else 1) == 0.375


def test_equal_to_openclip():
    from open_clip.loss import ClipLoss

    images, texts = pair(48, 48, 32, seed=9)
    values = [images, texts, torch.tensor(20.0)]
    want = value_and_gradients(ClipLoss(), values)
    got = value_and_gradients(clip_loss, values)
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


def test_a_spread_too_wide_for_one_exponential(side):
    """Rows and columns whose maxima lie 200 apart: one exponential for both would underflow to 0 / 0."""
    images, texts = pair(40, 40, 64, seed=3, kind="aligned")
    texts[20:] = -images[:20]  # columns whose best logit is far below 0
    images[20:] = images[:20]
    values = [images, texts, torch.tensor(100.0)]
    ids = {"image_ids": torch.arange(40) % 20, "text_ids": torch.arange(40) % 20}
    for arguments in ({}, ids):
        want = value_and_gradients(lambda i, t, s, a=arguments: softmax64(i, t, s, **a), [v.double() for v in values])
        got = value_and_gradients(lambda i, t, s, a=arguments: clip_loss(i, t, s, **a), values)
        assert max(errors(got, want)) < 2e-5


@pytest.mark.parametrize("kind", ["random", "aligned"])
def test_stash_gives_the_same_to_the_bit(side, kind):
    images, texts = pair(40, 40, 64, seed=4, kind=kind)
    values = [images, texts, torch.tensor(30.0)]
    kept, recomputed = (
        value_and_gradients(lambda i, t, s, b=budget: clip_loss(i, t, s, stash_bytes=b), values)
        for budget in (4 * 40 * 40, 4 * 40 * 40 - 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed))


def test_the_bias_changes_nothing_and_nan_passes_through():
    images, texts = pair(6, 6, 16, seed=5)
    bias = torch.tensor(3.0, requires_grad=True)
    plain = clip_loss(images, texts, torch.tensor(9.0))
    biased = clip_loss(images, texts, torch.tensor(9.0), logit_bias=bias)
    biased.backward()
    assert torch.equal(plain, biased.detach())
    assert bias.grad == 0
    assert clip_loss(images, texts, torch.tensor(9.0), logit_bias=float("nan")).isnan()


@pytest.mark.parametrize("where", ["images", "texts", "scale"])
def test_nan_passes_through(where):
    images, texts = pair(30, 30, 16, seed=6)
    scale = torch.tensor(9.0)
    {"images": images[7], "texts": texts[7], "scale": scale}[where].fill_(torch.nan)
    loss, *gradients = value_and_gradients(clip_loss, [images, texts, scale])
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_compute_dtype_rounds_the_products_and_keeps_the_gradients_dtype():
    images, texts = pair(32, 32, 64, seed=8)
    scale = torch.tensor(20.0)
    want = value_and_gradients(clip_loss, [images.half().float(), texts.half().float(), scale])
    got = value_and_gradients(lambda i, t, s: clip_loss(i, t, s, compute_dtype=torch.float16), [images, texts, scale])
    assert [g.dtype for g in got] == [torch.float32] * 4
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    reference = value_and_gradients(
        lambda i, t, s: clip_loss(i, t, s, compute_dtype=torch.float16, impl="reference"), [images, texts, scale]
    )
    # autograd rounds the reference's gradients to float16 on the way back; ours stay float32
    assert max(errors(reference, got)) < 5e-4


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_memory_is_flat():
    """No intermediate of either pass reaches the size of the logits: the largest is a tile."""
    images, texts = pair(6000, 6000, 16, seed=0)
    targets = plan_targets(6000, 6000, images.device)
    scale = torch.tensor(10.0)
    with Largest() as largest:
        first = softmax.statistics(images, texts, scale, targets)
        total = softmax.total_lse(first.row_lse_M, first.column_lse_N, first.match_M, targets)
        softmax.gradients(images, texts, scale, *total, first.match_M, targets, stash=first.stash)
    assert largest.bytes == 4 * 1536**2 == 4 * bands.CPU_SIDE**2


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_views_work(view):
    images, texts = pair(12, 12, 12, seed=1)
    images, texts = {
        "transposed": (images.T, texts.T),
        "strided": (images.repeat_interleave(2, 1)[:, ::2], texts.repeat_interleave(2, 0)[::2]),
        "expanded": (images[:1].expand(12, 12), texts),
    }[view]
    values = [images, texts, torch.tensor(5.0)]
    plain = value_and_gradients(clip_loss, [v.contiguous() for v in values])
    leaf = images.detach().requires_grad_()
    loss = clip_loss(leaf, texts, values[2])
    (3 * loss).backward()
    assert torch.equal(loss.detach(), plain[0])
    assert torch.equal(leaf.grad, plain[1])


@pytest.mark.parametrize(
    ("images", "texts", "extra", "message"),
    [
        (torch.randn(3, 4), torch.randn(3, 5), {}, "widths differ: images 4, texts 5"),
        (torch.randn(3, 4), torch.randn(2, 4), {}, "3 images and 2 texts"),
        (torch.randn(3, 4), torch.randn(2, 4), {"offset": 2}, "offset 2 leaves none of 3 rows a match among 2"),
        (torch.randn(3, 4), torch.randn(2, 4), {"offset": -3}, "offset -3"),
        (torch.randn(0, 4), torch.randn(0, 4), {}, r"\[0, 4\]"),
        (torch.randn(3), torch.randn(3, 4), {}, r"image_features must be \[rows, width\].*\[3\]"),
        (torch.randn(3, 4), torch.randn(3, 4).half(), {}, "dtypes differ"),
        (torch.randn(3, 4), torch.randn(3, 4, device="meta"), {}, "devices differ: images on cpu, texts on meta"),
        (torch.randn(3, 4).long(), torch.randn(3, 4).long(), {}, "floating point, not torch.int64"),
        (torch.randn(3, 4).double(), torch.randn(3, 4).double(), {}, "not torch.float64; impl='reference' does"),
        (torch.randn(3, 4), torch.randn(3, 4), {"impl": "tritn"}, "tritn"),
        (torch.randn(3, 4), torch.randn(3, 4), {"impl": "triton"}, "needs a CUDA device.*on cpu; use impl=.torch."),
        (torch.randn(3, 4), torch.randn(3, 4), {"compute_dtype": torch.int8}, "not torch.int8"),
        (torch.randn(3, 4), torch.randn(3, 4), {"image_ids": torch.arange(3)}, "or neither"),
        (
            torch.randn(3, 4),
            torch.randn(3, 4),
            {"image_ids": torch.arange(3), "text_ids": torch.arange(3), "offset": 0},
            "offset must be None, not 0",
        ),
        (
            torch.randn(3, 4),
            torch.randn(3, 4),
            {"image_ids": torch.arange(3), "text_ids": torch.arange(4)},
            r"text_ids \[4\] for 3 texts",
        ),
        (
            torch.randn(3, 4),
            torch.randn(3, 4),
            {"image_ids": torch.randn(3), "text_ids": torch.randn(3)},
            "must be integers, not torch.float32",
        ),
        (torch.randn(3, 4), torch.randn(3, 4), {"label_smoothing": 1.5}, "1.5"),
        (torch.randn(3, 4).to_sparse(), torch.randn(3, 4), {}, "must be a dense tensor, not torch.sparse_coo"),
        (None, torch.randn(3, 4), {}, "image_features must be a dense tensor, not .*NoneType"),
        (
            torch.randn(3, 4),
            torch.randn(3, 4),
            {"image_ids": torch.arange(3), "text_ids": torch.arange(3, device="meta")},
            "devices differ: text_ids on meta, features on cpu",
        ),
    ],
)
def test_bad_input(images, texts, extra, message):
    with pytest.raises(ValueError, match=message):
        clip_loss(images, texts, torch.tensor(1.0), **extra)


def test_a_scale_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"logit_scale must hold one number, not \[3\]"):
        clip_loss(torch.randn(3, 4), torch.randn(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="logit_scale must be a number or a tensor of one, not None"):
        clip_loss(torch.randn(3, 4), torch.randn(3, 4), None)
