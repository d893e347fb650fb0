"""The softmax contrastive loss (InfoNCE), memory-flat: the logits never exist as a whole.

Letters: M image rows, N text rows, D width, C rows of one chunk.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3;
several positives per row as in Khosla et al. 2020, "Supervised Contrastive Learning", equation 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmbase_kernels.dispatch import check_pair, choose, chunk_rows, inverse_matches


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
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

    With ids, image ``i`` matches every text ``j`` of ``image_ids[i] == text_ids[j]``; the target is spread evenly over
    a row's (a column's) matches, so a caption that stands twice in a batch is no false negative.

    Args:
        image_features: ``[M, D]``, float32, float16 or bfloat16; normalised by the caller.
        text_features: ``[N, D]``, the same dtype and device; ``N == M`` unless ids are given.
        logit_scale: scalar tensor, already exponentiated.
        logit_bias: scalar tensor added to all logits, or None.
        image_ids: ``[M]`` integer identity of each image's caption, or None.
        text_ids: ``[N]`` the same for the texts; both or neither.
        label_smoothing: share of the target spread over all columns (rows), in [0, 1).
        impl: ``torch`` (chunked, O((M+N)·D) memory plus a bounded workspace), ``reference`` (the equation as written,
            O(M·N) memory), ``auto``.

    Returns:
        Scalar float32 loss with gradients to features, scale and bias. A second derivative raises RuntimeError.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together; an unknown ``impl``.
    """
    check_pair(image_features, text_features, logit_scale, logit_bias, image_ids, text_ids)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    arguments = (image_features, text_features, logit_scale, logit_bias, image_ids, text_ids, label_smoothing)
    if choose(impl) == "reference":
        return _reference(*arguments)
    return _ChunkedClipLoss.apply(*arguments)


def _reference(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    logits_MN = scale.float() * image_MD.float() @ text_ND.float().T
    if bias is not None:
        logits_MN = logits_MN + bias.float()
    if image_ids is None or text_ids is None:
        match_MN = torch.eye(*logits_MN.shape, dtype=torch.bool, device=logits_MN.device)
    else:
        match_MN = image_ids[:, None] == text_ids[None, :]
    loss = logits_MN.new_zeros(())
    for logits, match in ((logits_MN, match_MN), (logits_MN.T, match_MN.T)):
        target = match / match.sum(1, keepdim=True).clamp(min=1)
        target = (1 - label_smoothing) * target + label_smoothing / match.shape[1]
        loss = loss - (target * logits.log_softmax(1)).sum(1).mean() / 2
    return loss


class _ChunkedClipLoss(torch.autograd.Function):
    """Row chunks: both log-sum-exps forward, a recompute and the two gradient products backward (8·M·N·D FLOPs)."""

    @staticmethod
    def forward(ctx, image_MD, text_ND, scale, bias, image_ids, text_ids, label_smoothing):
        """See :func:`clip_loss`."""
        rows, columns = len(image_MD), len(text_ND)
        scale_f, bias_f = scale.float(), (bias.float() if bias is not None else 0.0)
        row_lse_M = image_MD.new_empty(rows, dtype=torch.float32)
        inverse_M = inverse_N = row_lse_M  # unused without ids
        if image_ids is not None:
            inverse_M, inverse_N = inverse_matches(image_ids, text_ids), inverse_matches(text_ids, image_ids)
        column_lse_N = image_MD.new_full((columns,), -torch.inf, dtype=torch.float32)
        positive = image_MD.new_zeros((), dtype=torch.float32)
        total = image_MD.new_zeros((), dtype=torch.float32)
        for chunk in chunk_rows(rows, columns):
            logits_CN = (image_MD[chunk] @ text_ND.T).float().mul_(scale_f).add_(bias_f)
            row_lse_M[chunk] = logits_CN.logsumexp(1)
            column_lse_N = torch.logaddexp(column_lse_N, logits_CN.logsumexp(0))
            if label_smoothing:
                total += logits_CN.sum()
            if image_ids is None:
                first = torch.arange(chunk.start, chunk.stop, device=image_MD.device)
                positive += logits_CN.gather(1, first[:, None]).sum() * (0.5 / rows + 0.5 / columns)
            else:
                match_CN = image_ids[chunk, None] == text_ids[None, :]
                weight_CN = inverse_M[chunk, None] * (0.5 / rows) + inverse_N[None, :] * (0.5 / columns)
                positive += (logits_CN * weight_CN)[match_CN].sum()
        smooth = label_smoothing / (rows * columns)
        loss = (row_lse_M.mean() + column_lse_N.mean()) / 2 - (1 - label_smoothing) * positive - smooth * total
        ctx.save_for_backward(
            image_MD, text_ND, scale, bias, image_ids, text_ids, inverse_M, inverse_N, row_lse_M, column_lse_N
        )
        ctx.label_smoothing = label_smoothing
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """Gradients of :func:`clip_loss`; the softmax minus its target is formed before any rounding."""
        (grad,) = grad_outputs
        (image_MD, text_ND, scale, bias, image_ids, text_ids, inverse_M, inverse_N, row_lse_M, column_lse_N) = (
            ctx.saved_tensors
        )
        rows, columns = len(image_MD), len(text_ND)
        scale_f, bias_f = scale.float(), (bias.float() if bias is not None else 0.0)
        keep = 1 - ctx.label_smoothing
        smooth = ctx.label_smoothing / (rows * columns)
        grad_image_MD = torch.empty_like(image_MD, memory_format=torch.contiguous_format)
        grad_text_ND = torch.zeros_like(text_ND, dtype=torch.float32, memory_format=torch.contiguous_format)
        grad_scale = image_MD.new_zeros((), dtype=torch.float32)
        grad_bias = image_MD.new_zeros((), dtype=torch.float32)
        for chunk in chunk_rows(rows, columns):
            cosine_CN = (image_MD[chunk] @ text_ND.T).float()
            logits_CN = cosine_CN * scale_f + bias_f
            grad_CN = (logits_CN - row_lse_M[chunk, None]).exp_().mul_(0.5 / rows)
            grad_CN += logits_CN.sub_(column_lse_N).exp_().mul_(0.5 / columns)
            if image_ids is None:
                grad_CN.diagonal(chunk.start).sub_(keep * (0.5 / rows + 0.5 / columns))
            else:
                match_CN = image_ids[chunk, None] == text_ids[None, :]
                weight_CN = inverse_M[chunk, None] * (0.5 / rows) + inverse_N[None, :] * (0.5 / columns)
                grad_CN -= keep * weight_CN * match_CN
            if smooth:
                grad_CN -= smooth
            grad_CN *= grad
            grad_scale += (grad_CN * cosine_CN).sum()
            grad_bias += grad_CN.sum()
            scaled_CN = grad_CN.mul_(scale_f).to(image_MD.dtype)
            grad_image_MD[chunk] = scaled_CN @ text_ND
            grad_text_ND += (scaled_CN.T @ image_MD[chunk]).float()
        return (
            grad_image_MD,
            grad_text_ND.to(text_ND.dtype),
            grad_scale.to(scale.dtype).reshape(scale.shape),
            grad_bias.to(bias.dtype).reshape(bias.shape) if bias is not None else None,
            None,
            None,
            None,
        )
