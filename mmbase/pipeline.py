"""From a configuration to a finished run, and from a model to its evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from mmbase.config import RunConfig, load_config, parse_yaml, validate
from mmbase.data.config import DataConfig
from mmbase.data.shards import Sample, expand_shards, read_samples
from mmbase.errors import MmbaseError, nearest
from mmbase.evaluation.card import write_model_card
from mmbase.evaluation.config import TaskConfig
from mmbase.evaluation.protocol import ImageTextModel
from mmbase.evaluation.report import write_report
from mmbase.evaluation.suite import EvaluationTask, describe_model, evaluate_task
from mmbase.evaluation.suite import evaluate as run_suite
from mmbase.model import load
from mmbase.provenance import is_counted, record_provenance
from mmbase.training.distributed import leads
from mmbase.training.run import train_run


def train(config: str | Path | RunConfig, *overrides: str, console: Console | None = None) -> Path:
    """Train, evaluate, report; the run's folder. The same call resumes a run that was interrupted.

    Args:
        config: a recipe's name (``emoji``), a YAML file or a configuration.
        overrides: ``"training.steps=50"`` and the like.
        console: where progress goes; None for the terminal.

    Raises:
        MmbaseError: a mistake in the configuration, the data or the folder.
        SystemExit: the run was asked to stop by a signal; its checkpoint is written, the same call goes on.
    """
    console = console or Console()
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    elif overrides:
        raise MmbaseError("overrides go with a recipe's name or a YAML file; change the RunConfig itself instead")
    for task in config.evaluation.tasks:
        check_task(task, config.data)
    folder = train_run(config, console, ask_tasks)
    if not leads():  # under torchrun or srun every rank comes here: one reports
        return folder
    if config.evaluation.tasks:
        evaluate(folder, device=config.device, console=console)
    else:
        results = describe_model(load(folder, device="cpu"))
        _write_card(folder, results, config, record_provenance(folder, config.data))
    return folder


def ask_tasks(config: RunConfig) -> Callable[[ImageTextModel], dict[str, float]]:
    """What ``training.evaluate_every`` measures: the tasks of ``config.evaluation``, by every rank alike.

    Returns:
        A function of a model: by task ``TASK_top1`` and ``TASK_recall@1`` (the mean of both directions), and ``score``,
        the mean over tasks of the first that each has.

    Raises:
        MmbaseError: no tasks, and see :func:`build_task`.
    """
    if not config.evaluation.tasks:
        raise MmbaseError("training.evaluate_every needs evaluation.tasks; add some, or leave it out")
    training = _training_samples(config)
    tasks = [build_task(task, config.data, training) for task in config.evaluation.tasks]

    def ask(model: ImageTextModel) -> dict[str, float]:
        numbers: dict[str, float] = {}
        heads: list[float] = []
        for task in tasks:
            found = evaluate_task(model, task, batch_size=config.evaluation.batch_size)
            own: dict[str, float] = {}
            if "zero_shot" in found:
                own["top1"] = found["zero_shot"]["top1"]
            if "retrieval" in found:
                own["recall@1"] = sum(way["recall@1"] for way in found["retrieval"].values()) / 2
            heads += list(own.values())[:1]
            numbers |= {f"{task.name}_{name}": value for name, value in own.items()}
        return numbers | {"score": sum(heads) / len(heads)}

    return ask


def evaluate(
    model: str | Path,
    pretrained: str | None = None,
    *,
    recipe: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a model and write metrics.json, predictions.jsonl, report.html and a model card.

    Args:
        model: whatever ``mmbase.load`` takes.
        pretrained: as for ``mmbase.load``.
        recipe: whose ``evaluation.tasks`` to ask; None: those of the run that ``model`` is.
        output: folder of the report; None: the run's own.
        device: where the towers run.
        console: where results go; None for the terminal.

    Returns:
        The results: see ``mmbase.evaluation.suite.evaluate``.

    Raises:
        MmbaseError: no run there and no recipe or output given, or a task without samples.
    """
    console = console or Console()
    resolved = Path(model) / "config.yaml"
    if (recipe is None or output is None) and not resolved.is_file():
        raise MmbaseError(
            f"{str(model)!r} is no run (it has no config.yaml); name a run's folder, or give --recipe and --output"
        )
    folder = Path(model if output is None else output)
    if recipe is None:
        config = validate(parse_yaml(resolved.read_text(encoding="utf-8"), str(resolved)))
    else:
        config = load_config(recipe)
    if not config.evaluation.tasks:
        raise MmbaseError(f"{str(recipe or model)!r} has no evaluation.tasks; add some to its recipe")
    loaded = load(model, pretrained, device=device)
    with console.status("evaluating"):
        training = _training_samples(config)
        tasks = [build_task(task, config.data, training) for task in config.evaluation.tasks]
        results = run_suite(loaded, tasks, folder, batch_size=config.evaluation.batch_size)
        sources = _sources(Path(model), config if recipe is None else None, training, folder)
        write_report(folder, results, tasks, sources=sources)
        _write_card(folder, results, config, sources)
    _print_results(results, folder, console)
    return results


def _training_samples(config: RunConfig) -> list[Sample]:
    """The training samples without their pictures, where a task's split or the count by source asks for them."""
    if not is_counted(config.data) and all(task.split == "all" for task in config.evaluation.tasks):
        return []
    samples = read_samples(expand_shards(config.data.shard_specs()), config.data.caption_field)
    return [sample._replace(image=b"") for sample in samples]


def _sources(run: Path, config: RunConfig | None, training: Sequence[Sample], output: Path) -> list[dict[str, Any]]:
    """What a run was trained on, whatever recipe it is asked by (then ``config`` is None); of other models nothing."""
    resolved = run / "config.yaml"
    if not resolved.is_file():
        return []
    if config is None:
        own = validate(parse_yaml(resolved.read_text(encoding="utf-8"), str(resolved)))
        return record_provenance(run, own.data, keep=output == run)
    # a run that is evaluated elsewhere may not be ours to write into
    return record_provenance(run, config.data, training, keep=output == run)


def _write_card(folder: Path, results: Mapping[str, Any], config: RunConfig, sources: Sequence[dict[str, Any]]) -> None:
    write_model_card(
        folder,
        results,
        sources=sources,
        licence=config.evaluation.licence,
        datasets=list(dict.fromkeys(str(source["name"]) for source in sources)),
        location=f"runs/{folder.name}" if folder.is_absolute() else str(folder),
    )


def check_task(task: TaskConfig, data: DataConfig) -> None:
    """Find mistakes in a task that would else be found after the training; looks at its first sample alone.

    Raises:
        MmbaseError: shards that are not there or hold no sample, a label that it lacks, a split without a holdout.
    """
    shards = expand_shards(task.shards)
    if task.split != "all" and data.holdout is None:
        raise MmbaseError(f"task {task.name!r} asks for split={task.split} but data.holdout is not set")
    sample = next(read_samples(shards, data.caption_field), None)
    if sample is None:
        raise MmbaseError(f"the shards of task {task.name!r} hold no image-caption pair; check evaluation.tasks")
    _label_of(sample, task)


def _label_of(sample: Sample, task: TaskConfig) -> str:
    """The class of a sample.

    Raises:
        MmbaseError: the sample lacks the field.
    """
    if task.label not in sample.fields:
        hint = nearest(task.label, sample.fields) or f" to one of {', '.join(sorted(sample.fields))}"
        raise MmbaseError(
            f"sample {sample.key!r} of task {task.name!r} has no field {task.label!r}; set its label{hint}"
        )
    return str(sample.fields[task.label])


def build_task(task: TaskConfig, data: DataConfig, training: Sequence[Sample]) -> EvaluationTask:
    """The samples and classes of a configured task; ``split`` refers to what ``data.holdout`` kept out of ``training``.

    Raises:
        MmbaseError: no sample is left, a sample lacks the label, or a split without a holdout.
    """
    check_task(task, data)
    samples = list(read_samples(expand_shards(task.shards), data.caption_field))
    if task.split != "all" and data.holdout is not None:
        held_out = data.holdout.values(s.fields for s in training)
        samples = [s for s in samples if data.holdout.covers(s.fields, held_out) == (task.split == "held_out")]
    rows: list[dict[str, Any]] = []
    for sample in samples:
        label = _label_of(sample, task)
        picture = Image.open(io.BytesIO(sample.image))
        rows.append({"key": sample.key, "image": picture, "caption": label, "meta": sample.fields})
    classes = {row["caption"]: row["meta"] for row in reversed(rows)}
    return EvaluationTask(
        name=task.name,
        samples=rows,
        class_names=[[name, *_wordings(task.wordings, fields)] for name, fields in sorted(classes.items())],
        templates=task.templates,
        breakdown=task.breakdown,
        retrieval=task.retrieval,
        title=task.title,
        description=task.description,
    )


def _wordings(templates: Sequence[str], fields: Mapping[str, Any]) -> list[str]:
    """Further names of the class that a sample with these fields belongs to.

    Raises:
        MmbaseError: a template that names a field which the sample lacks.
    """
    words = {
        name: ", ".join(map(str, value[:4])) if isinstance(value, list) else value for name, value in fields.items()
    }
    try:
        return [template.format_map(words) for template in templates]
    except KeyError as error:
        raise MmbaseError(
            f"evaluation wordings name the field {error.args[0]!r}{nearest(error.args[0], words)} which a sample lacks"
        ) from error


def _print_results(results: dict[str, Any], folder: Path, console: Console) -> None:
    table = Table(title="zero-shot accuracy", title_justify="left")
    for heading in ("task", "classes", "pictures", "top-1", "top-5"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in results["tasks"].values():
        scores = task["zero_shot"]  # every configured task has classes
        table.add_row(
            task["title"],
            str(scores["classes"]),
            str(task["samples"]),
            f"{scores['top1']:.1%}",
            f"{scores['top5']:.1%}",
        )
    console.print(table)
    console.print(f"report: {folder / 'report.html'}   model card: {folder / 'README.md'}")
