"""What is trained on, and how it is shown. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mmbase.data.captions import CaptionTemplate
from mmbase.data.shards import Holdout


class SourceConfig(BaseModel):
    """Where pictures come from and what one may do with them; goes into the report and the model card."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="short; where data.source_field is set, the value of that field")
    source: str = Field("", description="collection, package or address, with its version")
    licence: str = Field(description="SPDX identifier, or the licence's name")
    attribution: str = Field("", description="the line that the licence asks for")


class DataConfig(BaseModel):
    """What is trained on."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] | str = Field(description="tars, folders, brace patterns, URLs, or emoji:NAME for embedded ones")
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
    memory: Literal["auto", "always", "never"] = Field(
        "auto",
        description="keep decoded pictures in memory: auto where their number is known and they fit memory_bytes",
    )
    memory_bytes: int = Field(1 << 30, ge=0, description="budget of memory=auto, in bytes")
    workers: int = Field(0, ge=0, description="decoding processes when streaming; 0: in the training process")
    shuffle_buffer: int = Field(1000, ge=1, description="samples a streaming shuffle holds")
    errors: Literal["skip", "raise"] = Field("skip", description="a picture that cannot be decoded: count it, or stop")
