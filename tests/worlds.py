"""Tests over processes: worlds of ranks on this machine, each world forked from one process that imported everything.

A worker is a script beside its test. Its ``run_rank(rank, world, folder)`` saves what it found as ``RANK of WORLD.pt``
in the folder, and it ends with :func:`main`; the test starts it by :func:`run_worker`.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent


def run_worker(worker: Path, folder: Path, worlds: Sequence[int], *, timeout: float) -> Callable[[int], list[Any]]:
    """Run all ranks of all worlds; ``of(world)`` is then what its ranks saved, in rank order."""
    path = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(worker), str(folder), *map(str, worlds)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:]

    @functools.cache
    def of(world: int) -> list[Any]:
        return [torch.load(folder / f"{rank} of {world}.pt") for rank in range(world)]

    return of


def main(run_rank: Callable[[int, int, Path], None]) -> None:
    """``python WORKER FOLDER WORLD [WORLD ...]``: one world after the other, up to the first of which a rank fails.

    Ranks find their place in the environment, as torchrun leaves it.
    """
    folder, worlds = Path(sys.argv[1]), map(int, sys.argv[2:])
    context = multiprocessing.get_context("fork")
    for world in worlds:
        with torch.random.fork_rng():
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [
            context.Process(target=_take_place, args=(run_rank, rank, world, store.port, folder))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        running = list(ranks)
        while running and not any(process.exitcode for process in ranks):
            multiprocessing.connection.wait([process.sentinel for process in running])
            running = [process for process in ranks if process.exitcode is None]
        for process in ranks:
            process.kill()
        if any(process.exitcode for process in ranks if process not in running):
            sys.exit(f"a rank of {world} failed")


def _take_place(run_rank: Callable[[int, int, Path], None], rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    run_rank(rank, world, folder)
