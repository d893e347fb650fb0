"""``mmbase plan`` and ``mmbase watch``: before and during a training. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mmbase.errors import MmbaseError, nearest

KINDS = ("ddp", "fsdp")


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (emoji) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as training.batch_size=4096")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200, b200, l40s, rtx4090, or cpu: N processes on it.")
    ] = "h200",
    parallel: Annotated[str | None, typer.Option(help="ddp or fsdp; as configured where left out.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Pairs of one device at a time; as configured where left out.")
    ] = None,
    text_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean tokens of a text, where texts are packed; else the whole context.")
    ] = None,
    measured: Annotated[
        float | None, typer.Option(min=0, help="Samples/s of one device, as a short run of this recipe told.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Say what a training will need: parameters, FLOPs, memory, communication, samples/s and hours."""
    from mmbase.config import load_config

    if parallel is not None and parallel not in KINDS:
        raise MmbaseError(f"--parallel={parallel!r} must be one of {', '.join(KINDS)}{nearest(parallel, KINDS)}")
    config = load_config(recipe, overrides or [])
    from mmbase.plan import make_plan
    from mmbase.plan_text import describe

    made = make_plan(
        config,
        gpus=gpus,
        device=gpu,
        recipe=None if overrides else recipe,
        kind="ddp" if parallel == "ddp" else "fsdp" if parallel == "fsdp" else None,
        micro_batch=micro_batch,
        text_tokens=text_tokens,
        measured=measured,
    )
    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=2))
    else:
        typer.echo("\n".join(describe(made)))


def watch(
    run: Annotated[str, typer.Argument(help="The run's folder.")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Draw once and end.")] = False,
) -> None:
    """Draw loss, logit scale, throughput and learning rate of a run in the terminal, as it goes."""
    from mmbase.training.watch import watch as follow

    follow(run, every=every, once=once)


def add_to(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command()(plan)
    app.command()(watch)
