"""The Triton kernels of LayerNorm; :mod:`mmbase_kernels.layer_norm_triton` launches them.

Letters: R rows that are normalised, X rows of the input, P programs, D width. A program holds ROWS whole rows, each
padded to WIDTH, a power of two; nothing outside is read or written.

Statistics are float32. The mean is taken twice, the second time of what the first left, because a row whose mean is
1,000 times its deviation would lose three digits to one sum; the variance is that of the centred row (Chan, Golub and
LeVeque 1983, "Algorithms for Computing the Sample Variance"). The second mean is rounded away when the mean is kept,
and the backward pass takes it again, of the normalised row.
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from mmbase_kernels.layer_norm_tuning import WIDTHS, plan
from mmbase_kernels.shipping import DTYPES, Shipped

GATHERED = ("gather", "gather one")
"""Rows by a token of their own, or by the same one everywhere."""
CASES = ("plain", "add", *GATHERED)
COUNTS = ("rows", "token", "span")
"""Integers for whose values 1 and 16 nothing is compiled anew."""


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernels of this module that runs on an architecture."""
    for dtype, bits in DTYPES:
        for step, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
            for width in WIDTHS:
                for case in CASES if width == WIDTHS[0] else ("plain", "add"):
                    yield _shipped(step, kernel, architecture, dtype, dtype, width, case)
            if bits == 16:
                yield _shipped(step, kernel, architecture, dtype, "fp32", WIDTHS[0], "add")


def _shipped(step: str, kernel: Any, architecture: str, dtype: str, weights: str, width: int, case: str) -> Shipped:
    chosen = plan(step, width)
    constants: dict[str, Any] = {"D": width, **chosen.constants(), "GATHER": case in GATHERED, "PARTIALS": 2}
    if case != "add":
        constants |= {"branch": None, "total": None, "grad_total": None}
    if case != "gather":
        constants["tokens"] = None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(("x", "branch", "total", "out", "grad_out", "grad_total", "grad_x"), f"*{dtype}")
    types |= {"weight": f"*{weights}", "bias": f"*{weights}", "tokens": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("mean", "rstd", "partials"), "*fp32") | dict.fromkeys(COUNTS, "i32")
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    config = f"{dtype} D{width} {case} {'' if weights == dtype else weights + ' weights '}{chosen}"
    options = chosen.options()
    return Shipped(f"layer_norm_{step}", architecture, config, kernel, signature, constants, options, matrix=False)


@triton.jit
def places_of(row, valid, tokens, token, span, GATHER: tl.constexpr):
    """Where rows lie in the input, and which exist: with GATHER each is one token of the ``span`` of a sequence."""
    if GATHER:
        if tokens is None:
            picked = token + tl.zeros_like(row)
        else:
            picked = tl.load(tokens + row, valid, 0).to(tl.int64)
        return row * span + picked, valid & (picked >= 0) & (picked < span)
    else:
        return row, valid


@triton.jit
def within(valid, D: tl.constexpr, WIDTH: tl.constexpr):
    """Mask [ROWS, WIDTH] of the columns below D of the rows that exist."""
    inside = valid[:, None]
    if WIDTH > D:
        inside = inside & (tl.arange(0, WIDTH) < D)[None, :]
    return inside


@triton.jit
def load_line(pointer, D: tl.constexpr, WIDTH: tl.constexpr):
    """float32 [1, WIDTH] of a vector [D]; zero from there on."""
    d = tl.arange(0, WIDTH)
    return tl.load(pointer + d, d < D, 0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x,  # [X, D]
    branch,  # [R, D], or None
    tokens,  # int64 [R], or None: read with GATHER
    weight,  # [D]
    bias,  # [D], or None
    total,  # [R, D]: x + branch; None without a branch
    out,  # [R, D]
    mean,  # float32 [R]
    rstd,  # float32 [R]
    eps,
    rows,
    token,
    span,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """LayerNorm of rows of the input, or of their sum with those of a branch, as it is rounded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place, exists = places_of(row, row < rows, tokens, token, span, GATHER)
    d = tl.arange(0, WIDTH)[None, :]
    target = row[:, None] * D + d
    inside = within(exists, D, WIDTH)
    values = tl.load(x + place[:, None] * D + d, inside, 0.0).to(tl.float32)
    if branch is not None:
        values += tl.load(branch + target, inside, 0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + target, rounded, inside)
        values = rounded.to(tl.float32)
    middle = tl.sum(values, 1) / D
    centred = tl.where(inside, values - middle[:, None], 0.0)
    drift = tl.sum(centred, 1) / D
    variance = tl.maximum(tl.sum(centred * centred, 1) / D - drift * drift, 0.0)
    scale = tl.rsqrt(variance + eps)
    if GATHER:
        scale = tl.where(exists, scale, float("nan"))  # of a token that does not exist
    result = (centred - drift[:, None]) * scale[:, None] * load_line(weight, D, WIDTH)
    if bias is not None:
        result += load_line(bias, D, WIDTH)
    tl.store(out + target, result.to(out.dtype.element_ty), within(row < rows, D, WIDTH))
    tl.store(mean + row, middle + drift, row < rows)
    tl.store(rstd + row, scale, row < rows)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_out,  # [R, D]
    grad_total,  # [R, D], the gradient to x + branch from elsewhere, or None
    x,  # [X, D]: what was normalised
    tokens,  # int64 [R], or None: read with GATHER
    weight,  # [D]
    mean,  # float32 [R]
    rstd,  # float32 [R]
    grad_x,  # [X, D]: rows that are not gathered stay as they are
    partials,  # float32 [PARTIALS, P, D]: gradients to weight and bias, or None
    rows,
    token,
    span,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GATHER: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Gradient to what was normalised, and each program's share of the gradients to weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    factor = load_line(weight, D, WIDTH)
    weight_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    bias_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        place, exists = places_of(row, row < rows, tokens, token, span, GATHER)
        inside = within(exists, D, WIDTH)
        source = place[:, None] * D + d
        target = row[:, None] * D + d
        grad = tl.load(grad_out + target, inside, 0.0).to(tl.float32)
        values = tl.load(x + source, inside, 0.0).to(tl.float32)
        scale = tl.load(rstd + row, row < rows, 0.0)[:, None]
        centre = tl.load(mean + row, row < rows, 0.0)[:, None]
        normed = tl.where(inside, (values - centre) * scale, 0.0)
        normed = tl.where(inside, normed - tl.sum(normed, 1)[:, None] / D, 0.0)
        if PARTIALS > 0:
            weight_sum += grad * normed
        if PARTIALS > 1:
            bias_sum += grad
        grad *= factor
        along = tl.sum(grad * normed, 1)[:, None] / D
        level = tl.sum(grad, 1)[:, None] / D
        result = (grad - normed * along - level) * scale
        if grad_total is not None:
            result += tl.load(grad_total + target, inside, 0.0).to(tl.float32)
        tl.store(grad_x + source, result.to(grad_x.dtype.element_ty), inside)
    column = tl.arange(0, WIDTH)
    if PARTIALS > 0:
        tl.store(partials + program * D + column, tl.sum(weight_sum, 0), column < D)
    if PARTIALS > 1:
        tl.store(partials + (programs + program) * D + column, tl.sum(bias_sum, 0), column < D)
