"""The command line: one verb per function; torch is imported only by the verbs that need it."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmbase import cli_data, cli_training
from mmbase.errors import MmbaseError, nearest

app = typer.Typer(
    name="mmbase",
    help="Train, evaluate and use CLIP-style image-text base models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_data.app)
cli_training.add_to(app)

Model = Annotated[
    str, typer.Option("--model", "-m", help="A run's folder, an OpenCLIP name, hf-hub:org/name, a folder or a file.")
]
Pretrained = Annotated[str | None, typer.Option(help="With an OpenCLIP name: a tag of OpenCLIP's, or a weights file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DEFAULT_MODEL = "runs/emoji"
LISTS = ("--labels", "--template", "--text")
"""Options that take several values: ``--labels cat dog``."""


class ExportFormat(enum.StrEnum):
    """What ``mmbase export`` writes."""

    openclip = "openclip"
    huggingface = "huggingface"


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (emoji) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as training.steps=50")] = None,
) -> None:
    """Train a model, evaluate it and write its report; the same command resumes an interrupted run."""
    from mmbase.config import load_config

    config = load_config(recipe, overrides or [])
    from mmbase.pipeline import train as run

    run(config)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run's folder, or any model that zeroshot takes.")],
    pretrained: Pretrained = None,
    recipe: Annotated[str | None, typer.Option(help="Whose evaluation.tasks; the run's own where left out.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the report; the run's own.")] = None,
    device: Device = "auto",
) -> None:
    """Measure accuracy, retrieval, latency and size, and write metrics.json, report.html and a model card."""
    from mmbase.pipeline import evaluate as run

    run(model, pretrained, recipe=recipe, output=output, device=device)


@app.command()
def zeroshot(
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    labels: Annotated[list[str] | None, typer.Option("--labels", help="Class names: --labels cat dog")] = None,
    template: Annotated[
        list[str] | None, typer.Option("--template", help="Prompts with {}, or the name of a set (imagenet).")
    ] = None,
    model: Model = DEFAULT_MODEL,
    pretrained: Pretrained = None,
    top: Annotated[int, typer.Option(min=1, help="Labels shown per image.")] = 5,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which of the labels fits each image: mmbase zeroshot cat.png --labels cat dog."""
    if not labels:
        raise MmbaseError("no labels given; add for example --labels cat dog")
    missing = [image for image in images if not Path(image).exists()]
    if missing:
        raise MmbaseError(f"there is no image {missing[0]!r}; check the path")
    loaded = _load(model, pretrained, device)
    classifier = loaded.classifier(labels, _templates(template))
    predicted = classifier.predict(images, min(top, len(labels)))
    if as_json:
        rows = [
            {"image": i, "labels": [{"label": n, "probability": p} for n, p in r]} for i, r in zip(images, predicted)
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for image, row in zip(images, predicted):
        typer.echo(f"{image}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in row))


@app.command()
def embed(
    images: Annotated[list[str] | None, typer.Argument(help="Image files.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="Texts: --text 'a cat' 'a dog'")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="An .npz (arrays image, text) to write.")] = Path(
        "embeddings.npz"
    ),
    model: Model = DEFAULT_MODEL,
    pretrained: Pretrained = None,
    device: Device = "auto",
) -> None:
    """Write the features of images and texts, float32 of unit length, as a NumPy archive."""
    if not images and not text:
        raise MmbaseError("nothing to embed; name image files, or texts with --text")
    if output.suffix != ".npz":
        raise MmbaseError(f"--output={str(output)!r} must end in .npz")
    import numpy as np

    loaded = _load(model, pretrained, device)
    arrays: dict[str, Any] = {}
    if images:
        arrays |= {"image": loaded.encode_image(images), "image_paths": np.array(images)}
    if text:
        arrays |= {"text": loaded.encode_text(text), "texts": np.array(text)}
    from mmbase.files import write_atomically

    write_atomically(output, lambda file: np.savez(file, **arrays))
    shapes = ", ".join(f"{name} {arrays[name].shape}" for name in ("image", "text") if name in arrays)
    typer.echo(f"wrote {output}: {shapes}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder, or any model that zeroshot takes.")],
    format: Annotated[ExportFormat, typer.Option("--format", help="Whose folder layout to write.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; RUN/FORMAT.")] = None,
    pretrained: Pretrained = None,
) -> None:
    """Write a folder that OpenCLIP or transformers.CLIPModel loads with equal features."""
    loaded = _load(run, pretrained, "cpu")
    folder = output or Path(run if Path(run).is_dir() else Path(run).name.replace(":", "-")) / format.value
    loaded.export(format.value, folder)
    typer.echo(f"wrote {folder}")


@app.command()
def models(
    contains: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
    as_json: AsJson = False,
) -> None:
    """List OpenCLIP's models: which run on mmbase's own towers, which through OpenCLIP, what needs a hub file."""
    from mmbase.models.zoo import list_models

    entries = [entry for entry in list_models() if contains.lower() in entry.name.lower()]
    if not entries:
        raise MmbaseError(f"no model's name contains {contains!r}; `mmbase models` lists all")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        hub = f"  needs {entry.needs_hub}" if entry.needs_hub else ""
        typer.echo(f"{entry.name:<{width}}  {entry.route:<7}  {entry.reason}{hub}")
    native = sum(entry.route == "native" for entry in entries)
    typer.echo(f"{len(entries)} models: {native} native, {len(entries) - native} through OpenCLIP")


@app.command()
def config(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name or a YAML file; none: list them.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key with its meaning instead.")] = False,
) -> None:
    """Print a recipe as it would run, every key resolved."""
    from mmbase.config import describe_keys, dump, load_config, recipes

    if keys:
        for name, default, meaning in describe_keys():
            typer.echo(f"{name} = {default}\n    {meaning}")
    elif recipe is None:
        for name, path in recipes().items():
            typer.echo(f"{name}  {path}")
    else:
        typer.echo(dump(load_config(recipe, overrides or [])), nl=False)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, precision, memory, disk, the embedded data."""
    from mmbase.doctor import examine

    problems = 0
    for finding in examine():
        problems += not finding.good
        typer.echo(f"{'ok  ' if finding.good else 'FAIL'}  {finding.subject}: {finding.text}")
    if problems:
        raise MmbaseError(f"{problems} problem{'s' * (problems > 1)} found; see the FAIL lines above")


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def bench(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="SUBJECT [OPTIONS]...", help="What to measure, and its options.")
    ] = None,
) -> None:
    """Measure mmbase beside its peers; without a subject, list them."""
    from mmbase_bench import SUBJECTS

    subject, *rest = arguments or ["--help"]
    if subject in ("--help", "-h"):
        typer.echo(
            "Usage: mmbase bench SUBJECT [OPTIONS]...\n\nSubjects; mmbase bench SUBJECT --help lists its options:"
        )
        for name, meaning in SUBJECTS.items():
            typer.echo(f"  {name:<{max(map(len, SUBJECTS))}}  {meaning}")
        return
    if subject not in SUBJECTS:
        raise MmbaseError(
            f"there is no benchmark {subject!r}{nearest(subject, SUBJECTS)}; `mmbase bench` lists the subjects"
        )
    sys.argv = [f"mmbase bench {subject}", *rest]
    importlib.import_module(f"mmbase_bench.{subject}").main()


def _templates(given: list[str] | None) -> str | list[str]:
    if not given:
        return "none"
    return given[0] if len(given) == 1 else given


def _load(model: str, pretrained: str | None, device: str) -> Any:
    if model == DEFAULT_MODEL and not Path(model).exists():
        raise MmbaseError(f"there is no model at {model!r}; run `mmbase train emoji` first, or name one with --model")
    from mmbase.model import load

    return load(model, pretrained, device=device)


def spread_lists(arguments: list[str]) -> list[str]:
    """``--labels cat dog`` as ``--labels cat --labels dog``, which the parser understands."""
    result: list[str] = []
    current: str | None = None
    for position, argument in enumerate(arguments):
        if argument == "--":
            return result + arguments[position:]
        if argument in LISTS:
            current = argument
        elif argument.startswith("-") and len(argument) > 1:
            current = None
            result.append(argument)
        else:
            result += [argument] if current is None else [current, argument]
    return result


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, no traceback."""
    try:
        app(args=spread_lists(sys.argv[1:]), prog_name="mmbase")
    except MmbaseError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes a training run or a packing", 130)
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; free space, or check the path and its permissions", 1)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.stderr.flush()
    sys.exit(code)
