"""The tar index: every format reads as tarfile reads it, hostile members are refused one by one, stale indices go."""

import dataclasses
import io
import os
import shutil
import tarfile

import pytest

from mmbase.data.index_store import SUFFIX, load_index, write_index
from mmbase.data.open_tar import OpenTar
from mmbase.data.samples import SampleFault
from mmbase.data.tar_index import TarIndex, scan_tar, split_name

from .little_shards import add


def opened(path, **options):
    return OpenTar(str(path), os.open(path, os.O_RDONLY), scan_tar(path), None, options.get("member_bytes", 1 << 20))


def read_all(path, **options):
    """Every row of a tar: its sample, or the reason why it cannot be had."""
    tar = opened(path, **options)
    rows = {}
    for row in range(len(tar)):
        try:
            sample = tar.sample(row)
            rows[sample.key] = sample.members
        except SampleFault as fault:
            rows[fault.key] = fault.reason
    tar.close()
    return rows


def special(tar, name, kind, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    tar.addfile(info)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_reads_as_tarfile_reads_it(tmp_path, format):
    names = ["a.jpg", "a.txt", "deep/er/b.JPG", "deep/er/b.seg.png", "./c.jpg", "c d.txt"]
    names.append("/".join(["folder" * 5] * 5) + "/name.jpg")  # ustar: a prefix
    if format != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + ".jpg", "ümläut/日本.jpg"]
    contents = {name: os.urandom(17 * i * i + i) for i, name in enumerate(names)}
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        special(tar, "deep", tarfile.DIRTYPE)
        for name, data in contents.items():
            add(tar, name, data)
    index = scan_tar(tmp_path / "x.tar")
    assert index.damage is None and index.ended and not index.refusals
    expected = {}
    for name, data in contents.items():
        key, extension = split_name(name)
        expected.setdefault(key, {})[extension] = data
    assert read_all(tmp_path / "x.tar") == expected
    assert list(expected["deep/er/b"]) == ["jpg", "seg.png"]


def test_grouping_is_webdatasets(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ["a.jpg", "a.txt", "b.txt", "a.cls", "__meta__", "__x__/y.jpg", "nodot", "d.e/f.g.h", "d.e/f.i"]:
            add(tar, name, name.encode())
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(tmp_path / "x.tar")]), webdataset.tarfile_to_samples()
    )
    theirs = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in pipeline]
    tar = opened(tmp_path / "x.tar")
    assert [tar.sample(row)[:2] for row in range(len(tar))] == theirs
    tar.close()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a/b.c/d.tar.gz", ("a/b.c/d", "tar.gz")),
        ("._a.jpg", None),
        ("dir/._a.jpg", None),
        (".hidden", None),
        ("", None),
        ("a.", ("a", "")),
    ],
)
def test_names(name, split):
    assert split_name(name) == split


def test_hostile_members_spoil_their_own_sample_alone(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "good.jpg", b"1")
        add(tar, "../../escape.jpg", b"2")
        special(tar, "soft.jpg", tarfile.SYMTYPE, "/etc/passwd")
        special(tar, "hard.jpg", tarfile.LNKTYPE, "good.jpg", size=1 << 30)
        special(tar, "device.jpg", tarfile.CHRTYPE)
        special(tar, "fifo.jpg", tarfile.FIFOTYPE)
        special(tar, "odd.jpg", b"Q")
        add(tar, "mixed.jpg", b"3")
        special(tar, "mixed.txt", tarfile.SYMTYPE, "/etc/passwd")
        add(tar, "twice.jpg", b"4")
        add(tar, "twice.JPG", b"5")
        add(tar, "big.jpg", bytes(5000))
        add(tar, "last.jpg", b"6")
    rows = read_all(path, member_bytes=4096)
    assert rows.pop("good") == {"jpg": b"1"} and rows.pop("last") == {"jpg": b"6"}
    reasons = {
        "../../escape": "its name leads out of the archive",
        "soft": "a symbolic link",
        "hard": "a hard link",
        "device": "a device",
        "fifo": "a pipe",
        "odd": "of unknown type",
        "mixed": "a symbolic link",
        "twice": "a second one in the same sample",
        "big": "5000 bytes, over data.cache.member_bytes=4096",
    }
    assert rows.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in rows[key], key


def test_ten_gigabytes_are_refused_without_being_read(tmp_path):
    path = tmp_path / "x.tar"
    size = 10 << 30
    info = tarfile.TarInfo("big.jpg")
    info.size = size
    with path.open("wb") as file:  # a hole on the disk
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, os.SEEK_CUR)
        with tarfile.open(fileobj=io.BytesIO(), mode="w") as small:
            add(small, "after.jpg", b"!")
            file.write(small.fileobj.getvalue())
        file.write(bytes(1024))
    rows = read_all(path)
    assert rows["after"] == {"jpg": b"!"} and f"{size} bytes" in rows["big"]


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(6):
            add(tar, f"{i}.jpg", bytes([i]) * 700)
            add(tar, f"{i}.txt", b"text")
    return path


def test_a_cut_tar_keeps_what_comes_before_the_cut(good):
    whole = read_all(good)
    content = good.read_bytes()
    step = 512 + 1024 + 512 + 512  # one sample
    good.write_bytes(content[: 3 * step + 512 + 300])  # within the fourth picture
    rows = read_all(good)
    assert {key: rows[key] for key in "012"} == {key: whole[key] for key in "012"}
    assert "cut off: it should end" in rows["3"] and len(rows) == 4
    assert "is cut off at byte" in scan_tar(good).damage
    good.write_bytes(content[: 3 * step])  # between two samples: cannot be told from a tar without its end
    index = scan_tar(good)
    assert (len(index), index.damage, index.ended) == (3, None, False)
    good.write_bytes(content[: 3 * step + 100])
    assert len(scan_tar(good)) == 3 and "cut off" in scan_tar(good).damage


def test_a_damaged_header_ends_the_scan(good):
    content = bytearray(good.read_bytes())
    content[2 * 2560 + 7] ^= 1
    good.write_bytes(content)
    index = scan_tar(good)
    assert len(index) == 2 and "header at byte 5120 is damaged" in index.damage


@pytest.mark.parametrize(
    ("content", "damage"),
    [(b"", "the file is empty"), (b"no tar" * 1000, "is that of no tar"), (b"short", "cut off"), (bytes(1024), None)],
)
def test_what_is_no_tar(tmp_path, content, damage):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    index = scan_tar(path)
    assert len(index) == 0 and (damage in index.damage if damage else index.damage is None and index.ended)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [1 << 40, 2 << 20])
def test_a_name_of_a_terabyte(tmp_path, kind, size):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert "a name of" in scan_tar(path).damage


@pytest.mark.parametrize("kind", [b"0", b"g", b"K", b"S", b"x", b"L", b"Z", b"5", b"1"])
@pytest.mark.parametrize("size", [b"\xbf" + b"\xff" * 11, b"\xff" * 12, b"\x80" * 12, b"7" * 12])
def test_sizes_beyond_all_offsets(tmp_path, kind, size):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(4096))
    index = scan_tar(tmp_path / "x.tar")
    assert index.damage or len(index) <= 1


def test_an_index_survives_its_file_and_refuses_an_altered_one(good):
    index = scan_tar(good)
    content = index.to_bytes()
    again = TarIndex.from_bytes(content)
    assert again.to_bytes() == content and [again.key(r) for r in range(6)] == list("012345")
    assert all(again.members(row) == index.members(row) for row in range(6))
    for broken in (b"", content[:-1], content[:50], content.replace(b'"size"', b'"sise"'), b"\n" + content):
        with pytest.raises(ValueError, match="index"):
            TarIndex.from_bytes(broken)


def test_a_kept_index_is_used_until_the_tar_changes(good, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_index(good, cache)
    monkeypatch.setattr("mmbase.data.index_store.scan_tar", lambda tar: pytest.fail("scanned again"))
    assert load_index(good, cache).to_bytes() == first.to_bytes()
    monkeypatch.undo()
    with tarfile.open(good, "a") as tar:
        add(tar, "new.jpg", b"new")
    assert len(load_index(good, cache)) == 7
    kept = next((cache / "indices").rglob(f"*{SUFFIX}"))
    kept.write_bytes(b"rubbish")
    assert len(load_index(good, cache)) == 7
    os.utime(good, ns=(0, good.stat().st_mtime_ns + 1))
    scans = []
    monkeypatch.setattr("mmbase.data.index_store.scan_tar", lambda tar: scans.append(tar) or scan_tar(tar))
    load_index(good, cache)
    assert scans == [good]


def test_an_index_beside_its_tar_is_copied_with_it(good, tmp_path, monkeypatch):
    write_index(good)
    again = dataclasses.replace(scan_tar(good), mtime_ns=0)
    assert (tmp_path / f"good.tar{SUFFIX}").read_bytes() == again.to_bytes()  # nothing of when it was made
    (tmp_path / "copy").mkdir()
    for name in ("good.tar", f"good.tar{SUFFIX}"):
        shutil.copyfile(tmp_path / name, tmp_path / "copy" / name)
    copy = tmp_path / "copy" / "good.tar"
    monkeypatch.setattr("mmbase.data.index_store.scan_tar", lambda tar: pytest.fail("scanned again"))
    assert len(load_index(copy, tmp_path / "cache")) == 6
    monkeypatch.undo()
    content = copy.read_bytes()
    copy.write_bytes(content[5120:7680] + content[2560:])  # another tar of the same size
    assert load_index(copy, tmp_path / "cache").key(0) == "2"


def test_a_cache_that_cannot_be_written_costs_time_only(good, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load_index(good, tmp_path / "cache")) == 6
