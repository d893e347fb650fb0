"""Which implementation runs, and the checks that operators share."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmbase_kernels.choice import ENVIRONMENT, asked, measured_faster
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
    """The loss's implementation for ``impl``; ``auto`` takes what MMBASE_KERNELS asks for, else Triton for 16-bit
    products on CUDA and PyTorch for all else.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot run.
    """
    chosen, words = asked(impl, IMPLEMENTATIONS)
    if chosen == "auto":
        narrow = (compute_dtype or features.dtype) in DTYPES[1:]
        return "triton" if narrow and features.device.type == "cuda" and not hindrance(features.device) else "torch"
    if chosen == "triton" and (reason := hindrance(features.device)):
        raise ValueError(f"{words} cannot run: {reason}; use {_instead(words, 'torch')}")
    return chosen


def choose_measured(
    operator: str,
    impl: str,
    x: Tensor,
    *,
    size: int,
    case: str = "",
    obstacle: str = "",
    dtype: torch.dtype | None = None,
    width: int | None = None,
    names: Sequence[str] = IMPLEMENTATIONS,
) -> str:
    """An operator's implementation for ``impl``; ``auto`` takes what MMBASE_KERNELS asks for, else Triton on CUDA where
    the table of measurements says so.

    Args:
        operator: one of :data:`mmbase_kernels.choice.OPERATORS`.
        impl: the caller's argument.
        x: whose device, dtype and last axis are looked up.
        size: tokens or rows, as the field of :class:`mmbase_kernels.choice.Win`.
        case: as the field of the same name.
        obstacle: why the Triton kernels do not take this call, such as "takes up to 9 rows, not 12"; empty if they do.
        dtype: instead of that of ``x``, where ``x`` is what the operator's input is yet made of.
        width: instead of the last axis of ``x``, likewise.
        names: ``auto``, ``triton``, what PyTorch's is called, ``reference``.

    Returns:
        One of ``names``, never ``auto``.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot run.
    """
    chosen, words = asked(impl, names)
    plain = names[2]
    if chosen not in ("auto", "triton"):
        return chosen
    dtype, width = dtype or x.dtype, x.shape[-1] if width is None else width
    if dtype not in DTYPES:
        obstacle = f"takes float32, float16 or bfloat16, not {dtype}"
    if chosen == "auto":
        fits = x.device.type == "cuda" and not obstacle
        wins = fits and measured_faster(operator, x.device, dtype, width=width, size=size, case=case)
        return "triton" if wins and not hindrance(x.device) else plain
    if reason := hindrance(x.device):
        raise ValueError(f"{words} cannot run: {reason}; use {_instead(words, plain)}")
    if obstacle:
        raise ValueError(f"{words} {obstacle}: use {_instead(words, plain)}")
    return chosen


def _instead(words: str, plain: str) -> str:
    """What a message advises in place of ``triton``."""
    return f"impl={plain!r} or 'auto'" if words.startswith("impl") else f"{ENVIRONMENT}=torch or unset it"


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
