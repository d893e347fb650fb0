"""Bands and tiles of the logits for the PyTorch implementations: how large they are and how they are multiplied.

On a CPU a tile stays in the cache, so that what happens between two matrix products costs little; other devices take
larger tiles. CUDA multiplies 16-bit features as they are and returns float32; elsewhere they are widened
first, because a product of theirs would round the logits to 16 bits.

Letters: M image rows, N text rows, D width, R rows and C columns of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmbase_kernels.chunks import spans

WORKSPACE_BYTES = 64 << 20
"""Upper bound of one float32 tile on devices other than a CPU; two or three exist at a time."""
CPU_SIDE = 1536
"""A float32 tile of 9 MiB: it fits a third-level cache, and threads seldom have to wait for one another."""


def tile_side(device: torch.device) -> int:
    """Rows and columns of a full tile."""
    return CPU_SIDE if device.type == "cpu" else math.isqrt(WORKSPACE_BYTES // 4)


def even_spans(total: int, side: int) -> list[slice]:
    """Slices that cover ``total`` in order, each at most ``side`` long and all but the last equal."""
    step = min(side, 64 * math.ceil(total / math.ceil(total / side) / 64))
    return list(spans(total, step))


def widened(features: Tensor) -> Tensor:
    """What is multiplied: the features as they are on CUDA, float32 elsewhere."""
    return features if features.device.type == "cuda" else features.float()


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right`` into ``out``, float32 whatever the dtype of both."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    return out.copy_(torch.mm(left, right, out_dtype=torch.float32))


def add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """``into += left @ right``, accumulated in float32."""
    if left.dtype == torch.float32:
        torch.addmm(into, left, right, out=into)
    else:
        into += torch.mm(left, right, out_dtype=torch.float32)


class Tile(NamedTuple):
    """A place in the matrix of logits and a buffer for it."""

    rows: slice
    columns: slice
    buffer_RC: Tensor

    def diagonal(self, offset: int) -> Tensor:
        """View of the buffer's entries at column ``row + offset`` of the whole matrix; possibly empty."""
        return self.buffer_RC.diagonal(self.rows.start + offset - self.columns.start)

    def diagonal_rows(self, offset: int) -> slice:
        """The rows of the whole matrix that :meth:`diagonal` runs over."""
        start = max(self.rows.start, self.columns.start - offset)
        return slice(start, start + len(self.diagonal(offset)))


class Bands:
    """Walks the matrix of logits band by band of rows, and in each band tile by tile.

    Args:
        image_MD: float32, float16 or bfloat16.
        text_ND: the same.
        scale: float32 scalar that multiplies the products.
    """

    def __init__(self, image_MD: Tensor, text_ND: Tensor, scale: Tensor) -> None:
        self.image_MD, self.text_ND, self.scale = image_MD, widened(text_ND), scale
        side = tile_side(image_MD.device)
        self.largest = min(side, len(image_MD)) * min(side, len(text_ND))
        self._buffer = image_MD.new_empty(self.largest, dtype=torch.float32)
        self.rows, self.columns = even_spans(len(image_MD), side), even_spans(len(text_ND), side)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Each band's rows and its widened image features."""
        for rows in self.rows:
            yield rows, widened(self.image_MD[rows])

    def tiles(self, rows: slice, band_RD: Tensor, stash_MN: Tensor | None = None) -> Iterator[Tile]:
        """Logits of the band's tiles, one at a time in one buffer; copied from the stash where there is one."""
        scaled = band_RD * self.scale if band_RD.dtype == torch.float32 else band_RD
        for columns in self.columns:
            shape = len(band_RD), columns.stop - columns.start
            z_RC = self._buffer[: shape[0] * shape[1]].view(shape)
            if stash_MN is not None:
                z_RC.copy_(stash_MN[rows, columns])
            else:
                product(scaled, self.text_ND[columns].T, z_RC)
                if scaled is band_RD:
                    z_RC *= self.scale
            yield Tile(rows, columns, z_RC)
