"""The Triton kernel of the sigmoid loss; :mod:`mmbase_kernels.sigmoid_triton` launches it.

Letters: M image rows, N text rows; all exponentials are powers of two, of logits multiplied by log2(e).
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from mmbase_kernels.shipping import Shipped, tiled
from mmbase_kernels.tiles import grouped_tile, parts_of, store_block, tile_product

LOG_OF_2 = tl.constexpr(0.6931471805599453)


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernel of this module that runs on an architecture."""
    for ids, gradients in ((0, 1), (1, 1), (0, 0)):
        yield from tiled("sigmoid", sigmoid_kernel, architecture, IDS=ids, GRADIENTS=gradients)


@triton.jit
def log1p(t):
    """log(1 + t) for t in [0, 1], to a relative 3.2e-7: a Chebyshev fit of log(1 + t) / t of degree 7.

    ``log2(1 + t)`` would lose the digits of a small t to the 1: near z = -10, where a sigmoid loss starts, 1 in 700.
    """
    p = -8.33649754e-3 * t + 4.33708499e-2
    p = p * t - 1.06677904e-1
    p = p * t + 1.76754933e-1
    p = p * t - 2.44704696e-1
    p = p * t + 3.32711867e-1
    p = p * t - 4.99971261e-1
    p = p * t + 9.99999775e-1
    return p * t


@triton.jit
def sigmoid_part(
    product,  # float32 [BLOCK_M, WIDE]
    steepness,
    shift,
    row,
    column,
    rows,
    columns,
    offset,
    image_ids,
    text_ids,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    IDS: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """Loss of some columns of a tile summed for each row, and with GRADIENTS its derivative to each logit.

    With ``v`` the logit, negated at a match, the loss of a pair is softplus(v) and its derivative to v is sigmoid(v);
    both come of one exponential of ``-|v|``, so that neither overflows nor cancels.
    """
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, WIDE)
    v = product * steepness + shift
    near = (row + offset < column + WIDE) & (column < row + offset + BLOCK_M)
    if IDS:
        left = tl.load(image_ids + m, m < rows, -1)
        right = tl.load(text_ids + n, n < columns, -1)
        v = tl.where(left[:, None] == right[None, :], -v, v)
    else:
        if near:
            v = tl.where((m + offset)[:, None] == n[None, :], -v, v)
    if (row + BLOCK_M > rows) | (column + WIDE > columns):
        v = tl.where((m < rows)[:, None] & (n < columns)[None, :], v, -float("inf"))
    t = tl.exp2(-tl.abs(v))
    loss = tl.sum(tl.maximum(v, 0.0) * LOG_OF_2 + log1p(t), 1)
    if GRADIENTS:
        root = tl.rsqrt(1.0 + t)  # one instruction; a division guards against ranges that 1 to 2 never meets
        reciprocal = root * root
        g = tl.where(v >= 0, reciprocal, t * reciprocal)
        if IDS:
            g = tl.where(left[:, None] == right[None, :], -g, g)
        else:
            if near:
                g = tl.where((m + offset)[:, None] == n[None, :], -g, g)
    else:
        g = v
    return loss, g


@triton.jit(do_not_specialize=["row_start", "row_stop", "column_start", "column_stop", "offset"])
def sigmoid_kernel(
    image,  # source [M, D], blocks [BLOCK_M, BLOCK_D]
    text,  # source [N, D], blocks [BLOCK_N, BLOCK_D]
    # With GRADIENTS: source [row_stop - row_start, column_stop - column_start], blocks [BLOCK_M, BLOCK_N / PARTS].
    chunk,
    loss_partial,  # float32 [programs]
    cosine_partial,  # float32 [programs], with GRADIENTS: sum of G * cos
    bias_partial,  # float32 [programs]: sum of G
    slope,  # float32 scalar: scale * log2(e)
    shift,  # float32 scalar: bias * log2(e)
    image_ids,  # int32 [M], with IDS: equal where image and text match
    text_ids,  # int32 [N]
    row_start,
    row_stop,
    column_start,
    column_stop,
    rows,
    columns,
    width,
    chunk_stride,
    offset,
    INVERSE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    POINTERS: tl.constexpr,
    IDS: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """One tile of the only pass: the loss, and G in float32, rounded once, into the chunk of the two products."""
    WIDE: tl.constexpr = BLOCK_N // PARTS
    program = tl.program_id(0)
    row_tiles = tl.cdiv(row_stop - row_start, BLOCK_M)
    row_tile, column_tile = grouped_tile(program, row_tiles, tl.cdiv(column_stop - column_start, BLOCK_N), GROUP)
    row = row_start + row_tile * BLOCK_M
    column = column_start + column_tile * BLOCK_N
    product = tile_product(image, text, row, column, rows, columns, width, BLOCK_M, BLOCK_N, BLOCK_D, POINTERS)
    parts = parts_of(product, BLOCK_M, BLOCK_N, PARTS)
    steepness = tl.load(slope)
    height = tl.load(shift)
    loss_sum = tl.zeros((BLOCK_M,), tl.float32)
    cosine_sum = tl.zeros((BLOCK_M,), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(PARTS):
        part = parts[i]
        loss, g = sigmoid_part(
            part, steepness, height, row, column + i * WIDE, rows, columns, offset, image_ids, text_ids,
            BLOCK_M, WIDE, IDS, GRADIENTS,
        )  # fmt: skip
        loss_sum += loss
        if GRADIENTS:
            cosine_sum += tl.sum(g * part, 1)
            bias_sum += tl.sum(g, 1)
            store_block(
                chunk, g * INVERSE_UNIT, row - row_start, column + i * WIDE - column_start, row_stop - row_start,
                column_stop - column_start, chunk_stride, BLOCK_M, WIDE, POINTERS,
            )  # fmt: skip
    tl.store(loss_partial + program, tl.sum(loss_sum, 0))
    if GRADIENTS:
        tl.store(cosine_partial + program, tl.sum(cosine_sum, 0))
        tl.store(bias_partial + program, tl.sum(bias_sum, 0))
