"""The learning rate as a pure function of how far training is."""

from __future__ import annotations

import math

from mmbase.training.config import TrainingConfig


def learning_rate_factor(step: float, config: TrainingConfig) -> float:
    """Share of the peak learning rate at ``step`` (from 0): linear warm-up, then down to ``final_share``.

    ``step`` counts steps of the configured batch size, ``samples seen / training.batch_size``: where a curriculum
    changes the batch size it is a fraction, and the schedule stays one over samples.
    """
    if step < config.warmup_steps:
        return min(1.0, (step + 1) / config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return config.final_share + (1 - config.final_share) * shape[config.schedule]
