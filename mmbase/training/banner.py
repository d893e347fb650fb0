"""What a run says of itself: what was chosen and why, and on what machine with which versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmbase.config import RunConfig
from mmbase.data.pictures import MemoryStream
from mmbase.data.stream import Loader
from mmbase.losses.precision import describe_products
from mmbase.models.clip import CLIP
from mmbase.training.curriculum import Curriculum
from mmbase.training.precision import Precision
from mmbase_kernels.banner import describe as describe_kernels

PACKAGES = ("mmbase", "torch", "triton", "numpy", "pillow", "open-clip-torch", "webdataset", "tokenizers")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, so that a run can be understood later."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    processor = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the checkout that mmbase runs from, or None where it was installed from a wheel."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def banner(
    config: RunConfig,
    console: Console,
    *,
    device: torch.device,
    precision: Precision,
    stream: MemoryStream | Loader,
    model: CLIP,
    curriculum: Curriculum,
) -> None:
    """Say what was chosen, and why."""
    image = sum(p.numel() for p in model.visual.parameters()) / 1e6
    text = sum(p.numel() for p in model.text.parameters()) / 1e6
    dtype = str(precision.dtype or torch.float32).removeprefix("torch.")
    settings = config.training
    console.print(f"[bold]mmbase[/] {config.output}")
    console.print(f"  device     {device}, {torch.get_num_threads()} threads, {dtype}: {precision.reason}")
    console.print(
        f"  model      image tower {image:.1f} M, text tower {text:.1f} M parameters, {model.config.embed_dim}-d"
    )
    for number, line in enumerate(stream.describe()):
        console.print(f"  {'' if number else 'data':<10} {line}", soft_wrap=True, highlight=False)
    console.print(
        f"  {'':<10} pictures of {config.data.source_size} px to {model.config.vision.image_size} px", highlight=False
    )
    micro = f", {settings.micro_batch} at a time" if settings.micro_batch else ""
    console.print(
        f"  training   {curriculum.step_count()} steps of {settings.batch_size} pairs{micro}, {curriculum.total:,} "
        "presentations"
    )
    for line in curriculum.describe():
        console.print(f"  {'':<10} {line}", soft_wrap=True, highlight=False)
    for line in describe_kernels(device, precision.dtype or torch.float32):
        console.print(f"  kernels    {line}")
    console.print(f"  loss       {settings.loss}: {describe_products(device, precision.dtype)}")
