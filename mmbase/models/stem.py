"""Stems: pixels to tokens, by one strided convolution or by residual convolution stages.

Shapes: B batch, C channels, H/W pixels or grid rows and columns, P patch pixels, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbase.models.initialised import draw_normal, normal_parameter
from mmbase.models.layers import LayerNorm


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly embedded. The weights are a convolution's, the work is one matrix product."""

    def __init__(self, patch_hw: tuple[int, int], width: int, *, bias: bool) -> None:
        super().__init__()
        self.patch_hw = patch_hw
        std = (9 * patch_hw[0] * patch_hw[1]) ** -0.5  # that of torch's own convolutions, as in OpenAI's models
        self.weight = normal_parameter(width, 3, *patch_hw, std=std)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed image_BCHW as tokens_BND in row-major order, and rows and columns of their grid.

        Pixels beyond the last whole patch are left out.
        """
        (ph, pw), cropped_BCHW = self.patch_hw, self.crop(image_BCHW)
        rows, columns = cropped_BCHW.shape[2] // ph, cropped_BCHW.shape[3] // pw
        patches = cropped_BCHW.unflatten(3, (columns, pw)).unflatten(2, (rows, ph))  # B C rows ph columns pw
        patches_BNP = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_BNP, self.weight.flatten(1), self.bias), (rows, columns)

    def crop(self, image: Tensor) -> Tensor:
        """The pixels that tokens depend on: whole patches of image_BCHW or image_CHW."""
        (ph, pw), (height, width) = self.patch_hw, image.shape[-2:]
        return image[..., : height // ph * ph, : width // pw * pw]


class Conv2d(nn.Conv2d):
    """Convolution drawn from Kaiming's normal for ReLU, times ``gain``."""

    def __init__(self, before: int, now: int, kernel: int, *, gain: float = 1.0, **options: Any) -> None:
        self.gain = gain
        super().__init__(before, now, kernel, **options)

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        draw_normal(self.weight, self.gain * (2 / self.weight[0].numel()) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ConvStem(nn.Module):
    """Residual 3x3 convolution stages, each at half the resolution of the one before, a norm, a projection to width.

    A few early convolutions give a small transformer what it cannot learn from few images (arXiv:2106.14881).
    The last convolution of each residual block is drawn small, so that blocks start near the identity.
    """

    def __init__(self, channels: list[int], blocks: list[int], width: int, *, stride: int = 2, norm: str) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        before = 3
        for stage, (now, depth) in enumerate(zip(channels, blocks, strict=True)):
            layers: list[nn.Module] = []
            if stage == 0:
                kernel = 3 if stride <= 2 else stride
                layers.append(Conv2d(before, now, kernel, stride=stride, padding=1 if kernel == 3 else 0))
            else:
                layers += [_norm(norm, before), Conv2d(before, now, 2, stride=2)]
            layers += [ConvBlock(now, norm) for _ in range(depth)]
            self.stages.append(nn.Sequential(*layers))
            before = now
        self.norm = _norm(norm, before)
        self.project = Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed image_BCHW as tokens_BND in row-major order, and rows and columns of their grid."""
        x_BDHW = self.project(self.norm(self.stages(image_BCHW)))
        return x_BDHW.flatten(2).transpose(1, 2), (x_BDHW.shape[2], x_BDHW.shape[3])

    def crop(self, image: Tensor) -> Tensor:
        """The pixels that tokens depend on: all of them."""
        return image


class ConvBlock(nn.Module):
    """Pre-activation residual block (arXiv:1603.05027): twice norm, ReLU, 3x3 convolution."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm1 = _norm(norm, channels)
        self.conv1 = Conv2d(channels, channels, 3, padding=1, bias=norm != "batch")
        self.norm2 = _norm(norm, channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, gain=0.3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Add the branch to the input."""
        y = self.conv1(F.relu(self.norm1(x_BCHW)))
        return x_BCHW + self.conv2(F.relu(self.norm2(y)))


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of x_BCHW."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each pixel."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(kind: str, channels: int) -> nn.Module:
    match kind:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            groups = max(g for g in range(1, max(1, channels // 16) + 1) if channels % g == 0)  # about 16 channels each
            return nn.GroupNorm(groups, channels)
        case "layer":
            return ChannelNorm(channels)
        case _:
            return nn.Identity()
