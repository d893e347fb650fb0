"""Samples of shards read from end to end, as OpenCLIP reads them: for shards whose sizes cannot be had.

webdataset's own parts read the tars, group their members and shuffle; the bytes come through our transports, so that a
command or server that stalls is told, and tried again where nothing was given out yet.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmbase.data.cache_config import CacheConfig
from mmbase.data.remote import Patience, chunks, source_of
from mmbase.data.samples import RawSample, SampleFault
from mmbase.data.shard_list import scheme_of

SHARDS_SHUFFLED = 2000
"""Length of the buffer in which the list of shards is shuffled, OpenCLIP's."""


def stream_samples(
    urls: Sequence[str],
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    worker: int,
    workers: int,
    shuffle_buffer: int,
    cache: CacheConfig | None = None,
) -> Iterator[RawSample | SampleFault]:
    """One epoch of one worker: its share of the shuffled shards, their samples shuffled in a buffer.

    Args:
        urls: shards.
        seed: of both shuffles.
        epoch: another epoch is another order.
        rank: of this process.
        world_size: processes.
        worker: number of this worker.
        workers: workers per process.
        shuffle_buffer: samples held.
        cache: time-outs and options of transports.

    Yields:
        Samples; a :class:`SampleFault` for a shard that cannot be read on, whose rest is passed over.
    """
    import webdataset

    shuffled = webdataset.detshuffle(SHARDS_SHUFFLED, SHARDS_SHUFFLED, seed, epoch - 1).run(iter(urls))
    place, places = rank * workers + worker, world_size * workers
    # With fewer shards than readers some would have nothing to read: then all read all, shuffled apart.
    mine = (url for number, url in enumerate(shuffled) if len(urls) < places or number % places == place)
    samples = (sample for url in mine for sample in _of_shard(url, cache or CacheConfig()))
    mixed = webdataset.detshuffle(shuffle_buffer, min(shuffle_buffer, 1000), seed + 1 + place, epoch - 1)
    yield from mixed.run(samples)


def _of_shard(url: str, config: CacheConfig) -> Iterator[RawSample | SampleFault]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with _opened(url, config) as file:
            members = tar_file_expander(iter([{"url": url, "stream": file}]))
            for sample in group_by_keys(members):
                content = {name: data for name, data in sample.items() if not name.startswith("__")}
                yield RawSample(sample["__key__"], content, url, 0)
    except Exception as error:  # tarfile, decompressors and transports raise kinds of their own
        reason = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
        yield SampleFault(url, "", 0, f"the shard cannot be read on: {reason}")


def _opened(url: str, config: CacheConfig) -> Any:
    """A shard as an open file, decompressed."""
    if scheme_of(url):
        patience = Patience(config, repr(url), config.total_timeout)
        raw: Any = io.BufferedReader(_Chunks(chunks(source_of(url, config), patience)), 1 << 20)
    else:
        raw = Path(url).open("rb")  # noqa: SIM115  (the caller closes it)
    return gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw


class _Chunks(io.RawIOBase):
    """A readable file of what an iterator gives."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self.source, self.rest = source, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            chunk = next(self.source, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count
