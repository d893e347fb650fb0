"""The Triton kernels of the activation; :mod:`mmbase_kernels.activation_triton` launches them.

Letters: R rows, D width, P spans of rows.
"""

# pyrefly: ignore-errors
# Under triton.jit this is Triton's language, in which names, types and branches follow other rules than Python's.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import triton
import triton.language as tl

from mmbase_kernels.shipping import DTYPES, Shipped

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
FORWARD: Mapping[str, Any] = {"BLOCK_M": 16, "BLOCK_D": 256}
BACKWARD: Mapping[str, Any] = {"BLOCK_M": 8, "BLOCK_D": 256}
"""A warp reads 512 bytes of a row of 16-bit numbers, 16 bytes a lane. With 16 rows the backward pass would take 100
registers, and only two of its programs run at a time."""
OPTIONS: Mapping[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)
INVERSE_ROOT_TAU = tl.constexpr(0.3989422804014327)
TWICE_ROOT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def reciprocal(d, NARROW: tl.constexpr):
    """1 / d of d >= 1; for 16 bits to 4e-7 in two instructions, where a division takes eight."""
    if NARROW:
        root = tl.rsqrt(d)
        return root * root
    else:
        return 1.0 / d


@triton.jit
def gaussian(h, NARROW: tl.constexpr):
    """Normal distribution up to h, and exp(-h²/2): one exponential for both.

    ``Phi(-|h|) = exp(-h²/2) t P(t)`` with ``t = 1 / (1 + c |h|)``, P a fit of least relative error: 1.6e-8, or 4.6e-6,
    which 16 bits do not see. Unlike ``(1 + erf) / 2`` it keeps its digits where h is very negative.
    """
    bell = tl.exp2(h * h * (-0.5 * LOG2E))
    if NARROW:
        t = reciprocal(1.0 + 0.31 * tl.abs(h), NARROW)
        p = -0.073929157 * t + 0.18045039
        p = p * t + 0.015744663
        p = p * t + 0.13342981
        p = p * t + 0.12044127
        p = p * t + 0.12386070
    else:
        t = reciprocal(1.0 + 0.21 * tl.abs(h), NARROW)
        p = -0.071656250 * t + 0.28358829
        p = p * t - 0.33025273
        p = p * t + 0.34940021
        p = p * t - 0.093924626
        p = p * t + 0.12487247
        p = p * t + 0.069192237
        p = p * t + 0.085068848
        p = p * t + 0.083711576
    tail = p * t * bell
    return tl.where(h < 0, tail, 1.0 - tail), bell


@triton.jit
def steep(h, ACTIVATION: tl.constexpr):
    """What the approximations take the logistic function of, in powers of two: -log2(e) y, and its derivative by h.

    ``(1 + tanh(y / 2)) / 2`` is the logistic function of y.
    """
    if ACTIVATION == "gelu_tanh":
        cubed = h * h * (-LOG2E * TWICE_ROOT_2_OVER_PI * 0.044715)
        steepness = h * h * (TWICE_ROOT_2_OVER_PI * 0.134145) + TWICE_ROOT_2_OVER_PI
        return h * (cubed - LOG2E * TWICE_ROOT_2_OVER_PI), steepness
    else:
        return h * (-LOG2E * 1.702), 1.702


@triton.jit
def activated(h, ACTIVATION: tl.constexpr, NARROW: tl.constexpr):
    """The activation of float32 numbers."""
    if ACTIVATION == "gelu":
        share, _ = gaussian(h, NARROW)
        return h * share
    else:
        y, _ = steep(h, ACTIVATION)
        return h * reciprocal(1.0 + tl.exp2(y), NARROW)


@triton.jit
def slope(h, ACTIVATION: tl.constexpr, NARROW: tl.constexpr):
    """The derivative of :func:`activated`."""
    if ACTIVATION == "gelu":
        share, bell = gaussian(h, NARROW)
        return share + h * bell * INVERSE_ROOT_TAU
    else:
        # Beyond 10, of quick_gelu 40, it is 0 or 1; within, the odds are finite and keep the digits of 1 - share.
        LIMIT: tl.constexpr = 10.0 if ACTIVATION == "gelu_tanh" else 40.0
        h = tl.clamp(h, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        y, steepness = steep(h, ACTIVATION)
        odds = tl.exp2(y)
        share = reciprocal(1.0 + odds, NARROW)
        return share + h * steepness * share * (odds * share)


@triton.jit
def forward_kernel(
    x,  # [R, D]
    bias,  # float32 [D], or None
    out,  # [R, D]
    rows,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of the output; blocks that are neighbours along a row are programs that are."""
    NARROW: tl.constexpr = x.dtype.element_ty != tl.float32
    blocks = tl.cdiv(width, BLOCK_D)
    first = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (first + row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    h = tl.load(x + first * width + place, inside, 0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + column, column < width, 0.0)[None, :]
    tl.store(out + first * width + place, activated(h, ACTIVATION, NARROW).to(out.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    grad,  # [R, D]
    x,  # [R, D]
    bias,  # float32 [D], or None
    grad_x,  # [R, D]
    partial,  # float32 [P, D], or None
    rows,
    width,
    span,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of a span of rows: the gradient to x, and its sum over the span before it is rounded."""
    NARROW: tl.constexpr = x.dtype.element_ty != tl.float32
    blocks = tl.cdiv(width, BLOCK_D)
    part = tl.program_id(0) // blocks
    start = part.to(tl.int64) * span
    stop = tl.minimum(start + span, rows)
    row = tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = row[:, None] * width + column[None, :]
    if bias is not None:
        shift = tl.load(bias + column, column < width, 0.0)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_M):
        inside = (first + row < stop)[:, None] & (column < width)[None, :]
        h = tl.load(x + first * width + place, inside, 0.0).to(tl.float32)
        incoming = tl.load(grad + first * width + place, inside, 0.0).to(tl.float32)
        if bias is not None:
            h += shift
        gradient = incoming * slope(h, ACTIVATION, NARROW)
        tl.store(grad_x + first * width + place, gradient.to(grad_x.dtype.element_ty), inside)
        total += gradient
    if partial is not None:
        tl.store(partial + part.to(tl.int64) * width + column, tl.sum(total, 0), column < width)


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every configuration of the kernels of this module that runs on an architecture."""
    for dtype, _ in DTYPES:
        for activation in ACTIVATIONS:
            for absent in ((), ("bias",)):
                yield _shipped("activation", forward_kernel, architecture, dtype, activation, absent)
            for absent in ((), ("partial",), ("bias", "partial")):
                yield _shipped("activation_backward", backward_kernel, architecture, dtype, activation, absent)


def _shipped(
    kernel: str, function: Any, architecture: str, dtype: str, activation: str, absent: tuple[str, ...]
) -> Shipped:
    blocks = FORWARD if function is forward_kernel else BACKWARD
    constants: dict[str, Any] = {"ACTIVATION": activation, **blocks}
    constants |= dict.fromkeys(absent)
    types = {"bias": "*fp32", "partial": "*fp32", "rows": "i32", "width": "i32", "span": "i32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in function.arg_names
    }
    config = " ".join((dtype, activation, *(f"no {name}" for name in absent)))
    return Shipped(kernel, architecture, config, function, signature, constants, OPTIONS, matrix=False)
