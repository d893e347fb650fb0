"""Ranks: the processes that train together, how they find one another, and what they say outside of training.

A process learns its place from whoever launched it: torchrun, srun, or :func:`mmbase.training.spawn.spawn`. Without any
of them it is alone, and everything here does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.training.precision import choose_device

T = TypeVar("T")

_START_SECONDS = 300.0
"""Ranks that have not come by then are named."""

_END_SECONDS = 30.0
"""Rank 0, which may host the store, leaves after the others, but waits no longer."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that were launched with it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    """torchrun (or whoever sets its variables) or srun"""
    address: str
    port: int
    hosted: bool
    """whether the launcher keeps the store; else rank 0 does"""
    attempt: str
    """differs between starts that share a store"""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Every method is called by all of them, in the same order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """among the ranks of this machine"""
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    """keys and values that all ranks see; None with one process"""
    _met: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.rank == 0

    def barrier(self, what: str, seconds: float = _START_SECONDS) -> None:
        """Wait until all ranks have come here; nothing is asked of their devices.

        Args:
            what: where this is, for the message and so that two places are not mistaken for one.
            seconds: how long to wait.

        Raises:
            MmbaseError: names the ranks that did not come.
        """
        if self.store is None:
            return
        self._met[what] += 1
        keys = [f"barrier/{what}/{self._met[what]}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], "")
        try:
            self.store.wait(keys, datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            try:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            except RuntimeError:
                raise MmbaseError(f"rank {self.rank} at {what}: the store through which ranks meet is gone") from error
            if not missing:
                return  # they came while we asked
            raise MmbaseError(
                f"{say_ranks(missing)} did not reach {what} within {seconds:g} s; rank {self.rank} waited. Look at the "
                "output of what is missing"
            ) from error

    def broadcast_object(self, value: T) -> T:
        """What rank 0 gave, on all ranks; pickled, over the processors."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather_objects(self, value: T) -> list[T]:
        """What each rank gave, in rank order, on all ranks; pickled, over the processors."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, a new tensor, the same on each."""
        total = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total


@contextlib.contextmanager
def open_ranks(device: str = "auto", *, timeout: float = 1800.0) -> Iterator[Ranks]:
    """Join the processes that were launched together, and leave them at the end of the block.

    Processors talk over gloo, GPUs over NCCL; ``torch.distributed``'s default group serves both. A group that exists
    already is used, and left as it is.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; over ranks each takes the GPU of its local rank.
        timeout: seconds after which a collective gives up. Above ``training.hang_seconds``, so that a rank that hangs
            is named before.

    Raises:
        MmbaseError: a device that is not there, variables that do not go together, ranks that do not come.
    """
    if dist.is_available() and dist.is_initialized():
        yield _ranks_of_existing_group(device)
        return
    place = find_place(os.environ)
    if place is None or place.world_size == 1:
        yield Ranks(device=choose_device(device))
        return
    chosen = device_of(place, device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    store = dist.PrefixStore(f"mmbase/{place.attempt}", _connect(place))
    ranks = Ranks(place.rank, place.world_size, place.local_rank, place.local_world_size, chosen, store)
    ranks.barrier("the start")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        yield ranks
    except SystemExit:  # all leave together, as after a signal
        _leave(ranks, store)
        raise
    except BaseException:
        # Others may be in a collective with this rank: they see its connections close when the process ends, whereas
        # to leave NCCL in order would mean to wait for them.
        if chosen.type != "cuda":
            dist.destroy_process_group()
        raise
    _leave(ranks, store)


def leads() -> bool:
    """Whether this process is rank 0 of those that were launched together, or alone; before and after they meet too."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    place = find_place(os.environ)
    return place is None or place.rank == 0


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What the launcher wrote into the environment; None: nobody launched this process among others.

    Variables of torchrun come first, so that torchrun under srun is torchrun. Those of srun are the step's: a batch
    script's own process, which srun did not start, is alone whatever the job asked for.

    Raises:
        MmbaseError: variables that are missing beside others, or that are no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        local_rank = _number(environment, "LOCAL_RANK", 0 if world_size == 1 else None)
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)
        launcher, attempt = "torchrun", environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        address = environment.get("MASTER_ADDR", "127.0.0.1")
        port = _number(environment, "MASTER_PORT", 29500 if world_size == 1 else None)
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        rank, world_size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        hosted, local_rank = False, _number(environment, "SLURM_LOCALID", 0 if world_size == 1 else None)
        tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
        local_world_size = tasks[_number(environment, "SLURM_NODEID", 0)]
        job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
        launcher, attempt = "srun", f"{job}.{step}.{environment.get('SLURM_RESTART_COUNT', '0')}"
        address = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        port = _number(environment, "MASTER_PORT", 20000 + (7 * job + step) % 20000)
    else:
        return None
    if not 0 <= rank < world_size or not 0 <= local_rank < local_world_size:
        raise MmbaseError(
            f"{launcher} says rank {rank} of {world_size} and local rank {local_rank} of {local_world_size}, which "
            "cannot be; look at the variables of the environment"
        )
    return Place(rank, world_size, local_rank, local_world_size, launcher, address, port, hosted, attempt)


def first_host(nodes: str) -> str:
    """The first name of SLURM's short form of a list: ``gpu[003-005,9],login`` means gpu003 and others."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name.group() if name else nodes)


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node from SLURM's short form: ``2(x3),1`` means 2, 2, 2, 1.

    Raises:
        MmbaseError: it is not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise MmbaseError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not understood; launch with torchrun instead")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def device_of(place: Place, name: str) -> torch.device:
    """The device of a rank: the GPU of its local rank, or the CPU.

    Raises:
        MmbaseError: fewer GPUs than ranks on this machine, one GPU asked for by number, a device that is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise MmbaseError(f"device={name!r} over {place.world_size} ranks: each takes its own; use cpu, cuda or auto")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # srun --gpus-per-task=1 shows each task its own GPU alone.
    index = 0 if place.launcher == "srun" and count == 1 else place.local_rank
    if index >= count:
        raise MmbaseError(
            f"rank {place.rank} is number {place.local_rank} of {place.local_world_size} on {socket.gethostname()}, "
            f"which has {count} GPU{'s' * (count != 1)}; launch as many processes as there are GPUs, or use device=cpu"
        )
    return choose_device(f"cuda:{index}")


def say_ranks(ranks: list[int], most: int = 8) -> str:
    """``rank 3``, ``ranks 0, 1, 2``, or the first few of many."""
    names = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
    return f"rank{'s' * (len(ranks) != 1)} {names}"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdigit():
        raise MmbaseError(
            f"{name}={text!r} in the environment must be a whole number where several processes train; launch with "
            "torchrun or srun, or unset RANK and WORLD_SIZE to train with one"
        )
    return int(text)


def _connect(place: Place) -> dist.TCPStore:
    """The store that all ranks see.

    Raises:
        MmbaseError: nobody answers at its address, or rank 0 cannot open it.
    """
    hosts = place.rank == 0 and not place.hosted
    try:
        return dist.TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=hosts,
            timeout=datetime.timedelta(seconds=_START_SECONDS),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        deed = "open" if hosts else "reach"
        raise MmbaseError(
            f"rank {place.rank} cannot {deed} the meeting point {place.address}:{place.port} ({reason}); check "
            "MASTER_ADDR and MASTER_PORT, that the first node lets the others in, and that nobody else uses the port"
        ) from error


def _leave(ranks: Ranks, store: dist.Store) -> None:
    """End the group; rank 0, in whose process the store may lie, goes last."""
    dist.destroy_process_group()
    with contextlib.suppress(RuntimeError):
        if not ranks.is_first:
            store.set(f"left/{ranks.rank}", "")
        else:
            others = [f"left/{rank}" for rank in range(1, ranks.world_size)]
            store.wait(others, datetime.timedelta(seconds=_END_SECONDS))


def _ranks_of_existing_group(device: str) -> Ranks:
    """The default group as it is; this machine's ranks are those that torchrun's variables say, or all."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_world_size = _number(os.environ, "LOCAL_WORLD_SIZE", world_size)
    local_rank = _number(os.environ, "LOCAL_RANK", rank % local_world_size)
    place = Place(rank, world_size, local_rank, local_world_size, "torchrun", "", 0, True, "")
    store = dist.PrefixStore("mmbase/existing", dist.distributed_c10d._get_default_store())
    chosen = device_of(place, device) if world_size > 1 else choose_device(device)
    return Ranks(rank, world_size, local_rank, local_world_size, chosen, store if world_size > 1 else None)
