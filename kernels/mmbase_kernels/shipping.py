"""How a kernel module declares what it ships, for :mod:`mmbase_kernels.offline` to compile without a GPU.

A module of kernels has a function ``shipped(architecture)`` that yields every configuration it can launch there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmbase_kernels.tuning import TILES, Tile, table_name, uses_pointers

DTYPES = (("bf16", 16), ("fp16", 16), ("fp32", 32))
DIVISIBLE = frozenset({"width", "row_stride", "column_stride", "stash_stride", "chunk_stride"})
"""Integers that are multiples of 16 in every launch that matters; the compiler vectorises copies by them."""
NEEDED_BY: Mapping[str, tuple[str, ...]] = {
    "COLUMNS": ("column_sum", "column_peak", "column_lse", "column_weight", "column_factor"),
    "IDS": ("image_ids", "text_ids", "row_share", "column_share", "positive"),
    "SMOOTH": ("row_smooth", "column_smooth"),
    "STASH": ("stash",),
    "TOPS": ("row_top", "column_top"),
    "GRADIENTS": ("chunk", "cosine_partial", "bias_partial"),
}
"""Arguments that are None unless a compile-time flag is set."""
SMALL: Mapping[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
"""Options of kernels without a table of tiles."""


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration for one architecture."""

    kernel: str
    architecture: str
    config: str
    """What distinguishes it: dtype, flags and tile."""
    function: Any
    """The function under ``triton.jit``."""
    signature: Mapping[str, str]
    """Triton's type of every argument by name, ``constexpr`` for compile-time ones."""
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    matrix: bool
    """Whether it multiplies 16-bit matrices, so that its loop must use the tensor cores."""


def tiled(kernel: str, function: Any, architecture: str, **flags: int) -> Iterator[Shipped]:
    """A kernel over tiles of the logits, for every dtype and every tile of the tables.

    Args:
        kernel: its name in the tables.
        function: the function under ``triton.jit``.
        architecture: one of :data:`mmbase_kernels.tuning.ARCHITECTURES`.
        flags: compile-time arguments, 0 or 1.
    """
    table = table_name(kernel, ids=bool(flags.get("IDS")), stash=bool(flags.get("STASH")))
    for dtype, bits in DTYPES:
        for tile in dict.fromkeys(TILES[table][bits][architecture]):
            yield _one_tiled(kernel, function, architecture, dtype, bits, tile, dict(flags))


def _one_tiled(
    kernel: str, function: Any, architecture: str, dtype: str, bits: int, tile: Tile, flags: dict[str, Any]
) -> Shipped:
    pointers = uses_pointers(architecture)
    stashed = flags.get("STASH") and kernel == "gradient"
    absent = {name for flag, names in NEEDED_BY.items() if not flags.get(flag, flag == "GRADIENTS") for name in names}
    if "STASH" in flags:
        flags["TOPS"] = flags["STASH"] and bits == 16
        absent -= set(NEEDED_BY["TOPS"]) if flags["TOPS"] else set()
    absent |= {"image", "text"} if stashed else set()
    absent |= {"match_gradient"} if flags.get("IDS") else set()
    on = " ".join(name.lower() for name, value in flags.items() if value and name != "TOPS")
    if "GRADIENTS" in flags:
        flags["INVERSE_UNIT"] = 2.0**14 if dtype == "fp16" else 1.0
    block_n = tile.block_n // tile.parts
    blocks = {
        "image": (dtype, tile.block_m, tile.block_d),
        "text": (dtype, tile.block_n, tile.block_d),
        "chunk": (dtype, tile.block_m, block_n),
        "stash": ("fp16" if bits == 16 else "fp32", tile.block_m, block_n),
    }
    constants = {**tile.constants(), "POINTERS": pointers, **{name: _flag(value) for name, value in flags.items()}}
    signature = {}
    for name in function.arg_names:
        if name in absent or name in constants:
            signature[name] = "constexpr"
        elif name in blocks:
            element, rows, columns = blocks[name]
            signature[name] = f"*{element}" if pointers else f"tensordesc<{element}[{rows}, {columns}]>"
        else:
            signature[name] = _type(name, dtype)
    constants = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    config = f"{dtype} {on or 'plain'} {tile}"
    matrix = bits == 16 and not stashed
    return Shipped(kernel, architecture, config, function, signature, constants, tile.options(architecture), matrix)


def small(kernel: str, function: Any, architecture: str, dtype: str, **constants: Any) -> Shipped:
    """A kernel without a table of tiles, in its one configuration."""
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in function.arg_names}
    return Shipped(kernel, architecture, dtype, function, signature, constants, SMALL, matrix=False)


def _flag(value: Any) -> Any:
    return value if isinstance(value, float) else bool(value)


def _type(name: str, dtype: str) -> str:
    if name.endswith("_ids"):
        return "*i32"
    if name in ("image", "text"):
        return f"*{dtype}"
    counts = ("rows", "columns", "offset", "count", "length", "stride")
    if name in DIVISIBLE or name in counts or name.endswith(("_start", "_stop")):
        return "i32"
    return "*fp32"
