"""THE loop: batches in, a trained model out, alone or among ranks; read it top to bottom.

Each part has a file of its own: what a step takes (batches.py), how it enters the model (augmented.py) and is computed
in parts (big_batch.py), how ranks share it (parallel.py), who judges it (guard.py), what is saved (checkpoint.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mmbase.config import RunConfig
from mmbase.data.augment import Augment
from mmbase.data.pictures import MemoryStream
from mmbase.data.stream import Loader
from mmbase.data.timing import DataWatch
from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.training.agreement import Agreement
from mmbase.training.augmented import Augmented, center_projections
from mmbase.training.batches import Feed
from mmbase.training.big_batch import contrastive_step
from mmbase.training.checkpoint import Checkpointer, Progress
from mmbase.training.checkpoint_state import TrainState
from mmbase.training.curriculum import Curriculum
from mmbase.training.distributed import Ranks
from mmbase.training.evaluate import Evaluation
from mmbase.training.full_state import whole
from mmbase.training.guard import Guard, RollBack, suspicious
from mmbase.training.hang_watch import Watch
from mmbase.training.interrupt import Interrupt, Interrupted
from mmbase.training.optim import WeightAverage, build_optimizer
from mmbase.training.parallel import Parallel
from mmbase.training.precision import LossScaler, Precision, use_fp8
from mmbase.training.schedule import learning_rate_factor
from mmbase.training.statistics import RunningStatistics
from mmbase.training.tracker import open_tracker
from mmbase.training.weights import weights_of


def train_loop(
    model: CLIP,
    stream: MemoryStream | Loader,
    config: RunConfig,
    *,
    curriculum: Curriculum,
    augment: Augment,
    ranks: Ranks,
    precision: Precision,
    folder: Path,
    console: Console,
    measure: Callable[[], Mapping[str, float]] | None = None,
) -> tuple[dict[str, Tensor], Progress]:
    """Train ``model`` in place from the newest checkpoint in ``folder`` to the last step; called by all ranks.

    Args:
        measure: what an evaluation between steps finds of the model, ``score`` among it; None: nothing is asked.

    Returns:
        The weights to keep, whole and on rank 0 (averaged ones where ``training.ema_decay`` is set, the best ones where
        ``training.patience`` is), and how far the run came.

    Raises:
        MmbaseError: what the guard does not put up with, a checkpoint that cannot be written or read.
        Interrupted: the run was asked to stop, and can go on from the checkpoint it left.
    """
    settings, report = config.training, partial(console.print, soft_wrap=True, highlight=False)
    patient = 10 * settings.hang_seconds  # for what takes longer than a step

    # -- model, optimiser, average, loss --------------------------------------------------------------------------
    if precision.fp8:
        use_fp8(model)
    parallel = Parallel.of(model, ranks, settings, precision.dtype)
    optimizer = build_optimizer(model, settings, layer_decay=settings.layer_decay, alike=parallel.alike)
    average = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
    scaler = LossScaler(ranks.device, enabled=precision.needs_scaler)
    forward, statistics = Augmented(parallel, augment), RunningStatistics(model)
    compute_loss = ContrastiveLoss(settings.loss, settings.label_smoothing)
    autocast = partial(precision.autocast, ranks.device)
    largest_log_scale = math.log(settings.max_logit_scale)

    # -- who watches, and what is saved -----------------------------------------------------------------------------
    guard = Guard(settings.guard, ranks, folder / "guard.jsonl", report, overflow_is_usual=scaler.enabled)
    plan = {"every": settings.evaluate_every, "patience": settings.patience}
    evaluation = Evaluation(measure, model, average, **plan, report=report)
    state = TrainState(parallel, optimizer, average, scaler, {"guard": guard, "evaluation": evaluation})
    agreement, data = Agreement(ranks), DataWatch(stream)
    feed = Feed(stream, curriculum, model.text, ranks, micro_batch=settings.micro_batch, steps_over=guard.steps_over)
    with Interrupt() as interrupt, Checkpointer(folder / "checkpoints", ranks, settings.checkpoints, report) as saver:
        progress = saver.restore(state, mesh=parallel.mesh)
        if progress is None:
            progress = Progress()
            if settings.guard.policy == "rollback":
                saver.save(state, progress)  # something to go back to
        tracker = open_tracker(config, curriculum, progress, ranks, precision.dtype, folder, console)
        for line in parallel.describe():
            report(f"  parallel   {line}")

        # -- steps --------------------------------------------------------------------------------------------------
        with tracker, Watch(ranks, hang_seconds=settings.hang_seconds) as watch:
            batches = feed.batches(progress.samples)
            to_center = settings.center_projections and not progress.samples
            watch.at(progress.step, "data wait")
            while (batch := None if evaluation.over else next(batches, None)) is not None:
                watch.at(batch.step, "forward and backward")
                factor = learning_rate_factor(batch.samples / settings.batch_size, settings) * batch.stage.learning_rate
                optimizer.scale_learning_rates(factor)
                forward.at(batch.samples / curriculum.total, batch.stage)
                if batch.is_new_level:
                    guard.new_level()
                if to_center:
                    center_projections(forward, batch.parts)
                    to_center = False

                statistics.remember()
                output = contrastive_step(
                    forward,
                    batch.parts,
                    compute_loss,
                    autocast=autocast,
                    accumulating=parallel.accumulating,
                    scale_loss=scaler.scale,
                )
                scaler.unscale(model.parameters())
                norm = parallel.clip(settings.gradient_clip)
                bad = scaler.update(norm, guard.judge(output.loss, norm))  # on the device: nobody waits for it
                watch.at(batch.step, "update")
                optimizer.skip_where(bad)
                optimizer.step()
                optimizer.zero_grad()
                statistics.undo_where(bad)
                with torch.no_grad():
                    model.logit_scale.clamp_(0, largest_log_scale)
                if average:
                    average.update(model)

                # -- judge, evaluate, tell, save --------------------------------------------------------------------
                verdict = guard.watch(batch.step, batch.samples, batch.end, batch.key, suspicious(output.features))
                stop, time_is_up = agreement.any(interrupt.received is not None, saver.time_is_up())
                to_measure = evaluation.is_due(batch.samples, batch.end, batch.is_last)
                to_save = to_measure or stop or time_is_up or batch.is_last or saver.is_due(batch.seen)
                if to_save and verdict is None:
                    verdict = guard.settle(end=batch.is_last)
                if isinstance(verdict, RollBack):
                    batches.close()
                    progress = saver.go_back(state, verdict.to_samples, mesh=parallel.mesh)
                    tracker.rewind(progress.step, progress.samples)
                    batches = feed.batches(progress.samples)
                    to_center = settings.center_projections and not progress.samples
                    watch.at(progress.step, "data wait")
                    continue
                measured: dict[str, float] = {}
                if to_measure:
                    watch.at(batch.step, "evaluation", allow=patient)
                    measured = evaluation.run(batch.done)
                if batch.done % settings.log_every == 0 or batch.is_last or measured:
                    told = {"loss": output.loss, "learning_rate": factor * settings.learning_rate}
                    told |= {"logit_scale": output.logit_scale, "gradient_norm": norm} | measured | data.lap()
                    tracker.log(batch.done, batch.seen, **told)
                    if data.verdict:
                        report(data.verdict)
                else:
                    tracker.advance(batch.done)
                if to_save:
                    watch.at(batch.step, "checkpoint", allow=patient)
                    progress = Progress(batch.done, batch.seen, tracker.seconds)
                    saver.save(state, progress, measured.get("score"))
                if stop:
                    saver.finish()
                    report(f"stopped by {interrupt.received or 'another rank'}; the same command goes on from here")
                    raise Interrupted
                watch.at(batch.done, "data wait")
            batches.close()
        saver.finish()
        agreement.close()
        best = saver.best() if settings.patience else None
    return (weights_of(best) if best else whole(average.averaged if average else model.state_dict(), ranks)), progress
