"""Sequences of different lengths without their padding: one row of tokens, sequence after sequence.

Shapes: B sequences, T tokens of the longest, P packed tokens, H heads, D head width or model width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import register_dataclass


@dataclass(frozen=True, eq=False)
class Packed:
    """What is made of tensors, numbers and further such things, and moves between devices as a tensor does."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same on a device, as of `torch.Tensor.to`. Numbers that are no tensors stay on the host."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which ``to("cuda", non_blocking=True)`` does not wait."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: change(value) for name, value in values.items() if isinstance(value, Tensor | Packed)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Packing(Packed):
    """Where the tokens of a batch lie once the others are left out.

    Sequences of one length lie together, shortest first: attention on a CPU takes them as one dense batch. A tower on a
    GPU waits for nothing when it is given one that was made on the host.
    """

    row_P: Tensor
    """The sequence of each packed token: its row in the batch, int64."""
    position_P: Tensor
    """Its column there, int64."""
    start_B: Tensor
    """Where each row's sequence begins among the packed tokens, int64."""
    cu_seqlens: Tensor
    """Running sum of the lengths in packed order, from 0: [B + 1], int32."""
    max_seqlen: int
    """Length of the longest sequence."""

    @classmethod
    def of(cls, needed_BT: Tensor) -> Packing:
        """Pack the tokens that are True. Reads sizes off the ids, so it waits for the device and cannot be compiled."""
        length_B = needed_BT.sum(1)
        order_B = length_B.argsort(stable=True)
        end_B = length_B[order_B].cumsum(0)
        rank_P, position_P = needed_BT[order_B].nonzero(as_tuple=True)
        return cls(
            row_P=order_B[rank_P],
            position_P=position_P,
            start_B=torch.empty_like(end_B).index_copy_(0, order_B, end_B - length_B[order_B]),
            cu_seqlens=F.pad(end_B, (1, 0)).to(torch.int32),
            max_seqlen=int(length_B.max()) if len(length_B) else 0,
        )

    @classmethod
    def end_to_end(cls, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> Packing:
        """Sequences of known lengths in a given order: first that of row ``rows[0]``, with ``lengths[0]`` tokens.

        The numbers are the host's: copied to the device, not waited for there. In a compiled graph they are constants,
        so that it is compiled anew for others.
        """
        ends = [0, *itertools.accumulate(lengths)]
        length_B, row_B = torch.tensor(lengths, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64)
        begin_B = torch.tensor(ends[:-1], dtype=torch.int64)
        packing = cls(
            row_P=row_B.repeat_interleave(length_B, output_size=ends[-1]),
            position_P=torch.arange(ends[-1]) - begin_B.repeat_interleave(length_B, output_size=ends[-1]),
            start_B=torch.empty_like(begin_B).index_copy_(0, row_B, begin_B),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32),
            max_seqlen=max(lengths, default=0),
        )
        return packing.to(device, non_blocking=True)

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.start_B.shape[0]

    def sums(self, x_PD: Tensor) -> Tensor:
        """The sum of each sequence's tokens, in the order of rows: [B, ...] of [P, ...], float32 or wider."""
        x_PD = x_PD.to(torch.promote_types(x_PD.dtype, torch.float32))
        return x_PD.new_zeros(self.rows, *x_PD.shape[1:]).index_add(0, self.row_P, x_PD)

    def means(self, x_PD: Tensor, counts_P: Tensor) -> Tensor:
        """The mean of those of each sequence's tokens that count; zeros where none does. In the dtype of the input."""
        weight_P1 = counts_P.to(x_PD.dtype)[:, None]
        return (self.sums(x_PD * weight_P1) / self.sums(weight_P1).clamp(min=1)).to(x_PD.dtype)

    def maxima(self, x_PD: Tensor) -> Tensor:
        """The maximum of each sequence's tokens, in the order of rows: [B, D] of [P, D]; has no gradient."""
        row_PD = self.row_P[:, None].expand_as(x_PD)
        lowest_BD = x_PD.new_full((self.rows, x_PD.shape[1]), -torch.inf)
        return lowest_BD.scatter_reduce(0, row_PD, x_PD.detach(), "amax")


register_dataclass(Packing, serialized_type_name="mmbase.models.packing.Packing")
