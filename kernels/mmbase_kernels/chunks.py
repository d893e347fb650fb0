"""The Triton losses' workspace: how large a chunk of G is, and the two products that use it up.

Letters: M image rows, N text rows, D width, R rows and C columns of one chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 768 << 20
"""Upper bound of one chunk: at 65,536 columns and two bytes 5,632 rows fit, one wave of 128 x 256 tiles at D 768."""
PARTIAL_BYTES = 128 << 20
"""Upper bound of the statistics' partial sums that exist at a time."""


@dataclass(frozen=True)
class Plan:
    """Steps in which the M by N matrix is walked: multiples of the kernel's tile."""

    row_step: int
    column_step: int

    def chunks(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every chunk, in the fixed order in which products are accumulated."""
        for column_span in spans(columns, self.column_step):
            for row_span in spans(rows, self.row_step):
                yield row_span, column_span


def spans(total: int, step: int) -> Iterator[slice]:
    """Slices that cover ``total`` in order, each at most ``step`` long."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def up(number: int, multiple: int) -> int:
    """``number`` rounded up to a multiple."""
    return -(-number // multiple) * multiple


def plan_chunks(features: Tensor, columns: int, block_m: int, block_n: int) -> Plan:
    """How the gradient passes walk ``features`` [M, D] against ``columns`` texts within CHUNK_BYTES.

    The product of a chunk with the texts is [R, D] and has few output tiles, so R is what fills all multiprocessors
    with 128 x 256 tiles, several times if the workspace allows it; columns are divided only where a chunk would not
    fit.
    """
    rows, width = features.shape
    processors = 132
    if features.device.type == "cuda":
        processors = torch.cuda.get_device_properties(features.device).multi_processor_count
    wave = up(128 * max(1, processors // -(-width // 256)), block_m)
    bytes_per_row = columns * features.element_size()
    row_step = min(wave * max(1, CHUNK_BYTES // (wave * bytes_per_row)), up(rows, block_m))
    column_step = max(block_n, CHUNK_BYTES // (row_step * features.element_size()) // block_n * block_n)
    pieces = -(-columns // column_step)
    return Plan(row_step, up(-(-columns // pieces), block_n))


def plan_partials(rows: int, columns: int, block_m: int, block_n: int) -> Plan:
    """Row steps of the statistics: a sum and a peak, float32, of each row and each column of every tile in a step."""
    bytes_per_tile_row = 8 * (block_m * -(-columns // block_n) + columns)
    return Plan(block_m * min(max(1, PARTIAL_BYTES // bytes_per_tile_row), -(-rows // block_m)), columns)


def new_chunk(features: Tensor, plan: Plan, rows: int, columns: int) -> Tensor:
    """Workspace ``[R, C]`` for the largest chunk, in the features' dtype; its rows are aligned to 16 bytes."""
    step = 16 // features.element_size()
    return features.new_empty(min(plan.row_step, rows), up(min(plan.column_step, columns), step))


@contextlib.contextmanager
def exact_products(features: Tensor) -> Iterator[None]:
    """Within, autocast casts no product, and products of float32 features on a GPU are float32, whatever is allowed."""
    with torch.autocast(features.device.type, enabled=False):
        if features.device.type != "cuda" or features.dtype != torch.float32:
            yield
            return
        settings = torch.backends.cuda.matmul
        previous = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = previous


def add_product(into: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """``into = left @ right``, or ``+=`` unless ``first``; float32, accumulated in float32, in place.

    Nothing of the size of ``into`` is allocated on a GPU: cuBLAS accumulates into float32 by itself.
    """
    beta = 0 if first else 1  # 0 reads nothing, so `into` may be uninitialised
    if left.dtype == torch.float32 or left.device.type == "cpu":
        torch.addmm(into, left.float(), right.float(), beta=beta, out=into)
    else:
        torch.ops.aten.addmm.dtype_out(into, left, right, torch.float32, beta=beta, out=into)
