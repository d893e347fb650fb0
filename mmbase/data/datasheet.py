"""Datasheets: what shards hold, where it comes from, what one may do with it. ``datasheet.json`` beside the shards.

After T. Gebru et al., Datasheets for Datasets (2018), as far as a program can tell: composition, provenance, licences,
hashes, how it was made. What only people know (motivation, consent, bias) is asked for in the Markdown.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmbase.data.cache_config import CacheConfig
from mmbase.data.shard_list import local_path, scheme_of
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

FILE = "datasheet.json"
MARKDOWN = "DATASHEET.md"
UNKNOWN = "unknown"
_MARK = "<!-- from datasheet.json, by mmbase data -->"
"""In a DATASHEET.md that may be written over."""
_QUICK = CacheConfig(attempts=2, connect_timeout=10, first_byte_timeout=10, stall_timeout=10, total_timeout=20)


class DataSource(BaseModel):
    """One origin of the pairs."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(description="short")
    source: str = Field("", description="collection, package or address, with its version")
    licence: str = Field(UNKNOWN, description="SPDX identifier, or the licence's name")
    attribution: str = Field("", description="the line that the licence asks for")
    shards: list[str] = Field(default_factory=list, description="file names or patterns; empty: all")

    def covers(self, shard: str) -> bool:
        """Whether the shard of this file name holds pairs of this source."""
        return not self.shards or any(fnmatch.fnmatchcase(shard, pattern) for pattern in self.shards)


class ShardFacts(BaseModel):
    """One shard."""

    model_config = ConfigDict(extra="ignore")

    samples: int = Field(ge=0)
    bytes: int | None = None
    sha256: str | None = None


class Datasheet(BaseModel):
    """What ``datasheet.json`` holds."""

    model_config = ConfigDict(extra="ignore")

    format: int = Field(1, description="version of this layout")
    name: str = Field(description="of the dataset")
    description: str = Field("", description="a sentence or two")
    sources: list[DataSource] = Field(default_factory=list)
    shards: dict[str, ShardFacts] = Field(default_factory=dict, description="by file name")
    statistics: dict[str, Any] = Field(default_factory=dict, description="see Statistics.summary")
    removed: dict[str, int] = Field(default_factory=dict, description="rows left out when packing, by reason")
    made_with: dict[str, Any] = Field(default_factory=dict, description="program, versions and settings")

    @property
    def samples(self) -> int:
        """Pairs in all shards."""
        return sum(shard.samples for shard in self.shards.values())

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that tell the content: of the shards' hashes, or of the whole sheet without them."""
        hashes = {name: shard.sha256 for name, shard in self.shards.items()}
        told = hashes if hashes and all(hashes.values()) else self.model_dump(mode="json")
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def read_datasheet(folder: str | Path) -> Datasheet | None:
    """The datasheet of a folder of shards; None where it has none.

    Raises:
        MmbaseError: it is there and cannot be understood.
    """
    path = Path(folder) / FILE
    return parse_datasheet(path.read_bytes(), str(path)) if path.is_file() else None


def parse_datasheet(data: bytes, where: str) -> Datasheet:
    """The datasheet in ``data``; ``where`` names it in errors.

    Raises:
        MmbaseError: broken JSON, or fields of wrong types.
    """
    try:
        return Datasheet.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise MmbaseError(
            f"{where!r} is no datasheet: {key + ': ' if key else ''}{first['msg']}; mend it, or write it anew with "
            "mmbase data card"
        ) from error


def write_datasheet(sheet: Datasheet, folder: str | Path) -> list[Path]:
    """Write ``datasheet.json`` and ``DATASHEET.md``; what was written. The same sheet gives the same bytes.

    A ``DATASHEET.md`` that somebody wrote by hand stays as it is.
    """
    text = json.dumps(sheet.model_dump(mode="json"), indent=1, ensure_ascii=False)
    written = [write_atomically(Path(folder) / FILE, text + "\n")]
    markdown = Path(folder) / MARKDOWN
    if not markdown.exists() or _MARK in markdown.read_text(encoding="utf-8", errors="replace"):
        written.append(write_atomically(markdown, render_datasheet(sheet)))
    return written


# ------------------------------------------------------------------------------------------------- markdown


def render_datasheet(sheet: Datasheet) -> str:
    """The datasheet as Markdown."""
    statistics = sheet.statistics
    size = statistics.get("picture_bytes_total")
    plural = "" if len(sheet.shards) == 1 else "s"
    held = f"{sheet.samples:,} image-text pairs in {len(sheet.shards):,} shard{plural}"
    parts = [
        f"# {_cell(sheet.name)}",
        (sheet.description + "\n\n" if sheet.description else "")
        + held
        + (f", {size / 1e6:,.1f} MB of pictures." if size else ".")
        + " WebDataset tars: one picture, its caption (`.txt`) and its fields (`.json`) per key.",
        "## Sources and licences\n\n" + _sources(sheet),
    ]
    if numbers := [(n, statistics[n]) for n in _NUMBERS if n in statistics]:
        columns = ["", "smallest", "5 %", "median", "mean", "95 %", "largest"]
        rows = [
            [_NUMBERS[name], *(f"{told[key]:,g}" for key in ("min", "p5", "median", "mean", "p95", "max"))]
            for name, told in numbers
        ]
        parts.append("## Composition\n\n" + _table(columns, rows, right=1))
    for name, heading in _NAMES.items():
        if counts := statistics.get(name):
            shown = list(counts.items())[:20]
            rest = len(counts) - len(shown)
            rows = [[key, f"{count:,}"] for key, count in shown] + ([[f"and {rest} more", ""]] if rest else [])
            parts.append(_table([heading, "pairs"], rows, right=1))
    if sheet.removed:
        rows = [[why, f"{count:,}"] for why, count in sorted(sheet.removed.items(), key=lambda i: (-i[1], i[0]))]
        parts.append("## Left out\n\n" + _table(["why", "rows"], rows, right=1))
    if sheet.made_with:
        told = json.dumps(sheet.made_with, indent=1, ensure_ascii=False)
        parts.append(f"## How it was made\n\n```json\n{told}\n```")
    parts.append("## Shards\n\n" + _shards(sheet))
    parts.append(
        "## What a program cannot tell\n\nWhy the pairs were gathered, whether people shown in them agreed, who is "
        "over- or under-represented, and what they should not be used for: to be written by whoever publishes them."
    )
    return "\n\n".join([*parts, _MARK]) + "\n"


_NUMBERS = {
    "width": "width, pixels",
    "height": "height, pixels",
    "picture_bytes": "picture, bytes",
    "caption_characters": "caption, characters",
    "caption_words": "caption, words",
}
_NAMES = {"format": "format", "field": "field of the JSON", "language": "language", "licence": "licence, per pair"}


def _sources(sheet: Datasheet) -> str:
    if not sheet.sources:
        return f"Licence: **{UNKNOWN}**. Record it with `mmbase data card SHARDS --licence ... --source ...`."
    columns = ["name", "source", "licence", "attribution", "shards"]
    rows = [[s.name, s.source, s.licence, s.attribution, ", ".join(s.shards) or "all"] for s in sheet.sources]
    return _table(columns, rows)


def _shards(sheet: Datasheet, most: int = 50) -> str:
    rows = [
        [name, f"{shard.samples:,}", "" if shard.bytes is None else f"{shard.bytes:,}", shard.sha256 or ""]
        for name, shard in list(sheet.shards.items())[:most]
    ]
    table = _table(["file", "pairs", "bytes", "SHA-256"], rows)
    rest = len(sheet.shards) - len(rows)
    return table + (f"\n\nand {rest:,} more, listed in `{FILE}`" if rest else "") + f"\n\nDigest: `{sheet.digest}`"


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: int | None = None) -> str:
    rule = ["---:" if right is not None and index >= right else "---" for index in range(len(columns))]
    lines = [[_cell(c) for c in columns], rule, *([_cell(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ----------------------------------------------------------------------------------------------- provenance


def provenance_of(shards: Iterable[str]) -> list[dict[str, Any]]:
    """Where the pairs of these shards come from: one row per source, as the datasheets beside the shards tell.

    Args:
        shards: paths and URLs, as ``expand_shards`` gives them.

    Returns:
        Rows with ``name``, ``source``, ``licence``, ``attribution``, ``pictures`` (where the sheet tells) and
        ``datasheet`` (its digest). Shards without a datasheet share a row per folder whose licence is ``"unknown"``.

    Raises:
        MmbaseError: a datasheet that cannot be understood.
    """
    folders: dict[str, list[str]] = {}
    for shard in shards:
        folder, _, name = shard.partition("?")[0].rpartition("/")
        folders.setdefault(folder, []).append(name)
    rows: list[dict[str, Any]] = []
    for folder, names in folders.items():
        sheet = _sheet_beside(folder)
        found = _rows_of(sheet, names) if sheet else [_unknown(folder, names)]
        rows += [row for row in found if row not in rows]
    return rows


def _sheet_beside(folder: str) -> Datasheet | None:
    """The datasheet of a folder or address; an address that does not answer in time has none."""
    if (scheme := scheme_of(folder)) not in ("", "file"):
        if scheme == "pipe":
            return None
        from mmbase.data.remote import RemoteError, read_small

        try:
            data = read_small(f"{folder}/{FILE}", _QUICK, limit=1 << 26)
        except RemoteError:
            return None  # a server that does not answer must not keep a model card from being written
        return parse_datasheet(data, f"{folder}/{FILE}") if data is not None else None
    return read_datasheet(local_path(folder) if folder else ".")


def _rows_of(sheet: Datasheet, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for source in sheet.sources or [DataSource(name=sheet.name)]:
        covered = [name for name in names if source.covers(name)]
        if not covered:
            continue
        row: dict[str, Any] = source.model_dump(exclude={"shards"})
        known = [sheet.shards[name].samples for name in covered if name in sheet.shards]
        alone = all(sum(other.covers(name) for other in sheet.sources) <= 1 for name in covered)
        if alone and len(known) == len(covered):
            row["pictures"] = sum(known)
        rows.append(row | {"datasheet": sheet.digest})
    uncovered = [name for name in names if sheet.sources and not any(s.covers(name) for s in sheet.sources)]
    return rows + ([_unknown(sheet.name, uncovered)] if uncovered else [])


def _unknown(folder: str, names: Sequence[str]) -> dict[str, Any]:
    name = folder.rstrip("/").rpartition("/")[2] or "shards"
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return {"name": name, "source": shown, "licence": UNKNOWN, "attribution": ""}


def without_licence(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the sources whose licence is not known."""
    return [str(row["name"]) for row in rows if str(row.get("licence") or UNKNOWN).lower() == UNKNOWN]
