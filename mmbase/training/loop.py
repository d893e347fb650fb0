"""THE loop: batches in, a trained model out. One process, one device; read it top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from mmbase.config import RunConfig
from mmbase.data.augment import Augment
from mmbase.data.collate import Batch
from mmbase.data.draws import generator
from mmbase.data.pictures import MemoryStream
from mmbase.data.prefetch import on_device
from mmbase.data.stream import Loader
from mmbase.data.timing import DataWatch
from mmbase.errors import MmbaseError
from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.training.checkpoint import (
    Progress,
    list_checkpoints,
    load_checkpoint,
    remove_torn,
    save_checkpoint,
)
from mmbase.training.optim import WeightAverage, build_optimizer
from mmbase.training.precision import Precision
from mmbase.training.schedule import learning_rate_factor
from mmbase.training.tracker import Tracker


def train_loop(
    model: CLIP,
    stream: MemoryStream | Loader,
    config: RunConfig,
    *,
    augment: Augment,
    device: torch.device,
    precision: Precision,
    folder: Path,
    console: Console,
) -> tuple[dict[str, torch.Tensor], Progress]:
    """Train ``model`` in place from the newest checkpoint in ``folder`` to the last step.

    Returns:
        The weights to keep (averaged ones where ``training.ema_decay`` is set) and how far the run came.

    Raises:
        MmbaseError: the loss is no longer finite, a checkpoint cannot be written or read.
    """
    settings = config.training
    checkpoints = folder / "checkpoints"

    # -- model, optimiser, average, loss --------------------------------------------------------------------------
    model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, settings)
    average = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
    compute_loss = ContrastiveLoss(settings.loss, settings.label_smoothing)
    largest_log_scale = math.log(settings.max_logit_scale)

    # -- where were we ----------------------------------------------------------------------------------------------
    progress = Progress()
    checkpoints.mkdir(exist_ok=True)
    remove_torn(checkpoints)
    if existing := list_checkpoints(checkpoints):
        progress = load_checkpoint(existing[-1], model, optimizer, average)
        console.print(f"resuming at step {progress.step} of {settings.steps} from {existing[-1]}")
    stream.position = progress.samples
    batches = prepared(stream, augment, model, config, progress.step, device)
    watch = DataWatch(stream)

    # -- steps ------------------------------------------------------------------------------------------------------
    tracker = Tracker(
        folder / "metrics.jsonl",
        steps=settings.steps,
        step=progress.step,
        seconds=progress.seconds,
        console=console,
    )
    with tracker:
        for step in range(progress.step, settings.steps):
            factor = learning_rate_factor(step, settings)
            optimizer.scale_learning_rates(factor)

            # Patch dropout and stochastic depth draw from torch's own generator: made a function of the step too.
            torch.manual_seed(int(generator(config.seed, 4, step).integers(1 << 62)))
            batch = next(batches)
            if step == 0 and settings.center_projections:
                center_projections(model, batch)
            with precision.autocast(device):
                output = model(batch["image"], batch["text"])
                loss = compute_loss(**output, image_ids=batch["caption_id"], text_ids=batch["caption_id"])

            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip or math.inf)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, largest_log_scale)
            if average:
                average.update(model)

            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                tracker.log(
                    done,
                    done * settings.batch_size,
                    loss=loss.detach(),
                    learning_rate=factor * settings.learning_rate,
                    logit_scale=output["logit_scale"].detach(),
                    gradient_norm=norm,
                    **watch.lap(),
                )
                if watch.verdict:
                    console.print(watch.verdict, soft_wrap=True, highlight=False)
            else:
                tracker.advance(done)
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                progress = Progress(done, done * settings.batch_size, tracker.seconds)
                save_checkpoint(checkpoints, model, optimizer, average, progress, settings.keep_checkpoints)
    return (average.averaged if average else model.state_dict()), progress


def prepared(
    stream: MemoryStream | Loader,
    augment: Augment,
    model: CLIP,
    config: RunConfig,
    step: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches on the device, augmented and normalised; how a picture is varied depends on (seed, epoch, sample)."""

    def pack(batch: Batch) -> Batch:
        return batch | {"text": model.text.pack(batch["text"])}

    for batch in on_device(stream.batches(), device, stream.times, prepare=pack):
        progress = step / config.training.steps
        side = config.training.image_size_at(progress)
        size = model.image_size if side is None else (side, side)
        image = augment.at(progress, size)(batch["image"], batch["may_flip"], batch["draw"])
        yield batch | {"image": image}
        step += 1


@torch.no_grad()
def center_projections(model: CLIP, batch: Batch) -> None:
    """Take the first batch's mean feature off the biases of both output projections.

    Features of an untrained tower share a large common part, which a contrastive loss has to unlearn first.

    Raises:
        MmbaseError: a tower whose projection has no bias.
    """
    for name, tower, inputs in (("vision", model.visual, batch["image"]), ("text", model.text, batch["text"])):
        bias = getattr(tower.proj, "bias", None)
        if bias is None:
            raise MmbaseError(f"training.center_projections needs model.{name}.projection_bias=true")
        bias.sub_(tower(inputs).mean(0))
