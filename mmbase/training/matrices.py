"""A function of whole matrices, applied to matrices that lie in pieces on several ranks, or alike on all of them.

Matrices are taken in turns of as many as there are ranks. In each turn a rank has one whole matrix to itself.

Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Function = Callable[[Tensor], Tensor]


class Matrices(Protocol):
    """Where the matrices of a turn lie."""

    turn: int
    """matrices taken together"""

    def mapped(self, function: Function, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What this rank holds of ``function`` of each matrix.

        Args:
            function: of a whole matrix, to one of its shape.
            parts: what this rank holds of each of at most ``turn`` matrices, of any shape.
            shapes: rows and columns of the whole matrices.
        """
        ...


class OwnMatrices:
    """Matrices of this process alone."""

    turn = 1

    def mapped(self, function: Function, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """See :class:`Matrices`."""
        return [function(part.reshape(*shape)) for part, shape in zip(parts, shapes)]


class SharedMatrices:
    """Matrices that all ranks of a group hold alike: each works one out and sends it to the others."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.turn, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def mapped(self, function: Function, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """See :class:`Matrices`."""
        mine = parts[0].new_zeros(max(part.numel() for part in parts))
        if self.rank < len(parts):
            part = parts[self.rank]
            mine[: part.numel()] = function(part.reshape(*shapes[self.rank])).flatten()
        everyones = mine.new_empty(self.turn * len(mine))
        dist.all_gather_into_tensor(everyones, mine, group=self.group)
        rows = everyones.view(self.turn, -1)
        return [row[: part.numel()].view(*shape) for row, part, shape in zip(rows, parts, shapes)]


class ShardedMatrices:
    """Matrices whose rows lie on the ranks of a group as ``torch.chunk`` divides them: gathered on one, and sent back.

    Each piece travels twice, which is what an all-gather of every matrix would send once for each rank.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.turn, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def mapped(self, function: Function, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """See :class:`Matrices`."""
        sent = [part.numel() for part in parts] + [0] * (self.turn - len(parts))
        received, whole = [0] * self.turn, None
        if self.rank < len(parts):
            rows, columns = shapes[self.rank]
            received = [columns * count for count in chunks(rows, self.turn)]
        matrix = self._exchange(torch.cat([part.flatten() for part in parts]), sent, received)
        if self.rank < len(parts):
            whole = function(matrix.view(*shapes[self.rank])).to(matrix.dtype).flatten()
        back = self._exchange(matrix if whole is None else whole, received, sent)
        return [piece.view(part.shape) for piece, part in zip(back.split(sent), parts)]

    def _exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = values.new_empty(sum(received))
        dist.all_to_all_single(out, values.contiguous(), received, sent, group=self.group)
        return out


def chunks(rows: int, ranks: int) -> list[int]:
    """Rows of each rank, as FSDP2 shards an axis: equal ones, then what is left, then none."""
    each = -(-rows // ranks)
    return [max(0, min(each, rows - rank * each)) for rank in range(ranks)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, which shares its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which rows of a DTensor are sharded; None where this rank has it whole."""
    if not isinstance(tensor, DTensor):
        return None
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "FSDP2 shards rows"
            return tensor.device_mesh.get_group(axis)
    return None
