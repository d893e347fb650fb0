"""Which kernel of attention runs for a shape, and in which configuration: checked in, nothing is tuned at run time.

Chosen, like :mod:`mmbase_kernels.tuning`, from what the compiler reports: registers, spills, shared memory, programs
per multiprocessor. On sm_90 nothing spills.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmbase_kernels.shipping import DTYPES, Shipped

HEAD_WIDTHS = (64, 80, 128)
"""Those whose kernels are compiled by the offline check: the common one, one padded to 128 and the widest."""


@dataclass(frozen=True)
class Plan:
    """A kernel's blocks and schedule."""

    kernel: str
    blocks: Mapping[str, int]
    warps: int
    stages: int
    longest: int | None = None
    """Tokens of the longest sequence that it takes; None: any."""
    ragged: bool = True
    """Whether it takes causal sequences and ones of different lengths."""

    def options(self) -> dict[str, Any]:
        """The compiler's options. Multiplications and additions fuse everywhere, whatever Triton's default is."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def _forward(n1: int, n2: int = 0, n3: int = 0, *, block_m: int = 64, ragged: bool = True) -> Plan:
    # One stage: queries fetched ahead would take the registers that two programs per multiprocessor leave each other.
    blocks = {"BLOCK_M": block_m, "N1": n1, "N2": n2, "N3": n3}
    return Plan("forward", blocks, warps=4, stages=1, longest=n1 + n2 + n3, ragged=ragged)


def _loop(kernel: str, block_m: int, block_n: int, warps: int, stages: int = 2) -> Plan:
    return Plan(kernel, {"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages)


def _tile(block: int, warps: int) -> Plan:
    return Plan("backward_tile", {"BLOCK": block}, warps, stages=1, longest=block)


Plans = Mapping[str, Sequence[Plan]]
"""By step, the plans from the shortest sequences to the longest: the first that takes a shape is used."""

# Loops over 64 queries rather than 128: 257 tokens then are 320 and not 384.
_SIXTEEN_64: Plans = {
    "forward": (
        _forward(64),
        _forward(64, 16),  # 77 tokens of text
        _forward(128),
        _forward(128, 64, 16, ragged=False),  # 197 tokens: 14 x 14 patches and a class token
        _forward(256, ragged=False),
        _forward(256, 16, ragged=False),  # 257 tokens: 16 x 16 patches and a class token
        _loop("forward_loop", 64, 64, 4),
    ),
    "backward": (
        _tile(64, 4),
        _tile(128, 8),
        # With 64 keys at a time it takes all 255 registers, and spills with Triton 3.6.
        Plan("backward_queries", {"BLOCK_M": 256, "BLOCK_N": 32}, 8, 2, longest=256, ragged=False),
        _loop("grad_queries", 64, 64, 4),
    ),
    "grad_keys": (_loop("grad_keys", 64, 64, 4),),
}
_SIXTEEN_128: Plans = {
    "forward": (_forward(64), _forward(64, 16), _forward(64, 64), _loop("forward_loop", 64, 64, 4)),
    "backward": (_tile(64, 4), _tile(128, 8), _loop("grad_queries", 64, 64, 4)),
    "grad_keys": (_loop("grad_keys", 64, 64, 8),),
}
# Products in float32 run on the ordinary units, whose operands come through registers: small tiles, or they spill.
_THIRTY_TWO_64: Plans = {
    "forward": (_loop("forward_loop", 32, 32, 8, 1),),
    "backward": (_loop("grad_queries", 32, 32, 8, 1),),
    "grad_keys": (_loop("grad_keys", 32, 32, 8, 1),),
}
_THIRTY_TWO_128: Plans = {
    "forward": (_loop("forward_loop", 16, 16, 4, 1),),
    "backward": (_loop("grad_queries", 16, 16, 8, 1),),
    "grad_keys": (_loop("grad_keys", 16, 16, 4, 1),),
}

# HMMA keeps its operands in registers, and so do MFMA's: fewer heads fit one tile, and smaller tiles the loops.
_AMPERE_64: Plans = {
    "forward": (*_SIXTEEN_64["forward"][:5], _loop("forward_loop", 128, 64, 8)),
    "backward": (_tile(64, 4), _tile(128, 8), _loop("grad_queries", 128, 64, 8)),
    "grad_keys": (_loop("grad_keys", 32, 64, 4),),
}
_AMPERE_128: Plans = {
    "forward": _SIXTEEN_128["forward"],
    "backward": (_tile(64, 4), _loop("grad_queries", 64, 32, 4)),
    "grad_keys": (_loop("grad_keys", 64, 64, 8),),
}
_CDNA_64: Plans = {
    "forward": _SIXTEEN_64["forward"],
    "backward": (_tile(64, 4), _loop("grad_queries", 128, 64, 8)),
    "grad_keys": (_loop("grad_keys", 64, 64, 4),),
}
_CDNA_128: Plans = {
    "forward": _SIXTEEN_128["forward"],
    "backward": (_tile(64, 4), _loop("grad_queries", 64, 32, 4)),
    "grad_keys": (_loop("grad_keys", 32, 64, 4),),
}
_THIRTY_TWO = {(32, 64): _THIRTY_TWO_64, (32, 128): _THIRTY_TWO_128}

PLANS: Mapping[str, Mapping[tuple[int, int], Plans]] = {
    "sm_80": {(16, 64): _AMPERE_64, (16, 128): _AMPERE_128, **_THIRTY_TWO},
    "sm_90": {(16, 64): _SIXTEEN_64, (16, 128): _SIXTEEN_128, **_THIRTY_TWO},
    "sm_100": {(16, 64): _SIXTEEN_64, (16, 128): _SIXTEEN_128, **_THIRTY_TWO},  # not yet timed
    "gfx942": {(16, 64): _CDNA_64, (16, 128): _CDNA_128, **_THIRTY_TWO},
}
"""By architecture, bits of the dtype and padded head width."""


def padded(head_width: int) -> int:
    """The width of the kernels' blocks for a head width of up to 128."""
    return 64 if head_width <= 64 else 128


def plan(step: str, dtype: torch.dtype, head_width: int, length: int, architecture: str, *, ragged: bool) -> Plan:
    """The checked-in plan of a step: ``forward``, ``backward``, or ``grad_keys`` after ``grad_queries``."""
    return _first(PLANS[architecture][8 * dtype.itemsize, padded(head_width)][step], length, ragged)


def _first(plans: Sequence[Plan], length: int, ragged: bool) -> Plan:
    return next(p for p in plans if (p.longest is None or length <= p.longest) and (p.ragged or not ragged))


def recomputed(backward: Plan) -> bool:
    """Whether a backward pass computes the softmax again, so that the forward pass need not keep log-sum-exps."""
    return backward.kernel == "backward_tile"


def shipped_of(functions: Mapping[str, Any], architecture: str) -> Iterator[Shipped]:
    """Every configuration of kernels by name that runs on an architecture."""
    for dtype, bits in DTYPES:
        for head_width in HEAD_WIDTHS:
            steps = PLANS[architecture][bits, padded(head_width)]
            for one in (plan for plans in steps.values() for plan in plans if plan.kernel in functions):
                for ragged in (False, True) if one.ragged else (False,):
                    shipped = _shipped(functions[one.kernel], one, steps, architecture, dtype, head_width, ragged)
                    if shipped:
                        yield shipped


def _shipped(
    function: Any, plan: Plan, steps: Plans, architecture: str, dtype: str, head_width: int, ragged: bool
) -> Shipped | None:
    constants: dict[str, Any] = {**plan.blocks, "D": head_width, "WIDTH": padded(head_width)}
    if "RAGGED" in function.arg_names:
        constants["RAGGED"] = ragged
        constants |= {} if ragged else {"cu_seqlens": None}
    elif ragged:
        return None  # the same binary
    if plan.kernel == "forward" and recomputed(_first(steps["backward"], plan.longest or 0, ragged)):
        constants["lse"] = None
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in function.arg_names}
    blocks = " ".join(str(value) for value in plan.blocks.values() if value)
    config = f"{dtype} D{head_width} {'ragged ' if ragged else ''}{blocks} w{plan.warps} s{plan.stages}"
    name = f"attention_{plan.kernel}"
    return Shipped(name, architecture, config, function, signature, constants, plan.options(), dtype != "fp32")


def _type(name: str, dtype: str) -> str:
    if name in ("qkv", "out", "grad", "grad_qkv"):
        return f"*{dtype}"
    if name in ("lse", "delta"):
        return "*fp32"
    return {"cu_seqlens": "*i32", "slope": "fp32", "scale": "fp32"}.get(name, "i32")
