"""Memory of a training by part, without training: states by counting, activations by a forward pass in fake tensors.

Activations are those of the path of PyTorch operations, texts not packed: an upper bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmbase.config import RunConfig
from mmbase.models.config import CLIPConfig
from mmbase.plan_setup import Setup
from mmbase.training.curriculum import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn


def memory_of(config: RunConfig, setup: Setup, model: CLIPConfig, towers: nn.Module, stage: Stage) -> dict[str, float]:
    """Bytes by part, at the stage that needs most."""
    from mmbase_kernels.dispatch import STASH_BYTES

    settings = config.training
    numbers = sum(parameter.numel() for parameter in towers.parameters())
    local = setup.local(stage.batch_size)
    micro = min(local, setup.micro_batch or local)
    each, copies = saved_activations(model, stage, setup.precision, again=setup.checkpoint_activations)
    sharded = setup.kind == "fsdp"
    parts = {
        "weights": 4.0 * numbers,
        "gradients": 4.0 * numbers,
        f"{settings.optimizer} state": _optimizer_bytes(config, towers),
        "averaged weights": 4.0 * numbers if settings.ema_decay else 0.0,
    }
    if sharded:
        parts = {name: size / setup.gpus for name, size in parts.items()}
        width = 2 if setup.precision != "fp32" else 4
        whole = numbers * width
        parts["weights gathered"] = float(2 * _largest_block(towers) * width if setup.reshard_after_forward else whole)
        if micro < local:
            parts["gradients not yet reduced"] = 4.0 * numbers
    else:
        parts["16-bit copies of weights"] = copies
    parts[f"activations of {micro:,} pairs"] = each * micro
    pixels = 3 * stage.image_size[0] * stage.image_size[1]
    parts["batch"] = local * (4.0 * pixels + 3.0 * config.data.source_size**2)
    features = 4.0 * stage.batch_size * model.embed_dim
    parts["features and loss"] = 4 * features + min(float(STASH_BYTES), 2.0 * local * stage.batch_size)
    return {name: size for name, size in parts.items() if size}


def saved_activations(model: CLIPConfig, stage: Stage, precision: str, *, again: bool = False) -> tuple[float, float]:
    """Bytes that autograd keeps of a forward pass: of each pair, and beside that (16-bit copies of weights).

    Args:
        model: the towers.
        stage: sizes.
        precision: bf16, fp16 or fp32.
        again: blocks are computed again in the backward pass.
    """
    one, two = (_saved(model, stage, precision, again, batch) for batch in (1, 2))
    return two - one, max(0.0, 2 * one - two)


def _saved(model: CLIPConfig, stage: Stage, precision: str, again: bool, batch: int) -> float:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmbase.models.clip import CLIP

    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no storage is freed and its place used again

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept.append(value)
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return value

    with FakeTensorMode():
        towers = CLIP(model).train()
        towers.visual.patch_dropout.rate = 1.0 - stage.patch_keep
        for tower in (towers.visual, towers.text):
            tower.transformer.checkpoint_activations |= again
        own = {tensor.untyped_storage()._cdata for tensor in (*towers.parameters(), *towers.buffers())}
        image = torch.empty(batch, 3, *stage.image_size)
        text = torch.zeros(batch, stage.text_length, dtype=torch.int64)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
            torch.autocast("cpu", dtype, enabled=precision != "fp32"),
        ):
            towers(image, text)
    return float(sum(sizes.values()))


def _optimizer_bytes(config: RunConfig, towers: nn.Module) -> float:
    """Two moments in AdamW, one momentum in Muon, which has hidden matrices."""
    from torch import nn

    settings = config.training
    embeddings = {id(module.weight) for module in towers.modules() if isinstance(module, nn.Embedding)}
    total = 0.0
    for name, parameter in towers.named_parameters():
        outer = any(part in name for part in (*settings.no_decay, *settings.muon_exclude))
        hidden = parameter.ndim >= 2 and id(parameter) not in embeddings and not outer
        total += (4.0 if settings.optimizer == "muon" and hidden else 8.0) * parameter.numel()
    return total


def _largest_block(towers: nn.Module) -> int:
    from mmbase.models.layers import Block

    blocks = [module for module in towers.modules() if isinstance(module, Block)]
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
