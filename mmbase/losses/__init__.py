"""Features to loss: gathers across ranks and calls mmbase_kernels.

``ContrastiveLoss`` is what mmbase trains with; ``ClipLoss`` and ``SigLipLoss`` stand in for OpenCLIP's. Names are
imported when they are first used, since they import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbase.losses.contrastive import ContrastiveLoss
    from mmbase.losses.distributed import distributed_clip_loss, distributed_sigmoid_loss
    from mmbase.losses.openclip import ClipLoss, SigLipLoss
    from mmbase.losses.traffic import Traffic

__all__ = [
    "ClipLoss",
    "ContrastiveLoss",
    "SigLipLoss",
    "Traffic",
    "distributed_clip_loss",
    "distributed_sigmoid_loss",
]

_MODULES = {
    "ClipLoss": "openclip",
    "ContrastiveLoss": "contrastive",
    "SigLipLoss": "openclip",
    "Traffic": "traffic",
    "distributed_clip_loss": "distributed",
    "distributed_sigmoid_loss": "distributed",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
