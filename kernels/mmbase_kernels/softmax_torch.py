"""The softmax loss in PyTorch operations over tiles of logits: CPU and any other device.

Letters: M image rows, N text rows, D width, R rows and C columns of one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmbase_kernels.bands import Bands, Tile, add_product
from mmbase_kernels.softmax import Gradients, Statistics
from mmbase_kernels.targets import Targets, gradient_unit

SPREAD = 80.0
"""exp(-80) and exp(80) are far inside float32: within such a spread one exponential serves rows and columns."""


def stash_layout(
    image_MD: Tensor, text_ND: Tensor, dtype: torch.dtype, ids: bool, stash_bytes: int
) -> tuple[tuple[int, ...], torch.dtype]:
    """See :func:`mmbase_kernels.softmax.stash_layout`: logits as they stand, float32."""
    rows, columns = len(image_MD), len(text_ND)
    return ((rows, columns) if 4 * rows * columns <= stash_bytes else (0,)), torch.float32


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
    shape = len(image_MD), len(text_ND)
    counted = shape[1] if columns else 0
    ids = targets.image_ids_M is not None
    kept_shape, stash_dtype = stash_layout(image_MD, text_ND, image_MD.dtype, ids, stash_bytes)
    keep = kept_shape == shape
    stash = image_MD.new_empty(kept_shape, dtype=stash_dtype)
    row_lse_M = image_MD.new_empty(shape[0], dtype=torch.float64)
    matched = 0 if ids else shape[0]
    match_M = image_MD.new_full((matched,), -torch.inf, dtype=torch.float32)
    column_max_N, column_sum_N = match_M.new_full((counted,), -torch.inf), match_M.new_zeros(counted)
    positive = row_lse_M.new_zeros(())
    bands = Bands(image_MD, text_ND, scale)
    for rows, band_RD in bands:
        row_parts, column_parts = [], []
        for tile in bands.tiles(rows, band_RD):
            if keep:
                stash[rows, tile.columns] = tile.buffer_RC
            if targets.image_ids_M is None:
                match = tile.diagonal(targets.offset)
                match_M[tile.diagonal_rows(targets.offset)] = match
                match.fill_(-torch.inf)
            else:
                positive += _positive(targets, tile)
            row_part, column_part = _maxima_and_sums(tile.buffer_RC, columns)
            row_parts.append(row_part)
            column_parts.append(column_part)
        row_lse_M[rows] = _log_sum(*_merge(*(torch.stack(part) for part in zip(*row_parts, strict=True))))
        if columns:
            band_max_N, band_sum_N = (torch.cat(part) for part in zip(*column_parts, strict=True))
            column_max_N, column_sum_N = _merge(
                torch.stack((column_max_N, band_max_N)), torch.stack((column_sum_N, band_sum_N))
            )
    return Statistics(row_lse_M, _log_sum(column_max_N, column_sum_N), match_M, positive, stash)


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
    grad_image_MD = torch.zeros_like(image_MD, dtype=torch.float32, memory_format=torch.contiguous_format)
    grad_text_ND = text_ND.new_zeros(text_ND.shape if text else 0, dtype=torch.float32)
    grad_scale = grad_image_MD.new_zeros(())
    bands = Bands(image_MD, text_ND, scale)
    softmax = _Softmax(row_lse_M, column_lse_N, targets, bands.largest)
    norm = None if bands.text_ND.dtype == torch.float32 else gradient_unit(targets, bands.text_ND.dtype)
    for rows, band_RD in bands:
        for tile in bands.tiles(rows, band_RD, stash if len(stash) else None):
            softmax.probabilities(tile)
            softmax.less_targets(tile, match_gradient_M)
            grad_RC = tile.buffer_RC if norm is None else (tile.buffer_RC / norm).to(band_RD.dtype)
            add_product(grad_image_MD[rows], grad_RC, bands.text_ND[tile.columns])
            if text:
                add_product(grad_text_ND[tile.columns], grad_RC.T, band_RD)
        grad_scale += (grad_image_MD[rows] * band_RD).sum()
    factor = 1.0 if norm is None else norm
    return Gradients(grad_image_MD.mul_(scale * factor), grad_text_ND.mul_(scale * factor), grad_scale * factor)


class _Softmax:
    """Weighted probabilities of rows plus those of columns, less their targets.

    A log-sum-exp is used as an integer, which is subtracted exactly from a float32 logit, and a factor with the rest of
    it and the weight.
    """

    def __init__(self, row_lse_M: Tensor, column_lse_N: Tensor, targets: Targets, largest: int) -> None:
        self.targets = targets
        self.columns = len(column_lse_N) > 0
        self.buffer = targets.row_weight_M.new_empty(largest if self.columns else 0)
        self.low: float | None = None
        row_base_M, column_base_N = row_lse_M.round(), column_lse_N.round()
        if row_lse_M.device.type == "cpu":  # elsewhere the question would wait for the device
            low, high = torch.cat((row_base_M, column_base_N)).aminmax()
            if bool(high - low <= SPREAD):
                self.low = float(low)
                row_base_M, column_base_N = row_base_M.clamp(max=low), column_base_N.clamp(max=low)
        self.row_base_M, self.column_base_N = row_base_M.float(), column_base_N.float()
        self.row_factor_M = (torch.exp(row_base_M - row_lse_M) * targets.row_weight_M).float()
        if self.columns:
            self.column_factor_N = (torch.exp(column_base_N - column_lse_N) * targets.column_weight_N).float()

    def probabilities(self, tile: Tile) -> None:
        """Turn the tile's logits, in place, into weighted probabilities."""
        z_RC, rows, columns = tile.buffer_RC, tile.rows, tile.columns
        other_RC = self.buffer[: z_RC.numel() if self.columns else 0].view(z_RC.shape if self.columns else 0)
        if self.low is not None:
            z_RC.sub_(self.low).exp_()
            factor_RC = self.row_factor_M[rows, None]
            if self.columns:
                factor_RC = torch.add(factor_RC, self.column_factor_N[columns], out=other_RC)
            z_RC.mul_(factor_RC)
            return
        if self.columns:
            torch.sub(z_RC, self.column_base_N[columns], out=other_RC)
            other_RC.exp_().mul_(self.column_factor_N[columns])
        z_RC.sub_(self.row_base_M[rows, None]).exp_().mul_(self.row_factor_M[rows, None])
        if self.columns:
            z_RC.add_(other_RC)

    def less_targets(self, tile: Tile, match_gradient_M: Tensor) -> None:
        """Turn weighted probabilities, in place, into the gradient to the logits."""
        targets = self.targets
        if targets.row_smooth_M is not None and targets.column_smooth_N is not None:
            tile.buffer_RC.sub_(targets.row_smooth_M[tile.rows, None]).sub_(targets.column_smooth_N[tile.columns])
        if targets.image_ids_M is None:
            tile.diagonal(targets.offset).copy_(match_gradient_M[tile.diagonal_rows(targets.offset)])
        else:
            tile.buffer_RC.sub_(_shares(targets, tile))


def _maxima_and_sums(z_RC: Tensor, columns: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(maximum, sum of exp(z - maximum)) of each row and of each column; overwrites the logits."""
    row_max, column_max = z_RC.amax(1), z_RC.amax(0)
    if z_RC.device.type == "cpu":
        top = row_max.max().ceil()  # z less an integer is exact
        if bool(top - torch.minimum(row_max.min(), column_max.min()) <= SPREAD):
            z_RC.sub_(top).exp_()
            row, column = (top.expand_as(row_max), z_RC.sum(1)), (top.expand_as(column_max), z_RC.sum(0))
            return row, column
    column = column_max, column_max
    if columns:
        column = column_max, (z_RC - _finite(column_max)).exp_().sum(0)
    return (row_max, z_RC.sub_(_finite(row_max)[:, None]).exp_().sum(1)), column


def _merge(max_TX: Tensor, sum_TX: Tensor) -> tuple[Tensor, Tensor]:
    """Partial maxima and sums of T tiles into one."""
    top_X = max_TX.amax(0)
    return top_X, (sum_TX * (max_TX - _finite(top_X)).exp_()).sum(0)


def _finite(maximum: Tensor) -> Tensor:
    """Zero for -inf, so that nothing is subtracted from a row in which nothing is left."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def _log_sum(maximum: Tensor, total: Tensor) -> Tensor:
    """float64."""
    return maximum + total.double().log()


def _matches(targets: Targets, tile: Tile) -> Tensor:
    """Boolean ``[R, C]``, with ids."""
    assert targets.image_ids_M is not None and targets.text_ids_N is not None
    return targets.image_ids_M[tile.rows, None] == targets.text_ids_N[tile.columns]


def _positive(targets: Targets, tile: Tile) -> Tensor:
    """What the tile adds to ``Statistics.positive``: in float32 only a row's or a column's matches are summed."""
    match_RC = tile.buffer_RC * _matches(targets, tile)
    by_row = targets.row_share_M[tile.rows].double() * match_RC.sum(1)
    by_column = targets.column_share_N[tile.columns].double() * match_RC.sum(0)
    return by_row.sum() + by_column.sum()


def _shares(targets: Targets, tile: Tile) -> Tensor:
    """``[R, C]`` with ids: weight of each match in its row and its column, 0 elsewhere."""
    return (targets.row_share_M[tile.rows, None] + targets.column_share_N[tile.columns]) * _matches(targets, tile)
