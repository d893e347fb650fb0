"""What ``mmbase data pack`` writes, and what it leaves out. Torch-free."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mmbase.data.filters import FilterConfig
from mmbase.data.pack_pictures import PictureConfig

TRAIN = "train"
"""The split of what the other splits leave."""


class PackConfig(BaseModel):
    """What is written, and what is left out."""

    model_config = ConfigDict(extra="forbid")

    picture: PictureConfig = Field(default_factory=PictureConfig, description="how pictures lie in the shards")
    shard_size: int | None = Field(None, ge=1, description="pairs per shard; null: for 64 shards, within 100 to 10,000")
    shuffle: bool = Field(True, description="in an order drawn by seed: shards are then alike; false: the source's")
    seed: int = Field(0, ge=0, description="of the order and the splits")
    dedupe: Literal["none", "pairs", "images", "near"] = Field(
        "pairs",
        description="what is written once only: equal pictures with equal captions; equal pictures; or pictures that "
        "look the same",
    )
    splits: dict[str, float] = Field(
        default_factory=dict,
        description="name: share, such as val: 0.05; the rest is train; equal pictures stay together",
    )
    split_by: str | None = Field(None, description="field whose equal values stay in one split; null: the picture")
    filters: list[FilterConfig] = Field(default_factory=list, description="requirements on fields; sizes as found")
    max_bad_share: float = Field(0.5, ge=0, le=1, description="stop where more of the rows than this are bad")
    name: str | None = Field(None, description="of the dataset; null: the source's")
    description: str = Field("", description="a sentence or two for the datasheet")
    source: str = Field("", description="collection, package or address, with its version")
    licence: str = Field("", description="SPDX identifier, or the licence's name")
    attribution: str = Field("", description="the line that the licence asks for")

    @field_validator("splits")
    @classmethod
    def _shares(cls, splits: dict[str, float]) -> dict[str, float]:
        for name, share in splits.items():
            if not re.fullmatch(r"[A-Za-z][\w-]*", name):
                raise ValueError(f"the split {name!r} needs a name of letters, digits, - and _")
            if name == TRAIN:
                raise ValueError("train is what the other splits leave; give the shares of the others")
            if not 0 < share < 1:
                raise ValueError(f"the share {share:g} of the split {name!r} must be between 0 and 1")
        if sum(splits.values()) >= 1:
            raise ValueError(f"the splits take {sum(splits.values()):g} of the data and leave nothing for train")
        return splits

    def settings(self) -> dict[str, Any]:
        """What the shards' bytes depend on."""
        about = {"name", "description", "source", "licence", "attribution", "max_bad_share"}
        return self.model_dump(mode="json", exclude=about)
