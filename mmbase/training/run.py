"""A run from configuration to a loadable folder: prepare, train, keep the weights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from mmbase.config import RunConfig, dump, first_difference
from mmbase.data.augment import Augment
from mmbase.data.loading import open_stream
from mmbase.data.pictures import MemoryStream
from mmbase.data.shards import expand_shards, read_samples
from mmbase.data.stream import Loader
from mmbase.data.tokenizer import FileTokenizer, Tokenizer, train_tokenizer
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically
from mmbase.losses.precision import describe_products
from mmbase.models.clip import CLIP
from mmbase.training.checkpoint import save_weights
from mmbase.training.loop import train_loop
from mmbase.training.precision import choose_device, choose_precision
from mmbase_kernels.banner import describe as describe_kernels

INDIFFERENT = ("workers", "prefetch", "timeout", "cache", "max_bad_share")
"""Keys of the data that a resume may change."""

PACKAGES = ("mmbase", "torch", "triton", "numpy", "pillow", "open-clip-torch", "webdataset", "tokenizers")


def train_run(config: RunConfig, console: Console) -> Path:
    """Train as configured, or go on where the folder's run stopped; the run's folder.

    It holds config.yaml, environment.json, model.json, model.safetensors, metrics.jsonl and checkpoints/.

    Raises:
        MmbaseError: a folder that belongs to another configuration or cannot be written, and what training raises.
    """
    started = time.perf_counter()
    folder = Path(config.output)
    prepare_folder(folder, config)
    if (folder / "model.safetensors").exists():
        console.print(f"{folder} is trained already; delete it or set output= to train anew")
        return folder
    device = choose_device(config.device)
    precision = choose_precision(config.training.precision, device)
    torch.manual_seed(config.seed)

    tokenizer = build_tokenizer(config, folder)
    stream = open_stream(
        config.data,
        tokenizer,
        batch_size=config.training.batch_size,
        seed=config.seed,
        total=config.training.steps * config.training.batch_size,
        quarantine=folder / "quarantine.jsonl",
    )
    check_data(folder, stream)
    model = build_model(config, tokenizer)
    size = model.config.vision.image_hw
    augment = Augment(config.augment, size, config.preprocess.mean, config.preprocess.std)
    described = {
        "format": 1,
        "model": model.config.model_dump(mode="json"),
        "preprocess": config.preprocess.model_dump(mode="json") | {"size": list(size)},
        "tokenizer": tokenizer.save(folder),
    }
    write_atomically(folder / "model.json", json.dumps(described, indent=2))
    try:
        banner(config, console, device=str(device), precision=precision, stream=stream, model=model)
    except ValueError as error:  # MMBASE_KERNELS asks for what there is not
        raise MmbaseError(str(error)) from error
    with contextlib.closing(stream):
        weights, progress = train_loop(
            model,
            stream,
            config,
            augment=augment,
            device=device,
            precision=precision,
            folder=folder,
            console=console,
        )
    record = environment(device) | {
        "precision": f"{str(precision.dtype or torch.float32).removeprefix('torch.')} ({precision.reason})",
        "training_seconds": round(progress.seconds, 1),
        "setup_seconds": round(time.perf_counter() - started - progress.seconds, 1),
        "samples": progress.samples,
        "bad_samples": stream.counts["reasons"],
    }
    write_atomically(folder / "environment.json", json.dumps(record, indent=2))
    save_weights(weights, folder / "model.safetensors")
    return folder


def prepare_folder(folder: Path, config: RunConfig) -> None:
    """Make the run's folder, or check that it belongs to the same configuration.

    Raises:
        MmbaseError: it cannot be made or written, holds another run, or other files.
    """
    resolved = folder / "config.yaml"
    if resolved.exists():
        old = yaml.safe_load(resolved.read_text(encoding="utf-8"))
        key = first_difference(_decisive(old), _decisive(config.model_dump(mode="json")))
        if key:
            raise MmbaseError(
                f"{str(folder)!r} holds a run with another {key}; choose another output=, or delete the folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MmbaseError(f"{str(folder)!r} exists and is no run of mmbase; choose another output=")
    write_atomically(resolved, dump(config))


def _decisive(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what cannot change the weights."""
    kept = {name: value for name, value in values.items() if name not in ("output", "device", "evaluation")}
    data = {name: value for name, value in dict(values.get("data", {})).items() if name not in INDIFFERENT}
    return kept | {"data": data}


def check_data(folder: Path, stream: MemoryStream | Loader) -> None:
    """Note which samples the positions of this run stand for, or check that they still do.

    Raises:
        MmbaseError: shards or their sizes are not those the run began with.
    """
    if not isinstance(stream, Loader) or not stream.fingerprint:
        return
    path, now = folder / "data.json", {"fingerprint": stream.fingerprint, "samples": stream.samples}
    if not path.exists():
        write_atomically(path, json.dumps(now))
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    if then["fingerprint"] != stream.fingerprint:
        raise MmbaseError(
            f"the shards are not those this run began with ({then['samples']:,} samples then, {stream.samples:,} now); "
            f"a resume would show other data; restore them, choose another output=, or delete {str(path)!r} to go on"
        )


def build_tokenizer(config: RunConfig, folder: Path) -> Tokenizer:
    """The configured tokenizer; ``learned`` is trained on the training captions once and kept in the run's folder."""
    options = config.tokenizer.model_dump()
    if options["kind"] != "learned":
        return Tokenizer.from_config(options)
    stored = folder / "tokenizer.json"
    context_length = int(options.get("context_length", 32))
    if stored.exists():
        return FileTokenizer(stored, context_length=context_length)
    held_out: set[str] = set()
    samples = list(read_samples(expand_shards(config.data.shard_specs()), config.data.caption_field))
    if holdout := config.data.holdout:
        held_out = holdout.values(s.fields for s in samples)
        samples = [s for s in samples if not holdout.covers(s.fields, held_out)]
    texts: list[str] = []
    for sample in samples:
        texts.append(str(sample.fields[config.data.caption_field]))
        for name in options.get("fields", []):
            value = sample.fields.get(name, [])
            texts.extend(map(str, value) if isinstance(value, list) else [str(value)])
    return train_tokenizer(texts, int(options.get("vocab_size", 2000)), context_length)


def build_model(config: RunConfig, tokenizer: Tokenizer) -> CLIP:
    """The configured towers; a text tower that names no vocabulary takes the tokenizer's."""
    resolved = config.model.resolve()
    given = config.model.text
    changes: dict[str, Any] = {}
    if config.model.name is None:
        changes = {
            "vocab_size": given.get("vocab_size", tokenizer.vocab_size),
            "context_length": given.get("context_length", tokenizer.context_length),
        }
        if tokenizer.pad_id is not None:
            changes["pad_id"] = given.get("pad_id", tokenizer.pad_id)
    text = resolved.text.model_copy(update=changes)
    if tokenizer.vocab_size > text.vocab_size:
        raise MmbaseError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.text.vocab_size={text.vocab_size}; raise the latter"
        )
    model = CLIP(resolved.model_copy(update={"text": text}))
    if config.model.pretrained:
        from mmbase.models.weights import load_weights

        source, _ = load_weights(config.model.name or config.model.pretrained, config.model.pretrained)
        model.load_state_dict(source.state_dict())
    return model


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
    config: RunConfig, console: Console, *, device: str, precision: Any, stream: MemoryStream | Loader, model: CLIP
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
    console.print(
        f"  training   {settings.steps} steps of {settings.batch_size} pairs, {settings.steps * settings.batch_size:,} "
        f"presentations"
    )
    for line in describe_kernels(torch.device(device), precision.dtype or torch.float32):
        console.print(f"  kernels    {line}")
    console.print(f"  loss       {settings.loss}: {describe_products(torch.device(device), precision.dtype)}")
