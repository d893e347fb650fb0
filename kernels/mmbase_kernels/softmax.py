"""The two passes of the softmax loss over one rectangle of logits, and the O(M + N) arithmetic around them.

These are plain functions without autograd. One process uses them through :func:`mmbase_kernels.clip_loss`; a rank of a
distributed loss uses them on its own rows against everyone's columns and combines the statistics in between.

Letters: M image rows, N text rows, D width; ``z = scale * image @ text.T``.

Precision: at scale 100 a logit near 90 has an ulp of 8e-6. ``lse - z`` and ``exp(z - lse) - 1`` lose all digits once a
match dominates; without ids the match is therefore left out of the log-sum-exps, its cross entropy is
``softplus(lse_of_the_others - z)`` and its gradient ``-sigmoid(lse_of_the_others - z)``. And log-sum-exps are float64:
a duplicate of the match must cancel against it, which a log-sum-exp rounded to 4e-6 would not allow.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_kernels.targets import Targets, smoothing_term


class Statistics(NamedTuple):
    """What the first pass knows of a rectangle."""

    row_lse_M: Tensor
    """float64 log-sum-exp of each row, without its match unless there are ids; -inf where nothing is left."""
    column_lse_N: Tensor
    """float64, the same of each column; empty if columns were not asked for."""
    match_M: Tensor
    """float32, without ids: ``z`` at (i, i + offset), -inf where that column is outside; with ids: empty."""
    positive: Tensor
    """float64 scalar, with ids: sum over matches of (row_share + column_share) * z; without ids: 0."""
    stash: Tensor
    """Logits kept for the second pass in the implementation's own layout; empty if none are."""


class Gradients(NamedTuple):
    """Gradients of the loss to the rectangle's inputs."""

    image_MD: Tensor
    """float32."""
    text_ND: Tensor
    """float32; empty if not asked for."""
    scale: Tensor
    """float32 scalar."""


def implementation(impl: str) -> ModuleType:
    """The module that holds ``statistics`` and ``gradients`` of an implementation, ``torch`` or ``triton``."""
    if impl == "triton":
        from mmbase_kernels import softmax_triton

        return softmax_triton
    from mmbase_kernels import softmax_torch

    return softmax_torch


def stash_layout(
    image_MD: Tensor, text_ND: Tensor, dtype: torch.dtype, ids: bool, stash_bytes: int, impl: str
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the stash that :func:`statistics` returns under a budget; ``(0,)`` if nothing is kept.

    Args:
        image_MD: only its shape and device matter.
        text_ND: only its shape matters.
        dtype: that of the products.
        ids: whether matches are told by ids.
        stash_bytes: the budget.
        impl: ``torch`` or ``triton``.
    """
    return implementation(impl).stash_layout(image_MD, text_ND, dtype, ids, stash_bytes)


def statistics(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    targets: Targets,
    *,
    columns: bool = True,
    stash_bytes: int = 0,
    impl: str = "torch",
) -> Statistics:
    """First pass, 2·M·N·D FLOPs: log-sum-exps and matches.

    Args:
        image_MD: float32, float16 or bfloat16.
        text_ND: the same dtype and device.
        scale: float32 scalar on the same device.
        targets: which pairs match.
        columns: whether the columns' log-sum-exps are wanted.
        stash_bytes: keep the logits for :func:`gradients` if they fit in so many bytes.
        impl: ``torch`` or ``triton``.
    """
    return implementation(impl).statistics(image_MD, text_ND, scale, targets, columns=columns, stash_bytes=stash_bytes)


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
    impl: str = "torch",
) -> Gradients:
    """Second pass: ``image = scale * G @ text``, ``text = scale * G.T @ image``, ``scale = sum(G * cos)``.

    ``G_ij = row_weight_i exp(z_ij - row_lse_i) + column_weight_j exp(z_ij - column_lse_j)`` less smoothing; with ids
    less the shares of the matches, without ids replaced by ``match_gradient_M`` at the match. 6·M·N·D FLOPs, 4 with a
    stash.

    Args:
        image_MD: as in :func:`statistics`.
        text_ND: as in :func:`statistics`.
        scale: as in :func:`statistics`.
        row_lse_M: float64, *total* log-sum-exps, matches included, of a matrix that holds this rectangle.
        column_lse_N: the same of the columns; empty: there is no column term.
        match_gradient_M: from :func:`match_gradient`; unused with ids.
        targets: as in :func:`statistics`.
        stash: what :func:`statistics` returned.
        text: whether the texts' gradient is wanted.
        impl: ``torch`` or ``triton``, as in :func:`statistics`.
    """
    return implementation(impl).gradients(
        image_MD, text_ND, scale, row_lse_M, column_lse_N, match_gradient_M, targets, stash=stash, text=text
    )


def total_lse(row_lse_M: Tensor, column_lse_N: Tensor, match_M: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Log-sum-exps with the match put back; with ids they hold it already."""
    if targets.image_ids_M is not None:
        return row_lse_M, column_lse_N
    if len(column_lse_N):
        matched = targets.matched(len(row_lse_M), len(column_lse_N))
        column_match_N = torch.full_like(column_lse_N, -torch.inf)
        column_match_N[matched.start + targets.offset : matched.stop + targets.offset] = match_M[matched].to(
            column_match_N.dtype
        )
        column_lse_N = torch.logaddexp(column_lse_N, column_match_N)
    return torch.logaddexp(row_lse_M, match_M.to(row_lse_M.dtype)), column_lse_N


def loss(image_MD: Tensor, text_ND: Tensor, scale: Tensor, first: Statistics, targets: Targets) -> Tensor:
    """The loss of a rectangle that is the whole matrix: float32 scalar."""
    rest = smoothing_term(image_MD, text_ND, scale, targets)
    if targets.image_ids_M is not None:
        entropies = weighted(targets.row_weight_M, first.row_lse_M) + weighted(
            targets.column_weight_N, first.column_lse_N
        )
        return (entropies - first.positive).float() - rest
    rows, columns = at_match(targets, first.row_lse_M, first.column_lse_N)
    row_weight, column_weight = at_match(targets, targets.row_weight_M, targets.column_weight_N)
    row_share, column_share = at_match(targets, targets.row_share_M, targets.column_share_N)
    match = first.match_M[targets.matched(len(first.match_M), len(first.column_lse_N))]
    value = weighted(row_weight, F.softplus(rows - match)) + weighted(column_weight, F.softplus(columns - match))
    if targets.row_smooth_M is not None:
        value = value + weighted((row_weight - row_share) + (column_weight - column_share), match)
    return value.float() - rest


def weighted(weight_X: Tensor, value_X: Tensor) -> Tensor:
    """Sum of weight times value, float64; a weight of 0 counts nothing, whatever the value."""
    return torch.where(weight_X == 0, 0.0, weight_X.double() * value_X).sum()


def match_gradient(row_lse_M: Tensor, column_lse_N: Tensor, match_M: Tensor, targets: Targets) -> Tensor:
    """Without ids: ``G`` at (i, i + offset), float32 ``[M]``, 0 for rows without a match.

    Takes the log-sum-exps *without* the match, global ones if the rectangle is a part; with ids an empty tensor.
    """
    if targets.image_ids_M is not None:
        return match_M
    if not len(column_lse_N):
        column_lse_N = torch.full_like(targets.column_weight_N, -torch.inf, dtype=row_lse_M.dtype)
    matched = targets.matched(len(row_lse_M), len(column_lse_N))
    rows, columns = at_match(targets, row_lse_M, column_lse_N)
    row_weight, column_weight = at_match(targets, targets.row_weight_M, targets.column_weight_N)
    match = match_M[matched]
    value = -row_weight * torch.sigmoid(rows - match) - column_weight * torch.sigmoid(columns - match)
    if targets.row_smooth_M is not None and targets.column_smooth_N is not None:
        row_share, column_share = at_match(targets, targets.row_share_M, targets.column_share_N)
        row_smooth, column_smooth = at_match(targets, targets.row_smooth_M, targets.column_smooth_N)
        value = value + (row_weight - row_share - row_smooth) + (column_weight - column_share - column_smooth)
    result_M = torch.zeros_like(match_M)
    result_M[matched] = value.to(match_M.dtype)
    return result_M


def at_match(targets: Targets, rows_M: Tensor, columns_N: Tensor) -> tuple[Tensor, Tensor]:
    """Without ids: what belongs to the rows that have a match, and to their columns, in the same order."""
    matched = targets.matched(len(rows_M), len(columns_N))
    return rows_M[matched], columns_N[matched.start + targets.offset : matched.stop + targets.offset]
