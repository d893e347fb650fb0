"""What a run is, gathered from its folder's files for the report and the model card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmbase.evaluation.run_folder import read_config, read_environment, read_history


@dataclass(frozen=True)
class RunFacts:
    """A run's name, date, config, environment and how far it went.

    ``steps``, ``samples`` and ``seconds`` (of training) are those of the last line of ``metrics.jsonl``, unless the
    environment has ``training_seconds``; None where both are silent. ``version`` is of the mmbase that writes.
    """

    name: str
    date: str
    version: str
    config: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    config_hash: str
    steps: int | None
    samples: int | None
    seconds: float | None

    def find(self, *names: str) -> str:
        """The first non-empty value of the environment under one of ``names``, at any depth; else an empty string."""
        entries = list(flatten(self.environment))
        for name in names:
            for path, value in entries:
                if path.split(".")[-1] == name and value not in (None, ""):
                    return str(value)
        return ""


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested mapping as ``("a.b", value)``."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def source_table(sources: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the data's provenance: every key that any source fills, in the order met; gaps are empty."""
    columns = list(dict.fromkeys(key for source in sources for key, value in source.items() if value not in (None, "")))
    rows = [["" if source.get(column) is None else source[column] for column in columns] for source in sources]
    return columns, rows


def config_hash(config: Mapping[str, Any]) -> str:
    """First 12 digits of the SHA-256 of the config as sorted JSON; the same config gives the same digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def gather_facts(
    run_dir: str | Path,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> RunFacts:
    """Facts of the run in ``run_dir``; what is given takes the place of what its files say.

    Raises:
        MmbaseError: ``config.yaml`` or ``environment.json`` is there but cannot be parsed.
    """
    run_dir = Path(run_dir)
    config = dict(read_config(run_dir) if config is None else config)
    environment = dict(read_environment(run_dir) if environment is None else environment)
    history = read_history(run_dir)
    steps, samples, seconds = (_last(history, key) for key in ("step", "samples", "time"))
    seconds = _last([environment], "training_seconds") or seconds
    return RunFacts(
        name=name or run_dir.resolve().name,
        date=date or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=_version(),
        config=config,
        environment=environment or {"python": platform.python_version(), "platform": platform.platform()},
        history=history,
        config_hash=config_hash(config),
        steps=None if steps is None else int(steps),
        samples=None if samples is None else int(samples),
        seconds=seconds,
    )


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The last number that the history has under ``key``."""
    for record in reversed(history):
        value = record.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            return float(value)
    return None


def _version() -> str:
    try:
        return importlib.metadata.version("mmbase")
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"
