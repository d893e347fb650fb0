"""How long encoding takes, in milliseconds, and how large the weights are, in megabytes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmbase.errors import MmbaseError
from mmbase.evaluation.protocol import ImageTextModel

_BYTES_PER_PARAMETER = 4  # float32, as checkpoints store them


def time_call(call: Callable[[], Any], repeats: int = 20, warmup: int = 3, budget_s: float = 10.0) -> dict[str, float]:
    """Wall time of ``call`` in milliseconds: median, 10th and 90th percentile, and how many calls were timed.

    The warm-up calls are not counted. Timing stops early, after at least three calls, once ``budget_s`` seconds are
    spent, so that a large model on a slow machine does not hold up the run.
    """
    if repeats < 1 or warmup < 0:
        raise MmbaseError(f"repeats is {repeats} and warmup {warmup}; time at least one call")
    for _ in range(warmup):
        call()
    milliseconds: list[float] = []
    begin = time.perf_counter()
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        milliseconds.append((end - start) * 1e3)
        if len(milliseconds) >= 3 and end - begin > budget_s:
            break
    p10, median, p90 = np.percentile(milliseconds, [10, 50, 90])
    return {"median_ms": float(median), "p10_ms": float(p10), "p90_ms": float(p90), "calls": len(milliseconds)}


def _threads() -> int:
    """Threads that torch computes with, or the CPU count where torch is not loaded."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else os.cpu_count() or 1


def measure_latency(
    model: ImageTextModel,
    images: Sequence[Any],
    texts: Sequence[str] = ("a photo of a cat",),
    batch_sizes: Sequence[int] = (1, 32),
    *,
    repeats: int = 20,
    warmup: int = 3,
    budget_s: float = 10.0,
) -> dict[str, Any]:
    """Time ``encode_image`` at each batch size, ``encode_text`` on one text, and preprocessing where it is exposed.

    ``encode_image`` and ``encode_text`` return numpy arrays, so the device has finished when they return. The image
    figures include decoding (of paths) and preprocessing.

    Args:
        model: see ``ImageTextModel``.
        images: at least one; repeated to fill the batches.
        texts: at least one; the first is timed alone.
        batch_sizes: images per call.
        repeats: timed calls per figure.
        warmup: calls before, not counted.
        budget_s: seconds after which a figure stops collecting calls.

    Returns:
        ``device``, ``threads``, ``image_size``, and under ``timings`` one record per name (``image_batch_1``,
        ``image_batch_32``, ``text_batch_1``, ``preprocess_1``): see ``time_call``, and ``per_item_ms``.

    Raises:
        MmbaseError: no image or no text, or a batch size below 1.
    """
    if not len(images) or not len(texts):
        raise MmbaseError(f"latency needs an image and a text, got {len(images)} and {len(texts)}; give one of each")
    if not batch_sizes or min(batch_sizes) < 1:
        raise MmbaseError(f"batch sizes are {list(batch_sizes)!r}; each must be at least 1")
    calls: dict[str, tuple[int, Callable[[], Any]]] = {}
    for size in batch_sizes:
        batch = [images[index % len(images)] for index in range(size)]
        calls[f"image_batch_{size}"] = (size, lambda batch=batch, size=size: model.encode_image(batch, batch_size=size))
    calls["text_batch_1"] = (1, lambda: model.encode_text([texts[0]], batch_size=1))
    preprocess = getattr(model, "preprocess", None)
    if callable(preprocess):
        calls["preprocess_1"] = (1, lambda: preprocess(images[0]))
    timings: dict[str, dict[str, float]] = {}
    for name, (size, call) in calls.items():
        timings[name] = time_call(call, repeats, warmup, budget_s)
        timings[name]["per_item_ms"] = timings[name]["median_ms"] / size
    image_size = model.image_size
    return {
        "device": str(getattr(model, "device", "cpu")),
        "threads": _threads(),
        "image_size": image_size if isinstance(image_size, int) else list(image_size),
        "timings": timings,
    }


def model_size(counts: Mapping[str, int]) -> dict[str, Any]:
    """Parameters by part, their ``total``, and ``megabytes`` (10^6 bytes) of them in float32.

    ``total`` is taken from ``counts`` where it is there (parts may share weights), else it is the sum of the parts.
    """
    parts = {name: int(count) for name, count in counts.items() if name != "total"}
    total = int(counts["total"]) if "total" in counts else sum(parts.values())
    return {"parts": parts, "total": total, "megabytes": total * _BYTES_PER_PARAMETER / 1e6}
