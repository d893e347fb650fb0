"""The text tower: a transformer over token ids, causal as in CLIP or bidirectional as in SigLIP.

Shapes: B batch, T tokens, D width, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmbase.errors import MmbaseError
from mmbase.models.config import TextConfig
from mmbase.models.layers import Embedding, LayerNorm, Linear, Transformer, normal_parameter

__all__ = ["TextConfig", "TextTransformer"]


class TextTransformer(nn.Module):
    """Token ids to features."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, std = config.width, config.width**-0.5
        self.token_embedding = Embedding(config.vocab_size, width, std=0.02)
        self.positional_embedding = normal_parameter(config.context_length, width, std=0.01)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            config.mlp_ratio,
            config.activation,
            norm_eps=config.norm_eps,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path,
            dropout=config.dropout,
            branch_init=config.branch_init,
            checkpoint_activations=config.checkpoint_activations,
        )
        self.norm = LayerNorm(width, eps=config.norm_eps)
        self.proj = (
            Linear(width, embed_dim, bias=config.projection_bias, std=std) if config.projection else nn.Identity()
        )

    def forward(self, text_BT: Tensor) -> Tensor:
        """Token ids, at most context_length of them, to features_BE, not normalised.

        Fewer than context_length tokens take the first positions. With a causal tower and eot or eos pooling that
        changes nothing: what follows the end token is never looked at (see `trim`).

        Raises:
            MmbaseError: texts longer than context_length.
        """
        length, limit = text_BT.shape[1], self.config.context_length
        if length > limit:
            raise MmbaseError(f"texts have {length} tokens but the model's context_length is {limit}; cut them to that")
        x_BTD = self.token_embedding(text_BT) + self.positional_embedding[:length]
        keep_BT = None
        if self.config.mask_padding:
            keep_BT = text_BT != self.config.pad_id
            keep_BT[:, 0] = True  # a row of nothing but padding attends to its first token rather than to nothing
        token = self._pooled_token(text_BT)
        x_BTD = self.transformer(self.dropout(x_BTD), causal=self.config.causal, keep_BN=keep_BT, token=token)
        x_BTD = self.norm(x_BTD)
        if token is not None:
            return self.proj(x_BTD[:, 0])
        weight_BT1 = (text_BT != self.config.pad_id).to(x_BTD.dtype)[:, :, None]
        return self.proj((x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1))

    def trim(self, text_BT: Tensor) -> Tensor:
        """Drop the trailing columns that no feature depends on; features stay the same.

        Only a causal tower that pools at an end token, or one that masks padding, has such columns. Looks at the ids,
        so call it where they lie on the CPU, before the model and outside of compiled code.
        """
        config = self.config
        if config.causal and config.pool in ("eot", "eos"):
            longest = int(_end_token(text_BT, config).max()) + 1
        elif config.mask_padding and config.pool in ("eot", "eos", "first", "mean"):
            used_T = (text_BT != config.pad_id).any(0).nonzero()
            longest = int(used_T.max()) + 1 if len(used_T) else 1
        else:
            longest = text_BT.shape[1]
        return text_BT[:, :longest]

    def _pooled_token(self, text_BT: Tensor) -> Tensor | int | None:
        """Position of the one token that is pooled, or None where all are."""
        match self.config.pool:
            case "eot" | "eos":
                return _end_token(text_BT, self.config)
            case "last":
                return text_BT.shape[1] - 1
            case "first":
                return 0
            case _:
                return None


def _end_token(text_BT: Tensor, config: TextConfig) -> Tensor:
    """Where each text ends: at its highest id (CLIP's tokenizer), or at the first eos_id."""
    if config.pool == "eot":
        return text_BT.argmax(dim=1)
    return (text_BT == config.eos_id).to(torch.int32).argmax(dim=1)
