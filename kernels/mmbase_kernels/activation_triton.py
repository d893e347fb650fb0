"""The activation in Triton: launches of the kernels. All memory they are given is written once, without atomics.

Letters: R rows, D width, P spans of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmbase_kernels.activation_tiles import BACKWARD, FORWARD, OPTIONS, backward_kernel, forward_kernel
from mmbase_kernels.launch import dense, on_device
from mmbase_kernels.partials import sum_partials

PROGRAMS = 2112
"""Programs that the backward pass is cut into: 16 for each of 132 multiprocessors, 5 of which run at a time."""
SHORTEST = 64
"""Rows of a span, at least: the sums of so many are written and read in 2 % of their own traffic."""


def forward(x_RD: Tensor, bias_D: Tensor | None, activation: str) -> Tensor:
    """``activation(x + bias)``, in the dtype of ``x_RD``, contiguous.

    Args:
        x_RD: float32, float16 or bfloat16; copied if not contiguous.
        bias_D: any floating dtype, or None.
        activation: one of :data:`mmbase_kernels.activation.ACTIVATIONS`.
    """
    rows, width = x_RD.shape
    out_RD = x_RD.new_empty((rows, width))
    if rows:
        programs = -(-rows // FORWARD["BLOCK_M"]) * -(-width // FORWARD["BLOCK_D"])
        settings: dict[str, Any] = {"ACTIVATION": activation, **FORWARD, **OPTIONS}
        with on_device(x_RD):
            forward_kernel[(programs,)](dense(x_RD), _float32(bias_D), out_RD, rows, width, **settings)
    return out_RD


def backward(
    grad_RD: Tensor, x_RD: Tensor, bias_D: Tensor | None, activation: str, *, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to ``x_RD`` and, empty unless asked for, to the bias in its dtype.

    Args:
        grad_RD: gradient to the output, in its dtype.
        x_RD: as in :func:`forward`.
        bias_D: as in :func:`forward`.
        activation: as in :func:`forward`.
        bias_gradient: whether the bias's gradient is wanted; there must be a bias.
    """
    rows, width = x_RD.shape
    grad_x_RD = x_RD.new_empty((rows, width))
    wanted = bias_D if bias_gradient else None
    if not rows:
        return grad_x_RD, x_RD.new_empty(0) if wanted is None else torch.zeros_like(wanted)
    span = span_of(rows, width)
    spans = -(-rows // span)
    partial_PD = None if wanted is None else x_RD.new_empty((spans, width), dtype=torch.float32)
    settings: dict[str, Any] = {"ACTIVATION": activation, **BACKWARD, **OPTIONS}
    with on_device(x_RD):
        backward_kernel[(spans * -(-width // BACKWARD["BLOCK_D"]),)](
            dense(grad_RD), dense(x_RD), _float32(bias_D), grad_x_RD, partial_PD, rows, width, span, **settings
        )
    if wanted is None or partial_PD is None:
        return grad_x_RD, x_RD.new_empty(0)
    return grad_x_RD, sum_partials(partial_PD[None], wanted.dtype)[0]


def span_of(rows: int, width: int) -> int:
    """Rows that one program of the backward pass sums up: a function of the shape, so that results repeat."""
    block_m = BACKWARD["BLOCK_M"]
    spans = max(1, min(PROGRAMS // -(-width // BACKWARD["BLOCK_D"]), rows // SHORTEST))
    return -(-rows // (spans * block_m)) * block_m


def _float32(bias_D: Tensor | None) -> Tensor | None:
    return None if bias_D is None else dense(bias_D.float())
