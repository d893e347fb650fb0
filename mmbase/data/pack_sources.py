"""Where ``mmbase data pack`` takes pairs from: what a path holds, and folders of pictures.

Tables are in pack_tables.py and pack_columnar.py, shards in pack_shards.py.

A source knows its rows by number. ``sizes`` are the rows of each piece that is cheap to read together and expensive to
jump between; a source that is read at any place for the same price is one piece.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from mmbase.data.shard_list import SHARD_SUFFIXES, scheme_of
from mmbase.errors import MmbaseError, nearest

Kind = Literal["table", "imagefolder", "textfiles", "parquet", "huggingface", "shards"]
KINDS: tuple[str, ...] = get_args(Kind)
PICTURE_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif",
        ".jp2", ".tga", ".ico",
    )
)  # fmt: skip
TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".jsonl", ".ndjson", ".json"))
PARQUET_SUFFIXES = frozenset((".parquet", ".pq"))
IMAGE_COLUMNS = (
    "image", "img", "image_path", "filepath", "file_path", "file_name", "filename", "path", "image_file", "file",
    "picture", "jpg", "png", "image_id",
)  # fmt: skip
CAPTION_COLUMNS = (
    "caption", "text", "captions", "title", "txt", "description", "sentence", "sentences", "alt_text", "alt", "prompt",
    "label", "labels", "class", "category",
)  # fmt: skip
_SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))


class Row(NamedTuple):
    """One pair of a source, not looked into yet."""

    origin: str
    """Where it comes from, for reports: ``cats/1.jpg``, ``captions.csv:17``."""
    image: bytes | Path
    """An image file's bytes, or its path."""
    caption: str | list[str]
    fields: dict[str, Any]
    """Further columns."""


@dataclass(frozen=True)
class SourceOptions:
    """What a user says about a source; ``None`` leaves it to be found."""

    kind: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    template: str | None = None
    """The caption of a picture known by its label: ``"a photo of a {label}"``; over all fields of the row."""
    image_root: Path | None = None
    subset: str | None = None
    """Of a Hugging Face dataset of several splits, the one to pack."""


class Source(Protocol):
    """Rows by number."""

    kind: str
    fingerprint: str
    """Equal for an unchanged source: packing goes on only on the same."""
    sizes: Sequence[int]
    window: int
    """How many pieces are shuffled together."""
    info: dict[str, str]
    """What the source says of itself: name, source, licence, attribution."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Row:
        """Row ``row``.

        Raises:
            MmbaseError: this row cannot be read; others may be.
        """
        ...


def open_source(path: str | Path, options: SourceOptions) -> Source:
    """The source that ``path`` holds.

    Raises:
        MmbaseError: nothing there, nothing that is known, columns that cannot be told, a missing package.
    """
    if options.kind == "shards" or _names_shards(str(path)):
        from mmbase.data.pack_shards import WebDataset

        return WebDataset(path, options)
    path = Path(path).expanduser()
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MmbaseError(f"there is no {str(path)!r}{nearest(path.name, beside) or '; check the path'}")
    if options.kind is not None and options.kind not in KINDS:
        raise MmbaseError(f"unknown kind {options.kind!r}{nearest(options.kind, KINDS)} (known: {', '.join(KINDS)})")
    kind, place = (options.kind, path) if options.kind else detect(path)
    if kind == "imagefolder":
        return ImageFolder(_folder(place, kind), options)
    if kind == "textfiles":
        return TextFiles(_folder(place, kind), options)
    from mmbase.data import pack_columnar, pack_tables

    if kind == "parquet":
        return pack_columnar.Parquet(place, options)
    if kind == "huggingface":
        return pack_columnar.HuggingFace(_folder(place, kind), options)
    return pack_tables.open_table(place, options)


def _names_shards(spec: str) -> bool:
    """Whether a specification is one of shards by its look: a URL, braces, a tar, a folder of tars."""
    if scheme_of(spec) not in ("", "file") or ("{" in spec and "}" in spec and not Path(spec).exists()):
        return True
    path = Path(spec).expanduser()
    if path.is_dir() and not (path / "dataset_info.json").exists():
        names = [entry.name for entry in itertools.islice(os.scandir(path), 1000)]
        return any(n.endswith(SHARD_SUFFIXES) for n in names) and not any(
            os.path.splitext(n)[1].lower() in PICTURE_SUFFIXES | PARQUET_SUFFIXES | {".csv", ".tsv", ".jsonl"}
            for n in names
            if n != "rejected.jsonl"
        )
    return path.is_file() and spec.endswith(SHARD_SUFFIXES)


def _folder(path: Path, kind: str) -> Path:
    if not path.is_dir():
        raise MmbaseError(f"--kind {kind} wants a folder, and {str(path)!r} is a file")
    return path


def detect(path: Path) -> tuple[Kind, Path]:
    """What lies at ``path`` and where exactly.

    Raises:
        MmbaseError: it cannot be told; says what would do.
    """
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in TABLE_SUFFIXES:
            return "table", path
        if suffix in PARQUET_SUFFIXES:
            return "parquet", path
        raise MmbaseError(
            f"cannot tell what {str(path)!r} is; give a folder, or a .csv, .tsv, .jsonl, .json or .parquet file"
        )
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        return "huggingface", path
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    if any(p.suffix.lower() in PARQUET_SUFFIXES for p in files):
        return "parquet", path
    pictured = {p.stem for p in files if p.suffix.lower() in PICTURE_SUFFIXES}  # a .json beside each is no table
    tables = [p for p in files if p.suffix.lower() in TABLE_SUFFIXES and p.stem not in pictured]
    if len(tables) == 1:
        return "table", tables[0]
    if tables:
        named = [p for p in tables if p.stem.lower() in ("metadata", "captions", "annotations", "labels")]
        if len(named) == 1:
            return "table", named[0]
        raise MmbaseError(
            f"{str(path)!r} holds several tables ({', '.join(p.name for p in tables[:5])}); name the one with the "
            f"captions, as in {str(tables[0])!r}"
        )
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return _detect_pictures(path, folders), path


def _detect_pictures(path: Path, folders: list[Path]) -> Kind:
    pictures, texts = 0, 0
    for name in _walk(path, limit=2000):
        suffix = os.path.splitext(name)[1].lower()
        pictures += suffix in PICTURE_SUFFIXES
        texts += suffix == ".txt"
        if suffix in PARQUET_SUFFIXES:
            raise MmbaseError(f"{str(path)!r} holds Parquet files further down ({name}); name their folder")
    if not pictures:
        raise MmbaseError(
            f"{str(path)!r} holds no pictures, table, shards, Parquet files or Hugging Face dataset; check the path"
        )
    if texts * 2 >= pictures:
        return "textfiles"
    if not folders:
        raise MmbaseError(
            f"{str(path)!r} holds pictures but no captions; add a captions.csv with columns file_name and caption, a "
            ".txt beside each picture, or one folder per class"
        )
    if all(p.name.lower() in _SPLIT_NAMES for p in folders):
        first = folders[0].name
        raise MmbaseError(
            f"{str(path)!r} holds the folders {', '.join(p.name for p in folders)}, which look like splits; pack each "
            f"by itself: mmbase data pack {path / first} OUT/{first}"
        )
    return "imagefolder"


def _walk(root: Path, limit: int | None = None) -> Iterator[str]:
    """Paths of the files below ``root``, relative, in an order that depends on the names alone."""
    count = 0
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in sorted(names):
            if not name.startswith("."):
                yield name if relative == "." else os.path.join(relative, name)
                count += 1
                if limit is not None and count >= limit:
                    return


def fingerprint(parts: Iterable[object]) -> str:
    """32 hexadecimal digits of anything that prints."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def word(template: str, fields: dict[str, Any]) -> str:
    """``template`` with the fields of a row in place of the braces.

    Raises:
        MmbaseError: a template that names a field the row lacks, or is none.
    """
    try:
        return template.format_map(fields)
    except KeyError as error:
        name = str(error.args[0])
        raise MmbaseError(
            f"--template {template!r} names {name!r}, which the rows lack{nearest(name, fields)} "
            f"(they have: {', '.join(fields)})"
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise MmbaseError(f"--template {template!r} is no template ({error}); write for example '{{label}}'") from error


def check_template(template: str | None, fields: dict[str, Any]) -> None:
    """Refuse a template that would fail on every row; ``fields`` are those of one of them."""
    if template is not None:
        if "{" not in template:
            raise MmbaseError(f"--template {template!r} names no field; write for example 'a photo of a {{label}}'")
        word(template, fields)


@dataclass
class _Folder:
    """Pictures below a folder, by path."""

    root: Path
    options: SourceOptions
    names: list[str] = field(default_factory=list)
    kind: str = ""
    window: int = 1

    def __post_init__(self) -> None:
        self.names = [n for n in _walk(self.root) if os.path.splitext(n)[1].lower() in PICTURE_SUFFIXES]
        if not self.names:
            raise MmbaseError(f"{str(self.root)!r} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        self.sizes: Sequence[int] = [len(self.names)]
        self.info: dict[str, str] = {"name": self.root.resolve().name}
        self.fingerprint = fingerprint([self.kind, *self.names])

    def __len__(self) -> int:
        return len(self.names)


class ImageFolder(_Folder):
    """One folder per class: ``tabby_cat/1.jpg`` has the caption ``tabby cat``, or the template's with that label."""

    def __init__(self, root: Path, options: SourceOptions) -> None:
        super().__init__(root, options, kind="imagefolder")
        check_template(options.template, {"label": "cat", "path": "cat/1.jpg"})

    def read(self, row: int) -> Row:  # noqa: D102
        name = self.names[row]
        folder = os.path.basename(os.path.dirname(name))
        if not folder:
            raise MmbaseError("the picture lies in no class folder")
        fields: dict[str, Any] = {"label": folder.replace("_", " ").strip(), "path": name}
        caption = word(self.options.template, fields) if self.options.template else fields["label"]
        return Row(name, self.root / name, caption, fields)


class TextFiles(_Folder):
    """A ``.txt`` with the caption, and perhaps a ``.json`` with further fields, beside each picture."""

    def __init__(self, root: Path, options: SourceOptions) -> None:
        super().__init__(root, options, kind="textfiles")

    def read(self, row: int) -> Row:  # noqa: D102
        import json

        name = self.names[row]
        path = self.root / name
        fields: dict[str, Any] = {"path": name}
        try:
            caption = path.with_suffix(".txt").read_bytes().decode("utf-8-sig", "replace")
        except OSError as error:
            raise MmbaseError(f"no caption file beside the picture: {error.strerror}") from error
        beside = path.with_suffix(".json")
        if beside.is_file():
            try:
                declared = json.loads(beside.read_bytes())
            except ValueError as error:
                raise MmbaseError(f"broken .json beside the picture: {error}") from error
            if isinstance(declared, dict):
                fields = declared | fields
        template = self.options.template
        return Row(name, path, word(template, fields | {"caption": caption}) if template else caption, fields)


def choose_column(
    given: str | None, columns: Sequence[str], usual: Sequence[str], what: str, option: str, where: str
) -> str:
    """The column a user named, or the first with a usual name.

    Raises:
        MmbaseError: there is none; lists the columns.
    """
    if given is not None:
        if given in columns:
            return given
        raise MmbaseError(
            f"{where} has no column {given!r}{nearest(given, columns)} (columns: {', '.join(columns) or 'none'})"
        )
    lowered = {column.lower().strip(): column for column in reversed(columns)}
    for name in usual:
        if name in lowered:
            return lowered[name]
    raise MmbaseError(
        f"cannot tell which column of {where} holds the {what}; name it with {option} "
        f"(columns: {', '.join(columns) or 'none'})"
    )
