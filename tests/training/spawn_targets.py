"""What ranks run in test_distributed.py; a module that fresh interpreters can import."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from mmbase.errors import MmbaseError
from mmbase.training.distributed import open_ranks
from mmbase.training.hang_watch import Watch


def talk(text: str) -> dict[str, object]:
    """Every way in which ranks speak; a barrier that one does not reach."""
    with open_ranks("cpu") as ranks:
        found: dict[str, object] = {
            "ranks": ranks.gather_objects((ranks.rank, ranks.local_rank, ranks.world_size, str(ranks.device))),
            "told": ranks.broadcast_object(text if ranks.is_first else None),
            "sum": ranks.all_reduce_sum(torch.tensor([1.0, ranks.rank])).tolist(),
        }
        for _ in range(2):
            ranks.barrier("a place")
        if ranks.is_first:
            try:
                ranks.barrier("nowhere", 0.2)
            except MmbaseError as error:
                found["missing"] = str(error)
        return found


def fail(how: str, folder: str) -> None:
    """Rank 1 fails in some way while rank 0 waits for it in a collective."""
    with open_ranks("cpu") as ranks:
        (Path(folder) / str(ranks.rank)).write_text(str(os.getpid()))
        ranks.barrier("the failure")
        if ranks.rank == 1:
            match how:
                case "mistake":
                    raise MmbaseError("training.steps=none is no number")
                case "error":
                    raise ZeroDivisionError("of rank 1")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
        ranks.all_reduce_sum(torch.ones(1))


def all_mistaken() -> None:
    raise MmbaseError("the same on all")


def leave_on_signal(folder: str) -> None:
    """Wait for SIGTERM, then leave with the code that asks for a new start."""
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    with open_ranks("cpu") as ranks, Watch(ranks, hang_seconds=30) as watch:
        (Path(folder) / str(ranks.rank)).write_text(str(os.getpid()))
        while not caught:
            watch.at(0, "waiting")
            time.sleep(0.05)
        sys.exit(75)


def hang(how: str, seconds: float) -> None:
    """Rank 1 gets stuck in step 3; rank 0 waits for it in a collective."""
    with open_ranks("cpu") as ranks, Watch(ranks, hang_seconds=seconds) as watch:
        for step in range(5):
            watch.at(step, "data wait")
            if step == 3 and ranks.rank == 1:
                if how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)
            watch.at(step, "exchange")
            ranks.all_reduce_sum(torch.ones(1))


def slow(seconds: float) -> str:
    """One phase takes longer than others may, and says so; then the watch ends, one rank late."""
    with open_ranks("cpu") as ranks, Watch(ranks, hang_seconds=seconds) as watch:
        watch.at(0, "first step", allow=60)
        time.sleep(2 * seconds)
        watch.at(1, "the rest")
        time.sleep(0.6 * seconds * ranks.rank)
    return "done"
