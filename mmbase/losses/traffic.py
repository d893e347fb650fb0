"""How many bytes a rank has to send, counted from the collectives that it calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}


class Traffic(TorchDispatchMode):
    """Context manager that adds up what this rank sends, by operation, in whatever loss runs inside it.

    Counted is what has to leave a rank at least, whichever algorithm a backend picks: with W ranks an all-gather and a
    broadcast send a rank's rows to W - 1 others, a reduce-scatter, a scatter and an all-to-all everything but the own
    part, an all-reduce ``2 (W - 1) / W`` of its tensor, a send its tensor. Every process counts itself alone::

        with Traffic() as traffic:
            loss(image_features, text_features, logit_scale).backward()
        print(traffic.bytes, dict(traffic.by_operation))
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        """All bytes so far."""
        return sum(self.by_operation.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count an operation of torch.distributed, then run it."""
        if func.namespace == "c10d":
            operation = func.overloadpacket.__name__
            if sent := _bytes_sent(operation, args):
                self.by_operation[operation] += sent
        return func(*args, **(kwargs or {}))


def _bytes_sent(operation: str, args: Sequence[Any]) -> int:
    """Bytes that one call of ``c10d::operation`` sends from this rank.

    Raises:
        NotImplementedError: an operation that is not known here; a wrong count would be worse.
    """
    if operation in SILENT:
        return 0
    group = dist.ProcessGroup.unbox(next(each for each in args if isinstance(each, torch.ScriptObject)))
    others, rank = group.size() - 1, group.rank()
    match operation:
        case "send":
            return _size(args[0])
        case "allgather_":
            return _size(args[1]) * others
        case "_allgather_base_":
            return _size([args[1]]) * others
        case "broadcast_":
            return _size(args[0]) * others if rank == args[2] else 0
        case "allreduce_":
            return 2 * others * _size(args[0]) // (others + 1)
        case "_reduce_scatter_base_":
            return _size([args[1]]) * others // (others + 1)
        case "reduce_scatter_" | "scatter_":
            return sum(_size(parts) - _size([parts[rank]]) for parts in args[1])
        case "alltoall_base_":
            source, splits = args[1], args[4]
            own = splits[rank] * source[:1].numel() if splits else source.numel() // (others + 1)
            return _size([source]) - own * source.element_size()
    raise NotImplementedError(f"Traffic does not know the bytes of c10d::{operation}")


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
