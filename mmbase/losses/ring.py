"""Blocks that visit every rank, each travelling on while it is worked on, with what the ranks add up about it.

No rank ever holds more than its own block, one that it works on and one that arrives.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context"; for contrastive losses
Cheng et al. 2024, "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss" (Inf-CL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

Block = tuple[Tensor, ...]


class _Batch:
    """Sends and receives that are posted together, so that no order of ranks can lock, and awaited together."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.operations: list[dist.P2POp] = []
        self.works: list[dist.Work] = []

    def send(self, tensor: Tensor, peer: int) -> None:
        self.operations.append(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer))

    def receive(self, tensor: Tensor, peer: int) -> Tensor:
        self.operations.append(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer))
        return tensor

    def start(self) -> None:
        if self.operations:
            self.works = dist.batch_isend_irecv(self.operations)

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass
class _Lane:
    """One direction of travel: what this rank holds of it."""

    direction: int
    """+1: towards higher ranks."""
    hops: int
    """How far a block travels this way."""
    block: Block
    total: Tensor | None = None
    """What the ranks so far have added up about ``block``."""

    def owner(self, rank: int, step: int, world: int) -> int:
        """Whose block is here after so many steps."""
        return (rank - self.direction * step) % world

    def move(self, batch: _Batch, rank: int, step: int, rows: Sequence[int]) -> tuple[Block | None, Tensor | None]:
        """Post what leaves and what arrives during a step: the next block, and the total about the present one."""
        world = len(rows)
        after, before = (rank + self.direction) % world, (rank - self.direction) % world
        coming, total = None, None
        if step < self.hops:
            for tensor in self.block:
                batch.send(tensor, after)
            count = rows[self.owner(rank, step + 1, world)]
            coming = tuple(batch.receive(_like(tensor, count), before) for tensor in self.block)
        if self.total is not None:
            batch.send(self.total, after)
            total = batch.receive(_like(self.total, rows[self.owner(rank, step, world)]), before)
        return coming, total


def rotate(
    block: Block,
    rows: Sequence[int],
    group: dist.ProcessGroup | None,
    visit: Callable[[int, Block], Tensor | None],
    merge: Callable[[Tensor, Tensor], Tensor],
    *,
    both_ways: bool = False,
) -> Tensor | None:
    """Show every rank's block to every rank, and bring home what all of them found out about one's own.

    While ``visit`` works on a block, the block already travels to the next rank, the next one arrives, and so does what
    the ranks before found out about the present one. A total travels at most W - 1 hops, the last one straight home.

    Args:
        block: this rank's tensors, each ``[rows[rank], ...]``.
        rows: rows of every rank's block.
        group: process group; None for all ranks.
        visit: ``(owner, block) -> contribution`` of this rank to the owner's block, all of one shape behind the rows
            and of one dtype, or None throughout. The own block comes first. Must not change the block.
        merge: adds two contributions; may work in place in the first.
        both_ways: send blocks both ways, each half around: half the steps, both directions of every link.

    Returns:
        All ranks' contributions to this rank's block, merged in an order that depends on W alone; None where ``visit``
        gives None.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    block = tuple(tensor.contiguous() for tensor in block)
    backwards = (world - 1) // 2 if both_ways else 0
    lanes = [_Lane(1, world - 1 - backwards, block), _Lane(-1, backwards, block)]
    lanes = [lane for lane in lanes if lane.hops]

    home: Tensor | None = None
    for step in range(lanes[0].hops + 1 if lanes else 1):
        moving = [lane for lane in lanes if step <= lane.hops]
        batch = _Batch(group)
        arriving = [lane.move(batch, rank, step, rows) for lane in moving]
        batch.start()
        if step == 0:
            home = _contiguous(visit(rank, block))
        found = [_contiguous(visit(lane.owner(rank, step, world), lane.block)) if step else None for lane in moving]
        batch.wait()
        for lane, (coming, total), contribution in zip(moving, arriving, found, strict=True):
            if contribution is not None:
                lane.total = contribution if total is None else merge(total, contribution)
            lane.block = lane.block if coming is None else coming

    if home is None:
        return None
    batch, returned = _Batch(group), []
    for lane in lanes:
        assert lane.total is not None
        batch.send(lane.total, lane.owner(rank, lane.hops, world))
        returned.append(batch.receive(_like(home, rows[rank]), (rank + lane.direction * lane.hops) % world))
    batch.start()
    batch.wait()
    for total in returned:
        home = merge(home, total)
    return home


def _like(tensor: Tensor, rows: int) -> Tensor:
    return tensor.new_empty((rows, *tensor.shape[1:]))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
