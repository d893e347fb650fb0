"""Rows across the ranks of a process group, however many each rank holds. No autograd: the losses know their gradients.

Letters: W ranks, N rows of all ranks in rank order, M rows of this rank; ``rows`` are the numbers of rows of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(local_M: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Everyone's rows, ``[N, ...]`` in rank order.

    Equal numbers of rows are one ``all_gather_into_tensor``, unequal ones a broadcast per rank into its place: no
    padding travels and nothing is copied afterwards.
    """
    local_M = local_M.contiguous()
    gathered_N = local_M.new_empty((sum(rows), *local_M.shape[1:]))
    if equal(rows):
        dist.all_gather_into_tensor(gathered_N, local_M, group=group)
        return gathered_N
    parts = gathered_N.split(list(rows))
    parts[dist.get_rank(group)].copy_(local_M)
    pending = [dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)]
    for work in pending:
        if work is not None:
            work.wait()
    return gathered_N


def gather_numbers(number: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """float32 ``[W]``: a scalar of every rank."""
    return gather_rows(number.detach().float().reshape(1), [1] * dist.get_world_size(group), group)


def exchange_rows(full_N: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """``[W, M, ...]``: each rank's part of ``full_N`` goes to its owner; row q is what rank q held of this rank's."""
    own = rows[dist.get_rank(group)]
    received = full_N.new_empty((len(rows) * own, *full_N.shape[1:]))
    dist.all_to_all_single(received, full_N.contiguous(), [own] * len(rows), list(rows), group=group)
    return received.unflatten(0, (len(rows), own))


def scatter_sum(full_N: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """``[M, ...]``: this rank's rows of the sum of ``full_N`` over ranks (reduce-scatter), in the dtype of ``full_N``.

    NCCL reduces equal numbers of rows itself. Otherwise (gloo, whose reduce-scatter is an all-reduce of everything, or
    unequal rows) the parts are exchanged and added here, in rank order and in float32: the same bytes, one rounding.
    """
    if equal(rows) and dist.get_backend(group) == "nccl":
        summed_M = full_N.new_empty((rows[0], *full_N.shape[1:]))
        dist.reduce_scatter_tensor(summed_M, full_N.contiguous(), group=group)
        return summed_M
    parts = exchange_rows(full_N, rows, group)
    summed_M = parts[0].to(torch.promote_types(full_N.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        summed_M += part
    return summed_M.to(full_N.dtype)


def sum_over_ranks(number: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of a tensor over ranks, the same on each."""
    total = number.clone()
    dist.all_reduce(total, group=group)
    return total


def equal(rows: Sequence[int]) -> bool:
    """Whether every rank holds as many rows."""
    return len(set(rows)) == 1
