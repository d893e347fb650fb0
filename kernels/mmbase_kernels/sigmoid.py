"""The sigmoid contrastive loss (SigLIP), memory-flat.

Letters: M image rows, N text rows, D width, C rows of one chunk.

Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmbase_kernels.dispatch import check_pair, choose, chunk_rows


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Binary cross entropy of every pair, summed over pairs and divided by the number of images; float32 scalar.

    .. math:: L = -\tfrac1M \sum_{ij} \log\sigma\big(z_{ij}\, l_{ij}\big), \quad l = s\, I T^\top + b

    with ``z = +1`` where image and text match and ``-1`` elsewhere; equivalent PyTorch::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        z = 2 * torch.eye(len(logits)) - 1
        -F.logsigmoid(z * logits).sum() / len(logits)

    Arguments, ids and errors as in :func:`mmbase_kernels.clip_loss`; ``logit_bias`` is required.
    """
    if logit_bias is None:
        raise ValueError("sigmoid_loss needs a logit_bias; SigLIP starts it at -10")
    check_pair(image_features, text_features, logit_scale, logit_bias, image_ids, text_ids)
    if choose(impl) == "reference":
        logits_MN = logit_scale.float() * image_features.float() @ text_features.float().T + logit_bias.float()
        sign_MN = torch.where(_match(slice(0, len(logits_MN)), logits_MN, image_ids, text_ids), 1.0, -1.0)
        return -F.logsigmoid(sign_MN * logits_MN).sum() / len(logits_MN)
    return _ChunkedSigmoidLoss.apply(image_features, text_features, logit_scale, logit_bias, image_ids, text_ids)


def _match(chunk: slice, logits_CN: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Tensor:
    """Boolean ``[C, N]``: which pairs of the chunk belong together."""
    if image_ids is None or text_ids is None:
        rows = torch.arange(chunk.start, chunk.stop, device=logits_CN.device)
        return rows[:, None] == torch.arange(logits_CN.shape[1], device=logits_CN.device)
    return image_ids[chunk, None] == text_ids[None, :]


class _ChunkedSigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_MD, text_ND, scale, bias, image_ids, text_ids):
        rows, columns = len(image_MD), len(text_ND)
        loss = image_MD.new_zeros((), dtype=torch.float32)
        for chunk in chunk_rows(rows, columns):
            logits_CN = (image_MD[chunk] @ text_ND.T).float().mul_(scale.float()).add_(bias.float())
            match_CN = _match(chunk, logits_CN, image_ids, text_ids)
            loss += F.softplus(torch.where(match_CN, -logits_CN, logits_CN)).sum()
        ctx.save_for_backward(image_MD, text_ND, scale, bias, image_ids, text_ids)
        return loss / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        image_MD, text_ND, scale, bias, image_ids, text_ids = ctx.saved_tensors
        rows, columns = len(image_MD), len(text_ND)
        grad_image_MD = torch.empty_like(image_MD, memory_format=torch.contiguous_format)
        grad_text_ND = torch.zeros_like(text_ND, dtype=torch.float32, memory_format=torch.contiguous_format)
        grad_scale = image_MD.new_zeros((), dtype=torch.float32)
        grad_bias = image_MD.new_zeros((), dtype=torch.float32)
        for chunk in chunk_rows(rows, columns):
            cosine_CN = (image_MD[chunk] @ text_ND.T).float()
            logits_CN = cosine_CN * scale.float() + bias.float()
            match_CN = _match(chunk, logits_CN, image_ids, text_ids)
            # d softplus(∓l) / dl; the sign is applied before anything is rounded.
            sign_CN = torch.where(match_CN, -1.0, 1.0)
            grad_CN = logits_CN.mul_(sign_CN).sigmoid_().mul_(sign_CN).mul_(grad / rows)
            grad_scale += (grad_CN * cosine_CN).sum()
            grad_bias += grad_CN.sum()
            scaled_CN = grad_CN.mul_(scale.float()).to(image_MD.dtype)
            grad_image_MD[chunk] = scaled_CN @ text_ND
            grad_text_ND += (scaled_CN.T @ image_MD[chunk]).float()
        return (
            grad_image_MD,
            grad_text_ND.to(text_ND.dtype),
            grad_scale.to(scale.dtype).reshape(scale.shape),
            grad_bias.to(bias.dtype).reshape(bias.shape),
            None,
            None,
        )
