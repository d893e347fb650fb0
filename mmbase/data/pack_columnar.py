"""Parquet and Hugging Face datasets on disk as sources of ``mmbase data pack``.

Of Parquet a few row groups are in memory, a Hugging Face dataset is mapped by its own library. pyarrow and datasets are
imported when they are needed.
"""

from __future__ import annotations

import importlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmbase.data.pack_sources import PARQUET_SUFFIXES, Row, SourceOptions, fingerprint
from mmbase.data.pack_tables import Table
from mmbase.errors import MmbaseError, nearest

_WINDOW_BYTES = 512 << 20


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def _need(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MmbaseError(f"{what} needs {package.partition('.')[0]} ({error}); pip install 'mmbase[pack]'") from error


class Parquet(Table):
    """One Parquet file or all of a folder: pictures as bytes, as Hugging Face's struct of bytes and path, or as paths.

    A row group is read as a whole, so rows are shuffled among as many groups as fit 512 MB.
    """

    kind = "parquet"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        parquet = _need("pyarrow.parquet", "reading Parquet")
        paths = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in PARQUET_SUFFIXES)
        if not paths:
            raise MmbaseError(f"{str(path)!r} holds no .parquet files")
        self._files: list[Any] = []
        for file in paths:
            try:
                self._files.append(parquet.ParquetFile(file, memory_map=True))
            except (OSError, ValueError) as error:
                raise MmbaseError(f"{str(file)!r} is no readable Parquet file: {_first_line(error)}") from error
        columns = self._files[0].schema_arrow.names
        for file, opened in zip(paths, self._files):
            if missing := set(columns) - set(opened.schema_arrow.names):
                raise MmbaseError(f"{file.name!r} lacks the column {min(missing)!r} that {paths[0].name!r} has")
        super().__init__(path, options, columns)
        self._groups = [(f, g) for f, opened in enumerate(self._files) for g in range(opened.num_row_groups)]
        groups = [self._files[f].metadata.row_group(g) for f, g in self._groups]
        self.sizes: Sequence[int] = [group.num_rows for group in groups]
        if not sum(self.sizes):
            raise MmbaseError(f"{str(path)!r} has no rows")
        largest = max(group.total_byte_size for group in groups)
        self.window = max(1, min(len(groups), _WINDOW_BYTES // max(1, largest)))
        self._names = [file.name for file in paths]
        self._starts = array("q", [0])
        for size in self.sizes:
            self._starts.append(self._starts[-1] + size)
        self._loaded: OrderedDict[int, Any] = OrderedDict()
        self.fingerprint = fingerprint([self.kind, *map(_stamp, paths), self.image, self.caption])

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, row: int) -> Row:
        """Row ``row``; its row group is kept for the rows that follow."""
        group = bisect_right(self._starts, row) - 1
        within = row - self._starts[group]
        record = {name: column[within].as_py() for name, column in self._group(group).items()}
        file, number = self._groups[group]
        return self.row(record, f"{self._names[file]}:{number}:{within}")

    def _group(self, group: int) -> dict[str, Any]:
        if group in self._loaded:
            self._loaded.move_to_end(group)
            return self._loaded[group]
        while len(self._loaded) >= self.window:
            self._loaded.popitem(last=False)
        file, number = self._groups[group]
        try:
            table = self._files[file].read_row_group(number, columns=self.columns)
        except (OSError, ValueError) as error:
            raise MmbaseError(f"{self._names[file]} is damaged: {_first_line(error)}") from error
        self._loaded[group] = dict(zip(table.column_names, table.columns))
        return self._loaded[group]


class HuggingFace(Table):
    """A dataset that ``save_to_disk`` of the ``datasets`` library wrote; class labels are given by their names."""

    kind = "huggingface"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        datasets = _need("datasets", "reading a Hugging Face dataset")
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # the library raises kinds of its own, pyarrow's and OSError
            raise MmbaseError(f"{str(path)!r} is no readable Hugging Face dataset: {_first_line(error)}") from error
        if isinstance(loaded, dict):
            loaded = _one_split(loaded, options.subset, path)
        elif options.subset is not None:
            raise MmbaseError(f"--subset {options.subset!r}: the dataset at {str(path)!r} has no splits; leave it out")
        if not len(loaded):
            raise MmbaseError(f"the dataset at {str(path)!r} has no rows")
        columns = list(loaded.column_names)
        pictures = [name for name, kind in loaded.features.items() if isinstance(kind, datasets.Image)]
        for name in pictures:
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
        if options.image_column is None and len(pictures) == 1:
            options = replace(options, image_column=pictures[0])
        super().__init__(path, options, columns)
        self._labels = {n: k.names for n, k in loaded.features.items() if isinstance(k, datasets.ClassLabel)}
        self._data = loaded.with_format(None)
        self.sizes: Sequence[int] = [len(loaded)]
        stored = sorted(p for p in path.rglob("*") if p.suffix in (".arrow", ".json"))
        self.fingerprint = fingerprint([self.kind, options.subset, *map(_stamp, stored), self.image, self.caption])
        self.info |= _said_by(loaded.info)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, row: int) -> Row:
        """Row ``row``."""
        record = dict(self._data[row])
        for name, names in self._labels.items():
            value = record.get(name)
            if isinstance(value, int) and 0 <= value < len(names):
                record[name] = names[value].replace("_", " ")
        return self.row(record, f"row {row}")


def _one_split(loaded: Mapping[str, Any], subset: str | None, path: Path) -> Any:
    names = ", ".join(loaded)
    if subset is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if subset is None:
        raise MmbaseError(f"the dataset at {str(path)!r} has the splits {names}; choose one with --subset")
    if subset not in loaded:
        raise MmbaseError(f"there is no split {subset!r}{nearest(subset, loaded)} at {str(path)!r} (splits: {names})")
    return loaded[subset]


def _said_by(info: Any) -> dict[str, str]:
    """Name, licence, address and citation that a dataset carries."""
    said = {
        "name": getattr(info, "dataset_name", None),
        "licence": getattr(info, "license", None),
        "source": getattr(info, "homepage", None),
        "attribution": " ".join(str(getattr(info, "citation", None) or "").split()),
    }
    return {key: str(value) for key, value in said.items() if value}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
