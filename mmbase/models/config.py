"""Configs of the towers and of the whole model. Torch-free, so that names can be listed and checked without torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


class TowerConfig(BaseModel):
    """What the two transformers have in common."""

    model_config = ConfigDict(extra="forbid")

    width: int = Field(768, ge=1, description="Width of the residual stream")
    layers: int = Field(12, ge=0, description="Number of transformer blocks")
    heads: int = Field(12, ge=1, description="Attention heads per block; must divide the width")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP as a multiple of the width")
    activation: Activation = Field("gelu", description="MLP activation: gelu, gelu_tanh or quick_gelu (OpenAI CLIP)")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of every LayerNorm")
    layer_scale: float | None = Field(None, description="Initial value of per-channel residual scales; null for none")
    branch_init: float = Field(1.0, ge=0, description="Initial scale of what blocks add, times CLIP's; 0: identity")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Stochastic depth of the last block, rising linearly from 0")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on embeddings and on each residual branch")
    projection: bool = Field(True, description="Project pooled features linearly to embed_dim")
    projection_bias: bool = Field(False, description="Give that projection a bias")
    checkpoint_activations: bool = Field(False, description="Recompute each block in backward to save memory")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TowerConfig:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        return self


class VisionConfig(TowerConfig):
    """Vision Transformer with a patch or a convolutional stem."""

    image_size: int | tuple[int, int] = Field(224, description="Input size in pixels: one number or [height, width]")
    stem: Literal["patch", "conv"] = Field("patch", description="patch: one strided convolution; conv: residual stages")
    patch_size: int | tuple[int, int] = Field(16, description="Patch stem: patch size in pixels")
    patch_bias: bool = Field(False, description="Patch stem: give the convolution a bias")
    stem_channels: list[int] = Field([48, 96, 192], description="Conv stem: channels of each stage")
    stem_blocks: list[int] = Field([1, 1, 1], description="Conv stem: residual blocks of each stage")
    stem_stride: int = Field(2, ge=1, description="Conv stem: stride of the first stage; every further stage halves")
    stem_norm: Literal["batch", "group", "layer", "none"] = Field("batch", description="Conv stem: normalisation")
    class_token: bool = Field(True, description="Prepend a learnt class token to the patches")
    position_embedding: Literal["learnable", "sincos"] = Field(
        "learnable", description="Absolute position embedding: learnt, or fixed 2-D sine-cosine"
    )
    norm_pre: bool = Field(True, description="LayerNorm before the first block, as in CLIP")
    norm_after_pool: bool = Field(False, description="Apply the final LayerNorm after pooling instead of before")
    pool: Literal["class", "average", "attention"] = Field(
        "class", description="Pooling: class token, average of the patches, or attention from a learnt query (MAP head)"
    )
    patch_dropout: float = Field(0.0, ge=0, lt=1, description="Fraction of patches dropped in training (FLIP)")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width in pixels of what one token covers."""
        if self.stem == "conv":
            return _pair(self.stem_stride * 2 ** (len(self.stem_channels) - 1))
        return _pair(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return self.grid_of(*self.image_hw)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of another size; 0 where it is smaller than a patch."""
        if self.stem == "patch":
            return height // self.patch_hw[0], width // self.patch_hw[1]
        return self._conv_side(height), self._conv_side(width)

    def _conv_side(self, pixels: int) -> int:
        """Side of the conv stem's grid: its first convolution is padded up to stride 2, the others are not."""
        side = -(-pixels // self.stem_stride) if self.stem_stride <= 2 else pixels // self.stem_stride
        return side // 2 ** (len(self.stem_channels) - 1)

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        if self.pool == "class" and not self.class_token:
            raise ValueError("pool='class' needs class_token=true")
        if self.stem == "conv" and len(self.stem_channels) != len(self.stem_blocks):
            raise ValueError(
                f"stem_channels has {len(self.stem_channels)} stages but stem_blocks has {len(self.stem_blocks)}"
            )
        if self.stem == "conv" and not self.stem_channels:
            raise ValueError("stem_channels is empty; a conv stem needs at least one stage")
        if self.position_embedding == "sincos" and self.width % 4:
            raise ValueError(f"position_embedding='sincos' needs a width divisible by 4, not {self.width}")
        if 0 in self.grid_hw:
            raise ValueError(f"image_size={self.image_size} is smaller than one patch of {self.patch_hw} pixels")
        return self


class TextConfig(TowerConfig):
    """Text transformer, causal or bidirectional."""

    width: int = Field(512, ge=1, description="Width of the residual stream")
    heads: int = Field(8, ge=1, description="Attention heads per block; must divide the width")
    context_length: int = Field(77, ge=1, description="Longest text in tokens")
    vocab_size: int = Field(49408, ge=1, description="Number of token ids")
    causal: bool = Field(True, description="Attend only to earlier tokens")
    pool: Literal["eot", "eos", "last", "first", "mean"] = Field(
        "eot",
        description="Pooling: eot (highest id, as CLIP), eos (first eos_id), last, first, or mean of non-pad tokens",
    )
    eos_id: int = Field(2, ge=0, description="Id of the end token where pool is eos")
    pad_id: int = Field(0, ge=0, description="Id of padding: left out by pool=mean and by mask_padding")
    mask_padding: bool = Field(False, description="Keep padding from being attended to")


class CLIPConfig(BaseModel):
    """An image-text model: two towers, one embedding space."""

    model_config = ConfigDict(extra="forbid")

    embed_dim: int = Field(512, ge=1, description="Width of the shared embedding space")
    vision: VisionConfig = Field(default_factory=VisionConfig, description="Image tower")
    text: TextConfig = Field(default_factory=TextConfig, description="Text tower")
    init_logit_scale: float = Field(math.log(1 / 0.07), description="Initial log of the logit scale")
    init_logit_bias: float | None = Field(None, description="Initial logit bias (sigmoid loss); null for none")

    @model_validator(mode="after")
    def _unprojected_widths(self) -> CLIPConfig:
        for name, tower in (("vision", self.vision), ("text", self.text)):
            if not tower.projection and tower.width != self.embed_dim:
                raise ValueError(
                    f"{name}.projection=false needs {name}.width={tower.width} to equal embed_dim={self.embed_dim}"
                )
        return self


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
