"""Where ``impl="auto"`` of attention takes the Triton kernels: a checked-in table of measurements.

A row is added from a result file of ``benchmarks/results`` alone, and names it: forward plus backward must have been
faster there than every backend of ``scaled_dot_product_attention``, the concatenation of its three gradients counted
in. What has no row runs ``sdpa``. There has been no measurement yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmbase_kernels.tuning import architecture


@dataclass(frozen=True)
class Win:
    """Shapes at which the Triton kernels were measured to be faster."""

    architecture: str
    """One of :data:`mmbase_kernels.tuning.ARCHITECTURES`."""
    dtype: torch.dtype
    head_width: int
    causal: bool
    varlen: bool
    shortest: int
    """Tokens of a sequence, the longest one's if they differ: from here ..."""
    longest: int
    """... to here, both included, with no loss between."""
    result: str
    """File of ``benchmarks/results`` that says so."""


WINS: Sequence[Win] = ()


def triton_wins(
    device: torch.device, dtype: torch.dtype, head_width: int, length: int, *, causal: bool, varlen: bool
) -> bool:
    """Whether a row of WINS covers this shape."""
    if not WINS:
        return False
    case = architecture(device), dtype, head_width, causal, varlen
    return any(
        case == (win.architecture, win.dtype, win.head_width, win.causal, win.varlen)
        and win.shortest <= length <= win.longest
        for win in WINS
    )
