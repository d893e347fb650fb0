"""Who is compared on the contrastive losses, the inputs they get, and the work each method has to do.

Letters: M image rows, N text rows (M = N here), D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_bench.harness import Work
from mmbase_bench.options import DTYPES

KINDS = ("softmax", "sigmoid")
DIRECTIONS = ("forward+backward", "forward")
COSINE = 0.2
"""Of an image to its text: at scale 100 the softmax loss is then neither solved nor hopeless, about 1."""
DUPLICATES = 8
KEEP = 1 << 62
"""A stash budget without end, in bytes."""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(image_features, text_features, logit_scale, logit_bias) to a scalar."""


@dataclass(frozen=True)
class Case:
    """One size of one loss."""

    kind: str
    size: int
    """M = N."""
    width: int
    dtype: str
    direction: str = DIRECTIONS[0]

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Unit features of images near their texts, a few of them twice; scale 100 (softmax) or 10 and bias -10."""
        generator = torch.Generator(device).manual_seed(seed)
        text, noise = (
            F.normalize(torch.randn(self.size, self.width, device=device, generator=generator), dim=1) for _ in range(2)
        )
        image = F.normalize(COSINE * text + (1 - COSINE**2) ** 0.5 * noise, dim=1)
        half = min(DUPLICATES, self.size // 2)
        image[:half], text[:half] = image[half : 2 * half].clone(), text[half : 2 * half].clone()
        image, text = (features.to(DTYPES[self.dtype]).requires_grad_() for features in (image, text))
        scale = torch.tensor(100.0 if self.kind == "softmax" else 10.0, device=device, requires_grad=True)
        bias = torch.tensor(-10.0, device=device, requires_grad=True) if self.kind == "sigmoid" else None
        return image, text, scale, bias

    def work(self, keeps_logits: bool) -> Work:
        """What a method has to do: 2MND logits, 4MND gradients, and 2MND again where softmax logits are not kept."""
        product = 2.0 * self.size * self.size * self.width
        item = DTYPES[self.dtype].itemsize
        features = 2.0 * self.size * self.width * item
        if self.direction == "forward":
            return Work(product, features)
        recompute = self.kind == "softmax" and not keeps_logits
        kept = 2.0 * self.size * self.size * item if keeps_logits else 0.0
        return Work((4 if recompute else 3) * product, 2 * features + kept)


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss."""

    name: str
    build: Callable[[str, torch.device, str], Loss]
    """(kind, device, torch.compile's mode) to the loss; raises where it cannot run."""
    keeps_logits: bool
    """Whether the M x N matrix outlives the forward pass; such a softmax needs no second product."""
    kinds: tuple[str, ...] = KINDS
    note: str = ""


def openclip(kind: str, device: torch.device, mode: str) -> Loss:
    """OpenCLIP's loss module as it is."""
    from open_clip.loss import ClipLoss, SigLipLoss

    if kind == "sigmoid":
        return SigLipLoss()
    module = ClipLoss()
    return lambda image_MD, text_ND, scale, bias: module(image_MD, text_ND, scale)


def one_gemm(kind: str, device: torch.device, mode: str) -> Loss:
    """The logits once, rows and columns reduced from the same matrix: what a careful person writes in PyTorch."""

    def softmax(image_MD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        logits_MN = (image_MD @ text_ND.T).float() * scale
        entropies = logits_MN.logsumexp(1).mean() + logits_MN.logsumexp(0).mean()
        return entropies / 2 - scale * matched(image_MD, text_ND).mean()

    def sigmoid(image_MD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        logits_MN = (image_MD @ text_ND.T).float() * scale + bias
        # softplus(-z) = softplus(z) - z turns the diagonal into a term of O(MD)
        return (F.softplus(logits_MN).sum() - (scale * matched(image_MD, text_ND) + bias).sum()) / len(image_MD)

    def matched(image_MD: Tensor, text_ND: Tensor) -> Tensor:
        return (image_MD.float() * text_ND.float()).sum(1)

    return softmax if kind == "softmax" else sigmoid


def compiled(build: Callable[[str, torch.device, str], Loss]) -> Callable[[str, torch.device, str], Loss]:
    """The same under ``torch.compile`` for fixed shapes."""
    return lambda kind, device, mode: torch.compile(build(kind, device, mode), dynamic=False, mode=mode)


def siglip_kernel(kind: str, device: torch.device, mode: str) -> Loss:
    """siglip-kernel 0.1.2: takes the logarithm of the scale, returns the loss in the features' dtype."""
    module = importlib.import_module("siglip_kernel")

    def loss(image_MD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return module.fused_siglip_loss(image_MD, text_ND, scale.log(), bias)

    return loss


def memeff(kind: str, device: torch.device, mode: str) -> Loss:
    """memeff 0.3.1: the temperature is a number fixed beforehand; ``stable=False`` gives the loss's own gradients."""
    module = importlib.import_module("memeff")
    made: list[torch.nn.Module] = []

    def loss(image_MD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if not made:  # the scale comes to the host once, in the untimed first call
            options = {"temperature": 1 / scale.item(), "normalized_inputs": True, "stable": False}
            made.append(module.MemoryEfficientCLIPLoss(**options))
        return made[0](image_MD, text_ND)

    return loss


def mmbase(impl: str, stash_bytes: int | None) -> Callable[[str, torch.device, str], Loss]:
    """Ours, of one implementation; a softmax with a stash budget of 0 recomputes its logits."""

    def build(kind: str, device: torch.device, mode: str) -> Loss:
        from mmbase_kernels import clip_loss, sigmoid_loss

        if impl == "triton" and device.type != "cuda":
            raise ValueError("runs on CUDA only")

        def loss(image_MD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            if bias is not None:
                return sigmoid_loss(image_MD, text_ND, scale, bias, impl=impl)
            return clip_loss(image_MD, text_ND, scale, impl=impl, stash_bytes=stash_bytes)

        return loss

    return build


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("openclip", openclip, True),
        Contender("openclip-compiled", compiled(openclip), True),
        Contender("one-gemm", one_gemm, True),
        Contender("one-gemm-compiled", compiled(one_gemm), True),
        Contender("siglip-kernel", siglip_kernel, False, ("sigmoid",)),
        Contender("memeff", memeff, False, ("softmax",), "no gradient to the scale"),
        Contender("mmbase-triton", mmbase("triton", 0), False),
        Contender("mmbase-triton-stash", mmbase("triton", KEEP), True, ("softmax",)),
        Contender("mmbase-torch", mmbase("torch", 0), False),
        Contender("mmbase-torch-stash", mmbase("torch", KEEP), True, ("softmax",)),
        Contender("mmbase-auto", mmbase("auto", None), False, note="its softmax floor is that of recompute"),
    )
}
BASELINE = "openclip"


def step(loss: Loss, case: Case, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[Tensor | None, ...]:
    """One call: the loss, and in ``forward+backward`` the gradients to every input (None where there is none)."""
    if case.direction == "forward":
        with torch.no_grad():
            return (loss(*inputs),)
    value = loss(*inputs)
    leaves = [tensor for tensor in inputs if tensor is not None]
    return (value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True))


def calls(
    contenders: list[str], case: dict[str, str | int], threads: int, seed: int, mode: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """For :mod:`mmbase_bench.memory`: the calls on a CPU of contenders named ``DIRECTION NAME``.

    What cannot be built raises when it is called.
    """
    torch.set_num_threads(threads)
    device, the_case = torch.device("cpu"), Case(**case)  # pyrefly: ignore[bad-argument-type]
    inputs = the_case.inputs(device, seed)
    for label in contenders:
        direction, name = label.split(" ")
        try:
            loss = CONTENDERS[name].build(the_case.kind, device, mode)
        except Exception as error:
            yield label, partial(_fail, error)
        else:
            yield label, partial(step, loss, replace(the_case, direction=direction), inputs)


def _fail(error: Exception) -> None:
    raise error
