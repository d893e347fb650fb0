"""How it is trained. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmbase.training.checkpoint_config import CheckpointConfig
from mmbase.training.curriculum_config import Schedule
from mmbase.training.guard_config import GuardConfig
from mmbase.training.parallel_config import ParallelConfig


class ImageSize(BaseModel):
    """A stage of training on pictures of another size; position embeddings are resampled."""

    model_config = ConfigDict(extra="forbid")

    until: float = Field(gt=0, le=1, description="share of the training at which the stage ends")
    size: int = Field(ge=8, description="side in pixels")


class TrainingConfig(ParallelConfig):
    """The loop, the optimiser and the schedule, and how ranks share the work."""

    steps: int = Field(1000, ge=1, description="optimiser steps, of batch_size pairs each")
    batch_size: int = Field(
        256, ge=1, description="pairs per step of all ranks: every text is a negative of every other image"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="pairs that a device holds at a time; gradients are those of batch_size; null: all its"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for matrices and convolutions, AdamW for the rest"
    )
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW, at the peak of the schedule")
    muon_learning_rate: float = Field(0.02, gt=0, description="of Muon, at the peak of the schedule")
    muon_exclude: list[str] = Field(
        ["visual.proj", "text.proj", "visual.stem.weight", "visual.stem.stages.0.0"],
        description="matrices whose name holds one of these stay with AdamW: first layers and output projections",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    final_share: float = Field(0.0, ge=0, le=1, description="where the schedule ends, as a share of the peak")
    weight_decay: float = Field(0.2, ge=0, description="of AdamW, on matrices and convolutions")
    no_decay: list[str] = Field(
        ["positional_embedding", "class_embedding"],
        description="parameters whose name holds one of these are not decayed, beside norms, biases and the scale",
    )
    betas: tuple[float, float] = Field((0.9, 0.98), description="of AdamW")
    epsilon: float = Field(1e-6, gt=0, description="of AdamW")
    gradient_clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null: no clipping")
    loss: Literal["softmax", "sigmoid"] = Field("softmax", description="softmax: InfoNCE, CLIP; sigmoid: SigLIP")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="softmax: share of the target spread over the batch")
    max_logit_scale: float = Field(100.0, gt=0, description="the logit scale is kept at or below this")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay per step of the averaged weights that are evaluated and saved; null: none"
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="learning rates fall by this factor from each layer to the one below; null: alike"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="auto: bf16 autocast where the device multiplies bf16 in hardware, else fp32; fp16 scales the "
        "loss; fp8: linear layers of the blocks by torchao",
    )
    curriculum: list[Schedule] = Field(
        default_factory=list,
        description="schedules over samples seen, such as [{what: patch_keep, values: [[0, 0.5], [0.8, 1]]}]",
    )
    image_sizes: list[ImageSize] = Field(
        default_factory=list,
        description="smaller pictures first, such as [{until: 0.5, size: 32}]; then the model's size",
    )
    center_projections: bool = Field(
        False, description="start both output projections' biases so that the first batch's features have mean zero"
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoints: CheckpointConfig = Field(default_factory=CheckpointConfig, description="when, and which stay")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="what is done about losses that go wrong")
    evaluate_every: int | None = Field(
        None,
        ge=1,
        description="samples between evaluations in training, of evaluation.tasks; null: at the end alone",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations without a better score after which training ends and the best weights are kept; null: "
        "it goes on to the end",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} exceeds steps={self.steps}; shorten the warm-up")
        ends = [stage.until for stage in self.image_sizes]
        if ends != sorted(set(ends)):
            raise ValueError(f"image_sizes end at {ends}; each stage must end later than the one before")
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError(f"patience={self.patience} counts evaluations; set evaluate_every to the samples between")
        if self.patience is not None and not self.checkpoints.keep_best:
            raise ValueError("patience keeps the best weights; set checkpoints.keep_best to 1 or more")
        return self
