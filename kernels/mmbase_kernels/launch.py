"""What is needed before a launch: tensors and features as the kernels read them, the tile, the device.

Letters: M image rows, N text rows, D width.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbase_kernels.tiles import aligned, source
from mmbase_kernels.tuning import Tile, architecture, tile, uses_pointers

LOG2E = 1.4426950408889634


class Setting(NamedTuple):
    """Features as the kernels read them, and how the kernels are configured for them."""

    image_MD: Tensor
    text_ND: Tensor
    tile: Tile
    architecture: str
    pointers: bool

    def launch(self, **flags: float) -> dict[str, Any]:
        """Compile-time arguments and options of a tiled kernel, with its flags."""
        options = self.tile.options(self.architecture)
        return {**self.tile.constants(), "POINTERS": self.pointers, **options, **flags}

    def sources(self) -> tuple[Any, Any]:
        """Image and text as block sources."""
        return (
            source(self.image_MD, self.tile.block_m, self.tile.block_d, self.pointers),
            source(self.text_ND, self.tile.block_n, self.tile.block_d, self.pointers),
        )


def prepare(table: str, image_MD: Tensor, text_ND: Tensor) -> Setting:
    """The checked-in setting of a row of the tables for these features; copies them where they are not aligned."""
    name = architecture(image_MD.device)
    tile_ = tile(table, image_MD.dtype, image_MD.shape[1], name)
    pointers = uses_pointers(name)
    image_MD, text_ND = (aligned(features, tile_.block_d, pointers) for features in (image_MD, text_ND))
    return Setting(image_MD, text_ND, tile_, name, pointers)


def dense(tensor: Tensor) -> Tensor:
    """Contiguous and on a multiple of 16 bytes, by whose width the kernels load; copies only what is not."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def on_device(features: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the features."""
    return torch.cuda.device(features.device) if features.device.type == "cuda" else contextlib.nullcontext()


def ranked(image_ids_M: Tensor | None, text_ids_N: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Identities as int32 ranks, equal where the int64 ones are: half the registers and comparisons in a tile.

    Sorted rather than made unique, because the number of unique ones would have to be waited for.
    """
    if image_ids_M is None or text_ids_N is None:
        return None, None
    ordered = torch.cat((image_ids_M, text_ids_N)).sort().values
    return (
        torch.searchsorted(ordered, image_ids_M.contiguous(), out_int32=True),
        torch.searchsorted(ordered, text_ids_N.contiguous(), out_int32=True),
    )


def powers_of_two(scale: Tensor) -> tuple[Tensor, Tensor]:
    """``scale * log2(e)`` rounded to float32, and how many nats one unit of logits multiplied by it is, in float64.

    Rounded alike everywhere, the slope's error of 6e-8, at logits of 130 otherwise 8e-6, cancels out of the results.
    """
    slope = (scale.double() * LOG2E).float()
    return slope, torch.where(slope == 0, 1 / LOG2E, scale.double() / slope.double())
