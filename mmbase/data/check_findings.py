"""What the figures of a check mean for training, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from mmbase.data.check import CheckOptions, CheckReport, Finding
from mmbase.data.filters import USUAL_NAMES
from mmbase.data.samples import IMAGE_EXTENSIONS

_LEVELS = ("problem", "warning", "advice", "good")
_MOST_BAD = 0.1
"""Above it the loader stops: ``data.max_bad_share``."""


def judge(report: CheckReport, options: CheckOptions) -> list[Finding]:
    """Findings, the gravest first; one that all is well where there are none."""
    if not report.shards_opened:
        shard, reason = next(iter(report.shard_faults.items()), ("", "no time"))
        return [Finding("problem", "no shard can be read", f"{shard}: {reason}")]
    found = [
        *_shards(report),
        *_samples(report, options),
        *_captions(report, options),
        *_pictures(report, options),
        *_duplicates(report),
        *_parallel(report, options),
        *_filters(report),
        *_provenance(report),
    ]
    if not found:
        found = [Finding("good", "all well", "nothing to change")]
    return sorted(found, key=lambda finding: _LEVELS.index(finding.level))


def _shards(report: CheckReport) -> Iterator[Finding]:
    if report.shard_faults:
        share = len(report.shard_faults) / max(1, report.shards_opened)
        shard, reason = next(iter(report.shard_faults.items()))
        yield Finding(
            "problem" if share > _MOST_BAD else "warning",
            "damaged shards",
            f"{len(report.shard_faults):,} of {report.shards_opened:,} looked at, such as {shard}: {reason}. Fetch or "
            "pack them again; until then their lost samples are replaced by others",
        )
    if report.size_mismatches:
        shard, (declared, found) = next(iter(report.size_mismatches.items()))
        yield Finding(
            "problem" if any(d > f for d, f in report.size_mismatches.values()) else "warning",
            "wrong sizes",
            f"sizes.json or _stats.json is wrong for {len(report.size_mismatches):,} shards, such as {shard}: it says "
            f"{declared:,}, there are {found:,}. Write it anew: mmbase data index SHARDS",
        )
    if report.samples_from.startswith("estimated"):
        yield Finding(
            "advice",
            "sizes not recorded",
            "no sizes.json says how many samples each shard has, so that training begins with counting them. Write "
            "one: mmbase data index SHARDS",
        )


def _samples(report: CheckReport, options: CheckOptions) -> Iterator[Finding]:
    if not report.looked_at:
        yield Finding(
            "problem", "no samples", "the shards hold no samples: members must be named KEY.jpg, KEY.txt, ..."
        )
        return
    if not report.looked_at:
        return
    pictures = [name for name in report.members if name in IMAGE_EXTENSIONS]
    if not pictures:
        yield Finding(
            "problem",
            "no pictures",
            f"no member is a picture: found {', '.join(f'.{name}' for name in list(report.members)[:8])}; pictures are "
            f"{', '.join(f'.{name}' for name in IMAGE_EXTENSIONS)}",
        )
    if report.bad_count:
        low, high = report.bad_interval
        level = "problem" if report.bad_share > _MOST_BAD else "warning" if high > 0.02 else "advice"
        kind, count = next(iter(report.bad.items()))
        remedy = (
            f"training stops above {_MOST_BAD:.0%} (data.max_bad_share)"
            if level == "problem"
            else "training replaces each by the next good one and lists it in quarantine.jsonl"
        )
        yield Finding(
            level,
            "bad samples",
            f"{report.bad_share:.1%} ({low:.1%} to {high:.1%} of the whole), most: {kind} ({count:,}). {remedy}; "
            "mmbase data pack SHARDS OUT writes shards without them",
        )
    wanted = options.batch_size * options.ranks
    if report.samples is not None and report.samples < wanted:
        yield Finding(
            "warning",
            "too few samples",
            f"{report.samples:,} samples do not fill one batch of {options.batch_size:,} on {options.ranks:,} "
            f"rank{'s' * (options.ranks > 1)}; make the batch at most {max(1, report.samples // options.ranks):,}",
        )


def _captions(report: CheckReport, options: CheckOptions) -> Iterator[Finding]:
    lacking = sum(count for kind, count in report.bad.items() if kind.startswith("no caption"))
    if lacking > 0.5 * report.looked_at:
        usual = {"caption", *USUAL_NAMES["caption"], "title", "description", "alt", "prompt", "captions"}
        likely = [name for name in report.fields if name.lower() in usual] or list(report.fields)
        there = f"the JSON has {', '.join(list(report.fields)[:10])}" if report.fields else "there is no JSON either"
        remedy = (
            f"; try --caption-field {likely[0]} (data.caption_field={likely[0]})" if likely else "; add .txt members"
        )
        yield Finding("problem", "no captions", f"no .txt and no field {options.caption_field!r}; {there}{remedy}")
    good = report.statistics.get("samples", 0)
    if not good:
        return
    if report.tokens_cut > 0.05:
        yield Finding(
            "advice",
            "long captions",
            f"{report.tokens_cut:.0%} are longer than CLIP's 77 tokens and are cut (95 % have up to "
            f"{report.tokens['p95']:,.0f}); raise tokenizer.context_length, or add shorter captions to data.captions",
        )
    words = report.statistics["caption_words"]
    if words["median"] < 2:
        yield Finding(
            "advice",
            "captions of one word",
            "half of the captions are one word, as class names are; word them with data.captions, such as "
            "{template: 'a photo of a {caption}'}",
        )
    caption, count = report.top_captions[0]
    if count > 1 and count / good > 0.02:
        expected = (count / good) * options.batch_size * options.ranks
        yield Finding(
            "advice",
            "repeated captions",
            f"{count / good:.0%} are {caption[:50]!r}; {report.distinct_captions:,} of {good:,} differ. A batch holds "
            f"about {expected:,.0f} of them, which are never negatives of each other as long as data.identity is null",
        )


def _pictures(report: CheckReport, options: CheckOptions) -> Iterator[Finding]:
    if not report.shorter_side:
        return
    median, size = report.shorter_side["median"], options.image_size
    if median < 0.75 * size:
        yield Finding(
            "advice",
            "small pictures",
            f"half have a shorter side below {median:,.0f} pixels and would be enlarged to {size}; a model of "
            f"{max(16, int(median) // 16 * 16)} pixels loses nothing (--image-size)",
        )
    elif median > 2.5 * size:
        target = -(-int(1.15 * size) // 16) * 16
        saved = 1 - (target / median) ** 2
        yield Finding(
            "advice",
            "large pictures",
            f"half have a shorter side above {median:,.0f} pixels, of which {size} are seen: mmbase data pack SHARDS "
            f"OUT --size {target} takes about {saved:.0%} of the bytes away and most of the decoding time",
        )
    formats = report.statistics.get("format", {})
    slow = sum(count for name, count in formats.items() if name in ("png", "bmp", "tif", "tiff", "gif"))
    size_bytes = report.statistics["picture_bytes"]["median"]
    if slow > 0.5 * sum(formats.values()) and size_bytes > 100_000:
        yield Finding(
            "advice",
            "slow formats",
            f"most are {', '.join(list(formats)[:3])} of {size_bytes / 1e3:,.0f} kB; as JPEG (mmbase data pack SHARDS "
            "OUT --format jpg) they are several times smaller and faster to decode",
        )


def _duplicates(report: CheckReport) -> Iterator[Finding]:
    good = report.statistics.get("samples", 0)
    same = report.duplicates.pictures
    if good and same / good > 0.005:
        which = "" if report.is_complete else ", and more in the whole: only what was looked at is compared"
        pairs = f", {report.duplicates.pairs:,} of them with the same caption too" if report.duplicates.pairs else ""
        yield Finding(
            "advice",
            "duplicates",
            f"{same / good:.1%} of the pictures repeat an earlier one byte for byte{pairs}{which}. mmbase data pack "
            f"SHARDS OUT --dedupe {'pairs' if report.duplicates.pairs * 2 > same else 'images'} takes them out",
        )
    if good and report.duplicates.near / good > 0.02:
        examples = "; ".join(f"{a} and {b}" for a, b in report.duplicates.examples[:2])
        yield Finding(
            "advice",
            "near duplicates",
            f"{report.duplicates.near / good:.1%} look like an earlier one ({examples}). Where that is not meant, "
            "mmbase data pack SHARDS OUT --dedupe near takes them out",
        )


def _parallel(report: CheckReport, options: CheckOptions) -> Iterator[Finding]:
    processes = options.ranks * max(1, options.workers)
    if report.shards < processes:
        many = max(1, (report.samples or 0) // (2 * processes))
        yield Finding(
            "advice",
            "fewer shards than workers",
            f"{report.shards:,} shard{'s' * (report.shards > 1)} for {options.ranks:,} "
            f"rank{'s' * (options.ranks > 1)} x {options.workers:,} workers: mmbase reads by sample "
            f"and gives every worker its share, but OpenCLIP and the streaming mode (data without sizes) leave workers "
            f"idle; mmbase data pack SHARDS OUT --shard-size {many} makes enough",
        )
    if options.ranks * options.workers > report.cores and options.ranks == 1:
        yield Finding(
            "advice",
            "more workers than cores",
            f"{options.workers:,} workers on {report.cores:,} cores; more than {report.cores:,} gain nothing here",
        )
    if report.bytes is not None and report.shards >= 1000 and report.bytes / report.shards < 4e6:
        yield Finding(
            "advice",
            "small shards",
            f"{report.shards:,} shards of {report.bytes / report.shards / 1e6:.1f} MB: opening them costs more than "
            "reading; mmbase data pack SHARDS OUT makes larger ones",
        )


def _filters(report: CheckReport) -> Iterator[Finding]:
    if report.kept_by_filters == 0 and report.removed_by_filters:
        why, _ = next(iter(report.removed_by_filters.items()))
        there = f" (fields: {', '.join(list(report.fields)[:10])})" if report.fields else ""
        yield Finding("problem", "filters leave nothing", f"most: {why}{there}; loosen or mend them")


def _provenance(report: CheckReport) -> Iterator[Finding]:
    unknown = [str(row["name"]) for row in report.sources if row.get("licence", "unknown") == "unknown"]
    if unknown:
        where = f"{', '.join(unknown[:3])}{' and others' if len(unknown) > 3 else ''}"
        yield Finding(
            "advice",
            "licence not recorded",
            f"nothing beside the shards says where {where} come from and what is allowed; mmbase data card SHARDS "
            "--licence ... --source ... records it, and every model card then tells it",
        )
