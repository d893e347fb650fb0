"""Train, evaluate and use CLIP-style image-text base models.

>>> import mmbase
>>> model = mmbase.load("runs/emoji")
>>> model.classify("cat.png", ["cat", "dog"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbase.config import load_config as load_config
    from mmbase.errors import MmbaseError as MmbaseError
    from mmbase.model import ImageTextModel as ImageTextModel
    from mmbase.model import create as create
    from mmbase.model import load as load
    from mmbase.models.zoo import list_models as list_models
    from mmbase.pipeline import evaluate as evaluate
    from mmbase.pipeline import train as train

_WHERE = {
    "ImageTextModel": "mmbase.model",
    "MmbaseError": "mmbase.errors",
    "create": "mmbase.model",
    "evaluate": "mmbase.pipeline",
    "list_models": "mmbase.models.zoo",
    "load": "mmbase.model",
    "load_config": "mmbase.config",
    "train": "mmbase.pipeline",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), so that ``import mmbase`` loads no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'mmbase' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
