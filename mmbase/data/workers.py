"""Worker processes seen from the loader: started, given work, watched.

Nothing here waits without end. A worker that dies is noticed at once, one that is stuck after ``timeout`` seconds in
which it did not take one step; both become an error that says who was doing what.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import NoReturn

from mmbase.data.arena import Arena, anonymous_file
from mmbase.data.prepare import IDLE, Rows
from mmbase.data.worker import RECORD, Ended, Failure, Job, Piece, Prepares
from mmbase.errors import MmbaseError

_TICK = 0.5
"""Seconds between looks at the workers while nothing arrives."""

_START = 4
"""How many times as long as ``timeout`` a worker may take to its first step: it imports, the disk may be cold."""

_READ = 2
"""As much for reading, which has a time-out of its own and a better word for it."""

_FAREWELL = 5.0
"""Seconds until the nursery has told how a worker ended, and until it has ended itself."""

_QUIET_LIBRARIES = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""A worker is one thread: there are as many workers as cores to use."""


@dataclass
class _Worker:
    number: int
    connection: Connection
    seen: int = -1
    """the count of its status when last looked at"""
    still: float = 0.0
    """seconds waited for it since its count changed"""


class WorkerPool:
    """Processes that fill pieces of batches in ``arena``.

    Args:
        preparation: what they do; must be picklable.
        arena: where they write.
        urls: names of shards, for messages.
        timeout: seconds without one step after which a worker counts as stuck.

    Raises:
        MmbaseError: the preparation cannot be sent to another process.
    """

    def __init__(self, preparation: Prepares, arena: Arena, *, urls: Sequence[str], timeout: float) -> None:
        if not hasattr(os, "fork"):
            raise MmbaseError(f"workers={arena.shape.workers} need a system with fork (Linux, macOS); use workers=0")
        self.urls, self.timeout, self.arena = urls, timeout, arena
        try:
            job = pickle.dumps(Job(preparation, arena.shape), pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # pickle raises what the object's own code raises
            raise MmbaseError(f"cannot send the data settings to workers: {error}; use workers=0") from error
        pipes = [Pipe() for _ in range(arena.shape.workers)]
        # One queue of work for all, so that nobody waits while there is any; or one each, for streams of their own.
        queues = [os.pipe() for _ in range(arena.shape.workers if preparation.in_turn else 1)]
        self._queues = [write for _, write in queues]
        for write in self._queues:
            os.set_blocking(write, False)
        self._control, control = Pipe()
        theirs = [(queues[number % len(queues)][0], pipe[1]) for number, pipe in enumerate(pipes)]
        self._nursery = _start_nursery(job, arena.descriptor, control, theirs)
        self._workers = [_Worker(number, ours) for number, (ours, _) in enumerate(pipes)]
        self.outstanding, self._quiet = 0, 0.0
        self._processes: list[int] = []
        self._ended: dict[int, int] = {}
        connections = [self._control, *(worker.connection for worker in self._workers)]
        belongings = self._nursery, connections, self._queues, self._processes
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), *belongings)

    def give(self, piece: Piece, turn: int) -> bool:
        """Put a piece into the queue, the ``turn``-th of several; False where it is full."""
        try:
            os.write(self._queues[turn % len(self._queues)], RECORD.pack(*piece))
        except BlockingIOError:
            return False
        except BrokenPipeError:  # all workers are gone; who asks for results is told why
            return False
        self.outstanding += 1
        return True

    def take(self) -> list[tuple[Piece, Rows]]:
        """Pieces that are done, at least one; waits for it.

        Raises:
            MmbaseError: a worker died or is stuck, or met an error that is the user's.
            RuntimeError: an error of the program in a worker, with its traceback.
        """
        workers = {worker.connection: worker for worker in self._workers}
        while True:
            before = time.monotonic()
            done = []
            for connection in wait([self._control, *workers], timeout=_TICK):
                if connection is self._control:
                    self._listen()
                elif result := self._receive(workers[connection]):  # type: ignore[index]
                    done.append(result)
            if done:
                return done
            # A process that was itself stopped, as in sleep, must not count that time as waiting.
            self._watch(min(time.monotonic() - before, 2 * _TICK))

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._finalizer()

    def processes(self) -> list[int]:
        """Process numbers of the workers; waits until they have started."""
        while not self._processes and self._control.poll(self.timeout):
            self._listen()
        return list(self._processes)

    def _listen(self) -> None:
        """Take one message of the nursery."""
        try:
            message = self._control.recv()
        except (EOFError, OSError):
            code = self._nursery.wait()
            self.close()
            raise MmbaseError(
                f"the process that starts data workers ended with code {code}; what it printed is above"
            ) from None
        if isinstance(message, Failure):
            self._raise(message)
        elif isinstance(message, Ended):
            self._ended[message.worker] = message.code
            self._died(self._workers[message.worker])
        else:
            self._processes.extend(message)

    def _receive(self, worker: _Worker) -> tuple[Piece, Rows] | None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._died(worker)
        if isinstance(message, Failure):
            self._raise(message)
        piece, rows = message
        self.outstanding -= 1
        worker.still = self._quiet = 0.0
        return piece, rows

    def _raise(self, failure: Failure) -> NoReturn:
        self.close()
        if failure.expected:
            raise MmbaseError(failure.message)
        raise RuntimeError(f"a data worker failed{self._hint(failure.message)}:\n{failure.message}")

    @staticmethod
    def _hint(message: str) -> str:
        if "__main__" in message and "AttributeError" in message:
            return " because a class defined in the script that runs cannot be imported there; put it into a module"
        return ""

    def _watch(self, waited: float) -> None:
        """Account for ``waited`` seconds in which nothing came.

        Raises:
            MmbaseError: a worker took no step for too long, or all wait for work though there is some.
        """
        moved = False
        for worker, status in zip(self._workers, self.arena.status.tolist()):
            if status[3] != worker.seen:
                worker.seen, worker.still, moved = status[3], 0.0, True
            elif status[0] != IDLE:
                worker.still += waited
                if worker.still > self.timeout * (_START if not status[3] else _READ if status[0] == 0 else 1):
                    self._give_up(f"data worker {self._name(worker)} has not moved", worker.still, self._doing(status))
        self._quiet = 0.0 if moved else self._quiet + waited
        if self._quiet > _READ * self.timeout and (self.arena.status[:, 0] == IDLE).all():
            # the one that was woken for it is stopped
            self._give_up("the data workers have not moved", self._quiet, f"{self.outstanding} pieces of work wait")

    def _give_up(self, who: str, seconds: float, doing: str) -> NoReturn:
        self.close()
        raise MmbaseError(
            f"{who} for {seconds:.0f} s while {doing}; look at that shard, at the storage and at the machine's load, "
            "or raise timeout"
        )

    def _died(self, worker: _Worker) -> NoReturn:
        deadline = time.monotonic() + _FAREWELL
        with contextlib.suppress(EOFError, OSError):
            while worker.number not in self._ended and self._control.poll(max(deadline - time.monotonic(), 0)):
                message = self._control.recv()
                if isinstance(message, Ended):
                    self._ended[message.worker] = message.code
                elif isinstance(message, list):
                    self._processes.extend(message)
        code = self._ended.get(worker.number)
        doing = self._doing(self.arena.status[worker.number].tolist())
        self.close()
        if code is None or code >= 0:
            how = "closed its connection" if code is None else f"ended with code {code}"
        else:
            how = f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
        raise MmbaseError(
            f"data worker {self._name(worker)} {how} while {doing}; "
            "the same command resumes, with fewer workers if memory ran out"
        )

    def _name(self, worker: _Worker) -> str:
        process = self._processes[worker.number] if self._processes else "not started"
        return f"{worker.number} (process {process})"

    def _doing(self, status: list[int]) -> str:
        stage, shard, row, count = status
        if not count:
            return "starting"
        if stage == IDLE:
            return "waiting for work"
        doing = ("reading", "decoding", "tokenising", "collating")[stage]
        name = self.urls[shard] if 0 <= shard < len(self.urls) else str(shard)
        return f"{doing} sample {row} of {name!r}"


def _start_nursery(
    job: bytes, memory: int, control: Connection, ends: Sequence[tuple[int, Connection]]
) -> subprocess.Popen[bytes]:
    """Start it with the workers' ends of queues and connections, which are closed here."""
    job_file = anonymous_file(len(job))
    with open(job_file, "wb", closefd=False) as file:
        file.write(job)
    os.lseek(job_file, 0, os.SEEK_SET)
    # The workers see the modules this process sees: -P, because -c would look into the working folder first, where
    # anything may lie; and -c, because a folder on the path may shadow -m.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    pairs = [f"{queue}:{connection.fileno()}" for queue, connection in ends]
    command = [sys.executable, "-P", "-c", "from mmbase.data.worker import main; main()"]
    command += [str(control.fileno()), str(job_file), str(memory), ",".join(pairs)]
    process = subprocess.Popen(
        command,
        env=os.environ | _QUIET_LIBRARIES | {"PYTHONPATH": path},
        pass_fds={control.fileno(), job_file, memory, *(h for q, c in ends for h in (q, c.fileno()))},
        stdin=subprocess.DEVNULL,
    )
    for handle in {job_file, *(queue for queue, _ in ends)}:
        os.close(handle)
    for connection in (control, *(connection for _, connection in ends)):
        connection.close()
    return process


def _stop(
    owner: int,
    nursery: subprocess.Popen[bytes],
    connections: list[Connection],
    queues: list[int],
    processes: list[int],
) -> None:
    if os.getpid() != owner:  # a fork of the process that loads: the workers are not its own
        return
    for process in processes:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    for connection in connections:
        connection.close()
    for queue in queues:
        os.close(queue)
    try:
        nursery.wait(_FAREWELL)  # it waits for the workers and leaves
    except subprocess.TimeoutExpired:
        nursery.kill()
        nursery.wait()
