"""Batched augmentation on the device: uint8 pictures in, normalised float pictures out.

Letters: B batch, C channels (3, or 4 with alpha), S side of the source, T side that the model sees. Colours are
premultiplied by alpha up to the background, so that transparent pixels have no say in resampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase.data.augment_config import AugmentConfig
from mmbase.keyed import counted, unit

_WILD_HUE, _GREY = 0.15, 0.08
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


_COLUMNS = 64
"""Random numbers at hand for a sample; all strengths together draw fewer."""

_NOISE = 1 << 20
"""Normal numbers that pixel noise is cut from."""


class Augment:
    """Random variations of pictures; what a picture becomes depends on its own key alone, not on its batch.

    Args:
        config: strengths and probabilities.
        size: height and width of the result, in pixels.
        mean: per channel, taken off pixels in 0..1.
        std: per channel, divided by.
    """

    def __init__(
        self, config: AugmentConfig, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.config, self.size = config, size
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self._noise: dict[torch.device, Tensor] = {}

    def at(self, progress: float, size: tuple[int, int]) -> Augment:
        """The augmentation at ``progress`` (0 to 1) of the training, for pictures of ``size``."""
        there = Augment(self.config.at(progress), size, self.mean.flatten().tolist(), self.std.flatten().tolist())
        there._noise = self._noise
        return there

    def __call__(self, image_BCSS: Tensor, may_flip_B: Tensor, draw_B: Tensor) -> Tensor:
        """Normalised float32 ``[B, 3, T, T]`` in channels-last memory.

        Args:
            image_BCSS: uint8 pictures with or without alpha.
            may_flip_B: bool, whose mirror image means the same.
            draw_B: int64, a key per picture: that of (seed, epoch, sample) in training.
        """
        draw = _Draw(draw_B.to(image_BCSS.device))
        rgba = self._geometry(_premultiplied(image_BCSS), may_flip_B, draw)
        colour, alpha = self._colour(rgba[:, :3], rgba[:, 3:], draw), rgba[:, 3:]
        background = self._background(draw)
        picture = colour + (1 - alpha) * background
        picture = self._outlines(picture, colour, alpha, background, draw)
        picture = self._texture(picture, background, draw)
        normalised = (picture - self.mean.to(picture.device)) / self.std.to(picture.device)
        return normalised.contiguous(memory_format=torch.channels_last)

    def _geometry(self, rgba: Tensor, may_flip_B: Tensor, draw: _Draw) -> Tensor:
        """Zoom, stretch, rotation, shear, shift and mirror in one resampling."""
        c = self.config
        mirror = torch.where(may_flip_B.to(rgba.device) & draw.chance(c.flip), -1.0, 1.0)
        if not any((c.scale, c.aspect, c.rotation, c.shear, c.shift)):
            resized = F.interpolate(rgba, self.size, mode="bilinear", antialias=True, align_corners=False)
            return torch.where((mirror < 0).view(-1, 1, 1, 1), resized.flip(3), resized)
        zoom, stretch = draw.uniform(-c.scale, c.scale).exp(), draw.uniform(-c.aspect, c.aspect).exp()
        angle = draw.normal() * (c.rotation * math.pi / 180)
        shear = draw.uniform(-c.shear, c.shear)
        matrix = torch.empty(len(rgba), 2, 3, device=rgba.device)
        matrix[:, 0, 0] = angle.cos() * zoom * stretch * mirror
        matrix[:, 0, 1] = (shear - angle.sin()) * zoom
        matrix[:, 1, 0] = angle.sin() * zoom * mirror
        matrix[:, 1, 1] = angle.cos() * zoom / stretch
        matrix[:, :, 2] = draw.uniform(-c.shift, c.shift, 2)
        grid = F.affine_grid(matrix, [len(rgba), 4, *self.size], align_corners=False)
        return F.grid_sample(rgba, grid, mode="bilinear", align_corners=False)

    def _colour(self, colour: Tensor, alpha: Tensor, draw: _Draw) -> Tensor:
        """Hue, saturation, contrast and brightness as one affine map of the colour space."""
        c = self.config
        if not any((c.hue, c.saturation, c.contrast, c.brightness)):
            return colour
        hue = draw.normal() * c.hue
        if c.hue:
            hue = torch.where(draw.chance(_WILD_HUE), draw.uniform(-math.pi, math.pi), hue)
        saturation = draw.uniform(1 - c.saturation, 1 + 0.6 * c.saturation)
        if c.saturation:
            saturation = torch.where(draw.chance(_GREY), 0.0, saturation)
        contrast = draw.uniform(1 - c.contrast, 1 + c.contrast)[:, None, None]
        gain = draw.uniform(1 - c.brightness / 2, 1 + c.brightness / 2, 3)[:, :, None]
        matrix = _saturation_matrix(saturation) @ _hue_matrix(hue) * contrast * gain
        offset = 0.5 * (1 - contrast) + draw.uniform(-c.brightness / 2, c.brightness / 2)[:, None, None]
        moved = torch.baddbmm(offset * alpha.flatten(2), matrix, colour.flatten(2)).view_as(colour)
        return moved.clamp_(min=0).minimum(alpha)

    def _background(self, draw: _Draw) -> Tensor:
        """``[B, 3, 1, 1]``: white, a grey or any colour."""
        grey, coloured = draw.uniform(0, 1, 1).expand(-1, 3), draw.uniform(0, 1, 3)
        plain = torch.where(draw.chance(0.5)[:, None], grey, coloured)
        return torch.where(draw.chance(self.config.white)[:, None], 1.0, plain)[:, :, None, None]

    def _outlines(self, picture: Tensor, colour: Tensor, alpha: Tensor, background: Tensor, draw: _Draw) -> Tensor:
        """Dark edges (a morphological gradient) over some pictures; a share of those fades to a line drawing."""
        if not self.config.edge:
            return picture
        chosen = draw.rows(self.config.edge)
        gain, strength = draw.uniform(2, 5)[chosen], draw.uniform(0.4, 1)[chosen]
        fade = 0.85 * draw.chance(self.config.line)[chosen].float()
        source = torch.cat([colour[chosen] + 1 - alpha[chosen], alpha[chosen]], 1)
        edges = F.max_pool2d(source, 3, 1, 1) + F.max_pool2d(-source, 3, 1, 1)
        edges = ((edges.amax(1, keepdim=True) - 0.15) * gain.view(-1, 1, 1, 1)).clamp_(0, 1)
        fade = fade.view(-1, 1, 1, 1)
        drawn = picture[chosen] * (1 - fade) + fade * background[chosen].clamp(min=0.7)
        return picture.index_copy(0, chosen, drawn * (1 - edges * strength.view(-1, 1, 1, 1)))

    def _texture(self, picture: Tensor, background: Tensor, draw: _Draw) -> Tensor:
        """Blur, gamma, posterisation, cutout and noise."""
        c = self.config
        if c.blur:
            chosen, weight = draw.rows(c.blur), draw.uniform(0.3, 1)
            soft = F.avg_pool2d(F.pad(picture[chosen], (1, 1, 1, 1), mode="replicate"), 3, 1)
            picture = picture.index_copy(0, chosen, picture[chosen].lerp(soft, weight[chosen].view(-1, 1, 1, 1)))
        if c.gamma:
            picture = picture.clamp(1e-3, 1).pow((draw.normal() * c.gamma).exp().view(-1, 1, 1, 1))
        if c.posterise:
            chosen, levels = draw.rows(c.posterise), draw.uniform(2, 6).floor()
            levels = levels[chosen].view(-1, 1, 1, 1)
            picture = picture.index_copy(0, chosen, (picture[chosen] * levels).round() / levels)
        if c.cutout:
            covered = draw.chance(c.cutout)[:, None, None] & self._square(draw)
            picture = torch.where(covered[:, None], background, picture)
        if c.noise:
            picture = picture + self._white_noise(picture, draw) * draw.uniform(0, c.noise).view(-1, 1, 1, 1)
        return picture

    def _white_noise(self, picture: Tensor, draw: _Draw) -> Tensor:
        """Normal numbers like ``picture``: each sample's is a stretch, from a place drawn, of one fixed table."""
        count = picture[0].numel()
        table = self._noise.get(picture.device)
        if table is None or len(table) < _NOISE + count:
            made = torch.randn(_NOISE + count, generator=torch.Generator().manual_seed(0))
            table = self._noise[picture.device] = made.to(picture.device)
        stretches = table.as_strided((_NOISE, count), (1, 1))
        return stretches[(draw.uniform(0, 1) * _NOISE).long()].view(picture.shape)

    def _square(self, draw: _Draw) -> Tensor:
        """Bool ``[B, T, T]``: a square of 0.16 to 0.4 of the side around a random place."""
        place, half = draw.uniform(0, 1, 2), draw.uniform(0.08, 0.2)[:, None]
        rows = (torch.arange(self.size[0], device=place.device) / self.size[0] - place[:, :1]).abs() < half
        columns = (torch.arange(self.size[1], device=place.device) / self.size[1] - place[:, 1:]).abs() < half
        return rows[:, :, None] & columns[:, None, :]


class _Draw:
    """Random numbers for a batch, one row per sample, in a fixed order.

    They are hashes of the sample's key and a counter, worked out for the whole batch at once.
    """

    def __init__(self, key_B: Tensor) -> None:
        self.table = unit(counted(key_B, _COLUMNS, first=1))
        self.used = 0

    def uniform(self, low: float, high: float, count: int | None = None) -> Tensor:
        """``[B]``, or ``[B, count]``, at least ``low`` and below ``high``."""
        first, self.used = self.used, self.used + (count or 1)
        column = self.table[:, first] if count is None else self.table[:, first : self.used]
        return low + (high - low) * column

    def normal(self) -> Tensor:
        """``[B]``, by Box and Muller."""
        radius = (-2 * (1 - self.uniform(0, 1)).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(0, 1)).cos()

    def chance(self, probability: float) -> Tensor:
        """Bool ``[B]``."""
        return self.uniform(0, 1) < probability

    def rows(self, probability: float) -> Tensor:
        """Indices of the samples drawn."""
        return self.chance(probability).nonzero().flatten()


def _premultiplied(image_BCSS: Tensor) -> Tensor:
    """Float ``[B, 4, S, S]`` in 0..1 with colours multiplied by alpha; alpha is 1 where there was none."""
    picture = image_BCSS.float().div_(255)
    if picture.shape[1] == 3:
        return torch.cat([picture, torch.ones_like(picture[:, :1])], 1)
    picture[:, :3] *= picture[:, 3:]
    return picture


def _hue_matrix(angle_B: Tensor) -> Tensor:
    """``[B, 3, 3]``: rotation of colour space about its grey axis."""
    cos, sin = angle_B.cos(), angle_B.sin()
    same, third, root = cos + (1 - cos) / 3, (1 - cos) / 3, sin / math.sqrt(3)
    back, forth = third - root, third + root
    return torch.stack([same, back, forth, forth, same, back, back, forth, same], 1).view(-1, 3, 3)


def _saturation_matrix(amount_B: Tensor) -> Tensor:
    """``[B, 3, 3]``: between luminance alone (0) and the colour as it is (1)."""
    luminance = torch.tensor(_LUMINANCE, device=amount_B.device).expand(3, 3)
    amount = amount_B[:, None, None]
    return amount * torch.eye(3, device=amount_B.device) + (1 - amount) * luminance
