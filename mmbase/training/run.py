"""A run from configuration to a loadable folder: prepare, train, keep the weights; alone or among ranks."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from mmbase.config import RunConfig, dump, first_difference
from mmbase.data.augment import Augment
from mmbase.data.image import PreprocessConfig
from mmbase.data.loading import open_stream
from mmbase.data.pictures import MemoryStream
from mmbase.data.shards import expand_shards, read_samples
from mmbase.data.stream import Loader
from mmbase.data.tokenizer import FileTokenizer, Tokenizer, train_tokenizer
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically
from mmbase.models.clip import CLIP
from mmbase.training.banner import banner, environment
from mmbase.training.curriculum import Curriculum
from mmbase.training.distributed import Ranks, open_ranks
from mmbase.training.evaluate import SharedModel
from mmbase.training.loop import train_loop
from mmbase.training.parallel_config import ParallelConfig
from mmbase.training.precision import choose_precision
from mmbase.training.spawn import count_devices, spawn
from mmbase.training.weights import save_weights

INDIFFERENT = {
    "": ("output", "device", "devices", "evaluation", "tracking"),
    "data": ("workers", "prefetch", "timeout", "cache", "max_bad_share"),
    "training": (
        *ParallelConfig.model_fields,
        "micro_batch",
        "checkpoints",
        "guard",
        "evaluate_every",
        "patience",
        "log_every",
    ),
}
"""Keys that a resume may change, by the section they stand in: weights do not follow from them, but for rounding."""

Ask = Callable[[RunConfig], Callable[[SharedModel], Mapping[str, float]]]
"""Makes, on each rank, what measures a model between steps; a function of an importable module."""


def train_run(config: RunConfig, console: Console, ask: Ask | None = None) -> Path:
    """Train as configured, or go on where the folder's run stopped; the run's folder.

    It holds config.yaml, environment.json, model.json, model.safetensors, metrics.jsonl and checkpoints/.

    Args:
        config: of the run; with ``devices`` above 1, as many processes are started here.
        console: where progress goes; ranks above 0 say nothing.
        ask: what ``training.evaluate_every`` measures.

    Raises:
        MmbaseError: a folder that belongs to another configuration or cannot be written, and what training raises.
        SystemExit: the run was asked to stop, and left a checkpoint.
    """
    count = count_devices(config.devices, config.device)
    if count == 1:
        return train_ranks(config, ask, console)
    return spawn(count, train_ranks, config, ask)


def train_ranks(config: RunConfig, ask: Ask | None = None, console: Console | None = None) -> Path:
    """One rank's part of :func:`train_run`, or all of it in one process."""
    started, folder = time.perf_counter(), Path(config.output)
    with open_ranks(config.device, timeout=max(1800.0, 3 * config.training.hang_seconds)) as ranks:
        console = (console or Console()) if ranks.is_first else Console(quiet=True)
        if ranks.is_first:
            prepare_folder(folder, config)
        ranks.barrier("the folder")
        if ranks.broadcast_object((folder / "model.safetensors").exists()):
            console.print(f"{folder} is trained already; delete it or set output= to train anew")
            return folder
        precision = choose_precision(config.training.precision, ranks.device)
        torch.manual_seed(config.seed)

        tokenizer, described = share_tokenizer(config, folder, ranks)
        model = build_model(config, tokenizer)
        curriculum = Curriculum(config.training.curriculum, model.config, config.training)
        stream = open_curriculum_stream(config, curriculum, tokenizer, folder, ranks)
        preprocess = config.preprocess.model_copy(update={"size": model.config.vision.image_hw})
        augment = Augment(config.augment, model.config.vision.image_hw, preprocess.mean, preprocess.std)
        if ranks.is_first:
            check_data(folder, stream)
            describe_model(folder, model, preprocess, described)
        try:
            banner(
                config,
                console,
                device=ranks.device,
                precision=precision,
                stream=stream,
                model=model,
                curriculum=curriculum,
            )
        except ValueError as error:  # MMBASE_KERNELS asks for what there is not
            raise MmbaseError(str(error)) from error
        measure = None
        if ask and config.training.evaluate_every:
            asked, shared = ask(config), SharedModel(model, preprocess, tokenizer, ranks, precision, folder.name)
            measure = lambda: asked(shared)  # noqa: E731
        with contextlib.closing(stream):
            weights, progress = train_loop(
                model,
                stream,
                config,
                curriculum=curriculum,
                augment=augment,
                ranks=ranks,
                precision=precision,
                folder=folder,
                console=console,
                measure=measure,
            )
        bad = sum((Counter(reasons) for reasons in ranks.gather_objects(stream.counts["reasons"])), Counter())
        if ranks.is_first:
            record = environment(ranks.device) | {
                "precision": f"{str(precision.dtype or torch.float32).removeprefix('torch.')} ({precision.reason})",
                "ranks": ranks.world_size,
                "training_seconds": round(progress.seconds, 1),
                "setup_seconds": round(time.perf_counter() - started - progress.seconds, 1),
                "samples": progress.samples,
                "bad_samples": dict(bad),
            }
            write_atomically(folder / "environment.json", json.dumps(record, indent=2))
            save_weights(weights, folder / "model.safetensors")
        ranks.barrier("the end of training", seconds=3600.0)
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


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what cannot change the weights."""
    kept = {name: value for name, value in values.items() if name not in INDIFFERENT[""]}
    for section in ("data", "training"):
        part = dict(values.get(section) or {})
        kept[section] = {name: value for name, value in part.items() if name not in INDIFFERENT[section]}
    return kept


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


def share_tokenizer(config: RunConfig, folder: Path, ranks: Ranks) -> tuple[Tokenizer, dict[str, Any]]:
    """The configured tokenizer, and how ``model.json`` describes it; a learned one is trained by rank 0 alone."""
    tokenizer, described = None, dict[str, Any]()
    if ranks.is_first:
        tokenizer = build_tokenizer(config, folder)
        described = tokenizer.save(folder)
    ranks.barrier("the tokenizer", seconds=3600.0)
    return tokenizer or build_tokenizer(config, folder), described


def describe_model(folder: Path, model: CLIP, preprocess: PreprocessConfig, tokenizer: dict[str, Any]) -> None:
    """Write ``model.json``, by which anybody loads the weights."""
    described = {
        "format": 1,
        "model": model.config.model_dump(mode="json"),
        "preprocess": preprocess.model_dump(mode="json"),
        "tokenizer": tokenizer,
    }
    write_atomically(folder / "model.json", json.dumps(described, indent=2))


def open_curriculum_stream(
    config: RunConfig, curriculum: Curriculum, tokenizer: Tokenizer, folder: Path, ranks: Ranks
) -> MemoryStream | Loader:
    """The training stream of this rank, with the weights of sources that the curriculum says."""
    data = config.data.model_copy(deep=True)
    for number, points in curriculum.source_weights().items():
        if number >= len(data.mixture):
            raise MmbaseError(f"curriculum: source={number}, but data.mixture has {len(data.mixture)} parts, from 0")
        data.mixture[number].weight = points
    return open_stream(
        data,
        tokenizer,
        batch_size=curriculum.loader_batch(ranks.world_size) // ranks.world_size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        total=curriculum.total,
        quarantine=folder / "quarantine.jsonl",
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
