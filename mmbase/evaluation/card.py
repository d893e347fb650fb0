"""Write a run's model card: README.md with the front matter of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmbase.data.datasheet import without_licence
from mmbase.errors import MmbaseError
from mmbase.evaluation.facts import RunFacts, gather_facts, source_table
from mmbase.evaluation.report import duration, milliseconds, percent, timing_name
from mmbase.files import write_atomically

_INTENDED_USE = (
    "Zero-shot classification of pictures by a list of labels, and retrieval between pictures and short texts, on "
    "pictures like those it was trained on; also a starting point for training on."
)
_LIMITS = (
    "The model knows the pictures and words of the training data below and little else: other kinds of pictures "
    "and other words are answered too, with probabilities that say which label fits best, not whether any fits.",
    "Probabilities are not calibrated, and they change with the set of labels and with the prompt.",
    "Biases of the training data, in what is shown and in how it is named, are the model's too.",
    "Not evaluated for decisions about people or for anything where an error does harm.",
)


def _cell(value: Any) -> str:
    """``value`` as one Markdown table cell: no line breaks, no bars, no tags."""
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers_from: int | None = None) -> str:
    """A Markdown table; columns from ``numbers_from`` on are set to the right."""
    rule = ["---:" if numbers_from is not None and index >= numbers_from else "---" for index in range(len(columns))]
    lines = [[_cell(column) for column in columns], rule, *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _front_matter(
    facts: RunFacts, results: Mapping[str, Any], licence: str, tags: Sequence[str], datasets: Sequence[str]
) -> str:
    """The hub's metadata; ``model-index`` carries the zero-shot results in per cent."""
    measured = []
    for key, task in results["tasks"].items():
        if task.get("zero_shot"):
            values = [
                {
                    "type": "accuracy",
                    "name": f"zero-shot top-{k}",
                    "value": round(100 * task["zero_shot"][f"top{k}"], 2),
                }
                for k in (1, 5)
            ]
            dataset = {"name": task["title"], "type": key}
            measured.append(
                {
                    "task": {"type": "zero-shot-image-classification", "name": "Zero-shot image classification"},
                    "dataset": dataset,
                    "metrics": values,
                }
            )
    front: dict[str, Any] = {
        "license": licence,
        "library_name": "mmbase",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": list(dict.fromkeys(["mmbase", "clip", "zero-shot-image-classification", *tags])),
    }
    if datasets:
        front["datasets"] = list(datasets)
    if measured:
        front["model-index"] = [{"name": facts.name, "results": measured}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)


def _interval(metrics: Mapping[str, Any], key: str) -> str:
    low, high = metrics[f"{key}_ci95"]
    return f"{percent(metrics[key])} ({percent(low)} to {percent(high)})"


def _evaluation(results: Mapping[str, Any]) -> str:
    zero_shot, retrieval = [], []
    for task in results["tasks"].values():
        if z := task.get("zero_shot"):
            top1, top5 = _interval(z, "top1"), _interval(z, "top5")
            zero_shot.append([task["title"], z["samples"], z["classes"], top1, top5, percent(z["top1_chance"])])
        for key, name in (("image_to_text", "picture to text"), ("text_to_image", "text to picture")):
            if r := (task.get("retrieval") or {}).get(key):
                recalls = [percent(r[f"recall@{k}"]) for k in (1, 5, 10)]
                retrieval.append([task["title"], name, *recalls, f"{r['median_rank']:g}", r["candidates"]])
    parts = []
    if zero_shot:
        columns = ["Task", "Pictures", "Labels", "Top-1 (95 % interval)", "Top-5 (95 % interval)", "Chance, top-1"]
        parts.append("Zero-shot classification:\n\n" + _table(columns, zero_shot, 1))
    if retrieval:
        columns = ["Task", "Direction", "Recall@1", "Recall@5", "Recall@10", "Median rank", "Candidates"]
        parts.append("Retrieval:\n\n" + _table(columns, retrieval, 2))
    return "\n\n".join(parts) or "Not evaluated: its configuration names no tasks."


def _training_data(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return "The sources of the training data were not recorded with this run."
    columns, rows = source_table(sources)
    parts = ["Trained on:", _table([column.capitalize() for column in columns], rows)]
    if unknown := without_licence(sources):
        parts.append(
            f"**The licence of {', '.join(_cell(name) for name in unknown)} is not known**: find out before using or "
            "publishing the model."
        )
    return "\n\n".join(parts)


def _environment(facts: RunFacts, results: Mapping[str, Any]) -> str:
    """Hardware, time and versions; then the encoders' speed."""
    rows = [
        ("Hardware", facts.find("device_name", "gpu", "device", "cpu")),
        ("Training time", "" if facts.seconds is None else f"{duration(facts.seconds)} ({facts.seconds:,.0f} s)"),
        ("Steps", "" if facts.steps is None else f"{facts.steps:,}"),
        ("Samples seen", "" if facts.samples is None else f"{facts.samples:,}"),
        ("Parameters", f"{results['size']['total']:,} ({results['size']['megabytes']:.1f} MB in float32)"),
        ("mmbase", facts.find("mmbase") or facts.version),
        ("PyTorch", facts.find("torch")),
        ("Python", facts.find("python")),
        ("Commit", facts.find("commit", "git_commit")),
        ("Configuration (SHA-256)", facts.config_hash if facts.config else ""),
    ]
    if latency := results.get("latency"):
        plural = "" if latency["threads"] == 1 else "s"
        where = f"{latency['device']}, {latency['threads']} thread{plural}"
        for key, timing in latency["timings"].items():
            rows.append((f"{timing_name(key)} ({where})", milliseconds(timing["median_ms"])))
    return _table(["What", "Value"], [row for row in rows if row[1]])


def render_model_card(
    facts: RunFacts,
    results: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]] = (),
    *,
    licence: str = "unknown",
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    description: str = "",
    location: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The card as text. See ``write_model_card``; nothing is written here."""
    model = results["model"]
    size = model["image_size"]
    about = description or (
        f"An image-text model (two towers, trained contrastively) with {results['size']['total']:,} parameters that "
        f"sees pictures at {size if isinstance(size, int) else ' x '.join(map(str, size))} pixels."
    )
    location = location or f"runs/{facts.name}"
    load = (
        "```python\nimport mmbase\n\n"
        f'model = mmbase.load("{location}")\n'
        'model.classify("picture.png", ["cat", "dog"])\n'
        'model.encode_image(["picture.png"])\nmodel.encode_text(["a cat"])\n```'
    )
    sections = [
        f"# {_cell(facts.name)}",
        about,
        "## How to load it\n\n" + load,
        "## Evaluation\n\n" + _evaluation(results),
        *(f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures),
        "## Intended use\n\n" + _INTENDED_USE,
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _LIMITS),
        "## Data\n\n" + _training_data(sources),
        "## Training\n\n" + _environment(facts, results),
    ]
    if facts.config:
        config = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)
        sections.append(f"<details><summary>Configuration</summary>\n\n```yaml\n{config}```\n\n</details>")
    front = _front_matter(facts, results, licence, tags, datasets)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def write_model_card(
    run_dir: str | Path,
    results: Mapping[str, Any],
    *,
    sources: Sequence[Mapping[str, Any]] = (),
    licence: str = "unknown",
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    description: str = "",
    location: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> Path:
    """Write ``README.md`` into a run's folder: a model card as the Hugging Face hub reads it.

    Args:
        run_dir: the run's folder; ``config.yaml``, ``environment.json`` and ``metrics.jsonl`` are read from it, and
            ``contact_sheet.png`` and ``curves.png`` are shown where they are there.
        results: what ``mmbase.evaluation.suite.evaluate`` returned.
        sources: the data's provenance; as for ``write_report``.
        licence: of the weights, as the hub abbreviates it.
        tags: further tags.
        datasets: names, or hub ids, of the training data.
        description: first paragraph, in Markdown; a plain one is written where it is empty.
        location: what ``mmbase.load`` is shown with; ``runs/NAME`` where None.
        name: in place of the folder's name.
        config: in place of ``config.yaml``.
        environment: in place of ``environment.json``.
        date: in place of now.

    Raises:
        MmbaseError: no licence, or a folder that cannot be written.
    """
    if not licence:
        raise MmbaseError("the model card has no licence; give one, as in licence='apache-2.0'")
    run_dir = Path(run_dir)
    facts = gather_facts(run_dir, name=name, config=config, environment=environment, date=date)
    pictures = [picture for picture in ("contact_sheet.png", "curves.png") if (run_dir / picture).is_file()]
    card = render_model_card(
        facts,
        results,
        sources,
        licence=licence,
        tags=tags,
        datasets=datasets,
        description=description,
        location=location,
        pictures=pictures,
    )
    return write_atomically(run_dir / "README.md", card)
