"""A training loop in small, on any number of gloo ranks, with faults on request: what the survival tests break.

Everything that can be lost is in play: dropout drawn from each rank's generator of torch, AdamW's moments, an average
of weights, the position in the data. Samples are known by keys; what a sample holds follows from its key.
"""

import json
import os
import resource
import signal
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.training.agreement import Agreement
from mmbase.training.checkpoint import Checkpointer, Progress
from mmbase.training.checkpoint_config import CheckpointConfig
from mmbase.training.checkpoint_state import TrainState
from mmbase.training.distributed import Ranks
from mmbase.training.full_state import load_optimizer, load_whole, shard_like
from mmbase.training.guard import Guard, RollBack, suspicious
from mmbase.training.guard_config import GuardConfig
from mmbase.training.interrupt import Interrupt, Interrupted

BATCH, SAMPLES, WIDTH = 16, 80, 12


class Towers(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(5)
        self.image = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * WIDTH, 8))
        self.text = nn.Linear(WIDTH, 8)
        self.scale = nn.Parameter(torch.full((1,), 2.0))  # one dimension: what FSDP2 can shard

    def forward(self, images, texts):
        image, text = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return {"image_features": image, "text_features": text, "logit_scale": self.scale.exp().squeeze()}


class Sharded:
    """The states of a sharded model and of its optimiser: sharded out, whole or sharded in."""

    def __init__(self, held, ranks):
        self.held, self.ranks = held, ranks

    def state_dict(self):
        return self.held.state_dict()

    def load_state_dict(self, state):
        if isinstance(self.held, nn.Module):
            load_whole(self.held.state_dict(), state, self.ranks)
        else:
            load_optimizer(self.held, state)


class Average:
    """Exponential moving average of a model's weights."""

    def __init__(self, model):
        self.model, self.updates = model, 0
        self.averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self):
        self.updates += 1
        for name, value in self.model.state_dict().items():
            self.averaged[name].lerp_(value, 0.1)

    def state_dict(self):
        return {"averaged": self.averaged, "updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        for name, value in state["averaged"].items():
            self.averaged[name].copy_(shard_like(value, self.averaged[name]))


def key_of(position):
    epoch, place = divmod(position, SAMPLES)
    return f"{(place * 37 + 11 * epoch) % SAMPLES:03d}"


def batch_at(first, last, faults, position):
    """Pictures and texts ``[B, WIDTH]`` of positions, and their keys."""
    keys = [key_of(place) for place in range(first, last)]
    draw = torch.Generator()
    images, texts = torch.empty(len(keys), WIDTH), torch.empty(len(keys), WIDTH)
    for row, key in enumerate(keys):
        texts[row] = torch.randn(WIDTH, generator=draw.manual_seed(int(key)))
        images[row] = texts[row] + 0.3 * torch.randn(WIDTH, generator=draw)
        if position + row in faults.get("nan_at", []):
            images[row, 3] = torch.nan
        if position + row in faults.get("spike_at", []):
            images[row] = -images[row] * 30  # nothing about it is not finite
    return images, texts, keys


def average_gradients(model, world):
    if world > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world


def commit_fault(faults, rank, step):
    """Do to this rank what the test asks for at the beginning of a step."""
    if [rank, step] in faults.get("kill", []):
        os.kill(os.getpid(), signal.SIGKILL)
    if [rank, step] in faults.get("slow", []):
        time.sleep(60)
    if [rank, step] in faults.get("terminate", []):
        os.kill(os.getpid(), getattr(signal, faults.get("signal", "SIGTERM")))
    if [rank, step] in faults.get("disk_full", []):
        # From here on no file of this process grows past 16,000 bytes: write() fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, resource.RLIM_INFINITY))
    if [rank, step] in faults.get("disk_free", []):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def train(
    folder, ranks, *, steps=20, dropout=0.25, kind="none", checkpoints=None, guard=None, faults=None, whole_states=False
):
    """Train from the newest checkpoint in ``folder`` to the last step, and leave the weights in final.pt."""
    faults = faults or {}
    folder.mkdir(exist_ok=True)
    log = (folder / f"steps-{ranks.rank}.jsonl").open("a")
    lines = (folder / f"console-{ranks.rank}.txt").open("a")

    def report(line):
        lines.write(line + "\n")
        lines.flush()

    model, mesh = Towers(dropout), None
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    average = Average(model)
    compute_loss = ContrastiveLoss()
    torch.manual_seed(100 + ranks.rank)

    watcher = Guard(GuardConfig(**(guard or {})), ranks, folder / "guard.jsonl", report)
    holders = (Sharded(model, ranks), Sharded(optimizer, ranks)) if mesh else (model, optimizer)
    state = TrainState(*holders, average, others={"guard": watcher})
    mesh_of_shards = mesh if whole_states is False else None
    policy = CheckpointConfig(**({"every_samples": 3 * BATCH, "every_seconds": None} | (checkpoints or {})))
    agreement = Agreement(ranks)
    share = BATCH // ranks.world_size
    with Interrupt() as interrupt, Checkpointer(folder / "checkpoints", ranks, policy, report) as checkpointer:
        progress = checkpointer.restore(state, mesh=mesh_of_shards)
        if progress is None:
            progress = Progress()
            checkpointer.save(state, progress)
        step, samples, _ = progress
        while step < steps:
            if watcher.steps_over(samples, samples + BATCH):
                step, samples = step + 1, samples + BATCH
                continue
            commit_fault(faults, ranks.rank, step)
            mine = samples + ranks.rank * share
            images, texts, keys = batch_at(mine, mine + share, faults, mine)
            output = model(images, texts)
            loss = compute_loss(**output)
            optimizer.zero_grad()
            loss.backward()
            if mesh is None:
                average_gradients(model, ranks.world_size)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norm = norm.full_tensor() if mesh else norm
            optimizer.found_inf = watcher.judge(loss, norm)
            optimizer.step()
            average.update()
            verdict = watcher.watch(step, samples, samples + BATCH, keys, suspicious(output))
            row = {"step": step, "samples": samples, "loss": loss.item(), "keys": keys}
            log.write(json.dumps(row) + "\n")
            log.flush()

            step, samples = step + 1, samples + BATCH
            stop, time_is_up = agreement.any(interrupt.received is not None, checkpointer.time_is_up())
            end = step == steps
            due = stop or time_is_up or end or checkpointer.is_due(samples)
            if due and verdict is None:
                verdict = watcher.settle(end=end)
            if isinstance(verdict, RollBack):
                step, samples, _ = checkpointer.restore(state, before=verdict.to_samples, mesh=mesh_of_shards)
                continue
            if due:
                checkpointer.save(state, Progress(step, samples, 0.0))
            if stop:
                checkpointer.finish()
                raise Interrupted
        checkpointer.finish()
        agreement.close()
    whole = {
        part: {name: value.full_tensor() if mesh else value for name, value in tensors.items()}
        for part, tensors in (("model", model.state_dict()), ("average", average.averaged))
    }
    if ranks.rank == 0:
        torch.save(whole, folder / "final.pt")


def run_rank(rank, world, folder, meeting, options):
    """One process of several."""
    torch.set_num_threads(1)
    with (folder / f"errors-{rank}.txt").open("a") as errors:
        os.dup2(errors.fileno(), 2)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        train(folder, Ranks(rank, world), **options)
        dist.destroy_process_group()
