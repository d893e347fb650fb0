"""The contrastive losses of a batch that is spread over ranks, as functions of a rank's own features.

Collectives run inside: every rank of the group must call, forward and backward, with the same options.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmbase.errors import MmbaseError, nearest
from mmbase.losses.collectives import gather_rows
from mmbase.losses.meeting import meet
from mmbase.losses.sigmoid_over_ranks import GatherSigmoid, RingSigmoid, SigmoidPlan
from mmbase.losses.softmax_gather import GatherSoftmax
from mmbase.losses.softmax_one_way import OneWaySoftmax
from mmbase.losses.softmax_plan import SoftmaxPlan, plan_softmax
from mmbase.losses.softmax_ring import RingSoftmax
from mmbase_kernels.dispatch import STASH_BYTES, as_scalar, check_kernel_dtype, choose

EXCHANGES = ("gather", "ring", "two-way ring")


@torch.compiler.disable
def distributed_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: str = "gather",
    local_value: bool = False,
    sum_gradients: bool = True,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    equal_rows: bool = False,
    stash_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """:func:`mmbase_kernels.clip_loss` of all ranks' features, each rank giving its own; float32 scalar.

    With the defaults every rank returns the loss of the whole batch, and the *average* over ranks of the parameters'
    gradients, as DistributedDataParallel and FSDP take it, is the gradient of one process with the whole batch; ranks
    may hold different numbers of rows. ``local_value`` and ``sum_gradients`` are OpenCLIP's ``local_loss`` and
    ``gather_with_grad``: the table in :mod:`mmbase.losses.softmax_plan` says what each combination returns. The scale's
    gradient is the same on every rank: what averaging OpenCLIP's over ranks gives, equal to OpenCLIP's on every rank
    unless ``local_value``. With ``local_value`` alone the features of other ranks are constants, see
    :mod:`mmbase.losses.softmax_one_way`; there the scale's gradient is that of the rank's own value, as OpenCLIP's.

    Args:
        image_features: ``[M, D]`` of this rank, float32, float16 or bfloat16; normalised by the caller.
        text_features: ``[K, D]`` of this rank, the same dtype and device; ``K == M`` unless ids are given.
        logit_scale: scalar, already exponentiated, the same on all ranks.
        logit_bias: scalar or None; changes nothing under a softmax, its gradient is 0.
        group: process group; None: all ranks.
        exchange: ``gather`` (memory O(N·D) for N texts of all ranks), ``ring`` (O(M·D), texts sent twice) or ``two-way
            ring`` (the same in half the steps, over both directions of every link).
        local_value: return the mean over the rank's own rows and columns.
        sum_gradients: add up what the other ranks' losses say about this rank's features.
        image_ids: ``[M]`` integers: equal ids match, on whatever ranks they are; not with ``local_value``.
        text_ids: ``[K]`` the same of the texts; both or neither.
        label_smoothing: share of the target spread over all columns (rows); not with ``local_value``.
        compute_dtype: dtype to which features are rounded for products and for their way to others; None: their own.
        equal_rows: a promise that all ranks hold as many rows, which saves asking them; broken, ranks wait for ever. Of
            use over NCCL without a CPU backend, where asking waits for the GPU.
        stash_bytes: keep the rank's logits from forward to backward if they take no more than this; None: 256 MiB.
        impl: ``triton``, ``torch`` or ``auto``, as in :func:`mmbase_kernels.clip_loss`.

    Raises:
        ValueError: features, ids or options that do not go together.
        MmbaseError: ranks that do not go together.
    """
    check_exchange(exchange)
    shards = meet(image_features, text_features, image_ids, text_ids, compute_dtype, group, equal_rows)
    if local_value and (image_ids is not None or label_smoothing):
        raise MmbaseError("local_value takes neither ids nor label smoothing: use local_value=False")
    if local_value and not sum_gradients and exchange != "gather":
        raise MmbaseError(
            f"exchange={exchange!r} needs gradients of what other ranks hold: set sum_gradients (gather_with_grad), or "
            "leave local_value (local_loss) off"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise MmbaseError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    device = image_features.device
    scale = as_scalar("logit_scale", logit_scale, device)
    chosen = _implementation(impl, image_features, compute_dtype)
    backward = _wants_gradient(image_features, text_features, scale)
    budget = STASH_BYTES if stash_bytes is None else stash_bytes
    dtype = compute_dtype or image_features.dtype
    if local_value and not sum_gradients:
        first, budget = shards.offset(0), budget // 2  # of two rectangles
        with torch.no_grad():
            all_texts = gather_rows(text_features.to(dtype), shards.text_rows, group)
            all_images = gather_rows(image_features.to(dtype), shards.image_rows, group)
        loss = OneWaySoftmax.apply(image_features, all_texts, scale, first, budget, chosen, backward)
        loss = loss + OneWaySoftmax.apply(text_features, all_images, scale, first, budget, chosen, backward)
    else:
        ids = {"image_ids": image_ids, "text_ids": text_ids}
        plan = SoftmaxPlan(
            shards,
            plan_softmax(shards, device, **ids, label_smoothing=label_smoothing),
            local_value,
            sum_gradients,
            exchange == "two-way ring",
            dtype,
            chosen,
            budget,
            backward,
        )
        function = GatherSoftmax if exchange == "gather" else RingSoftmax
        loss = function.apply(image_features, text_features, scale, plan)
    if logit_bias is not None:
        loss = loss + 0.0 * as_scalar("logit_bias", logit_bias, device)
    return loss


@torch.compiler.disable
def distributed_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: str = "gather",
    local_value: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    equal_rows: bool = False,
    impl: str = "auto",
) -> Tensor:
    """:func:`mmbase_kernels.sigmoid_loss` of all ranks' features, each rank giving its own; float32 scalar.

    With the defaults every rank returns the loss of the whole batch, and the average over ranks of the parameters'
    gradients is that of one process; scale and bias take this rank's part of the sum, as OpenCLIP's. With
    ``local_value`` a rank returns, as in OpenCLIP, the sum over its images and all texts divided by its images, and
    features take the sum over ranks of those losses' gradients: the same gradients if all ranks hold as many rows.
    Where what reaches the ranks' losses differs, the table in :mod:`mmbase.losses.softmax_plan` holds here too.

    Args:
        image_features: as in :func:`distributed_clip_loss`, as all that is not named here.
        text_features: ``[K, D]``; ``K == M`` unless ids are given.
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar added to all logits.
        group: process group; None: all ranks.
        exchange: ``gather`` (memory O(N·D)), ``ring`` or ``two-way ring`` (O(M·D)).
        local_value: this rank's part of the loss, see above.
        image_ids: ``[M]`` integers, or None.
        text_ids: ``[K]``, or None.
        compute_dtype: dtype of the products, or None.
        equal_rows: a promise that all ranks hold as many rows.
        impl: ``triton``, ``torch`` or ``auto``.

    Raises:
        ValueError: features, ids or options that do not go together.
        MmbaseError: ranks that do not go together.
    """
    check_exchange(exchange)
    shards = meet(image_features, text_features, image_ids, text_ids, compute_dtype, group, equal_rows)
    device = image_features.device
    scale, bias = as_scalar("logit_scale", logit_scale, device), as_scalar("logit_bias", logit_bias, device)
    plan = SigmoidPlan(
        shards,
        None if image_ids is None else image_ids.long(),
        None if text_ids is None else text_ids.long(),
        local_value,
        exchange == "two-way ring",
        compute_dtype or image_features.dtype,
        _implementation(impl, image_features, compute_dtype),
        _wants_gradient(image_features, text_features, scale, bias),
    )
    function = GatherSigmoid if exchange == "gather" else RingSigmoid
    return function.apply(image_features, text_features, scale, bias, plan)


def check_exchange(exchange: str) -> None:
    """Refuse a way to bring texts to other ranks that there is not.

    Raises:
        MmbaseError: names the nearest.
    """
    if exchange not in EXCHANGES:
        raise MmbaseError(
            f"exchange must be one of {', '.join(EXCHANGES)}, not {exchange!r}{nearest(exchange, EXCHANGES)}"
        )


def _implementation(impl: str, features: Tensor, compute_dtype: torch.dtype | None) -> str:
    chosen = choose(impl, features, compute_dtype)
    if chosen == "reference":
        raise MmbaseError(
            "impl='reference' is for one process: use 'torch', 'triton' or 'auto' over ranks, or unset MMBASE_KERNELS"
        )
    check_kernel_dtype(features, chosen)
    return chosen


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
