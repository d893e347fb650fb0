"""What ranks tell one another before a loss, so that what does not go together is refused on all of them.

A rank that alone raised, or alone took another way, would leave the others waiting in a collective until it times out.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.losses.collectives import gather_rows
from mmbase.losses.shards import Shards
from mmbase_kernels.dispatch import DTYPES, check_features, check_matches

_TOLD = ("image_rows", "image_width", "text_rows", "text_width", "mistake", "dtype", "ids", "gradients")
"""What a rank tells the others, an integer each."""
_ALIKE = {
    "dtype": (*map(str, DTYPES), "another"),
    "ids": ("none", "given"),
    "gradients": ("none", "images", "texts"),
}
"""What has to be the same on all ranks, and words for its integers."""


def meet(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    compute_dtype: torch.dtype | None,
    group: dist.ProcessGroup | None,
    equal_rows: bool,
) -> Shards:
    """Rows of every rank, once all of them hold what goes together; every rank must call.

    The numbers travel over the group's CPU backend where it has one (``backend="cpu:gloo,cuda:nccl"``); over NCCL alone
    the host waits for the GPU. ``equal_rows`` asks nothing, takes every rank to hold as many as this one, and checks
    this rank alone.

    Raises:
        ValueError: this rank's mistake.
        MmbaseError: the ranks' together, or another rank's.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise MmbaseError("this process is not in the loss's process group: call the loss on the group's ranks alone")
    mistake = _mistake(image_features, text_features, image_ids, text_ids, compute_dtype)
    if equal_rows:
        if mistake is not None:
            raise mistake
        return Shards(group, rank, (len(image_features),) * world, (len(text_features),) * world)

    mine = torch.tensor([_card(image_features, text_features, image_ids, mistake)])
    if "cpu:" not in dist.get_backend_config(group):
        mine = mine.to(image_features.device)
    columns = gather_rows(mine, [1] * world, group).T.tolist()
    everyone = dict(zip(_TOLD, columns, strict=True))
    _check_sizes(everyone)
    shards = Shards(group, rank, tuple(everyone["image_rows"]), tuple(everyone["text_rows"]))
    if image_ids is None and shards.image_rows != shards.text_rows:
        raise MmbaseError(
            f"ranks hold {list(shards.image_rows)} images and {list(shards.text_rows)} texts: without ids image i of a "
            "rank matches its text i, so give each rank as many texts as images"
        )
    if mistake is not None:
        raise mistake
    if 1 in everyone["mistake"]:
        raise MmbaseError(f"rank {everyone['mistake'].index(1)} was given what it cannot use: see its own error")
    for name, words in _ALIKE.items():
        if len(set(everyone[name])) > 1:
            found = ", ".join(words[number] for number in everyone[name])
            raise MmbaseError(f"ranks differ in {name} (rank by rank: {found}): give all of them the same")
    return shards


def _card(
    image_features: Tensor, text_features: Tensor, image_ids: Tensor | None, mistake: ValueError | None
) -> list[int]:
    """What this rank tells, in the order of ``_TOLD``; sizes are -1 where there are no two matrices."""
    matrices = image_features.ndim == text_features.ndim == 2
    wants = [torch.is_grad_enabled() and features.requires_grad for features in (image_features, text_features)]
    return [
        *([*image_features.shape, *text_features.shape] if matrices else [-1] * 4),
        int(mistake is not None),
        DTYPES.index(image_features.dtype) if image_features.dtype in DTYPES else -1,
        int(image_ids is not None),
        2 if wants[1] else int(wants[0]),
    ]


def _check_sizes(everyone: dict[str, list[int]]) -> None:
    """Refuse ranks without rows and widths that differ."""
    for what in ("image", "text"):
        if 0 in (rows := everyone[f"{what}_rows"]):
            raise MmbaseError(
                f"rank {rows.index(0)} has no {what} features (rows per rank: {rows}): give every rank a sample or "
                "drop the last batch"
            )
    image_widths, text_widths = everyone["image_width"], everyone["text_width"]
    if len({*image_widths, *text_widths} - {-1}) > 1:
        raise MmbaseError(
            f"widths differ: images {image_widths} and texts {text_widths} on the ranks; project both to one width"
        )


def _mistake(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> ValueError | None:
    """What is wrong with this rank's input, to be raised when the others know of it."""
    try:
        check_features(image_features, text_features, compute_dtype)
        check_matches(image_features, text_features, image_ids, text_ids, None)
    except ValueError as error:
        return error
    return None
