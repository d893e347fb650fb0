"""Making a loader: from a few arguments (:func:`loader`), or from a run's configuration (:func:`open_stream`)."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from mmbase.data.cache_config import CacheConfig
from mmbase.data.captions import CaptionSampler, CaptionTemplate
from mmbase.data.collate import Collator
from mmbase.data.config import DataConfig
from mmbase.data.decode import describe_decoders
from mmbase.data.filters import FilterConfig, HeldOut, explain_removed, parse_filter, select
from mmbase.data.image import PreprocessConfig
from mmbase.data.mixture import Weight
from mmbase.data.pictures import MemoryStream, load_pictures
from mmbase.data.prepare import Preparation, Showing
from mmbase.data.quarantine import Quarantine
from mmbase.data.samples import SampleFault
from mmbase.data.shards import declared_sizes, expand_shards, read_samples
from mmbase.data.sources import Sources, open_sources
from mmbase.data.stream import Loader
from mmbase.data.streamed import StreamedPreparation
from mmbase.data.tokenizer import load_tokenizer
from mmbase.data.tokenizer_base import Tokenizer
from mmbase.errors import MmbaseError, nearest

Filter = FilterConfig | str | dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


def loader(
    shards: str | Sequence[str],
    *,
    image_size: int | tuple[int, int] = 224,
    tokenizer: Tokenizer | dict[str, Any] | str = "ViT-B-32",
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    train: bool = True,
    window: int | None = None,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    crop_ratio: tuple[float, float] | None = (3 / 4, 4 / 3),
    decode: Literal["fast", "exact"] = "fast",
    alpha: Literal["keep", "drop", "white", "black"] = "drop",
    exif: bool = False,
    captions: Sequence[CaptionTemplate | dict[str, Any] | str] = ("{caption}",),
    caption_field: str = "caption",
    weights: Sequence[Weight] | None = None,
    filters: Sequence[Filter] = (),
    errors: Literal["replace", "raise"] = "replace",
    max_bad_share: float = 0.1,
    quarantine: str | Path | None = None,
    cache: CacheConfig | dict[str, Any] | None = None,
    sizes: str | Path | dict[str, int] | None = None,
    shuffle_buffer: int = 5000,
    prefetch: int = 2,
    timeout: float = 300.0,
    preprocess: PreprocessConfig | None = None,
) -> Loader:
    """Batches of any WebDataset, without end.

    A batch is ``{"image": uint8 [B, C, H, W], "text": int64 [B, T], "key": list[str], ...}``.

    The sequence of global batches is a function of ``shards``, ``seed``, ``window`` and the global batch size alone:
    the same for any number of ranks and workers, and after a resume with ``start=loader.position``. Crops and wordings
    follow from (seed, epoch, sample). Every sample comes once per epoch.

    Args:
        shards: tars, folders, brace patterns, URLs; see :func:`mmbase.data.shards.expand_shards`. With ``weights``, one
            specification per source.
        image_size: side of the square pictures, or (H, W), in pixels.
        tokenizer: an OpenCLIP model's name, or whatever :func:`mmbase.data.tokenizer.load_tokenizer` takes.
        batch_size: samples per batch and rank.
        workers: processes that read and decode; 0: the calling one.
        seed: of order, crops and wordings.
        rank: of this process.
        world_size: processes that share the global batches.
        start: samples of the global order to pass over: ``position`` of an earlier loader.
        train: False: in order, the evaluation transform, one epoch, the last batch short, bad samples left out.
        window: shards whose samples are shuffled together; None: 16 to 256, fewer the larger they are.
        crop_scale: share of the picture's area in the random crop.
        crop_ratio: width over height of the crop, as torchvision's ``RandomResizedCrop``; None: that of the result.
        decode: ``"exact"`` decodes JPEGs in full and resizes with Pillow, several times slower.
        alpha: transparency dropped as OpenCLIP does, put on white or black, or kept as a fourth channel of batches.
        exif: turn pictures as their camera noted; OpenCLIP does not.
        captions: wordings with weights: templates, or ``{"field": "recaption", "weight": 0.7}``.
        caption_field: JSON field that holds the caption where there is no ``txt`` member.
        weights: share of each source, constant or points (position, weight).
        filters: requirements on fields, such as ``"similarity>=0.28"``.
        errors: what a bad sample does: gives way to the next good one, or stops.
        max_bad_share: share of bad samples, once 1000 were seen, above which loading stops.
        quarantine: file that bad samples are written to; ranks above 0 put their number into its name.
        cache: where and how shards are kept that are not plain local tars.
        sizes: samples of each shard by its name, or a file of that, for shards that no ``sizes.json`` lies beside.
        shuffle_buffer: samples a shuffle holds where sizes cannot be had and shards are streamed.
        prefetch: batches that workers prepare ahead.
        timeout: seconds a read waits for its shard, and without progress after which a worker counts as stuck.
        preprocess: the evaluation transform of ``train=False``; None: OpenCLIP's for ``image_size``.

    Raises:
        MmbaseError: shards that do not exist, an argument out of range; while iterating, see :class:`Loader`.
    """
    size = _size(image_size)
    _check(seed, crop_scale, crop_ratio, decode=decode, alpha=alpha)
    sources = open_sources(
        list(shards) if weights is not None and not isinstance(shards, str | Path) else [shards],
        weights,
        seed=int(seed),
        window=window,
        shuffle=train,
        cache=None if cache is None else _validated(CacheConfig, cache, "cache"),
        sizes=sizes,
        timeout=timeout,
        selection=select([_filter(one) for one in filters]),
    )
    found = _tokenizer(tokenizer)
    evaluation = preprocess or PreprocessConfig(size=size)
    showing = Showing(
        CaptionSampler([_template(one) for one in captions]),
        Collator(found),
        size if train else evaluation.height_width,
        caption_field=caption_field,
        crop_scale=crop_scale,
        crop_ratio=crop_ratio,
        alpha=alpha,
        exact=decode == "exact",
        exif=exif,
        evaluation=None if train else evaluation,
    )
    return _loader(
        sources,
        showing,
        seed=int(seed),
        errors=errors,
        max_bad_share=max_bad_share,
        quarantine=quarantine,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start=start,
        workers=workers,
        prefetch=prefetch,
        timeout=timeout,
        shuffle_buffer=shuffle_buffer,
    )


def open_stream(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    total: int | None = None,
    quarantine: str | Path | None = None,
) -> MemoryStream | Loader:
    """The training stream of a configuration, from the sample ``start`` on.

    Args:
        config: what is trained on.
        tokenizer: text to ids.
        batch_size: per rank.
        seed: of order, crops and wordings.
        start: samples consumed before.
        rank: of this process.
        world_size: processes.
        total: samples of the whole training, over which weights of a mixture change.
        quarantine: file that bad samples are written to.

    Raises:
        MmbaseError: shards that are missing or unreadable, a batch larger than the data.
    """
    specs = [part.shards for part in config.mixture] or [config.shards]
    in_memory = config.memory == "always" or (config.memory == "auto" and _fits_memory(config))
    if config.sampling == "identities" and (not in_memory or config.identity is None):
        raise MmbaseError("data.sampling=identities needs data.identity and a dataset in memory (data.memory=always)")
    held_out = None
    faults = list[SampleFault]()
    on_fault = faults.append if config.errors == "replace" else None
    # a generator: nothing is opened where nobody asks
    known = read_samples(
        expand_shards(config.shard_specs()), config.caption_field, cache=config.cache, on_fault=on_fault
    )
    samples = list(known) if in_memory else []
    if config.holdout:
        known = samples or known
        held_out = HeldOut(config.holdout.field, config.holdout.values(sample.fields for sample in known))
    selection = select(config.filters, held_out)
    collator = Collator(tokenizer, config.identity, config.keep_orientation)
    captions = CaptionSampler(config.captions)
    if in_memory:
        whys = [None if selection is None else selection.reason(sample.fields) for sample in samples]
        kept = [sample for sample, why in zip(samples, whys, strict=True) if why is None]
        if samples and not kept:  # says which filter left nothing
            names = {name for sample in samples for name in sample.fields}
            explain_removed(Counter(why for why in whys if why is not None), 0, names)
        pictures = load_pictures(kept, config.source_size, config.errors)
        pictures.skipped[:0] = map(str, faults)
        group_by = config.identity if config.sampling == "identities" else None
        return MemoryStream(
            pictures,
            captions,
            collator,
            batch_size=batch_size,
            seed=seed,
            start=start,
            rank=rank,
            world_size=world_size,
            group_by=group_by,
        )
    sources = open_sources(
        specs,
        _weights(config, total) if config.mixture else None,
        seed=seed,
        window=config.window,
        shuffle=True,
        cache=config.cache,
        sizes=config.sizes,
        timeout=config.timeout,
        selection=selection,
    )
    showing = Showing(
        captions,
        collator,
        (config.source_size, config.source_size),
        caption_field=config.caption_field,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        alpha="keep",
        exact=config.decode == "exact",
        exif=config.exif,
    )
    return _loader(
        sources,
        showing,
        seed=seed,
        errors=config.errors,
        max_bad_share=config.max_bad_share,
        quarantine=quarantine,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start=start,
        workers=config.workers,
        prefetch=config.prefetch,
        timeout=config.timeout,
        shuffle_buffer=config.shuffle_buffer,
    )


def _fits_memory(config: DataConfig) -> bool:
    if config.mixture:
        return False
    shards = expand_shards(config.shards)
    sizes = declared_sizes(shards)
    return len(sizes) == len(shards) and sum(sizes.values()) * 4 * config.source_size**2 <= config.memory_bytes


def _weights(config: DataConfig, total: int | None) -> list[Weight]:
    weights: list[Weight] = []
    for mixed in config.mixture:
        if isinstance(mixed.weight, list) and total is None:
            raise MmbaseError("weights of data.mixture that change need the length of the training; use numbers")
        given = mixed.weight
        weights.append([(place * (total or 0), w) for place, w in given] if isinstance(given, list) else given)
    return weights


def _loader(
    sources: Sources,
    showing: Showing,
    *,
    seed: int,
    errors: str,
    max_bad_share: float,
    quarantine: str | Path | None,
    batch_size: int,
    rank: int,
    world_size: int,
    start: int,
    workers: int,
    prefetch: int,
    timeout: float,
    shuffle_buffer: int,
) -> Loader:
    if errors not in ("replace", "raise"):
        raise MmbaseError(f"errors={errors!r} is neither 'replace' nor 'raise'")
    evaluating = showing.evaluation is not None
    if sources.shards is not None and sources.order is not None:
        preparation: Any = Preparation(
            sources.shards, sources.order, showing, seed, replace=not evaluating, stop_at_fault=errors == "raise"
        )
    else:
        preparation = StreamedPreparation(
            sources.urls,
            showing,
            seed=seed,
            start=start,
            rank=rank,
            world_size=world_size,
            shuffle_buffer=shuffle_buffer,
            cache=sources.cache,
            stop_at_fault=errors == "raise",
        )
    if quarantine and rank:
        path = Path(quarantine)
        quarantine = path.with_name(f"{path.stem}-rank{rank}{path.suffix}")
    samples = None if sources.order is None else len(sources.order)
    if not evaluating and samples is not None and batch_size * world_size > samples:
        ranks = f" on {world_size} ranks" if world_size > 1 else ""
        raise MmbaseError(f"batch_size={batch_size}{ranks} is larger than the {samples} samples; make it smaller")
    return Loader(
        preparation,
        shards=sources.shards,
        urls=sources.urls,
        order=sources.order,
        shape=(*showing.height_width, showing.collator.tokenizer.context_length, showing.alpha == "keep"),
        batch_size=batch_size,
        quarantine=Quarantine(quarantine, max_bad_share, samples or 1 << 62),
        rank=rank,
        world_size=world_size,
        start=start,
        stop=samples if evaluating else None,
        workers=workers,
        prefetch=prefetch,
        timeout=timeout,
        described=[*sources.described, describe_decoders()],
        fingerprint=sources.fingerprint,
    )


def _check(seed: int, crop_scale: Sequence[float], crop_ratio: Sequence[float] | None, **chosen: str) -> None:
    """Refuse what would only fail sample by sample."""
    if not isinstance(seed, Integral) or seed < 0:
        raise MmbaseError(f"seed={seed!r} must be a whole number from 0")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise MmbaseError(f"crop_scale={crop_scale} must be a range within 0 to 1, such as (0.9, 1.0)")
    if crop_ratio is not None and not 0 < crop_ratio[0] <= crop_ratio[1] < float("inf"):
        raise MmbaseError(f"crop_ratio={crop_ratio} must be a range above 0, such as (0.75, 1.33)")
    choices = {"decode": ("fast", "exact"), "alpha": ("keep", "drop", "white", "black")}
    for name, value in chosen.items():
        if value not in choices[name]:
            raise MmbaseError(f"{name}={value!r} is none of {', '.join(map(repr, choices[name]))}")


def _size(given: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W)."""
    sides = (given, given) if isinstance(given, Integral) else given
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(n, Integral) and n > 0 for n in sides):
        raise MmbaseError(f"image_size={given!r} must be a side in pixels, at least 1, or (height, width)")
    return int(sides[0]), int(sides[1])


def _filter(given: Filter) -> FilterConfig:
    return parse_filter(given) if isinstance(given, str) else _validated(FilterConfig, given, "filter")


def _template(given: CaptionTemplate | dict[str, Any] | str) -> CaptionTemplate:
    return _validated(CaptionTemplate, {"template": given} if isinstance(given, str) else given, "caption template")


def _validated(kind: type[Model], given: Model | dict[str, Any], what: str) -> Model:
    try:
        return kind.model_validate(given)
    except ValueError as error:
        raise MmbaseError(f"{given!r} is no {what}: {_first_line(error)}") from error


def _first_line(error: ValueError) -> str:
    first: dict[str, Any] = next(iter(getattr(error, "errors", list)()), {"loc": (), "msg": str(error)})
    return ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])


def _tokenizer(given: Tokenizer | dict[str, Any] | str) -> Tokenizer:
    """A tokenizer, its description, or the one an OpenCLIP model's name stands for; open_clip is not imported."""
    spec = importlib.util.find_spec("open_clip") if isinstance(given, str) else None
    if not isinstance(given, str) or spec is None or not spec.submodule_search_locations:
        return load_tokenizer(given)
    known = {path.stem: path for path in (Path(spec.submodule_search_locations[0]) / "model_configs").glob("*.json")}
    path = known.get(given.replace("/", "-"))
    if path is None:
        try:
            return load_tokenizer(given)
        except MmbaseError as error:
            raise MmbaseError(f"{error}, or an OpenCLIP model's name{nearest(given, known)}") from error
    text = json.loads(path.read_text(encoding="utf-8"))["text_cfg"]
    described = {"kind": "clip", "context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if name := text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        described |= {"kind": "hf", "source": name}
        described |= {"mode": text["tokenizer_mode"]} if text.get("tokenizer_mode") else {}
    return load_tokenizer(described)
