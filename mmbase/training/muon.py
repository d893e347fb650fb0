"""Muon: momentum whose matrix updates are orthogonalised, so that every direction of a weight moves alike.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". torch has a Muon of its own for
matrices; this one also takes convolution kernels (as matrices ``[out, in·height·width]``), where a small model with a
convolutional stem has most of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        params: weights of two or more dimensions.
        lr: size of an update; the root mean square of a square matrix's update is ``lr / sqrt(rows)``.
        momentum: of the running mean of gradients.
        weight_decay: decoupled, as in AdamW.
        dtype: of the Newton-Schulz products; bfloat16 where the hardware multiplies it.

    Raises:
        ValueError: a parameter with fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        params = list(params)
        for parameter in params:
            if parameter.ndim < 2:
                raise ValueError(
                    f"Muon takes matrices and convolutions, not a parameter of shape {list(parameter.shape)}"
                )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]).flatten(1)
        rows, columns = ahead.shape
        update = orthogonalise(ahead, self.dtype).view(parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
