"""The stand-in loop with the parts of real training: towers, Parallel, Muon beside AdamW, the average of weights."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.big_batch import contrastive_step
from mmbase.training.checkpoint import Checkpointer, Progress
from mmbase.training.checkpoint_config import CheckpointConfig
from mmbase.training.checkpoint_state import TrainState
from mmbase.training.config import TrainingConfig
from mmbase.training.distributed import Ranks
from mmbase.training.guard import Guard
from mmbase.training.guard_config import GuardConfig
from mmbase.training.muon import Muon
from mmbase.training.optim import WeightAverage, build_optimizer
from mmbase.training.parallel import Parallel

BATCH, CONTEXT, END = 8, 12, 49


def build():
    """Tiny towers with convolutions, whose weights lie channels_last but where they are sharded."""
    torch.manual_seed(0)
    tower = {"width": 32, "heads": 2, "layers": 2}
    stem = {"stem": "conv", "stem_channels": [8, 16], "stem_blocks": [1, 1], "class_token": False, "pool": "average"}
    config = {
        "embed_dim": 16,
        "vision": tower | stem | {"image_size": 16},
        "text": tower | {"vocab_size": END + 1, "context_length": CONTEXT},
    }
    return CLIP(CLIPConfig.model_validate(config)).train()


def batch_at(step, ranks):
    """Pictures and texts of this rank."""
    draw = torch.Generator().manual_seed(step)
    text = torch.randint(1, END, (BATCH, CONTEXT), generator=draw)
    text[:, -1] = END
    image = torch.randn(BATCH, 3, 16, 16, generator=draw)
    rows = BATCH // ranks.world_size
    return image.split(rows)[ranks.rank], text.split(rows)[ranks.rank]


def train(folder, ranks, *, kind="none", optimizer="muon", steps=6, until=None, spoil=None):
    """Train to ``steps`` or stop after ``until``; the update of step ``spoil`` has gradients that are no numbers."""
    folder.mkdir(exist_ok=True)
    lines = (folder / f"console-{ranks.rank}.txt").open("a")

    def report(line):
        lines.write(line + "\n")
        lines.flush()

    settings = TrainingConfig(optimizer=optimizer, learning_rate=1e-3, warmup_steps=0, epsilon=1e-4)
    parallel = Parallel(build(), ranks, kind=kind)
    alike = dist.group.WORLD if kind == "ddp" else None
    optimizers = build_optimizer(parallel.model, settings, alike=alike)
    for part in optimizers.parts:
        if isinstance(part, Muon):
            part.dtype = torch.float32  # bfloat16 would round errors of 1e-8 to 1e-2 now and then
    average = WeightAverage(parallel.model, 0.9)
    guard = Guard(GuardConfig(), ranks, folder / "guard.jsonl", report)
    state = TrainState(parallel, optimizers, average, others={"guard": guard})
    compute_loss = ContrastiveLoss()
    policy = CheckpointConfig(every_samples=None, every_seconds=None)
    with Checkpointer(folder / "checkpoints", ranks, policy, report) as checkpointer:
        progress = checkpointer.restore(state, mesh=parallel.mesh) or Progress()
        for step in range(progress.step, min(steps, until or steps)):
            image, text = batch_at(step, ranks)
            optimizers.zero_grad()
            part = {"inputs": {"image": image, "text": parallel.model.text.pack(text)}, "ids": None}
            out = contrastive_step(parallel.module, [part], compute_loss, accumulating=parallel.accumulating)
            norm = parallel.clip(1.0)
            optimizers.skip_where(guard.judge(out.loss * torch.nan if step == spoil else out.loss, norm))
            optimizers.step()
            average.update(parallel.model)
            guard.watch(step, step * BATCH, (step + 1) * BATCH)
            progress = Progress(step + 1, (step + 1) * BATCH)
        checkpointer.save(state, progress)
        checkpointer.finish()


def run_rank(rank, world, folder, meeting, options):
    """One process of several."""
    torch.set_num_threads(1)
    with (folder / f"errors-{rank}.txt").open("a") as errors:
        os.dup2(errors.fileno(), 2)
        meet = {"init_method": f"file://{meeting}", "timeout": timedelta(seconds=60)}
        dist.init_process_group("gloo", rank=rank, world_size=world, **meet)
        train(folder, Ranks(rank, world), **options)
        dist.destroy_process_group()
