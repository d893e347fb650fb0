"""Ranks of the stand-in loop, as processes that are forked from one that has torch imported already."""

import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import sys
import time
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def start_ranks():
    """A function that starts ranks of the stand-in loop, and ends all that are left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stand_in", "real_parts"])
    # The server does not take over sys.path, and what it cannot import it silently leaves to each fork.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    started = []

    def start(folder, world, loop="stand_in", **options):
        folder.mkdir(exist_ok=True)
        run_rank = importlib.import_module(loop).run_rank
        meeting = folder / f"meeting-{uuid.uuid4().hex}"
        ranks = [
            context.Process(target=run_rank, args=(rank, world, folder, meeting, options), daemon=True)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        started.extend(ranks)
        return ranks

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def run_ranks(start_ranks):
    """A function that runs ranks to their end; their exit codes, by rank."""

    def run(folder, world, *, limit=240.0, **options):
        ranks = start_ranks(folder, world, **options)
        deadline = time.monotonic() + limit
        while alive := [rank.sentinel for rank in ranks if rank.is_alive()]:
            assert time.monotonic() < deadline, f"ranks still run after {limit} s: {[r.exitcode for r in ranks]}"
            multiprocessing.connection.wait(alive, timeout=1.0)
        return [rank.exitcode for rank in ranks]

    return run
