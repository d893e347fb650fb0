"""Layers of both towers. Kernels are called here and nowhere else.

Shapes: B batch, N tokens, M query tokens, H heads, D head width (after an H) or model width, K kept tokens, P tokens
of a packed batch, of all its sequences together, R residual branches.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmbase.keyed import counted
from mmbase.models.config import Activation
from mmbase.models.initialised import Linear
from mmbase.models.noise import Dropout, DropPath
from mmbase.models.packing import Packing
from mmbase_kernels import add_layer_norm, layer_norm
from mmbase_kernels import attention as kernels_attention
from mmbase_kernels.activation import activate, bias_activation, uses_fused
from mmbase_kernels.attention_sdpa import attend, packed_attention
from mmbase_kernels.head import head

Kind = TypeVar("Kind", bound=nn.Module)


def attention(
    qkv_BN3HD: Tensor,
    *,
    causal: bool = False,
    keep_BN: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Scaled dot-product self-attention on packed queries, keys and values: softmax(QKᵀ/√D)V.

    Args:
        qkv_BN3HD: packed projections, any floating dtype; qkv_P3HD with ``cu_seqlens``.
        causal: token i attends to tokens 0..i only.
        keep_BN: True for keys that may be attended to; None for all. Every query needs one such key in reach.
        cu_seqlens: running sum of sequence lengths from 0 to P, int32 [B + 1]: token attends within its sequence only.
        max_seqlen: the longest of these sequences.

    Returns:
        out_BNHD, or out_PHD, in the dtype of the input.
    """
    if keep_BN is not None:
        return packed_attention(qkv_BN3HD, causal=causal, keep_BN=keep_BN)
    return kernels_attention(qkv_BN3HD, causal=causal, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


def cross_attention(q_BMHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, *, keep_BN: Tensor | None = None) -> Tensor:
    """Attention of few queries over many tokens (pooling); returns out_BMHD. ``keep_BN`` as in `attention`."""
    q_BHMD, k_BHND, v_BHND = (x.transpose(1, 2) for x in (q_BMHD, k_BNHD, v_BNHD))
    mask = None if keep_BN is None else keep_BN[:, None, None, :]
    return attend(q_BHMD, k_BHND, v_BHND, mask=mask).transpose(1, 2)


def untouched(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling this module is what ``kind`` computes and nothing besides, so that an operator may stand for it.

    Not so with a subclass, which is what LoRA, quantisation, parametrisations and FSDP2 make of a module that they are
    applied to, nor with hooks or a ``forward`` put in its place.
    """
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return type(module) is kind and not any(hooks) and "forward" not in module.__dict__


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose output has the dtype of its input, also under autocast (as OpenCLIP's)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last axis."""
        return layer_norm(input, self.weight, self.bias, eps=self.eps)


def add_and_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``x + branch`` and ``norm`` of it, by one operator where it is our LayerNorm."""
    if x.dtype == branch.dtype and untouched(norm, LayerNorm):
        return add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)
    x = x + branch
    return x, norm(x)


def project_token(x_B1D: Tensor, norm: nn.Module, proj: nn.Module, *, normalize: bool) -> Tensor:
    """Features_BE of the token that is pooled, ``proj(norm(x))``, by one operator where they are our own layers."""
    if untouched(norm, LayerNorm) and (untouched(proj, Linear) or untouched(proj, nn.Identity)):
        weight, bias = (proj.weight, proj.bias) if isinstance(proj, Linear) else (None, None)
        return head(x_B1D, 0, norm.weight, norm.bias, weight, bias, eps=norm.eps, normalize=normalize)
    features_BE = proj(norm(x_B1D)[:, 0])
    return unit_length(features_BE) if normalize else features_BE


def unit_length(features_BE: Tensor) -> Tensor:
    """Features of unit length in float32: bfloat16 would round cosines by up to 0.4 %, times the logit scale."""
    return F.normalize(features_BE.to(torch.promote_types(features_BE.dtype, torch.float32)), dim=-1)


class LayerScale(nn.Module):
    """Learnt per-channel scale of a residual branch (CaiT, arXiv:2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Scale each channel."""
        return x_BND * self.gamma.to(x_BND.dtype)


class Branch(nn.Sequential):
    """What a residual branch passes through before it is added: nothing, in most models."""

    def __init__(self, width: int, layer_scale: float | None, dropout: float, drop_path: float) -> None:
        super().__init__()
        if layer_scale is not None:
            self.add_module("scale", LayerScale(width, layer_scale))
        if dropout:
            self.add_module("dropout", Dropout(dropout))
        if drop_path:
            self.add_module("drop_path", DropPath(drop_path))

    def forward(self, input: Tensor, packing: Packing | None = None, keys_2B: Tensor | None = None) -> Tensor:
        """Pass x_BND through, or x_PD of a packed batch; the samples' keys are those of dropout and of drop path."""
        for part in self:
            if isinstance(part, Dropout | DropPath):
                keys_B = None if keys_2B is None else keys_2B[int(isinstance(part, DropPath))]
                input = part(input, packing, keys_B)
            else:
                input = part(input)
        return input


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection [B, N, 3, H, D]."""

    def __init__(self, width: int, heads: int, *, out_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, std=width**-0.5)
        self.proj = Linear(width, width, std=out_std)

    def forward(
        self,
        x_BND: Tensor,
        *,
        causal: bool = False,
        keep_BN: Tensor | None = None,
        token: Tensor | int | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attend; with ``token`` only that token of each row asks, and the result is x_B1D (see `Transformer`)."""
        qkv_BN3HD = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
        if packing is not None:
            out_PHD = attention(qkv_BN3HD, causal=causal, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen)
            # one query per sequence would need the keys padded again: more work than the others' short attention
            return self.proj((out_PHD if token is None else take_token(out_PHD, token, packing)).flatten(-2))
        if token is None:
            out_BNHD = attention(qkv_BN3HD, causal=causal, keep_BN=keep_BN)
        else:
            q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
            if causal:
                last_B1 = token[:, None] if isinstance(token, Tensor) else token
                before_BN = (torch.arange(x_BND.shape[1], device=x_BND.device) <= last_B1).expand(x_BND.shape[:2])
                keep_BN = before_BN if keep_BN is None else keep_BN & before_BN
            out_BNHD = cross_attention(take_token(q_BNHD, token), k_BNHD, v_BNHD, keep_BN=keep_BN)
        return self.proj(out_BNHD.flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, in_std: float, out_std: float) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = Linear(width, hidden, std=in_std)
        self.fc2 = Linear(hidden, width, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        fc1 = self.fc1
        if untouched(fc1, Linear) and uses_fused(x, self.activation, width=fc1.out_features):
            return self.fc2(bias_activation(F.linear(x, fc1.weight), fc1.bias, self.activation))
        return self.fc2(activate(fc1(x), self.activation))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        *,
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        depth: int = 12,
        branch_init: float = 1.0,
    ) -> None:
        """``depth`` is the number of blocks in the tower: residual branches start smaller in deeper ones (GPT-2).

        ``branch_init`` scales their last layers further; with 0 the block starts as the identity.
        """
        super().__init__()
        branch_std = branch_init * width**-0.5 * (2 * depth) ** -0.5
        self.norm1 = LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, out_std=branch_std)
        self.norm2 = LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation, in_std=(2 * width) ** -0.5, out_std=branch_std)
        self.branch1 = Branch(width, layer_scale, dropout, drop_path)
        self.branch2 = Branch(width, layer_scale, dropout, drop_path)

    def forward(
        self,
        x_BND: Tensor,
        *,
        causal: bool = False,
        keep_BN: Tensor | None = None,
        token: Tensor | int | None = None,
        packing: Packing | None = None,
        keys_R2B: Tensor | None = None,
    ) -> Tensor:
        """Return x_BND, or with ``token`` only that token of each row, x_B1D, which is all that pooling needs."""
        keys1_2B, keys2_2B = (None, None) if keys_R2B is None else keys_R2B.unbind()
        attended = self.attn(self.norm1(x_BND), causal=causal, keep_BN=keep_BN, token=token, packing=packing)
        if token is not None:
            x_BND, packing = take_token(x_BND, token, packing), None
        x_BND, normed_BND = add_and_norm(x_BND, self.branch1(attended, packing, keys1_2B), self.norm2)
        return x_BND + self.branch2(self.mlp(normed_BND), packing, keys2_2B)


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        *,
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        branch_init: float = 1.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio,
                activation,
                norm_eps=norm_eps,
                layer_scale=layer_scale,
                drop_path=drop_path * i / max(1, layers - 1),
                dropout=dropout,
                depth=layers,
                branch_init=branch_init,
            )
            for i in range(layers)
        )

    def forward(
        self,
        x_BND: Tensor,
        *,
        causal: bool = False,
        keep_BN: Tensor | None = None,
        token: Tensor | int | None = None,
        packing: Packing | None = None,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks.

        Args:
            x_BND: tokens, or x_PD with ``packing``.
            causal: attend to earlier tokens only.
            keep_BN: True for tokens that may be attended to; of packed tokens all may.
            token: position of the one token of each row that is wanted, one for all rows or one each; with ``packing``
                its place among the packed tokens, for each row. The last block then computes no other, which saves
                three quarters of it, and x_B1D is returned.
            packing: where the tokens lie that are computed at all.
            keys_B: keys of the samples, int64, from which their noise is drawn; None: from torch's generator.
        """
        last = len(self.blocks) - 1
        keys_LR2B = None
        if keys_B is not None:  # of all blocks at once: on a GPU each operation costs a launch
            keys_LR2B = counted(keys_B, 4 * len(self.blocks), first=1).movedim(-1, 0).unflatten(0, (-1, 2, 2))
        for i, block in enumerate(self.blocks):
            options = {"causal": causal, "keep_BN": keep_BN, "token": token if i == last else None, "packing": packing}
            options["keys_R2B"] = None if keys_LR2B is None else keys_LR2B[i]
            if self.checkpoint_activations and self.training:
                x_BND = checkpoint(block, x_BND, use_reentrant=False, **options)
            else:
                x_BND = block(x_BND, **options)
        return take_token(x_BND, token, packing) if last < 0 and token is not None else x_BND


def take_token(x_BN: Tensor, token: Tensor | int, packing: Packing | None = None) -> Tensor:
    """Pick one token of each row along axis 1, keeping the axis: [B, N, ...] -> [B, 1, ...].

    With ``packing`` the tokens are packed, [P, ...], and ``token`` says for each row where among them its token lies.
    """
    if packing is not None:
        return x_BN[token].unsqueeze(1)
    if isinstance(token, Tensor):
        return x_BN[torch.arange(x_BN.shape[0], device=x_BN.device), token].unsqueeze(1)
    return x_BN.narrow(1, token, 1)
