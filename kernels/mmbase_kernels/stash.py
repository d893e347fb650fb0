"""The products that the Triton softmax loss may keep between its passes: what a stash holds, and where in it.

Letters: M image rows, N text rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmbase_kernels.chunks import up
from mmbase_kernels.launch import Setting
from mmbase_kernels.tuning import Tile


class Stash(NamedTuple):
    """Views of the one tensor in which the products are kept between the passes."""

    product_MN: Tensor
    """[M, N rounded up]: float32 products, or float16 ones less the smaller of the tile's row and column maximum."""
    row_top: Tensor | None
    """float32 [column tiles, M], with float16 products."""
    column_top: Tensor | None
    """float32 [row tiles, N]."""


def stash_parts(rows: int, columns: int, size: int, tile: Tile) -> tuple[int, int, int, int]:
    """Row stride of the kept products, and the bytes of products, row and column maxima.

    Args:
        rows: M.
        columns: N.
        size: bytes of one feature.
        tile: what the first pass writes them in.
    """
    stride = up(columns, 16 // size)
    if size == 4:
        return stride, 4 * rows * stride, 0, 0
    return stride, 2 * rows * stride, 4 * rows * -(-columns // tile.block_n), 4 * columns * -(-rows // tile.block_m)


def open_stash(setting: Setting, stash: Tensor) -> Stash | None:
    """Views of the stash; None if it is empty."""
    if not len(stash):
        return None
    rows, columns = len(setting.image_MD), len(setting.text_ND)
    stride, *sizes = stash_parts(rows, columns, setting.image_MD.element_size(), setting.tile)
    product, row_top, column_top = stash.split(sizes)
    dtype = torch.float16 if row_top.numel() else torch.float32
    kept_MN = product.view(dtype).view(rows, stride)
    if dtype == torch.float32:
        return Stash(kept_MN, None, None)
    return Stash(kept_MN, row_top.view(torch.float32).view(-1, rows), column_top.view(torch.float32).view(-1, columns))
