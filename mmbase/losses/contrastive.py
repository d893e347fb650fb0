"""The training losses as modules that take a model's output as keywords."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbase.errors import MmbaseError, nearest
from mmbase.losses.distributed import check_exchange, distributed_clip_loss, distributed_sigmoid_loss
from mmbase.losses.precision import product_dtype
from mmbase_kernels import clip_loss, sigmoid_loss

KINDS = ("softmax", "sigmoid")


class ContrastiveLoss(nn.Module):
    """InfoNCE or the sigmoid loss over one batch, which may be spread over ranks.

    Over ranks every process gives its own samples, any number of them, and gets the loss of the whole batch. Gradients
    are such that their average over ranks, which DistributedDataParallel and FSDP take, is exactly that of one process
    with the whole batch. Processes are those of torch.distributed, once it is initialised.

    Args:
        kind: ``softmax`` (InfoNCE, CLIP) or ``sigmoid`` (SigLIP; the model needs a logit_bias).
        label_smoothing: softmax only, share of the target spread over all columns.
        exchange: over ranks, ``gather`` holds the texts of all ranks on each; ``ring`` and ``two-way ring`` never do:
            texts pass through, both ways in half the steps.
        equal_rows: over ranks, a promise that all hold as many samples, which saves asking them.
        group: processes that share a batch; None: all.

    Raises:
        MmbaseError: an unknown ``kind`` or ``exchange``, a ``label_smoothing`` out of range or of a sigmoid loss.
    """

    def __init__(
        self,
        kind: str = "softmax",
        label_smoothing: float = 0.0,
        *,
        exchange: str = "gather",
        equal_rows: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise MmbaseError(f"loss must be 'softmax' or 'sigmoid', not {kind!r}{nearest(kind, KINDS)}")
        check_exchange(exchange)
        if not 0.0 <= label_smoothing < 1.0:
            raise MmbaseError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        if kind == "sigmoid" and label_smoothing:
            raise MmbaseError(f"label_smoothing={label_smoothing} is for the softmax loss: leave it 0 with 'sigmoid'")
        self.kind = kind
        self.label_smoothing = label_smoothing
        self.exchange = exchange
        self.equal_rows = equal_rows
        self.group = group

    @property
    def world_size(self) -> int:
        """Processes that share a batch."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor:
        """Scalar float32 loss of ``[M, D]`` images against ``[N, D]`` texts; equal ids are matches, never negatives.

        Under CUDA autocast, which must enclose the call, float32 features are multiplied in float16, see
        :func:`mmbase.losses.precision.product_dtype`.
        """
        features = image_features, text_features, logit_scale
        ids_and_dtype: dict[str, Any] = {
            "image_ids": image_ids,
            "text_ids": text_ids,
            "compute_dtype": product_dtype(image_features),
        }
        over_ranks: dict[str, Any] = {
            "group": self.group,
            "exchange": self.exchange,
            "equal_rows": self.equal_rows,
        }
        with torch.autocast(image_features.device.type, enabled=False):
            if self.kind == "sigmoid":
                if logit_bias is None:
                    raise MmbaseError("the sigmoid loss needs a model with a logit_bias: set model.init_logit_bias=-10")
                if self.world_size == 1:
                    return sigmoid_loss(*features, logit_bias, **ids_and_dtype)
                return distributed_sigmoid_loss(*features, logit_bias, **ids_and_dtype, **over_ranks)
            rest: dict[str, Any] = {"logit_bias": logit_bias, "label_smoothing": self.label_smoothing, **ids_and_dtype}
            if self.world_size == 1:
                return clip_loss(*features, **rest)
            return distributed_clip_loss(*features, **rest, **over_ranks)
