"""Device and precision: what was chosen, and why."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmbase.errors import MmbaseError, nearest
from mmbase.training.matrices import local

NAMES = ("auto", "fp32", "bf16", "fp16", "fp8")


class Precision(NamedTuple):
    """How matrix products are computed."""

    dtype: torch.dtype | None
    """autocast dtype; None: float32 throughout"""
    reason: str
    fp8: bool = False
    """Linear layers of the blocks multiply in float8: see :func:`use_fp8`"""

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients would vanish without a :class:`LossScaler`."""
        return self.dtype == torch.float16

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context the towers run in."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


def choose_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one, else the CPU.

    Raises:
        MmbaseError: a device that this machine or this torch does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise MmbaseError(f"device={name!r} cannot be used: {reason}; use device=cpu or device=auto") from error
    return device


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision for ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``fp8`` on a device.

    Raises:
        MmbaseError: an unknown name; ``fp8`` on a device without it, or without torchao.
    """
    if name not in NAMES:
        raise MmbaseError(f"training.precision must be one of {', '.join(NAMES)}, not {name!r}{nearest(name, NAMES)}")
    if name == "fp32":
        return Precision(None, "asked for")
    if name == "bf16":
        return Precision(torch.bfloat16, "asked for")
    if name == "fp16":
        return Precision(torch.float16, "asked for; the loss is scaled")
    if name == "fp8":
        check_fp8(device)
        return Precision(torch.bfloat16, "asked for; linear layers of the blocks in float8 by torchao", fp8=True)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "the GPU multiplies bf16 in hardware")
        return Precision(None, "the GPU has no bf16")
    if device.type == "cpu" and has_amx():
        return Precision(torch.bfloat16, "the CPU multiplies bf16 tiles in hardware (AMX)")
    return Precision(None, f"no fast bf16 on this {device.type}")


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 tiles in hardware."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    return bool(capabilities.get("amx_bf16"))


# --------------------------------------------------------------------------------------------------------- float16


class LossScaler:
    """Keeps float16 gradients from vanishing: the loss is multiplied before its backward, gradients are divided after.

    The factor halves where gradients overflow, and doubles after ``interval`` steps without. Everything stays on the
    device, and follows from the gradients' norm over all ranks, so that ranks agree and nobody waits. A loop uses it
    so::

        contrastive_step(..., scale_loss=scaler.scale)
        scaler.unscale(model.parameters())
        norm = parallel.clip(max_norm)
        optimizers.skip_where(scaler.update(norm, guard.judge(loss, norm)))
        optimizers.step()

    Args:
        device: of the gradients.
        enabled: False does nothing at all, for a loop that need not ask.
        factor: the first.
        interval: steps without overflow after which it doubles.

    Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv:1710.03740).
    """

    def __init__(
        self, device: torch.device, *, enabled: bool = True, factor: float = 65536.0, interval: int = 2000
    ) -> None:
        self.enabled, self.interval = enabled, interval
        self.factor = torch.tensor(factor, device=device)
        self.good_steps = torch.tensor(0, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss * self.factor if self.enabled else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients; exact, as factors are powers of two."""
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if gradients and self.enabled:
            torch._foreach_mul_(gradients, 1.0 / self.factor)

    @torch.no_grad()
    def update(self, norm: Tensor, bad: Tensor | None = None) -> Tensor | None:
        """Set the factor of the next step.

        Args:
            norm: of the unscaled gradients of all ranks; not finite where one overflowed.
            bad: 1 where this step is to be left out for another reason.

        Returns:
            float32 scalar: 1 where this step is to be left out, for :meth:`~mmbase.training.optim.Optimizers
            .skip_where`; ``bad`` where this scaler is not enabled.
        """
        if not self.enabled:
            return bad
        overflow = ~torch.isfinite(norm)
        self.good_steps.copy_(torch.where(overflow, 0, self.good_steps + 1))
        grows = self.good_steps >= self.interval
        self.factor.mul_(torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0)))
        self.factor.clamp_(1.0, 2.0**24)
        self.good_steps.masked_fill_(grows, 0)
        skipped = overflow.float()
        return skipped if bad is None else torch.maximum(skipped, bad)

    def state_dict(self) -> dict[str, Any]:
        """The factor, and steps since it changed."""
        return {"factor": float(self.factor), "good_steps": int(self.good_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.factor.fill_(state["factor"])
        self.good_steps.fill_(state["good_steps"])


# ---------------------------------------------------------------------------------------------------------- float8


def check_fp8(device: torch.device) -> None:
    """Whether linear layers can multiply in float8 here.

    Raises:
        MmbaseError: a device that does not, or torchao is not installed.
    """
    remedy = "use training.precision=bf16"
    if device.type != "cuda":
        raise MmbaseError(f"training.precision=fp8 needs a GPU that multiplies float8, not {device.type}; {remedy}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise MmbaseError(
            f"training.precision=fp8 needs compute capability 8.9 or more (Ada, Hopper, Blackwell); "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; {remedy}"
        )
    _torchao()


def use_fp8(model: nn.Module) -> int:
    """Let the blocks' linear layers multiply in float8, with one scale for each row; in place.

    Call it on a model whose weights are in place, before it is compiled, sharded or wrapped; weights and their names
    stay as they are. It pays with compiled blocks (``training.compile=blocks``) and wide towers.

    Returns:
        How many layers were changed: those whose widths are multiples of 16, which the hardware wants.

    Raises:
        MmbaseError: torchao is not installed; no layer has such widths.
    """
    torchao = _torchao()
    chosen = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ".blocks." in name
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    }
    if not chosen:
        raise MmbaseError(
            "training.precision=fp8: no linear layer of the blocks has widths that are multiples of 16; choose other "
            "widths or training.precision=bf16"
        )
    config = torchao.Float8LinearConfig.from_recipe_name("rowwise")
    torchao.convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in chosen)
    return len(chosen)


def _torchao() -> Any:
    try:
        return importlib.import_module("torchao.float8")
    except ImportError as error:
        raise MmbaseError(
            "training.precision=fp8 needs torchao, which cannot be imported here "
            f"({str(error).splitlines()[0]}); pip install torchao, or use training.precision=bf16"
        ) from error
