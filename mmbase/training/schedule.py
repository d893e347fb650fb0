"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mmbase.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then cosine, linear or constant to the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    progress = min(progress, 1.0)
    share = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * share
