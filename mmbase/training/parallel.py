"""A model over ranks: DistributedDataParallel or FSDP2, with compiled blocks and checkpointed activations.

Whatever the way, a step gives the weights that one process with the whole batch would get, to rounding, because
:class:`~mmbase.losses.contrastive.ContrastiveLoss` gives gradients whose average over ranks is that process's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mmbase.errors import MmbaseError, nearest
from mmbase.models.clip import CLIP
from mmbase.models.layers import Transformer
from mmbase.training.batch_norm import normalise_over_ranks
from mmbase.training.distributed import Ranks
from mmbase.training.full_state import load_whole, whole
from mmbase.training.parallel_config import ParallelConfig

KINDS = ("auto", "none", "ddp", "fsdp", "hsdp")
COMPILE = ("none", "blocks")

_RECOMPILE_LIMIT = 128
"""Graphs of one block's code: image and text, all tokens or only the pooled one, packed or not, with gradients or
without, and each depth's own rate of stochastic depth. Beyond torch's default of 8 blocks would run uncompiled."""


class Parallel:
    """A model that is trained by all ranks together.

    Build it before optimisers and averages: FSDP2 puts shards in place of the parameters. All parameters are then of
    one kind, shards or plain, so that fused and foreach operations take them together.

    Args:
        model: plain, on any device, with the same weights on all ranks or with those of rank 0; changed in place.
        ranks: who trains.
        kind: ``none`` (one process), ``ddp``, ``fsdp``, ``hsdp`` (shards within each machine, machines alike) or
            ``auto``: ddp over ranks. One process is always ``none``.
        dtype: autocast's, or None for float32. FSDP gathers weights in it and reduces gradients in float32; autocast
            stays on around the model and the loss as without FSDP.
        compile: ``blocks`` compiles every transformer block; the first steps take longer.
        checkpoint_activations: compute blocks again in the backward pass.
        reshard_after_forward: FSDP only: gather the blocks' weights anew for the backward pass.

    Attributes:
        model: the model itself, with the parameters that are trained; its towers may be called alone.
        module: what training calls as it would call the model: ``module(image=..., text=...)``.
        kind: what was chosen.
        mesh: the ranks as FSDP sees them, or None.

    Raises:
        MmbaseError: an unknown kind, ``none`` over several ranks, ``hsdp`` without several machines alike.
    """

    def __init__(
        self,
        model: CLIP,
        ranks: Ranks,
        *,
        kind: str = "auto",
        dtype: torch.dtype | None = None,
        compile: str = "none",
        checkpoint_activations: bool = False,
        reshard_after_forward: bool = True,
    ) -> None:
        self.model, self.ranks, self.dtype = model, ranks, dtype
        self.kind = choose_kind(kind, ranks)
        self.compile, self.checkpoint_activations = compile, checkpoint_activations
        self.reshard_after_forward = reshard_after_forward
        self.mesh: DeviceMesh | None = None
        if compile not in COMPILE:
            close = nearest(compile, COMPILE)
            raise MmbaseError(f"training.compile must be one of {', '.join(COMPILE)}, not {compile!r}{close}")
        model.to(ranks.device)
        if checkpoint_activations:
            for transformer in _transformers(model):
                transformer.checkpoint_activations = True
        if compile == "blocks":
            compile_blocks(model)
        if self.kind != "none":
            start_alike(model)
            normalise_over_ranks(model, ranks.device)
        if self.sharded:
            self._shard()
        else:
            model.to(memory_format=torch.channels_last)  # FSDP2 takes rows of contiguous weights only
        self.module: Callable[..., dict[str, Tensor]] = self._wrapped()

    @classmethod
    def of(cls, model: CLIP, ranks: Ranks, config: ParallelConfig, dtype: torch.dtype | None) -> Parallel:
        """As a configuration says."""
        return cls(
            model,
            ranks,
            kind=config.parallel,
            dtype=dtype,
            compile=config.compile,
            checkpoint_activations=config.checkpoint_activations,
            reshard_after_forward=config.reshard_after_forward,
        )

    @property
    def alike(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same weights and gradients, which Muon may share its work among; None: none do."""
        return dist.group.WORLD if self.kind == "ddp" else None

    @property
    def sharded(self) -> bool:
        """Whether parameters are shards (DTensor)."""
        return self.kind in ("fsdp", "hsdp")

    def describe(self) -> list[str]:
        """What was chosen, a line each."""
        ranks, number = self.ranks, f"{self.ranks.world_size} ranks, {self.ranks.local_world_size} on this machine"
        dtype = str(self.dtype or torch.float32).removeprefix("torch.")
        again = "gathered again for the backward pass" if self.reshard_after_forward else "kept for the backward pass"
        first = {
            "none": "one process",
            "ddp": f"DistributedDataParallel over {number}",
            "fsdp": f"FSDP2 over {number}: weights gathered in {dtype}, {again}, gradients reduced in float32",
            "hsdp": f"FSDP2 within machines of {ranks.local_world_size} ranks, {ranks.world_size} in all: weights "
            f"gathered in {dtype}, {again}, gradients reduced in float32",
        }[self.kind]
        more = ["blocks compiled"] * (self.compile == "blocks")
        more += ["activations of blocks computed again"] * self.checkpoint_activations
        return [first, *more]

    # ------------------------------------------------------------------------------------------------------ a step

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a batch: gradients are averaged over ranks in the last alone."""
        if isinstance(self.module, DistributedDataParallel):
            with contextlib.nullcontext() if last else self.module.no_sync():
                yield
            return
        for tower in self._towers():
            tower.set_requires_gradient_sync(last)
            tower.set_is_last_backward(last)
            if not self.reshard_after_forward:
                tower.set_reshard_after_backward(last)
        yield
        if last and self.sharded:
            self._average_scalars()

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their norm together is at most ``max_norm``; None leaves them.

        Shards are counted once each and what every rank holds once in all, so that this is the norm of one process.
        The host does not wait for the device.

        Returns:
            The norm before, a float32 scalar, the same on all ranks.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not self.sharded or not gradients:
            return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm or math.inf)
        local = [(_local(gradient), _is_shard(gradient)) for gradient in gradients]
        squares = torch.zeros(2, device=self.ranks.device)
        for place, shard in enumerate((False, True)):
            if chosen := [gradient for gradient, is_shard in local if is_shard == shard]:
                squares[place] = nn.utils.get_total_norm(chosen).square()
        dist.all_reduce(squares[1], group=self._shard_group())
        norm = squares.sum().sqrt()
        if max_norm:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([gradient for gradient, _ in local], factor)
        return norm

    def _average_scalars(self) -> None:
        """What FSDP leaves alone, parameters without an axis, is averaged here."""
        scalars = [p.grad for p in self.model.parameters() if p.grad is not None and not _is_shard(p)]
        if not scalars:
            return
        with torch.no_grad():
            local = [_local(gradient) for gradient in scalars]
            together = torch.stack(local)
            dist.all_reduce(together)
            torch._foreach_copy_(local, (together / self.ranks.world_size).unbind())

    # ------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Whole weights on the CPU under the plain model's names, on rank 0; empty elsewhere. All ranks call."""
        weights = whole(self.model.state_dict(), self.ranks)
        return weights if self.ranks.is_first else {}

    def load_state_dict(self, weights: Mapping[str, Tensor] | None) -> None:
        """Put whole weights in place, those of any kind and number of ranks. All ranks call.

        Args:
            weights: on all ranks, or on rank 0 alone with None elsewhere, which then get them sent.

        Raises:
            MmbaseError: names or shapes of another model.
        """
        load_whole(self.model.state_dict(), weights, self.ranks)

    def locks_changed(self) -> None:
        """Call on all ranks after ``requires_grad`` of parameters has been changed, between steps."""
        self.module = self._wrapped()
        for module in self.model.modules() if self.sharded else ():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
                for parameter in group.fsdp_params:  # FSDP2 gathers into tensors that it made in the first step
                    if (gathered := getattr(parameter, "_unsharded_param", None)) is not None:
                        gathered.requires_grad_(parameter.sharded_param.requires_grad)

    # ------------------------------------------------------------------------------------------------ how it is made

    def _wrapped(self) -> nn.Module:
        if self.kind != "ddp" or not any(p.requires_grad for p in self.model.parameters()):
            return self.model
        device = self.ranks.device
        return DistributedDataParallel(
            self.model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,  # equal already: see normalise_over_ranks
            gradient_as_bucket_view=True,
        )

    def _shard(self) -> None:
        """Shard each block, then the rest of each tower; scalars stay whole.

        The root is not sharded itself: what has an axis belongs to a tower, and so a tower may be called alone.
        """
        self.mesh = _mesh(self.kind, self.ranks)
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32 if self.dtype else None)
        for tower in (self.model.visual, self.model.text):
            # Running statistics are in float32, and so have to be the weights beside them.
            for norm in tower.modules() if self.dtype else ():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    fully_shard(norm, mesh=self.mesh)
            for block in tower.transformer.blocks:
                fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=self.reshard_after_forward)
            # True, not the root's default: between steps nothing but shards is there to be changed.
            fully_shard(tower, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        for name, parameter in list(self.model.named_parameters(recurse=False)):
            replicated = distribute_tensor(parameter.detach(), self.mesh, [Replicate()] * self.mesh.ndim)
            setattr(self.model, name, nn.Parameter(replicated, requires_grad=parameter.requires_grad))
        self.model.register_forward_hook(_plain_scalars)

    def _towers(self) -> list[FSDPModule]:
        return [tower for tower in (self.model.visual, self.model.text) if isinstance(tower, FSDPModule)]

    def _shard_group(self) -> dist.ProcessGroup:
        assert self.mesh is not None  # of FSDP
        return self.mesh.get_group(self.mesh.ndim - 1)


def choose_kind(kind: str, ranks: Ranks) -> str:
    """``none``, ``ddp``, ``fsdp`` or ``hsdp``.

    Raises:
        MmbaseError: see :class:`Parallel`.
    """
    if kind not in KINDS:
        raise MmbaseError(f"training.parallel must be one of {', '.join(KINDS)}, not {kind!r}{nearest(kind, KINDS)}")
    if ranks.world_size == 1:
        return "none"
    if kind == "none":
        raise MmbaseError(
            f"training.parallel=none would train {ranks.world_size} models side by side; use ddp or fsdp, or start one "
            "process"
        )
    machines, rest = divmod(ranks.world_size, ranks.local_world_size)
    if kind == "hsdp" and (rest or machines < 2):
        raise MmbaseError(
            f"training.parallel=hsdp is for several machines with as many ranks each; {ranks.world_size} ranks with "
            f"{ranks.local_world_size} on this one are not, use fsdp"
        )
    return "ddp" if kind == "auto" else kind


def compile_blocks(model: nn.Module) -> None:
    """Compile each block's ``forward``; hooks, FSDP's among them, stay outside of the graphs."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _RECOMPILE_LIMIT)
    for transformer in _transformers(model):
        for block in transformer.blocks:
            block.forward = torch.compile(block.forward)


@torch.no_grad()
def start_alike(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    for tensor in model.state_dict().values():
        value = tensor.contiguous()
        dist.broadcast(value, src=0)
        tensor.copy_(value)


def _transformers(model: nn.Module) -> list[Transformer]:
    return [module for module in model.modules() if isinstance(module, Transformer)]


def _mesh(kind: str, ranks: Ranks) -> DeviceMesh:
    """All ranks in a row; or machines in a column, each a row of its ranks."""
    device = ranks.device.type
    if kind == "fsdp":
        return init_device_mesh(device, (ranks.world_size,), mesh_dim_names=("shard",))
    shape = ranks.world_size // ranks.local_world_size, ranks.local_world_size
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def _plain_scalars(model: nn.Module, inputs: object, output: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale and bias as losses expect them."""
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in output.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_shard(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(isinstance(placement, Shard) for placement in tensor.placements)
