"""Whole tensors out of shards and back: what makes states of one way to train fit another.

A whole state holds plain tensors under the names of the unwrapped model, and so fits any number of ranks, sharded or
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mmbase.errors import MmbaseError
from mmbase.training.distributed import Ranks


@torch.no_grad()
def whole(tree: Any, ranks: Ranks) -> Any:
    """Nested mappings and lists with every tensor whole, copied to the CPU, on rank 0; None in their place elsewhere.

    All ranks call it: each shard travels. One tensor at a time is whole on the device.
    """
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True).contiguous() if ranks.is_first else None
    if isinstance(tree, Mapping):
        return {key: whole(value, ranks) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(value, ranks) for value in tree]
    return tree


@torch.no_grad()
def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor that this rank holds: on the device of ``like``, sharded and laid out in memory as it.

    Nothing is sent. The layout matters to fused optimisers, which take a weight's memory and that of its moments in one
    order: those of a channels_last convolution do not fit its shards, which are contiguous.
    """
    placed = torch.empty_like(like, dtype=full.dtype)
    if isinstance(like, DTensor) and not isinstance(full, DTensor):
        full = distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return placed.copy_(full)


@torch.no_grad()
def load_whole(targets: Mapping[str, Tensor], full: Mapping[str, Tensor] | None, ranks: Ranks) -> None:
    """Copy whole tensors into ``targets``, by name, in place.

    Args:
        targets: plain tensors or shards, the same names on all ranks.
        full: whole tensors, or shards laid out as the targets. Given on all ranks, nothing is sent; on rank 0 alone
            (None elsewhere), each tensor is sent to the others.
        ranks: all of which call.

    Raises:
        MmbaseError: names or shapes that differ.
    """
    given = ranks.gather_objects(full is not None)
    mistake = None if full is None else _difference(targets, full)
    if mistake := next(filter(None, ranks.gather_objects(mistake)), None):
        raise MmbaseError(mistake)
    for name, target in targets.items():
        if all(given):
            assert full is not None  # on all ranks
            value = full[name]
        else:
            value = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if full is not None:
                value.copy_(full[name])
            dist.broadcast(value, src=0)
        target.copy_(shard_like(value, target))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser's state of whole tensors; what belongs to a sharded parameter is sharded like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    by_index = dict(zip(indices, parameters, strict=True))

    def placed(name: str, value: Any, like: Tensor) -> Any:
        belongs = isinstance(value, Tensor) and value.shape == like.shape and name != "step"
        return shard_like(value, like) if belongs else value

    entries = {
        index: {name: placed(name, value, by_index[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _difference(targets: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> str | None:
    if missing := targets.keys() - full.keys():
        return f"the weights lack {min(missing)} and {len(missing) - 1} more; they are of another model"
    if unknown := full.keys() - targets.keys():
        return f"the weights hold {min(unknown)}, which the model does not have, and {len(unknown) - 1} more"
    for name, target in targets.items():
        if full[name].shape != target.shape:
            return f"{name} is {list(full[name].shape)} in the weights and {list(target.shape)} in the model"
    return None
