"""What towers drop at random in training: values, residual branches, patches.

Each layer draws from torch's generator; or, where keys are given, from a hash of the sample's key and its own place in
the tower, whatever else is in the batch: see `mmbase.keyed`. A sample then meets the same noise in any split of a batch
into ranks and parts, padded or packed, compiled or not, and again when its activations are computed again.

Shapes: B samples, N tokens, P tokens of a packed batch, D width, K kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmbase.keyed import counted, draw, unit
from mmbase.models.packing import Packing

_LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """Zero single values and scale up the others, so that the expectation stays."""

    def forward(self, input: Tensor, packing: Packing | None = None, keys_B: Tensor | None = None) -> Tensor:
        """Drop from x_BND, or from x_PD of a packed batch; ``keys_B`` is int64.

        With keys a value's fate is 16 bits of a hash of (key, position of the token, channel): the rate is rounded to
        1/65536, and four values share a hash, which is what makes up most of the work.
        """
        if keys_B is None or not self.training or self.p == 0.0:
            return super().forward(input)
        if packing is None:
            token_keys = counted(keys_B, input.shape[1])
        else:
            token_keys = draw(keys_B[packing.row_P], packing.position_P)
        width = input.shape[-1]
        bits = counted(token_keys, (width + 3) // 4).view(torch.int16)[..., :width]
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        keep = bits >= dropped - _LEVELS // 2
        return input * keep.to(input.dtype).div(1.0 - dropped / _LEVELS)


class DropPath(nn.Module):
    """Drop a residual branch for whole samples in training (stochastic depth, arXiv:1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, packing: Packing | None = None, keys_B: Tensor | None = None) -> Tensor:
        """Zero some samples and scale up the others, so that the expectation stays."""
        if not self.training or self.rate == 0.0:
            return x
        samples = x.shape[0] if packing is None else packing.rows
        drawn_B = torch.rand(samples, device=x.device) if keys_B is None else unit(keys_B)
        keep_B = drawn_B >= self.rate
        keep = keep_B if packing is None else keep_B[packing.row_P]
        return x * keep.view(-1, *[1] * (x.ndim - 1)).to(x.dtype).div(1.0 - self.rate)


class PatchDropout(nn.Module):
    """Keep a random subset of the patches of each image in training (FLIP, arXiv:2212.00794).

    Without keys it draws from torch's global generator of the input's device, so it repeats where that generator's
    state repeats. It sees patches only: a class token is prepended later and so is always kept.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BND: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Return x_BKD with K = max(1, ⌊N·(1 - rate)⌋) patches per image; all of them in eval mode."""
        if not self.training or self.rate == 0.0:
            return x_BND
        batch, tokens, width = x_BND.shape
        keep = max(1, int(tokens * (1.0 - self.rate)))
        # All 64 bits are compared: among fewer there are ties, which topk breaks by the size of the batch.
        drawn_BN = torch.rand(batch, tokens, device=x_BND.device) if keys_B is None else counted(keys_B, tokens)
        index_BK = drawn_BN.topk(keep, dim=1).indices
        return x_BND.gather(1, index_BK[:, :, None].expand(-1, -1, width))
