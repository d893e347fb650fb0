"""How a run is spread over devices. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
Compile = Literal["none", "blocks"]


class ParallelConfig(BaseModel):
    """Keys of ``training`` that say how ranks share the work; the weights do not depend on them, to rounding."""

    model_config = ConfigDict(extra="forbid")

    parallel: Kind = Field(
        "auto",
        description="over ranks: ddp (each holds all weights), fsdp (weights, gradients and optimiser in shards), hsdp "
        "(in shards within a node, whole nodes alike); auto: ddp where there are several ranks",
    )
    reshard_after_forward: bool = Field(
        True, description="fsdp: gather weights anew for the backward pass; false: keep them, more memory, less traffic"
    )
    compile: Compile = Field("none", description="blocks: torch.compile of each transformer block")
    checkpoint_activations: bool = Field(
        False, description="compute each block again in the backward pass instead of keeping what is in it"
    )
    hang_seconds: float = Field(
        600.0, gt=0, description="a rank that stays longer in one phase of a step is named, and the run ended"
    )
