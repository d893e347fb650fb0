"""Text tables as sources of ``mmbase data pack``: CSV, TSV, JSON lines, a JSON list; and what all tables share.

Of a file only the places of its rows are held in memory, 8 bytes a row.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mmbase.data.pack_sources import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    Row,
    Source,
    SourceOptions,
    check_template,
    choose_column,
    fingerprint,
    word,
)
from mmbase.errors import MmbaseError

csv.field_size_limit(1 << 30)  # the default of 128 kB refuses a base64 picture


class Table:
    """What every table shares: which columns, and a record turned into a row."""

    kind = "table"
    window = 1

    def __init__(self, path: Path, options: SourceOptions, columns: Sequence[str]) -> None:
        self.path, self.options = path, options
        self.root = options.image_root or (path if path.is_dir() else path.parent)
        if not self.root.is_dir():
            raise MmbaseError(f"--image-root {str(self.root)!r} is no folder; name the one that image paths start from")
        where = repr(path.name)
        self.image = choose_column(options.image_column, columns, IMAGE_COLUMNS, "picture", "--image-column", where)
        self.caption = None
        if options.template is None or options.caption_column is not None:
            others = [column for column in columns if column != self.image]
            self.caption = choose_column(
                options.caption_column, others, CAPTION_COLUMNS, "caption", "--caption-column", where
            )
        check_template(options.template, dict.fromkeys(columns, ""))
        self.columns = list(columns)
        generic = path.stem.lower() in ("captions", "metadata", "annotations", "labels", "data", "train")
        self.info: dict[str, str] = {"name": path.resolve().parent.name if generic else path.resolve().stem}

    def row(self, record: Mapping[str, Any], origin: str) -> Row:
        """The row of a record.

        Raises:
            MmbaseError: no picture, or an address in its place.
        """
        fields = {str(k): v for k, v in record.items() if k != self.image and k is not None and v is not None}
        image = self._picture(record.get(self.image))
        if self.options.template is not None:
            caption: str | list[str] = word(self.options.template, dict.fromkeys(self.columns, "") | fields)
        else:
            caption = _caption(fields.pop(str(self.caption), None))
        return Row(origin, image, caption, fields)

    def _picture(self, value: Any) -> bytes | Path:
        if isinstance(value, Mapping):  # the struct that Hugging Face writes
            value = value.get("bytes") or value.get("path")
        if value is None or value == "" or value == b"":
            raise MmbaseError(f"the column {self.image!r} is empty")
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        text = str(value).strip()
        if text.startswith(("http://", "https://", "s3://", "gs://")):
            raise MmbaseError(
                f"the column {self.image!r} holds an address; download first, for example with img2dataset"
            )
        if text.startswith("data:") or (len(text) > 1024 and "." not in text):  # base64 has no dots, a file's name has
            encoded = text.partition("base64,")[2] if text.startswith("data:") else text
            try:
                return base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError) as error:
                raise MmbaseError(f"the column {self.image!r} holds broken base64") from error
        return self.root / text


def _caption(value: Any) -> str | list[str]:
    if isinstance(value, list | tuple):
        return [str(entry) for entry in value if entry is not None]
    return "" if value is None else str(value)


class _Lines(Table):
    """A text file whose rows are found by their place in it."""

    def __init__(
        self, path: Path, options: SourceOptions, columns: Sequence[str], starts: array[int], content: bytes
    ) -> None:
        super().__init__(path, options, columns)
        if not starts:
            raise MmbaseError(f"{str(path)!r} has no rows below its header; check the file")
        self._starts = starts
        self.sizes: Sequence[int] = [len(starts)]
        self.fingerprint = fingerprint([self.kind, content.hex(), self.image, self.caption])
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def _at(self, row: int) -> IO[bytes]:
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(self._starts[row])
        return self._file


class _Csv(_Lines):
    """CSV or TSV with a header line; quoted fields may hold line breaks."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        with path.open("rb") as file:
            head = file.read(1 << 16).decode("utf-8-sig", "replace")
            if not head.strip():
                raise MmbaseError(f"{str(path)!r} is empty; a table has a header line and one row per picture")
            self.delimiter = _delimiter(path, head.splitlines()[0])
            file.seek(0)
            content = hashlib.blake2b(digest_size=16)
            records = self._records(file, content.update)
            try:
                header, _ = next(records)
                starts = array("q", (start for record, start in records if record))
            except csv.Error as error:
                raise MmbaseError(f"{str(path)!r} is no valid CSV: {error}") from error
        self._header = [name.strip().removeprefix("\ufeff") for name in header]
        super().__init__(path, options, self._header, starts, content.digest())

    def _records(
        self, file: IO[bytes], met: Callable[[bytes], None] = lambda line: None
    ) -> Iterator[tuple[list[str], int]]:
        """Records with the place each starts at; the reader takes a line only when it needs one."""
        place = file.tell()

        def lines() -> Iterator[str]:
            nonlocal place
            while line := file.readline():
                place += len(line)
                met(line)
                yield line.decode("utf-8", "replace").replace("\0", "")

        reader = csv.reader(lines(), delimiter=self.delimiter)
        while True:
            start = place
            try:
                yield next(reader), start
            except StopIteration:
                return

    def read(self, row: int) -> Row:
        """Row ``row``, from the place it starts at."""
        try:
            record, _ = next(self._records(self._at(row)))
        except csv.Error as error:
            raise MmbaseError(f"broken CSV: {error}") from error
        if len(record) != len(self._header):
            raise MmbaseError(f"the row has {len(record)} columns, the header {len(self._header)}")
        return self.row(dict(zip(self._header, record)), f"{self.path.name}:{row + 2}")


def _delimiter(path: Path, header: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",\t;|", key=header.count)  # the first among equals is the comma


class _JsonLines(_Lines):
    """One JSON object per line."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        starts = array("q")
        columns: dict[str, None] = {}
        place = 0
        content = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            for line in file:
                content.update(line)
                if line.strip():
                    if len(starts) < 100:
                        columns |= dict.fromkeys(_json_object(line, f"{path.name}:{len(starts) + 1}"))
                    starts.append(place)
                place += len(line)
        if not starts:
            raise MmbaseError(f"{str(path)!r} is empty; write one JSON object per line")
        super().__init__(path, options, list(columns), starts, content.digest())

    def read(self, row: int) -> Row:
        """Row ``row``, from the place it starts at."""
        origin = f"{self.path.name}:{row + 1}"
        return self.row(_json_object(self._at(row).readline(), origin), origin)


def _json_object(line: bytes, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise MmbaseError(f"{origin} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise MmbaseError(f"{origin} is no JSON object but {type(record).__name__}")
    return record


class _JsonList(Table):
    """A JSON file that holds a list of objects; read whole."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        content = path.read_bytes()
        try:
            records = json.loads(content.decode("utf-8-sig"))
        except ValueError as error:
            raise MmbaseError(f"{str(path)!r} is not valid JSON: {error}; one object per line is a .jsonl") from error
        if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
            raise MmbaseError(f"{str(path)!r} must hold a list of objects, one per picture")
        super().__init__(path, options, list(dict.fromkeys(key for record in records[:100] for key in record)))
        self._records = records
        self.sizes: Sequence[int] = [len(records)]
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.fingerprint = fingerprint([self.kind, digest, self.image, self.caption])

    def __len__(self) -> int:
        return len(self._records)

    def read(self, row: int) -> Row:
        """Row ``row``."""
        return self.row(self._records[row], f"{self.path.name}:{row + 1}")


def open_table(path: Path, options: SourceOptions) -> Source:
    """A CSV, TSV, JSON-lines or JSON file as a source.

    Raises:
        MmbaseError: no such table, or columns that cannot be told.
    """
    if not path.is_file():
        raise MmbaseError(f"--kind table wants a .csv, .tsv, .jsonl or .json file, and {str(path)!r} is a folder")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _JsonLines(path, options)
    return _JsonList(path, options) if suffix == ".json" else _Csv(path, options)
