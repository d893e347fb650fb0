"""Shards as a source of ``mmbase data pack``: to resize, dedupe, filter, split or re-shard what is packed already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmbase.data.datasheet import provenance_of
from mmbase.data.pack_sources import Row, SourceOptions, fingerprint, word
from mmbase.data.samples import SampleFault, fields_of, image_of
from mmbase.data.shards import Shards
from mmbase.errors import MmbaseError

_WINDOW = 16
_INTERNAL = ("width", "height", "origin")


class WebDataset:
    """Local or remote shards; fields of the JSON stay, the caption is ``--caption-column`` or ``.txt``."""

    kind = "shards"

    def __init__(self, spec: str | Path, options: SourceOptions) -> None:
        self.options = options
        self.shards = Shards.open(str(spec))
        self.sizes: Sequence[int] = [int(size) for size in self.shards.sizes]
        self.window = min(_WINDOW, len(self.sizes)) or 1
        self._ends = self.shards.sizes.cumsum()
        known = [row for row in provenance_of(self.shards.urls) if row["licence"] != "unknown"]
        self.info: dict[str, str] = {"name": Path(str(spec)).resolve().stem}
        if len(known) == 1:
            self.info |= {key: str(known[0][key]) for key in ("name", "source", "licence", "attribution")}
        elif known:
            self.info["licence"] = ", ".join(dict.fromkeys(str(row["licence"]) for row in known))
            self.info["source"] = "; ".join(str(row["source"]) for row in known if row["source"])
            self.info["attribution"] = " ".join(str(row["attribution"]) for row in known if row["attribution"])
        stamps = [
            (Path(url).stat().st_size, Path(url).stat().st_mtime_ns) if Path(url).is_file() else url
            for url in self.shards.urls
        ]
        self.fingerprint = fingerprint([self.kind, options.caption_column, *self.shards.urls, *stamps, *self.sizes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, row: int) -> Row:
        """Row ``row``.

        Raises:
            MmbaseError: a sample that cannot be had.
        """
        shard = int(self._ends.searchsorted(row, side="right"))
        try:
            raw = self.shards.read(shard, row - int(self._ends[shard] - self.shards.sizes[shard]))
            fields = fields_of(raw)
            image = image_of(raw)
        except SampleFault as fault:
            raise MmbaseError(fault.reason) from fault
        column = self.options.caption_column or "caption"
        caption = fields.pop(column, "")
        several = fields.pop("captions", None)
        if isinstance(several, list) and several and str(several[0]) == str(caption):
            caption = several
        elif several is not None:
            fields["captions"] = several
        if self.options.template is not None:
            caption = word(self.options.template, fields | {"caption": caption})
        for name in _INTERNAL:
            fields.pop(name, None)
        texts = [str(entry) for entry in caption] if isinstance(caption, list) else str(caption)
        return Row(f"{Path(raw.shard).name}:{raw.key}", image, texts, fields)
