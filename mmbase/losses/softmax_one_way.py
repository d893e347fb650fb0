"""Cross entropy of a rank's rows against everyone's columns, where only the rows take a gradient.

OpenCLIP's ``local_loss`` without ``gather_with_grad``: gathered features are constants there, so that both directions
need their own rectangle, images against all texts and texts against all images.

Letters: M rows of this rank, N rows of all ranks, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmbase_kernels import softmax
from mmbase_kernels.targets import Targets, plan_targets


class OneWaySoftmax(torch.autograd.Function):
    """``apply(row_MD, column_ND, scale, offset, stash_bytes, impl, backward)``: float32, half the mean over the rows.

    Row i matches column ``i + offset``. Products are taken in the columns' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row_MD: Tensor,
        column_ND: Tensor,
        scale: Tensor,
        offset: int,
        stash_bytes: int,
        impl: str,
        backward: bool,
    ) -> Tensor:
        """Statistics of the rows alone."""
        scale_f = scale.float()
        ctx.row_dtype = row_MD.dtype
        row_MD = row_MD.to(column_ND.dtype)
        targets = _rows_only(plan_targets(len(row_MD), len(column_ND), row_MD.device, offset=offset))
        first = softmax.statistics(
            row_MD,
            column_ND,
            scale_f,
            targets,
            columns=False,
            stash_bytes=stash_bytes if backward else 0,
            impl=impl,
        )
        if backward:
            ctx.save_for_backward(row_MD, column_ND, scale, first.row_lse_M, first.match_M, first.stash)
            ctx.targets, ctx.impl = targets, impl
        return softmax.weighted(targets.row_weight_M, F.softplus(first.row_lse_M - first.match_M)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """Gradients to the rows and to the scale."""
        (grad,) = grad_outputs
        row_MD, column_ND, scale, row_lse_M, match_M, stash = ctx.saved_tensors
        no_columns = row_lse_M.new_empty(0)
        second = softmax.gradients(
            row_MD,
            column_ND,
            scale.float(),
            torch.logaddexp(row_lse_M, match_M.to(row_lse_M.dtype)),
            no_columns,
            softmax.match_gradient(row_lse_M, no_columns, match_M, ctx.targets),
            ctx.targets,
            stash=stash,
            text=False,
            impl=ctx.impl,
        )
        grad_scale = (second.scale * grad).to(scale.dtype)
        return second.image_MD.mul_(grad).to(ctx.row_dtype), None, grad_scale, None, None, None, None


def _rows_only(targets: Targets) -> Targets:
    nothing_N = torch.zeros_like(targets.column_weight_N)
    return replace(targets, column_weight_N=nothing_N, column_share_N=nothing_N)
