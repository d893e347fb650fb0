"""Checked-in configurations of the Triton kernels: nothing is tuned at import or at first use.

Every row was chosen from what the compiler reports (``python -m mmbase_kernels.offline``: registers, spills, shared
memory, programs per multiprocessor) and says why.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE = 1024
"""From this width on a tile's products take so long that its epilogue matters less than the bytes they read."""


def triton_version() -> tuple[int, ...]:
    """Major and minor version of the Triton installed; empty if there is none. Registers differ between them."""
    try:
        major, minor, *_ = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return int(major), int(minor)


@dataclass(frozen=True)
class Tile:
    """Shape and schedule of a tiled kernel: a tile of M by N, the width walked in steps of D."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    parts: int = 4
    """Groups of columns that the epilogue takes one after the other; the statistics take the tile at once."""
    registers: int | None = None
    """Cap per thread on NVIDIA devices: 128 is what two programs of 8 warps leave each other."""
    group: int = 16
    """Rows of tiles that run together: with 16, the 264 tiles in flight on 132 SMs read a square of the operands."""

    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.block_d,
            "GROUP": self.group,
            "PARTS": self.parts,
        }

    def options(self, architecture: str) -> dict[str, Any]:
        """The compiler's options. Multiplications and additions fuse everywhere, whatever Triton's default is."""
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.registers and architecture.startswith("sm_"):
            options["maxnreg"] = self.registers
        return options

    def __str__(self) -> str:
        cap = f" r{self.registers}" if self.registers else ""
        return f"{self.block_m}x{self.block_n}x{self.block_d}/{self.parts} w{self.warps} s{self.stages}{cap}"


Tiles = Mapping[str, tuple[Tile, Tile]]
"""By architecture, the tile below WIDE and the one from there on."""


def _sixteen(narrow: Tile, wide: Tile) -> Tiles:
    """Tiles for 16-bit features, given those of sm_90."""
    return {
        "sm_90": (narrow, wide),
        # The accumulator lives in tensor memory, so that registers need no cap; the same tiles, not yet timed.
        "sm_100": (dataclasses.replace(narrow, registers=None), wide),
        # 48 KB; HMMA keeps its operands in registers, so one program per SM. Fits sm_86, sm_89 and sm_120 too.
        "sm_80": (Tile(128, 128, 32, warps=8, stages=4),) * 2,
        # The 64 KB of local data share go to the change of layout before the stores: one program per compute unit.
        "gfx942": (Tile(128, 128, 32, warps=8, stages=2),) * 2,
    }


# Two programs per SM: one's epilogue runs under the other's products. 96 KB of shared memory each.
_TWO_PER_SM = Tile(128, 128, 64, warps=8, stages=3, registers=128)
# One program per SM whose products read a quarter fewer bytes from the L2; four stages fill 192 KB.
_ONE_PER_SM = Tile(128, 256, 64, warps=8, stages=4)
# Identities take 20 registers more than two programs per SM leave, and would spill.
_WITH_IDS = Tile(128, 128, 64, warps=8, stages=4)
# Products in float32 run on the ordinary units, whose operands come through registers: small tiles, or they spill.
_THIRTY_TWO: Tiles = {name: (Tile(64, 64, 16, warps=4, stages=2),) * 2 for name in ARCHITECTURES}
# In four parts triton 3.6 spills 8 bytes; in eight, 3.7 to 3.9 do.
_STATISTICS = dataclasses.replace(_TWO_PER_SM, parts=8 if triton_version() < (3, 7) else 4)
# With both maxima of a tile at hand, eight parts are what fits 128 registers.
_EIGHT_PARTS = _sixteen(dataclasses.replace(_TWO_PER_SM, parts=8), dataclasses.replace(_ONE_PER_SM, parts=8))

TILES: Mapping[str, Mapping[int, Tiles]] = {
    "statistics": {16: _sixteen(_STATISTICS, dataclasses.replace(_ONE_PER_SM, parts=8)), 32: _THIRTY_TWO},
    "statistics ids": {16: _sixteen(_WITH_IDS, _WITH_IDS), 32: _THIRTY_TWO},
    "statistics stash": {16: _EIGHT_PARTS, 32: _THIRTY_TWO},
    "gradient": {16: _sixteen(_TWO_PER_SM, _ONE_PER_SM), 32: _THIRTY_TWO},
    "gradient ids": {16: _sixteen(_WITH_IDS, _WITH_IDS), 32: _THIRTY_TWO},
    "sigmoid": {16: _sixteen(_TWO_PER_SM, _ONE_PER_SM), 32: _THIRTY_TWO},
    "sigmoid ids": {16: _sixteen(_WITH_IDS, _WITH_IDS), 32: _THIRTY_TWO},
}
"""By table name and bits of the features' dtype."""


def table_name(kernel: str, *, ids: bool, stash: bool = False) -> str:
    """Which row of TILES a kernel uses; a stash is read in the tiles in which the statistics wrote it."""
    if stash:
        kernel = "statistics"
    return f"{kernel} ids" if ids else f"{kernel} stash" if stash else kernel


def tile(table: str, dtype: torch.dtype, width: int, architecture: str) -> Tile:
    """The checked-in tile of a row of TILES for features of a dtype and width on one of ARCHITECTURES."""
    return TILES[table][8 * dtype.itemsize][architecture][width >= WIDE]


def uses_pointers(architecture: str) -> bool:
    """Whether blocks are loaded through pointers: sm_80 and gfx942 have nothing that copies by descriptor."""
    return architecture in ("sm_80", "gfx942")


def architecture(device: torch.device) -> str:
    """The row of the tables for a device; the interpreter's CPU reads the one of sm_90.

    Devices between the rows take the one below them; sm_120 has less shared memory than sm_100 and takes that of sm_80.
    """
    # A graph that is traced would warn of the cache.
    return _architecture(device) if torch.compiler.is_compiling() else _cached_architecture(device)


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_properties(device).major, "sm_80")


_cached_architecture = functools.cache(_architecture)
