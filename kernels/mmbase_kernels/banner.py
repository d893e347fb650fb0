"""What a tower's operators run on and why, in words: for the first lines of a run and for ``mmbase doctor``."""

from __future__ import annotations

import torch

from mmbase_kernels.choice import ENVIRONMENT, OPERATORS, WINS, preferred
from mmbase_kernels.dispatch import DTYPES, choose, hindrance
from mmbase_kernels.tuning import architecture


def describe(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What ``impl="auto"`` takes, such as ``layer norm, head: torch (no measurement for sm_90 yet)``.

    Args:
        device: where the tensors will be.
        dtype: of the activations; under autocast autocast's.

    Returns:
        A line for each implementation and reason.

    Raises:
        ValueError: MMBASE_KERNELS asks for what there is not, or for ``triton`` where it cannot run.
    """
    choose("auto", torch.empty(0, device=device))
    lines: dict[str, list[str]] = {}
    for operator in OPERATORS:
        implementation, reason = _of(operator, device, dtype)
        lines.setdefault(f"{implementation} ({reason})", []).append(operator.replace("_", " "))
    return [f"{', '.join(operators)}: {text}" for text, operators in lines.items()]


def _of(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Implementation and reason of an operator."""
    plain = "sdpa" if operator == "attention" else "torch"
    if value := preferred():
        return plain if value == "torch" else value, f"{ENVIRONMENT}={value}"
    if device.type != "cuda":
        return plain, f"Triton kernels need a CUDA device, not {device.type}"
    if obstacle := hindrance(device):
        return plain, obstacle
    name, what = architecture(device), str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return plain, f"Triton kernels take no {what}"
    here = [win for win in WINS if (win.operator, win.architecture) == (operator, name)]
    if results := sorted({win.result for win in here if win.dtype == dtype}):
        return f"triton where it was faster, else {plain}", ", ".join(results)
    return plain, f"not faster in {what} on {name}" if here else f"no measurement for {name} yet"
