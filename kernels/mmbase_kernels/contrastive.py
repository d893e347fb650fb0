"""The softmax contrastive loss (InfoNCE), memory-flat: the logits need not exist as a whole.

Letters: M image rows, N text rows, D width.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3;
several positives per row as in Khosla et al. 2020, "Supervised Contrastive Learning", equation 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmbase_kernels import softmax
from mmbase_kernels.dispatch import (
    STASH_BYTES,
    as_scalar,
    check_features,
    check_kernel_dtype,
    check_matches,
    choose,
    match_mask,
    refuse_forward_mode,
)
from mmbase_kernels.targets import Targets, plan_targets


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    offset: int | None = None,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Mean of the image-to-text and the text-to-image cross entropy, as a float32 scalar.

    .. math:: L = \tfrac12 \Big[\tfrac1M \sum_i \big(\mathrm{lse}_j\, l_{ij} - \sum_j y_{ij} l_{ij}\big)
                + \tfrac1N \sum_j \big(\mathrm{lse}_i\, l_{ij} - \sum_i y'_{ij} l_{ij}\big)\Big],
              \quad l = s\, I T^\top + b

    Without ids row ``i`` matches column ``i`` alone, and the loss is that of::

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    With ``offset`` row ``i`` matches column ``i + offset``, as a rank's rows do against everyone's columns. With ids,
    image ``i`` matches every text ``j`` of ``image_ids[i] == text_ids[j]``; the target is spread evenly over a row's (a
    column's) matches, so a caption that stands twice in a batch is no false negative. Rows and columns without a match
    do not count in the means, as under ``ignore_index`` of ``F.cross_entropy``.

    The bias changes nothing, since a softmax does not feel a shift; its gradient is 0.

    Args:
        image_features: ``[M, D]``, float32, float16 or bfloat16; normalised by the caller.
        text_features: ``[N, D]``, the same dtype and device; ``N == M`` unless ids or an offset are given.
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar added to all logits, or None.
        image_ids: ``[M]`` integer identity of each image's caption, or None.
        text_ids: ``[N]`` the same for the texts; both or neither.
        offset: column of row 0's match; None: 0, and M must equal N.
        label_smoothing: share of the target spread over all columns (rows), in [0, 1).
        compute_dtype: dtype to which the features are rounded for the matrix products; None: their own. Unit vectors in
            float16 keep 8 times the precision they have in bfloat16. Gradients keep the features' dtype.
        stash_bytes: keep the logits from forward to backward if they take no more than this (float32 in ``torch``,
            float16 in ``triton``), which saves a quarter of the work; None: 256 MiB.
        impl: ``triton`` (CUDA), ``torch`` (any device), both with O((M+N)·D) memory plus a bounded workspace and the
            stash; ``reference`` (the equation as written, in float64, O(M·N) memory); ``auto``.

    Returns:
        Scalar float32 loss with gradients to features, scale and bias. A second derivative raises RuntimeError, except
        of ``reference``.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together; an unknown ``impl``; an offset that leaves no
            match. Ids that leave none are no error: the loss is 0.
    """
    check_features(image_features, text_features, compute_dtype)
    rows, columns = len(image_features), len(text_features)
    check_matches(image_features, text_features, image_ids, text_ids, offset)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    shift = offset or 0
    if image_ids is None and not -rows < shift < columns:
        raise ValueError(f"offset {shift} leaves none of {rows} rows a match among {columns} columns")
    scale = as_scalar("logit_scale", logit_scale, image_features.device)
    chosen = choose(impl, image_features, compute_dtype)
    if chosen == "reference":
        if compute_dtype is not None:
            image_features, text_features = image_features.to(compute_dtype), text_features.to(compute_dtype)
        match_MN = match_mask(rows, columns, image_ids, text_ids, shift, image_features.device)
        loss = _reference(image_features, text_features, scale, match_MN, label_smoothing)
    else:
        check_kernel_dtype(image_features, chosen)
        refuse_forward_mode("clip_loss", image_features, text_features, scale)
        if image_ids is not None and text_ids is not None:
            image_ids, text_ids = image_ids.long(), text_ids.long()
        with torch.no_grad():
            targets = plan_targets(
                rows,
                columns,
                image_features.device,
                image_ids=image_ids,
                text_ids=text_ids,
                offset=shift,
                label_smoothing=label_smoothing,
            )
        differentiable = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (image_features, text_features, scale)
        )
        budget = STASH_BYTES if stash_bytes is None else stash_bytes
        loss = _forward_op(
            image_features,
            text_features,
            scale,
            *_as_arguments(targets),
            compute_dtype,
            budget if differentiable else 0,
            chosen,
        )[0]
    if logit_bias is not None:
        loss = loss + 0.0 * as_scalar("logit_bias", logit_bias, image_features.device)
    return loss


def _reference(image_MD: Tensor, text_ND: Tensor, scale: Tensor, match_MN: Tensor, label_smoothing: float) -> Tensor:
    """In float64; returned as float32, from float64 features as float64."""
    logits_MN = scale.double() * image_MD.double() @ text_ND.double().T
    loss = logits_MN.new_zeros(())
    for logits, match in ((logits_MN, match_MN), (logits_MN.T, match_MN.T)):
        matches = match.sum(1)
        has_match = matches > 0
        target = match.double() / matches.clamp(min=1)[:, None]
        target = (1 - label_smoothing) * target + label_smoothing / match.shape[1]
        entropy = -(target * logits.log_softmax(1)).sum(1)
        loss = loss + torch.where(has_match, entropy, 0.0).sum() / has_match.sum().clamp(min=1) / 2
    return loss.to(torch.promote_types(image_MD.dtype, torch.float32))


def _as_arguments(targets: Targets) -> tuple[Any, ...]:
    """The fields of :class:`Targets` in the order of the operators' arguments."""
    return (
        targets.row_weight_M,
        targets.column_weight_N,
        targets.row_share_M,
        targets.column_share_N,
        targets.row_smooth_M,
        targets.column_smooth_N,
        targets.image_ids_M,
        targets.text_ids_N,
        targets.offset,
    )


def _rounded(features: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    """Contiguous features in the dtype of the products."""
    return features.to(compute_dtype or features.dtype).contiguous()


@torch.library.custom_op("mmbase_kernels::clip_loss", mutates_args=())
def _forward_op(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    row_weight_M: Tensor,
    column_weight_N: Tensor,
    row_share_M: Tensor,
    column_share_N: Tensor,
    row_smooth_M: Tensor | None,
    column_smooth_N: Tensor | None,
    image_ids_M: Tensor | None,
    text_ids_N: Tensor | None,
    offset: int,
    compute_dtype: torch.dtype | None,
    stash_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exps of rows and of columns, matches, stash."""
    targets = Targets(
        row_weight_M,
        column_weight_N,
        row_share_M,
        column_share_N,
        row_smooth_M,
        column_smooth_N,
        image_ids_M,
        text_ids_N,
        offset,
    )
    image, text, scale = _rounded(image_MD, compute_dtype), _rounded(text_ND, compute_dtype), scale.float()
    first = softmax.statistics(image, text, scale, targets, stash_bytes=stash_bytes, impl=impl)
    loss = softmax.loss(image, text, scale, first, targets)
    return loss, first.row_lse_M, first.column_lse_N, first.match_M, first.stash


@_forward_op.register_fake
def _(image_MD, text_ND, scale, *rest):
    rows, columns = len(image_MD), len(text_ND)
    image_ids, compute_dtype, stash_bytes, impl = rest[6], *rest[-3:]
    new = image_MD.new_empty
    dtype = compute_dtype or image_MD.dtype
    shape, dtype = softmax.stash_layout(image_MD, text_ND, dtype, image_ids is not None, stash_bytes, impl)
    return (
        new((), dtype=torch.float32),
        new(rows, dtype=torch.float64),
        new(columns, dtype=torch.float64),
        new(rows if image_ids is None else 0, dtype=torch.float32),
        new(shape, dtype=dtype),
    )


@torch.library.custom_op("mmbase_kernels::clip_loss_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    row_lse_M: Tensor,
    column_lse_N: Tensor,
    match_M: Tensor,
    stash: Tensor,
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    row_weight_M: Tensor,
    column_weight_N: Tensor,
    row_share_M: Tensor,
    column_share_N: Tensor,
    row_smooth_M: Tensor | None,
    column_smooth_N: Tensor | None,
    image_ids_M: Tensor | None,
    text_ids_N: Tensor | None,
    offset: int,
    compute_dtype: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to images, texts and scale, in their dtypes."""
    targets = Targets(
        row_weight_M,
        column_weight_N,
        row_share_M,
        column_share_N,
        row_smooth_M,
        column_smooth_N,
        image_ids_M,
        text_ids_N,
        offset,
    )
    image, text = _rounded(image_MD, compute_dtype), _rounded(text_ND, compute_dtype)
    total = softmax.total_lse(row_lse_M, column_lse_N, match_M, targets)
    at_match_M = softmax.match_gradient(row_lse_M, column_lse_N, match_M, targets)
    second = softmax.gradients(image, text, scale.float(), *total, at_match_M, targets, stash=stash, impl=impl)
    return (
        second.image_MD.mul_(grad).to(image_MD.dtype),
        second.text_ND.mul_(grad).to(text_ND.dtype),
        (second.scale * grad).to(scale.dtype),
    )


@_backward_op.register_fake
def _(grad, row_lse_M, column_lse_N, match_M, stash, image_MD, text_ND, scale, *rest):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(image_MD, memory_format=contiguous),
        torch.empty_like(text_ND, memory_format=contiguous),
        torch.empty_like(scale),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, offset, compute_dtype, _, impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.constants = offset, compute_dtype, impl


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.constants)
    return (*gradients, *[None] * 12)


def _refuse_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("clip_loss has no second derivative; impl='reference' has one")


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(_refuse_second_derivative)
