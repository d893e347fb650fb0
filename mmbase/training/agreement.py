"""Ranks that decide as one: what one of them alone knows, a signal or a clock or an error, made known to all.

Everything goes over gloo between the processors, in a group of its own: no device waits, and nothing gets between the
collectives of training.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist

from mmbase.training.distributed import Ranks


class Agreement:
    """A line between all ranks; every method is called by all of them, in the same order.

    Args:
        ranks: this process among the others. With one process nothing is sent.
        timeout: seconds after which ranks that do not come are given up.
    """

    def __init__(self, ranks: Ranks, timeout: float = 1800.0) -> None:
        self.world_size = ranks.world_size
        self.first = ranks.rank == 0
        self.group: dist.ProcessGroup | None = None
        if ranks.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
            assert isinstance(group, dist.ProcessGroup)  # every rank belongs to it
            self.group = group
        self._said: tuple[torch.Tensor, dist.Work | None] | None = None

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, by rank; on all of them. Values are pickled."""
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first_says(self, value: Any) -> Any:
        """What rank 0 gave, on all ranks."""
        if self.group is None:
            return value
        values = [value if self.first else None]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def any(self, *mine: bool) -> tuple[bool, ...]:
        """Of each question, whether any rank said yes, one call ago; with one process, now.

        Answers are a call late because they travel while the step between two calls runs: nobody waits for them. All
        ranks get the same answers in the same call.
        """
        if self.group is None:
            return mine
        before, answers = self._said, torch.tensor(mine, dtype=torch.uint8)
        work = dist.all_reduce(answers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._said = (answers, work)
        if before is None:
            return (False,) * len(mine)
        if before[1]:
            before[1].wait()
        return tuple(bool(answer) for answer in before[0].tolist())

    def close(self) -> None:
        """Wait for answers that are still on their way; called by all ranks."""
        if self._said and self._said[1]:
            self._said[1].wait()
        self._said = None
