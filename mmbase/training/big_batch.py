"""One step on a contrastive batch of any size with the memory of a small one, to the same gradients.

A contrastive loss compares every pair of a batch, so a batch cannot be split as that of another loss can. But its
gradient passes through the features alone, which are small: compute all features without a graph, take the loss and its
gradient to them in one pass, then compute each part's features again, with a graph, and send its share of that gradient
back. Each part draws the same random numbers both times; where the model is given keys, these are also those that the
whole batch would draw, and so are the gradients.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv:2101.06983).

Shapes: B the parts' pairs together, E embedding width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmbase.errors import MmbaseError
from mmbase.models.packing import Packed

Part = dict[str, Any]
"""``inputs``: keyword arguments of the model: image, text, perhaps keys; ``ids``: int64 [B] identities, or None."""
Output = dict[str, Tensor]
INPUTS = {"image": "image_features", "text": "text_features"}
FEATURES = tuple(INPUTS.values())


class StepOutput(NamedTuple):
    """What a step leaves beside gradients."""

    loss: Tensor
    """Scalar float32, detached."""
    logit_scale: Tensor
    """Scalar, exponentiated, detached."""
    features: Output
    """``image_features`` and ``text_features`` ``[B, E]`` of this rank's pairs, detached."""


def contrastive_step(
    model: Callable[..., Output],
    parts: Sequence[Part],
    compute_loss: Callable[..., Tensor],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    accumulating: Callable[[bool], AbstractContextManager[Any]] = lambda last: contextlib.nullcontext(),
    scale_loss: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> StepOutput:
    """Add the gradient of the loss over all ``parts`` to the parameters.

    With one part this is an ordinary forward and backward. With several it costs one forward more and holds the
    activations of one part; the loss runs once. A tower that is locked throughout is not run a second time.

    Args:
        model: returns image_features, text_features, logit_scale and perhaps logit_bias, as :class:`~mmbase.models.clip
            .CLIP` does; called with a part's ``inputs``.
        parts: the batch's parts, in order; over ranks every rank has as many.
        compute_loss: takes the outputs as keywords, with image_ids and text_ids where parts have ids.
        autocast: context in which model and loss run.
        accumulating: context around a part's forward and backward, told whether it is the last: all others must not
            exchange gradients (DistributedDataParallel's ``no_sync``).
        scale_loss: applied to the loss before its backward (float16's gradient scaler).

    Raises:
        MmbaseError: no parts, or several with batch normalisation in training, whose statistics are of a whole batch.
    """
    if not parts:
        raise MmbaseError("a step needs at least one part of a batch; there is none")
    if len(parts) == 1:
        with accumulating(True):
            with autocast():
                output = model(**parts[0]["inputs"])
                loss = compute_loss(**output, **_ids(parts))
            scale_loss(loss).backward()
        features = {name: output[name].detach() for name in FEATURES}
        return StepOutput(loss.detach(), output["logit_scale"].detach(), features)
    if isinstance(model, nn.Module):
        refuse_batch_norm(model)

    states: list[_RandomState] = []
    outputs: list[Output] = []
    with torch.no_grad(), autocast():
        for part in parts:
            states.append(_RandomState.now(part))
            outputs.append(model(**part["inputs"]))
    whole: Output = {name: torch.cat([output[name] for output in outputs]).requires_grad_() for name in FEATURES}
    rest = outputs[0].keys() - set(FEATURES)
    whole |= {name: outputs[0][name].detach().clone().requires_grad_() for name in rest}
    after = _RandomState.now(parts[-1])
    with autocast():
        loss = compute_loss(**whole, **_ids(parts))
    scale_loss(loss).backward()

    sizes = [len(output["image_features"]) for output in outputs]
    split = {name: _gradient(whole[name]).split(sizes) for name in FEATURES}
    locked: set[str] = set()
    for place, (part, state) in enumerate(zip(parts, states)):
        last = place == len(parts) - 1
        with accumulating(last):
            with state.replayed(), autocast():
                output = model(**{name: value for name, value in part["inputs"].items() if name not in locked})
            locked |= {name for name, features in INPUTS.items() if not _trains(output.get(features))}
            gradients = {name: split[name][place] for name in FEATURES}
            for name in rest:  # the same in every part: counted in the last
                gradients[name] = _gradient(whole[name]) if last else torch.zeros_like(whole[name])
            wanted = [name for name in output if output[name].requires_grad]
            torch.autograd.backward([output[name] for name in wanted], [gradients[name] for name in wanted])
    after.restore()
    features = {name: whole[name].detach() for name in FEATURES}
    return StepOutput(loss.detach(), whole["logit_scale"].detach(), features)


def refuse_batch_norm(model: nn.Module) -> None:
    """Batch normalisation sees one part at a time: its statistics, and so the gradients, would be others.

    Raises:
        MmbaseError: a layer of it in training mode, by name.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise MmbaseError(
                f"training.micro_batch cannot split a batch that {name} normalises as a whole; use "
                "model.vision.stem_norm=group, or leave micro_batch out"
            )


def _trains(features: Tensor | None) -> bool:
    return features is not None and features.requires_grad


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _ids(parts: Sequence[Part]) -> dict[str, Tensor]:
    ids = [part.get("ids") for part in parts]
    if ids[0] is None:
        return {}
    joined = torch.cat([value for value in ids if value is not None])
    return {"image_ids": joined, "text_ids": joined}


def _device(inputs: Iterable[Any]) -> torch.device:
    """Where tensors lie, alone, in lists (images of several sizes) or packed (texts)."""
    for value in inputs:
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, Packed):
            return _device(getattr(value, field.name) for field in dataclasses.fields(value))
        if isinstance(value, Sequence) and value:
            return _device(value)
    return torch.device("cpu")


class _RandomState(NamedTuple):
    """State of torch's generators of the CPU and of the device a part lies on."""

    cpu: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def now(cls, part: Part) -> _RandomState:
        device = _device(part["inputs"].values())
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, on_device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from here on what was drawn from here on before."""
        self.restore()
        yield
