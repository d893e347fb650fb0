"""Shards, captions and streams: what comes out, in which order, and that a resume changes nothing."""

import io
import json
import tarfile
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from mmbase.data.captions import CaptionSampler, CaptionTemplate
from mmbase.data.config import DataConfig
from mmbase.data.loading import open_stream
from mmbase.data.shards import Holdout, declared_sizes, expand_shards, read_samples, stable_id
from mmbase.data.tokenizer import train_tokenizer
from mmbase.errors import MmbaseError


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def picture(value, size=(20, 12)):
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Four shards of eight pairs; concept = number modulo 16, so that each stands twice."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for i in range(shard * 8, shard * 8 + 8):
                fields = {"caption": f"thing {i}", "concept": str(i % 16), "group": str(i % 2), "tags": ["a", "b", "c"]}
                add(tar, f"{i:03d}.png", picture(i))
                add(tar, f"{i:03d}.json", json.dumps(fields).encode())
    return tmp_path


TOKENIZER = train_tokenizer([f"thing {i}" for i in range(40)], 280, context_length=12)


def stream(folder, **options):
    start, batch_size, seed = options.pop("start", 0), options.pop("batch_size", 4), options.pop("seed", 0)
    config = DataConfig(shards=str(folder), **{"source_size": 8, "shuffle_buffer": 10, **options})
    return open_stream(config, TOKENIZER, batch_size=batch_size, seed=seed, start=start)


def same(one, other):
    return one["key"] == other["key"] and all(
        torch.equal(one[name], other[name]) for name in ("image", "text", "caption_id", "may_flip")
    )


def test_expand_shards(shards):
    names = [str(shards / f"part-{i}.tar") for i in range(4)]
    assert expand_shards(str(shards)) == names
    assert expand_shards(str(shards / "part-{0..2}.tar")) == names[:3]
    assert expand_shards([names[1], "https://host/x-{00..01}.tar"]) == [
        names[1],
        "https://host/x-00.tar",
        "https://host/x-01.tar",
    ]
    assert len(expand_shards("emoji:")) == 7
    assert sum(declared_sizes(expand_shards("emoji:")).values()) == 5874


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emoji:noto-009.tar", r"no shard .*did you mean 'noto-00"),
        ("/nowhere/x.tar", r"no shard '/nowhere/x.tar'; check the path"),
        ([], r"no shards given"),
    ],
)
def test_missing_shards(spec, message):
    with pytest.raises(MmbaseError, match=message):
        expand_shards(spec)


def test_broken_shard_and_broken_json_are_named(tmp_path):
    torn = tmp_path / "torn.tar"
    torn.write_bytes(b"no tar at all" * 100)
    with pytest.raises(MmbaseError, match=r"torn\.tar"):
        list(read_samples([str(torn)]))
    with tarfile.open(tmp_path / "json.tar", "w") as tar:
        add(tar, "7.png", picture(1))
        add(tar, "7.json", b"{oops")
    with pytest.raises(MmbaseError, match="sample '7'"):
        list(read_samples([str(tmp_path / "json.tar")]))


def test_txt_is_the_caption_and_samples_without_one_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", picture(1))
        add(tar, "1.txt", b" a caption\n")
        add(tar, "2.png", picture(2))
        add(tar, "3.txt", b"no picture")
    samples = list(read_samples([str(tmp_path / "a.tar")]))
    assert [(s.key, s.fields["caption"]) for s in samples] == [("1", "a caption")]


def test_memory_stream_shows_every_sample_once_an_epoch(shards):
    keys = [key for batch in islice(stream(shards, memory="always").batches(), 16) for key in batch["key"]]
    first, second = keys[:32], keys[32:]
    assert sorted(first) == sorted(second) == [f"{i:03d}" for i in range(32)]
    assert first != second != sorted(second)
    assert keys[:32] != [k for b in islice(stream(shards, memory="always", seed=1).batches(), 8) for k in b["key"]]


def test_identities_never_stand_twice_in_a_batch(shards):
    batches = list(islice(stream(shards, memory="always", identity="concept", sampling="identities").batches(), 40))
    for epoch in range(10):
        ids = [int(i) for batch in batches[4 * epoch : 4 * epoch + 4] for i in batch["caption_id"]]
        assert len(set(ids)) == 16
    assert len({key for batch in batches for key in batch["key"]}) == 32
    resumed = stream(shards, memory="always", identity="concept", sampling="identities", start=28).batches()
    assert same(next(resumed), batches[7])
    with pytest.raises(MmbaseError, match=r"needs data\.identity"):
        stream(shards, memory="always", sampling="identities")


def test_ranks_share_the_global_batches_of_a_dataset_in_memory(shards):
    config = DataConfig(shards=str(shards), source_size=8, memory="always")
    whole = [key for batch in islice(stream(shards, memory="always", batch_size=8), 6) for key in batch["key"]]
    ranks = [open_stream(config, TOKENIZER, batch_size=4, seed=0, rank=rank, world_size=2) for rank in range(2)]
    assert [key for _ in range(6) for rank in ranks for key in next(rank)["key"]] == whole
    assert ranks[0].position == ranks[1].position == 48


def test_batch_contents(shards):
    batch = next(stream(shards, memory="always", identity="concept", keep_orientation={"caption": "THING 3"}).batches())
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, 3, 8, 8))
    for row, key in enumerate(batch["key"]):
        number = int(key)
        assert int(batch["image"][row].float().mean()) == number
        assert TOKENIZER.decode(batch["text"][row].tolist()) == f"thing {number}"
        assert int(batch["caption_id"][row]) == stable_id(str(number % 16))
        assert bool(batch["may_flip"][row]) == (not f"thing {number}".startswith("thing 3"))


@pytest.mark.parametrize("options", [{"memory": "always"}, {"memory": "never"}, {"memory": "never", "workers": 2}])
def test_resume_gives_the_same_batches(shards, options):
    options |= {"captions": [CaptionTemplate(), CaptionTemplate(template="{tags}")], "crop_scale": (0.5, 1.0)}
    whole = list(islice(stream(shards, **options).batches(), 20))
    for after in (1, 7, 16):
        resumed = list(islice(stream(shards, start=4 * after, **options).batches(), 20 - after))
        assert all(same(a, b) for a, b in zip(whole[after:], resumed))
    assert not all(same(a, b) for a, b in pairwise(whole))


def test_streaming_shows_every_sample_once_an_epoch(shards):
    keys = [key for batch in islice(stream(shards, memory="never").batches(), 8) for key in batch["key"]]
    assert sorted(keys) == [f"{i:03d}" for i in range(32)]
    assert keys != sorted(keys)


def test_holdout_is_a_seeded_share_of_every_group(shards):
    rows = [s.fields for s in read_samples(expand_shards(str(shards)))]
    holdout = Holdout(field="concept", group="group", fraction=0.25, seed=3)
    chosen = holdout.values(rows)
    assert len(chosen) == 4 and sum(int(value) % 2 for value in chosen) == 2
    assert holdout.values(reversed(rows)) == chosen
    assert Holdout(field="concept", group="group", fraction=0.25, seed=4).values(rows) != chosen
    for memory in ("always", "never"):
        batches = islice(stream(shards, memory=memory, holdout=holdout).batches(), 20)
        assert not chosen & {str(int(key) % 16) for batch in batches for key in batch["key"]}


@pytest.mark.parametrize("memory", ["always", "never"])
def test_a_broken_picture(shards, memory):
    with tarfile.open(shards / "bad.tar", "w") as tar:
        add(tar, "bad.png", b"not a picture")
        add(tar, "bad.json", b'{"caption": "bad"}')
    keys = [key for batch in islice(stream(shards, memory=memory).batches(), 20) for key in batch["key"]]
    assert len(keys) == 80 and "bad" not in keys
    loaded = stream(shards, memory=memory)
    list(islice(loaded.batches(), 20))
    assert loaded.counts["bad"] in {"always": (1,), "never": (2, 3)}[memory]  # once an epoch
    assert ("1 left out" in loaded.describe()[0]) == (memory == "always")
    with pytest.raises(MmbaseError, match="'bad'"):
        list(islice(stream(shards, memory=memory, errors="raise").batches(), 20))


def test_mistakes(shards, tmp_path):
    with pytest.raises(MmbaseError, match="batch_size=64 is larger than the 32"):
        stream(shards, memory="always", batch_size=64)
    with pytest.raises(MmbaseError, match="batch_size=64 is larger than the 32 samples"):
        stream(shards, memory="never", batch_size=64)
    with pytest.raises(MmbaseError, match="no usable image-caption pair"):
        next(stream(shards, memory="always", caption_field="title").batches())
    with pytest.raises(MmbaseError, match=r"no sample has the field 'grup'.*did you mean 'group'"):
        stream(shards, memory="always", filters=[{"field": "grup", "min": 1}])


def test_caption_sampler():
    fields = {"caption": "cat", "keywords": ["a", "b", "c", "d"], "empty": []}
    templates = [
        CaptionTemplate(weight=1),
        CaptionTemplate(template="{caption}, {keywords}", weight=3, most=2),
        CaptionTemplate(template="{empty}", weight=100),
        CaptionTemplate(template="{absent}", weight=100),
    ]
    sampler = CaptionSampler(templates)
    rng = np.random.default_rng(0)
    drawn = [sampler(fields, rng) for _ in range(2000)]
    assert 0.2 < drawn.count("cat") / 2000 < 0.3
    others = {text for text in drawn if text != "cat"}
    assert {len(text.split(", ")) for text in others} == {2, 3}
    assert "cat, b, a" in others and "cat, a, b" in others
    with pytest.raises(MmbaseError, match="fits a sample with the fields x"):
        sampler({"x": "1"}, rng)
    with pytest.raises(MmbaseError, match="positive weight"):
        CaptionSampler([CaptionTemplate(weight=0)])
