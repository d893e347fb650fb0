"""Device and precision: what was chosen, and why."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from mmbase.errors import MmbaseError


class Precision(NamedTuple):
    """How matrix products are computed."""

    dtype: torch.dtype | None
    """autocast dtype; None: float32 throughout"""
    reason: str

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context the towers run in."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


def choose_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one, else the CPU.

    Raises:
        MmbaseError: a device that this machine or this torch does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise MmbaseError(f"device={name!r} cannot be used: {reason}; use device=cpu or device=auto") from error
    return device


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision for ``auto``, ``fp32`` or ``bf16`` on a device."""
    if name == "fp32":
        return Precision(None, "asked for")
    if name == "bf16":
        return Precision(torch.bfloat16, "asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "the GPU multiplies bf16 in hardware")
        return Precision(None, "the GPU has no bf16")
    if device.type == "cpu" and has_amx():
        return Precision(torch.bfloat16, "the CPU multiplies bf16 tiles in hardware (AMX)")
    return Precision(None, f"no fast bf16 on this {device.type}")


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 tiles in hardware."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    return bool(capabilities.get("amx_bf16"))
