"""The image tower: a Vision Transformer with a patch or a convolutional stem.

Shapes: B batch, C channels, H/W pixels, N tokens, K kept tokens, D width, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmbase.models.config import VisionConfig
from mmbase.models.layers import AttentionPool, LayerNorm, Linear, PatchDropout, Transformer, normal_parameter
from mmbase.models.positions import resize_grid, sincos_2d
from mmbase.models.stem import ConvStem, PatchEmbed

__all__ = ["VisionConfig", "VisionTransformer"]


class VisionTransformer(nn.Module):
    """Images to features (ViT, arXiv:2010.11929, in CLIP's and SigLIP's variants)."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.grid_hw = config.grid_hw
        width, std = config.width, config.width**-0.5
        if config.stem == "conv":
            self.stem = ConvStem(
                config.stem_channels, config.stem_blocks, width, stride=config.stem_stride, norm=config.stem_norm
            )
        else:
            self.stem = PatchEmbed(config.patch_hw, width, bias=config.patch_bias)
        self.class_embedding = normal_parameter(width, std=std) if config.class_token else None
        self.positional_embedding = self._position_table()
        self.patch_dropout = PatchDropout(config.patch_dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_pre = LayerNorm(width, eps=config.norm_eps) if config.norm_pre else nn.Identity()
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
        self.attention_pool = (
            AttentionPool(width, config.heads, config.mlp_ratio, config.activation, norm_eps=config.norm_eps)
            if config.pool == "attention"
            else None
        )
        self.proj = (
            Linear(width, embed_dim, bias=config.projection_bias, std=std) if config.projection else nn.Identity()
        )

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Normalised pixels to features_BE, not normalised.

        Another size than the config's is taken as it is: the position embedding is resampled to its patch grid.
        """
        x_BND = self.norm_pre(self.embed(image_BCHW))
        if self.config.pool == "class":
            return self.proj(self.norm(self.transformer(x_BND, token=0)[:, 0]))
        return self.proj(self._pool(self.transformer(x_BND)))

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Stem, position embedding, patch dropout, class token: x_BND, the class token first."""
        x_BND, grid_hw = self.stem(image_BCHW)
        positions_ND = resize_grid(self.positional_embedding, self.grid_hw, grid_hw).to(x_BND.dtype)
        if self.class_embedding is None:
            return self.dropout(self.patch_dropout(x_BND + positions_ND))
        x_BKD = self.patch_dropout(x_BND + positions_ND[1:])
        class_D = self.class_embedding.to(x_BND.dtype) + positions_ND[0]
        return self.dropout(torch.cat([class_D.expand(x_BKD.shape[0], 1, -1), x_BKD], dim=1))

    def _pool(self, x_BND: Tensor) -> Tensor:
        """Final norm and pooling over the patches (average), or over all tokens (attention)."""
        if not self.config.norm_after_pool:
            x_BND = self.norm(x_BND)
        if self.attention_pool is not None:
            x_BD = self.attention_pool(x_BND)
        else:
            x_BD = x_BND[:, 1 if self.config.class_token else 0 :].mean(dim=1)
        return self.norm(x_BD) if self.config.norm_after_pool else x_BD

    def _position_table(self) -> nn.Parameter:
        config = self.config
        if config.position_embedding == "sincos":
            table_ND = sincos_2d(self.grid_hw, config.width, class_token=config.class_token)
            return nn.Parameter(table_ND, requires_grad=False)
        tokens = self.grid_hw[0] * self.grid_hw[1] + int(config.class_token)
        return normal_parameter(tokens, config.width, std=config.width**-0.5)
