"""The training losses as modules that take a model's output as keywords."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmbase_kernels import clip_loss, sigmoid_loss


class ContrastiveLoss(nn.Module):
    """InfoNCE or the sigmoid loss over one batch.

    Args:
        kind: ``softmax`` (InfoNCE, CLIP) or ``sigmoid`` (SigLIP; the model needs a logit_bias).
        label_smoothing: softmax only, share of the target spread over all columns.
    """

    def __init__(self, kind: str = "softmax", label_smoothing: float = 0.0) -> None:
        super().__init__()
        if kind not in ("softmax", "sigmoid"):
            raise ValueError(f"loss must be 'softmax' or 'sigmoid', not {kind!r}")
        self.kind = kind
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor:
        """Scalar float32 loss of ``[M, D]`` images against ``[N, D]`` texts; equal ids are matches, never negatives."""
        with torch.autocast(image_features.device.type, enabled=False):
            if self.kind == "sigmoid":
                if logit_bias is None:
                    raise ValueError("the sigmoid loss needs a model with a logit_bias: set model.init_logit_bias=-10")
                return sigmoid_loss(
                    image_features, text_features, logit_scale, logit_bias, image_ids=image_ids, text_ids=text_ids
                )
            return clip_loss(
                image_features,
                text_features,
                logit_scale,
                logit_bias=logit_bias,
                image_ids=image_ids,
                text_ids=text_ids,
                label_smoothing=self.label_smoothing,
            )
