"""The Triton kernel of the softmax loss's second pass; :mod:`mmbase_kernels.softmax_triton` launches it.

Letters: M image rows, N text rows; all exponentials are powers of two, of logits multiplied by log2(e).
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from mmbase_kernels.shipping import Shipped, tiled
from mmbase_kernels.tiles import grouped_tile, load_block, parts_of, store_block, tile_product


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernel of this module that runs on an architecture."""
    modes = [(columns, ids, smooth, 0) for columns in (1, 0) for ids in (0, 1) for smooth in (0, 1)]
    for columns, ids, smooth, stash in [*modes, (1, 0, 0, 1), (1, 1, 1, 1)]:
        yield from tiled(
            "gradient", gradient_kernel, architecture, COLUMNS=columns, IDS=ids, SMOOTH=smooth, STASH=stash
        )


@triton.jit
def restored(kept, high, column_top, row, column, rows, columns, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """Products from what the first pass kept of them; zero outside the matrix, -inf at a match without ids."""
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, WIDE)
    wide = tl.load(column_top + (row // BLOCK_M).to(tl.int64) * columns + n, n < columns, 0.0)
    products = kept + tl.minimum(high[:, None], wide[None, :])
    return tl.where((m < rows)[:, None] & (n < columns)[None, :], products, 0.0)


@triton.jit
def gradient_part(
    product,  # float32 [BLOCK_M, WIDE]
    steepness,  # scale * log2(e)
    middle,  # of all log-sum-exps
    alike,  # whether all are near the middle
    row_factor,  # [BLOCK_M]
    row,
    column,
    rows,
    columns,
    offset,
    row_lse,
    column_lse,
    row_weight,
    column_weight,
    column_factor,
    match_gradient,
    image_ids,
    text_ids,
    row_share,
    column_share,
    row_smooth,
    column_smooth,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """G of some columns of a tile and each row's sum of G * cos over them (without IDS: leaving out the match)."""
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, WIDE)
    m_valid = m < rows
    n_valid = n < columns
    if alike:
        factor = row_factor[:, None]
        if COLUMNS:
            factor = factor + tl.load(column_factor + n, n_valid, 0.0)[None, :]
        g = tl.exp2(product * steepness - middle) * factor
    else:
        # Log-sum-exps of the padding are +inf: there G is 0, whatever the others are.
        z = product * steepness
        lse = tl.load(row_lse + m, m_valid, float("inf"))
        g = tl.load(row_weight + m, m_valid, 0.0)[:, None] * tl.exp2(z - lse[:, None])
        if COLUMNS:
            lse = tl.load(column_lse + n, n_valid, float("inf"))
            g += tl.load(column_weight + n, n_valid, 0.0)[None, :] * tl.exp2(z - lse[None, :])
        g = tl.where(m_valid[:, None] & n_valid[None, :], g, 0.0)
    if SMOOTH:
        g -= tl.load(row_smooth + m, m_valid, 0.0)[:, None] + tl.load(column_smooth + n, n_valid, 0.0)[None, :]
    if IDS:
        same = tl.load(image_ids + m, m_valid, -1)[:, None] == tl.load(text_ids + n, n_valid, -1)[None, :]
        share = tl.load(row_share + m, m_valid, 0.0)[:, None] + tl.load(column_share + n, n_valid, 0.0)[None, :]
        g = tl.where(same, g - share, g)
        cosine_sum = tl.sum(g * product, 1)
    else:
        if (row + offset < column + WIDE) & (column < row + offset + BLOCK_M):
            matched = (m + offset)[:, None] == n[None, :]
            cosine_sum = tl.sum(tl.where(matched, 0.0, g * product), 1)
            g = tl.where(matched, tl.load(match_gradient + m, m_valid, 0.0)[:, None], g)
        else:
            cosine_sum = tl.sum(g * product, 1)
    return g, cosine_sum


@triton.jit(do_not_specialize=["row_start", "row_stop", "column_start", "column_stop", "offset"])
def gradient_kernel(
    image,  # source [M, D], blocks [BLOCK_M, BLOCK_D]; unused with STASH
    text,  # source [N, D], blocks [BLOCK_N, BLOCK_D]; unused with STASH
    stash,  # with STASH: source [M, N], blocks [BLOCK_M, BLOCK_N / PARTS]
    row_top,  # float32 [column tiles, M], with TOPS
    column_top,  # float32 [row tiles, N]
    chunk,  # source [row_stop - row_start, column_stop - column_start], blocks [BLOCK_M, BLOCK_N / PARTS]
    cosine_partial,  # float32 [programs]: sum of G * cos
    slope,  # float32 scalar: scale * log2(e)
    middle,  # float32 [2]: the middle of all log-sum-exps; 1 if all are near it, else 0
    row_lse,  # float32 [M], in powers of two
    column_lse,  # float32 [N], with COLUMNS
    row_weight,  # float32 [M]; this and all that follow are divided by the chunk's unit
    column_weight,  # float32 [N]
    row_factor,  # float32 [M]: weight * 2^(middle - log-sum-exp)
    column_factor,  # float32 [N]
    match_gradient,  # float32 [M], without IDS
    image_ids,  # int32 [M], with IDS: equal where image and text match
    text_ids,  # int32 [N]
    row_share,  # float32 [M]
    column_share,  # float32 [N]
    row_smooth,  # float32 [M], with SMOOTH
    column_smooth,  # float32 [N]
    row_start,
    row_stop,
    column_start,
    column_stop,
    rows,
    columns,
    width,
    stash_stride,
    chunk_stride,
    offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    POINTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
    SMOOTH: tl.constexpr,
    STASH: tl.constexpr,
    TOPS: tl.constexpr,
):
    """One tile of the second pass: G, formed in float32 and rounded once, into the chunk of the two gradient products.

    Where all log-sum-exps are near their middle, one exponential serves both softmaxes: ``2^(z - middle)`` times the
    sum of the row's and the column's factor. No factor leaves float32, because z exceeds neither log-sum-exp.
    """
    WIDE: tl.constexpr = BLOCK_N // PARTS
    program = tl.program_id(0)
    row_tiles = tl.cdiv(row_stop - row_start, BLOCK_M)
    row_tile, column_tile = grouped_tile(program, row_tiles, tl.cdiv(column_stop - column_start, BLOCK_N), GROUP)
    row = row_start + row_tile * BLOCK_M
    column = column_start + column_tile * BLOCK_N
    m = row + tl.arange(0, BLOCK_M)
    if not STASH:
        product = tile_product(image, text, row, column, rows, columns, width, BLOCK_M, BLOCK_N, BLOCK_D, POINTERS)
        parts = parts_of(product, BLOCK_M, BLOCK_N, PARTS)
    if TOPS:
        high = tl.load(row_top + (column // BLOCK_N).to(tl.int64) * rows + m, m < rows, 0.0)
    steepness = tl.load(slope)
    centre = tl.load(middle)
    alike = tl.load(middle + 1) > 0.0
    factor = tl.load(row_factor + m, m < rows, 0.0)
    cosine_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(PARTS):
        left = column + i * WIDE
        if STASH:
            part = load_block(stash, row, left, rows, columns, stash_stride, BLOCK_M, WIDE, POINTERS)
            if TOPS:
                part = restored(part, high, column_top, row, left, rows, columns, BLOCK_M, WIDE)
                part *= tl.where(steepness < 0, -1.0, 1.0)
        else:
            part = parts[i]
        g, cosines = gradient_part(
            part, steepness, centre, alike, factor, row, left, rows, columns, offset,
            row_lse, column_lse, row_weight, column_weight, column_factor, match_gradient, image_ids, text_ids,
            row_share, column_share, row_smooth, column_smooth, BLOCK_M, WIDE, COLUMNS, IDS, SMOOTH,
        )  # fmt: skip
        store_block(
            chunk, g, row - row_start, left - column_start, row_stop - row_start, column_stop - column_start,
            chunk_stride, BLOCK_M, WIDE, POINTERS,
        )  # fmt: skip
        cosine_sum += cosines
    tl.store(cosine_partial + program, tl.sum(cosine_sum, 0))
