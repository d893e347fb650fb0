"""Peak memory of one call beyond its inputs: the allocator's counter on CUDA, the resident set on a CPU.

On a CPU the contenders run in a child process. A first call of each pays for imports, compilation and thread pools;
then freed memory goes back to the system, the kernel's high-water mark (VmHWM) is reset to what is resident (``5`` into
``clear_refs``), and a second call shows its peak. A child may take no more than most of the free memory: a contender
that wants more fails with its error, and the machine goes on.

    python -m mmbase_bench.memory mmbase_bench.loss_contenders:calls '{"contenders": ["openclip"], ...}'
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mmbase_bench.harness import reason

FREE_SHARE = 0.85
"""Share of the memory free at the start that a child may take."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc maps blocks from 1 MiB up by themselves, so that what is freed leaves the resident set at once."""
Calls = Iterator[tuple[str, Callable[[], object]]]
Peak = int | str | None
"""Bytes; why the contender failed; None where the system does not tell."""


def cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes the CUDA allocator held at most during `call`, beyond what it held before; the result is dropped."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peaks(factory: str, arguments: dict[str, Any], names: list[str], timeout: float) -> dict[str, Peak]:
    """Peak resident bytes beyond inputs of each contender, or why there is no figure.

    Args:
        factory: ``module:function``; the function takes ``contenders=names`` and `arguments` and yields (name, call).
        timeout: seconds for one child; what has not reported by then is given up.
    """
    found: dict[str, Peak] = {}
    pending = list(names)
    while pending:
        command = [sys.executable, "-m", __name__, factory, json.dumps({"contenders": pending} | arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | ALLOCATOR)
            output, died = done.stdout, f"the process measuring memory died (exit {done.returncode})"
            if done.returncode == -9:
                died = "killed: out of memory"
        except subprocess.TimeoutExpired as late:
            output, died = _text(late.stdout), f"the process measuring memory took over {timeout:.0f} s"
        for line in output.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                found[row["contender"]] = row["problem"] if "problem" in row else row["peak_bytes"]
        pending = [name for name in pending if name not in found]
        if pending:
            found[pending.pop(0)] = died
    return found


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def resident_peak(call: Callable[[], object]) -> int:
    """Bytes by which `call` raises the resident set of this process at most; Linux.

    Raises:
        OSError: the system does not let the high-water mark be reset.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise OSError("there is no /proc/self/clear_refs to write to")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def limit_memory() -> None:
    """Let this process take at most FREE_SHARE of the memory now free, so that too much raises instead of killing."""
    if not Path("/proc/meminfo").exists():  # not Linux
        return
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
            resource.setrlimit(
                resource.RLIMIT_DATA, (_status("VmData") + int(FREE_SHARE * free), resource.RLIM_INFINITY)
            )


def main() -> None:
    """The child: one JSON line per contender on stdout."""
    module, _, function = sys.argv[1].partition(":")
    arguments = json.loads(sys.argv[2])
    limit_memory()
    calls: Calls = getattr(importlib.import_module(module), function)(**arguments)
    for name, call in calls:
        row: dict[str, Any] = {"contender": name, "peak_bytes": None}
        try:
            call()
            with contextlib.suppress(OSError):  # a system without these files of Linux
                row["peak_bytes"] = resident_peak(call)
        except Exception as error:
            row = {"contender": name, "problem": reason(error)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
