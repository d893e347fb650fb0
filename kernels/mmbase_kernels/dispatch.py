"""Which implementation runs, and the checks that every loss shares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "reference")
WORKSPACE_BYTES = 64 << 20
"""Upper bound of one float32 chunk of logits; a few such chunks exist at a time."""


def choose(impl: str) -> str:
    """The implementation for ``impl``; ``auto`` takes the chunked PyTorch one.

    Raises:
        ValueError: an unknown name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")
    return "torch" if impl == "auto" else impl


def chunk_rows(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover ``rows`` in order, each of at most WORKSPACE_BYTES of float32 logits (one row at least)."""
    step = max(1, WORKSPACE_BYTES // (4 * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def inverse_matches(ids: Tensor, among: Tensor) -> Tensor:
    """One over the number of entries of ``among`` that equal each id, float32; 1 where there is none."""
    values, counts = torch.unique(among, return_counts=True)
    place = torch.searchsorted(values, ids).clamp(max=len(values) - 1)
    count = torch.where(values[place] == ids, counts[place], 1)
    return count.reciprocal().float()


def check_pair(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
) -> None:
    """Refuse features, scalars or ids that do not go together.

    Raises:
        ValueError: names the shapes, dtypes or devices at odds.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"{name} must be [rows, width] with no empty side, not {list(features.shape)}")
        if not features.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {features.dtype}")
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"widths differ: images {image_features.shape[1]}, texts {text_features.shape[1]}")
    if image_features.dtype != text_features.dtype:
        raise ValueError(f"dtypes differ: images {image_features.dtype}, texts {text_features.dtype}")
    if image_features.device != text_features.device:
        raise ValueError(f"devices differ: images on {image_features.device}, texts on {text_features.device}")
    for name, scalar in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(f"{name} must hold one number, not {list(scalar.shape)}")
    if (image_ids is None) != (text_ids is None):
        raise ValueError("give image_ids and text_ids, or neither")
    if image_ids is None or text_ids is None:
        if len(image_features) != len(text_features):
            raise ValueError(
                f"{len(image_features)} images and {len(text_features)} texts: without ids row i matches column i, "
                "so their numbers must be equal"
            )
    elif image_ids.shape != image_features.shape[:1] or text_ids.shape != text_features.shape[:1]:
        raise ValueError(
            f"ids must be one per row: image_ids {list(image_ids.shape)} for {len(image_features)} images, "
            f"text_ids {list(text_ids.shape)} for {len(text_features)} texts"
        )
