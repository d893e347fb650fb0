"""Muon: momentum whose matrix updates are orthogonalised, so that every direction of a weight moves alike.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". torch has a Muon of its own for
matrices; this one also takes convolution kernels (as matrices ``[out, in·height·width]``), where a small model with a
convolutional stem has most of its weights, and weights that are sharded or held alike by several ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbase.training.matrices import Matrices, OwnMatrices, ShardedMatrices, SharedMatrices, local, shard_group

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the paper: fast to within ±30 % of 1, which suffices
_STEPS = 5


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Roughly ``U Vᵀ`` of ``matrix = U S Vᵀ`` by Newton-Schulz iterations in ``dtype``; float32 ``[rows, columns]``."""
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class _Job(NamedTuple):
    """A weight to be updated."""

    parameter: nn.Parameter
    gradient: Tensor
    group: dict[str, Any]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Weights that FSDP2 sharded (DTensor) and those that ranks hold alike are taken in turns: each rank orthogonalises
    one whole matrix of every turn for all, so that the work is divided by the number of ranks, and all ranks take over
    the same bits. All ranks step together.

    Args:
        params: weights of two or more dimensions.
        lr: size of an update; the root mean square of a square matrix's update is ``lr / sqrt(rows)``.
        momentum: of the running mean of gradients.
        weight_decay: decoupled, as in AdamW.
        dtype: of the Newton-Schulz products and of what ranks exchange; bfloat16 where the hardware multiplies it.
        alike: ranks that hold plain weights and gradients alike (DistributedDataParallel); None: this process does all.

    Attributes:
        found_inf: None, or a scalar on the device set before :meth:`step`: where it is above 0, weights and momentum
            stay as they are, whatever the gradients hold. Named as torch's fused optimisers name it.

    Raises:
        ValueError: a parameter with fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        alike: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(
                    f"Muon takes matrices and convolutions, not a parameter of shape {list(parameter.shape)}"
                )
        self.dtype, self.alike = dtype, alike
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient."""
        jobs = [
            _Job(parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # Like sizes side by side: the ranks then have equal work in every turn.
        jobs.sort(key=lambda job: -job.parameter.numel())
        by_group: dict[dist.ProcessGroup | None, list[_Job]] = {}
        for job in jobs:
            by_group.setdefault(shard_group(job.parameter), []).append(job)
        for group, members in by_group.items():
            matrices: Matrices = OwnMatrices()
            if group is not None:
                matrices = ShardedMatrices(group)
            elif self.alike is not None:
                matrices = SharedMatrices(self.alike)
            for first in range(0, len(members), matrices.turn):
                self._turn(members[first : first + matrices.turn], matrices)

    def _turn(self, jobs: list[_Job], matrices: Matrices) -> None:
        """Update the weights of one turn."""
        ahead = [self._ahead(job).to(self.dtype) for job in jobs]
        shapes = [job.parameter.flatten(1).shape for job in jobs]
        updates = matrices.mapped(lambda matrix: orthogonalise(matrix, self.dtype), ahead, shapes)
        for job, update, (rows, columns) in zip(jobs, updates, shapes):
            parameter, rate = local(job.parameter), job.group["lr"]
            decayed = parameter * (1 - rate * job.group["weight_decay"])
            moved = decayed.add_(update.view(parameter.shape), alpha=-rate * max(1.0, rows / columns) ** 0.5)
            parameter.copy_(self._unless_skipped(parameter, moved))

    def _ahead(self, job: _Job) -> Tensor:
        """Move the momentum; the local part of what is to be orthogonalised."""
        state, share = self.state[job.parameter], job.group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(job.parameter)
        old, gradient = local(state["momentum"]), local(job.gradient)
        momentum = old.lerp(gradient, 1 - share)
        old.copy_(self._unless_skipped(old, momentum))
        return gradient.lerp(momentum, share)

    def _unless_skipped(self, old: Tensor, new: Tensor) -> Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf > 0, old, new)
