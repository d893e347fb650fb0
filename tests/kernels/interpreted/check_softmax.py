"""The softmax loss in Triton's interpreter against float64; run by test_triton_interpreted.py."""

import pytest
import torch
import triton
import triton.language as tl

from mmbase_kernels import chunks, clip_loss, launch, softmax, softmax_triton, tiles
from mmbase_kernels.targets import plan_targets

from ..pairs import magnitudes, pair, softmax64, softmax64_of, value_and_gradients
from .demands import assert_close_to_float64

NAMES = ("loss", "images", "texts", "scale")
EVERYTHING = 1 << 40


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel forgot to write is NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def check(images, texts, scale, *, stash_bytes=0, smoothing=0.0, **matches):
    """Loss and gradients of Triton, against float64 and beside those of PyTorch in the same dtype."""
    scale = torch.tensor(float(scale))
    leaves = images, texts, scale

    def ours(i, t, s):
        return clip_loss(i, t, s, stash_bytes=stash_bytes, label_smoothing=smoothing, impl="triton", **matches)

    def peer(i, t, s):
        return softmax64_of((s.to(i.dtype) * i @ t.T).float(), smoothing=smoothing, **matches)

    def exact(i, t, s):
        return softmax64(i, t, s, smoothing=smoothing, **matches)

    got = value_and_gradients(ours, leaves)
    want = value_and_gradients(exact, [leaf.double() for leaf in leaves])
    size = magnitudes(lambda logits: softmax64_of(logits, smoothing=smoothing, **matches), *leaves)
    assert_close_to_float64(got, want, value_and_gradients(peer, leaves), size, images.dtype, NAMES, scale)


SHAPES = [
    (1, 1, 64, 0),
    (130, 130, 500, 0),
    (100, 201, 64, 40),
    (201, 100, 768, -101),
    (64, 140, 512, 70),
    (9, 5, 1152, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("stash_bytes", [0, EVERYTHING])
@pytest.mark.parametrize(("rows", "columns", "width", "offset"), SHAPES)
def test_error_against_float64(dtype, scale, stash_bytes, rows, columns, width, offset):
    kind = "aligned" if scale == 14.0 else "random"
    images, texts = pair(rows, columns, width, seed=rows, dtype=dtype, kind=kind, offset=offset, duplicates=scale > 14)
    check(images, texts, scale, stash_bytes=stash_bytes, offset=offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("stash_bytes", [0, EVERYTHING])
def test_identities_and_label_smoothing(dtype, smoothing, stash_bytes):
    images, texts = pair(100, 150, 64, seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-(1 << 60), 1 << 60, (40,), generator=generator)
    image_ids, text_ids = (ids[torch.randint(0, 40, (n,), generator=generator)] for n in (100, 150))
    check(images, texts, 20.0, stash_bytes=stash_bytes, smoothing=smoothing, image_ids=image_ids, text_ids=text_ids)


def test_label_smoothing_without_identities():
    images, texts = pair(70, 90, 64, seed=4, dtype=torch.float16)
    check(images, texts, 20.0, smoothing=0.2, offset=3)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
@pytest.mark.parametrize("stash_bytes", [0, EVERYTHING])
def test_tiles_of_other_devices(architecture, stash_bytes, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    images, texts = pair(131, 150, 100, seed=5, dtype=torch.float16)
    check(images, texts, 30.0, stash_bytes=stash_bytes, offset=2)


def test_chunks_and_partial_sums_of_many_launches(monkeypatch):
    images, texts = pair(300, 290, 64, seed=6, dtype=torch.float16, duplicates=True)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128 * 128 * 2)
    monkeypatch.setattr(chunks, "PARTIAL_BYTES", 1)
    plan = chunks.plan_chunks(images, 290, 128, 128)
    assert len(list(plan.chunks(300, 290))) > 1
    check(images, texts, 50.0, offset=-7)


@pytest.mark.parametrize("scale", [-30.0, 0.0, 1000.0])
@pytest.mark.parametrize("stash_bytes", [0, EVERYTHING])
def test_unusual_scales(scale, stash_bytes):
    images, texts = pair(60, 60, 64, seed=7, dtype=torch.float16)
    check(images, texts, scale, stash_bytes=stash_bytes)


def primitives(images, texts, scale, targets, impl, *, columns=True, text=True, stash_bytes=0):
    first = softmax.statistics(images, texts, scale, targets, columns=columns, stash_bytes=stash_bytes, impl=impl)
    rows, totals = softmax.total_lse(first.row_lse_M, first.column_lse_N, first.match_M, targets)
    match = softmax.match_gradient(first.row_lse_M, first.column_lse_N, first.match_M, targets)
    return first, softmax.gradients(
        images, texts, scale, rows, totals, match, targets, stash=first.stash, text=text, impl=impl
    )


@pytest.mark.parametrize("stash_bytes", [0, EVERYTHING])
@pytest.mark.parametrize("offset", [0, 10, 500, -500])
def test_primitives_equal_those_of_pytorch(offset, stash_bytes):
    """Also where no column is matched, where columns are not asked for, and where no text gradient is."""
    images, texts = pair(70, 90, 64, seed=8)
    targets = plan_targets(70, 90, images.device, offset=offset)
    for columns in (True, False):
        options = {"columns": columns, "text": columns}
        ours = primitives(images, texts, torch.tensor(10.0), targets, "triton", stash_bytes=stash_bytes, **options)
        theirs = primitives(images, texts, torch.tensor(10.0), targets, "torch", **options)
        for field in ("row_lse_M", "column_lse_N", "match_M", "positive"):
            torch.testing.assert_close(
                getattr(ours[0], field), getattr(theirs[0], field), rtol=2e-6, atol=2e-6, check_dtype=False
            )
        for got, want in zip(ours[1], theirs[1]):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6, check_dtype=False)
        assert ours[1].text_ND.numel() == (90 * 64 if columns else 0)
        assert (len(ours[0].stash) > 0) == (stash_bytes > 0)


def test_a_stash_larger_than_its_budget_is_not_kept():
    images, texts = pair(30, 40, 64, seed=9)
    targets = plan_targets(30, 40, images.device)
    exactly = 4 * 30 * 40
    for budget, kept in ((exactly, exactly), (exactly - 1, 0)):
        first = softmax_triton.statistics(images, texts, torch.tensor(1.0), targets, stash_bytes=budget)
        assert len(first.stash) == kept


def test_transposed_sliced_and_single_row_features():
    images, texts = pair(40, 40, 72, seed=10, dtype=torch.float16)
    plain = clip_loss(images, texts, torch.tensor(9.0), impl="triton")
    wide = torch.nn.functional.pad(images, (3, 0))[:, 3:]
    assert torch.equal(clip_loss(images.T.contiguous().T, texts, torch.tensor(9.0), impl="triton"), plain)
    assert torch.equal(clip_loss(wide, texts, torch.tensor(9.0), impl="triton"), plain)
    assert torch.isfinite(clip_loss(images[:1].expand(1, 72), texts[5:6], torch.tensor(9.0), impl="triton"))


def test_nan_in_one_feature_reaches_the_loss_and_the_gradients():
    images, texts = pair(20, 20, 64, seed=11)
    images[3, 5] = torch.nan
    loss, *gradients = value_and_gradients(
        lambda i, t, s: clip_loss(i, t, s, impl="triton"), (images, texts, torch.tensor(9.0))
    )
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_trap_1_round_after_subtracting_the_positive():
    """bf16(p) - y is off by 8e-2 at scale 100: of matches that dominate, G must keep its relative precision."""
    images, texts = pair(120, 120, 64, seed=12, dtype=torch.float16)
    texts = torch.nn.functional.normalize(images.double() * 0.45 + texts.double(), dim=1).half()
    exact = value_and_gradients(softmax64, [leaf.double() for leaf in (images, texts, torch.tensor(100.0))])
    got = value_and_gradients(lambda i, t, s: clip_loss(i, t, s, impl="triton"), (images, texts, torch.tensor(100.0)))
    for ours, want in zip(got[1:3], exact[1:3]):
        assert (ours.double() - want).norm() < 1e-3 * want.norm()


def test_trap_2_a_stash_of_16_bits_keeps_duplicates_at_scale_100():
    """Half an ulp of a float16 logit of 90 is 0.03; two equal texts must share their match in halves all the same."""
    images, texts = pair(128, 160, 64, seed=13, dtype=torch.float16, kind="aligned")
    texts[1], texts[9], images[30] = texts[0], texts[8], images[29]
    texts[140:150] = texts[20:30]
    check(images, texts, 100.0, stash_bytes=EVERYTHING, offset=0)


def test_trap_3_maxima_are_true_ones():
    """Rows whose products are all near -1 beside rows near 1: 300 powers of two apart in one tile."""
    images, texts = pair(100, 100, 64, seed=14)
    direction = torch.nn.functional.normalize(torch.ones(64), dim=0)
    images = torch.nn.functional.normalize(0.05 * images + direction, dim=1)
    texts = torch.nn.functional.normalize(0.05 * texts + direction, dim=1)
    images[:50] *= -1
    for scale in (14.0, 100.0):
        for stash_bytes in (0, EVERYTHING):
            check(images, texts, scale, stash_bytes=stash_bytes)
            check(images.half(), texts.half(), scale, stash_bytes=stash_bytes)


@pytest.mark.parametrize(("rows", "columns", "offset"), [(1, 1, 0), (129, 1, -128), (1, 129, 128), (127, 129, 1)])
def test_trap_4_nothing_left_in_a_row_and_ragged_edges(rows, columns, offset):
    """A row whose only column is its match has nothing left: -inf - (-inf) must not arise."""
    check(*pair(rows, columns, 64, seed=15), 20.0, offset=offset)


@triton.jit
def store_and_load(matrix, result, row, column, row_stop, column_stop, stride):
    place = tl.arange(0, 16)
    block = place[:, None] * 16.0 + place[None, :]
    tiles.store_block(matrix, block, row, column, row_stop, column_stop, stride, 16, 16, True)
    loaded = tiles.load_block(matrix, row, column, row_stop, column_stop, stride, 16, 16, True)
    tl.store(result + place[:, None] * 16 + place[None, :], loaded)


def test_trap_4_places_beyond_31_bits():
    """Row 40,000 of 65,536 columns lies beyond 2^31 elements (the memory between is never touched)."""
    matrix, result = torch.empty(40_010, 65_536, dtype=torch.float16), torch.empty(16, 16)
    store_and_load[(1,)](matrix, result, 40_000, 65_530, 40_010, 65_536, matrix.stride(0))
    want = torch.arange(256.0).view(16, 16)
    want[10:], want[:, 6:] = 0, 0
    assert torch.equal(result, want)
    assert torch.equal(matrix[40_000:, 65_530:].float(), want[:10, :6])


def test_trap_5_gradient_of_the_scale_and_grad_output():
    images, texts = pair(140, 130, 64, seed=17)
    leaves = images, texts, torch.tensor(30.0)
    for grad_output in (1.0, 0.25):
        got = value_and_gradients(lambda i, t, s: clip_loss(i, t, s, offset=0, impl="triton"), leaves, grad_output)
        want = value_and_gradients(softmax64, [leaf.double() for leaf in leaves], grad_output)
        assert abs(got[3] - want[3]) < 2e-5 * abs(want[3])


def test_trap_7_float32_products_are_not_cut_to_tf32():
    images, texts = pair(64, 64, 768, seed=18)
    first = softmax_triton.statistics(images, texts, torch.tensor(100.0), plan_targets(64, 64, images.device))
    logits = 100 * images.double() @ texts.double().T
    logits.fill_diagonal_(-torch.inf)
    assert (first.row_lse_M - logits.logsumexp(1)).abs().max() < 2e-5


@pytest.mark.parametrize("stash_bytes", [0, EVERYTHING])
def test_trap_8_two_runs_are_bitwise_equal(stash_bytes):
    leaves = *pair(150, 140, 64, seed=19, dtype=torch.float16), torch.tensor(40.0)

    def once():
        return value_and_gradients(
            lambda i, t, s: clip_loss(i, t, s, offset=3, stash_bytes=stash_bytes, impl="triton"), leaves
        )

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("stash_bytes", [0, EVERYTHING])
def test_the_operator_says_beforehand_what_it_returns(dtype, ids, stash_bytes):
    """What torch.compile and torch.export plan with: shapes and dtypes, the stash's too."""
    images, texts = pair(40, 50, 64, seed=20, dtype=dtype)
    identities = (torch.arange(40) % 9, torch.arange(50) % 9) if ids else (None, None)
    targets = plan_targets(40, 50, images.device, image_ids=identities[0], text_ids=identities[1])
    weights = targets.row_weight_M, targets.column_weight_N, targets.row_share_M, targets.column_share_N
    scale = torch.tensor(9.0)
    arguments = (images, texts, scale, *weights, None, None, *identities, 0, None, stash_bytes, "triton")
    torch.library.opcheck(
        torch.ops.mmbase_kernels.clip_loss.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert (len(torch.ops.mmbase_kernels.clip_loss.default(*arguments)[4]) > 0) == (stash_bytes > 0)
