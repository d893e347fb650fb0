"""One rank of the tests of optimisers over ranks, on a small stand-in for the loop; started by test_optim_ranks.py.

python optim_worker.py FOLDER WORLD [WORLD ...]
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.big_batch import contrastive_step
from mmbase.training.config import TrainingConfig
from mmbase.training.depth import TowerLocks
from mmbase.training.distributed import Ranks, open_ranks
from mmbase.training.full_state import shard_like, whole
from mmbase.training.matrices import OwnMatrices, ShardedMatrices, SharedMatrices, chunks
from mmbase.training.muon import Muon
from mmbase.training.optim import Optimizers, WeightAverage, build_optimizer
from mmbase.training.parallel import Parallel
from mmbase.training.precision import LossScaler

STEPS, BATCH, SKIPPED = 6, 12, 2
CASES = {
    "ddp, adamw": {"kind": "ddp"},
    "ddp, muon": {"kind": "ddp", "optimizer": "muon", "parts": 2},
    "ddp, muon, locks": {"kind": "ddp", "optimizer": "muon", "locks": True, "parts": 2},
    "fsdp, adamw": {"kind": "fsdp"},
    "fsdp, muon": {"kind": "fsdp", "optimizer": "muon", "parts": 2},
    "fsdp, muon, locks": {"kind": "fsdp", "optimizer": "muon", "locks": True, "parts": 2},
    "fsdp, muon, scaled": {"kind": "fsdp", "optimizer": "muon", "scaled": True},
    "fsdp to ddp": {"kind": "fsdp", "optimizer": "muon", "then": "ddp"},
    "ddp to fsdp": {"kind": "ddp", "optimizer": "muon", "then": "fsdp"},
}
"""How it is trained; ``then``: another kind takes over half way; ``parts`` of each rank's batch."""
UNEVEN = ("ddp, muon", "fsdp, muon, locks", "fsdp to ddp")
"""Over three ranks, which the rows of weights do not divide by."""


def build() -> CLIP:
    torch.manual_seed(0)
    tower = {"width": 16, "heads": 2, "layers": 2, "dropout": 0.1, "drop_path": 0.3}
    config = {
        "embed_dim": 8,
        "vision": tower | {"image_size": 16, "patch_size": 4, "patch_dropout": 0.5},
        "text": tower | {"vocab_size": 40, "context_length": 8},
    }
    return CLIP(CLIPConfig.model_validate(config)).train()


def own_parts(model: CLIP, step: int, ranks: Ranks, parts: int) -> list[dict]:
    draw = torch.Generator().manual_seed(100 + step)
    text = torch.randint(1, 39, (BATCH, 8), generator=draw)
    for row in range(BATCH):
        text[row, 1 + row % 7], text[row, 2 + row % 7 :] = 39, 0
    batch = {
        "image": torch.randn(BATCH, 3, 16, 16, generator=draw),
        "text": text,
        "keys": torch.randint(-(1 << 62), 1 << 62, (BATCH,), generator=draw),
    }
    mine = [value.chunk(ranks.world_size)[ranks.rank].chunk(parts) for value in batch.values()]
    return [{"inputs": {"image": image, "text": model.text.pack(ids), "keys": keys}} for image, ids, keys in zip(*mine)]


def start(options: dict, ranks: Ranks, kind: str) -> tuple[Parallel, Optimizers, WeightAverage, TowerLocks]:
    parallel = Parallel(build(), ranks, kind=kind)
    config = TrainingConfig(
        optimizer=options.get("optimizer", "adamw"), epsilon=1e-4, learning_rate=1e-3, muon_learning_rate=0.01
    )
    alike = dist.group.WORLD if parallel.kind == "ddp" else None
    optimizers = build_optimizer(parallel.model, config, layer_decay=0.8, alike=alike)
    for part in optimizers.parts:
        if isinstance(part, Muon):
            part.dtype = torch.float32  # bfloat16 would round errors of 1e-8 to 1e-2 now and then
    return parallel, optimizers, WeightAverage(parallel.model, 0.9), TowerLocks(parallel.model)


def fill_ranks(model: CLIP, step: int, factor: float) -> None:
    """Add numbers to gradients that lack ranks: Muon makes whole directions of the rounding errors there."""
    draw = torch.Generator().manual_seed(200 + step)
    for parameter in model.parameters():
        noise = factor * torch.randn(parameter.shape, generator=draw)
        if parameter.grad is not None:
            parameter.grad.add_(shard_like(noise, parameter.grad))


def train(options: dict, ranks: Ranks) -> dict[str, object]:
    """Losses, final weights and their average, and whether the skipped step changed any bit."""
    alone = ranks.world_size == 1
    parallel, optimizers, average, locks = start(options, ranks, "none" if alone else options["kind"])
    scaler = LossScaler(ranks.device, factor=1024.0)
    losses, untouched = [], False
    for step in range(STEPS):
        if "then" in options and step == STEPS // 2 and not alone:
            weights = parallel.state_dict()
            states = whole([optimizers.state_dict(), average.state_dict()], ranks)
            state, averaged = ranks.broadcast_object(states)
            parallel, optimizers, average, locks = start(options, ranks, options["then"])
            parallel.load_state_dict(weights if ranks.is_first else None)
            optimizers.load_state_dict(state)
            average.load_state_dict(averaged)
        if options.get("locks") and locks.set(*((0, 0), (4, 2), (1, 0))[step % 3]):
            parallel.locks_changed()
        out = contrastive_step(
            parallel.module,
            own_parts(parallel.model, step, ranks, 1 if alone else options.get("parts", 1)),
            ContrastiveLoss(),
            accumulating=parallel.accumulating,
            scale_loss=scaler.scale if options.get("scaled") else lambda loss: loss,
        )
        fill_ranks(parallel.model, step, 1024.0 if options.get("scaled") else 1.0)
        if options.get("scaled"):
            scaler.unscale(parallel.model.parameters())
        if step == SKIPPED:
            for parameter in parallel.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        norm = parallel.clip(1.0)
        before = whole([parallel.model.state_dict(), optimizers.state_dict()], ranks) if step == SKIPPED else None
        optimizers.skip_where(scaler.update(norm))
        optimizers.step()
        if before:
            untouched = same(before, whole([parallel.model.state_dict(), optimizers.state_dict()], ranks))
        optimizers.zero_grad()
        average.update(parallel.model)
        losses.append(float(out.loss))
    kept = {name: value.clone() for name, value in parallel.model.state_dict().items()}
    replicas = ranks.gather_objects(kept) if parallel.kind == "ddp" else []
    return {
        "losses": losses,
        "weights": parallel.state_dict(),
        "average": whole(average.averaged, ranks),
        "untouched": untouched,
        "factor": float(scaler.factor),
        "alike": all(same(kept, other) for other in replicas),
    }


def same(one: object, other: object) -> bool:
    """Whether two trees hold the same bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def mapped_matrices(ranks: Ranks) -> list[torch.Tensor]:
    """Differences between a function of whole matrices here and over ranks: more and fewer matrices than ranks."""
    found = []
    draw = torch.Generator().manual_seed(5)
    for shapes in ([(5, 3)], [(7, 4), (1, 2), (2, 9), (4, 4)][: ranks.world_size]):
        whole_ones = [torch.randn(shape, generator=draw) for shape in shapes]
        expected = OwnMatrices().mapped(torch.sinh, whole_ones, shapes)
        for dtype in (torch.float32, torch.bfloat16):
            alike = SharedMatrices(dist.group.WORLD).mapped(torch.sinh, [x.to(dtype) for x in whole_ones], shapes)
            pieces = [x.to(dtype).split(chunks(len(x), ranks.world_size))[ranks.rank] for x in whole_ones]
            sharded = ShardedMatrices(dist.group.WORLD).mapped(torch.sinh, pieces, shapes)
            for every, mine, exact in zip(alike, sharded, expected):
                own = exact.split(chunks(len(exact), ranks.world_size))[ranks.rank]
                assert every.shape == exact.shape and mine.shape == own.shape
                tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(every.float(), exact, **tolerance)
                torch.testing.assert_close(mine.float(), own, **tolerance)
                found.append((every.float() - exact).abs().max())
    return found


def run_rank(rank: int, world: int, folder: Path) -> None:
    with open_ranks("cpu", timeout=120) as ranks:
        found: dict[str, object] = {}
        if world == 4:  # as if on two machines
            pairs = Ranks(rank, 4, rank % 2, 2, ranks.device, ranks.store)
            found["hsdp, muon"] = train({"kind": "hsdp", "optimizer": "muon"}, pairs)
        else:
            found |= {name: train(CASES[name], ranks) for name in (UNEVEN if world == 3 else CASES)}
        if world > 1:
            found["matrices"] = mapped_matrices(ranks)
        torch.save(found, folder / f"{rank} of {world}.pt")


if __name__ == "__main__":
    from worlds import main

    main(run_rank)
