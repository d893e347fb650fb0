"""Which implementation runs, and the checks that every loss shares."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmbase_kernels.tuning import triton_version

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON = triton_version()
SM_100_TRITON = (3, 9)
"""The first Triton that compiles every kernel for sm_100."""
STASH_BYTES = 256 << 20
"""Default budget for logits kept between the passes of the softmax loss: 8,192 x 8,192 of them in float32; in 16 bits
the 1,024 rows of a rank against 131,072 columns."""


def choose(impl: str, features: Tensor, compute_dtype: torch.dtype | None = None) -> str:
    """The implementation for ``impl``; ``auto`` takes Triton for 16-bit products on CUDA and PyTorch for all else.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")
    if impl == "auto":
        narrow = (compute_dtype or features.dtype) in DTYPES[1:]
        return "triton" if narrow and features.device.type == "cuda" and not hindrance(features.device) else "torch"
    if impl == "triton" and (reason := hindrance(features.device)):
        raise ValueError(f"impl='triton' cannot run: {reason}; use impl='torch' or 'auto'")
    return impl


def hindrance(device: torch.device) -> str:
    """Why the Triton kernels cannot run on a device; empty if they can. Compiled graphs can ask too."""
    if not TRITON:
        return "triton is not installed"
    if device.type != "cuda":
        return "" if interpreted() else f"it needs a CUDA device, and the tensors are on {device}"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName
        return "" if name.startswith("gfx942") else f"of AMD's devices it knows gfx942, not {name}"
    if properties.major < 8:
        return f"it needs compute capability 8.0, and {device} has {properties.major}.{properties.minor}"
    if properties.major == 10 and SM_100_TRITON > TRITON:
        return "before triton 3.9 not all kernels compile for sm_100; install a newer one"
    return ""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def as_scalar(name: str, value: Tensor | float, device: torch.device) -> Tensor:
    """A number or a tensor of one element as a float32 scalar on ``device``; gradients flow through.

    Raises:
        ValueError: more than one element, or not a real number.
    """
    try:
        scalar = torch.as_tensor(value)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} must be a number or a tensor of one, not {value!r}") from error
    if scalar.numel() != 1:
        raise ValueError(f"{name} must hold one number, not {list(scalar.shape)}")
    if scalar.is_complex():
        raise ValueError(f"{name} must be real, not {scalar.dtype}")
    return scalar.reshape(()).to(device=device, dtype=torch.promote_types(scalar.dtype, torch.float32))


def check_features(image_features: Tensor, text_features: Tensor, compute_dtype: torch.dtype | None) -> None:
    """Refuse features that do not go together.

    Raises:
        ValueError: names the shapes, dtypes or devices at odds.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(features, Tensor) or features.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, not {getattr(features, 'layout', type(features))}")
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"{name} must be [rows, width] with no empty side, not {list(features.shape)}")
        if not features.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {features.dtype}")
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"widths differ: images {image_features.shape[1]}, texts {text_features.shape[1]}")
    if image_features.dtype != text_features.dtype:
        raise ValueError(
            f"dtypes differ: images {image_features.dtype}, texts {text_features.dtype}; convert one of them"
        )
    if image_features.device != text_features.device:
        raise ValueError(f"devices differ: images on {image_features.device}, texts on {text_features.device}")
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise ValueError(f"compute_dtype must be float32, float16 or bfloat16, not {compute_dtype}")


def check_kernel_dtype(features: Tensor, impl: str) -> None:
    """Refuse dtypes that only the reference takes.

    Raises:
        ValueError: names the dtype.
    """
    if features.dtype not in DTYPES:
        raise ValueError(
            f"impl={impl!r} takes float32, float16 or bfloat16 features, not {features.dtype}; impl='reference' does"
        )


def refuse_forward_mode(what: str, *tensors: Tensor) -> None:
    """Operators of ``torch.library`` drop the tangents of forward-mode derivatives: the result would be 0 silently.

    Raises:
        RuntimeError: one of the tensors carries a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{what} has no forward-mode derivative (jvp); impl='reference' has one")


def check_matches(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    offset: int | None,
) -> None:
    """Refuse ids or an offset that do not go with the features.

    Raises:
        ValueError: names what is wrong.
    """
    rows, columns = len(image_features), len(text_features)
    if (image_ids is None) != (text_ids is None):
        raise ValueError("give image_ids and text_ids, or neither")
    if image_ids is None or text_ids is None:
        if offset is None and rows != columns:
            raise ValueError(
                f"{rows} images and {columns} texts: without ids or an offset row i matches column i, so their numbers "
                "must be equal"
            )
        return
    if offset is not None:
        raise ValueError(f"ids say which pairs match: offset must be None, not {offset}")
    if image_ids.shape != (rows,) or text_ids.shape != (columns,):
        raise ValueError(
            f"ids must be one per row: image_ids {list(image_ids.shape)} for {rows} images, "
            f"text_ids {list(text_ids.shape)} for {columns} texts"
        )
    for name, ids in (("image_ids", image_ids), ("text_ids", text_ids)):
        if ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"{name} must be integers, not {ids.dtype}")
        if ids.device != image_features.device:
            raise ValueError(f"devices differ: {name} on {ids.device}, features on {image_features.device}")


def match_mask(
    rows: int, columns: int, image_ids: Tensor | None, text_ids: Tensor | None, offset: int, device: torch.device
) -> Tensor:
    """Boolean ``[rows, columns]`` of the matches, for the references."""
    if image_ids is not None and text_ids is not None:
        return image_ids[:, None] == text_ids
    return torch.arange(rows, device=device)[:, None] + offset == torch.arange(columns, device=device)
