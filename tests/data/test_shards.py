"""Shard lists, where sizes come from, samples by number, selections, and shards that are not as told."""

import errno
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from mmbase.data.cache_config import CacheConfig
from mmbase.data.index_store import write_index
from mmbase.data.samples import RawSample, SampleFault, fields_of, image_of
from mmbase.data.shards import NoSizes, Shards, declared_sizes, expand_shards, read_samples
from mmbase.errors import MmbaseError
from mmbase_bench.fault_server import FaultServer, Plan, folder

from .little_shards import add, write_shards

SIZES = [6, 5, 7]


@pytest.fixture
def little(tmp_path):
    (tmp_path / "little").mkdir()
    return write_shards(tmp_path / "little", SIZES)


@pytest.fixture
def config(tmp_path):
    return CacheConfig(folder=str(tmp_path / "cache"), backoff=0.01, first_byte_timeout=0.5, stall_timeout=0.5)


def keys_of(shards):
    return [shards.read(shard, row).key for shard, size in enumerate(shards.sizes) for row in range(size)]


KEYS = [f"{number:05d}" for number in range(sum(SIZES))]


def test_lists(little, monkeypatch):
    names = [str(little / f"00{i}.tar") for i in range(3)]
    (little / "sub.tar").mkdir()
    (little / "00x.tar.gz").write_bytes(b"")
    assert expand_shards(str(little)) == [*names, str(little / "00x.tar.gz")]
    assert expand_shards(f"file://{little}/00{{0,2}}.tar") == [names[0], names[2]]
    assert expand_shards([f"file:{names[0]}", f"{names[1]}::{names[2]}"]) == names
    assert expand_shards(f"{little}/00[01].tar") == names[:2]
    assert expand_shards(["pipe:cat {a,b}::c.tar", "s3://b/{0..1}.tar"])[1:] == [
        "pipe:cat b::c.tar",
        "s3://b/0.tar",
        "s3://b/1.tar",
    ]
    for spec, message in {
        "https://host/folder/": r"an HTTP server lists no folders; name its shards",
        str(little / "sub.tar"): r"holds no .tar shards",
        str(little / "*.zip"): r"there is no shard",
        "/dev/null": r"is neither a file nor a folder",
    }.items():
        with pytest.raises(MmbaseError, match=message):
            expand_shards(spec)
    import fsspec

    fsspec.filesystem("memory").pipe({f"/list/{name}": b"x" for name in ("b.tar", "a.tar", "sizes.json")})
    assert expand_shards("memory://list/") == ["memory:///list/a.tar", "memory:///list/b.tar"]


def test_sizes_by_precedence(little, config):
    names = [str(little / f"00{i}.tar") for i in range(3)]
    assert list(Shards.open(str(little), cache=config).sizes) == SIZES
    (little / "000_stats.json").write_text(json.dumps({"successes": 4}))
    (little / "002_stats.json").write_text(json.dumps({"successes": 3}))
    assert declared_sizes(names) == {names[0]: 4, names[2]: 3}
    (little / "sizes.json").write_text(json.dumps({"000.tar": 2}))
    shards = Shards.open(str(little), cache=config)
    assert list(shards.sizes) == [2, 5, 7], "statistics are asked of the first shard that the table lacks"
    shards = Shards.open(str(little), cache=config, sizes={"000.tar": 1, names[1]: 2})
    assert list(shards.sizes) == [1, 2, 3]
    assert "2 from the table given, 1 from sizes beside them" in shards.describe()[0]
    for table, message in (({"000.tar": "x"}, "is no table of sizes"), ("/nowhere.json", "there is no table of sizes")):
        with pytest.raises(MmbaseError, match=message):
            Shards.open(str(little), cache=config, sizes=table)
    (little / "sizes.json").write_text("[")
    with pytest.raises(MmbaseError, match=r"sizes.json' is no JSON"):
        Shards.open(str(little), cache=config)


def test_samples_by_number_in_any_process(little, config):
    shards = Shards.open(str(little), cache=config)
    assert keys_of(shards) == KEYS
    sample = shards.read(1, 3)
    assert sample.shard == str(little / "001.tar") and set(sample.members) == {"jpg", "txt", "json"}
    with open(sample.shard, "rb") as file:
        file.seek(sample.offset)
        assert file.read(len(image_of(sample))) == image_of(sample)
    assert fields_of(sample, "short")["caption"] == "a picture of thing 9"
    assert keys_of(pickle.loads(pickle.dumps(shards))) == KEYS
    before = len(os.listdir("/proc/self/fd"))
    child = os.fork()
    if not child:
        os._exit(0 if keys_of(shards) == KEYS else 1)
    assert os.waitpid(child, 0)[1] == 0 and keys_of(shards) == KEYS
    shards.open_at_once = 1
    assert keys_of(shards) == KEYS
    shards.close()
    assert len(os.listdir("/proc/self/fd")) <= before - 3


def test_importing_shards_imports_no_torch():
    code = "import sys, mmbase.data.shards; print([m for m in ('torch', 'webdataset', 'fsspec') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_faults_of_whole_shards_are_faults_of_their_samples(little, config, monkeypatch):
    shards = Shards.open(str(little), cache=config, sizes={"000.tar": 8})
    with pytest.raises(SampleFault, match="the shard holds 6 samples") as caught:
        shards.read(0, 7)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    (little / "001.tar").unlink()
    with pytest.raises(SampleFault, match="No such file"):
        shards.read(1, 0)
    shards.read(2, 6)
    os.truncate(little / "002.tar", 4000)
    with pytest.raises(SampleFault, match=r"the shard ends at 4000: cut or replaced"):
        shards.read(2, 6)
    assert shards.read(0, 5).key == KEYS[5]
    shards.release()
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(MmbaseError, match=r"Too many open files; raise the limit \(ulimit -n\)"):
        shards.read(0, 0)


def test_damaged_shards_are_noted_and_nothing_at_all_is_an_error(little, config, tmp_path):
    os.truncate(little / "001.tar", 5000)
    (little / "002.tar").write_bytes(b"no tar" * 1000)
    shards = Shards.open(str(little), cache=config)
    assert shards.sizes[0] == 6 and 0 < shards.sizes[1] < 5 and shards.sizes[2] == 0
    assert len(shards.notes) == 2 and "is cut off at byte 5000" in shards.notes[0]
    assert shards.notes[0] in shards.describe()
    with pytest.raises(MmbaseError, match=r"hold no samples: .*is that of no tar"):
        Shards.open(str(little / "002.tar"), cache=config)


class Even:
    """Selects samples of even number."""

    digest = "even"
    calls = 0

    def reason(self, fields):
        Even.calls += 1
        return "odd number" if fields["number"] % 2 else None


def test_a_selection_is_decided_once(little, config):
    (little / "sizes.json").write_text(json.dumps({f"00{i}.tar": n for i, n in enumerate(SIZES)}))
    Even.calls = 0
    shards = Shards.open(str(little), cache=config, select=Even())
    assert keys_of(shards) == KEYS[::2] and shards.removed == {"odd number": 9}
    assert "left out: 9 odd number" in shards.describe()
    again = Shards.open(str(little), cache=config, select=Even())
    assert keys_of(pickle.loads(pickle.dumps(again))) == KEYS[::2] and again.removed == shards.removed
    assert Even.calls == sum(SIZES)


def test_remote_shards_need_no_sizes_where_the_cache_holds_them(little, config, tmp_path):
    with FaultServer(folder(little), Plan(share=0.3, seconds=1.0, seed=2)) as server:
        url = f"{server.url}/00{{0..2}}.tar"
        shards = Shards.open(url, cache=config)
        assert list(shards.sizes) == SIZES and keys_of(shards) == KEYS
        shutil.rmtree(tmp_path / "cache" / "shards", ignore_errors=False)
        small = config.model_copy(update={"max_bytes": 1 << 14, "folder": str(tmp_path / "other")})
        with pytest.raises(NoSizes, match=r"3 shards tell no number of samples.*exceed data.cache.max_bytes=16384"):
            Shards.open(url, cache=small)
        (little / "sizes.json").write_text(json.dumps({f"00{i}.tar": n for i, n in enumerate(SIZES)}))
        before = server.counts["requests"]
        shards = Shards.open(url, cache=config)
        assert list(shards.sizes) == SIZES and server.counts["requests"] - before <= 5, "one table, and its retries"
        shards.prefetch([2, 0])
        assert keys_of(shards) == KEYS
        server.plan.gone = {"/001.tar"}
        lost = Shards.open(url, cache=config.model_copy(update={"folder": str(tmp_path / "third")}), timeout=10)
        assert lost.read(0, 0).key == KEYS[0]
        for row in range(5):
            with pytest.raises(SampleFault, match="HTTP 404"):
                lost.read(1, row)
        assert [request for request in server.requests[-2:] if request[1] == "/001.tar"][1:] == []
    with pytest.raises(NoSizes, match=r"the command .* tells no number of samples"):
        Shards.open(f"pipe:cat {little}/000.tar", cache=config)
    piped = Shards.open(f"pipe:cat {little}/00{{0..2}}.tar", cache=config, sizes=str(little / "sizes.json"))
    assert keys_of(piped) == KEYS


def test_compressed_local_shards(little, config):
    for path in sorted(little.glob("*.tar")):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    shards = Shards.open(str(little), cache=config)
    assert list(shards.sizes) == SIZES and keys_of(shards) == KEYS


def test_an_index_beside_a_shard_is_enough(little, config, monkeypatch):
    for path in little.glob("*.tar"):
        write_index(path)
    monkeypatch.setattr("mmbase.data.index_store.scan_tar", lambda tar: pytest.fail("scanned"))
    assert keys_of(Shards.open(str(little), cache=config)) == KEYS


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"json": b"{oops"}, r"broken .json: Expecting"),
        ({"json": b"[1]"}, r"the .json holds a list, not fields"),
        ({"json": b"[" * 100000}, r"broken .json"),
        ({"json": b'{"a": "\xff"}'}, r"broken .json"),
        ({"txt": b"caf\xe9"}, r"the caption is not UTF-8 \(byte 3 is 0xe9\)"),
        ({"json": b"{}"}, r"no caption: neither .txt nor the field 'caption'"),
    ],
)
def test_fields_that_cannot_be_had(members, reason):
    with pytest.raises(SampleFault, match=reason):
        fields_of(RawSample("k", members, "s.tar", 7), "caption")


def test_fields():
    raw = RawSample("k", {"json": b'{"caption": "x", "n": 1}', "txt": b"\xef\xbb\xbf two \n"}, "s.tar", 0)
    assert fields_of(raw, "caption") == {"caption": "two", "n": 1}
    with pytest.raises(SampleFault, match=r"no picture: it holds json, txt"):
        image_of(raw)


def test_reading_on_past_faults(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, text in (("a", b"fine"), ("b", b"\xff"), ("c", b"fine")):
            add(tar, f"{key}.png", b"p")
            add(tar, f"{key}.txt", text)
    os.truncate(tmp_path / "x.tar", 6 * 1024 + 10)
    faults = []
    samples = list(read_samples([str(tmp_path / "x.tar")], on_fault=faults.append))
    assert [s.key for s in samples] == ["a", "c"] and [f.key for f in faults] == ["b"]
    with pytest.raises(MmbaseError, match=r"sample 'b' of .*not UTF-8"):
        list(read_samples([str(tmp_path / "x.tar")]))


def test_a_hundred_thousand_declared_shards_open_quickly(tmp_path, config):
    table = {f"{i:06d}.tar": 10_000 for i in range(100_000)}
    shards = Shards.open("pipe:cat {000000..099999}.tar", cache=config, sizes=table)
    assert shards.sizes.sum() == 10**9 and shards.sizes.dtype == np.int64
    assert "1,000,000,000 samples" in shards.describe()[0]
