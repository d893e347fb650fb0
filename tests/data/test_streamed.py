"""Shards without sizes: streamed as OpenCLIP does, full batches all the same, and the banner says what is lost."""

import gzip
from itertools import islice

import pytest

from mmbase.data import loader
from mmbase.data.cache_config import CacheConfig
from mmbase.data.samples import RawSample, SampleFault
from mmbase.data.streaming import stream_samples
from mmbase.errors import MmbaseError

from .consume import rows_of
from .little_shards import TOKENIZER, write_shards

SIZES = [9, 12, 7, 10]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("streamed"), SIZES)
    zipped = folder / "003.tar"
    zipped.with_suffix(".tar.gz").write_bytes(gzip.compress(zipped.read_bytes()))
    return [f"pipe:cat {folder / name}" for name in ("000.tar", "001.tar", "002.tar", "003.tar.gz")]


def streamed(urls, **options):
    plan = {"seed": 1, "epoch": 0, "rank": 0, "world_size": 1, "worker": 0, "workers": 1, "shuffle_buffer": 20}
    plan["cache"] = CacheConfig(attempts=1)
    return list(stream_samples(urls, **plan | options))


def test_an_epoch_is_shared_by_workers_and_ranks(pipes):
    whole = [sample.key for sample in streamed(pipes)]
    assert sorted(whole) == [f"{i:05d}" for i in range(sum(SIZES))] != whole
    assert whole == [sample.key for sample in streamed(pipes)] != [sample.key for sample in streamed(pipes, epoch=1)]
    parts = [streamed(pipes, rank=r, world_size=2, worker=w, workers=2) for r in range(2) for w in range(2)]
    assert sorted(sample.key for part in parts for sample in part) == sorted(whole)
    more = [streamed(pipes, worker=w, workers=5) for w in range(5)]  # more readers than shards: all read all
    assert all(len(part) == len(whole) for part in more)


def test_a_shard_that_breaks_off_is_one_fault(pipes, tmp_path):
    path = pipes[1].partition("cat ")[2]
    samples = streamed([pipes[0], f"pipe:head -c 9000 {path}", f"pipe:cat {tmp_path / 'absent'}"])
    keys = {sample.key for sample in samples if isinstance(sample, RawSample)}
    faults = [sample for sample in samples if isinstance(sample, SampleFault)]
    assert {f"{i:05d}" for i in range(9)} <= keys and len(faults) == 2
    assert all("the shard cannot be read on" in fault.reason for fault in faults)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_full_and_the_banner_says_what_is_lost(pipes, workers):
    with loader(pipes, tokenizer=TOKENIZER, image_size=16, batch_size=8, workers=workers, shuffle_buffer=10) as stream:
        described = "\n".join(stream.describe())
        assert "streamed from 4 shards" in described and "lost without sizes" in described and stream.samples is None
        rows = [row for batch in islice(stream, 12) for row in rows_of(batch)]
        assert stream.position == 96
    assert {key for key, _ in rows} == {f"{i:05d}" for i in range(sum(SIZES))}
    assert len({digest for _, digest in rows}) == len(rows)


def test_what_needs_sizes_is_refused(pipes):
    for options in ({"train": False}, {"filters": ["number>=4"]}):
        with pytest.raises(MmbaseError, match="need them"):
            loader(pipes, tokenizer=TOKENIZER, batch_size=4, **options)


def test_nothing_but_faults_ends(tmp_path):
    options = {"tokenizer": TOKENIZER, "batch_size": 4, "cache": {"attempts": 1}}
    with (
        loader([f"pipe:cat {tmp_path / 'no'}"], **options) as stream,
        pytest.raises(MmbaseError, match="gave no sample"),
    ):
        next(stream)
