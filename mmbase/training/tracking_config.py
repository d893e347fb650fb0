"""Where a run's numbers go beside metrics.jsonl. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WandbConfig(BaseModel):
    """A run at Weights & Biases."""

    model_config = ConfigDict(extra="forbid")

    project: str = Field("mmbase", description="project")
    entity: str | None = Field(None, description="user or team; null: the account's own")
    name: str | None = Field(None, description="of the run; null: its folder's")
    mode: Literal["online", "offline"] = Field("online", description="offline: into the run's folder, for `wandb sync`")
    tags: list[str] = Field(default_factory=list, description="of the run")


class TrackingConfig(BaseModel):
    """Where a run's numbers go beside metrics.jsonl."""

    model_config = ConfigDict(extra="forbid")

    tensorboard: bool = Field(False, description="write RUN/tensorboard; needs `pip install 'mmbase[track]'`")
    wandb: WandbConfig | None = Field(
        None, description="send to Weights & Biases; needs `pip install 'mmbase[track]'`; null: no"
    )
