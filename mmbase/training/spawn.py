"""Several ranks on this machine from one command: ``mmbase train emoji devices=2``.

Each rank is a fresh interpreter that finds its place in the variables torchrun sets. This process trains nothing: it
keeps the store through which they meet, passes signals on, and sees that none is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from mmbase.errors import MmbaseError
from mmbase.training.distributed import find_place
from mmbase.training.hang_watch import HANG_CODE, VERDICT

T = TypeVar("T")

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that schedulers send, and which every rank should see."""

_GRACE = 5.0
"""Seconds that the others have after one failed: they may know the cause, or end by themselves."""

_STORE_PREFIX = "mmbase/0"
"""Where :func:`mmbase.training.distributed.open_ranks` keeps its keys."""


class RankError(RuntimeError):
    """A rank failed for a reason that is no mistake of the user's; holds its traceback."""


class Told(NamedTuple):
    """What a rank tells at its end."""

    kind: Literal["result", "mistake", "error", "exit"]
    value: Any
    at: float = 0.0
    """time.time() when it happened"""


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    told: Told | None = None
    ended: bool = False
    """by this process, because another had failed"""

    @property
    def code(self) -> int | None:
        return self.process.poll()


def run_over(devices: int | Literal["auto"] | None, device: str, target: Callable[..., T], *args: Any) -> T:
    """``target(*args)`` on every device that is asked for: here if that is one or a launcher has started all.

    Args:
        devices: processes on this machine; ``auto``: one per GPU; None: one, or what the launcher started.
        device: ``auto``, ``cpu`` or ``cuda``.
        target: a function of an importable module; each rank calls it, and finds its place by
            :func:`~mmbase.training.distributed.open_ranks`.
        args: what it is called with; pickled.

    Returns:
        What rank 0 returned.

    Raises:
        MmbaseError: more devices than there are, ``devices`` beside a launcher, and what :func:`spawn` raises.
    """
    count = count_devices(devices, device)
    return target(*args) if count == 1 else spawn(count, target, *args)


def count_devices(devices: int | Literal["auto"] | None, device: str) -> int:
    """How many processes this one has to start; 1: none, it trains itself.

    Raises:
        MmbaseError: see :func:`run_over`.
    """
    on_gpus = device.partition(":")[0] == "cuda" or (device == "auto" and torch.cuda.is_available())
    if place := find_place(os.environ):
        if isinstance(devices, int) and devices not in (1, place.local_world_size):
            raise MmbaseError(
                f"devices={devices} beside {place.launcher}, which has started {place.local_world_size} processes on "
                "this machine; leave devices out"
            )
        return 1
    if devices is None:
        return 1
    if devices == "auto":
        return max(1, torch.cuda.device_count()) if on_gpus and ":" not in device else 1
    if devices < 1:
        raise MmbaseError(f"devices={devices} must be at least 1, or auto")
    if devices > 1 and on_gpus and devices > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MmbaseError(f"devices={devices}, but this machine shows {count} GPUs; use devices=auto or device=cpu")
    return devices


def spawn(devices: int, target: Callable[..., T], *args: Any) -> T:
    """Call ``target(*args)`` in as many new processes of this machine; what rank 0 returned.

    SIGTERM and SIGUSR1 are passed on. When a rank fails the others are ended; when this process dies they end too.

    Raises:
        MmbaseError: a rank's mistake, one that was killed, one that hung; each names it.
        RankError: a rank's other error, with its traceback.
        SystemExit: all ranks left with such a code, as they do after a signal.
    """
    if target.__module__ == "__main__":
        raise MmbaseError(f"{target.__qualname__} must lie in a module that others can import, not in the main program")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children: list[_Child] = []
    try:
        with _signals_passed_on(children):
            for rank in range(devices):
                children.append(_start(rank, devices, store.port, (target, args)))
            _attend(children)
    finally:
        _end(children)
    return _outcome(children, store)


def _start(rank: int, world_size: int, port: int, job: tuple[Callable[..., Any], tuple[Any, ...]]) -> _Child:
    ours, theirs = Pipe()
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is kept here, as torchrun does
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", f"from {__name__} import main; main()", str(theirs.fileno())]
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    with contextlib.suppress(OSError):  # it has ended already: seen when it is waited for
        ours.send_bytes(pickle.dumps(job))
    return _Child(rank, process, ours)


def _attend(children: list[_Child]) -> None:
    """Until all have ended by themselves, or one has failed and the others have had their grace."""
    deadline = float("inf")
    while open_ := [child for child in children if not child.connection.closed]:
        for ready in wait([child.connection for child in open_], timeout=0.2):
            child = next(child for child in open_ if child.connection is ready)
            try:
                child.told = child.connection.recv()
            except (EOFError, OSError):
                child.connection.close()
                child.process.wait()
        if deadline == float("inf") and any(_failed(child) for child in children):
            deadline = time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            return


def _failed(child: _Child) -> bool:
    if child.told is not None:
        return child.told.kind in ("mistake", "error")
    return child.connection.closed  # ended without a word


def _end(children: list[_Child]) -> None:
    """Leave no process behind. Training that is stuck heeds no SIGTERM, so it gets no time for it."""
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
            child.ended = True
    for child in children:
        child.process.wait()
        child.connection.close()


def _outcome(children: list[_Child], store: dist.TCPStore) -> Any:
    if all(child.told and child.told.kind == "result" for child in children):
        return children[0].told.value  # pyrefly: ignore[missing-attribute]
    total = len(children)
    if any(child.code == HANG_CODE for child in children):
        key = f"{_STORE_PREFIX}/{VERDICT}"
        if store.check([key]):
            raise MmbaseError(f"{json.loads(store.get(key))['message']}; run the same command again to resume")
    # A rank that is killed takes the others' connections with it; their errors say only that.
    for child in children:
        if child.told is None and child.code is not None and child.code < 0 and not child.ended:
            name = signal.Signals(-child.code).name
            hint = ", by the system if memory ran out" if name == "SIGKILL" else ""
            raise MmbaseError(
                f"rank {child.rank} of {total} was ended by {name}{hint}; run the same command again to resume"
            )
    failures = [(child.told.at, child) for child in children if child.told and child.told.kind in ("mistake", "error")]
    failures.sort(key=lambda failure: (_is_consequence(failure[1]), failure[0]))
    for _, child in failures[:1]:
        assert child.told is not None  # chosen above
        if child.told.kind == "mistake":
            same = len({other.told.value for _, other in failures if other.told}) == 1 and len(failures) == total
            raise MmbaseError(child.told.value if same else f"rank {child.rank} of {total}: {child.told.value}")
        raise RankError(f"rank {child.rank} of {total} failed\n{child.told.value}")
    for child in children:
        if child.told and child.told.kind == "exit" and child.told.value:
            raise SystemExit(child.told.value)
        if child.told is None and not child.ended:
            raise MmbaseError(f"rank {child.rank} of {total} left with exit code {child.code} and without a word")
    return children[0].told.value if children[0].told and children[0].told.kind == "result" else None


def _is_consequence(child: _Child) -> bool:
    """Whether an error only says that another rank is gone."""
    text = child.told.value if child.told else ""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "did not reach")
    return any(sign in text for sign in signs)


@contextlib.contextmanager
def _signals_passed_on(children: list[_Child]) -> Iterator[None]:
    """Signals of schedulers reach every rank; what to do about them is for the ranks to decide."""

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------- in the rank


def main() -> None:
    """A rank: take the job, do it, tell how it went."""
    handle = int(sys.argv[1])
    os.set_inheritable(handle, False)
    connection = Connection(handle)
    try:
        target, args = pickle.loads(connection.recv_bytes())
        threading.Thread(target=_leave_with, args=(connection,), name="mmbase-parent", daemon=True).start()
        told = Told("result", target(*args))
    except MmbaseError as error:
        told = Told("mistake", str(error), time.time())
    except SystemExit as error:
        told = Told("exit", error.code, time.time())
    except KeyboardInterrupt:  # at the terminal it reaches all ranks, and the parent says so
        told = Told("exit", 130, time.time())
    except BaseException:
        told = Told("error", traceback.format_exc(), time.time())
    with contextlib.suppress(OSError):
        connection.send(told)
    code = told.value if told.kind == "exit" and isinstance(told.value, int) else int(told.kind != "result")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if told.kind == "error" else sys.exit(code)


def _leave_with(connection: Connection) -> None:
    """End this process when its parent is gone, whatever it is doing."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)
