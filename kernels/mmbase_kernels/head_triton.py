"""Rows of unit length in Triton: launches of the kernels.

Letters: R rows, E width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmbase_kernels.head_tiles import backward_kernel, unit_length_kernel
from mmbase_kernels.launch import dense, on_device
from mmbase_kernels.layer_norm_tuning import plan


def unit_length(x_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length and what :func:`backward` needs of their lengths, float32 [R, E] and [R]."""
    rows, width = x_RE.shape
    out_RE = x_RE.new_empty((rows, width), dtype=torch.float32)
    inverse_R = x_RE.new_empty(rows, dtype=torch.float32)
    if rows:
        grid, constants = _launch(rows, width)
        with on_device(x_RE):
            unit_length_kernel[grid](dense(x_RE), out_RE, inverse_R, rows, **constants)
    return out_RE, inverse_R


def backward(grad_RE: Tensor, x_RE: Tensor, inverse_R: Tensor) -> Tensor:
    """Gradient to the rows [R, E], in their dtype, from that to the rows of unit length."""
    rows, width = x_RE.shape
    grad_x_RE = x_RE.new_empty((rows, width))
    if rows:
        grid, constants = _launch(rows, width)
        with on_device(x_RE):
            backward_kernel[grid](dense(grad_RE), dense(x_RE), inverse_R, grad_x_RE, rows, **constants)
    return grad_x_RE


def _launch(rows: int, width: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, and compile-time arguments and options."""
    chosen = plan("forward", width)
    return (-(-rows // chosen.rows),), {"E": width, **chosen.constants(), **chosen.options()}
