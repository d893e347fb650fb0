"""A check's report for people: rich tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmbase.data.check import CheckReport

_STYLES = {"problem": "bold red", "warning": "yellow", "advice": "cyan", "good": "green"}
_QUANTILES = ("min", "p5", "median", "mean", "p95", "max")


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print everything found, the findings last: they are what stays on the screen."""
    console = console or Console()
    _print_overview(report, console)
    good = report.statistics.get("samples", 0)
    if report.members:
        _print_counts(console, "members", report.members, report.looked_at)
    if report.fields:
        _print_fields(console, report)
    if good:
        _print_numbers(console, report)
    if report.bad:
        table = _table("bad samples", "reason", "samples", "share", "for example")
        for kind, count in list(report.bad.items())[:10]:
            _add(table, kind, f"{count:,}", f"{count / report.looked_at:.2%}", _cut(report.bad_examples[kind], 90))
        console.print(table)
    if report.kept_by_filters is not None and good:
        table = _table("filters", "what they do", "samples", "share")
        for why, count in [("kept", report.kept_by_filters), *report.removed_by_filters.items()]:
            _add(table, why, f"{count:,}", f"{count / good:.1%}")
        console.print(table)
    if report.sources:
        table = _table("sources", "name", "licence", "source")
        for row in report.sources[:8]:
            _add(table, str(row["name"]), str(row["licence"]), _cut(str(row.get("source", "")), 70))
        console.print(table)
    console.print()
    for finding in report.findings:
        line = Text.assemble(
            (f"{finding.level:<8}", _STYLES[finding.level]),
            "  ",
            (finding.subject, "bold"),
            f": {_shown(finding.text)}",
        )
        console.print(line, soft_wrap=not console.is_terminal)


def _print_overview(report: CheckReport, console: Console) -> None:
    """The lines above the tables."""
    size = "" if report.bytes is None else f", {_bytes(report.bytes)}"
    samples = "unknown" if report.samples is None else f"{report.samples:,} ({report.samples_from})"
    per_shard = report.samples_per_shard
    spread = f", {per_shard['min']:,.0f} to {per_shard['max']:,.0f} a shard" if per_shard else ""
    which = "all of them" if report.is_complete else f"from {report.shards_opened:,} shards, drawn at random"
    lines = [
        f"shards      {report.shards:,}{size}",
        f"samples     {samples}{spread}",
        f"looked at   {report.looked_at:,}, {which}, in {report.seconds:.1f} s",
    ]
    if report.decode_per_second:
        everything = ""
        if report.samples:
            hours = report.samples / report.decode_per_second / 3600
            everything = f"; all of it: {hours:,.1f} core hours an epoch" if hours > 0.1 else ""
        lines.append(f"decoding    {report.decode_per_second:,.0f} pictures/s on one core{everything}")
    good = report.statistics.get("samples", 0)
    if good:
        same = report.duplicates
        lines.append(
            f"duplicates  {same.pictures:,} equal pictures ({same.pairs:,} with equal captions), {same.near:,} that "
            f"look alike, among {good:,}"
        )
        lines.append(f"captions    {report.distinct_captions:,} distinct among {good:,}")
    if report.looked_at:
        low, high = report.bad_interval
        share = f"{report.bad_share:.2%}" + ("" if report.is_complete else f", 95 % interval {low:.2%} to {high:.2%}")
        lines.append(f"bad         {report.bad_count:,} samples: {share}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _print_counts(console: Console, title: str, counts: Mapping[str, int], total: int) -> None:
    shown = "  ".join(f".{name} {count / total:.1%}" for name, count in list(counts.items())[:12])
    console.print(Text(_shown(f"{title:<11} {shown}")), soft_wrap=True)


def _print_fields(console: Console, report: CheckReport) -> None:
    table = _table("fields", "name", "share", "for example")
    for name, count in list(report.fields.items())[:20]:
        _add(table, _cut(name, 30), f"{count / report.looked_at:.1%}", report.examples.get(name, ""))
    if len(report.fields) > 20:
        _add(table, f"and {len(report.fields) - 20} more", "", "")
    console.print(table)


def _print_numbers(console: Console, report: CheckReport) -> None:
    rows: Sequence[tuple[str, Mapping[str, Any]]] = [
        ("width, px", report.statistics["width"]),
        ("height, px", report.statistics["height"]),
        ("picture, bytes", report.statistics["picture_bytes"]),
        ("caption, characters", report.statistics["caption_characters"]),
        ("caption, words", report.statistics["caption_words"]),
        ("caption, CLIP tokens", report.tokens),
    ]
    table = _table("numbers", "", "smallest", "5 %", "median", "mean", "95 %", "largest")
    for name, told in rows:
        _add(table, name, *(f"{told[key]:,.0f}" if key != "mean" else f"{told[key]:,.1f}" for key in _QUANTILES))
    console.print(table)
    formats = report.statistics.get("format", {})
    console.print(Text("formats     " + "  ".join(f"{name} {count:,}" for name, count in formats.items())))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        is_number = column in ("samples", "share", "smallest", "5 %", "median", "mean", "95 %", "largest")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=number == 0)
    return table


def _add(table: Table, *cells: str) -> None:
    """A row of plain text: what a dataset says is no markup."""
    table.add_row(*(Text(_shown(cell)) for cell in cells))


def _shown(text: str) -> str:
    """Text as a terminal takes it: no control character moves its cursor, no half of a character stops the output."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
