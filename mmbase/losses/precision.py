"""The dtype of the losses' matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from mmbase_kernels.choice import ENVIRONMENT, preferred
from mmbase_kernels.dispatch import choose


def product_dtype(features: Tensor) -> torch.dtype | None:
    """float16 for float32 features under 16-bit CUDA autocast, else None: the features' own.

    Features are unit vectors, which need no exponents beyond float16's: it keeps 11 bits of them where bfloat16 keeps
    8, at the same speed. Sums and gradients are float32 either way. On a CPU products stay float32.
    """
    device = features.device.type
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device).itemsize == 2
    return torch.float16 if device == "cuda" and narrow and features.dtype == torch.float32 else None


def describe_products(device: torch.device, autocast: torch.dtype | None) -> str:
    """How the losses compute on a device under that autocast dtype (None: off), in words for a start banner.

    Raises:
        ValueError: MMBASE_KERNELS asks for what there is not, or for ``triton`` where it cannot run.
    """
    narrow = device.type == "cuda" and autocast is not None and autocast.itemsize == 2
    dtype = torch.float16 if narrow else torch.float32
    implementation = choose("auto", torch.empty(0, device=device), dtype)
    name = {"triton": "Triton kernels", "torch": "PyTorch operations", "reference": "reference"}[implementation]
    products = "float64" if implementation == "reference" else str(dtype).removeprefix("torch.")
    why = f" ({ENVIRONMENT}={value})" if (value := preferred()) else ""
    return f"{name}, products in {products}{why}"


def common_dtype(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype; gradients keep each its own."""
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    return image_features.to(dtype), text_features.to(dtype)
