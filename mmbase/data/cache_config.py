"""How remote shards are fetched and kept. Torch-free."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class CacheConfig(BaseModel):
    """Fetching and keeping of shards that are no plain local tars: remote, compressed, or read from a command."""

    model_config = ConfigDict(extra="forbid")

    folder: str | None = Field(
        None,
        description="kept shards and indices, shared by a node's processes; null: $MMBASE_CACHE, else ~/.cache",
    )
    max_bytes: int = Field(
        64 << 30, ge=1 << 20, description="kept shards at most, in bytes; the least recently used ones give way"
    )
    parallel: int = Field(4, ge=1, le=256, description="shards that one process fetches at a time")
    attempts: int = Field(
        8, ge=1, description="tries in a row that bring no byte before a shard counts as lost; any progress starts anew"
    )
    backoff: float = Field(
        0.5, ge=0, description="seconds before the first new try; doubled for each further one, up to 30, with jitter"
    )
    connect_timeout: float = Field(20, gt=0, description="seconds until a server accepts the connection")
    first_byte_timeout: float = Field(60, gt=0, description="seconds until an answer begins")
    stall_timeout: float = Field(30, gt=0, description="seconds without a byte, or at under 1 KiB/s")
    total_timeout: float = Field(1800, gt=0, description="seconds for one shard with all its tries")
    revalidate: float = Field(
        86400, ge=0, description="seconds after which a kept shard's server is asked whether it has changed"
    )
    member_bytes: int = Field(256 << 20, ge=1, description="largest member that is read; others are refused")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="handed to fsspec for s3:, gs: and the like: endpoint_url, anon, profile"
    )
