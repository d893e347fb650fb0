"""Attention by PyTorch's ``scaled_dot_product_attention``, on any device.

Letters: B sequences, N tokens of each, M queries of each, T tokens of all, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    qkv_BN3HD: Tensor, *, causal: bool, scale: float | None = None, keep_BN: Tensor | None = None
) -> Tensor:
    """Self-attention of sequences of one length; returns out_BNHD.

    Args:
        qkv_BN3HD: packed projection, any floating dtype.
        causal: token i attends to tokens 0..i only.
        scale: factor of the logits; None: ``D ** -0.5``.
        keep_BN: True for keys that may be attended to; None: all. Every query needs one such key in reach.
    """
    # unbound before they are transposed, so that the three gradients are stacked contiguous, as the projection wants
    q_BHND, k_BHND, v_BHND = (part_BNHD.transpose(1, 2) for part_BNHD in qkv_BN3HD.unbind(2))
    mask = None if keep_BN is None else keep_BN[:, None, None, :]
    return attend(q_BHND, k_BHND, v_BHND, mask=mask, causal=causal, scale=scale).transpose(1, 2)


def attend(
    q_BHMD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of M queries over N tokens by whichever of PyTorch's ways is fastest; returns out_BHMD.

    Args:
        q_BHMD: queries, any floating dtype.
        k_BHND: keys.
        v_BHND: values.
        mask: boolean, broadcasts to [B, H, M, N]; True where attention is allowed.
        causal: query i attends to tokens 0..i only, in addition to the mask; M must equal N.
        scale: factor of the logits; None: ``D ** -0.5``.
    """
    if causal and mask is not None:
        mask, causal = mask & _lower_triangle(q_BHMD), False
    half_on_cpu = q_BHMD.device.type == "cpu" and q_BHMD.dtype != torch.float32 and k_BHND.shape[2] <= 1024
    if half_on_cpu and torch.is_grad_enabled() and q_BHMD.requires_grad:
        # backward of PyTorch's fused CPU kernel takes three to six times as long as these products
        if causal:
            mask = _lower_triangle(q_BHMD)
        return _attend_unfused(q_BHMD, k_BHND, v_BHND, mask, scale)
    return F.scaled_dot_product_attention(q_BHMD, k_BHND, v_BHND, attn_mask=mask, is_causal=causal, scale=scale)


def _attend_unfused(q_BHMD: Tensor, k_BHND: Tensor, v_BHND: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Two batched products and a softmax; scores are kept in the dtype of the input."""
    batch, heads, queries, width = q_BHMD.shape
    q, k, v = q_BHMD.flatten(0, 1), k_BHND.flatten(0, 1), v_BHND.flatten(0, 1)
    bias = q.new_zeros(1)
    if mask is not None:
        bias = q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        bias = bias.expand(batch, heads, -1, -1).flatten(0, 1) if bias.shape[0] > 1 else bias[0]
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5 if scale is None else scale)
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, queries, -1)


def _lower_triangle(q_BHMD: Tensor) -> Tensor:
    tokens = q_BHMD.shape[2]
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=q_BHMD.device).tril()


def varlen_attention(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, causal: bool, scale: float | None = None
) -> Tensor:
    """Self-attention of sequences of different lengths, end to end; returns out_THD.

    Sequences of equal length go together, without a mask, where the lengths may be read and enough are equal that the
    calls do not cost more than the padding they save; elsewhere all are padded to ``max_seqlen``.

    Args:
        qkv_T3HD: packed projection, any floating dtype.
        cu_seqlens: int32 [B + 1] on the same device, from 0 to T.
        max_seqlen: no sequence is longer.
        causal: as in :func:`packed_attention`.
        scale: as in :func:`packed_attention`.
    """
    if not torch.compiler.is_compiling():
        if not qkv_T3HD.shape[0]:
            return qkv_T3HD[:, 0]
        if cu_seqlens.device.type == "cpu":
            lengths = cu_seqlens.diff()
            distinct = lengths[lengths > 0].unique().tolist()
            # Measured: 64 captions of 5 to 30 tokens take equally long both ways, 256 of them 1.5 times as long padded.
            if max_seqlen > 64 or len(lengths) >= 2 * len(distinct):
                return _by_length(qkv_T3HD, cu_seqlens, lengths, distinct, causal, scale)
    return _padded(qkv_T3HD, cu_seqlens, max_seqlen, causal, scale)


def _by_length(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, lengths_B: Tensor, distinct: list[int], causal: bool, scale: float | None
) -> Tensor:
    """One call for each length that occurs, in float32 in any case.

    On a CPU that is faster than 16-bit products, which have to be set up anew for every new pair of length and count.
    """
    place_T = None
    if (lengths_B.diff() < 0).any():  # else sequences of equal length are neighbours already
        starts_B = cu_seqlens[:-1].long()
        members = [starts_B[lengths_B == length] for length in distinct]
        order_T = torch.cat([(s[:, None] + torch.arange(n)).flatten() for s, n in zip(members, distinct, strict=True)])
        place_T = torch.empty_like(order_T)
        place_T[order_T] = torch.arange(len(order_T))
        qkv_T3HD = qkv_T3HD.index_select(0, order_T)
    tokens = [length * int((lengths_B == length).sum()) for length in distinct]
    with torch.autocast(qkv_T3HD.device.type, enabled=False):
        wide_T3HD = qkv_T3HD.to(torch.promote_types(qkv_T3HD.dtype, torch.float32))
        parts = [
            packed_attention(part.unflatten(0, (-1, length)), causal=causal, scale=scale).flatten(0, 1)
            for part, length in zip(wide_T3HD.split(tokens), distinct, strict=True)
        ]
        out_THD = torch.cat(parts).to(qkv_T3HD.dtype)
    return out_THD if place_T is None else out_THD.index_select(0, place_T)


def _padded(qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None) -> Tensor:
    """One call for all, with a mask; reads no value on the host."""
    tokens, device = qkv_T3HD.shape[0], qkv_T3HD.device
    starts_B, stops_B = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    column_N = torch.arange(max_seqlen, device=device)
    keep_BN = column_N < (stops_B - starts_B)[:, None]
    # An empty sequence keeps a key too, or its softmax, which nobody reads, would be NaN and so would its gradient.
    keep_BN = keep_BN | (column_N == 0)
    source_BN = (starts_B[:, None] + column_N).clamp(max=tokens - 1)
    qkv_BN3HD = qkv_T3HD.index_select(0, source_BN.flatten()).unflatten(0, source_BN.shape)
    out_BNHD = packed_attention(qkv_BN3HD, causal=causal, scale=scale, keep_BN=keep_BN)
    token_T = torch.arange(tokens, device=device)
    sequence_T = torch.searchsorted(stops_B, token_T, right=True)
    place_T = sequence_T * max_seqlen + token_T - starts_B[sequence_T]
    return out_BNHD.flatten(0, 1).index_select(0, place_T)
