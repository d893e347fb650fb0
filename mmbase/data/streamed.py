"""Rows of batches where sizes cannot be had: shards are streamed and shuffled in a buffer, as OpenCLIP does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmbase.data.cache_config import CacheConfig
from mmbase.data.draws import sample_keys
from mmbase.data.prepare import Fault, Report, Rows, RowWriter, Showing, Slab
from mmbase.data.samples import RawSample, SampleFault
from mmbase.data.streaming import stream_samples
from mmbase.errors import MmbaseError

_PATIENCE = 100
"""Bad samples in a row after which streaming stops."""


class StreamedPreparation:
    """Prepares rows from streams: each worker of each rank reads shards of its own.

    Args:
        urls: shards.
        showing: how samples are shown.
        seed: of the order, crops and wordings.
        start: samples consumed before; since no position can be found again, another start is another shuffle.
        rank: of this process.
        world_size: processes.
        shuffle_buffer: samples held to be shuffled.
        cache: time-outs and options of transports.
        stop_at_fault: raise the first fault.
    """

    in_turn = True
    lost = (
        "lost without sizes: the order depends on ranks and workers, a resume shuffles anew instead of going on, and "
        "an epoch is not exactly once through the data"
    )

    def __init__(
        self,
        urls: Sequence[str],
        showing: Showing,
        *,
        seed: int,
        start: int,
        rank: int,
        world_size: int,
        shuffle_buffer: int,
        cache: CacheConfig | None = None,
        stop_at_fault: bool = False,
    ) -> None:
        self.urls, self.showing, self.seed, self.start = list(urls), showing, seed, start
        self.rank, self.world_size, self.shuffle_buffer, self.cache = rank, world_size, shuffle_buffer, cache
        self.stop_at_fault = stop_at_fault

    def warm(self) -> None:
        """Load what all workers use: vocabularies."""
        self.showing.collator.tokenizer(["warm"])

    def open(self, worker: int, workers: int) -> None:
        """Begin the stream of this worker."""
        number = self.rank * workers + worker
        self._seed = int(sample_keys(self.seed, np.array([self.start]), np.array([0]))[0]) & (1 << 31) - 1
        self._place, self._taken = number, 0
        self._samples = self._without_end(worker, workers)

    def rows(self, start: int, stop: int, slab: Slab, report: Report) -> Rows:
        """Write the next ``stop - start`` good samples of this worker into ``slab`` and tell the rest.

        Raises:
            MmbaseError: a fault where faults stop, or nothing but faults.
        """
        work, in_a_row = RowWriter(self.showing, slab, report), 0
        while len(work.keys) < stop - start:
            try:
                sample = next(self._samples)
                if isinstance(sample, SampleFault):
                    raise sample
                self._taken += 1
                draw = sample_keys(self._seed, np.array([self._place]), np.array([self._taken]))
                work.add(lambda raw=sample: raw, 0, start + len(work.keys), int(draw[0]))
                in_a_row = 0
            except SampleFault as fault:
                in_a_row += 1
                if self.stop_at_fault:
                    raise MmbaseError(f"{fault}; repair or remove it, or set errors=replace") from fault
                if in_a_row >= _PATIENCE:
                    raise MmbaseError(f"{in_a_row} samples in a row cannot be used, the last: {fault}") from fault
                work.faults.append(Fault(fault.shard, fault.key, fault.offset, fault.reason))
        return work.finish()

    def _without_end(self, worker: int, workers: int) -> Iterator[RawSample | SampleFault]:
        for epoch in range(1 << 31):
            good, last = 0, None
            for sample in stream_samples(
                self.urls,
                seed=self._seed,
                epoch=epoch,
                rank=self.rank,
                world_size=self.world_size,
                worker=worker,
                workers=workers,
                shuffle_buffer=self.shuffle_buffer,
                cache=self.cache,
            ):
                if isinstance(sample, SampleFault):
                    last = sample
                else:
                    good += 1
                yield sample
            if not good:
                told = f": {last}" if last else ""
                raise MmbaseError(
                    f"the {len(self.urls)} shards gave no sample in a whole epoch{told}; check data.shards"
                )
