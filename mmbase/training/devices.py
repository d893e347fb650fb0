"""What GPUs can do by their makers' data sheets, and what a device of another kind does when it is asked. Torch-free.

Products are dense, with float32 sums; links are counted one way. Measured speeds of training are in
:mod:`mmbase.training.measured`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mmbase.errors import MmbaseError, nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its maker states it."""

    title: str
    pattern: str
    """regular expression of the name that the driver gives"""
    bf16: float
    """FLOP/s, as of fp16"""
    tf32: float
    fp32: float
    fp8: float
    """0 where it has none"""
    memory: float
    """bytes"""
    bandwidth: float
    """bytes/s of its memory"""
    link: float
    """bytes/s one way to the other GPUs of its node"""
    node: int
    """GPUs of a usual node"""

    def peak(self, precision: str) -> float:
        """FLOP/s of ``bf16``, ``fp16``, ``fp8``, ``tf32`` or ``fp32``."""
        return {"bf16": self.bf16, "fp16": self.bf16, "fp8": self.fp8, "tf32": self.tf32, "fp32": self.fp32}[precision]


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", r"A100-SXM\d-80GB", 312e12, 156e12, 19.5e12, 0.0, 80e9, 2.04e12, link=300e9, node=8),
    "h100": Gpu("H100 SXM 80 GB", r"H100 80GB HBM3", 989e12, 494e12, 67e12, 1979e12, 80e9, 3.35e12, link=450e9, node=8),
    "h200": Gpu("H200 SXM 141 GB", r"H200(?! NVL)", 989e12, 494e12, 67e12, 1979e12, 141e9, 4.8e12, link=450e9, node=8),
    "b200": Gpu("B200 SXM 180 GB", r"\bB200", 2250e12, 1125e12, 75e12, 4500e12, 180e9, 7.7e12, link=900e9, node=8),
    "l40s": Gpu("L40S 48 GB", r"L40S", 362e12, 183e12, 91.6e12, 733e12, 48e9, 0.864e12, link=32e9, node=8),
    "rtx4090": Gpu(
        "RTX 4090 24 GB", r"RTX 4090(?! D| Laptop)", 165e12, 82.6e12, 82.6e12, 330e12, 24e9, 1.008e12, 32e9, 8
    ),
}

NETWORK = 50e9
"""Assumed bytes/s one way from each GPU to other nodes: a port of 400 Gbit/s each."""


class Peak(NamedTuple):
    """What MFU is a share of."""

    flops: float
    """FLOP/s of one device"""
    source: str


def gpu(name: str) -> Gpu:
    """The GPU of a short name.

    Raises:
        MmbaseError: names the nearest.
    """
    if name not in GPUS:
        raise MmbaseError(f"there is no GPU {name!r} in the table{nearest(name, GPUS)} (known: {', '.join(GPUS)}, cpu)")
    return GPUS[name]


def recognise(name: str) -> Gpu | None:
    """The GPU that a driver calls ``name``, or None."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, name)), None)


def peak_of(device: torch.device, dtype: torch.dtype | None) -> Peak:
    """Peak FLOP/s of matrix products on one device: the maker's, or where that is unknown the best of some products.

    Args:
        device: which.
        dtype: autocast's; None: float32.
    """
    import torch

    known = recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        size = 4096 if device.type == "cuda" else 1024
        flops = measured_product(device, dtype or torch.float32, size)
        return Peak(flops, f"the best product of {size:,} x {size:,} here")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "tf32" if tf32 else "fp32"}
    precision = names.get(dtype, "fp32")
    return Peak(known.peak(precision), f"{known.title}'s data sheet, dense {precision}")


def measured_product(device: torch.device, dtype: torch.dtype, size: int, tries: int = 8) -> float:
    """FLOP/s of the best of ``tries`` square products."""
    import torch

    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries + 1):  # the first one loads the library
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
