"""What every tiled Triton kernel of the losses shares: the order of tiles, the product of one, blocks in and out.

Letters: M image rows, N text rows, D width. A tile is BLOCK_M by BLOCK_N logits; the width is walked in steps of
BLOCK_D.

A *block source* is a tensor descriptor where the hardware copies blocks by itself (sm_90 and later) and a pointer where
it does not (POINTERS): lowered from a descriptor, the loads of sm_80 and gfx942 would not be pipelined.
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def grouped_tile(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a program's tile; GROUP rows of tiles go together and share operands in the L2."""
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    height = min(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def tile_product(
    image,
    text,
    row,
    column,
    rows,
    columns,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POINTERS: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] products of image rows from ``row`` with text rows from ``column``; zero outside."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if POINTERS:
        m = row + tl.arange(0, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        image_block = image + m.to(tl.int64)[:, None] * width + d[None, :]
        text_block = text + n.to(tl.int64)[None, :] * width + d[:, None]
        for _ in tl.range(0, width, BLOCK_D):
            left = tl.load(image_block, (m < rows)[:, None], 0.0)
            right = tl.load(text_block, (n < columns)[None, :], 0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
            image_block += BLOCK_D
            text_block += BLOCK_D
    else:
        for start in tl.range(0, width, BLOCK_D):
            # float32 would be cut to TF32 without "ieee"; products of 16-bit features are exact either way.
            product = tl.dot(image.load([row, start]), text.load([column, start]).T, product, input_precision="ieee")
    return product


@triton.jit
def load_block(
    source,
    row,
    column,
    row_stop,
    column_stop,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POINTERS: tl.constexpr,
):
    """Block of a matrix at (row, column) as float32; zero outside ``row_stop`` and ``column_stop``."""
    if POINTERS:
        m = row + tl.arange(0, ROWS)
        n = column + tl.arange(0, COLUMNS)
        inside = (m < row_stop)[:, None] & (n < column_stop)[None, :]
        block = tl.load(source + m.to(tl.int64)[:, None] * stride + n[None, :], inside, 0.0)
    else:
        block = source.load([row, column])
    return block.to(tl.float32)


@triton.jit
def store_block(
    target,
    block,
    row,
    column,
    row_stop,
    column_stop,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POINTERS: tl.constexpr,
):
    """Round a float32 block to the matrix's dtype and store it at (row, column); nothing outside is written."""
    if POINTERS:
        m = row + tl.arange(0, ROWS)
        n = column + tl.arange(0, COLUMNS)
        inside = (m < row_stop)[:, None] & (n < column_stop)[None, :]
        tl.store(target + m.to(tl.int64)[:, None] * stride + n[None, :], block.to(target.dtype.element_ty), inside)
    else:
        target.store([row, column], block.to(target.dtype))


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.split(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)).permute(0, 2, 1))


@triton.jit
def parts_of(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """2, 4 or 8 groups of a tile's columns, left to right: an epilogue over one at a time needs fewer registers."""
    left, right = halves(tile, BLOCK_M, BLOCK_N)
    if PARTS == 2:
        return left, right
    else:
        return parts_of(left, BLOCK_M, BLOCK_N // 2, PARTS // 2) + parts_of(right, BLOCK_M, BLOCK_N // 2, PARTS // 2)


def aligned(features: Tensor, block_d: int, pointers: bool) -> Tensor:
    """The features as the kernels read them: contiguous, with base and rows aligned to 16 bytes.

    Copies, O(rows * D), only where they are not. Added columns are zero and change no product; pointers, which are not
    masked along the width, need it in whole blocks.
    """
    step = block_d if pointers else 16 // features.element_size()
    if features.shape[1] % step:
        return F.pad(features, (0, -features.shape[1] % step))
    # A single row's stride is arbitrary, so contiguous() might keep what a descriptor refuses.
    if features.stride() != (features.shape[1], 1) or features.data_ptr() % 16:
        return features.clone(memory_format=torch.contiguous_format)
    return features


def source(matrix: Tensor, block_rows: int, block_columns: int, pointers: bool) -> Tensor | TensorDescriptor:
    """``matrix``, whose row stride is a multiple of 16 bytes, as a block source."""
    if pointers:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_columns])
