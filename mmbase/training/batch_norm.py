"""Batch normalisation over the batch of all ranks: statistics and gradients are those of one process that has it whole.

torch's SyncBatchNorm does this on GPUs, and only there.

Shapes: N samples of this rank, C channels, ... positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def normalise_over_ranks(model: nn.Module, device: torch.device) -> int:
    """Replace batch normalisation in place, parameters and buffers kept under their names; how many there were."""
    found = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    if device.type == "cuda" and found:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return len(found)
    for module in found:
        module.__class__ = BatchNormOverRanks
    return len(found)


class BatchNormOverRanks(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose batch is that of all ranks of the default group, which hold any number of samples."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel; in training by the statistics of all ranks' samples."""
        if not self.training:
            return super().forward(input)
        out, mean_C, variance_C, count = _NormaliseOverRanks.apply(input, self.weight, self.bias, self.eps)
        mean, variance, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is not None and variance is not None and batches is not None:
            with torch.no_grad():
                batches.add_(1)
                share = 1.0 / batches.item() if self.momentum is None else self.momentum
                mean.lerp_(mean_C, share)
                variance.lerp_(variance_C * (count / (count - 1)), share)
        return out


class _NormaliseOverRanks(torch.autograd.Function):
    """The normalised input and the batch's mean, biased variance and count of values per channel."""

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes, shape = _axes(x_NC), _shape(x_NC)
        values = x_NC.float()
        # Each rank's squares are around its own mean: sums of squares around 0 would cancel (Chan et al. 1983).
        variance_C, mean_C = torch.var_mean(values, dim=axes, correction=0)
        own = torch.stack([mean_C, variance_C, torch.full_like(mean_C, values.numel() / len(mean_C))])
        ranks_R3C = own.new_empty((dist.get_world_size(), *own.shape))
        dist.all_gather_into_tensor(ranks_R3C.flatten(0, 1), own)
        means_RC, variances_RC, counts_RC = ranks_R3C.unbind(1)
        count_C = counts_RC.sum(0)
        mean_C = (counts_RC * means_RC).sum(0) / count_C
        variance_C = (counts_RC * (variances_RC + (means_RC - mean_C).square())).sum(0) / count_C
        inverse_C = (variance_C + eps).rsqrt()
        normed_NC = (values - mean_C.view(shape)) * inverse_C.view(shape)
        out = normed_NC if weight_C is None else normed_NC * weight_C.view(shape)
        out = out if bias_C is None else out + bias_C.view(shape)
        count = count_C[0]
        ctx.save_for_backward(x_NC, weight_C, mean_C, inverse_C, count)
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return out.to(x_NC.dtype), mean_C, variance_C, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:  # pyrefly: ignore
        x_NC, weight_C, mean_C, inverse_C, count = ctx.saved_tensors
        axes, shape = _axes(x_NC), _shape(x_NC)
        gradient_NC = gradients[0].float()
        normed_NC = (x_NC.float() - mean_C.view(shape)) * inverse_C.view(shape)
        bias_gradient_C = gradient_NC.sum(axes)
        weight_gradient_C = (gradient_NC * normed_NC).sum(axes)
        sums = torch.stack([bias_gradient_C, weight_gradient_C])
        dist.all_reduce(sums)
        sum_C, product_C = (sums / count).unbind()
        inward_NC = gradient_NC - sum_C.view(shape) - normed_NC * product_C.view(shape)
        factor_C = inverse_C if weight_C is None else inverse_C * weight_C
        x_gradient = (inward_NC * factor_C.view(shape)).to(x_NC.dtype)
        if weight_C is None:
            return x_gradient, None, None, None
        return x_gradient, weight_gradient_C.to(weight_C.dtype), bias_gradient_C.to(weight_C.dtype), None


def _axes(x_NC: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [axis for axis in range(x_NC.ndim) if axis != 1]


def _shape(x_NC: Tensor) -> list[int]:
    """That of a value per channel, spread over ``x_NC``."""
    return [1, -1, *[1] * (x_NC.ndim - 2)]
