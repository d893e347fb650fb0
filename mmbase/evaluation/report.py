"""Write a run's report: one HTML page that needs nothing else, and two PNGs for a README."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmbase.errors import MmbaseError
from mmbase.evaluation.contact_sheet import pick_examples, write_contact_sheet
from mmbase.evaluation.curves import plot_geometry, read_curves, short_number, write_curves
from mmbase.evaluation.facts import RunFacts, flatten, gather_facts, source_table
from mmbase.evaluation.page import PAGE
from mmbase.evaluation.style import STYLE
from mmbase.evaluation.suite import EvaluationTask
from mmbase.evaluation.thumbnails import data_url
from mmbase.files import write_atomically

_DIRECTIONS = (("image_to_text", "picture to text"), ("text_to_image", "text to picture"))


def percent(share: float | None, digits: int | None = None) -> str:
    """A share as per cent, unbreakable: two digits below 1 %, else one, unless told; a dash where it is missing."""
    if share is None or not math.isfinite(share):
        return "–"
    if digits is None:
        digits = 2 if 0 < share < 0.01 else 1
    return f"{100 * share:.{digits}f}\u00a0%"


def milliseconds(value: float) -> str:
    """Milliseconds with three significant digits: 0.124 ms, 3.41 ms, 128 ms."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 3)}f} ms"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 7 min 12 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def timing_name(key: str) -> str:
    """``image_batch_32`` as ``Images, batch of 32``."""
    if key.startswith("image_batch_"):
        size = key.rsplit("_", 1)[1]
        return "Image, one at a time" if size == "1" else f"Images, batch of {size}"
    return {"text_batch_1": "Text, one at a time", "preprocess_1": "Preprocessing of one image"}.get(key, key)


def _css_share(share: float) -> str:
    """A share as a CSS percentage, kept between 0 and 100."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _whole_percent(share: float | None) -> str:
    return percent(share, 0)


def _metric_name(key: str) -> str:
    return key.replace("top", "top-").replace("recall@", "recall at ")


def _is_link(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("https://", "http://"))


_FILTERS: dict[str, Callable[..., Any]] = {
    "percent": percent,
    "percent0": _whole_percent,
    "share": _css_share,
    "count": "{:,}".format,
    "ms": milliseconds,
    "metric_name": _metric_name,
    "is_link": _is_link,
}


class _Pictures:
    """Data URLs of a task's samples, each encoded once however often it is shown."""

    def __init__(self, task: EvaluationTask) -> None:
        self._task = task
        self._urls: dict[int, str] = {}

    def __getitem__(self, position: int) -> str:
        if position not in self._urls:
            self._urls[position] = data_url(self._task.samples[position]["image"])
        return self._urls[position]


def _right_or_wrong(
    predictions: Sequence[Mapping[str, Any]], pictures: _Pictures, count: int, seed: int
) -> list[tuple[str, list[dict[str, Any]]]]:
    right, wrong = pick_examples(predictions, count, seed)

    def tile(position: int) -> dict[str, Any]:
        item = predictions[position]
        said, probability = item["top"][0]
        return {
            "url": pictures[position],
            "label": item["label"],
            "said": said,
            "probability": probability,
            "is_right": said == item["label"],
            "ranking": "\n".join(f"{percent(p)} {name}" for name, p in item["top"]),
        }

    return [
        ("Right, drawn at random", [tile(position) for position in right]),
        ("Wrong, the most confident first", [tile(position) for position in wrong]),
    ]


def _examples(task: EvaluationTask, examples: Mapping[str, Any], pictures: _Pictures) -> dict[str, Any]:
    """Retrieval examples with the pictures and captions of the samples they point to."""

    def shown(entry: Mapping[str, Any]) -> dict[str, Any]:
        position = entry["sample"]
        return {**entry, "url": pictures[position], "text": task.samples[position]["caption"]}

    return {
        "text_to_image": [
            {"text": query["text"], "matches": [shown(hit) for hit in query["matches"]]}
            for query in examples["text_to_image"]
        ],
        "image_to_text": [shown(query) for query in examples["image_to_text"]],
    }


def _task_view(task: EvaluationTask, result: Mapping[str, Any], count: int, seed: int) -> dict[str, Any]:
    pictures = _Pictures(task)
    predictions, examples = result.get("predictions"), result.get("examples")
    return {
        "title": task.heading,
        "description": task.description,
        "templates": result.get("templates", []),
        "zero_shot": result.get("zero_shot"),
        "retrieval": result.get("retrieval"),
        "breakdown": result.get("breakdown") or {},
        "right_or_wrong": _right_or_wrong(predictions, pictures, count, seed) if predictions else [],
        "examples": _examples(task, examples, pictures) if examples else None,
    }


def _header(facts: RunFacts) -> list[tuple[str, str]]:
    rows = [
        ("Written", facts.date),
        ("mmbase", facts.find("mmbase") or facts.version),
        ("Commit", facts.find("commit", "git_commit")[:12]),
        ("Device", facts.find("device_name", "gpu", "device", "cpu")),
        ("PyTorch", facts.find("torch")),
        ("Python", facts.find("python")),
        ("Steps", "" if facts.steps is None else f"{facts.steps:,}"),
        ("Samples seen", "" if facts.samples is None else f"{facts.samples:,}"),
        ("Training time", "" if facts.seconds is None else duration(facts.seconds)),
    ]
    return [(name, value) for name, value in rows if value]


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    size = results["size"]
    tiles = [("parameters", short_number(size["total"])), ("weights in float32", f"{size['megabytes']:.1f} MB")]
    timings = results.get("latency", {}).get("timings", {})
    names = {"image_batch_1": "to encode one image", "text_batch_1": "to encode one text"}
    tiles += [(names[key], milliseconds(timings[key]["median_ms"])) for key in names if key in timings]
    batches = [key for key in timings if key.startswith("image_batch_") and key != "image_batch_1"]
    for key in batches[-1:]:
        batch_name = f"images a second, in batches of {key.rsplit('_', 1)[1]}"
        tiles.append((batch_name, f"{1000 / timings[key]['per_item_ms']:,.0f}"))
    return tiles


def _size_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    size, model = results["size"], results["model"]
    rows = [("Model", model["name"]), ("Image size", _pixels(model["image_size"]))]
    rows += [(f"Parameters, {part}", f"{count:,}") for part, count in size["parts"].items()]
    rows += [("Parameters, total", f"{size['total']:,}"), ("Weights, float32", f"{size['megabytes']:.2f} MB")]
    rows.append(("Logit scale", f"{model['logit_scale']:.2f}"))
    if model["logit_bias"] is not None:
        rows.append(("Logit bias", f"{model['logit_bias']:.2f}"))
    return rows


def _pixels(size: int | Sequence[int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} × {width}"


def _latency_view(latency: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not latency:
        return None
    timings = latency["timings"]
    calls = sorted({int(timing["calls"]) for timing in timings.values()})
    return {
        "device": latency["device"],
        "threads": latency["threads"],
        "image_size": _pixels(latency["image_size"]),
        "calls": str(calls[0]) if len(calls) == 1 else f"{calls[0]} to {calls[-1]}",
        "timings": [(timing_name(key), timing) for key, timing in timings.items()],
    }


def render_report(
    facts: RunFacts,
    results: Mapping[str, Any],
    tasks: Sequence[EvaluationTask],
    sources: Sequence[Mapping[str, Any]] = (),
    *,
    examples: int = 16,
    seed: int = 0,
) -> str:
    """The page as text. See ``write_report``; nothing is written here."""
    from jinja2 import Environment, StrictUndefined  # comes with torch
    from markupsafe import Markup

    columns, rows = source_table(sources)
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters.update(_FILTERS)
    return jinja.from_string(PAGE).render(
        style=Markup(STYLE),
        facts=facts,
        header=_header(facts),
        tasks=[_task_view(task, results["tasks"][task.name], examples, seed) for task in tasks],
        tiles=_tiles(results),
        directions=_DIRECTIONS,
        curves=[plot_geometry(curve) for curve in read_curves(facts.history)],
        latency=_latency_view(results.get("latency")),
        size=_size_rows(results),
        source_columns=columns,
        sources=rows,
        config=yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True) if facts.config else "",
        environment=[(name, str(value)) for name, value in flatten(facts.environment)],
    )


def write_report(
    run_dir: str | Path,
    results: Mapping[str, Any],
    tasks: Sequence[EvaluationTask],
    *,
    sources: Sequence[Mapping[str, Any]] = (),
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    date: str | None = None,
    examples: int = 16,
    seed: int = 0,
) -> Path:
    """Write ``report.html``, ``contact_sheet.png`` and ``curves.png`` into a run's folder.

    The page holds its pictures, curves and style itself and loads nothing; all values are escaped. ``metrics.jsonl``,
    ``config.yaml`` and ``environment.json`` of the folder are read where they are there.

    Args:
        run_dir: the run's folder; its name is the heading.
        results: what ``mmbase.evaluation.suite.evaluate`` returned.
        tasks: the tasks it was given; the pictures come from their samples.
        sources: the data's provenance, one dict per source, such as ``{"name", "source", "samples", "licence",
            "attribution"}``; every key that occurs becomes a column, in the order met.
        name: heading in place of the folder's name.
        config: in place of ``config.yaml``.
        environment: in place of ``environment.json``; keys ``commit``, ``device``, ``torch`` and ``python``, at any
            depth, appear in the heading.
        date: in place of now.
        examples: right, and wrong, predictions shown per task.
        seed: draws the right ones.

    Returns:
        The path of ``report.html``.

    Raises:
        MmbaseError: a task without results, a folder that cannot be written, or a sample that is no image.
    """
    missing = [task.name for task in tasks if task.name not in results["tasks"]]
    if missing:
        raise MmbaseError(f"there are no results for task {missing[0]!r}; pass the tasks that evaluate() was given")
    run_dir = Path(run_dir)
    facts = gather_facts(run_dir, name=name, config=config, environment=environment, date=date)
    page = render_report(facts, results, tasks, sources, examples=examples, seed=seed)
    write_contact_sheet(run_dir / "contact_sheet.png", tasks, results, seed=seed)
    write_curves(run_dir / "curves.png", read_curves(facts.history))
    return write_atomically(run_dir / "report.html", page)
