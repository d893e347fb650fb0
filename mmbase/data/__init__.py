"""Bytes to batches: shards, order, decoding, augmentation, tokenizers. Knows nothing of models.

>>> from mmbase.data import loader
>>> for batch in loader("shards/{00000..00099}.tar", batch_size=256, workers=4): ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbase.data.loading import loader as loader
    from mmbase.data.order import SampleOrder as SampleOrder
    from mmbase.data.stream import Loader as Loader

_WHERE = {
    "Loader": "mmbase.data.stream",
    "SampleOrder": "mmbase.data.order",
    "loader": "mmbase.data.loading",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562): most of what reads data needs no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'mmbase.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
