"""The contrastive losses and their gradients in float64, in chunks: the very size that is timed can be checked.

Letters: M image rows, N text rows (M = N here), D width, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
QUANTITIES = ("loss", "image", "text", "scale", "bias")


def float64_loss(kind: str, image_MD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Loss and its gradients to images, texts, scale and (sigmoid) bias."""
    with torch.no_grad():
        features = image_MD.double(), text_ND.double(), scale.double()
        if bias is None:
            return _softmax(*features)
        return _sigmoid(*features, bias.double())


def _chunks(image_MD: Tensor, text_ND: Tensor) -> list[slice]:
    rows = max(1, CHUNK_BYTES[image_MD.device.type] // (8 * len(text_ND)))
    return [slice(start, start + rows) for start in range(0, len(image_MD), rows)]


def _softmax(image_MD: Tensor, text_ND: Tensor, scale: Tensor) -> list[Tensor]:
    count = len(image_MD)
    matched_M = scale * (image_MD * text_ND).sum(1)
    row_lse_M = torch.empty_like(matched_M)
    column_lse_N = torch.full_like(matched_M, -torch.inf)
    for chunk in _chunks(image_MD, text_ND):
        logits_CN = (image_MD[chunk] * scale) @ text_ND.T
        row_lse_M[chunk] = logits_CN.logsumexp(1)
        column_lse_N = torch.logaddexp(column_lse_N, logits_CN.logsumexp(0))
    loss = (row_lse_M + column_lse_N).mean() / 2 - matched_M.mean()
    image_grad_MD, text_grad_ND, scale_grad = torch.empty_like(image_MD), torch.zeros_like(text_ND), loss.new_zeros(())
    for chunk in _chunks(image_MD, text_ND):
        cosine_CN = image_MD[chunk] @ text_ND.T
        grad_CN = (cosine_CN * scale - row_lse_M[chunk, None]).exp_()
        grad_CN += (cosine_CN * scale - column_lse_N).exp_()
        grad_CN.diagonal(chunk.start).sub_(2)
        grad_CN /= 2 * count
        scale_grad += (grad_CN * cosine_CN).sum()
        image_grad_MD[chunk] = scale * (grad_CN @ text_ND)
        text_grad_ND += scale * (grad_CN.T @ image_MD[chunk])
    return [loss, image_grad_MD, text_grad_ND, scale_grad]


def _sigmoid(image_MD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
    count = len(image_MD)
    loss, scale_grad, bias_grad = (scale.new_zeros(()) for _ in range(3))
    image_grad_MD, text_grad_ND = torch.empty_like(image_MD), torch.zeros_like(text_ND)
    for chunk in _chunks(image_MD, text_ND):
        cosine_CN = image_MD[chunk] @ text_ND.T
        signed_CN = cosine_CN * scale + bias  # logits, times -1 on the diagonal: the argument of softplus
        signed_CN.diagonal(chunk.start).neg_()
        loss += F.softplus(signed_CN, threshold=50).sum() / count
        grad_CN = signed_CN.sigmoid_()
        grad_CN.diagonal(chunk.start).neg_()
        grad_CN /= count
        scale_grad += (grad_CN * cosine_CN).sum()
        bias_grad += grad_CN.sum()
        image_grad_MD[chunk] = scale * (grad_CN @ text_ND)
        text_grad_ND += scale * (grad_CN.T @ image_MD[chunk])
    return [loss, image_grad_MD, text_grad_ND, scale_grad, bias_grad]


def relative_errors(found: Sequence[Tensor | None], expected: Sequence[Tensor]) -> dict[str, float]:
    """``|found - expected| / |expected|`` by quantity; a gradient that a contender does not give is left out."""
    errors = {}
    for name, ours, reference in zip(QUANTITIES, found, expected):
        if ours is not None:
            errors[name] = ((ours.double() - reference).norm() / reference.norm()).item()
    return errors
