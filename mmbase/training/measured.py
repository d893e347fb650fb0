"""Speeds of training steps that were measured, each with the file that holds it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """One device training one model."""

    device: str
    """short name of :data:`mmbase.training.devices.GPUS`, or cpu"""
    hardware: str
    model: str
    """OpenCLIP's name, or a recipe"""
    precision: str
    batch: int
    text_length: int
    samples_per_second: float
    result: str
    """file in the repository"""
    what: str


_TRAIN_STEP = "benchmarks/results/train_step_cpu.json"
_STEP = "forward, loss and backward, no optimiser and no data"

MEASURED = [
    Measured("cpu", "Intel Xeon, 2 threads", "ViT-B-32", "fp32", 8, 77, 5.935, _TRAIN_STEP, _STEP),
    Measured("cpu", "Intel Xeon, 2 threads", "ViT-B-32", "bf16", 8, 77, 11.92, _TRAIN_STEP, _STEP),
    Measured(
        "cpu",
        "Intel Xeon, 2 threads",
        "emoji",
        "bf16",
        256,
        32,
        474.7,
        "benchmarks/results/emoji/environment.json",
        "the whole training, data and optimiser included",
    ),
]


def of_device(device: str, precision: str) -> list[Measured]:
    """What was measured on a device in a precision."""
    return [one for one in MEASURED if one.device == device and one.precision == precision]
