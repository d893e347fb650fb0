"""What happens when a loss or a gradient goes wrong. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class GuardConfig(BaseModel):
    """What happens when a loss or a gradient is not finite, or far above those before it."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["skip", "rollback", "stop", "off"] = Field(
        "skip",
        description="skip: the step's update is left out; rollback: back to the last checkpoint before it and past its "
        "samples; stop: end the run; off: look at nothing",
    )
    spike_score: float | None = Field(
        8.0,
        gt=1,
        description="robust standard deviations above the running median from which a loss or a gradient norm is a "
        "spike; null: only what is not finite counts",
    )
    window: int = Field(128, ge=8, description="steps that tell how far values usually lie from the median")
    warmup: int = Field(32, ge=4, description="steps before the first spike is called one")
    lag: int = Field(2, ge=1, description="steps later that the host reads a step's numbers, so that it never waits")
    before: int = Field(1, ge=0, description="rollback after a spike: steps before it that are stepped over as well")
    after: int = Field(1, ge=0, description="rollback after a spike: steps after it that are stepped over as well")
    patience: int = Field(
        8,
        ge=1,
        description="skip: bad steps in a row after which spikes are the new level, and other faults stop the run",
    )
    max_rollbacks: int = Field(10, ge=1, description="rollback: windows stepped over in a run before it is stopped")

    @field_validator("policy", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # which is how YAML reads a bare off
