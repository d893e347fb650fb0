"""What the distributed softmax losses share: weights of rows and columns over ranks, and how gradients are scaled.

Letters: W ranks, M image rows and N text rows of all ranks unless said otherwise, D width.

Two conventions, after OpenCLIP's ``local_loss`` and ``gather_with_grad``. Let ``L`` be the loss of the whole batch,
``L_r`` what rank r returns and ``g_r`` the gradient that reaches it (data-parallel training averages over ranks):

==============  =================  ==========================================  =====================================
local_value     sum_gradients      L_r                                         gradient of rank r's features
==============  =================  ==========================================  =====================================
yes             yes                mean over the rank's own rows and columns   ``sum_q g_q dL_q/dx_r``
no              yes                L                                           ``(sum_q g_q) dL/dx_r``
no              no                 L                                           ``g_r dL/dx_r``
==============  =================  ==========================================  =====================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase.losses.collectives import gather_numbers, gather_rows, sum_over_ranks
from mmbase.losses.shards import Shards, on_device, per_row
from mmbase_kernels import softmax
from mmbase_kernels.targets import Targets, plan_targets


@dataclass(frozen=True)
class BackwardScales:
    """How a rank's backward pass weighs rows and columns, and scales what comes out."""

    ratio_W: Tensor | None
    """float32: weights of each rank's rows and columns relative to their plain mean; None: 1."""
    feature_W: Tensor
    """float32: factor of the gradient to each rank's features."""
    scale: Tensor
    """float32 scalar: factor of the gradient to the scale, which is summed over ranks."""


@dataclass(frozen=True)
class SoftmaxPlan:
    """Everything about a distributed softmax loss that is no feature."""

    shards: Shards
    targets: Targets
    """Of the whole batch: the loss L."""
    local_value: bool
    sum_gradients: bool
    both_ways: bool
    """Ring only: blocks travel both ways around."""
    compute_dtype: torch.dtype
    """Dtype of the products, float32, float16 or bfloat16; sums are float32."""
    impl: str
    stash_bytes: int
    """Keep a rank's logits from forward to backward where they fit in so many bytes."""
    backward: bool
    """Whether a backward pass may follow."""

    def block(self, owner: int | None, scales: BackwardScales | None = None) -> Targets:
        """Targets of this rank's images against ``owner``'s texts, against everyone's if None.

        Without ``scales`` as the value needs them, with them as the gradients do.
        """
        shards = self.shards
        columns = slice(0, shards.texts) if owner is None else shards.text_part(owner)
        rectangle = part(self.targets, shards.image_part(shards.rank), columns)
        ratio_W = self._value_ratio() if scales is None else scales.ratio_W
        if ratio_W is None:
            return rectangle
        column_ratio = per_row(ratio_W, shards.text_rows) if owner is None else ratio_W[owner]
        return weighted(rectangle, ratio_W[shards.rank], column_ratio)

    def scales(self, grad: Tensor) -> BackwardScales:
        """Gather what reached every rank's loss, and say how the backward pass scales. Every rank must call."""
        grad_W = gather_numbers(grad, self.shards.group)
        own = grad_W[self.shards.rank]
        if not self.sum_gradients:
            return BackwardScales(None, grad_W, own)
        if not self.local_value:
            return BackwardScales(None, grad_W.sum().expand_as(grad_W), own)
        # Divided by the largest, so that a loss scaler's 65,536 stays out of the weights and common signs drop out.
        reference = grad_W.gather(0, grad_W.abs().argmax(0, keepdim=True))[0]  # indexing would wait for a GPU
        relative_W = torch.where(reference == 0, torch.ones_like(grad_W), grad_W / reference)
        rows_W = self._value_ratio()
        ratio_W = relative_W if rows_W is None else relative_W * rows_W
        return BackwardScales(ratio_W, reference.expand_as(grad_W), reference / self.shards.world_size)

    def _value_ratio(self) -> Tensor | None:
        """``[W]``: from the mean over all rows to the mean over a rank's own; None: the value is that of all rows."""
        if not self.local_value:
            return None
        return self.shards.images / on_device(self.shards.image_rows, self.targets.row_weight_M.device).float()

    def own_value(self, row_lse_M: Tensor, column_lse_M: Tensor, match_M: Tensor, positive: Tensor) -> Tensor:
        """float64: this rank's share of the loss before smoothing, of its rows, its columns and its positives."""
        own = self.block(self.shards.rank)
        if own.image_ids_M is not None:
            entropies = softmax.weighted(own.row_weight_M, row_lse_M)
            return entropies + softmax.weighted(own.column_weight_N, column_lse_M) - positive
        value = softmax.weighted(own.row_weight_M, F.softplus(row_lse_M - match_M))
        value = value + softmax.weighted(own.column_weight_N, F.softplus(column_lse_M - match_M))
        if own.row_smooth_M is None:
            return value
        kept = own.row_weight_M - own.row_share_M + (own.column_weight_N - own.column_share_N)
        return value + softmax.weighted(kept, match_M)

    def whole_value(self, own_value: Tensor) -> Tensor:
        """What the rank returns, float32: its share, or the sum of all ranks' shares."""
        return (own_value if self.local_value else sum_over_ranks(own_value, self.shards.group)).float()


def plan_softmax(
    shards: Shards,
    device: torch.device,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Targets:
    """Targets of the whole batch, the same on every rank; ids (``[M_r]`` of this rank) are gathered."""
    if image_ids is not None and text_ids is not None:
        image_ids = gather_rows(image_ids.long(), shards.image_rows, shards.group)
        text_ids = gather_rows(text_ids.long(), shards.text_rows, shards.group)
    return plan_targets(
        shards.images,
        shards.texts,
        device,
        image_ids=image_ids,
        text_ids=text_ids,
        label_smoothing=label_smoothing,
    )


def weighted(targets: Targets, row_ratio: Tensor, column_ratio: Tensor) -> Targets:
    """Targets with rows and columns multiplied by a ratio: a scalar each, or one of every row and column."""
    return replace(
        targets,
        row_weight_M=targets.row_weight_M * row_ratio,
        column_weight_N=targets.column_weight_N * column_ratio,
        row_share_M=targets.row_share_M * row_ratio,
        column_share_N=targets.column_share_N * column_ratio,
        row_smooth_M=None if targets.row_smooth_M is None else targets.row_smooth_M * row_ratio,
        column_smooth_N=None if targets.column_smooth_N is None else targets.column_smooth_N * column_ratio,
    )


def part(targets: Targets, rows: slice, columns: slice) -> Targets:
    """Targets of a rectangle of the whole batch."""

    def cut(tensor: Tensor | None, where: slice) -> Tensor | None:
        return None if tensor is None else tensor[where]

    return Targets(
        targets.row_weight_M[rows],
        targets.column_weight_N[columns],
        targets.row_share_M[rows],
        targets.column_share_N[columns],
        cut(targets.row_smooth_M, rows),
        cut(targets.column_smooth_N, columns),
        cut(targets.image_ids_M, rows),
        cut(targets.text_ids_N, columns),
        rows.start + targets.offset - columns.start,
    )
