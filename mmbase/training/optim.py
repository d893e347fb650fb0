"""Which optimiser takes which parameters, and the average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mmbase.training.config import TrainingConfig
from mmbase.training.muon import Muon
from mmbase.training.precision import has_amx


class Optimizers:
    """Several optimisers as one: each has its own parameters, all follow one schedule."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        for group in self.groups():
            group["initial_lr"] = group["lr"]

    def groups(self) -> Iterator[dict[str, Any]]:
        """The parameter groups of all parts."""
        for part in self.parts:
            yield from part.param_groups

    def scale_learning_rates(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its peak."""
        for group in self.groups():
            group["lr"] = group["initial_lr"] * factor

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """The parts' states."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizers:
    """Fused AdamW over all trained parameters, or with ``optimizer="muon"`` Muon over the hidden matrices.

    AdamW decays matrices and convolutions, but not what ``no_decay`` names nor anything of one dimension. Muon never
    takes embeddings (they are look-ups, not maps) nor what ``no_decay`` or ``muon_exclude`` names.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain, hidden = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or any(part in name for part in config.no_decay)
        outer = id(parameter) in embeddings or any(part in name for part in config.muon_exclude)
        if config.optimizer == "muon" and not exempt and not outer:
            hidden.append(parameter)
        else:
            (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            fused=True,
        )
    ]
    if hidden:
        fast = hidden[0].is_cuda or has_amx()
        parts.append(
            Muon(
                hidden,
                lr=config.muon_learning_rate,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
                dtype=torch.bfloat16 if fast else torch.float32,
            )
        )
    return Optimizers(parts)


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
