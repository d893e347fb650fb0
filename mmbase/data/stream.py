"""Shards to training batches. The whole state of a stream is one integer: the samples consumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from mmbase.data.captions import CaptionSampler
from mmbase.data.collate import Batch, Collator, generator, stack_pictures
from mmbase.data.config import DataConfig
from mmbase.data.image import decode_rgba
from mmbase.data.pictures import MemoryStream, load_pictures
from mmbase.data.shards import Sample, declared_sizes, expand_shards, read_samples, stable_id
from mmbase.data.tokenizer import Tokenizer
from mmbase.errors import MmbaseError

logger = logging.getLogger(__name__)


def open_stream(
    config: DataConfig, tokenizer: Tokenizer, *, batch_size: int, seed: int, start: int = 0
) -> MemoryStream | ShardStream:
    """The training stream of a configuration, from the sample ``start`` on.

    Raises:
        MmbaseError: shards that are missing or unreadable, a batch larger than the data.
    """
    shards = expand_shards(config.shards)
    in_memory = config.memory == "always" or (config.memory == "auto" and _fits_memory(shards, config))
    samples = list(read_samples(shards, config.caption_field)) if in_memory else []
    held_out: set[str] = set()
    if config.holdout:
        held_out = config.holdout.values(s.fields for s in samples or read_samples(shards, config.caption_field))
    collator = Collator(tokenizer, config.identity, config.keep_orientation)
    common = {"batch_size": batch_size, "seed": seed, "start": start}
    if config.sampling == "identities" and (not in_memory or config.identity is None):
        raise MmbaseError("data.sampling=identities needs data.identity and a dataset in memory (data.memory=always)")
    if not in_memory:
        return ShardStream(shards, config, collator, held_out=frozenset(held_out), **common)
    kept = (s for s in samples if not (config.holdout and config.holdout.covers(s.fields, held_out)))
    pictures = load_pictures(kept, config.source_size, config.errors)
    group_by = config.identity if config.sampling == "identities" else None
    return MemoryStream(pictures, CaptionSampler(config.captions), collator, group_by=group_by, **common)


def _fits_memory(shards: list[str], config: DataConfig) -> bool:
    sizes = declared_sizes(shards)
    return len(sizes) == len(shards) and sum(sizes.values()) * 4 * config.source_size**2 <= config.memory_bytes


class ShardStream(torch.utils.data.IterableDataset):
    """Batches streamed from shards: shard order by seed and epoch, then a shuffle buffer; each worker has its shards.

    The batches are the same for the same seed and number of workers, and after a resume at any batch: what came before
    is read again without being decoded.
    """

    def __init__(
        self,
        shards: list[str],
        config: DataConfig,
        collator: Collator,
        *,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        held_out: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        if config.workers > len(shards):
            raise MmbaseError(f"data.workers={config.workers} but only {len(shards)} shards; use fewer workers")
        self.shards, self.config, self.collator = shards, config, collator
        self.batch_size, self.seed, self.position, self.held_out = batch_size, seed, start, held_out
        self.captions = CaptionSampler(config.captions)

    def batches(self) -> Iterator[Batch]:
        """Batches from ``position`` on, decoded in ``config.workers`` processes."""
        if not self.config.workers:
            yield from self
            return
        yield from torch.utils.data.DataLoader(
            self, batch_size=None, num_workers=self.config.workers, persistent_workers=True, prefetch_factor=4
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        workers = worker.num_workers if worker else 1
        first = self.position // self.batch_size
        # A DataLoader asks its workers in turn, from worker 0; batch b belongs to stream b % workers.
        stream = ((worker.id if worker else 0) + first) % workers
        skip = (first - stream + workers - 1) // workers
        samples = self._samples(stream, workers)
        for _ in range(skip * self.batch_size):
            next(samples)
        for batch_index in range(skip * workers + stream, 1 << 62, workers):
            yield self._next_batch(samples, batch_index)

    def _samples(self, stream: int, workers: int) -> Iterator[Sample]:
        """Encoded samples without end, shuffled."""
        import webdataset

        for epoch in range(1 << 31):
            order = generator(self.seed, epoch).permutation(len(self.shards))
            shards = [self.shards[i] for i in order[stream::workers]]
            shuffle = webdataset.detshuffle(
                bufsize=self.config.shuffle_buffer,
                initial=self.config.shuffle_buffer,
                seed=stable_id(f"{self.seed} {stream}") % (1 << 31),
                epoch=epoch - 1,
            )
            count = 0
            for sample in shuffle.run(read_samples(shards, self.config.caption_field)):
                if not self._is_held_out(sample):
                    count += 1
                    yield sample
            if not count:
                raise MmbaseError(
                    f"the shards {shards} hold no image-caption pair to train on; check data.caption_field"
                )

    def _is_held_out(self, sample: Sample) -> bool:
        holdout = self.config.holdout
        return holdout is not None and holdout.covers(sample.fields, self.held_out)

    def _next_batch(self, samples: Iterator[Sample], batch_index: int) -> Batch:
        """The next ``batch_size`` samples, no more, so that a resume can count them; broken ones give way."""
        taken = [next(samples) for _ in range(self.batch_size)]
        rng = generator(self.seed, 2, batch_index)
        images: list[np.ndarray] = []
        kept: list[tuple[Sample, str]] = []
        for sample in taken:
            crop = (float(rng.uniform(*self.config.crop_scale)), float(rng.random()), float(rng.random()))
            text = self.captions(sample.fields, rng)
            try:
                images.append(decode_rgba(sample.image, self.config.source_size, crop=crop))
            except MmbaseError as error:
                if self.config.errors == "raise":
                    raise MmbaseError(f"sample {sample.key!r}: {error}") from error
                logger.warning("left out sample %s: %s", sample.key, error)
                continue
            kept.append((sample, text))
        if not kept:
            raise MmbaseError(
                f"none of {self.batch_size} pictures in a row could be decoded, the last: {taken[-1].key!r}"
            )
        rows = [i % len(kept) for i in range(self.batch_size)]
        return self.collator(
            stack_pictures(images, self.config.source_size)[rows],
            [kept[i][1] for i in rows],
            [kept[i][0].fields for i in rows],
            [kept[i][0].key for i in rows],
        )
