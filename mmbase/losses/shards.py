"""How one contrastive batch lies across the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """Rows that every rank holds of a batch; ranks may hold different numbers of them."""

    group: dist.ProcessGroup | None
    """None: all ranks."""
    rank: int
    image_rows: tuple[int, ...]
    """Of every rank, in rank order."""
    text_rows: tuple[int, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.image_rows)

    @property
    def images(self) -> int:
        """Images of all ranks."""
        return sum(self.image_rows)

    @property
    def texts(self) -> int:
        """Texts of all ranks."""
        return sum(self.text_rows)

    def image_part(self, rank: int) -> slice:
        """Where a rank's images lie in the whole batch."""
        return _part(self.image_rows, rank)

    def text_part(self, rank: int) -> slice:
        """Where a rank's texts lie in the whole batch."""
        return _part(self.text_rows, rank)

    def offset(self, owner: int) -> int:
        """Column of this rank's first image's match, counted from ``owner``'s first text: may be outside its texts."""
        return self.image_part(self.rank).start - self.text_part(owner).start


def _part(rows: tuple[int, ...], rank: int) -> slice:
    ends = list(accumulate(rows))
    return slice(ends[rank] - rows[rank], ends[rank])


def per_row(of_rank_W: Tensor, rows: tuple[int, ...]) -> Tensor:
    """``[N]``: what belongs to the rank that holds each row."""
    return of_rank_W.repeat_interleave(on_device(rows, of_rank_W.device), output_size=sum(rows))


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 vector; unlike ``torch.tensor(numbers, device=device)`` it does not wait for a GPU."""
    return torch.tensor(numbers).to(device, non_blocking=True)
