"""Compile every shipped kernel configuration without a GPU and report what the compiler made of it.

``python -m mmbase_kernels.offline [--targets sm_90 ...] [--kernels statistics ...] [--dtypes bf16 ...] [--json FILE]
[--jobs N]``

The table names kernel, configuration, target, registers per thread, spilled bytes, shared memory, programs that fit on
one multiprocessor, and the matrix instruction of the loop. The exit status is 1 if a configuration does not compile,
for sm_90 spills or, with 16-bit matrices, has no HGMMA, or needs more shared memory than its target has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmbase_kernels.dispatch import interpreted
from mmbase_kernels.shipping import DIVISIBLE, DTYPES, Shipped
from mmbase_kernels.tuning import ARCHITECTURES

MODULES = (
    "softmax_statistics_tiles",
    "softmax_gradient_tiles",
    "sigmoid_tiles",
    "attention_tiles",
    "attention_backward_tiles",
    "head_tiles",
    "layer_norm_tiles",
    "partials_tiles",
    "activation_tiles",
)
"""Modules of this package with a function ``shipped(architecture)``."""
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes one program may use (CUDA programming guide, table of technical specifications; AMD CDNA 3 ISA guide)."""
MATRIX_INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")
"""From the fastest; the first that occurs is reported."""


@dataclass(frozen=True)
class Report:
    """What the compiler made of one configuration."""

    kernel: str
    config: str
    target: str
    registers: int
    spilled: int
    """Bytes of stack and local memory per thread."""
    shared: int
    """Bytes per program."""
    programs: int
    """Programs that fit on one multiprocessor at a time."""
    matrix: str
    problem: str
    """Why the exit status is 1; empty if all is well."""


def shipped(targets: Iterable[str], kernels: Iterable[str] = (), dtypes: Iterable[str] = ()) -> Iterator[Shipped]:
    """Every configuration for the targets; of the named kernels and dtypes, or of all."""
    wanted, of_dtype = set(kernels), set(dtypes)
    for target in targets:
        for name in MODULES:
            for one in importlib.import_module(f"mmbase_kernels.{name}").shipped(target):
                if (not wanted or one.kernel in wanted) and (not of_dtype or one.config.split()[0] in of_dtype):
                    yield one


def compile_one(one: Shipped) -> Report:
    """Compile a configuration and read registers, spills, shared memory and instructions out of the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(one.signature)
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if one.signature[name].startswith("*") or name in DIVISIBLE
    }
    source = ASTSource(one.function, dict(one.signature), dict(one.constants), attributes)
    amd = one.architecture.startswith("gfx")
    target = GPUTarget("hip", one.architecture, 64) if amd else GPUTarget("cuda", int(one.architecture[3:]), 32)
    try:
        kernel = triton.compile(source, target=target, options=dict(one.options))
    except Exception as error:  # whatever the compiler raises is a row of the table, not the end of it
        reason = " ".join(str(error).split())[-200:]
        return Report(one.kernel, one.config, one.architecture, 0, 0, 0, 0, "", f"does not compile: {reason}")
    read = _read_amd if amd else _read_nvidia
    registers, spilled, matrix = read(kernel)
    shared, warps = kernel.metadata.shared, one.options["num_warps"]
    problems = []
    if shared > SHARED_LIMIT[one.architecture]:
        problems.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[one.architecture]} exist")
    if one.architecture == "sm_90" and spilled:
        problems.append(f"{spilled} bytes spilled")
    if one.architecture == "sm_90" and one.matrix and matrix != "HGMMA":
        problems.append(f"{matrix or 'no matrix instruction'} instead of HGMMA")
    programs = programs_per_multiprocessor(one.architecture, registers, warps, shared)
    problem = "; ".join(problems)
    return Report(one.kernel, one.config, one.architecture, registers, spilled, shared, programs, matrix, problem)


def programs_per_multiprocessor(architecture: str, registers: int, warps: int, shared: int) -> int:
    """How many programs registers, shared memory and warp slots admit at a time."""
    if architecture == "gfx942":  # four SIMDs of 512 registers and 8 waves; 64 KiB per compute unit
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(4 * waves // warps, 65536 // shared if shared else 4 * waves // warps)
    per_warp = -(-registers * 32 // 256) * 256
    capacity = (164 if architecture == "sm_80" else 228) << 10
    return min(65536 // (per_warp * warps), capacity // (shared + 1024), 64 // warps)


def _read_nvidia(kernel: Any) -> tuple[int, int, str]:
    """Registers, spilled bytes and matrix instruction of a CUDA binary."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary)
        instructions = set(re.findall(r"\b[A-Z]{4,}\b", _output(knobs.nvidia.nvdisasm.path, "-c", binary)))
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    matrix = next((name for name in MATRIX_INSTRUCTIONS if name in instructions), "")
    return found["REG"], found["STACK"] + found["LOCAL"], matrix


def _read_amd(kernel: Any) -> tuple[int, int, str]:
    """The same of an AMD assembly listing, whose registers are vector and accumulation registers together."""
    text = kernel.asm["amdgcn"]
    found = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    matrix = "MFMA" if "v_mfma" in text else "FMA" if "_fma_" in text or "_fmac_" in text else ""
    return found["vgpr_count"], found["private_segment_fixed_size"], matrix


def _output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _compile_numbered(choice: tuple[list[str], ...], number: int, end: Connection) -> None:
    """In a process of its own: functions under ``triton.jit`` do not travel between processes, numbers do."""
    end.send(compile_one(list(shipped(*choice))[number]))


def reports(targets: list[str], kernels: list[str], dtypes: list[str], jobs: int) -> list[Report]:
    """Compile all configurations, ``jobs`` at a time, in a cache of their own that is left empty behind.

    Each has a process, forked from one that has imported Triton already: a failed assertion of the compiler ends the
    process, and is a row of the table like any other failure.
    """
    choice = (targets, kernels, dtypes)
    ones = list(shipped(*choice))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triton.compiler", *(f"mmbase_kernels.{name}" for name in MODULES)])

    def one(number: int) -> Report:
        end, far_end = context.Pipe(duplex=False)
        process = context.Process(target=_compile_numbered, args=(choice, number, far_end))
        process.start()
        far_end.close()
        try:
            return end.recv()
        except EOFError:
            lost = ones[number]
            return Report(lost.kernel, lost.config, lost.architecture, 0, 0, 0, 0, "", "the compiler crashed")
        finally:
            process.join()

    with tempfile.TemporaryDirectory() as folder:
        previous = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = folder  # the processes inherit it
        try:
            with ThreadPoolExecutor(jobs) as pool:
                return list(pool.map(one, range(len(ones))))
        finally:
            if previous is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = previous


def table(rows: list[Report]) -> str:
    """The reports in aligned columns."""
    heads = ("kernel", "config", "target", "regs", "spill", "shared", "per SM", "matrix", "problem")
    cells = [heads, *(tuple(str(value) for value in asdict(row).values()) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmbase_kernels.offline", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernels", nargs="+", default=[], help="only these; all if not given")
    parser.add_argument(
        "--dtypes", nargs="+", default=[], choices=[name for name, _ in DTYPES], help="all if not given"
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel processes")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled: unset it")
    known = {one.kernel for one in shipped(options.targets)}
    if unknown := set(options.kernels) - known:
        parser.error(f"no kernel {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    rows = reports(options.targets, options.kernels, options.dtypes, options.jobs)
    print(table(rows))
    failed = [row for row in rows if row.problem]
    print(f"{len(rows)} configurations, {len(failed)} with a problem")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
