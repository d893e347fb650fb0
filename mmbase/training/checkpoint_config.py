"""When checkpoints are written, which stay, and where copies go. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """When checkpoints are written, which stay, and where copies go."""

    model_config = ConfigDict(extra="forbid")

    every_samples: int | None = Field(None, ge=1, description="samples between checkpoints; null: not by samples")
    every_seconds: float | None = Field(
        1800.0, gt=0, description="wall-clock seconds between checkpoints; null: not by time"
    )
    keep_last: int = Field(2, ge=1, description="how many of the newest stay: at least one to fall back to is wise")
    keep_every: int | None = Field(
        None, ge=1, description="the first checkpoint of every so many samples stays for good; null: none does"
    )
    keep_best: int = Field(1, ge=0, description="how many of the best by the score of evaluation stay")
    background: bool = Field(True, description="written by a thread while training goes on; false: training waits")
    on_error: Literal["continue", "stop"] = Field(
        "continue", description="when one cannot be written (a full disk): say so and train on, or stop"
    )
    upload: str | None = Field(
        None, description="fsspec URL of a folder that gets a copy of each, such as s3://bucket/run; null: none"
    )
    upload_options: dict[str, Any] = Field(
        default_factory=dict, description="given to the file system of upload, such as {endpoint_url: ...}"
    )
