"""Names the rank that hangs, long before a collective times out and every rank blames the others.

Each rank says through the store where it is, from a thread that lives on while the rank itself is stuck. Ranks that
wait in a collective are all ahead of the one they wait for, so the rank that has passed the fewest marks is the one.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from mmbase.training.distributed import Ranks, say_ranks

HANG_CODE = 70
"""Exit code of a run that was ended because a rank hung (EX_SOFTWARE)."""

VERDICT = "watch/verdict"
"""Key of the store under which lies what was found."""

_LONGEST_INTERVAL = 5.0
_FOR_EVER = 1e6


class Beat(NamedTuple):
    """Where a rank says it is."""

    number: int
    """of this beat, so that one seen twice is known"""
    marks: int
    """phases it has entered"""
    step: int
    phase: str
    seconds: float
    """in this phase"""
    limit: float
    """seconds that the phase may take"""
    host: str
    process: int


class Watch:
    """Watches all ranks while the block runs::

        with Watch(ranks, hang_seconds=60) as watch:
            for step in ...:
                watch.at(step, "data wait")
                batch = next(batches)
                watch.at(step, "forward and backward")
                ...

    When the rank that is behind all others stays in its phase for longer than the phase may take, or a rank is not
    heard of for ``hang_seconds``, rank 0 and that rank print which it is and where; that rank prints its stack too. All
    processes then end with :data:`HANG_CODE`, at once: what is stuck cannot be unwound. The newest checkpoint is what
    a new start goes on from. With one process nothing is watched.

    Args:
        ranks: all of which enter and leave.
        hang_seconds: a rank is named between this and about a fifth more.
    """

    def __init__(self, ranks: Ranks, *, hang_seconds: float) -> None:
        self.ranks, self.hang_seconds = ranks, hang_seconds
        self.interval = min(_LONGEST_INTERVAL, hang_seconds / 10)
        self._where = (0, 0, "start", time.monotonic(), hang_seconds)
        self._beats = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, phase: str, *, allow: float | None = None) -> None:
        """This rank enters a phase of a step; costs nothing. Every rank enters the same phases in the same order.

        Args:
            step: of the run.
            phase: what is done there, as it is to be printed.
            allow: seconds that it may take where these are not ``hang_seconds``, such as for the first step, in which
                kernels are compiled, or an evaluation.
        """
        self._where = (self._where[0] + 1, step, phase, time.monotonic(), allow or self.hang_seconds)

    def __enter__(self) -> Watch:
        if self.ranks.store is not None:
            self.store = self.ranks.store.clone()  # a connection of its own: the other may be waiting for something
            self.store.set_timeout(datetime.timedelta(seconds=max(1.0, self.hang_seconds)))
            self._where = (0, 0, "start", time.monotonic(), self.hang_seconds)
            self._beat()
            # From here on every rank has been heard of; until here they may have prepared for long.
            self.ranks.barrier("the watch", max(600.0, self.hang_seconds))
            self._thread = threading.Thread(target=self._run, name="mmbase-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if kind is None or issubclass(kind, SystemExit):
            # All leave together: the thread speaks until the last has come, so that none counts as silent. How long
            # that may take is for the watch itself to judge.
            self.at(self._where[1], "the end of the watch")
            self.ranks.barrier("the end of the watch", _FOR_EVER)
        self._over.set()
        self._thread.join(self.interval + 1)

    # ---------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        watched = {0: range(self.ranks.world_size), 1: range(1)}.get(self.ranks.rank, range(0))
        heard: dict[int, tuple[int, float]] = {}  # of each rank: the number of its last beat, and when it came
        while not self._over.wait(self.interval):
            try:
                self._beat()
                if self.store.check([VERDICT]):
                    self._end(json.loads(self.store.get(VERDICT)))
                beats = [Beat(*json.loads(text)) for text in self.store.multi_get([_key(rank) for rank in watched])]
                now = time.monotonic()
                for rank, beat in zip(watched, beats):
                    if heard.get(rank, (None,))[0] != beat.number:
                        heard[rank] = beat.number, now
                silent = [now - heard[rank][1] for rank in watched]
                found = judge(beats, silent, self.hang_seconds, self.ranks.world_size) if beats else None
            except RuntimeError as error:
                if not self._over.is_set():
                    self._end_without_store(error)
                return
            if found and not self._over.is_set():
                told = {"message": found[0], "ranks": found[1]}
                self.store.set(VERDICT, json.dumps(told))
                self._end(told)

    def _beat(self) -> None:
        marks, step, phase, since, limit = self._where
        self._beats += 1
        seconds = time.monotonic() - since
        beat = Beat(self._beats, marks, step, phase, seconds, limit, socket.gethostname(), os.getpid())
        self.store.set(_key(self.ranks.rank), json.dumps(beat))
        self.store.get(_key(self.ranks.rank))  # with a time-out, unlike what follows: is the store still there?

    def _end(self, told: dict) -> None:
        named = self.ranks.rank in told["ranks"]
        if named or self.ranks.is_first:
            _say(f"mmbase: rank {self.ranks.rank}: {told['message']}")
        if named:
            _say(f"mmbase: rank {self.ranks.rank} is here:")
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        with contextlib.suppress(RuntimeError):
            self.store.set(f"watch/told/{self.ranks.rank}", "")
            if self.ranks.is_first:  # the store may end with this process: first let the others hear
                alive = [rank for rank in range(self.ranks.world_size) if rank not in told["ranks"]]
                wait = datetime.timedelta(seconds=2 * self.interval + 1)
                self.store.wait([f"watch/told/{rank}" for rank in alive], wait)
        os._exit(HANG_CODE)

    def _end_without_store(self, error: RuntimeError) -> None:
        reason = str(error).strip().splitlines()[0]
        _say(
            f"mmbase: rank {self.ranks.rank}: the store through which ranks speak has not answered for up to "
            f"{self.hang_seconds:g} s; whoever keeps it, the launcher or rank 0, is gone or stopped ({reason})"
        )
        os._exit(HANG_CODE)


def judge(
    beats: Sequence[Beat], silent: Sequence[float], hang_seconds: float, world_size: int
) -> tuple[str, list[int]] | None:
    """Which ranks hang, and a line that says so; None: none does.

    Args:
        beats: the last ones heard, of ranks 0, 1, ...
        silent: seconds since each of them.
        hang_seconds: how long a rank may stay unheard.
        world_size: ranks in all; the others are not judged here.
    """
    unheard = [rank for rank, seconds in enumerate(silent) if seconds > hang_seconds]
    if unheard:
        first = unheard[0]
        return (
            f"{say_ranks(unheard)} ({_place(beats[first])}) {_has(unheard)} not been heard of for {silent[first]:.0f} "
            f"s, last in {_phase(beats[first])}: the process is gone or stopped{_rest(unheard, world_size)}",
            unheard,
        )
    if len(beats) < world_size:
        return None  # only rank 0 sees how far all are
    fewest = min(beat.marks for beat in beats)
    behind = [rank for rank, beat in enumerate(beats) if beat.marks == fewest]
    seconds = [beats[rank].seconds + silent[rank] for rank in behind]
    if any(spent <= beats[rank].limit for rank, spent in zip(behind, seconds)):
        return None  # one of them has come here just now, and what the others wait for may be it
    first = beats[behind[0]]
    if len(behind) == world_size:
        return (
            f"all ranks have been in {_phase(first)} for {min(seconds):.0f} s, none is behind the others: they may "
            "have entered different collectives, or a device hangs",
            behind,
        )
    return (
        f"{say_ranks(behind)} ({_place(first)}) {_has(behind)} been in {_phase(first)} for {min(seconds):.0f} s"
        f"{_rest(behind, world_size)}",
        behind,
    )


def _key(rank: int) -> str:
    return f"watch/{rank}"


def _place(beat: Beat) -> str:
    return f"{beat.host}, process {beat.process}"


def _phase(beat: Beat) -> str:
    return f"{beat.phase!r} of step {beat.step}"


def _has(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def _rest(named: list[int], world_size: int) -> str:
    others = [rank for rank in range(world_size) if rank not in named]
    waits = "waits" if len(others) == 1 else "wait"
    return f"; {say_ranks(others)} {waits} for {'it' if len(named) == 1 else 'them'}" if others else ""


def _say(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)
