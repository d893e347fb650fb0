"""The sigmoid loss over ranks: this rank's images against everyone's texts, gathered or on a ring.

The loss is pointwise, so that one pass of 6·M·N·D FLOPs gives it and every gradient; OpenCLIP's takes as many (more
with its ``gather``) and keeps the logits of every block. That pass runs forward, when what will reach the loss is not
known yet, so the texts' gradients, which are sums over ranks, are scaled in the backward pass:

* gathered: a rank's part for all texts (float32, as large as the gathered features) waits for the backward pass, is
  scaled there, and summed by a reduce-scatter in the texts' dtype;
* ring: the float32 sums travel with their block and are home after the forward pass; memory does not grow with the
  number of ranks. Of the whole batch's loss they are right up to a factor. Of the ranks' own (``local_value``) they are
  if the same gradient reaches every rank's loss, as it does in training; if not (the backward pass looks, which waits
  for the device), the round is run again with the true factors.

Letters: M image rows of this rank, K text rows of the block at hand, N text rows of all ranks, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmbase.losses.collectives import gather_numbers, gather_rows, scatter_sum, sum_over_ranks
from mmbase.losses.ring import Block, rotate
from mmbase.losses.shards import Shards
from mmbase_kernels.sigmoid_pass import sigmoid_pass


@dataclass(frozen=True)
class SigmoidPlan:
    """Everything about a distributed sigmoid loss that is no feature."""

    shards: Shards
    image_ids_M: Tensor | None
    """int64, this rank's, or None."""
    text_ids_M: Tensor | None
    local_value: bool
    """Sum over the rank's rows divided by their number, as OpenCLIP; else the mean over all ranks' images."""
    both_ways: bool
    """Ring only: blocks travel both ways around."""
    compute_dtype: torch.dtype
    impl: str
    backward: bool
    """Whether a backward pass may follow; without one no gradient work is done."""

    @property
    def value_share(self) -> float:
        """Factor from the sum over this rank's pairs to its part of the loss."""
        return 1 / (self.shards.image_rows[self.shards.rank] if self.local_value else self.shards.images)

    def gradient_factor(self, grad: Tensor) -> Tensor:
        """Factor from the gradient of the sum over this rank's pairs, given the one that reached this rank's loss.

        Of the whole batch's loss, which every rank returns, that is the sum of what reached the ranks.
        """
        return (grad if self.local_value else sum_over_ranks(grad, self.shards.group)) * self.value_share

    def value(self, total: Tensor) -> Tensor:
        """What this rank returns, from the sum over its pairs."""
        value = total * self.value_share
        return value if self.local_value else sum_over_ranks(value, self.shards.group)


class GatherSigmoid(torch.autograd.Function):
    """``apply(image_MD, text_MD, scale, bias, plan)`` -> float32 loss."""

    @staticmethod
    def forward(ctx: Any, image_MD: Tensor, text_MD: Tensor, scale: Tensor, bias: Tensor, plan: SigmoidPlan) -> Tensor:
        """Gather the texts; loss and gradients of the rectangle in one pass."""
        shards = plan.shards
        text_ids_N = plan.text_ids_M
        if text_ids_N is not None:
            text_ids_N = gather_rows(text_ids_N, shards.text_rows, shards.group)
        result = sigmoid_pass(
            image_MD.to(plan.compute_dtype),
            gather_rows(text_MD.to(plan.compute_dtype), shards.text_rows, shards.group),
            scale.float(),
            bias.float(),
            image_ids_M=plan.image_ids_M,
            text_ids_N=text_ids_N,
            offset=shards.offset(0),
            gradients=plan.backward,
            impl=plan.impl,
        )
        if plan.backward:
            ctx.save_for_backward(*result[1:])
            ctx.plan, ctx.dtypes = plan, (image_MD.dtype, text_MD.dtype, scale.dtype, bias.dtype)
        return plan.value(result.loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """Scale what the forward pass found; sum the texts' over ranks."""
        plan: SigmoidPlan = ctx.plan
        grad_image_MD, grad_text_ND, grad_scale, grad_bias = ctx.saved_tensors
        image_dtype, text_dtype, scale_dtype, bias_dtype = ctx.dtypes
        factor = plan.gradient_factor(grad_outputs[0])
        grad_text_MD = None
        if ctx.needs_input_grad[1]:
            scaled_ND = (grad_text_ND * factor).to(text_dtype)
            grad_text_MD = scatter_sum(scaled_ND, plan.shards.text_rows, plan.shards.group)
        return (
            (grad_image_MD * factor).to(image_dtype),
            grad_text_MD,
            (grad_scale * factor).to(scale_dtype),
            (grad_bias * factor).to(bias_dtype),
            None,
        )


class RingSigmoid(torch.autograd.Function):
    """``apply(image_MD, text_MD, scale, bias, plan)`` -> float32 loss."""

    @staticmethod
    def forward(ctx: Any, image_MD: Tensor, text_MD: Tensor, scale: Tensor, bias: Tensor, plan: SigmoidPlan) -> Tensor:
        """One round: loss and gradients, the texts' at home already."""
        found = _Round(image_MD, text_MD, scale, bias, plan, plan.backward, plan.value_share)
        if plan.backward:
            ctx.save_for_backward(
                image_MD, text_MD, scale, bias, found.image_MD, found.text_MD, found.scale, found.bias
            )
            ctx.plan = plan
        return plan.value(found.loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """Scale what the forward pass found; a second round only where the ranks' gradients differ."""
        plan: SigmoidPlan = ctx.plan
        image_MD, text_MD, scale, bias, grad_image_MD, grad_text_MD, grad_scale, grad_bias = ctx.saved_tensors
        grad = grad_outputs[0]
        factor = plan.gradient_factor(grad)
        if ctx.needs_input_grad[1]:
            if not plan.local_value:
                grad_text_MD = grad_text_MD * (factor / plan.value_share)
            elif len(set(gather_numbers(grad, plan.shards.group).tolist())) == 1:
                grad_text_MD = grad_text_MD * grad
            else:
                grad_text_MD = _Round(image_MD, text_MD, scale, bias, plan, True, factor).text_MD
                assert grad_text_MD is not None
        return (
            (grad_image_MD * factor).to(image_MD.dtype),
            grad_text_MD.to(text_MD.dtype),
            (grad_scale * factor).to(scale.dtype),
            (grad_bias * factor).to(bias.dtype),
            None,
        )


class _Round:
    """Sums over this rank's pairs, and over everyone's for the gradient of this rank's texts, after one round."""

    def __init__(
        self,
        image_MD: Tensor,
        text_MD: Tensor,
        scale: Tensor,
        bias: Tensor,
        plan: SigmoidPlan,
        gradients: bool,
        text_factor: Tensor | float,
    ) -> None:
        """``text_factor``: this rank's factor of what it adds to the gradient of a text."""
        self.image = image_MD.to(plan.compute_dtype)
        self.numbers = scale.float(), bias.float()
        self.plan, self.gradients, self.text_factor = plan, gradients, text_factor
        zero = torch.zeros((), dtype=torch.float32, device=image_MD.device)
        self.loss, self.scale, self.bias = zero.clone(), zero.clone(), zero.clone()
        self.image_MD = zero.new_zeros(image_MD.shape if gradients else 0)
        block: Block = (text_MD.to(plan.compute_dtype),)
        if plan.text_ids_M is not None:
            block = (*block, plan.text_ids_M)
        shards = plan.shards
        self.text_MD = rotate(block, shards.text_rows, shards.group, self._visit, Tensor.add_, both_ways=plan.both_ways)

    def _visit(self, owner: int, block: Block) -> Tensor | None:
        result = sigmoid_pass(
            self.image,
            block[0],
            *self.numbers,
            image_ids_M=self.plan.image_ids_M,
            text_ids_N=block[1] if len(block) > 1 else None,
            offset=self.plan.shards.offset(owner),
            gradients=self.gradients,
            impl=self.plan.impl,
        )
        self.loss += result.loss
        if not self.gradients:
            return None
        self.image_MD += result.image_MD
        self.scale += result.scale
        self.bias += result.bias
        return result.text_ND.mul_(self.text_factor)
