"""One rank of the tests of training over ranks, on a small stand-in for the loop; started by test_parallel.py.

python parallel_worker.py FOLDER WORLD [WORLD ...]
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.big_batch import contrastive_step
from mmbase.training.distributed import Ranks, open_ranks
from mmbase.training.full_state import load_optimizer, whole
from mmbase.training.parallel import Parallel

STEPS, FEW, BATCH, CONTEXT, END = 20, 6, 16, 12, 49
LEARNING_RATE = 1e-3
LONG = ["ddp", "ddp, micro", "fsdp", "fsdp, micro"]
CASES = {
    "ddp": {"kind": "ddp"},
    "ddp, micro": {"kind": "ddp", "parts": 2},
    "ddp, sigmoid": {"kind": "ddp", "loss": "sigmoid", "parts": 4},
    "ddp, batch norm": {"kind": "ddp", "norm": "batch"},
    "ddp, compiled": {"kind": "ddp", "parts": 2, "compile": "blocks", "checkpoint_activations": True},
    "ddp, locked": {"kind": "ddp", "lock": "visual", "parts": 2},
    "fsdp": {"kind": "fsdp"},
    "fsdp, micro": {"kind": "fsdp", "parts": 2},
    "fsdp, kept": {"kind": "fsdp", "parts": 2, "reshard_after_forward": False},
    "fsdp, sigmoid": {"kind": "fsdp", "loss": "sigmoid", "parts": 4},
    "fsdp, batch norm": {"kind": "fsdp", "norm": "batch"},
    "fsdp, compiled": {"kind": "fsdp", "parts": 2, "compile": "blocks", "checkpoint_activations": True},
    "fsdp, locked": {"kind": "fsdp", "lock": "visual", "parts": 2},
    "fsdp, bf16": {"kind": "fsdp", "dtype": torch.bfloat16, "parts": 2},
    "fsdp, bf16, batch norm": {"kind": "fsdp", "dtype": torch.bfloat16, "norm": "batch"},
    "fsdp to ddp": {"kind": "fsdp", "then": "ddp"},
    "ddp to fsdp": {"kind": "ddp", "then": "fsdp", "parts": 2},
    "hsdp": {"kind": "hsdp", "parts": 2},
}
"""What is trained, how; ``then``: another kind takes over half way."""
OWN = ("loss", "norm", "lock", "parts", "then")
"""Options of the training here; others are Parallel's."""


def steps_of(case: str) -> int:
    return STEPS if case in LONG else FEW


def cases_of(world: int) -> list[str]:
    return [case for case in CASES if case != "hsdp"] if world == 2 else [*LONG, "hsdp"]


def build(loss: str = "softmax", norm: str | None = None) -> CLIP:
    torch.manual_seed(0)
    tower = {"width": 64, "heads": 2, "layers": 2}
    stem = {
        "stem": "conv",
        "stem_channels": [8, 16],
        "stem_blocks": [1, 1],
        "stem_norm": norm,
        "class_token": False,
        "pool": "average",
    }
    config = {
        "embed_dim": 24,
        "vision": tower | {"image_size": 16} | (stem if norm else {"patch_size": 8}),
        "text": tower | {"vocab_size": END + 1, "context_length": CONTEXT},
        "init_logit_bias": -3.0 if loss == "sigmoid" else None,
    }
    return CLIP(CLIPConfig.model_validate(config)).train()


def whole_batch(step: int) -> dict[str, torch.Tensor]:
    """Of all ranks: two samples share an identity."""
    draw = torch.Generator().manual_seed(100 + step)
    text = torch.randint(1, END, (BATCH, CONTEXT), generator=draw)
    for row in range(BATCH):
        length = 2 + (3 * row + step) % (CONTEXT - 2)
        text[row, length - 1], text[row, length:] = END, 0
    ids = torch.arange(BATCH)
    ids[BATCH // 2] = 0
    return {"image": torch.randn(BATCH, 3, 16, 16, generator=draw), "text": text, "id": ids}


def own_parts(model: CLIP, step: int, ranks: Ranks, parts: int) -> list[dict]:
    rows = BATCH // ranks.world_size
    batch = {name: value.split(rows)[ranks.rank].chunk(parts) for name, value in whole_batch(step).items()}
    return [
        {"inputs": {"image": image, "text": model.text.pack(text)}, "ids": ids}
        for image, text, ids in zip(batch["image"], batch["text"], batch["id"])
    ]


def start(options: dict, ranks: Ranks, kind: str) -> tuple[Parallel, torch.optim.Optimizer]:
    model = build(options.get("loss", "softmax"), options.get("norm"))
    if locked := options.get("lock"):
        getattr(model, locked).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(ranks.rank)  # rank 0's weights are those that count
    rest = {name: value for name, value in options.items() if name not in (*OWN, "kind")}
    parallel = Parallel(model, ranks, kind=kind, **rest)
    trained = [parameter for parameter in parallel.model.parameters() if parameter.requires_grad]
    return parallel, torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=1e-4, fused=True)


def train(case: str, ranks: Ranks) -> dict[str, object]:
    """Losses, norms and final weights."""
    options = CASES[case]
    if "compile" in options:
        torch._dynamo.reset()
    compute_loss = ContrastiveLoss(options.get("loss", "softmax"))
    kind = options["kind"] if ranks.world_size > 1 else "none"
    parallel, optimizer = start(options, ranks, kind)
    parts = options.get("parts", 1) if ranks.world_size > 1 else 1
    losses, norms = [], []
    for step in range(steps := steps_of(case)):
        if "then" in options and step == steps // 2 and ranks.world_size > 1:
            weights, state = parallel.state_dict(), whole(optimizer.state_dict(), ranks)
            parallel, optimizer = start(options, ranks, options["then"])
            parallel.load_state_dict(weights if ranks.is_first else None)
            load_optimizer(optimizer, ranks.broadcast_object(state))
        autocast = functools.partial(torch.autocast, "cpu", parallel.dtype, enabled=parallel.dtype is not None)
        out = contrastive_step(
            parallel.module,
            own_parts(parallel.model, step, ranks, parts),
            compute_loss,
            autocast=autocast,
            accumulating=parallel.accumulating,
        )
        norms.append(float(parallel.clip(1.0)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            parallel.model.logit_scale.clamp_(0, 4.6)
        losses.append(float(out.loss))
    weights = parallel.state_dict()
    assert bool(weights) == ranks.is_first
    return {"losses": losses, "norms": norms, "weights": weights}


def other_cases(ranks: Ranks) -> dict[str, object]:
    """What is not a whole training."""
    found: dict[str, object] = {}
    # A tower alone, before anything else was called; then the whole.
    parallel, _ = start({}, ranks, "fsdp")
    image = whole_batch(0)["image"]
    with torch.no_grad():
        found["tower"] = parallel.model.encode_image(image)
        found["again"] = parallel.module(image=image)["image_features"]
    found["shards"] = sum(p.to_local().numel() for p in parallel.model.parameters())
    found["parameters"] = sum(p.numel() for p in parallel.model.parameters())
    # Gradients that are no numbers on one rank are seen on all.
    for parameter in parallel.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan") if ranks.rank == 0 else 1.0)
    found["norm"] = float(parallel.clip(1.0))
    # Locks that change between steps.
    for kind in ("ddp", "fsdp"):
        parallel, _ = start({}, ranks, kind)
        told = []
        for locked in (True, False):
            parallel.model.text.requires_grad_(not locked)
            parallel.locks_changed()
            for step in range(2):
                parts = own_parts(parallel.model, step, ranks, 1)
                contrastive_step(parallel.module, parts, ContrastiveLoss(), accumulating=parallel.accumulating)
            told.append([name for name, p in parallel.model.named_parameters() if p.grad is not None])
            parallel.model.zero_grad()
        found[f"locks, {kind}"] = told
    return found


def run_rank(rank: int, world: int, folder: Path) -> None:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # no C++ compiler is asked for
    with open_ranks("cpu", timeout=120) as ranks:
        machines = Ranks(rank, world, rank % 2, 2, ranks.device, ranks.store)  # as if of two ranks each
        found: dict[str, object] = {
            case: train(case, machines if case == "hsdp" else ranks) for case in cases_of(world)
        }
        if world == 2:
            found["other"] = other_cases(ranks)
        torch.save(found, folder / f"{rank} of {world}.pt")


if __name__ == "__main__":
    from worlds import main

    main(run_rank)
