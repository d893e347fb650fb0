"""The Triton kernels of the softmax loss's first pass; :mod:`mmbase_kernels.softmax_triton` launches them.

Letters: M image rows, N text rows; all exponentials are powers of two, of logits multiplied by log2(e).
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from mmbase_kernels.shipping import Shipped, small, tiled
from mmbase_kernels.tiles import grouped_tile, parts_of, store_block, tile_product

HEADROOM = tl.constexpr(100.0)
"""Sums are in units of 2^(peak - 100): 2^100 times 256 columns is finite, and float32 reaches 226 below the peak."""
SMALLEST_SUM = tl.constexpr(2.0**-60)
"""A smaller sum may have lost terms to underflow: the tile is done again with each row's and column's own maximum."""
MERGE: dict[str, Any] = {"BLOCK_COUNT": 16, "BLOCK_LENGTH": 64}
"""16 loads of 256 bytes in flight for each program; 65,536 sums still make 1,024 programs."""
MATCH: dict[str, Any] = {"BLOCK_M": 16, "BLOCK_D": 128}
"""16 rows, a line of 256 bytes of each at a time."""


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernels of this module that runs on an architecture."""
    for columns, ids, stash in [(columns, ids, 0) for columns in (1, 0) for ids in (0, 1)] + [(1, 0, 1), (1, 1, 1)]:
        yield from tiled("statistics", statistics_kernel, architecture, COLUMNS=columns, IDS=ids, STASH=stash)
    yield small("merge", merge_kernel, architecture, "fp32", CARRY=True, **MERGE)
    yield small("match", match_kernel, architecture, "bf16", **MATCH)


@triton.jit
def finite_or_zero(peak):
    """A maximum that can be subtracted: 0 for that of nothing, because -inf - -inf is NaN."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def scaled_logits(
    product,
    steepness,
    row,
    column,
    rows,
    columns,
    offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IDS: tl.constexpr,
):
    """Logits in powers of two; -inf outside the matrix and, without IDS, at the matches."""
    z = product * steepness
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    if (row + BLOCK_M > rows) | (column + BLOCK_N > columns):
        z = tl.where((m < rows)[:, None] & (n < columns)[None, :], z, -float("inf"))
    if not IDS:  # noqa: SIM102 (one is decided at compile time)
        if (row + offset < column + BLOCK_N) & (column < row + offset + BLOCK_M):
            z = tl.where((m + offset)[:, None] == n[None, :], -float("inf"), z)
    return z


@triton.jit
def store_common_sums(
    product,
    steepness,
    row,
    column,
    rows,
    columns,
    offset,
    row_sum,  # pointers to the tile's first row and column from here on
    row_peak,
    column_sum,
    column_peak,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
):
    """Sums of powers of a tile's rows and columns, with one maximum and one exponential for both.

    Returns the least sum, which tells whether the tile's maximum served all of its lines.
    """
    WIDE: tl.constexpr = BLOCK_N // PARTS
    parts = parts_of(product, BLOCK_M, BLOCK_N, PARTS)
    m = tl.arange(0, BLOCK_M)
    m_valid = row + m < rows
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for i in tl.static_range(PARTS):
        z = scaled_logits(parts[i], steepness, row, column + i * WIDE, rows, columns, offset, BLOCK_M, WIDE, IDS)
        top = tl.maximum(top, tl.max(z, 1))
    peak = finite_or_zero(tl.max(top, 0))
    m_sum = tl.zeros((BLOCK_M,), tl.float32)
    least = float("inf")
    for i in tl.static_range(PARTS):
        z = scaled_logits(parts[i], steepness, row, column + i * WIDE, rows, columns, offset, BLOCK_M, WIDE, IDS)
        power = tl.exp2(z - (peak - HEADROOM))
        m_sum += tl.sum(power, 1)
        if COLUMNS:
            n = i * WIDE + tl.arange(0, WIDE)
            n_valid = column + n < columns
            n_sum = tl.sum(power, 0)
            tl.store(column_sum + n, n_sum, n_valid)
            tl.store(column_peak + n, tl.full((WIDE,), 0.0, tl.float32) + peak, n_valid)
            least = min(least, tl.min(tl.where(n_valid, n_sum, float("inf")), 0))
    tl.store(row_sum + m, m_sum, m_valid)
    tl.store(row_peak + m, tl.full((BLOCK_M,), 0.0, tl.float32) + peak, m_valid)
    return min(least, tl.min(tl.where(m_valid, m_sum, float("inf")), 0))


@triton.jit
def store_own_sums(
    product,
    steepness,
    row,
    column,
    rows,
    columns,
    offset,
    row_sum,
    row_peak,
    column_sum,
    column_peak,
    stash,  # with KEEP
    row_top,
    column_top,
    stash_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    POINTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The same with each row's and column's own maximum; lines of nothing have sum 0.

    With KEEP the products go into the stash less the smaller of these maxima: whatever matters to a softmax is then
    close to 0, where 16 bits are precise. All are negated where the scale is negative, so that maxima are of logits.
    """
    WIDE: tl.constexpr = BLOCK_N // PARTS
    parts = parts_of(product, BLOCK_M, BLOCK_N, PARTS)
    m = tl.arange(0, BLOCK_M)
    m_valid = row + m < rows
    sign = tl.where(steepness < 0, -1.0, 1.0)
    steep = tl.maximum(tl.abs(steepness), 1e-30)  # -inf times 0 would be NaN
    high = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for i in tl.static_range(PARTS):
        seen = scaled_logits(parts[i], sign, row, column + i * WIDE, rows, columns, offset, BLOCK_M, WIDE, IDS)
        high = tl.maximum(high, tl.max(seen, 1))
    high = finite_or_zero(high)
    m_base = (high * steep - HEADROOM)[:, None]
    m_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(PARTS):
        left = column + i * WIDE
        n = i * WIDE + tl.arange(0, WIDE)
        n_valid = column + n < columns
        seen = scaled_logits(parts[i], sign, row, left, rows, columns, offset, BLOCK_M, WIDE, IDS)
        m_sum += tl.sum(tl.exp2(seen * steep - m_base), 1)
        if COLUMNS or KEEP:
            wide = finite_or_zero(tl.max(seen, 0))
        if COLUMNS:
            n_sum = tl.sum(tl.exp2(seen * steep - (wide * steep - HEADROOM)[None, :]), 0)
            tl.store(column_sum + n, n_sum, n_valid)
            tl.store(column_peak + n, wide * steep, n_valid)
        if KEEP:
            tl.store(column_top + n, wide, n_valid)
            kept = seen - tl.minimum(high[:, None], wide[None, :])  # -inf at a match, which the second pass replaces
            store_block(stash, kept, row, left, rows, columns, stash_stride, BLOCK_M, WIDE, POINTERS)
    tl.store(row_sum + m, m_sum, m_valid)
    tl.store(row_peak + m, high * steep, m_valid)
    if KEEP:
        tl.store(row_top + m, high, m_valid)


@triton.jit(do_not_specialize=["row_start", "row_stop", "offset"])
def statistics_kernel(
    image,  # source [M, D], blocks [BLOCK_M, BLOCK_D]
    text,  # source [N, D], blocks [BLOCK_N, BLOCK_D]
    slope,  # float32 scalar: scale * log2(e)
    row_sum,  # float32 [column tiles, row_stride]: a row's sum within a tile in units of 2^(peak - HEADROOM)
    row_peak,  # the same shape
    column_sum,  # float32 [row tiles of this launch, column_stride], with COLUMNS
    column_peak,
    positive,  # float32 [programs], with IDS: sum of share * cos over the matches
    image_ids,  # int32 [M], with IDS: equal where image and text match
    text_ids,  # int32 [N]
    row_share,  # float32 [M]
    column_share,  # float32 [N]
    stash,  # with STASH: source [M, N], blocks [BLOCK_M, BLOCK_N / PARTS]
    row_top,  # float32 [column tiles, M], with TOPS
    column_top,  # float32 [row tiles, N]
    row_start,
    row_stop,
    rows,
    columns,
    width,
    row_stride,
    column_stride,
    stash_stride,
    offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    POINTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
    STASH: tl.constexpr,
    TOPS: tl.constexpr,
):
    """One tile of the first pass: partial sums of powers; with IDS the matches' weighted sum, without them left out.

    With STASH the products are kept: those of 32-bit features as they are, of 16-bit ones (TOPS) as
    :func:`store_own_sums` says.
    """
    program = tl.program_id(0)
    row_tiles = tl.cdiv(row_stop - row_start, BLOCK_M)
    row_tile, column_tile = grouped_tile(program, row_tiles, tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_start + row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    m = row + tl.arange(0, BLOCK_M)
    m_valid = m < rows
    steepness = tl.load(slope)
    product = tile_product(image, text, row, column, rows, columns, width, BLOCK_M, BLOCK_N, BLOCK_D, POINTERS)
    WIDE: tl.constexpr = BLOCK_N // PARTS
    parts = parts_of(product, BLOCK_M, BLOCK_N, PARTS)
    if IDS:
        left_ids = tl.load(image_ids + m, m_valid, -1)[:, None]
        left_share = tl.load(row_share + m, m_valid, 0.0)[:, None]
        shared = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(PARTS):
            part_n = column + i * WIDE + tl.arange(0, WIDE)
            same = left_ids == tl.load(text_ids + part_n, part_n < columns, -1)[None, :]
            share = left_share + tl.load(column_share + part_n, part_n < columns, 0.0)[None, :]
            shared += tl.sum(tl.where(same, share * parts[i], 0.0), 1)
        tl.store(positive + program, tl.sum(shared, 0))
        tl.debug_barrier()
    row_place = column_tile.to(tl.int64) * row_stride + row - row_start
    row_sum += row_place
    row_peak += row_place
    if COLUMNS:
        column_place = row_tile.to(tl.int64) * column_stride + column
        column_sum += column_place
        column_peak += column_place
    if TOPS:
        row_top += column_tile.to(tl.int64) * rows + row
        column_top += (row // BLOCK_M).to(tl.int64) * columns + column
        store_own_sums(
            product, steepness, row, column, rows, columns, offset, row_sum, row_peak, column_sum, column_peak,
            stash, row_top, column_top, stash_stride, BLOCK_M, BLOCK_N, PARTS, POINTERS, COLUMNS, IDS, KEEP=True,
        )  # fmt: skip
    else:
        if STASH:
            for i in tl.static_range(PARTS):
                left = column + i * WIDE
                store_block(stash, parts[i], row, left, rows, columns, stash_stride, BLOCK_M, WIDE, POINTERS)
        least = store_common_sums(
            product, steepness, row, column, rows, columns, offset, row_sum, row_peak, column_sum, column_peak,
            BLOCK_M, BLOCK_N, PARTS, COLUMNS, IDS,
        )  # fmt: skip
        if least < SMALLEST_SUM:
            # Multiplied again rather than kept: registers held for a case so rare would halve the programs per SM.
            again = tile_product(image, text, row, column, rows, columns, width, BLOCK_M, BLOCK_N, BLOCK_D, POINTERS)
            tl.debug_barrier()  # another thread may have stored what this one overwrites
            store_own_sums(
                again, steepness, row, column, rows, columns, offset, row_sum, row_peak, column_sum, column_peak,
                stash, row_top, column_top, stash_stride, BLOCK_M, BLOCK_N, PARTS, POINTERS, COLUMNS, IDS, KEEP=False,
            )  # fmt: skip


@triton.jit
def merge_kernel(
    sums,  # float32 [count, stride], in units of 2^(peak - HEADROOM)
    peaks,  # the same shape
    total,  # float32 [length]: log2 of the sum
    count,
    length,
    stride,
    CARRY: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """log2 of the sum over the first axis of partial sums, in order; with CARRY ``total`` is the first addend."""
    place = tl.program_id(0) * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)
    valid = place < length
    if CARRY:
        peak = tl.load(total + place, valid, -float("inf"))
        result = tl.where(peak == -float("inf"), 0.0, 1.0)
    else:
        peak = tl.full((BLOCK_LENGTH,), -float("inf"), tl.float32)
        result = tl.zeros((BLOCK_LENGTH,), tl.float32)
    for start in tl.range(0, count, BLOCK_COUNT):
        line = start + tl.arange(0, BLOCK_COUNT)
        inside = (line < count)[:, None] & valid[None, :]
        source = line.to(tl.int64)[:, None] * stride + place[None, :]
        addend = tl.load(sums + source, inside, 0.0)
        # Scaled back before the logarithm where that is exact, so that the largest addends are rounded once.
        large = addend > 1.0
        value = tl.log2(tl.where(large, addend * 2.0**-100, addend))
        value += tl.load(peaks + source, inside, 0.0) - tl.where(large, 0.0, HEADROOM)
        higher = tl.maximum(peak, tl.max(value, 0))
        base = finite_or_zero(higher)
        result = result * tl.exp2(peak - base) + tl.sum(tl.exp2(value - base[None, :]), 0)
        peak = higher
    tl.store(total + place, tl.log2(result) + peak, valid)


@triton.jit(do_not_specialize=["offset"])
def match_kernel(
    image,  # [M, D], contiguous
    text,  # [N, D], contiguous
    match,  # float32 [M]
    rows,
    columns,
    width,
    offset,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``match[i] = image[i] . text[i + offset]`` in float32; 0 where that column does not exist."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = row + offset
    paired = (row < rows) & (column >= 0) & (column < columns)
    image_row = image + row.to(tl.int64)[:, None] * width
    text_row = text + column.to(tl.int64)[:, None] * width
    products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = paired[:, None] & (d < width)[None, :]
        left = tl.load(image_row + d[None, :], inside, 0.0).to(tl.float32)
        products += left * tl.load(text_row + d[None, :], inside, 0.0).to(tl.float32)
    tl.store(match + row, tl.sum(products, 1), row < rows)
