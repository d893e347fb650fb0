"""The sigmoid loss in Triton: a matrix product whose epilogue is the loss and its derivative, in one pass.

Each tile writes its part of the three sums and, rounded once, its derivative to the logits into a chunk of bounded
size; the two products with the features are cuBLAS'. No atomics: two runs are bitwise equal.

Letters: M image rows, N text rows, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmbase_kernels.chunks import add_product, exact_products, new_chunk, plan_chunks
from mmbase_kernels.launch import Setting, on_device, powers_of_two, prepare, ranked
from mmbase_kernels.sigmoid_pass import SigmoidPass
from mmbase_kernels.sigmoid_tiles import sigmoid_kernel
from mmbase_kernels.tiles import source
from mmbase_kernels.tuning import table_name


class _Pairs(NamedTuple):
    """How logits follow from products, and which pairs match."""

    slope: Tensor
    """float32 scalar: scale * log2(e)."""
    shift: Tensor
    """float32 scalar: bias * log2(e)."""
    image_ids_M: Tensor | None
    text_ids_N: Tensor | None
    offset: int


def sigmoid_pass(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    image_ids_M: Tensor | None = None,
    text_ids_N: Tensor | None = None,
    offset: int = 0,
    gradients: bool,
) -> SigmoidPass:
    """See :func:`mmbase_kernels.sigmoid_pass.sigmoid_pass`."""
    setting = prepare(table_name("sigmoid", ids=image_ids_M is not None), image_MD, text_ND)
    pairs = _Pairs(powers_of_two(scale)[0], powers_of_two(bias)[0], *ranked(image_ids_M, text_ids_N), offset)
    rows_count, columns_count = len(image_MD), len(text_ND)
    plan = plan_chunks(setting.image_MD, columns_count, setting.tile.block_m, setting.tile.block_n)
    none = image_MD.new_empty(0, dtype=torch.float32)
    workspace = grad_image_MD = grad_text_ND = None
    if gradients:
        workspace = new_chunk(setting.image_MD, plan, rows_count, columns_count)
        grad_image_MD = torch.empty_like(setting.image_MD, dtype=torch.float32)
        grad_text_ND = torch.empty_like(setting.text_ND, dtype=torch.float32)
    sums = image_MD.new_zeros(3, dtype=torch.float64)
    # Below 6e-5 float16 loses digits and the derivative starts there; it never exceeds 1.
    unit = 2.0**-14 if image_MD.dtype == torch.float16 else 1.0
    with on_device(image_MD), exact_products(image_MD):
        for rows, columns in plan.chunks(rows_count, columns_count):
            chunk = None if workspace is None else workspace[: rows.stop - rows.start, : columns.stop - columns.start]
            sums += _launch(setting, pairs, rows, columns, chunk, unit)
            if chunk is not None and grad_image_MD is not None and grad_text_ND is not None:
                add_product(grad_image_MD[rows], chunk, setting.text_ND[columns], first=columns.start == 0)
                add_product(grad_text_ND[columns], chunk.T, setting.image_MD[rows], first=rows.start == 0)
    loss, cosines, ones = sums.float().unbind()
    if grad_image_MD is None or grad_text_ND is None:
        return SigmoidPass(loss, none, none, none, none)
    factor, width = scale * unit, image_MD.shape[1]
    return SigmoidPass(loss, grad_image_MD.mul_(factor)[:, :width], grad_text_ND.mul_(factor)[:, :width], cosines, ones)


def _launch(setting: Setting, pairs: _Pairs, rows: slice, columns: slice, chunk: Tensor | None, unit: float) -> Tensor:
    """The pass over one chunk: float64 sums of the loss, of G * cos and of G; G goes into ``chunk`` if given."""
    block_m, block_n = setting.tile.block_m, setting.tile.block_n
    length, width = setting.image_MD.shape
    programs = -(-(rows.stop - rows.start) // block_m) * -(-(columns.stop - columns.start) // block_n)
    partial = setting.image_MD.new_empty((1 if chunk is None else 3, programs), dtype=torch.float32)
    sigmoid_kernel[(programs,)](
        *setting.sources(),
        None if chunk is None else source(chunk, block_m, block_n // setting.tile.parts, setting.pointers),
        partial[0], None if chunk is None else partial[1], None if chunk is None else partial[2],
        pairs.slope, pairs.shift, pairs.image_ids_M, pairs.text_ids_N,
        rows.start, rows.stop, columns.start, columns.stop, length, len(setting.text_ND), width,
        0 if chunk is None else chunk.stride(0), pairs.offset,
        **setting.launch(
            INVERSE_UNIT=1 / unit, IDS=pairs.image_ids_M is not None, GRADIENTS=chunk is not None
        ),
    )  # fmt: skip
    sums = partial.new_zeros(3, dtype=torch.float64)
    sums[: len(partial)] = partial.sum(1, dtype=torch.float64)
    return sums
