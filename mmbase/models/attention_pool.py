"""Pooling by attention: a learnt query over the tokens of an image.

Shapes: B batch, N tokens, M query tokens, P packed tokens, H heads, D head width (after an H) or model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmbase.models.config import Activation
from mmbase.models.initialised import Linear, normal_parameter
from mmbase.models.layers import MLP, LayerNorm, cross_attention
from mmbase.models.packing import Packing


class AttentionPool(nn.Module):
    """Multi-head attention pooling with one learnt query, then a residual MLP: SigLIP's MAP head (arXiv:2303.15343)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation, *, norm_eps: float) -> None:
        super().__init__()
        std = width**-0.5
        self.heads = heads
        self.query = normal_parameter(width, std=std)
        self.q = Linear(width, width, std=std)
        self.kv = Linear(width, 2 * width, std=std)
        self.proj = Linear(width, width, std=std)
        self.norm = LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation, in_std=(2 * width) ** -0.5, out_std=std)

    def forward(self, x_BND: Tensor, packing: Packing | None = None) -> Tensor:
        """Pool x_BND to x_BD, or x_PD of a packed batch."""
        q_1HD = self.q(self.query).unflatten(-1, (1, self.heads, -1))
        k_BNHD, v_BNHD = self.kv(x_BND).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        if packing is None:
            q_BMHD = q_1HD.expand(x_BND.shape[0], -1, -1, -1)
            out_BHD = cross_attention(q_BMHD, k_BNHD, v_BNHD)[:, 0]
        else:
            out_BHD = _attend_packed(q_1HD, k_BNHD, v_BNHD, packing)
        x_BD = self.proj(out_BHD.flatten(1))
        return x_BD + self.mlp(self.norm(x_BD))


def _attend_packed(q_1HD: Tensor, k_PHD: Tensor, v_PHD: Tensor, packing: Packing) -> Tensor:
    """Attention of one query, the same for all, over each sequence: out_BHD.

    One query makes it a weighted sum, which is done in float32 without a product's kernel and without padding.
    """
    scores_PH = (k_PHD.float() * q_1HD.float()).sum(-1) * k_PHD.shape[-1] ** -0.5
    weight_PH = (scores_PH - packing.maxima(scores_PH)[packing.row_P]).exp()
    total_BH = packing.sums(weight_PH)
    return (packing.sums(v_PHD.float() * weight_PH[..., None]) / total_BH[..., None]).to(v_PHD.dtype)
