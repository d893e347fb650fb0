"""What is trained on, and how it is shown. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmbase.data.cache_config import CacheConfig
from mmbase.data.captions import CaptionTemplate
from mmbase.data.filters import FilterConfig
from mmbase.data.shards import Holdout


class SourceConfig(BaseModel):
    """Where pictures come from and what one may do with them; goes into the report and the model card."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="short; where data.source_field is set, the value of that field")
    source: str = Field("", description="collection, package or address, with its version")
    licence: str = Field(description="SPDX identifier, or the licence's name")
    attribution: str = Field("", description="the line that the licence asks for")


class MixturePart(BaseModel):
    """One of several datasets that are trained on at once."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] | str = Field(description="as data.shards")
    weight: float | list[tuple[float, float]] = Field(
        1.0,
        description="share of the samples, relative to the other parts; or points [share of the training, weight] "
        "between which it goes in straight lines",
    )

    @field_validator("weight")
    @classmethod
    def _in_training(cls, weight: float | list[tuple[float, float]]) -> float | list[tuple[float, float]]:
        places = [place for place, _ in weight] if isinstance(weight, list) else [0.0]
        weights = [w for _, w in weight] if isinstance(weight, list) else [weight]
        if not places or places != sorted(set(places)) or not 0 <= places[0] <= places[-1] <= 1:
            raise ValueError(f"points of a weight rise from 0 to 1, the share of the training; not {places}")
        if min(weights) < 0:
            raise ValueError(f"weights are 0 or more, not {min(weights)}")
        return weight


class DataConfig(BaseModel):
    """What is trained on."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] | str = Field(
        default_factory=list,
        description="tars, folders, brace patterns, URLs (https:, s3:, pipe:, ...), or emoji:NAME for embedded ones",
    )
    mixture: list[MixturePart] = Field(
        default_factory=list, description="instead of data.shards: several datasets with weights"
    )
    caption_field: str = Field("caption", description="JSON field that holds the caption; a .txt member overrides it")
    captions: list[CaptionTemplate] = Field(
        default_factory=lambda: [CaptionTemplate()], description="weighted wordings of a sample, drawn anew each time"
    )
    identity: str | None = Field(
        None,
        description="field whose equal values are the same thing, never negatives of each other; null: the caption",
    )
    sources: list[SourceConfig] = Field(default_factory=list, description="provenance and licences")
    source_field: str | None = Field(None, description="field that tells a sample's source; null: not counted")
    sampling: Literal["pictures", "identities"] = Field(
        "pictures",
        description="pictures: each once an epoch; identities: each value of data.identity once an epoch, by one of "
        "its pictures drawn anew (in memory only)",
    )
    holdout: Holdout | None = Field(None, description="concepts kept out of training; null: none")
    filters: list[FilterConfig] = Field(
        default_factory=list, description="requirements on fields: {field: similarity, min: 0.28}; all must hold"
    )
    keep_orientation: dict[str, str] = Field(
        default_factory=dict,
        description="field: regular expression; samples whose field matches (letter case aside) are never mirrored",
    )
    source_size: int = Field(
        256, ge=8, description="pictures reach the augmentation as squares of this side, in pixels"
    )
    crop_scale: tuple[float, float] = Field(
        (1.0, 1.0), description="share of the area of the random crop taken at decoding; 0.9 1.0 is OpenCLIP's"
    )
    crop_ratio: tuple[float, float] | None = Field(
        None,
        description="width over height of that crop, 0.75 1.3333 is OpenCLIP's; null: no distortion",
    )
    decode: Literal["fast", "exact"] = Field(
        "fast", description="exact: no scaled decoding of JPEGs, Pillow's bicubic resize; several times slower"
    )
    exif: bool = Field(False, description="turn pictures as their camera noted; OpenCLIP does not")
    memory: Literal["auto", "always", "never"] = Field(
        "auto",
        description="keep decoded pictures in memory: auto where their number is known and they fit memory_bytes",
    )
    memory_bytes: int = Field(1 << 30, ge=0, description="budget of memory=auto, in bytes")
    workers: int = Field(0, ge=0, description="decoding processes when streaming; 0: in the training process")
    prefetch: int = Field(2, ge=1, description="batches that workers prepare ahead")
    window: int | None = Field(
        None,
        ge=1,
        description="shards whose samples are shuffled together, so open or cached at once; null: 16 to 256, by size",
    )
    shuffle_buffer: int = Field(
        5000, ge=1, description="samples a shuffle holds where shards can only be streamed; else the shuffle is exact"
    )
    cache: CacheConfig = Field(default_factory=CacheConfig, description="of shards that are not plain local tars")
    sizes: str | None = Field(
        None,
        description="path or URL of a sizes.json (samples per shard) where none lies beside the shards",
    )
    timeout: float = Field(
        300.0, gt=0, description="seconds without any progress after which a worker counts as stuck and the run stops"
    )
    errors: Literal["replace", "raise"] = Field(
        "replace", description="a bad sample: put the next good one in its place and count it, or stop"
    )
    max_bad_share: float = Field(
        0.1, ge=0, le=1, description="share of bad samples, once 1000 were seen, above which the run stops"
    )

    @model_validator(mode="after")
    def _has_data(self) -> DataConfig:
        if bool(self.shards) == bool(self.mixture):
            raise ValueError("give data.shards or data.mixture" + ", not both" * bool(self.mixture))
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is a range within 0 to 1, not {list(self.crop_scale)}")
        if self.crop_ratio is not None and not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < float("inf"):
            raise ValueError(f"crop_ratio is a range above 0, not {list(self.crop_ratio)}")
        return self

    def shard_specs(self) -> list[str]:
        """All specifications of shards, those of every part of a mixture."""
        given = [part.shards for part in self.mixture] or [self.shards]
        return [spec for one in given for spec in ([one] if isinstance(one, str) else one)]
