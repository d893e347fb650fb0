"""The Triton kernel that adds what programs left for each column; :mod:`mmbase_kernels.partials` launches it.

Letters: K kinds of sums (1 or 2), P programs, D columns.
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import triton
import triton.language as tl

from mmbase_kernels.shipping import DTYPES, SMALL, Shipped

BLOCKS: Mapping[str, Any] = {"BLOCK_P": 64, "BLOCK_D": 32}
"""A line of 32 float32 is a whole sector four times over; 768 columns of two kinds make 48 programs."""


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernel of this module that runs on an architecture."""
    kernel = sum_partials_kernel
    for dtype, _ in DTYPES:
        types = {"partials": "*fp32", "first": f"*{dtype}", "second": f"*{dtype}", "programs": "i32", "columns": "i32"}
        for kinds in (1, 2):
            constants = BLOCKS if kinds == 2 else {**BLOCKS, "second": None}
            signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
            config = f"{dtype} of {kinds}"
            yield Shipped("sum_partials", architecture, config, kernel, signature, constants, SMALL, matrix=False)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partials,  # float32 [K, P, D]
    first,  # [D]
    second,  # [D], or None where K is 1
    programs,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over the programs, in order: BLOCK_P lanes of each column, then the lanes."""
    kind = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    source = partials + kind * programs * columns
    lanes = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in tl.range(0, programs, BLOCK_P):
        inside = (start + p < programs)[:, None] & (d < columns)[None, :]
        lanes += tl.load(source + (start + p)[:, None].to(tl.int64) * columns + d[None, :], inside, 0.0)
    total = tl.sum(lanes, 0)
    if second is None:
        tl.store(first + d, total.to(first.dtype.element_ty), d < columns)
    else:
        target = first if kind == 0 else second
        tl.store(target + d, total.to(first.dtype.element_ty), d < columns)
