"""What a checkpoint holds: taken from a run, copied off the device, and put back on any number of ranks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor


class Stateful(Protocol):
    """Anything with a state, as torch means it."""

    def state_dict(self) -> Any:
        """Nested mappings and lists of tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore what :meth:`state_dict` gave; tensors come whole and on the CPU, or sharded on the run's mesh."""
        ...


@dataclass
class TrainState:
    """Everything that changes while training, but for the data, whose state is the number of samples.

    All ranks call ``state_dict`` of every part in this order; what comes is taken from rank 0, tensors that are sharded
    (DTensor) from all.
    """

    model: Stateful
    """names to tensors"""
    optimizer: Stateful
    average: Stateful | None = None
    """``averaged``: names to tensors; and further plain values"""
    scaler: Stateful | None = None
    others: dict[str, Stateful] = field(default_factory=dict)
    """whatever else must come back, by name, such as the guard"""


class Taken(NamedTuple):
    """A run's state at one moment, on the CPU; nothing in it changes any more."""

    weights: dict[str, dict[str, Tensor]]
    """``model`` and perhaps ``average``: whole tensors; on rank 0 only"""
    rest: dict[str, Any]
    """all other parts, with a description in place of each sharded tensor; on rank 0 only"""
    shards: dict[str, Tensor]
    """this rank's part of the sharded tensors, by their path"""


_SHARDED = "sharded tensor"


class StateTaker:
    """Copies a run's state to the processor's memory; from a GPU into the same pinned memory every time.

    Args:
        first: whether this is rank 0.
    """

    def __init__(self, first: bool) -> None:
        self.first = first
        self._pinned: dict[str, Tensor] = {}

    def take(self, state: TrainState, rng: list[dict[str, Any]]) -> Taken:
        """The state as it is now; ``rng`` is that of all ranks. Called by all ranks."""
        weights = {"model": self._whole(state.model.state_dict())}
        shards: dict[str, Tensor] = {}
        rest: dict[str, Any] = {"optimizer": describe_shards(state.optimizer.state_dict(), "optimizer", shards)}
        if state.average:
            average = dict(state.average.state_dict())
            weights["average"] = self._whole(average.pop("averaged"))
            rest["average"] = average
        if state.scaler:
            rest["scaler"] = state.scaler.state_dict()
        rest["others"] = {name: part.state_dict() for name, part in state.others.items()}
        rest["rng"] = rng
        mine = {"weights": weights, "rest": rest} if self.first else {}
        copies = self._copy(mine | {"shards": shards}, "")
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # once for all copies
        return Taken(copies.get("weights", {}), copies.get("rest", {}), copies["shards"])

    def _whole(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Gathered where sharded, so that anybody can load the file; kept on rank 0 alone."""
        whole = {}
        for name, tensor in (tensors or {}).items():
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.first:
                whole[name] = value.detach().contiguous()
        return whole

    def _copy(self, tree: Any, path: str) -> Any:
        """``tree`` with tensors of its own on the CPU, laid out in memory as they were: fused optimisers mind that."""
        if isinstance(tree, DTensor):
            return tree.clone() if tree.device.type == "cpu" else tree.to("cpu")
        if isinstance(tree, Tensor):
            if not tree.is_cuda:
                return tree.detach().clone()
            held = self._pinned.get(path)
            if held is None or held.shape != tree.shape or held.dtype != tree.dtype or held.stride() != tree.stride():
                held = self._pinned[path] = torch.empty_like(tree, device="cpu", pin_memory=True)
            return held.copy_(tree.detach(), non_blocking=True)
        if isinstance(tree, Mapping):
            return {key: self._copy(value, f"{path}.{key}") for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [self._copy(value, f"{path}.{place}") for place, value in enumerate(tree)]
        return tree


def describe_shards(tree: Any, path: str, shards: dict[str, Tensor]) -> Any:
    """``tree`` with a description in place of each sharded tensor, which goes to ``shards``."""
    if isinstance(tree, DTensor):
        shards[path] = tree.detach()
        placements = [p.dim if isinstance(p, Shard) else -1 for p in tree.placements]
        dtype = str(tree.dtype).removeprefix("torch.")
        return {_SHARDED: path, "shape": list(tree.shape), "dtype": dtype, "placements": placements}
    if isinstance(tree, Mapping):
        return {key: describe_shards(value, f"{path}.{key}", shards) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [describe_shards(value, f"{path}.{place}", shards) for place, value in enumerate(tree)]
    return tree


def undescribe_shards(tree: Any, mesh: DeviceMesh | None, shards: dict[str, Tensor]) -> Any:
    """The inverse: empty tensors in place of descriptions, sharded over ``mesh``, or whole without one."""
    if isinstance(tree, Mapping) and _SHARDED in tree:
        shape, dtype = tree["shape"], getattr(torch, tree["dtype"])
        if mesh is None:
            tensor: Tensor = torch.empty(shape, dtype=dtype)
        else:
            dims = [dim for dim in tree["placements"] if dim >= 0]
            # On a mesh of another rank of axes (replicas of shards) the innermost axis shards.
            outer = [Replicate()] * (mesh.ndim - 1)
            inner = Shard(dims[-1]) if dims else Replicate()
            tensor = empty_dtensor(shape, dtype=dtype, device_mesh=mesh, placements=[*outer, inner])
        shards[tree[_SHARDED]] = tensor
        return tensor
    if isinstance(tree, Mapping):
        return {key: undescribe_shards(value, mesh, shards) for key, value in tree.items()}
    if isinstance(tree, list):
        return [undescribe_shards(value, mesh, shards) for value in tree]
    return tree


# ------------------------------------------------------------------------------------------------- random generators


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every generator of this process: Python's, NumPy's, torch's of the CPU and of the device."""
    version, words, gauss = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # pyrefly: ignore
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": numpy | {"state": {"key": key, "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(states: list[dict[str, Any]], rank: int, world_size: int, device: torch.device) -> None:
    """Put back the generators of this rank; on another number of ranks, seeds that no two ranks share.

    A run on as many ranks as before goes on with the very numbers it would have drawn. On another number there is no
    such thing: every rank then draws from a seed made of rank 0's state, the number of ranks and its own.
    """
    if world_size != len(states):
        digest = hashlib.sha256(states[0]["torch"].numpy().tobytes()).digest()
        seeds = np.random.SeedSequence((int.from_bytes(digest), world_size, rank)).generate_state(2)
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[0]))
        torch.manual_seed(int(seeds[0]) << 32 | int(seeds[1]))
        return
    mine = states[rank]
    version, words, gauss = mine["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    words = mine["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(mine["numpy"] | {"state": mine["numpy"]["state"] | {"key": words}})
    torch.set_rng_state(mine["torch"])
    if device.type == "cuda" and mine["device"] is not None:
        torch.cuda.set_rng_state(mine["device"], device)
