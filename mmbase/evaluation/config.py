"""What is measured at the end of a run. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TaskConfig(BaseModel):
    """One set of samples and the question asked of it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="key of its results; short and unique")
    title: str = Field("", description="heading in the report; empty: the name")
    description: str = Field("", description="one or two sentences for the report")
    shards: list[str] | str = Field(description="as data.shards")
    label: str = Field("caption", description="field whose value is the class name")
    wordings: list[str] = Field(
        default_factory=list,
        description="further names of a class, averaged with its label: templates over its samples' fields, such as "
        "'{caption}, {keywords}'; the first four entries of a list",
    )
    split: Literal["all", "held_out", "trained"] = Field(
        "all", description="all samples, or only the concepts that data.holdout kept out of training, or the others"
    )
    templates: str | list[str] = Field("none", description="prompt templates: a set's name, one template or a list")
    breakdown: list[str] = Field(default_factory=list, description="fields to give accuracy by")
    retrieval: bool = Field(True, description="also measure image-text retrieval")


class EvaluationConfig(BaseModel):
    """The tasks of a run."""

    model_config = ConfigDict(extra="forbid")

    licence: str = Field(
        "unknown", description="of the trained weights, as the Hugging Face hub abbreviates it, such as apache-2.0"
    )
    tasks: list[TaskConfig] = Field(default_factory=list, description="what is measured when training has ended")
    batch_size: int = Field(128, ge=1, description="pictures encoded at once")
