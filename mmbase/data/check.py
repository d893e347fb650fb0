"""``mmbase data check``: looks at a sample of any dataset for some seconds and reports what it found.

Measured here; judged in check_findings.py, printed in check_report.py.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image

from mmbase.data.cache_config import CacheConfig
from mmbase.data.check_sample import Sampler
from mmbase.data.filters import FieldFilters, FilterConfig, find_field
from mmbase.data.perceptual import NearDuplicates, signature
from mmbase.data.reasons import kind_of
from mmbase.data.remote import RemoteError
from mmbase.data.samples import RawSample, SampleFault, fields_of, image_of
from mmbase.data.shard_list import expand_shards, local_path, scheme_of
from mmbase.data.sizes import declared_sizes
from mmbase.data.statistics import Statistics, quantiles
from mmbase.errors import MmbaseError

_TIMED = 256
"""Samples decoded in one thread, to measure the speed of a core."""
_TOKENISED = 4096
_CONTEXT = 77
_MOST_ASKED = 100
_EXAMPLE_CHARACTERS = 60


@dataclass(frozen=True)
class CheckOptions:
    """What the dataset is wanted for."""

    seconds: float = 8.0
    ranks: int = 1
    workers: int = 2
    batch_size: int = 256
    """per rank"""
    image_size: int = 224
    caption_field: str = "caption"
    filters: Sequence[FilterConfig] = ()
    seed: int = 0


@dataclass(frozen=True)
class Finding:
    """One judgement."""

    level: str
    """``problem`` (training will fail or be wrong), ``warning``, ``advice`` or ``good``"""
    subject: str
    text: str
    """what is so, and what to change"""


@dataclass
class Duplicates:
    """Of the samples looked at, how many repeat an earlier one."""

    pictures: int = 0
    """equal bytes"""
    pairs: int = 0
    """equal bytes and equal caption"""
    near: int = 0
    """other bytes, but looks the same"""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """keys of some that look the same"""


@dataclass
class CheckReport:
    """What was found."""

    shards: int = 0
    shards_opened: int = 0
    shard_faults: dict[str, str] = field(default_factory=dict)
    """shard -> what is wrong with it as a whole"""
    bytes: int | None = None
    """of all shards, where they are local"""
    samples: int | None = None
    """of all shards; None: cannot be told"""
    samples_from: str = ""
    size_mismatches: dict[str, tuple[int, int]] = field(default_factory=dict)
    """shard -> declared and found"""
    samples_per_shard: dict[str, float] = field(default_factory=dict)
    looked_at: int = 0
    is_complete: bool = False
    seconds: float = 0.0
    members: dict[str, int] = field(default_factory=dict)
    """extension -> samples that have it"""
    fields: dict[str, int] = field(default_factory=dict)
    """JSON field -> samples that have it"""
    examples: dict[str, str] = field(default_factory=dict)
    """JSON field -> one value"""
    bad: dict[str, int] = field(default_factory=dict)
    """kind of reason -> samples"""
    bad_examples: dict[str, str] = field(default_factory=dict)
    """kind of reason -> one of them, in full"""
    statistics: dict[str, Any] = field(default_factory=dict)
    """see Statistics.summary: of the good samples"""
    shorter_side: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    tokens_cut: float = 0.0
    """share of the captions longer than CLIP's 77 tokens"""
    distinct_captions: int = 0
    top_captions: list[tuple[str, int]] = field(default_factory=list)
    decode_per_second: float | None = None
    """pictures per second and core, decoded as for training"""
    cores: int = 1
    duplicates: Duplicates = field(default_factory=Duplicates)
    kept_by_filters: int | None = None
    removed_by_filters: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    """provenance: see datasheet.provenance_of"""
    findings: list[Finding] = field(default_factory=list)

    @property
    def bad_count(self) -> int:
        """Bad samples among those looked at."""
        return sum(self.bad.values())

    @property
    def bad_share(self) -> float:
        """Share of bad samples."""
        return self.bad_count / self.looked_at if self.looked_at else 0.0

    @property
    def bad_interval(self) -> tuple[float, float]:
        """95 % interval of the share in the whole dataset (E. B. Wilson, 1927); the share itself if all was seen."""
        if self.is_complete or not self.looked_at:
            return self.bad_share, self.bad_share
        n, p, z = self.looked_at, self.bad_share, 1.96
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the shares that follow."""
        return asdict(self) | {"bad_share": self.bad_share, "bad_interval": list(self.bad_interval)}


class _Looked(NamedTuple):
    """One sample, looked at in a thread."""

    raw: RawSample
    fault: str | None
    fields: dict[str, Any]
    caption: str
    extension: str
    size: int
    width: int
    height: int
    digest: bytes
    signature: bytes
    seconds: float


def check_shards(spec: str | Sequence[str], options: CheckOptions | None = None) -> CheckReport:
    """Look at shards for ``options.seconds`` and report.

    Raises:
        MmbaseError: shards that are not there; anything wrong inside them is in the report.
    """
    from mmbase.data.check_findings import judge
    from mmbase.data.datasheet import provenance_of

    options = options or CheckOptions()
    urls = expand_shards(spec)
    report = CheckReport(shards=len(urls), cores=len(os.sched_getaffinity(0)))
    _, restore = _decoder(options.image_size)  # loading the decoder is not the dataset's time
    try:
        with Sampler(urls, options.seconds, options.seed) as sampler:
            sampler.open()
            _Looking(report, options).at(sampler)
            _describe_shards(report, sampler)
            report.seconds = time.monotonic() - sampler.started
    finally:
        restore()
    if report.shards_opened:  # a server that is gone would be waited for once more
        report.sources = provenance_of(urls)
    named = shlex.join([spec] if isinstance(spec, str) else spec)
    report.findings = [replace(f, text=f.text.replace("SHARDS", named)) for f in judge(report, options)]
    return report


def _describe_shards(report: CheckReport, sampler: Sampler) -> None:
    """Numbers of samples and bytes, declared or estimated, and shards with faults."""
    report.shards_opened, report.is_complete = len(sampler.opened), sampler.is_complete
    report.shard_faults = {failed.url: failed.reason for failed in sampler.failed}
    report.shard_faults |= {shard.url: shard.damage for shard in sampler.opened if shard.damage}
    urls = sampler.urls
    if all(scheme_of(url) in ("", "file") for url in urls):
        report.bytes = sum(path.stat().st_size for url in urls if (path := local_path(url)).exists())
    declared = _declared(urls)
    found = {shard.url: len(shard.index) for shard in sampler.opened if not shard.is_partial}
    report.size_mismatches = {
        url: (declared[url], count) for url, count in found.items() if url in declared and declared[url] != count
    }
    known = declared | found
    counts = [known[url] for url in urls if url in known]
    if counts:
        report.samples_per_shard = quantiles(Counter(counts))
    if len(counts) == len(urls):
        report.samples, report.samples_from = sum(counts), "counted" if len(found) == len(urls) else "declared"
    elif counts:
        report.samples = round(sum(counts) / len(counts) * len(urls))
        report.samples_from = f"estimated from {len(counts):,} shards"


def _declared(urls: list[str]) -> dict[str, int]:
    """Sizes that files beside the shards tell; of many remote shards none, since each may be asked for on its own."""
    if len(urls) > _MOST_ASKED:
        urls = [url for url in urls if scheme_of(url) in ("", "file")]
    quick = CacheConfig(attempts=1, connect_timeout=5, first_byte_timeout=5, stall_timeout=5, total_timeout=10)
    try:
        return declared_sizes(urls, quick)
    except RemoteError:
        return {}


class _Looking:
    """Goes through samples and fills the report."""

    def __init__(self, report: CheckReport, options: CheckOptions) -> None:
        self.report, self.options = report, options
        self.statistics = Statistics()
        self.sides = Counter[int]()
        self.members, self.fields, self.bad = Counter[str](), Counter[str](), Counter[str]()
        self.captions = Counter[str]()
        self.pictures: dict[bytes, str] = {}
        self.pairs: set[tuple[bytes, str]] = set()
        self.near, self.near_keys = NearDuplicates(), list[str]()
        self.filters = FieldFilters(options.filters) if options.filters else None
        self.removed = Counter[str]()
        self.kept = 0

    def at(self, sampler: Sampler) -> None:
        """Look at what the sampler gives: first in one thread, to time a core, then in all."""
        samples = iter(sampler)
        decode, _ = _decoder(self.options.image_size)
        spent, timed = 0.0, 0
        for sample in islice(samples, _TIMED):
            looked = self._take(self._look(sample, decode))
            if looked is not None:
                spent, timed = spent + looked.seconds, timed + 1
        if timed:
            self.report.decode_per_second = timed / max(spent, 1e-9)
        with ThreadPoolExecutor(self.report.cores, "look") as pool:
            while block := list(islice(samples, 16 * self.report.cores)):
                for result in pool.map(lambda sample: self._look(sample, decode), block):
                    self._take(result)
        self._finish()

    def _look(self, sample: RawSample | SampleFault, decode: Any) -> _Looked | SampleFault:
        if isinstance(sample, SampleFault):
            return sample
        fields: dict[str, Any] = {}
        fault, caption, extension, size = None, "", "", (0, 0)
        data, mark, seconds = b"", b"", 0.0
        try:
            fields = fields_of(sample)
            data = image_of(sample)
            extension = next(name for name, member in sample.members.items() if member is data)
            if self.options.caption_field not in fields:
                raise MmbaseError(f"no caption: neither .txt nor the field {self.options.caption_field!r}")
            caption = _text(fields[self.options.caption_field])
            if not caption.strip():
                raise MmbaseError("the caption is empty")
            begun = time.perf_counter()
            decode(data)
            seconds = time.perf_counter() - begun
            size, mark = _glance(data)
        except SampleFault as error:
            fault = error.reason
        except MmbaseError as error:
            fault = str(error)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return _Looked(sample, fault, fields, caption, extension, len(data), *size, digest, mark, seconds)

    def _take(self, looked: _Looked | SampleFault) -> _Looked | None:
        """Count one sample; None where it is bad."""
        self.report.looked_at += 1
        if isinstance(looked, SampleFault):
            self._fault(looked.shard, looked.key, looked.reason)
            return None
        self.members.update(looked.raw.members.keys())
        self.fields.update(looked.fields.keys())
        for name, value in looked.fields.items():
            if name not in self.report.examples and value not in (None, "", []):
                shown = " ".join(str(value).split())
                self.report.examples[name] = shown[:_EXAMPLE_CHARACTERS] + "…" * (len(shown) > _EXAMPLE_CHARACTERS)
        if looked.fault is not None:
            self._fault(looked.raw.shard, looked.raw.key, looked.fault)
            return None
        self._count(looked)
        return looked

    def _count(self, looked: _Looked) -> None:
        self.statistics.add(
            extension=looked.extension,
            size=looked.size,
            width=looked.width,
            height=looked.height,
            caption=looked.caption,
            fields=looked.fields,
        )
        self.sides[min(looked.width, looked.height)] += 1
        self.captions[looked.caption] += 1
        self._compare(looked)
        if self.filters is not None:
            own = {name: find_field(name, looked.fields) for name in ("width", "height")}
            sizes = {k: v for k, v in (("width", looked.width), ("height", looked.height)) if own[k] is None}
            why = self.filters.reason(looked.fields | sizes)
            self.kept += why is None
            if why is not None:
                self.removed[why] += 1

    def _compare(self, looked: _Looked) -> None:
        duplicates = self.report.duplicates
        if looked.digest in self.pictures:
            duplicates.pictures += 1
            duplicates.pairs += (looked.digest, looked.caption) in self.pairs
        else:
            self.pictures[looked.digest] = looked.raw.key
            earlier = self.near.find(looked.signature)
            if earlier is not None:
                duplicates.near += 1
                if len(duplicates.examples) < 3:
                    duplicates.examples.append((self.near_keys[earlier], looked.raw.key))
            self.near.add(looked.signature)
            self.near_keys.append(looked.raw.key)
        self.pairs.add((looked.digest, looked.caption))

    def _fault(self, shard: str, key: str, reason: str) -> None:
        kind = kind_of(reason)
        self.bad[kind] += 1
        self.report.bad_examples.setdefault(kind, f"{key} of {shard}: {reason}")

    def _finish(self) -> None:
        report = self.report
        report.members, report.fields = dict(self.members.most_common()), dict(self.fields.most_common())
        report.bad = dict(self.bad.most_common())
        report.statistics = self.statistics.summary() if self.statistics.samples else {}
        if self.sides:
            report.shorter_side = quantiles(self.sides)
        report.distinct_captions = len(self.captions)
        report.top_captions = self.captions.most_common(3)
        if self.captions:
            lengths = _token_counts(islice(self.captions, _TOKENISED))
            report.tokens = quantiles(Counter(lengths))
            report.tokens_cut = sum(length > _CONTEXT for length in lengths) / len(lengths)
        if self.filters is not None:
            report.kept_by_filters, report.removed_by_filters = self.kept, dict(self.removed.most_common())


def _text(value: Any) -> str:
    """A caption as text: of a list the first, of null nothing."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _decoder(size: int) -> tuple[Any, Any]:
    """The training decode for a side, and what gives torch its threads back."""
    import torch

    from mmbase.data.decode import decode_training

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the speed of one core is measured
    return lambda data: decode_training(data, (size, size)), lambda: torch.set_num_threads(threads)


def _glance(data: bytes) -> tuple[tuple[int, int], bytes]:
    """Size and signature of a picture that decodes; a JPEG is decoded at a fraction of its size for it."""
    with Image.open(io.BytesIO(data)) as image:
        size = image.size
        image.draft("RGB", (96, 96))
        image.load()
        return size, signature(image)


def _token_counts(captions: Iterable[str]) -> list[int]:
    """Tokens of CLIP's vocabulary, start and end included."""
    from mmbase.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("clip")
    return [len(tokenizer.encode(caption)) + 2 for caption in captions]
