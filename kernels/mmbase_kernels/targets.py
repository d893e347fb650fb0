"""Which pairs match, and how much each row and column counts in the softmax loss.

Letters: M image rows, N text rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Matches and weights of one rectangle of logits, M rows by N columns.

    Image ``i`` matches text ``j`` where ``image_ids_M[i] == text_ids_N[j]`` if ids are given, else where
    ``j == i + offset``; ``offset`` may be any integer, and a rectangle may hold no match at all.
    """

    row_weight_M: Tensor
    """float32: weight of a row's cross entropy in the loss; 0 for a row without a match."""
    column_weight_N: Tensor
    """float32: the same of a column."""
    row_share_M: Tensor
    """float32: weight of one match in its row: ``(1 - label_smoothing) * row_weight / matches of the row``."""
    column_share_N: Tensor
    """float32: the same of a column."""
    row_smooth_M: Tensor | None = None
    """float32: ``label_smoothing * row_weight / columns``; None without smoothing."""
    column_smooth_N: Tensor | None = None
    """float32: ``label_smoothing * column_weight / rows``; None without smoothing."""
    image_ids_M: Tensor | None = None
    """int64 identities, or None."""
    text_ids_N: Tensor | None = None
    offset: int = 0

    def matched(self, rows: int, columns: int) -> slice:
        """Without ids: the rows whose match lies among ``columns`` columns; ``slice(0, 0)`` if there are none."""
        start = min(max(0, -self.offset), rows)
        return slice(start, max(start, min(rows, columns - self.offset)))


def plan_targets(
    rows: int,
    columns: int,
    device: torch.device,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    offset: int = 0,
    label_smoothing: float = 0.0,
) -> Targets:
    """Targets of one process: each direction is the mean over the rows (columns) that have a match, halved.

    Rows without a match do not count, as under ``ignore_index`` of :func:`torch.nn.functional.cross_entropy`.
    """
    if image_ids is None or text_ids is None:
        matched = Targets(*[torch.empty(0)] * 4, offset=offset).matched(rows, columns)
        weight = 0.5 / max(1, matched.stop - matched.start)
        row_weight_M = torch.zeros(rows, dtype=torch.float32, device=device)
        row_weight_M[matched] = weight
        column_weight_N = torch.zeros(columns, dtype=torch.float32, device=device)
        column_weight_N[matched.start + offset : matched.stop + offset] = weight
        row_matches: Tensor | int = 1
        column_matches: Tensor | int = 1
    else:
        row_matches, column_matches = count_matches(image_ids, text_ids), count_matches(text_ids, image_ids)
        row_weight_M, column_weight_N = mean_weights(row_matches), mean_weights(column_matches)
        row_matches, column_matches = row_matches.clamp(min=1), column_matches.clamp(min=1)
    smooth = label_smoothing > 0
    return Targets(
        row_weight_M,
        column_weight_N,
        (1 - label_smoothing) * row_weight_M / row_matches,
        (1 - label_smoothing) * column_weight_N / column_matches,
        label_smoothing * row_weight_M / columns if smooth else None,
        label_smoothing * column_weight_N / rows if smooth else None,
        image_ids,
        text_ids,
        offset,
    )


def count_matches(ids: Tensor, among: Tensor) -> Tensor:
    """int64 ``[len(ids)]``: how many entries of ``among`` equal each id; no synchronisation with the device."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def mean_weights(matches: Tensor) -> Tensor:
    """float32: a half divided by the number of entries that have a match, 0 for those without."""
    has_match = (matches > 0).float()
    return has_match * (0.5 / has_match.sum().clamp(min=1))


def gradient_unit(targets: Targets, dtype: torch.dtype) -> Tensor:
    """What the gradient to the logits is divided by before it is rounded to 16 bits.

    It is then at most about 1, or 2^14 in float16, which has less range. Weights over ranks may have either sign.
    """
    largest = targets.row_weight_M.abs().max() + targets.column_weight_N.abs().max()
    largest = torch.where(largest > 0, largest, 1.0)  # no match at all
    return largest / 16384 if dtype == torch.float16 else largest


def smoothing_term(image_MD: Tensor, text_ND: Tensor, scale: Tensor, targets: Targets) -> Tensor:
    """What label smoothing takes from the loss, ``sum_ij (row_smooth_i + column_smooth_j) z_ij``, in O((M + N)·D)."""
    if targets.row_smooth_M is None or targets.column_smooth_N is None:
        return scale.new_zeros((), dtype=torch.float32)
    image, text = image_MD.float(), text_ND.float()
    # Sums of products in place of matrix products, which autocast and TF32 would round.
    rows = (targets.row_smooth_M[:, None] * image).sum(0) * text.sum(0)
    columns = (targets.column_smooth_N[:, None] * text).sum(0) * image.sum(0)
    return scale.float() * (rows + columns).sum()
