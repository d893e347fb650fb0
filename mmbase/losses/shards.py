"""How one contrastive batch lies across the ranks of a process group."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.losses.collectives import gather_rows


@dataclass(frozen=True)
class Shards:
    """Rows that every rank holds of a batch; ranks may hold different numbers of them."""

    group: dist.ProcessGroup | None
    """None: all ranks."""
    rank: int
    image_rows: tuple[int, ...]
    """Of every rank, in rank order."""
    text_rows: tuple[int, ...]

    @classmethod
    def exchange(
        cls, image_MD: Tensor, text_MD: Tensor, group: dist.ProcessGroup | None, equal_rows: bool = False
    ) -> Shards:
        """Ask every rank how many rows it holds of two matrices; every rank must call.

        The numbers travel over the group's CPU backend where it has one (``backend="cpu:gloo,cuda:nccl"``); over NCCL
        alone the host waits for the GPU. ``equal_rows`` asks nothing and takes every rank to hold as many as this one.

        Raises:
            MmbaseError: no matrices; or, on every rank alike, so that none is left waiting: a rank without rows, widths
                that differ.
        """
        if image_MD.ndim != 2 or text_MD.ndim != 2:
            raise MmbaseError(
                f"features must be [rows, width], not {list(image_MD.shape)} images and {list(text_MD.shape)} texts"
            )
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        if equal_rows:
            return cls(group, rank, (len(image_MD),) * world, (len(text_MD),) * world)
        device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else image_MD.device
        mine = torch.tensor([[*image_MD.shape, *text_MD.shape]], device=device)
        everyone = gather_rows(mine, [1] * world, group)
        image_rows, image_widths, text_rows, text_widths = everyone.T.tolist()
        for what, rows in (("image", image_rows), ("text", text_rows)):
            if 0 in rows:
                raise MmbaseError(
                    f"rank {rows.index(0)} has no {what} features (rows per rank: {rows}): give every rank a sample or "
                    "drop the last batch"
                )
        if len({*image_widths, *text_widths}) > 1:
            raise MmbaseError(
                f"widths differ: images {image_widths} and texts {text_widths} on the ranks; project both to one width"
            )
        return cls(group, rank, tuple(image_rows), tuple(text_rows))

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
    repeats = torch.tensor(rows, device=of_rank_W.device)
    return of_rank_W.repeat_interleave(repeats, output_size=sum(rows))
