"""LayerNorm in Triton: launches of the kernels. All memory they are given is written once, without atomics.

Letters: R rows that are normalised, X rows of the input, D width, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbase_kernels.launch import dense, on_device
from mmbase_kernels.layer_norm_tiles import backward_kernel, forward_kernel
from mmbase_kernels.layer_norm_tuning import plan
from mmbase_kernels.partials import programs, sum_partials
from mmbase_kernels.tuning import architecture


class Gather(NamedTuple):
    """Which row of each sequence of x [B, N, D] is normalised, instead of all."""

    tokens_R: Tensor | None
    """int64, or None: ``token`` of every sequence."""
    token: int
    span: int
    """N."""

    @classmethod
    def of(cls, x_BND: Tensor, tokens_B: Tensor | None, token: int) -> Gather:
        """With the tokens as the kernels read them."""
        return cls(None if tokens_B is None else dense(tokens_B.long()), token, x_BND.shape[1])


_EVERY_ROW = Gather(None, 0, 0)


def forward(
    x: Tensor, branch: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, gather: Gather | None = None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """x + branch (None without a branch), its LayerNorm, and means and reciprocal deviations, float32.

    Args:
        x: [..., D], float32, float16 or bfloat16; copied if not contiguous.
        branch: the same shape and dtype, or None.
        weight_D: float32, float16 or bfloat16.
        bias_D: the dtype of the weight, or None.
        eps: added to the variance.
        gather: of x [B, N, D], these rows instead of every one; then without a branch.
    """
    width = x.shape[-1]
    shape = x.shape[:-1] if gather is None else x.shape[:1]
    total = None if branch is None else x.new_empty(x.shape)
    out = x.new_empty((*shape, width))
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    rows = mean.numel()
    if not rows:
        return total, out, mean, rstd
    chosen = plan("forward", width)
    place = gather or _EVERY_ROW
    constants: dict[str, Any] = {"D": width, "GATHER": gather is not None, **chosen.constants()}
    with on_device(x):
        forward_kernel[(-(-rows // chosen.rows),)](
            x=dense(x),
            branch=None if branch is None else dense(branch),
            tokens=place.tokens_R,
            weight=dense(weight_D),
            bias=None if bias_D is None else dense(bias_D),
            total=total,
            out=out,
            mean=mean,
            rstd=rstd,
            eps=eps,
            rows=rows,
            token=place.token,
            span=place.span,
            **constants,
            **chosen.options(),
        )
    return total, out, mean, rstd


def backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight_D: Tensor,
    mean: Tensor,
    rstd: Tensor,
    kinds: int,
    gather: Gather | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to what was normalised, contiguous, and to weight and bias, in the weight's dtype.

    Args:
        grad_out: gradient to the normalised rows.
        grad_total: gradient to x + branch from elsewhere, or None.
        x: what was normalised: the sum where there was a branch.
        weight_D: as in :func:`forward`.
        mean: the third result of :func:`forward`.
        rstd: the fourth.
        kinds: 2 for the gradients to weight and bias, 1 for the weight's alone, 0 for neither; the others are empty.
        gather: as in :func:`forward`; the gradient to all other rows is 0.
    """
    width, rows = x.shape[-1], mean.numel()
    grad_x = x.new_empty(x.shape) if gather is None else x.new_zeros(x.shape)
    chosen = plan("backward", width)
    count = programs(architecture(x.device), chosen.warps, -(-rows // chosen.rows))
    partials_KPD = x.new_empty((kinds, count, width), dtype=torch.float32) if kinds else None
    place = gather or _EVERY_ROW
    constants: dict[str, Any] = {"D": width, "GATHER": gather is not None, "PARTIALS": kinds, **chosen.constants()}
    if rows or kinds:  # of no rows the sums are zero
        with on_device(x):
            backward_kernel[(count,)](
                grad_out=dense(grad_out),
                grad_total=None if grad_total is None else dense(grad_total),
                x=dense(x),
                tokens=place.tokens_R,
                weight=dense(weight_D),
                mean=mean,
                rstd=rstd,
                grad_x=grad_x,
                partials=partials_KPD,
                rows=rows,
                token=place.token,
                span=place.span,
                **constants,
                **chosen.options(),
            )
    sums = [] if partials_KPD is None else sum_partials(partials_KPD, weight_D.dtype)
    grad_weight, grad_bias, *_ = *sums, weight_D.new_empty(0), weight_D.new_empty(0)
    return grad_x, grad_weight, grad_bias
