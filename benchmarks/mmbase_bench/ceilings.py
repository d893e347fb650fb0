"""What the machine at hand can do: matrix products and copies, measured on the spot.

Letters: M rows, N columns, K the dimension summed over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from mmbase.files import write_atomically
from mmbase_bench.options import DTYPES, Parser, check_names, device_of, run

CUDA_ROWS, CPU_ROWS = 32768, 4096
"""Rows and columns at most of the matrix products that are timed; larger ones run no faster."""
CUDA_COPY_BYTES, CPU_COPY_BYTES = 2 << 30, 256 << 20
MIN_REPEATS, MAX_REPEATS, MIN_SECONDS = 7, 200, 0.2
"""A ceiling is the best of at least so many calls, more where they are short."""


@dataclass(frozen=True)
class Ceilings:
    """The best rates found."""

    matmul_flops: float
    """FLOP per second, the best of `matmul_shapes`."""
    copy_bytes: float
    """Bytes per second, read and written both counted."""
    matmul_shapes: dict[str, float]
    """FLOP per second by shape ``MxNxK``."""


@lru_cache(maxsize=64)
def measure_ceilings(device: torch.device, dtype: torch.dtype, size: int, width: int, threads: int) -> Ceilings:
    """Ceilings for products of `size` rows and columns at `width`: logits (K = width) and gradients (K = size).

    `threads` (CPU) is a key of the cache only; set it with ``torch.set_num_threads`` beforehand. float32 products are
    true float32: TF32 is not PyTorch's default.
    """
    assert device.type == "cuda" or threads == torch.get_num_threads()
    rows = min(size, CUDA_ROWS if device.type == "cuda" else CPU_ROWS)
    shapes = {}
    for m, n, k in ((rows, rows, width), (rows, width, rows)):
        shapes[f"{m}x{n}x{k}"] = matmul_rate(device, dtype, m, n, k)
    return Ceilings(max(shapes.values()), copy_rate(device), shapes)


def matmul_rate(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> float:
    """FLOP per second of one ``[m, k] @ [k, n]`` on random data; zeros would run faster than real data do."""
    left_MK = torch.randn(m, k, device=device, dtype=dtype)
    right_KN = torch.randn(n, k, device=device, dtype=dtype).T
    out_MN = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * n * k / fastest(lambda: torch.mm(left_MK, right_KN, out=out_MN), device)


@lru_cache(maxsize=4)
def copy_rate(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy far larger than any cache."""
    count = (CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES) // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * count / fastest(lambda: target.copy_(source), device)


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the best of many after a warm-up; on CUDA each is the mean of ten in a row."""
    for _ in range(3):
        call()
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or (sum(seconds) < MIN_SECONDS and len(seconds) < MAX_REPEATS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(10):
                call()
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(end) / 1e4)
        else:
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    """Print the ceilings of logits of several widths, and write them as JSON where ``--output`` names a file."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", help="fp32, fp16, bf16; fp32, on a GPU bf16")
    parser.add_argument("--size", type=int, help="rows and columns of the logits; 4096, on a GPU 32768")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse()
    device = device_of(options.device)
    cuda = device.type == "cuda"
    name = options.dtype or ("bf16" if cuda else "fp32")
    check_names("--dtype", [name], DTYPES)
    size = options.size or (CUDA_ROWS if cuda else CPU_ROWS)
    shapes = [(size, size, width) for width in options.widths] + [(8192, 8192, 8192)] * cuda
    rates = {f"{m}x{n}x{k}": matmul_rate(device, DTYPES[name], m, n, k) for m, n, k in shapes}
    for shape, rate in rates.items():
        print(f"matmul {shape} {name}: {rate / 1e12:.2f} TFLOP/s", flush=True)
    copied = copy_rate(device)
    print(f"copy, read and written: {copied / 1e9:.1f} GB/s")
    if options.output:
        record = {"matmul_flops": rates, "dtype": name, "copy_bytes": copied, "device": str(device)}
        write_atomically(options.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
