"""How many rows and warps the kernels over whole rows take: checked in, nothing is tuned at run time.

Chosen, like :mod:`mmbase_kernels.tuning`, from what the compiler reports and from what has to be in flight: a
multiprocessor of an H200 reads 36 bytes a nanosecond, about 25 KB in the time one read takes. Not yet timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WIDEST = 8192
"""Columns: 16 warps with 16 of them a thread."""
WIDTHS = (768, 1280, WIDEST)
"""Those whose kernels are compiled by the offline check: two backward rows a program, one, and one by 16 warps."""
PER_WARP = 512
"""Columns of all rows together that a warp holds, 16 a thread: two reads of 16 bytes for each tensor of 16 bits."""


@dataclass(frozen=True)
class RowPlan:
    """A program's block and warps."""

    width: int
    """Columns of the block, a power of two."""
    rows: int
    warps: int

    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {"WIDTH": self.width, "ROWS": self.rows}

    def options(self) -> dict[str, Any]:
        """The compiler's options. Multiplications and additions fuse everywhere, whatever Triton's default is."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}

    def __str__(self) -> str:
        return f"{self.rows}x{self.width} w{self.warps}"


def plan(step: str, width: int) -> RowPlan:
    """The plan of ``forward`` or ``backward`` for rows of up to WIDEST columns.

    A forward program has one row, or as many as a warp holds. A backward one has four warps or more, whose sums over
    rows stay on chip until it ends: fewer programs leave fewer of them to be added.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    warps = max(padded // PER_WARP, 1 if step == "forward" else 4)
    return RowPlan(padded, max(1, warps * PER_WARP // padded), warps)
