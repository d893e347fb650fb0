"""``mmbase data``: check, pack, card, index. One function per verb; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmbase.errors import MmbaseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmbase.data.datasheet import Datasheet
    from mmbase.data.datasheet_scan import ScannedShard

app = typer.Typer(
    name="data",
    help="Check, pack and describe image-text datasets.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Shards = Annotated[
    list[str], typer.Argument(metavar="SHARDS...", help="Tars, folders, brace patterns; emoji: for the embedded ones.")
]
CaptionField = Annotated[str, typer.Option(help="JSON field with the caption; a .txt member overrides it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Name = Annotated[str | None, typer.Option(help="Name of the dataset.")]
Description = Annotated[str | None, typer.Option(help="A sentence or two on what it is.")]
Origin = Annotated[str | None, typer.Option("--source", help="Collection, package or address, with its version.")]
Licence = Annotated[
    str | None, typer.Option("--licence", "--license", help="SPDX identifier such as CC-BY-4.0, or its name.")
]
Attribution = Annotated[str | None, typer.Option(help="The line that the licence asks for.")]


@app.command()
def check(
    shards: Shards,
    seconds: Annotated[float, typer.Option(min=0.5, help="Time for looking at samples; all, if they fit.")] = 8.0,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that will train.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes of each.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per rank and step.")] = 256,
    image_size: Annotated[int, typer.Option(min=8, help="Side that the model sees, in pixels.")] = 224,
    caption_field: CaptionField = "caption",
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="Also say what it would leave: 'similarity>=0.28'. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at a sample of any dataset and say what is in it, what is wrong and what to change."""
    from mmbase.data.check import CheckOptions, check_shards
    from mmbase.data.check_report import print_report
    from mmbase.data.filters import parse_filter

    report = check_shards(
        shards,
        CheckOptions(
            seconds=seconds,
            ranks=ranks,
            workers=workers,
            batch_size=batch_size,
            image_size=image_size,
            caption_field=caption_field,
            filters=[parse_filter(text) for text in filters or []],
        ),
    )
    if as_json:
        text = json.dumps(report.as_dict(), ensure_ascii=False, indent=2)
        typer.echo(text.encode("utf-8", "backslashreplace"))  # half a character: as JSON escapes it
    else:
        print_report(report)
    if problems := [finding for finding in report.findings if finding.level == "problem"]:
        raise MmbaseError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} found: " + "; ".join(p.subject for p in problems)
        )


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A .csv, .tsv, .jsonl, .json or .parquet file, or a folder: with one of these and pictures,"
            " one folder per class, a .txt beside each picture, Parquet, a Hugging Face dataset, or shards."
        ),
    ],
    output: Annotated[str, typer.Argument(help="Folder to write; the same command resumes an interrupted packing.")],
    size: Annotated[int | None, typer.Option(help="Shrink larger pictures to this side, in pixels.")] = None,
    resize: Annotated[
        str, typer.Option(help="shortest or longest side becomes SIZE; square cuts the centre.")
    ] = "shortest",
    image_format: Annotated[
        str, typer.Option("--format", help="auto (unchanged where possible), jpg, png, webp.")
    ] = "auto",
    quality: Annotated[int, typer.Option(help="Of JPEG and WebP, 1 to 100.")] = 90,
    min_side: Annotated[int, typer.Option(help="Leave out pictures whose shorter side is below this.")] = 1,
    upright: Annotated[bool, typer.Option(help="Turn pictures as their camera noted.")] = True,
    split: Annotated[list[str] | None, typer.Option(help="val=0.05; repeatable. The rest is train.")] = None,
    split_by: Annotated[str | None, typer.Option(help="Field whose equal values stay in one split.")] = None,
    dedupe: Annotated[
        str, typer.Option(help="none; pairs: equal picture and caption; images; near: pictures that look the same.")
    ] = "pairs",
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="Keep rows with 'width>=200', 'language=en,de'. Repeatable.")
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="Pairs per shard; for 64 shards where left out.")] = None,
    shuffle: Annotated[bool, typer.Option(help="Pack in an order drawn by the seed.")] = True,
    seed: Annotated[int, typer.Option(help="Of the order and the splits.")] = 0,
    max_bad_share: Annotated[float, typer.Option(help="Stop where more of the rows than this are bad.")] = 0.5,
    kind: Annotated[
        str | None,
        typer.Option(help="table, imagefolder, textfiles, parquet, huggingface or shards; found by looking."),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column with the picture: a path, or its bytes.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with the caption, or a list of captions.")] = None,
    template: Annotated[str | None, typer.Option(help="Caption made of columns: 'a photo of a {label}'.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    subset: Annotated[str | None, typer.Option(help="Split of a Hugging Face dataset to pack.")] = None,
    name: Name = None,
    description: Description = None,
    origin: Origin = None,
    licence: Licence = None,
    attribution: Attribution = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; one per core where left out.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an earlier packing left there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write WebDataset shards, their sizes and a datasheet from pictures and captions of any usual layout."""
    from mmbase.data.pack import pack as run
    from mmbase.data.pack_sources import SourceOptions

    config = _pack_config(
        picture={
            "size": size,
            "resize": resize,
            "format": image_format,
            "quality": quality,
            "min_side": min_side,
            "upright": upright,
        },
        shard_size=shard_size,
        shuffle=shuffle,
        seed=seed,
        dedupe=dedupe,
        splits=_shares(split or []),
        split_by=split_by,
        filters=filters or [],
        max_bad_share=max_bad_share,
        name=name,
        description=description or "",
        source=origin or "",
        licence=licence or "",
        attribution=attribution or "",
    )
    options = SourceOptions(kind, image_column, caption_column, template, image_root, subset)
    with _progress("packing", as_json) as told:
        result = run(source, output, config, options=options, workers=workers, restart=restart, progress=told)
    if as_json:
        typer.echo(json.dumps({**vars(result), "folder": str(result.folder)}, ensure_ascii=False, indent=2))
        return
    if result.complete_before:
        typer.echo(f"{output} is packed already; nothing to do (--restart packs anew)")
    elif result.resumed_at:
        typer.echo(f"went on after row {result.resumed_at:,}")
    for split_name, told_of in result.splits.items():
        where = Path(output) / split_name
        typer.echo(
            f"{where}: {told_of['samples']:,} pairs in {_shards(told_of['shards'])}, {told_of['bytes'] / 1e6:,.1f} MB"
        )
    for why, count in sorted(result.removed.items(), key=lambda item: -item[1]):
        typer.echo(f"  left out {count:,} of {result.rows:,} rows: {why}")
    if result.removed:
        typer.echo(f"  every row left out, with its reason: {Path(output) / 'rejected.jsonl'}")
    if not result.licence:
        for split_name in result.splits:
            where = Path(output) / split_name
            typer.echo(f"  the licence is not recorded: mmbase data card {where} --licence ... --source ...")
    first = next(iter(result.splits))
    typer.echo(f"train on it: mmbase train RECIPE data.shards={Path(output) / first}")


@app.command()
def card(
    shards: Shards,
    name: Name = None,
    description: Description = None,
    origin: Origin = None,
    licence: Licence = None,
    attribution: Attribution = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the datasheet; beside the shards where left out.")
    ] = None,
    caption_field: CaptionField = "caption",
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Write the datasheet of shards: source, licence, hashes, statistics; what it said of sources stays."""
    from mmbase.data.datasheet_scan import describe_shards, local_tars

    paths = local_tars(shards, "mmbase data card")
    given = {"name": name, "source": origin, "licence": licence, "attribution": attribution}
    folders = [output] if output else list(dict.fromkeys(path.parent for path in paths))
    with _progress("reading", as_json) as told:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            told(done, len(paths), 0)

        sheets = []
        for folder in folders:
            chosen = paths if output else [path for path in paths if path.parent == folder]
            sheets.append(
                describe_shards(
                    chosen,
                    folder,
                    given,
                    description=description,
                    caption_field=caption_field,
                    workers=workers,
                    step=step,
                )
            )
    if as_json:
        typer.echo(json.dumps([sheet.model_dump(mode="json") for sheet, _ in sheets], ensure_ascii=False, indent=2))
        return
    for folder, (sheet, scanned) in zip(folders, sheets):
        _say_card(folder, sheet, scanned)


def _say_card(folder: Path, sheet: Datasheet, scanned: Sequence[ScannedShard]) -> None:
    typer.echo(f"wrote the datasheet of {sheet.samples:,} pairs, digest {sheet.digest}, into {folder}")
    for source in sheet.sources:
        typer.echo(f"  {source.name}: licence {source.licence}" + (f", {source.source}" if source.source else ""))
    if any(source.licence == "unknown" for source in sheet.sources):
        typer.echo("  the licence is not recorded; add --licence, and --source and --attribution where you can")
    _say_faults(scanned)


@app.command()
def index(
    shards: Shards,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Write sizes.json and an index beside local shards, so that training starts at once on any machine."""
    from mmbase.data.datasheet_scan import index_shards, local_tars

    paths = local_tars(shards, "mmbase data index")
    with _progress("indexing", as_json) as told:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            told(done, len(paths), 0)

        scanned = index_shards(paths, workers=workers, step=step)
    if as_json:
        rows = [
            {"shard": str(s.path), "samples": s.facts.samples, "faults": s.faults, "damage": s.damage} for s in scanned
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    samples = sum(shard.facts.samples for shard in scanned)
    folders = ", ".join(str(folder) for folder in dict.fromkeys(path.parent for path in paths))
    typer.echo(f"indexed {_shards(len(paths))} with {samples:,} samples; wrote sizes.json and *.tar.index in {folders}")
    _say_faults(scanned)


def _say_faults(scanned: Sequence[ScannedShard], most: int = 10) -> None:
    bad = [shard for shard in scanned if shard.faults or shard.damage]
    for shard in bad[:most]:
        faults = [f"{count:,} samples: {why}" for why, count in shard.faults.items()]
        typer.echo(f"  {shard.path}: " + "; ".join([*([shard.damage] if shard.damage else []), *faults]))
    if len(bad) > most:
        typer.echo(f"  and {len(bad) - most:,} more shards with faults; --json lists all")


def _shards(count: int) -> str:
    return f"{count:,} shard" + "s" * (count != 1)


def _shares(given: Sequence[str]) -> dict[str, float]:
    """``val=0.05,test=0.05`` and repetitions of it."""
    shares: dict[str, float] = {}
    for part in (part for text in given for part in text.split(",") if part.strip()):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError as error:
            raise MmbaseError(f"--split {part!r} is no split; write for example --split val=0.05") from error
    return shares


def _pack_config(**values: Any) -> Any:
    """The packing's configuration; a mistake is one line that names the option."""
    from pydantic import ValidationError

    from mmbase.data.filters import parse_filter
    from mmbase.data.pack_config import PackConfig

    values["filters"] = [parse_filter(text) for text in values["filters"]]
    try:
        return PackConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][-1] if first["loc"][0] == "picture" else first["loc"][0]).replace("_", "-")
        option = {"splits": "split"}.get(option, option)
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise MmbaseError(f"--{option}: {message[0].lower()}{message[1:]}{shown}") from error


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on stderr, told how much is done; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, rate="")

        def told(done: int, total: int, kept: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

        yield told
