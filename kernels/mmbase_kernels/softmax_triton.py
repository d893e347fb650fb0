"""The softmax loss in Triton: matrix products with reducing epilogues; the logits never exist as a whole.

The first pass writes partial sums of each tile's rows and columns, which a second small kernel merges. The second pass
recomputes the tiles (or reads the stash), forms the gradient to the logits in float32, rounds it once into a chunk of
bounded size, and leaves the two products with the features to cuBLAS. No atomics: two runs are bitwise equal.

Letters: M image rows, N text rows, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mmbase_kernels.chunks import add_product, exact_products, new_chunk, plan_chunks, plan_partials, spans, up
from mmbase_kernels.launch import Setting, on_device, powers_of_two, prepare, ranked
from mmbase_kernels.shipping import SMALL
from mmbase_kernels.softmax import Gradients, Statistics
from mmbase_kernels.softmax_gradient_tiles import gradient_kernel
from mmbase_kernels.softmax_statistics_tiles import MATCH, MERGE, match_kernel, merge_kernel, statistics_kernel
from mmbase_kernels.stash import open_stash, stash_parts
from mmbase_kernels.targets import Targets, gradient_unit
from mmbase_kernels.tiles import source
from mmbase_kernels.tuning import architecture, table_name, tile

NEAR = 80.0
"""Powers of two: with all log-sum-exps so near their middle, no factor of the gradient kernel leaves float32."""
LOWEST_MIDDLE = -20.0
"""Padding has logit 0: 2^(0 - middle) must stay finite too."""


def stash_layout(
    image_MD: Tensor, text_ND: Tensor, dtype: torch.dtype, ids: bool, stash_bytes: int
) -> tuple[tuple[int, ...], torch.dtype]:
    """See :func:`mmbase_kernels.softmax.stash_layout`: bytes, whose parts :mod:`mmbase_kernels.stash` knows."""
    rows, width = image_MD.shape
    chosen = tile(table_name("statistics", ids=ids, stash=True), dtype, width, architecture(image_MD.device))
    size = sum(stash_parts(rows, len(text_ND), dtype.itemsize, chosen)[1:])
    return ((size if size <= stash_bytes else 0),), torch.uint8


def statistics(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    targets: Targets,
    *,
    columns: bool = True,
    stash_bytes: int = 0,
) -> Statistics:
    """See :func:`mmbase_kernels.softmax.statistics`."""
    ids = targets.image_ids_M is not None
    setting = prepare(table_name("statistics", ids=ids, stash=True), image_MD, text_ND)
    (needed,), _ = stash_layout(image_MD, text_ND, image_MD.dtype, ids, stash_bytes)
    if not needed:
        setting = prepare(table_name("statistics", ids=ids), image_MD, text_ND)
    slope, nats = powers_of_two(scale)
    targets = _with_ranks(targets)
    rows_count, columns_count = len(image_MD), len(text_ND)
    stash = image_MD.new_empty(needed, dtype=torch.uint8)
    row_lse_M = image_MD.new_empty(rows_count, dtype=torch.float32)
    column_lse_N = image_MD.new_empty(columns_count if columns else 0, dtype=torch.float32)
    positive = image_MD.new_zeros((), dtype=torch.float64)
    plan = plan_partials(rows_count, columns_count, setting.tile.block_m, setting.tile.block_n)
    with on_device(image_MD):
        for rows in spans(rows_count, plan.row_step):
            positive += _statistics_of(setting, slope, targets, rows, stash, row_lse_M, column_lse_N)
        match_M = image_MD.new_empty(0, dtype=torch.float32)
        if targets.image_ids_M is None:
            cosine_M = _match_cosines(setting, targets.offset)
            matched = targets.matched(rows_count, columns_count)
            match_M = torch.full_like(cosine_M, -torch.inf)
            match_M[matched] = cosine_M[matched] * scale
    return Statistics(row_lse_M.double() * nats, column_lse_N.double() * nats, match_M, positive * scale, stash)


def _statistics_of(
    setting: Setting,
    slope: Tensor,
    targets: Targets,
    rows: slice,
    stash: Tensor,
    row_lse_M: Tensor,
    column_lse_N: Tensor,
) -> Tensor:
    """Launch the first pass over some rows and merge its partial sums; returns the matches' sum of share * cos."""
    block_m, block_n = setting.tile.block_m, setting.tile.block_n
    length, width = setting.image_MD.shape[0], setting.image_MD.shape[1]
    columns = len(setting.text_ND)
    row_tiles, column_tiles = -(-(rows.stop - rows.start) // block_m), -(-columns // block_n)
    new = row_lse_M.new_empty
    row_stride = row_tiles * block_m
    row_sum, row_peak = new((2, column_tiles, row_stride))
    has_columns, ids = len(column_lse_N) > 0, targets.image_ids_M is not None
    column_stride = up(columns, 16)
    column_sum, column_peak = new((2, row_tiles, column_stride)) if has_columns else (None, None)
    positive = new(row_tiles * column_tiles) if ids else None
    kept = open_stash(setting, stash)
    statistics_kernel[(row_tiles * column_tiles,)](
        *setting.sources(), slope, row_sum, row_peak, column_sum, column_peak, positive,
        targets.image_ids_M, targets.text_ids_N,
        targets.row_share_M if ids else None, targets.column_share_N if ids else None,
        source(kept.product_MN, block_m, block_n // setting.tile.parts, setting.pointers) if kept else None,
        kept.row_top if kept else None, kept.column_top if kept else None,
        rows.start, rows.stop, length, columns, width, row_stride, column_stride,
        kept.product_MN.shape[1] if kept else 0, targets.offset,
        **setting.launch(
            COLUMNS=has_columns, IDS=ids, STASH=kept is not None, TOPS=kept is not None and kept.row_top is not None
        ),
    )  # fmt: skip
    _merge(row_sum, row_peak, row_lse_M[rows], carry=False)
    if column_sum is not None and column_peak is not None:
        _merge(column_sum, column_peak, column_lse_N, carry=rows.start > 0)
    return positive.sum(dtype=torch.float64) if positive is not None else slope.new_zeros((), dtype=torch.float64)


def gradients(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    row_lse_M: Tensor,
    column_lse_N: Tensor,
    match_gradient_M: Tensor,
    targets: Targets,
    *,
    stash: Tensor,
    text: bool = True,
) -> Gradients:
    """See :func:`mmbase_kernels.softmax.gradients`."""
    ids = targets.image_ids_M is not None
    setting = prepare(table_name("gradient", ids=ids, stash=len(stash) > 0), image_MD, text_ND)
    rows_count, columns_count = len(image_MD), len(text_ND)
    unit = gradient_unit(targets, image_MD.dtype)
    slope, nats = powers_of_two(scale)
    targets = _with_ranks(targets)
    row_lse, column_lse = ((lse.double() / nats).float() for lse in (row_lse_M, column_lse_N))
    weights = _weights(row_lse, column_lse, match_gradient_M, targets, unit)
    plan = plan_chunks(setting.image_MD, columns_count, setting.tile.block_m, setting.tile.block_n)
    workspace = new_chunk(setting.image_MD, plan, rows_count, columns_count)
    grad_image_MD = torch.empty_like(setting.image_MD, dtype=torch.float32)
    grad_text_ND = torch.empty_like(setting.text_ND, dtype=torch.float32) if text else image_MD.new_empty(0)
    cosines = image_MD.new_zeros((), dtype=torch.float64)
    with on_device(image_MD), exact_products(image_MD):
        for rows, columns in plan.chunks(rows_count, columns_count):
            chunk, part = _gradient_chunk(setting, slope, targets, weights, rows, columns, stash, workspace)
            cosines += part
            add_product(grad_image_MD[rows], chunk, setting.text_ND[columns], first=columns.start == 0)
            if text:
                add_product(grad_text_ND[columns], chunk.T, setting.image_MD[rows], first=rows.start == 0)
        cosines *= unit
        if targets.image_ids_M is None:
            cosines += (_match_cosines(setting, targets.offset).double() * match_gradient_M).sum()
    factor, width = scale * unit, image_MD.shape[1]
    grad_text_ND = grad_text_ND.mul_(factor)[:, :width] if text else grad_text_ND.float()
    return Gradients(grad_image_MD.mul_(factor)[:, :width], grad_text_ND, cosines.float())


def _gradient_chunk(
    setting: Setting,
    slope: Tensor,
    targets: Targets,
    weights: dict[str, Any],
    rows: slice,
    columns: slice,
    stash: Tensor,
    workspace: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch the second pass over one chunk; returns G in units, a view of the workspace, and the sum of G * cos."""
    block_m, block_n = setting.tile.block_m, setting.tile.block_n
    length, width = setting.image_MD.shape
    height, breadth = rows.stop - rows.start, columns.stop - columns.start
    programs = -(-height // block_m) * -(-breadth // block_n)
    cosine_partial = workspace.new_empty(programs, dtype=torch.float32)
    chunk = workspace[:height, :breadth]
    kept = open_stash(setting, stash)
    image, text = (None, None) if kept else setting.sources()
    gradient_kernel[(programs,)](
        image, text,
        source(kept.product_MN, block_m, block_n // setting.tile.parts, setting.pointers) if kept else None,
        kept.row_top if kept else None, kept.column_top if kept else None,
        source(chunk, block_m, block_n // setting.tile.parts, setting.pointers),
        cosine_partial, slope, **weights, image_ids=targets.image_ids_M, text_ids=targets.text_ids_N,
        row_start=rows.start, row_stop=rows.stop, column_start=columns.start, column_stop=columns.stop,
        rows=length, columns=len(setting.text_ND), width=width,
        stash_stride=kept.product_MN.shape[1] if kept else 0, chunk_stride=workspace.shape[1], offset=targets.offset,
        **setting.launch(
            COLUMNS=weights["column_factor"] is not None, IDS=targets.image_ids_M is not None,
            SMOOTH=targets.row_smooth_M is not None,
            STASH=kept is not None, TOPS=kept is not None and kept.row_top is not None,
        ),
    )  # fmt: skip
    return chunk, cosine_partial.sum(dtype=torch.float64)


def _merge(sums: Tensor, peaks: Tensor, total: Tensor, *, carry: bool) -> None:
    """``total = log2`` of the partial sums ``[tiles, ...]`` together, and with ``carry`` of ``2^total`` too."""
    flags: dict[str, Any] = {"CARRY": carry}
    merge_kernel[(-(-len(total) // MERGE["BLOCK_LENGTH"]),)](
        sums, peaks, total, sums.shape[0], len(total), sums.shape[1],
        **flags, **MERGE, **SMALL,
    )  # fmt: skip


def _match_cosines(setting: Setting, offset: int) -> Tensor:
    """float32 [M]: image i times text i + offset; 0 where that text does not exist."""
    rows, width = setting.image_MD.shape
    cosine_M = setting.image_MD.new_empty(rows, dtype=torch.float32)
    match_kernel[(-(-rows // MATCH["BLOCK_M"]),)](
        setting.image_MD, setting.text_ND, cosine_M, rows, len(setting.text_ND), width, offset,
        **MATCH, **SMALL,
    )  # fmt: skip
    return cosine_M


def _with_ranks(targets: Targets) -> Targets:
    image_ids, text_ids = ranked(targets.image_ids_M, targets.text_ids_N)
    return dataclasses.replace(targets, image_ids_M=image_ids, text_ids_N=text_ids)


def _weights(
    row_lse: Tensor, column_lse: Tensor, match_gradient_M: Tensor, targets: Targets, unit: Tensor
) -> dict[str, Any]:
    """Vectors of the gradient kernel by argument: log-sum-exps in powers of two, weights in units of the chunk."""
    ids, has_columns = targets.image_ids_M is not None, len(column_lse) > 0
    low, high = torch.cat((row_lse, column_lse)).aminmax()
    middle = ((low + high) / 2).clamp(min=LOWEST_MIDDLE)
    near = (high - middle <= NEAR) & (middle - low <= NEAR)
    row_weight, column_weight = targets.row_weight_M / unit, targets.column_weight_N / unit
    return {
        "middle": torch.stack((middle, near.float())),
        "row_lse": row_lse,
        "column_lse": column_lse if has_columns else None,
        "row_weight": row_weight,
        "column_weight": column_weight if has_columns else None,
        "row_factor": row_weight * torch.exp2(middle - row_lse),
        "column_factor": column_weight * torch.exp2(middle - column_lse) if has_columns else None,
        "match_gradient": None if ids else match_gradient_M / unit,
        "row_share": targets.row_share_M / unit if ids else None,
        "column_share": targets.column_share_N / unit if ids else None,
        "row_smooth": targets.row_smooth_M / unit if targets.row_smooth_M is not None else None,
        "column_smooth": targets.column_smooth_N / unit if targets.column_smooth_N is not None else None,
    }
