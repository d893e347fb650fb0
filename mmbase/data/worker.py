"""What worker processes run: pieces of batches in, rows in shared memory out.

A nursery, a fresh interpreter, loads what is needed once and forks the workers before it has any thread of its own. So
workers inherit neither locks held by the training process's threads, nor its CUDA context, nor its memory, and share
what the nursery has loaded. A worker ends when its connection does, whatever it is doing; what does not end by itself
is killed by the nursery when the training process is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

import torch

from mmbase.data.arena import Arena, ArenaShape, part
from mmbase.data.prepare import IDLE, Report, Rows, Slab
from mmbase.errors import MmbaseError

_TICK = 1.0
"""Seconds between looks whether the training process lives."""


class Prepares(Protocol):
    """Fills rows; :class:`mmbase.data.prepare.Preparation`, or the one that streams."""

    in_turn: bool

    def warm(self) -> None:
        """Load what all workers use, before they are forked; may start no thread."""
        ...

    def open(self, worker: int, workers: int) -> None:
        """Called once, in the process that prepares."""
        ...

    def rows(self, start: int, stop: int, slab: Slab, report: Report) -> Rows:
        """Write the rows of positions ``start`` to ``stop``."""
        ...


class Piece(NamedTuple):
    """A run of rows of one batch. Fits into one record of the pipe that workers take their work from."""

    batch: int
    """counted from the loader's start"""
    slot: int
    first: int
    """row of the batch"""
    start: int
    """position in the order"""
    count: int


RECORD = struct.Struct("=5q")
"""A piece in the pipe. Records are written whole and read whole, so several workers may read one pipe."""


class Job(NamedTuple):
    """What a worker is told first."""

    preparation: Prepares
    shape: ArenaShape


class Failure(NamedTuple):
    """An error of a worker."""

    message: str
    expected: bool
    """a mistake of the user or the data (:class:`MmbaseError`), not of the program"""


class Ended(NamedTuple):
    """What the nursery tells of a worker that is gone."""

    worker: int
    code: int
    """as of :attr:`subprocess.Popen.returncode`: a signal is negative"""


def main() -> None:
    """The nursery: fork workers, tell their process numbers, then how each ended."""
    control, job_file, memory = Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    # of each worker: where it takes its work from, and where it tells what is done
    handles = [(int(work), int(told)) for work, told in (pair.split(":") for pair in sys.argv[4].split(","))]
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the loader is interrupted, and ends its workers
    torch.set_num_threads(1)
    try:
        with open(job_file, "rb") as file:
            job: Job = pickle.load(file)
        arena = Arena(job.shape, memory)
        job.preparation.warm()
    except Exception as error:
        control.send(_failure(error))
        return
    numbers: dict[int, int] = {}
    every = {handle for pair in handles for handle in pair}
    for number, pair in enumerate(handles):
        process = os.fork()
        if not process:
            control.close()
            for other in every - set(pair):
                os.close(other)
            _serve(job, arena, number, pair[0], Connection(pair[1]))
            os._exit(0)
        numbers[process] = number
    for handle in every:
        os.close(handle)
    with contextlib.suppress(OSError):
        control.send([*numbers])
    threading.Thread(target=_kill_when_alone, args=(control, numbers, parent), daemon=True).start()
    while numbers:
        process, status = os.wait()
        with contextlib.suppress(OSError):
            control.send(Ended(numbers.pop(process), os.waitstatus_to_exitcode(status)))


def _kill_when_alone(control: Connection, numbers: dict[int, int], parent: int) -> None:
    """Wait until the training process is gone; its end of the connection may live on in a fork of it."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            if control.poll(_TICK):
                control.recv()
    for process in list(numbers):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def _serve(job: Job, arena: Arena, number: int, work: int, connection: Connection) -> None:
    """A worker: pieces of batches until there are no more."""
    threading.Thread(target=_leave_with, args=(connection,), daemon=True).start()
    report = arena.report(number)
    try:
        job.preparation.open(number, job.shape.workers)
        while True:
            report(IDLE, 0, 0)
            record = os.read(work, RECORD.size)
            if not record:
                return
            piece = Piece(*RECORD.unpack(record))
            slab = part(arena.slab(piece.slot), piece.first, piece.first + piece.count)
            connection.send((piece, job.preparation.rows(piece.start, piece.start + piece.count, slab, report)))
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(_failure(error))
            signal.pause()  # until the loader, which knows now, ends this process


def _leave_with(connection: Connection) -> None:
    """End the process when the loader is gone, even in the middle of a picture."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(0)


def _failure(error: Exception) -> Failure:
    if isinstance(error, MmbaseError):
        return Failure(str(error), True)
    return Failure("".join(traceback.format_exception(error)), False)
