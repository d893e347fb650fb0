"""The second stage of sums over rows: the first leaves a float32 line for each program, and no atomics are needed.

Letters: K kinds of sums (1 or 2), P programs, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmbase_kernels.launch import on_device
from mmbase_kernels.partials_tiles import BLOCKS, sum_partials_kernel
from mmbase_kernels.shipping import SMALL

WARPS_PER_MULTIPROCESSOR = 16
"""With at most 128 registers a thread, all of them fit at once."""
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Of the largest device of each architecture, whichever runs: the order of a sum is the same on all of them."""


def programs(architecture: str, warps: int, blocks: int) -> int:
    """How many programs of ``warps`` warps share ``blocks`` blocks of rows: as many as run at once, at least one."""
    return max(1, min(blocks, MULTIPROCESSORS[architecture] * WARPS_PER_MULTIPROCESSOR // warps))


def sum_partials(partials_KPD: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """K tensors [D] of ``dtype``: sums over the programs in float32, in an order that depends on P alone.

    Args:
        partials_KPD: float32, contiguous, no side of it empty.
        dtype: float32, float16 or bfloat16.
    """
    kinds, count, columns = partials_KPD.shape
    sums = [partials_KPD.new_empty(columns, dtype=dtype) for _ in range(kinds)]
    with on_device(partials_KPD):
        grid = (-(-columns // BLOCKS["BLOCK_D"]), kinds)
        second = sums[1] if kinds == 2 else None
        sum_partials_kernel[grid](partials_KPD, sums[0], second, count, columns, **BLOCKS, **SMALL)
    return sums
