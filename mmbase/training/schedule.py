"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mmbase.training.config import TrainingConfig


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at step ``step`` (from 0): linear warm-up, then down to ``final_share``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return config.final_share + (1 - config.final_share) * shape[config.schedule]
