"""``mmbase data pack``: pairs of any source into WebDataset shards, deterministic and resumable.

One thread reads the rows in their order, several prepare the pictures, and one place takes the results in that same
order: it dedupes, filters, chooses the split and writes. So the shards' bytes do not depend on the number of threads.
The state is a position and the lengths of a few files; after a kill the files are cut back to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbase.data.datasheet import Datasheet, DataSource, ShardFacts, write_datasheet
from mmbase.data.filters import FieldFilters, find_field
from mmbase.data.index_store import write_index
from mmbase.data.pack_config import TRAIN, PackConfig
from mmbase.data.pack_pictures import Prepared, prepare_picture
from mmbase.data.pack_rows import described, order
from mmbase.data.pack_sources import Row, Source, SourceOptions, fingerprint, open_source
from mmbase.data.pack_state import PackState, Workspace
from mmbase.data.perceptual import SIGNATURE_BYTES, NearDuplicates
from mmbase.data.reasons import kind_of
from mmbase.data.shard_writer import ShardWriter
from mmbase.data.statistics import Statistics
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

_CHECKPOINT_SECONDS = 3.0
_JUDGED_FROM = 200
"""Rows seen before the share of bad ones is judged."""

Progress = Callable[[int, int, int], None]
"""Called with rows done, rows in all, pairs written."""


@dataclass
class PackResult:
    """What stands in the folder."""

    folder: Path
    splits: dict[str, dict[str, int]]
    """split (``""`` where there are none) -> samples, shards, bytes"""
    rows: int
    removed: dict[str, int]
    """reason -> rows left out"""
    licence: str
    resumed_at: int
    """rows that an earlier call had done"""
    complete_before: bool
    """nothing was left to do"""


def pack(
    source: str | Path,
    output: str | Path,
    config: PackConfig | None = None,
    *,
    options: SourceOptions | None = None,
    workers: int | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Write the pairs of ``source`` as shards, ``sizes.json`` and a datasheet into the folder ``output``.

    The same call goes on where an interrupted one stopped, and does nothing where one has ended. The bytes written
    depend on the source, ``config`` and the version of Pillow alone; only the indices, ``*.tar.index``, also know when
    their shard was written. With splits each has a folder of its own below ``output``. Rows left out are listed with
    their reasons in ``rejected.jsonl``.

    Args:
        source: a table, a folder of pictures, Parquet, or a Hugging Face dataset on disk; see pack_sources.py.
        output: the folder; it must be new, empty, or hold the same packing.
        config: what is written; None: pictures as they are.
        options: which columns, which kind of source; None: found by looking.
        workers: threads that prepare pictures; None: one per core.
        restart: throw away what an earlier call left in ``output``.
        progress: told how far it is.

    Raises:
        MmbaseError: a source that cannot be understood, too many bad rows, a folder with other content, a full disk.
    """
    config = config or PackConfig()
    opened = open_source(source, options or SourceOptions())
    identity = _identity(opened, config, options or SourceOptions())
    workspace = Workspace(Path(output), identity, restart=restart)
    if (done := workspace.finished()) is not None:
        return PackResult(**done, folder=Path(output), resumed_at=int(done["rows"]), complete_before=True)
    with workspace.locked() as state:
        packer = _Packer(opened, config, Path(output), workspace, state)
        try:
            packer.run(workers or os.cpu_count() or 1, progress)
            return packer.finish(identity)
        except OSError as error:
            reason = error.strerror or str(error)
            raise MmbaseError(
                f"cannot write to {str(output)!r}: {reason}; free space, then the same command goes on"
            ) from error
        finally:
            packer.close()


def _identity(source: Source, config: PackConfig, options: SourceOptions) -> dict[str, Any]:
    """What the shards' bytes depend on, by name, so that a difference can be named."""
    import PIL

    return {
        "source": fingerprint([source.fingerprint, len(source), options.template, options.subset]),
        "kind": source.kind,
        **config.settings(),
        "pillow": PIL.__version__,
        "layout": 1,
    }


class _Packer:
    """One packing under way."""

    def __init__(
        self, source: Source, config: PackConfig, output: Path, workspace: Workspace, state: PackState
    ) -> None:
        self.source, self.config, self.output, self.workspace, self.state = source, config, output, workspace, state
        self.filters = FieldFilters(config.filters) if config.filters else None
        self.shares = {TRAIN: 1 - sum(config.splits.values()), **config.splits} if config.splits else {"": 1.0}
        self.writers = {
            split: ShardWriter(
                output / split, workspace.folder / split, self._shard_size(share), state.writers.get(split)
            )
            for split, share in self.shares.items()
        }
        self.statistics = {
            split: Statistics.restored(state.statistics[split]) if split in state.statistics else Statistics()
            for split in self.shares
        }
        self.removed = Counter(state.removed)
        self.bad = state.bad
        self.position = self.resumed_at = state.position
        self.is_settled = True
        """no row is half taken, so that this is a state to go on from"""
        self.example = ""
        """a row left out, with its reason"""
        self.seen: set[bytes] = set()
        self.near = NearDuplicates()
        for record in workspace.seen_records(16 + (SIGNATURE_BYTES if config.dedupe == "near" else 0)):
            self._remember(record)
        self.checkpointed = time.monotonic()
        self._patience = _CHECKPOINT_SECONDS

    def _shard_size(self, share: float) -> int:
        return self.config.shard_size or max(100, min(10_000, math.ceil(len(self.source) * share / 64)))

    def run(self, workers: int, progress: Progress | None) -> None:
        """All rows that are left."""
        rows = order(self.source, self.config.seed, self.config.shuffle, self.position)
        pending: deque[tuple[int, Row | MmbaseError, Future[Prepared] | None]] = deque()
        with ThreadPoolExecutor(workers, "pack") as pool:
            try:
                for number in rows:
                    pending.append(self._submit(pool, number))
                    if len(pending) > 8 * workers:
                        self._take(*pending.popleft(), progress)
                while pending:
                    self._take(*pending.popleft(), progress)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                if self.is_settled:
                    with contextlib.suppress(OSError, MmbaseError):
                        self.checkpoint()
                raise
        self.checkpoint()

    def _submit(self, pool: ThreadPoolExecutor, number: int) -> tuple[int, Row | MmbaseError, Future[Prepared] | None]:
        try:
            row = self.source.read(number)
        except MmbaseError as error:
            return number, error, None
        near = self.config.dedupe == "near"
        return number, row, pool.submit(prepare_picture, row.image, self.config.picture, sign=near)

    def _take(
        self, number: int, row: Row | MmbaseError, result: Future[Prepared] | None, progress: Progress | None
    ) -> None:
        """The next row in order: written, or left out for a reason."""
        if result is not None:
            result.exception()  # waits; an interruption while waiting leaves all as it is
        self.is_settled = False
        if isinstance(row, MmbaseError) or result is None:
            self._reject(f"row {number}", str(row), bad=True)
        else:
            self._take_prepared(row, result)
        self.position += 1
        self.is_settled = True
        if self.bad > self.config.max_bad_share * self.position and self.position >= _JUDGED_FROM:
            self._refuse()
        if progress:
            progress(self.position, len(self.source), sum(map(len, self.writers.values())))
        if time.monotonic() - self.checkpointed > self._patience:
            self.checkpoint()

    def _take_prepared(self, row: Row, result: Future[Prepared]) -> None:
        try:
            picture = result.result()
        except MmbaseError as error:
            return self._reject(row.origin, str(error), bad=True)
        except MemoryError:
            return self._reject(row.origin, "the picture does not fit into memory", bad=True)
        captions = [" ".join(c.split()) for c in ([row.caption] if isinstance(row.caption, str) else row.caption)]
        captions = [caption for caption in captions if caption]
        if not captions:
            return self._reject(row.origin, "no caption", bad=True)
        fields = described(row, picture, captions)
        if self.filters is not None:
            found = fields | {"width": picture.original_width, "height": picture.original_height}
            if (why := self.filters.reason(found)) is not None:
                return self._reject(row.origin, why)
        try:
            split = self._split(picture, fields)
        except MmbaseError as error:
            return self._reject(row.origin, str(error), bad=True)
        if (why := self._duplicate(picture, captions)) is not None:
            return self._reject(row.origin, why)
        self._write(picture, captions, fields, split)

    def _duplicate(self, picture: Prepared, captions: list[str]) -> str | None:
        """Why this pair is there already; None: it is new, and remembered."""
        if self.config.dedupe == "none":
            return None
        token = picture.digest
        if self.config.dedupe == "pairs":
            token = hashlib.blake2b(token + "\0".join(captions).encode("utf-8", "replace"), digest_size=16).digest()
        if token in self.seen:
            return (
                "duplicate of an earlier pair" if self.config.dedupe == "pairs" else "duplicate of an earlier picture"
            )
        if picture.signature is not None:
            if self.near.find(picture.signature) is not None:
                return "looks like an earlier picture"
            token += picture.signature
        self._remember(token)
        self.workspace.remember(token)
        return None

    def _remember(self, record: bytes) -> None:
        self.seen.add(record[:16])
        if len(record) > 16:
            self.near.add(record[16:])

    def _write(self, picture: Prepared, captions: list[str], fields: dict[str, Any], split: str) -> None:
        writer = self.writers[split]
        members = {
            picture.extension: picture.data,
            "txt": captions[0].encode("utf-8", "replace"),
            "json": json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"),
        }
        writer.add(f"{len(writer):09d}", members)
        self.statistics[split].add(
            extension=picture.extension,
            size=len(picture.data),
            width=picture.width,
            height=picture.height,
            caption=captions[0],
            fields=fields,
        )

    def _split(self, picture: Prepared, fields: dict[str, Any]) -> str:
        if not self.config.splits:
            return ""
        token = picture.digest
        if self.config.split_by is not None:
            value = find_field(self.config.split_by, fields)
            if value is None:
                raise MmbaseError(f"no field {self.config.split_by} to split by (it has: {', '.join(fields)})")
            token = str(value).encode("utf-8", "replace")
        drawn = hashlib.blake2b(token, digest_size=8, key=self.config.seed.to_bytes(8, "big")).digest()
        place = int.from_bytes(drawn) / 2**64
        for split, share in self.config.splits.items():
            if place < share:
                return split
            place -= share
        return TRAIN

    def _reject(self, origin: str, reason: str, *, bad: bool = False) -> None:
        self.example = self.example or f"{origin}: {reason}"
        self.bad += bad
        self.removed[kind_of(reason) if bad else reason] += 1
        self.workspace.reject(origin, reason)

    def _refuse(self) -> None:
        top, count = self.removed.most_common(1)[0]
        raise MmbaseError(
            f"{self.bad:,} of the first {self.position:,} rows are bad, most ({count:,}): {top}{_hint(top)}; see "
            f"{str(self.workspace.rejected)!r}; mend the source and add --restart, or allow more with --max-bad-share"
        )

    def checkpoint(self) -> None:
        """Put everything so far on the disk, and how far it is."""
        begun = time.monotonic()
        self.workspace.keep(
            PackState(
                position=self.position,
                bad=self.bad,
                removed=dict(self.removed),
                writers={split: writer.checkpoint() for split, writer in self.writers.items()},
                statistics={split: statistics.state() for split, statistics in self.statistics.items()},
            )
        )
        self.checkpointed = time.monotonic()
        self._patience = max(_CHECKPOINT_SECONDS, 20 * (self.checkpointed - begun))

    def finish(self, identity: dict[str, Any]) -> PackResult:
        """Close the last shards; sizes, datasheets, and the mark that all is done."""
        if not any(map(len, self.writers.values())):
            reasons = ", ".join(f"{count:,} {why}" for why, count in self.removed.most_common(3))
            self.workspace.forget()
            raise MmbaseError(
                f"not one of {self.position:,} rows can be packed: {reasons}{_hint(reasons)}; for example "
                f"{self.example}"
            )
        info, config = self.source.info, self.config
        licence = config.licence or info.get("licence", "")
        origin = DataSource(
            name=config.name or info.get("name", "dataset"),
            source=config.source or info.get("source", ""),
            licence=licence or "unknown",
            attribution=config.attribution or info.get("attribution", ""),
        )
        splits: dict[str, dict[str, int]] = {}
        for split, writer in self.writers.items():
            writer.close_shard()
            told = {"samples": len(writer), "shards": len(writer.shards)}
            splits[split] = told | {"bytes": sum(shard["bytes"] for shard in writer.shards)}
            if not len(writer):
                continue
            sizes = {shard["name"]: shard["samples"] for shard in writer.shards}
            write_atomically(writer.folder / "sizes.json", json.dumps(sizes, indent=1) + "\n")
            sheet = Datasheet(
                name=origin.name + (f", {split}" if split else ""),
                description=config.description,
                sources=[origin],
                shards={s["name"]: ShardFacts.model_validate(s) for s in writer.shards},
                statistics=self.statistics[split].summary(),
                removed=dict(sorted(self.removed.items())),
                made_with={"mmbase data pack": _version(), **{k: v for k, v in identity.items() if k != "source"}},
            )
            write_datasheet(sheet, writer.folder)
            for shard in writer.shards:
                write_index(writer.folder / shard["name"])
        result = {
            "splits": splits,
            "rows": self.position,
            "removed": dict(sorted(self.removed.items())),
            "licence": licence,
        }
        self.workspace.finish(result)
        return PackResult(**result, folder=self.output, resumed_at=self.resumed_at, complete_before=False)

    def close(self) -> None:
        """Let go of the files."""
        for writer in self.writers.values():
            writer.abandon()


def _hint(reason: str) -> str:
    """What to try where files are not found."""
    return " (--image-root names the folder that image paths start from)" if "No such file" in reason else ""


def _version() -> str:
    try:
        return importlib.metadata.version("mmbase")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
