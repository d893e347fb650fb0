"""The image tower: a Vision Transformer with a patch or a convolutional stem.

Shapes: B batch, C channels, H/W pixels, N tokens, K kept tokens, P packed tokens of images of several sizes, D width, E
embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbase.errors import MmbaseError
from mmbase.keyed import draw
from mmbase.models.attention_pool import AttentionPool
from mmbase.models.config import VisionConfig
from mmbase.models.initialised import Linear, normal_parameter
from mmbase.models.layers import LayerNorm, Transformer, project_token, unit_length
from mmbase.models.noise import Dropout, PatchDropout
from mmbase.models.packing import Packing
from mmbase.models.positions import resize_grid, sincos_2d
from mmbase.models.stem import ConvStem, PatchEmbed

__all__ = ["VisionConfig", "VisionTransformer"]

_DROPOUT, _PATCH_DROPOUT = -1, -2
"""Places of an image's key; the blocks take those from 1 on."""


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
        self.dropout = Dropout(config.dropout)
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

    def forward(
        self, images: Tensor | Sequence[Tensor], *, normalize: bool = False, keys_B: Tensor | None = None
    ) -> Tensor:
        """Normalised pixels to features_BE.

        Another size than the config's is taken as it is: the position embedding is resampled to its patch grid.

        Args:
            images: image_BCHW of one size, or images_CHW of any sizes, a list. Their patches are packed into one
                sequence, in which each image attends to itself alone (NaViT, arXiv:2307.06304): nothing is resized,
                cropped or padded, and features and gradients are those of the images one by one, to rounding. Only a
                stem with batch normalisation, in training, takes its statistics over the images of one size.
            normalize: features of unit length, in float32.
            keys_B: int64, a key for each image to draw its noise in training from; None: torch's generator.

        Raises:
            MmbaseError: no images; one that is not [3, H, W], is smaller than a patch, or lies on another device.
        """
        if isinstance(images, Tensor):
            x, packing = self.embed(images, keys_B), None
        else:
            x, packing = self.embed_packed(images, keys_B)
        x = self.norm_pre(x)
        if self.config.pool == "class":
            token = 0 if packing is None else packing.start_B
            x_B1D = self.transformer(x, token=token, packing=packing, keys_B=keys_B)
            return project_token(x_B1D, self.norm, self.proj, normalize=normalize)
        features_BE = self.proj(self._pool(self.transformer(x, packing=packing, keys_B=keys_B), packing))
        return unit_length(features_BE) if normalize else features_BE

    def embed(self, image_BCHW: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Stem, position embedding, patch dropout, class token: x_BND, the class token first."""
        x_BND, grid_hw = self.stem(image_BCHW)
        positions_ND = resize_grid(self.positional_embedding, self.grid_hw, grid_hw).to(x_BND.dtype)
        drop, keep = (None, None) if keys_B is None else (draw(keys_B, _DROPOUT), draw(keys_B, _PATCH_DROPOUT))
        if self.class_embedding is None:
            return self.dropout(self.patch_dropout(x_BND + positions_ND, keep), None, drop)
        x_BKD = self.patch_dropout(x_BND + positions_ND[1:], keep)
        class_D = self.class_embedding.to(x_BND.dtype) + positions_ND[0]
        return self.dropout(torch.cat([class_D.expand(x_BKD.shape[0], 1, -1), x_BKD], dim=1), None, drop)

    def embed_packed(self, images: Sequence[Tensor], keys_B: Tensor | None = None) -> tuple[Tensor, Packing]:
        """`embed` of images_CHW of several sizes: x_PD, image after image, and where they lie.

        Images of one size are embedded together. Patch dropout shortens each image's part. In a compiled graph the
        sizes are constants: where they change from batch to batch, compile ``transformer`` rather than the whole tower.
        """
        self._check_images(images)
        groups: dict[torch.Size, list[int]] = {}
        cropped = [self.stem.crop(image_CHW) for image_CHW in images]
        for row, image_CHW in enumerate(cropped):
            groups.setdefault(image_CHW.shape, []).append(row)
        parts = [
            (rows, self.embed(torch.stack([cropped[row] for row in rows]), None if keys_B is None else keys_B[rows]))
            for rows in groups.values()
        ]
        parts.sort(key=lambda part: part[1].shape[1])
        order = [row for rows, _ in parts for row in rows]
        lengths = [x_BKD.shape[1] for rows, x_BKD in parts for _ in rows]
        x_PD = torch.cat([x_BKD.flatten(0, 1) for _, x_BKD in parts])
        return x_PD, Packing.end_to_end(order, lengths, x_PD.device)

    def _check_images(self, images: Sequence[Tensor]) -> None:
        if not len(images):
            raise MmbaseError("no images given; pass at least one")
        for place, image in enumerate(images):
            if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
                got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise MmbaseError(f"image {place} must be a tensor [3, H, W], not {got}; normalise it to one")
            if 0 in self.config.grid_of(image.shape[1], image.shape[2]):
                size, patch = (" x ".join(map(str, hw)) for hw in (image.shape[1:], self.config.patch_hw))
                raise MmbaseError(f"image {place} has {size} pixels, less than one patch of {patch}; enlarge it")
            if image.device != images[0].device or image.dtype != images[0].dtype:
                raise MmbaseError(
                    f"image {place} is {image.dtype} on {image.device}, image 0 {images[0].dtype} on "
                    f"{images[0].device}; convert one of them"
                )

    def _pool(self, x_BND: Tensor, packing: Packing | None) -> Tensor:
        """Final norm and pooling over the patches (average), or over all tokens (attention)."""
        if not self.config.norm_after_pool:
            x_BND = self.norm(x_BND)
        if self.attention_pool is not None:
            x_BD = self.attention_pool(x_BND, packing)
        elif packing is not None:
            x_BD = packing.means(x_BND, packing.position_P >= int(self.config.class_token))
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
