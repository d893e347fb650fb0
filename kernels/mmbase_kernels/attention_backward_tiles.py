"""The Triton kernels of attention's backward pass; :mod:`mmbase_kernels.attention_triton` launches them.

Letters and arguments as in :mod:`mmbase_kernels.attention_tiles`; ``grad`` is the gradient to the output [T, H, D], and
``grad_qkv`` [T, 3, H, D] is written where a fused projection reads it. Every element is written once, by one program:
no atomics, two runs are bitwise equal.

With ``P = softmax(S)``, ``S = scale * Q K'``: ``dV = P' dO``, ``dP = dO V'``, ``dS = P * (dP - delta)`` where ``delta``
is the sum over keys of ``P * dP``, equally over the width of ``O * dO``; ``dQ = scale * dS K``, ``dK = scale * dS' Q``.
The scale is left out of the 16-bit dS and multiplied in float32.
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from mmbase_kernels.attention_tiles import COUNTS, load_tokens, masked, span_of, store_tokens
from mmbase_kernels.attention_tuning import shipped_of
from mmbase_kernels.shipping import Shipped


@triton.jit(do_not_specialize=COUNTS)
def backward_tile_kernel(
    qkv,
    grad,
    grad_qkv,
    cu_seqlens,
    slope,
    scale,
    length,
    varlen,
    causal,
    heads,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """A head of a sequence of at most BLOCK tokens in one tile.

    Softmax and delta are computed again: neither the output nor a log-sum-exp is read.
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, stop = span_of(cu_seqlens, sequence, length, varlen, RAGGED)
    stride = 3 * heads * D
    place = start * stride + head * D
    queries = qkv + place
    keys = queries + heads * D
    values = keys + heads * D
    q = load_tokens(queries, 0, stride, stop, D, WIDTH, BLOCK)
    k = load_tokens(keys, 0, stride, stop, D, WIDTH, BLOCK)
    token = tl.arange(0, BLOCK)
    s = masked(tl.dot(q, k.T, input_precision="ieee"), token, token, stop, causal, RAGGED)
    p = tl.exp2(s * slope - (tl.max(s, 1) * slope)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    do = load_tokens(grad + start * heads * D + head * D, 0, heads * D, stop, D, WIDTH, BLOCK)
    v = load_tokens(values, 0, stride, stop, D, WIDTH, BLOCK)
    dp = tl.dot(do, v.T, input_precision="ieee")
    delta = tl.sum(p * dp, 1)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
    store_tokens(grad_qkv + place + 2 * heads * D, dv, 0, stride, stop, D, WIDTH, BLOCK)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    store_tokens(grad_qkv + place + heads * D, dk * scale, 0, stride, stop, D, WIDTH, BLOCK)
    dq = tl.dot(ds, k, input_precision="ieee")
    store_tokens(grad_qkv + place, dq * scale, 0, stride, stop, D, WIDTH, BLOCK)


@triton.jit(do_not_specialize=COUNTS)
def backward_queries_kernel(
    qkv,
    out,
    lse,
    grad,
    grad_qkv,
    slope,
    scale,
    length,
    tokens,
    heads,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A head of a sequence of ``length`` tokens, at most BLOCK_M: all queries at once, BLOCK_N keys at a time, no mask.

    The queries' gradient stays in registers; the keys' and values' are complete after their one visit, and are computed
    transposed: the tensor cores take no fewer than 64 rows, which the width has.
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, stop = span_of(None, sequence, length, 0, False)
    stride = 3 * heads * D
    place = start * stride + head * D
    queries = qkv + place
    keys = queries + heads * D
    values = keys + heads * D
    result = start * heads * D + head * D
    q = load_tokens(queries, 0, stride, stop, D, WIDTH, BLOCK_M)
    do = load_tokens(grad + result, 0, heads * D, stop, D, WIDTH, BLOCK_M)
    o = load_tokens(out + result, 0, heads * D, stop, D, WIDTH, BLOCK_M)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row = tl.arange(0, BLOCK_M)
    high = tl.load(lse + head.to(tl.int64) * tokens + start + row, row < stop, float("inf"))
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for first in range(0, stop, BLOCK_N):
        k = load_tokens(keys, first, stride, stop, D, WIDTH, BLOCK_N)
        v = load_tokens(values, first, stride, stop, D, WIDTH, BLOCK_N)
        s = tl.dot(q, k.T, input_precision="ieee")
        p = tl.exp2(s * slope - high[:, None])
        p = tl.where((first + tl.arange(0, BLOCK_N) < stop)[None, :], p, 0.0)
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
        dv = tl.trans(tl.dot(tl.trans(do), p.to(do.dtype), input_precision="ieee"))
        store_tokens(grad_qkv + place + 2 * heads * D, dv, first, stride, stop, D, WIDTH, BLOCK_N)
        dk = tl.trans(tl.dot(tl.trans(q), ds, input_precision="ieee"))
        store_tokens(grad_qkv + place + heads * D, dk * scale, first, stride, stop, D, WIDTH, BLOCK_N)
    store_tokens(grad_qkv + place, dq * scale, 0, stride, stop, D, WIDTH, BLOCK_M)


@triton.jit(do_not_specialize=COUNTS)
def grad_queries_kernel(
    qkv,
    out,
    lse,
    delta,  # float32 [H, T]; written here, read by the kernel below
    grad,
    grad_qkv,
    cu_seqlens,
    slope,
    scale,
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
    """dQ of BLOCK_M queries of a head, over all keys in reach, of a sequence of any length."""
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, stop = span_of(cu_seqlens, sequence, length, varlen, True)
    first = tl.program_id(1) * BLOCK_M
    if first >= stop:
        return
    stride = 3 * heads * D
    place = start * stride + head * D
    keys = qkv + place + heads * D
    values = keys + heads * D
    result = start * heads * D + head * D
    row = first + tl.arange(0, BLOCK_M)
    statistic = head.to(tl.int64) * tokens + start + row
    q = load_tokens(qkv + place, first, stride, stop, D, WIDTH, BLOCK_M)
    do = load_tokens(grad + result, first, heads * D, stop, D, WIDTH, BLOCK_M)
    o = load_tokens(out + result, first, heads * D, stop, D, WIDTH, BLOCK_M)
    own = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + statistic, own, row < stop)
    high = tl.load(lse + statistic, row < stop, float("inf"))
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    reach = tl.where(causal != 0, tl.minimum(stop, first + BLOCK_M), stop)
    for column in range(0, reach, BLOCK_N):
        k = load_tokens(keys, column, stride, stop, D, WIDTH, BLOCK_N)
        v = load_tokens(values, column, stride, stop, D, WIDTH, BLOCK_N)
        s = tl.dot(q, k.T, input_precision="ieee")
        s = masked(s, row, column + tl.arange(0, BLOCK_N), stop, causal, True)
        p = tl.exp2(s * slope - high[:, None])
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = (p * (dp - own[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    store_tokens(grad_qkv + place, dq * scale, first, stride, stop, D, WIDTH, BLOCK_M)


@triton.jit(do_not_specialize=COUNTS)
def grad_keys_kernel(
    qkv,
    lse,
    delta,
    grad,
    grad_qkv,
    cu_seqlens,
    slope,
    scale,
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
    """dK and dV of BLOCK_N keys of a head, over all queries that reach them; tiles stand on end, [N, M]."""
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, stop = span_of(cu_seqlens, sequence, length, varlen, True)
    column = tl.program_id(1) * BLOCK_N
    if column >= stop:
        return
    stride = 3 * heads * D
    place = start * stride + head * D
    result = start * heads * D + head * D
    n = column + tl.arange(0, BLOCK_N)
    k = load_tokens(qkv + place + heads * D, column, stride, stop, D, WIDTH, BLOCK_N)
    v = load_tokens(qkv + place + 2 * heads * D, column, stride, stop, D, WIDTH, BLOCK_N)
    dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    nearest = tl.where(causal != 0, column // BLOCK_M * BLOCK_M, 0)
    for first in range(nearest, stop, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        statistic = head.to(tl.int64) * tokens + start + m
        q = load_tokens(qkv + place, first, stride, stop, D, WIDTH, BLOCK_M)
        do = load_tokens(grad + result, first, heads * D, stop, D, WIDTH, BLOCK_M)
        high = tl.load(lse + statistic, m < stop, float("inf"))
        own = tl.load(delta + statistic, m < stop, 0.0)
        s = tl.dot(k, q.T, input_precision="ieee")
        p = tl.exp2(s * slope - high[None, :])
        # Keys past the end are not written and need no mask.
        p = tl.where((causal == 0) | (n[:, None] <= m[None, :]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, do.T, input_precision="ieee")
        ds = (p * (dp - own[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    store_tokens(grad_qkv + place + heads * D, dk * scale, column, stride, stop, D, WIDTH, BLOCK_N)
    store_tokens(grad_qkv + place + 2 * heads * D, dv, column, stride, stop, D, WIDTH, BLOCK_N)


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernels of this module that runs on an architecture."""
    functions = {
        "backward_tile": backward_tile_kernel,
        "backward_queries": backward_queries_kernel,
        "grad_queries": grad_queries_kernel,
        "grad_keys": grad_keys_kernel,
    }
    return shipped_of(functions, architecture)
