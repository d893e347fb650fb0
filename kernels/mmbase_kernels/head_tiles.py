"""The Triton kernels that bring rows to unit length; :mod:`mmbase_kernels.head_triton` launches them.

Letters: R rows, E width. A program holds ROWS whole rows, each padded to WIDTH, a power of two.
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from mmbase_kernels.layer_norm_tiles import within
from mmbase_kernels.layer_norm_tuning import WIDTHS, plan
from mmbase_kernels.shipping import DTYPES, Shipped

SHORTEST = tl.constexpr(1e-12)
"""Rows shorter than this are divided by it, as ``torch.nn.functional.normalize`` does."""


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernels of this module that runs on an architecture."""
    for dtype, _ in DTYPES:
        for width in (WIDTHS[0], WIDTHS[-1]):
            for name, kernel in (("unit_length", unit_length_kernel), ("unit_length_backward", backward_kernel)):
                chosen = plan("forward", width)
                constants = {"E": width, **chosen.constants()}
                types = {"x": f"*{dtype}", "grad_x": f"*{dtype}", "rows": "i32"}
                signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
                config = f"{dtype} E{width} {chosen}"
                yield Shipped(name, architecture, config, kernel, signature, constants, chosen.options(), matrix=False)


@triton.jit(do_not_specialize=["rows"])
def unit_length_kernel(
    x,  # [R, E]
    out,  # float32 [R, E]
    inverse,  # float32 [R]: the reciprocals of the lengths; those of the shortest rows negative
    rows,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows divided by their length, or by SHORTEST, which then counts as a constant."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = within(row < rows, E, WIDTH)
    place = row[:, None] * E + tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + place, inside, 0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(values * values, 1))
    long = length >= SHORTEST
    factor = 1.0 / tl.where(length < SHORTEST, SHORTEST, length)
    tl.store(out + place, values * factor[:, None], inside)
    tl.store(inverse + row, tl.where(long, factor, -factor), row < rows)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad,  # float32 [R, E]
    x,  # [R, E]
    inverse,  # float32 [R]
    grad_x,  # [R, E]
    rows,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient to x: that to the unit rows less its part along them, divided by the length."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = within(row < rows, E, WIDTH)
    place = row[:, None] * E + tl.arange(0, WIDTH)[None, :]
    signed = tl.load(inverse + row, row < rows, 0.0)[:, None]
    factor = tl.abs(signed)
    slope = tl.load(grad + place, inside, 0.0)
    unit = tl.load(x + place, inside, 0.0).to(tl.float32) * factor
    along = tl.sum(slope * unit, 1)[:, None]
    result = (slope - tl.where(signed > 0.0, unit * along, 0.0)) * factor
    tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), inside)
