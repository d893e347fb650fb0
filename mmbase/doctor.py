"""What a machine can do, found by looking; the findings of ``mmbase doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

PACKAGES = ("torch", "numpy", "pillow", "einops", "webdataset", "open-clip-torch", "safetensors", "tokenizers")
FREE_BYTES = 2 << 30


class Finding(NamedTuple):
    """One line of the examination."""

    good: bool
    subject: str
    text: str


def examine() -> Iterator[Finding]:
    """Findings, one at a time; a bad one says what to do."""
    python = platform.python_version()
    yield Finding(
        sys.version_info >= (3, 11),
        "python",
        f"{python}" + ("" if sys.version_info >= (3, 11) else "; use 3.11 or newer"),
    )
    for name in PACKAGES:
        try:
            yield Finding(True, name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(False, name, f"not installed; pip install {name}")
    yield from _devices()
    yield from _data()
    free = shutil.disk_usage(".").free
    yield Finding(
        free >= FREE_BYTES, "disk", f"{free / 1e9:.0f} GB free here" + ("" if free >= FREE_BYTES else "; free 2 GB")
    )
    yield Finding(
        os.access(".", os.W_OK), "folder", "writable" if os.access(".", os.W_OK) else "not writable; use another one"
    )


def _devices() -> Iterator[Finding]:
    try:
        import torch

        from mmbase.training.precision import choose_device, choose_precision
        from mmbase_kernels.banner import describe
    except (ImportError, OSError) as error:
        yield Finding(False, "torch import", f"{error}; reinstall torch")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(True, f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    name = str(precision.dtype or torch.float32).removeprefix("torch.")
    yield Finding(True, "device", f"{device}, {torch.get_num_threads()} threads, {name}: {precision.reason}")
    try:
        for line in describe(device, precision.dtype or torch.float32):
            yield Finding(True, "kernels", line)
    except ValueError as error:
        yield Finding(False, "kernels", str(error))
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    works = bool((product == 64).all())
    yield Finding(works, "matrix product", "correct" if works else f"wrong on {device}; check the driver")


def _data() -> Iterator[Finding]:
    from mmbase.config import recipes
    from mmbase.data.shards import declared_sizes, expand_shards
    from mmbase.errors import MmbaseError
    from mmbase.models.zoo import list_models

    try:
        shards = expand_shards("emoji:")
        pairs = sum(declared_sizes(shards).values())
        yield Finding(bool(pairs), "embedded data", f"{len(shards)} shards, {pairs} pairs")
        yield Finding(bool(recipes()), "recipes", ", ".join(recipes()) or "none found; reinstall mmbase")
        entries = list_models()
        yield Finding(True, "OpenCLIP configs", f"{len(entries)}, {sum(e.route == 'native' for e in entries)} native")
    except MmbaseError as error:
        yield Finding(False, "installation", f"{error}; reinstall mmbase")
