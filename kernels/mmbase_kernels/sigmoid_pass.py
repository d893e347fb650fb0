"""The one pass of the sigmoid loss over a rectangle of logits; plain functions without autograd.

Letters: M image rows, N text rows, D width; ``l = scale * image @ text.T + bias``.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor


class SigmoidPass(NamedTuple):
    """Sum over all pairs of ``softplus(-z * l)``, z = 1 at a match and -1 elsewhere, and the gradients of that sum."""

    loss: Tensor
    """float32 scalar, not divided by the number of images."""
    image_MD: Tensor
    """float32 gradient; like all that follow, empty if gradients were not asked for."""
    text_ND: Tensor
    """float32."""
    scale: Tensor
    """float32 scalar."""
    bias: Tensor
    """float32 scalar."""


def implementation(impl: str) -> ModuleType:
    """The module that holds ``sigmoid_pass`` of an implementation, ``torch`` or ``triton``."""
    if impl == "triton":
        from mmbase_kernels import sigmoid_triton

        return sigmoid_triton
    from mmbase_kernels import sigmoid_torch

    return sigmoid_torch


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
    impl: str = "torch",
) -> SigmoidPass:
    """Loss, and with ``gradients`` its derivatives, in one pass of 6·M·N·D FLOPs (2 without).

    Image i matches text j where their ids are equal, without ids where ``j == i + offset``; any offset is allowed.

    Args:
        image_MD: float32, float16 or bfloat16.
        text_ND: the same dtype and device.
        scale: float32 scalar on the same device.
        bias: float32 scalar on the same device.
        image_ids_M: int64, or None.
        text_ids_N: int64, or None.
        offset: column of row 0's match.
        gradients: whether the derivatives are wanted.
        impl: ``torch`` or ``triton``.
    """
    return implementation(impl).sigmoid_pass(
        image_MD,
        text_ND,
        scale,
        bias,
        image_ids_M=image_ids_M,
        text_ids_N=text_ids_N,
        offset=offset,
        gradients=gradients,
    )
