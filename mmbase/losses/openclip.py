"""OpenCLIP's loss classes with OpenCLIP's arguments: change one import, keep the training script.

Equal to OpenCLIP 3.3.0 in value and gradients, with these differences, all towards precision or less work:

* The loss is float32, whatever the features' dtype; logits are never rounded to 16 bits.
* Under CUDA autocast float32 features are multiplied as float16 (see :func:`mmbase.losses.precision.product_dtype`); on
  a CPU they stay float32. Features to which autocast gave two dtypes are converted to the wider one.
* ``ClipLoss(local_loss=True, gather_with_grad=True)``: the gradient to the scale is the mean over ranks of OpenCLIP's,
  the same on each, which is what DistributedDataParallel makes of OpenCLIP's as well.
* Ranks may hold different numbers of rows. To equal one process then, losses would have to be weighted by rows, which
  these are not where every rank returns its own; :class:`mmbase.losses.ContrastiveLoss` is always exact.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbase.errors import MmbaseError, nearest
from mmbase.losses.distributed import check_exchange, distributed_clip_loss, distributed_sigmoid_loss
from mmbase.losses.precision import common_dtype, product_dtype
from mmbase_kernels import clip_loss, sigmoid_loss

DISTRIBUTED = {"bidir": "two-way ring", "shift": "ring", "reduce": "gather", "gather": "gather"}
"""OpenCLIP's ways to bring texts to other ranks, and ours; its ``reduce`` is a gather by way of sums with zeros."""


class ClipLoss(nn.Module):
    """Softmax loss in place of ``open_clip.ClipLoss``: half its matrix products and, over ranks, half its traffic.

    Args:
        local_loss: over ranks, every rank returns the mean over its own rows and columns.
        gather_with_grad: over ranks, a rank's features take gradients from every rank's loss.
        cache_labels: accepted and not needed: labels are not stored anywhere.
        rank: this process among ``world_size``.
        world_size: number of processes of the default process group; 1: no communication.
        use_horovod: not supported.
        exchange: over ranks, ``gather``, or ``ring`` or ``two-way ring`` where not all features fit a device.
        equal_rows: over ranks, a promise that all hold as many rows, as OpenCLIP needs it: saves asking them, which
            over NCCL alone waits for the GPU.

    Raises:
        MmbaseError: options that are impossible or not supported.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        exchange: str = "gather",
        equal_rows: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise MmbaseError("use_horovod=True is not supported: start the training with torchrun and leave it off")
        check_exchange(exchange)
        _check_rank(rank, world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.exchange = exchange
        self.equal_rows = equal_rows

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Scalar float32 loss of this rank's ``[M, D]`` features, or ``{"contrastive_loss": loss}``.

        A ``logit_bias`` changes nothing under a softmax; its gradient is 0.

        Raises:
            ValueError: features that do not go together.
            MmbaseError: ``rank`` or ``world_size`` that contradict torch.distributed.
        """
        image_features, text_features, dtype = _prepared(image_features, text_features)
        with torch.autocast(image_features.device.type, enabled=False):
            if self.world_size == 1:
                loss = clip_loss(image_features, text_features, logit_scale, logit_bias=logit_bias, compute_dtype=dtype)
            else:
                _check_group(self.rank, self.world_size)
                loss = distributed_clip_loss(
                    image_features,
                    text_features,
                    logit_scale,
                    logit_bias=logit_bias,
                    exchange=self.exchange,
                    local_value=self.local_loss,
                    sum_gradients=self.gather_with_grad,
                    compute_dtype=dtype,
                    equal_rows=self.equal_rows,
                )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Sigmoid loss in place of ``open_clip.SigLipLoss``: one pass, no logits kept.

    Args:
        cache_labels: accepted and not needed.
        rank: this process among ``world_size``.
        world_size: number of processes of the default process group; 1: no communication.
        dist_impl: ``bidir`` (as None: texts go around a ring both ways), ``shift`` (one way), ``gather`` or ``reduce``
            (all texts at once). All give the same loss and gradients.
        equal_rows: as in :class:`ClipLoss`.

    Raises:
        MmbaseError: options that are impossible.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        equal_rows: bool = False,
    ) -> None:
        super().__init__()
        dist_impl = dist_impl or "bidir"
        if dist_impl not in DISTRIBUTED:
            raise MmbaseError(
                f"dist_impl must be one of {', '.join(DISTRIBUTED)}, not {dist_impl!r}{nearest(dist_impl, DISTRIBUTED)}"
            )
        _check_rank(rank, world_size)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.equal_rows = equal_rows

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Scalar float32: sum over this rank's images and all texts, divided by its images; or a dict of it.

        Raises:
            ValueError: features that do not go together.
            MmbaseError: ``rank`` or ``world_size`` that contradict torch.distributed.
        """
        image_features, text_features, dtype = _prepared(image_features, text_features)
        logit_bias = 0.0 if logit_bias is None else logit_bias
        with torch.autocast(image_features.device.type, enabled=False):
            if self.world_size == 1:
                loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, compute_dtype=dtype)
            else:
                _check_group(self.rank, self.world_size)
                loss = distributed_sigmoid_loss(
                    image_features,
                    text_features,
                    logit_scale,
                    logit_bias,
                    exchange=DISTRIBUTED[self.dist_impl],
                    local_value=True,
                    compute_dtype=dtype,
                    equal_rows=self.equal_rows,
                )
        return {"contrastive_loss": loss} if output_dict else loss


def _prepared(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, torch.dtype | None]:
    """Features of one dtype where autocast may have left two, and the dtype of their products."""
    if torch.is_autocast_enabled(image_features.device.type):
        image_features, text_features = common_dtype(image_features, text_features)
    return image_features, text_features, product_dtype(image_features)


def _check_rank(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise MmbaseError(f"rank={rank} is no rank of world_size={world_size}: give 0 <= rank < world_size")


def _check_group(rank: int, world_size: int) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise MmbaseError(
            f"world_size={world_size} needs torch.distributed: call torch.distributed.init_process_group first, or "
            "give world_size=1"
        )
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise MmbaseError(
            f"rank={rank}, world_size={world_size}, but this process is rank {dist.get_rank()} of "
            f"{dist.get_world_size()}: give torch.distributed's numbers"
        )
