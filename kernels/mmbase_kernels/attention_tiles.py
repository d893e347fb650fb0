"""The Triton kernels of attention's forward pass; :mod:`mmbase_kernels.attention_triton` launches them.

Letters: T tokens of all sequences, B sequences, H heads, D head width, M queries and N keys of a tile. Logits are in
powers of two: multiplied by ``slope = scale * log2(e)``.

Queries, keys and values are read from the packed projection [T, 3, H, D] where they lie. A head width that is no power
of two is padded to WIDTH in the block; nothing outside is read or written.
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from mmbase_kernels.attention_tuning import shipped_of
from mmbase_kernels.shipping import Shipped

COUNTS = ("length", "varlen", "causal", "tokens", "heads")
"""Integers for whose values 1 and 16 nothing is compiled anew."""


@triton.jit
def span_of(cu_seqlens, sequence, length, varlen, RAGGED: tl.constexpr):
    """First token and number of tokens of a sequence; without ``varlen`` all have ``length``."""
    if RAGGED:
        start = tl.load(cu_seqlens + sequence, varlen != 0, sequence * length)
        stop = tl.load(cu_seqlens + sequence + 1, varlen != 0, (sequence + 1) * length)
        return start.to(tl.int64), stop - start
    else:
        return sequence.to(tl.int64) * length, length


@triton.jit
def load_tokens(pointer, first, stride, stop, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, WIDTH] of one head from token ``first``; zero from token ``stop`` and from width D on."""
    row = first + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (row < stop)[:, None]
    if WIDTH > D:
        inside = inside & (d < D)[None, :]
    return tl.load(pointer + row[:, None] * stride + d[None, :], inside, 0.0)


@triton.jit
def store_tokens(pointer, block, first, stride, stop, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Round [ROWS, WIDTH] to the tensor's dtype and write what lies before token ``stop`` and width D."""
    row = first + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (row < stop)[:, None]
    if WIDTH > D:
        inside = inside & (d < D)[None, :]
    tl.store(pointer + row[:, None] * stride + d[None, :], block.to(pointer.dtype.element_ty), inside)


@triton.jit
def masked(scores, row, column, stop, causal, RAGGED: tl.constexpr):
    """Scores [M, N] with -inf at keys past the end and, if ``causal``, past the query.

    Queries past the end, and those of an empty sequence, keep a key in reach: their softmax, which nobody reads, is
    finite.
    """
    if RAGGED:
        end = tl.maximum(stop, 1) - 1
        last = tl.where(causal != 0, tl.minimum(row, end), end)
        return tl.where(column[None, :] <= last[:, None], scores, -float("inf"))
    else:
        return tl.where((column < stop)[None, :], scores, -float("inf"))


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    qkv,  # [T, 3, H, D]
    out,  # [T, H, D]
    lse,  # float32 [H, T], log2 of the sum of the powers, or None
    cu_seqlens,  # int32 [B + 1]; read if varlen
    slope,
    length,
    varlen,
    causal,
    tokens,
    heads,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """A head of a sequence of at most N1 + N2 + N3 tokens (N2 and N3 may be 0), whose keys and values stay on chip.

    All scores of a query are known before the first exponential, so that nothing is rescaled.
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, stop = span_of(cu_seqlens, sequence, length, varlen, RAGGED)
    stride = 3 * heads * D
    queries = qkv + start * stride + head * D
    keys = queries + heads * D
    values = keys + heads * D
    result = out + start * heads * D + head * D
    dtype = qkv.dtype.element_ty
    k1 = load_tokens(keys, 0, stride, stop, D, WIDTH, N1)
    v1 = load_tokens(values, 0, stride, stop, D, WIDTH, N1)
    if N2 > 0:
        k2 = load_tokens(keys, N1, stride, stop, D, WIDTH, N2)
        v2 = load_tokens(values, N1, stride, stop, D, WIDTH, N2)
    if N3 > 0:
        k3 = load_tokens(keys, N1 + N2, stride, stop, D, WIDTH, N3)
        v3 = load_tokens(values, N1 + N2, stride, stop, D, WIDTH, N3)
    for first in range(0, stop, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        q = load_tokens(queries, first, stride, stop, D, WIDTH, BLOCK_M)
        s1 = tl.dot(q, k1.T, input_precision="ieee")
        if RAGGED or N2 == 0:
            s1 = masked(s1, row, tl.arange(0, N1), stop, causal, RAGGED)
        top = tl.max(s1, 1)
        if N2 > 0:
            s2 = tl.dot(q, k2.T, input_precision="ieee")
            if RAGGED or N3 == 0:
                s2 = masked(s2, row, N1 + tl.arange(0, N2), stop, causal, RAGGED)
            top = tl.maximum(top, tl.max(s2, 1))
        if N3 > 0:
            s3 = tl.dot(q, k3.T, input_precision="ieee")
            s3 = masked(s3, row, N1 + N2 + tl.arange(0, N3), stop, causal, RAGGED)
            top = tl.maximum(top, tl.max(s3, 1))
        top *= slope
        p1 = tl.exp2(s1 * slope - top[:, None])
        total = tl.sum(p1, 1)
        product = tl.dot(p1.to(dtype), v1, input_precision="ieee")
        if N2 > 0:
            p2 = tl.exp2(s2 * slope - top[:, None])
            total += tl.sum(p2, 1)
            product = tl.dot(p2.to(dtype), v2, product, input_precision="ieee")
        if N3 > 0:
            p3 = tl.exp2(s3 * slope - top[:, None])
            total += tl.sum(p3, 1)
            product = tl.dot(p3.to(dtype), v3, product, input_precision="ieee")
        store_tokens(result, product / total[:, None], first, heads * D, stop, D, WIDTH, BLOCK_M)
        if lse is not None:
            tl.store(lse + head.to(tl.int64) * tokens + start + row, top + tl.log2(total), row < stop)


@triton.jit(do_not_specialize=COUNTS)
def forward_loop_kernel(
    qkv,
    out,
    lse,
    cu_seqlens,
    slope,
    length,
    varlen,
    causal,
    tokens,
    heads,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of a head against all its keys, BLOCK_N at a time, of a sequence of any length.

    Arguments are those of :func:`forward_kernel`. Softmax of one pass: Dao et al. 2022, "FlashAttention".
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, stop = span_of(cu_seqlens, sequence, length, varlen, True)
    first = tl.program_id(1) * BLOCK_M
    if first >= stop:
        return
    stride = 3 * heads * D
    queries = qkv + start * stride + head * D
    keys = queries + heads * D
    values = keys + heads * D
    row = first + tl.arange(0, BLOCK_M)
    q = load_tokens(queries, first, stride, stop, D, WIDTH, BLOCK_M)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    reach = tl.where(causal != 0, tl.minimum(stop, first + BLOCK_M), stop)
    for column in range(0, reach, BLOCK_N):
        k = load_tokens(keys, column, stride, stop, D, WIDTH, BLOCK_N)
        s = tl.dot(q, k.T, input_precision="ieee")
        s = masked(s, row, column + tl.arange(0, BLOCK_N), stop, causal, True)
        # Key 0 is in everyone's reach, so that from the first block on the largest score is finite.
        higher = tl.maximum(top, tl.max(s, 1) * slope)
        p = tl.exp2(s * slope - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = load_tokens(values, column, stride, stop, D, WIDTH, BLOCK_N)
        product = tl.dot(p.to(v.dtype), v, product * shrink[:, None], input_precision="ieee")
        top = higher
    result = out + start * heads * D + head * D
    store_tokens(result, product / total[:, None], first, heads * D, stop, D, WIDTH, BLOCK_M)
    if lse is not None:
        tl.store(lse + head.to(tl.int64) * tokens + start + row, top + tl.log2(total), row < stop)


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernels of this module that runs on an architecture."""
    return shipped_of({"forward": forward_kernel, "forward_loop": forward_loop_kernel}, architecture)
