"""The files of a run folder that evaluation reads, and JSON as it writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmbase.errors import MmbaseError


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON text that every reader reads: NaN and infinities become null, letters stay letters."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def read_history(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` in the order of their steps; an empty list where there is no file.

    A line that is not a JSON object (the last one of a killed run) is passed over. Where a step occurs twice, after a
    resume from an older checkpoint, the later line holds.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        return []
    records: dict[float, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int | float):
            # Two kinds of record may share a step (training, validation): merge, the later value wins.
            records[step] = records.get(step, {}) | record
    return [records[step] for step in sorted(records)]


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """``config.yaml`` of a run, or an empty dict where there is none."""
    return _read_mapping(Path(run_dir) / "config.yaml", yaml.safe_load, yaml.YAMLError)


def read_environment(run_dir: str | Path) -> dict[str, Any]:
    """``environment.json`` of a run, or an empty dict where there is none."""
    return _read_mapping(Path(run_dir) / "environment.json", json.loads, json.JSONDecodeError)


def _read_mapping(path: Path, parse: Any, failure: type[Exception]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (failure, UnicodeDecodeError) as error:
        raise MmbaseError(f"cannot read {path}: {str(error).splitlines()[0]}; mend or remove the file") from error
    return value if isinstance(value, dict) else {}
