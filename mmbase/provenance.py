"""What a run was trained on and what one may do with it: recorded with the run, told by its report and model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmbase.data.config import DataConfig
from mmbase.data.datasheet import provenance_of
from mmbase.data.shard_list import local_path, scheme_of
from mmbase.data.shards import Sample, declared_sizes, expand_shards
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

FILE = "provenance.json"
MOST_COUNTED = 1_000_000
"""Samples up to which ``data.source_field`` is counted: it means reading all of them."""
MOST_BYTES = 1 << 30
"""The same where no ``sizes.json`` tells the number of samples."""


def provenance(data: DataConfig, training: Iterable[Sample] | None = None) -> list[dict[str, Any]]:
    """One row per source of the training data.

    Sources declared as ``data.sources`` count; where there are none, those of the datasheets beside the shards, and
    shards without one are named with the licence ``"unknown"``.

    Args:
        data: the configuration.
        training: the samples, to count them by ``data.source_field``; None: they are not counted.

    Raises:
        MmbaseError: a datasheet that cannot be understood, shards that are not there.
    """
    if not data.sources:
        return provenance_of(expand_shards(data.shard_specs()))
    counts: Counter[str] | None = None
    if data.source_field and training is not None:
        counts = Counter(str(sample.fields.get(data.source_field)) for sample in training)
    rows = []
    for source in data.sources:
        row: dict[str, Any] = source.model_dump()
        if counts is not None:
            row["pictures"] = counts[source.name]
        rows.append(row)
    return rows


def is_counted(data: DataConfig) -> bool:
    """Whether samples are read to count them by source: where that is asked for, and they are here and not too many."""
    if not data.sources or not data.source_field:
        return False
    shards = expand_shards(data.shard_specs())
    sizes = declared_sizes(shards)
    if len(sizes) == len(shards):
        return sum(sizes.values()) <= MOST_COUNTED
    paths = [local_path(shard) for shard in shards if scheme_of(shard) in ("", "file")]
    return len(paths) == len(shards) and sum(path.stat().st_size for path in paths) <= MOST_BYTES


def record_provenance(
    folder: Path, data: DataConfig, training: Iterable[Sample] | None = None, *, keep: bool = True
) -> list[dict[str, Any]]:
    """The provenance in a run's folder; ``keep`` writes it there the first time, since shards may move or change later.

    Raises:
        MmbaseError: as :func:`provenance`; a file that cannot be read or written.
    """
    path = folder / FILE
    if path.is_file():
        try:
            return list(json.loads(path.read_bytes())["sources"])
        except (ValueError, KeyError, TypeError) as error:
            raise MmbaseError(f"{str(path)!r} is damaged: {error}; delete it") from error
    rows = provenance(data, training)
    if keep:
        told = {"sources": rows, "shards": data.shard_specs()}
        write_atomically(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return rows
