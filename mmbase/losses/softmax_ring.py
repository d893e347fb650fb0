"""The softmax loss over ranks without anyone ever holding all features: texts travel around a ring.

Forward, a block of texts travels with the log-sum-exp of its columns so far; backward, with its complete one and the
float32 gradient so far. Memory O((M + N / W)·D) and some float32 vectors of N. Per rank 8·M·N·D FLOPs; what is sent is
the texts twice and their float32 gradient once, against texts and gradients once each when they are gathered.

Letters: M image rows of this rank, K text rows of the block at hand, N text rows of all ranks, W ranks, D width.

Source: Cheng et al. 2024, "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmbase.losses.collectives import sum_over_ranks
from mmbase.losses.ring import Block, rotate
from mmbase.losses.softmax_plan import SoftmaxPlan
from mmbase_kernels import softmax
from mmbase_kernels.targets import smoothing_term


class RingSoftmax(torch.autograd.Function):
    """``apply(image_MD, text_MD, scale, plan)``, as :class:`mmbase.losses.softmax_gather.GatherSoftmax`; no stash."""

    @staticmethod
    def forward(ctx: Any, image_MD: Tensor, text_MD: Tensor, scale: Tensor, plan: SoftmaxPlan) -> Tensor:
        """One round: every block leaves with the statistics of its columns over this rank's rows."""
        shards = plan.shards
        scale_f = scale.float()
        ctx.image_dtype, ctx.text_dtype = image_MD.dtype, text_MD.dtype
        image_MD, text_KD = image_MD.to(plan.compute_dtype), text_MD.to(plan.compute_dtype)
        own: softmax.Statistics | None = None
        row_lse_M = image_MD.new_empty(0)
        positive, smoothing = scale_f.new_zeros(()), scale_f.new_zeros(())

        def visit(owner: int, block: Block) -> Tensor:
            nonlocal own, row_lse_M, positive, smoothing
            targets = plan.block(owner)
            first = softmax.statistics(image_MD, block[0], scale_f, targets, impl=plan.impl)
            positive = positive + first.positive
            smoothing = smoothing + smoothing_term(image_MD, block[0], scale_f, targets)
            if owner == shards.rank:  # the first of all
                own, row_lse_M = first, first.row_lse_M
            else:
                row_lse_M = torch.logaddexp(row_lse_M, first.row_lse_M)
            return first.column_lse_N

        column_lse_M = rotate(
            (text_KD,), shards.text_rows, shards.group, visit, torch.logaddexp, both_ways=plan.both_ways
        )
        assert own is not None and column_lse_M is not None
        value = plan.own_value(row_lse_M, column_lse_M, own.match_M, positive) - smoothing
        if plan.backward:
            ctx.save_for_backward(image_MD, text_KD, scale, row_lse_M, column_lse_M, own.match_M)
            ctx.plan = plan
        return plan.whole_value(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """A second round: every block leaves with its gradient over this rank's rows added."""
        plan: SoftmaxPlan = ctx.plan
        shards = plan.shards
        image_MD, text_KD, scale, row_lse_M, column_lse_M, match_M = ctx.saved_tensors
        wants_text = ctx.needs_input_grad[1]
        scales = plan.scales(grad_outputs[0])
        own = row_lse_M, column_lse_M, match_M, plan.block(shards.rank, scales)
        row_total_M, column_total_M = softmax.total_lse(*own)
        match_gradient_M = softmax.match_gradient(*own)
        grad_image_MD = torch.zeros_like(image_MD, dtype=torch.float32, memory_format=torch.contiguous_format)
        scale_f = scale.float()
        grad_scale = scale_f.new_zeros(())

        def visit(owner: int, block: Block) -> Tensor | None:
            nonlocal grad_scale
            second = softmax.gradients(
                image_MD,
                block[0],
                scale_f,
                row_total_M,
                block[1],
                match_gradient_M,
                plan.block(owner, scales),
                stash=image_MD.new_empty(0, dtype=torch.float32),
                text=wants_text,
                impl=plan.impl,
            )
            grad_image_MD.add_(second.image_MD)
            grad_scale = grad_scale + second.scale
            return second.text_ND if wants_text else None

        block = (text_KD, column_total_M)
        grad_text_KD = rotate(block, shards.text_rows, shards.group, visit, Tensor.add_, both_ways=plan.both_ways)
        own_factor = scales.feature_W[shards.rank]
        return (
            grad_image_MD.mul_(own_factor).to(ctx.image_dtype),
            None if grad_text_KD is None else grad_text_KD.mul_(own_factor).to(ctx.text_dtype),
            (sum_over_ranks(grad_scale, shards.group) * scales.scale).to(scale.dtype),
            None,
        )
