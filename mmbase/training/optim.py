"""AdamW with the right groups, and the average of weights."""

from __future__ import annotations

import torch
from torch import nn

from mmbase.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that require gradients: matrices and convolutions decayed, the rest not."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or any(part in name for part in config.no_decay)
            (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


class WeightAverage:
    """Exponential moving average of parameters and buffers, with the warm-up ``min(decay, (1 + n) / (10 + n))``.

    Args:
        model: its current weights start the average.
        decay: weight of the old average per step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights by one step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        floating, values = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                floating.append(self.averaged[name])
                values.append(value)
            else:
                self.averaged[name].copy_(value)
        torch._foreach_lerp_(floating, values, 1 - decay)
