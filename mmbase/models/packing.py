"""Batches of sequences of different lengths without their padding: one row of tokens, sequence after sequence.

Shapes: B sequences, T tokens of the longest, P packed tokens, H heads, D head width or model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch lie once the others are left out.

    Sequences lie shortest first, so that those of one length are neighbours: attention takes them as one dense batch.
    """

    row_P: Tensor
    """The sequence of each packed token: its row in the padded batch."""
    position_P: Tensor
    """Its column there."""
    place_BT: Tensor
    """Where the padded batch's tokens lie among the packed ones; of tokens left out, where the one before them lies."""
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
        start_B = torch.empty_like(end_B).index_copy_(0, order_B, end_B - length_B[order_B])
        return cls(
            row_P=order_B[rank_P],
            position_P=position_P,
            place_BT=start_B[:, None] + needed_BT.cumsum(1) - 1,
            cu_seqlens=F.pad(end_B, (1, 0)).to(torch.int32),
            max_seqlen=int(length_B.max()) if len(length_B) else 0,
        )

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.place_BT.shape[0]

    def places(self, token: Tensor | int) -> Tensor:
        """Where one token of each sequence, given by its column in the padded batch, lies among the packed ones."""
        if isinstance(token, int):
            return self.place_BT[:, token]
        return self.place_BT.gather(1, token[:, None])[:, 0]

    def sums(self, x_PD: Tensor) -> Tensor:
        """The sum of each sequence's tokens, sequences in the order of the padded batch: [B, D], float32 or wider."""
        x_PD = x_PD.to(torch.promote_types(x_PD.dtype, torch.float32))
        return x_PD.new_zeros(self.rows, x_PD.shape[1]).index_add(0, self.row_P, x_PD)
