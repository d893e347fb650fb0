"""Which optimiser takes which parameters, and the average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbase.training.config import TrainingConfig
from mmbase.training.depth import depth_of
from mmbase.training.full_state import load_optimizer, shard_like
from mmbase.training.matrices import local
from mmbase.training.muon import Muon
from mmbase.training.precision import has_amx


class Optimizers:
    """Several optimisers as one: each has its own parameters, all follow one schedule."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self._skip: Tensor | None = None
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

    def skip_where(self, bad: Tensor | None) -> None:
        """Leave the next :meth:`step` out, by a value that the host need not know.

        Args:
            bad: float32 scalar on the parameters' device: 1 leaves weights, moments and counts of steps as they are,
                bit for bit, whatever the gradients hold; 0, or None in place of the tensor, lets the step happen.
        """
        self._skip = bad

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts:
            part.found_inf = self._skip  # pyrefly: ignore[missing-attribute]  # fused AdamW's, and Muon's, name for it
            part.step()
        self._skip = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The parts' states."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what :meth:`state_dict` gave; whole tensors where parameters are shards are sharded like them."""
        for part, state in zip(self.parts, states, strict=True):
            load_optimizer(part, state)


def build_optimizer(
    model: nn.Module,
    config: TrainingConfig,
    *,
    layer_decay: float | None = None,
    alike: dist.ProcessGroup | None = None,
) -> Optimizers:
    """Fused AdamW over all trained parameters, or with ``optimizer="muon"`` Muon over the hidden matrices.

    AdamW decays matrices and convolutions, but not what ``no_decay`` names nor anything of one dimension. Muon never
    takes embeddings (they are look-ups, not maps) nor what ``no_decay`` or ``muon_exclude`` names.

    Args:
        model: with parameters as they are trained: plain, or after FSDP2 has sharded them. Parameters that are locked
            for a while (:class:`~mmbase.training.depth.TowerLocks`) must not be locked yet.
        config: which optimiser, and its settings.
        layer_decay: learning rates are multiplied with this once for each group of layers that stands between a layer
            and its tower's output (ELECTRA, arXiv:2003.10555; BEiT, arXiv:2106.08254); None or 1: alike.
        alike: see :class:`~mmbase.training.muon.Muon`.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or any(part in name for part in config.no_decay)
        outer = id(parameter) in embeddings or any(part in name for part in config.muon_exclude)
        kind = "plain" if exempt else "hidden" if config.optimizer == "muon" and not outer else "decayed"
        depth = depth_of(model, name) if layer_decay is not None else None  # pyrefly: ignore[bad-argument-type]
        factor = layer_decay**depth.above if layer_decay is not None and depth else 1.0
        groups.setdefault((kind, factor), []).append(parameter)

    def of_kind(kind: str, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "lr": learning_rate * factor, "weight_decay": weight_decay}
            for (found, factor), parameters in groups.items()
            if found == kind
        ]

    adam = of_kind("decayed", config.learning_rate, config.weight_decay) + of_kind("plain", config.learning_rate, 0.0)
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adam, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
    ]
    if hidden := of_kind("hidden", config.muon_learning_rate, config.weight_decay):
        fast = hidden[0]["params"][0].is_cuda or has_amx()
        dtype = torch.bfloat16 if fast else torch.float32
        parts.append(Muon(hidden, momentum=config.muon_momentum, dtype=dtype, alike=alike))
    return Optimizers(parts)


class WeightAverage:
    """Exponential moving average of parameters and buffers, with the warm-up ``min(decay, (1 + n) / (10 + n))``.

    Shards are averaged as shards: nothing is sent. Build it after FSDP2 has sharded the model.

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
                floating.append(local(self.averaged[name]))
                values.append(local(value))
            else:
                self.averaged[name].copy_(value)
        torch._foreach_lerp_(floating, values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """``averaged``: names to tensors, shards where the model's are; ``updates``: how many there were."""
        return {"averaged": self.averaged, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, of shards laid out as here or of whole tensors."""
        for name, target in self.averaged.items():
            local(target).copy_(local(shard_like(state["averaged"][name], target)))
        self.updates = int(state["updates"])
