"""What a plan is made for: devices, precision, and how the work is spread. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class Setup:
    """On what, and how it is spread."""

    gpus: int
    gpu: str
    """short name, or cpu: then the N processes share one machine's cores"""
    precision: str
    """bf16, fp16 or fp32"""
    kind: Kind
    micro_batch: int | None
    """pairs of one device that memory holds; None: all of its part of the batch"""
    checkpoint_activations: bool
    reshard_after_forward: bool

    def local(self, batch: int) -> int:
        """Pairs of one device."""
        return batch // self.gpus

    def parts(self, local: int) -> int:
        """Micro-batches that a device takes its pairs in."""
        return 1 if self.micro_batch is None else -(-local // self.micro_batch)
