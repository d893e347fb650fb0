"""The sigmoid contrastive loss (SigLIP), memory-flat.

Letters: M image rows, N text rows, D width.

Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_kernels.dispatch import (
    as_scalar,
    check_features,
    check_kernel_dtype,
    check_matches,
    choose,
    match_mask,
    refuse_forward_mode,
)
from mmbase_kernels.sigmoid_pass import sigmoid_pass


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    offset: int | None = None,
    compute_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Binary cross entropy of every pair, summed over pairs and divided by the number of images; float32 scalar.

    .. math:: L = -\tfrac1M \sum_{ij} \log\sigma\big(z_{ij}\, l_{ij}\big), \quad l = s\, I T^\top + b

    with ``z = +1`` where image and text match and ``-1`` elsewhere; equivalent PyTorch::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        z = 2 * torch.eye(len(logits)) - 1
        -F.logsigmoid(z * logits).sum() / len(logits)

    Where a gradient is wanted it is computed in the forward pass, 6·M·N·D FLOPs in all; ``backward`` multiplies it.

    Arguments, returns and errors as in :func:`mmbase_kernels.clip_loss`, except that ``logit_bias`` is required and
    felt, and that a batch may hold no match at all.
    """
    if logit_bias is None:
        raise ValueError("sigmoid_loss needs a logit_bias; SigLIP starts it at -10")
    check_features(image_features, text_features, compute_dtype)
    check_matches(image_features, text_features, image_ids, text_ids, offset)
    scale = as_scalar("logit_scale", logit_scale, image_features.device)
    bias = as_scalar("logit_bias", logit_bias, image_features.device)
    chosen = choose(impl, image_features, compute_dtype)
    if chosen == "reference":
        return _reference(image_features, text_features, scale, bias, image_ids, text_ids, offset or 0, compute_dtype)
    check_kernel_dtype(image_features, chosen)
    refuse_forward_mode("sigmoid_loss", image_features, text_features, scale, bias)
    if image_ids is not None and text_ids is not None:
        image_ids, text_ids = image_ids.long(), text_ids.long()
    differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (image_features, text_features, scale, bias)
    )
    return _forward_op(
        image_features,
        text_features,
        scale,
        bias,
        image_ids,
        text_ids,
        offset or 0,
        compute_dtype,
        differentiable,
        chosen,
    )[0]


def _reference(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    offset: int,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    rounded = compute_dtype or image_MD.dtype
    logits_MN = scale.double() * image_MD.to(rounded).double() @ text_ND.to(rounded).double().T + bias.double()
    match_MN = match_mask(len(image_MD), len(text_ND), image_ids, text_ids, offset, logits_MN.device)
    loss = -F.logsigmoid(torch.where(match_MN, logits_MN, -logits_MN)).sum() / len(logits_MN)
    return loss.to(torch.promote_types(image_MD.dtype, torch.float32))


@torch.library.custom_op("mmbase_kernels::sigmoid_loss", mutates_args=())
def _forward_op(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids_M: Tensor | None,
    text_ids_N: Tensor | None,
    offset: int,
    compute_dtype: torch.dtype | None,
    gradients: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and its gradients to images, texts, scale and bias, float32; empty unless asked for."""
    image, text = (features.to(compute_dtype or features.dtype).contiguous() for features in (image_MD, text_ND))
    result = sigmoid_pass(
        image,
        text,
        scale.float(),
        bias.float(),
        image_ids_M=image_ids_M,
        text_ids_N=text_ids_N,
        offset=offset,
        gradients=gradients,
        impl=impl,
    )
    share = 1 / len(image_MD)
    return (
        result.loss * share,
        result.image_MD.mul_(share),
        result.text_ND.mul_(share),
        result.scale * share,
        result.bias * share,
    )


@_forward_op.register_fake
def _(image_MD, text_ND, scale, bias, image_ids_M, text_ids_N, offset, compute_dtype, gradients, impl):
    new = image_MD.new_empty
    single = () if gradients else (0,)
    return (
        new((), dtype=torch.float32),
        new(image_MD.shape if gradients else 0, dtype=torch.float32),
        new(text_ND.shape if gradients else 0, dtype=torch.float32),
        new(single, dtype=torch.float32),
        new(single, dtype=torch.float32),
    )


@torch.library.custom_op("mmbase_kernels::sigmoid_loss_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    grad_image_MD: Tensor,
    grad_text_ND: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
    like_features: Tensor,
    like_scale: Tensor,
    like_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward pass kept, times the incoming gradient, in the inputs' dtypes."""
    features = like_features.dtype
    return (
        (grad_image_MD * grad).to(features),
        (grad_text_ND * grad).to(features),
        (grad_scale * grad).to(like_scale.dtype),
        (grad_bias * grad).to(like_bias.dtype),
    )


@_backward_op.register_fake
def _(grad, grad_image_MD, grad_text_ND, grad_scale, grad_bias, like_features, like_scale, like_bias):
    features = like_features.dtype
    return (
        torch.empty_like(grad_image_MD, dtype=features),
        torch.empty_like(grad_text_ND, dtype=features),
        torch.empty_like(grad_scale, dtype=like_scale.dtype),
        torch.empty_like(grad_bias, dtype=like_bias.dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image_MD, _, scale, bias, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    # Empty tensors carry the dtypes: keeping the features alive would cost their memory.
    ctx.save_for_backward(*output[1:], image_MD.new_empty(0), scale.detach(), bias.detach())


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*_backward_op(grad, *ctx.saved_tensors), *[None] * 6)


def _refuse_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("sigmoid_loss has no second derivative; impl='reference' has one")


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(_refuse_second_derivative)
