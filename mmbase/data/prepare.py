"""Positions of the order to rows of a batch: read, decode, crop, word, tokenise. Workers run it.

A sample that cannot be used gives way to the next good one of a sequence that follows from (seed, epoch, sample): first
among the samples read together with it, then among all. So batches stay full, and the same sample takes its place
whoever meets it.

Letters: n rows, H height, W width, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from mmbase.data.captions import CaptionSampler
from mmbase.data.collate import Collator
from mmbase.data.decode import covering_box, decode_training, random_box
from mmbase.data.draws import CROP, REPLACEMENT, WORDS, KeyedGenerator, sample_keys
from mmbase.data.image import PreprocessConfig, eval_transform
from mmbase.data.order import Order
from mmbase.data.samples import RawSample, SampleFault, fields_of, image_of
from mmbase.data.shards import Shards
from mmbase.errors import MmbaseError

STAGES = ("read", "decode", "tokenise", "collate")
"""What a worker does with samples; ``decode`` holds crop and resize as well, ``collate`` all that is left."""

IDLE = len(STAGES)
"""Reported instead of a stage by a worker that waits for work."""

NEAR, ANYWHERE = 16, 48
"""How many samples are tried in place of a bad one: of its window first, then of all."""

Report = Callable[[int, int, int], None]
"""Told before each step of a worker: index into :data:`STAGES`, shard, row."""


class Slab(NamedTuple):
    """Where rows are written."""

    image: np.ndarray
    """uint8 [n, 3, H, W], which lies as [n, H, W, 3]"""
    alpha: np.ndarray | None
    """uint8 [n, H, W]; None where transparency is not kept"""
    text: np.ndarray
    """int64 [n, T]"""


class Fault(NamedTuple):
    """A sample that was not used, as quarantine.jsonl tells it."""

    shard: str
    key: str
    offset: int
    reason: str


class Rows(NamedTuple):
    """What is told of rows beside their pixels and tokens; fewer than asked for only where faults leave gaps."""

    keys: list[str]
    caption_id: np.ndarray
    may_flip: np.ndarray
    draw: np.ndarray
    transparent: bool
    """whether any row has alpha below 255"""
    faults: list[Fault]
    seconds: dict[str, float]


@dataclass
class Showing:
    """How a sample is shown."""

    captions: CaptionSampler
    collator: Collator
    height_width: tuple[int, int]
    caption_field: str = "caption"
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """share of the area of a random crop"""
    crop_ratio: tuple[float, float] | None = None
    """width over height of a random crop; None: those of the result"""
    alpha: Literal["keep", "drop", "white", "black"] = "keep"
    exact: bool = False
    """decode in full and resize with Pillow, slower"""
    exif: bool = False
    """turn pictures as their camera noted"""
    evaluation: PreprocessConfig | None = None
    """set: the evaluation transform instead of a random crop, and the first wording instead of a drawn one"""
    _crop: KeyedGenerator = field(default_factory=KeyedGenerator)
    _words: KeyedGenerator = field(default_factory=KeyedGenerator)

    def pixels(self, data: bytes, key: int) -> np.ndarray:
        """uint8 ``[3 or 4, H, W]``. Raises :class:`MmbaseError` for a bad picture."""
        if self.evaluation:
            return eval_transform(data, self.evaluation)
        box = None
        if self.crop_ratio is not None:
            box = random_box(self._crop.at(key, CROP), self.crop_scale, self.crop_ratio)
        elif self.crop_scale != (1.0, 1.0):
            aspect = self.height_width[1] / self.height_width[0]
            box = covering_box(self._crop.at(key, CROP), self.crop_scale, aspect)
        picture = decode_training(data, self.height_width, box=box, fast=not self.exact, exif=self.exif)
        return picture if self.alpha == "keep" or len(picture) == 3 else _without_alpha(picture, self.alpha)

    def fields(self, raw: RawSample) -> dict[str, Any]:
        """What a sample's text members say, with its caption as ``caption``. Raises :class:`SampleFault`."""
        fields, name = fields_of(raw), self.caption_field
        if "txt" not in raw.members and name != "caption":
            fields["caption"] = fields.get(name)
        if fields.get("caption") is None and self.captions.needs_caption:
            raise SampleFault(raw.shard, raw.key, raw.offset, f"no caption: neither .txt nor the field {name!r}")
        return fields

    def wording(self, fields: dict[str, Any], key: int) -> str:
        """The text of a sample. Raises :class:`MmbaseError` where no template fits."""
        return self.captions(fields, self._words.at(0 if self.evaluation else key, WORDS))


class Preparation:
    """Prepares the rows of any positions; what comes out depends on the positions alone.

    Args:
        shards: where samples are read.
        order: which sample stands at which position.
        showing: how samples are shown.
        seed: of crops, wordings and replacements.
        replace: False leaves gaps where samples are bad, instead of filling them with others.
        stop_at_fault: raise the first fault.
    """

    in_turn = False
    """whether pieces of work must go to workers in a fixed turn"""

    def __init__(
        self,
        shards: Shards,
        order: Order,
        showing: Showing,
        seed: int,
        *,
        replace: bool = True,
        stop_at_fault: bool = False,
    ) -> None:
        self.shards, self.order, self.showing, self.seed = shards, order, showing, seed
        self.replace, self.stop_at_fault = replace, stop_at_fault
        self.first_sample = np.concatenate([[0], np.cumsum(shards.sizes)])

    def warm(self) -> None:
        """Load what all workers use: vocabularies."""
        self.showing.collator.tokenizer(["warm"])

    def open(self, worker: int, workers: int) -> None:
        """Called once in the process that prepares; a preparation by position needs nothing."""

    def rows(self, start: int, stop: int, slab: Slab, report: Report) -> Rows:
        """Write the rows of positions ``start`` to ``stop`` into ``slab`` and tell the rest.

        Raises:
            MmbaseError: a fault where faults stop, or no good sample was found in place of a bad one.
        """
        places = self.order.span(start, stop)
        samples = self.first_sample[places.shard] + places.row
        draw = sample_keys(self.seed, places.epoch, samples)
        work = RowWriter(self.showing, slab, report)
        for epoch, shard, row, key in zip(*(column.tolist() for column in (*places, draw))):
            self._fill(work, epoch, shard, row, key)
        return work.finish()

    def _fill(self, work: RowWriter, epoch: int, shard: int, row: int, key: int) -> None:
        """One row: the sample itself, or the first good one in its place."""
        for near_shard, near_row in self._candidates(epoch, shard, row, key):
            try:
                work.add(lambda s=near_shard, r=near_row: self.shards.read(s, r), near_shard, near_row, key)
                return
            except SampleFault as fault:
                if self.stop_at_fault:
                    raise MmbaseError(f"{fault}; repair or remove it, or set errors=replace") from fault
                work.faults.append(Fault(fault.shard, fault.key, fault.offset, fault.reason))
        if self.replace:
            raise MmbaseError(
                f"{1 + NEAR + ANYWHERE} samples in a row cannot be used, the last: {SampleFault(*work.faults[-1])}; "
                "check the shards with `mmbase data check`"
            )

    def _candidates(self, epoch: int, shard: int, row: int, key: int) -> Iterator[tuple[int, int]]:
        yield shard, row
        if not self.replace:
            return
        picks = KeyedGenerator().at(key, REPLACEMENT).bit_generator.random_raw(NEAR + ANYWHERE) >> np.uint64(1)
        for wide, some in ((False, picks[:NEAR]), (True, picks[NEAR:])):
            places = self.order.neighbours(epoch, shard, some.astype(np.int64), wide=wide)
            yield from zip(places.shard.tolist(), places.row.tolist())


class RowWriter:
    """Writes samples one after the other into a slab, timing each stage."""

    def __init__(self, showing: Showing, slab: Slab, report: Report) -> None:
        self.showing, self.slab, self.report = showing, slab, report
        self.keys: list[str] = []
        self.texts: list[str] = []
        self.fields: list[dict[str, Any]] = []
        self.draw: list[int] = []
        self.faults: list[Fault] = []
        self.transparent = False
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._place, self._stage, self._since = (0, 0), "collate", time.perf_counter()

    def add(self, read: Callable[[], RawSample], shard: int, row: int, key: int) -> None:
        """The next row.

        Raises:
            SampleFault: the sample cannot be used; nothing was added.
        """
        self._place = shard, row
        self._begin("read")
        raw = read()
        fields = self.showing.fields(raw)
        image = image_of(raw)
        self._begin("decode")
        try:
            text = self.showing.wording(fields, key)
            picture = self.showing.pixels(image, key)
        except MmbaseError as error:
            raise SampleFault(raw.shard, raw.key, raw.offset, str(error)) from None
        self._begin("collate")
        place = len(self.keys)
        self.slab.image[place] = picture[:3]
        if self.slab.alpha is not None:
            self.slab.alpha[place] = picture[3] if len(picture) == 4 else 255
            self.transparent |= len(picture) == 4
        self.keys.append(raw.key)
        self.texts.append(text)
        self.fields.append(fields)
        self.draw.append(key)

    def finish(self) -> Rows:
        """All rows added, tokenised."""
        self._begin("tokenise")
        arrays = self.showing.collator(self.texts, self.fields)
        self._begin("collate")
        self.slab.text[: len(self.texts)] = arrays["text"]
        self._begin("collate")
        draw = np.array(self.draw, np.int64)
        return Rows(
            self.keys, arrays["caption_id"], arrays["may_flip"], draw, self.transparent, self.faults, self.seconds
        )

    def _begin(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
        self.report(STAGES.index(stage), *self._place)


def _without_alpha(picture: np.ndarray, alpha: str) -> np.ndarray:
    """uint8 ``[3, H, W]`` of ``[4, H, W]``: transparency dropped, or the picture put on white or black."""
    if alpha == "drop":
        return picture[:3]
    cover = picture[3].astype(np.uint16)
    mixed = picture[:3] * cover + (255 if alpha == "white" else 0) * (255 - cover)
    return ((mixed + 127) // 255).astype(np.uint8)
