"""What evaluation asks of a model. Anything with these attributes can be evaluated; no base class, no torch.

Shapes: B images or texts, D width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class ImageTextModel(Protocol):
    """A model that puts images and texts into one space, where the dot product is the cosine similarity.

    Two further attributes are used where a model has them: ``device`` (named in the latency record), and
    ``preprocess(image)`` (then preprocessing is timed by itself).
    """

    @property
    def name(self) -> str:
        """What the model is called in tables and headings."""
        ...

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side, or (height, width), in pixels of the images the model sees after preprocessing."""
        ...

    @property
    def logit_scale(self) -> float:
        """Factor from cosine similarity to logit, already exponentiated (1/temperature)."""
        ...

    @property
    def logit_bias(self) -> float | None:
        """Offset added to the scaled similarity; None for a model trained without one (softmax loss)."""
        ...

    def encode_image(self, images: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        """Features [B, D] float32 of unit length, of paths, PIL images, arrays or tensors."""
        ...

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Features [B, D] float32 of unit length."""
        ...

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, for example ``{"image": ..., "text": ..., "total": ...}``."""
        ...
