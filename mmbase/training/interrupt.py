"""Schedulers that stop a run ask first: SIGTERM and SIGUSR1 become a checkpoint and an exit code that means "again".

SLURM sends SIGTERM before it preempts a job or takes it down, and with ``--signal=USR1@120`` a SIGUSR1 two minutes
before the time limit. Both end the run the same way: the step is finished, a checkpoint is written, and the process
exits with :data:`REQUEUE_CODE`, by which a batch script knows to put the job back into the queue.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

REQUEUE_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, start me again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


_ECHO_SECONDS = 3.0


class Interrupted(SystemExit):
    """The run was asked to stop and its checkpoint is written; unhandled it exits with :data:`REQUEUE_CODE`."""

    def __init__(self) -> None:
        super().__init__(REQUEUE_CODE)


class Interrupt:
    """Notes signals while the block runs; the loop looks between steps whether one came.

    The same signal again, a few seconds later, ends the process at once, as if nobody had handled it: then the newest
    checkpoint is the last that was written. Sooner it is taken for an echo: schedulers signal all processes of a job,
    and launchers pass on to their children what they get themselves.

    Usable in the main thread only; elsewhere (a run inside a notebook's or a server's thread) it notes nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """name of the signal that came, such as SIGTERM; None: none did"""
        self._first: dict[str, float] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        first = self._first.setdefault(name, now)
        if now - first > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or name
