"""How pictures are varied in training. Torch-free; every strength is 0 (off) by default."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

STYLE = ("hue", "saturation", "edge", "blur", "gamma", "posterise", "cutout", "noise")
"""Strengths that change how a picture is drawn rather than where it stands."""


class AugmentConfig(BaseModel):
    """Strengths and probabilities; see ``mmbase.data.augment`` for what each does."""

    model_config = ConfigDict(extra="forbid")

    flip: float = Field(0.0, ge=0, le=1, description="probability of a mirror image, where the sample allows it")
    scale: float = Field(0.0, ge=0, description="zoom by exp(±scale)")
    aspect: float = Field(0.0, ge=0, description="stretch one axis by exp(±aspect) and shrink the other")
    rotation: float = Field(0.0, ge=0, description="standard deviation of the rotation, in degrees")
    shear: float = Field(0.0, ge=0, description="shear by ±shear")
    shift: float = Field(0.0, ge=0, description="move by ±shift of half the side")
    hue: float = Field(0.0, ge=0, description="standard deviation of the hue rotation, in radians; 15 % turn freely")
    saturation: float = Field(0.0, ge=0, le=1, description="saturation times 1-s to 1+0.6s; 8 % become grey")
    contrast: float = Field(0.0, ge=0, lt=1, description="contrast times 1±contrast")
    brightness: float = Field(0.0, ge=0, le=1, description="each channel times 1±b/2, and all plus ±b/2")
    white: float = Field(1.0, ge=0, le=1, description="probability of white behind transparency; else grey or coloured")
    edge: float = Field(0.0, ge=0, le=1, description="probability of dark outlines drawn over the picture")
    line: float = Field(0.0, ge=0, le=1, description="share of the outlined that become line drawings")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a 3-pixel blur")
    gamma: float = Field(0.0, ge=0, description="standard deviation of log gamma")
    posterise: float = Field(0.0, ge=0, le=1, description="probability of 3 to 6 levels per channel")
    cutout: float = Field(0.0, ge=0, le=1, description="probability of one square covered by the background")
    noise: float = Field(0.0, ge=0, description="largest standard deviation of pixel noise, of a range of 1")
    ramp: float = Field(
        0.0, ge=0, le=1, description="share of training over which the style strengths grow to full; 0: full at once"
    )
    ramp_start: float = Field(0.3, ge=0, le=1, description="share of the style strengths at the start of the ramp")

    def at(self, progress: float) -> AugmentConfig:
        """The strengths at ``progress`` (0 to 1) of the training: geometry as it is, style on its ramp."""
        if progress >= self.ramp:
            return self
        share = self.ramp_start + (1 - self.ramp_start) * progress / self.ramp
        return self.model_copy(update={name: share * getattr(self, name) for name in STYLE})
