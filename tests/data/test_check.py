"""The check: true figures on a small dataset, every fault named, any tar, and an end to its time."""

import functools
import gzip
import http.server
import io
import json
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmbase.data.check import CheckOptions, check_shards
from mmbase.data.check_report import print_report
from mmbase.data.filters import parse_filter
from mmbase.data.reasons import kind_of
from mmbase.errors import MmbaseError

FAST = CheckOptions(seconds=20, image_size=32, batch_size=8)


def jpeg(seed, size=(64, 48)):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first, count, **fields):
    for i in range(first, first + count):
        yield f"{i:04d}.jpg", jpeg(i)
        yield f"{i:04d}.txt", f"picture number {i}".encode()
        if fields:
            yield f"{i:04d}.json", json.dumps({"similarity": i / 100, **fields}).encode()


@pytest.fixture
def folder(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", pairs(40 * shard, 40, licence="CC0-1.0"))
    return tmp_path


def subjects(report):
    return {finding.subject: finding for finding in report.findings}


def test_a_good_dataset(folder):
    (folder / "sizes.json").write_text(json.dumps({f"{i}.tar": 40 for i in range(3)}))
    report = check_shards(str(folder), FAST)
    assert report.is_complete and (report.looked_at, report.samples, report.samples_from) == (120, 120, "counted")
    assert report.members == {"jpg": 120, "txt": 120, "json": 120}
    assert report.fields == {"similarity": 120, "licence": 120, "caption": 120}
    assert report.bad == {} and report.bad_interval == (0.0, 0.0)
    assert report.statistics["width"]["median"] == 64 and report.statistics["format"] == {"jpg": 120}
    assert report.tokens["max"] >= 5
    assert report.distinct_captions == 120 and report.duplicates.pictures == report.duplicates.near == 0
    assert report.decode_per_second > 0 and report.shard_faults == {} == report.size_mismatches
    assert set(subjects(report)) <= {"licence not recorded"}
    assert json.loads(json.dumps(report.as_dict()))["samples"] == 120


def test_bad_samples_are_counted_by_reason(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (30000, 30000)).save(bomb, "PNG")
    members = [
        *pairs(0, 20),
        ("a.jpg", jpeg(99)[:300]), ("a.txt", b"cut"),
        ("b.jpg", jpeg(98)[:310]), ("b.txt", b"cut as well"),
        ("c.jpg", b"no picture"), ("c.txt", b"x"),
        ("d.txt", b"no picture at all"),
        ("e.jpg", jpeg(97)),
        ("f.jpg", jpeg(96)), ("f.txt", b"\xff\xfe\xfa"),
        ("g.jpg", jpeg(95)), ("g.json", b"{"),
        ("h.png", bomb.getvalue()), ("h.txt", b"bomb"),
        ("i.jpg", jpeg(94)), ("i.txt", b"  "),
        ("j.jpg", jpeg(93)), ("j.json", b'{"caption": null}'),
        ("k.jpg", jpeg(92)), ("k.json", b'{"caption": ["one", "two"]}'),
    ]  # fmt: skip
    report = check_shards(str(write_tar(tmp_path / "0.tar", members)), FAST)
    assert report.is_complete and report.looked_at == 31 and report.bad_count == 10
    told = " | ".join(report.bad)
    for expected in (
        "truncated",
        "no picture: it holds txt",
        "no caption",
        "not UTF-8",
        "broken .json",
        "caption is empty",
    ):
        assert expected in told, expected
    cut = next(count for kind, count in report.bad.items() if "truncated" in kind)
    assert cut == 2, "one kind whatever the numbers"
    assert any("c of" in example for example in report.bad_examples.values())
    assert subjects(report)["bad samples"].level == "problem" and "32.3%" in subjects(report)["bad samples"].text


def test_damaged_shards_and_wrong_sizes(folder):
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "3.tar").write_bytes(b"")
    (folder / "sizes.json").write_text(json.dumps({f"{i}.tar": 40 for i in range(3)}))
    report = check_shards(str(folder), FAST)
    assert {url.rpartition("/")[2] for url in report.shard_faults} == {"1.tar", "3.tar"}
    assert subjects(report)["damaged shards"].level == "problem"
    ((declared, found),) = report.size_mismatches.values()
    assert declared == 40 and 10 < found < 30 and subjects(report)["wrong sizes"].level == "problem"


def test_captions_under_another_name(tmp_path):
    members = [
        (f"{i}.{e}", d) for i in range(9) for e, d in (("jpg", jpeg(i)), ("json", b'{"title": "a cat", "n": 1}'))
    ]
    path = str(write_tar(tmp_path / "0.tar", members))
    finding = subjects(check_shards(path, FAST))["no captions"]
    assert finding.level == "problem" and "--caption-field title" in finding.text
    report = check_shards(path, CheckOptions(seconds=20, image_size=32, batch_size=8, caption_field="title"))
    assert report.bad_count == 0 and "100% are 'a cat'" in subjects(report)["repeated captions"].text


def test_no_pictures_and_no_samples(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.npy", b"x"), ("a.txt", b"y")])
    assert "found .npy, .txt" in subjects(check_shards(str(tmp_path / "0.tar"), FAST))["no pictures"].text
    write_tar(tmp_path / "1.tar", [])
    assert "no samples" in subjects(check_shards(str(tmp_path / "1.tar"), FAST))
    (tmp_path / "2.tar").write_bytes(b"this is no tar" * 100)
    assert "that of no tar" in json.dumps(check_shards(str(tmp_path / "2.tar"), FAST).shard_faults)
    with pytest.raises(MmbaseError, match="there is no shard"):
        check_shards(str(tmp_path / "3.tar"))


def test_duplicates(tmp_path):
    small = io.BytesIO()
    Image.open(io.BytesIO(jpeg(0))).resize((48, 36)).save(small, "JPEG", quality=80)
    members = [
        *pairs(0, 20),
        ("x.jpg", jpeg(0)), ("x.txt", b"picture number 0"),
        ("y.jpg", jpeg(1)), ("y.txt", b"another caption"),
        ("z.jpg", small.getvalue()), ("z.txt", b"small"),
    ]  # fmt: skip
    report = check_shards(str(write_tar(tmp_path / "0.tar", members)), FAST)
    same = report.duplicates
    assert (same.pictures, same.pairs, same.near) == (2, 1, 1)
    assert "--dedupe" in subjects(report)["duplicates"].text and same.examples


def test_what_is_asked_of_it(folder):
    report = check_shards(str(folder), CheckOptions(seconds=20, image_size=16, batch_size=64, ranks=4, workers=3))
    found = subjects(report)
    assert "at most 30" in found["too few samples"].text
    assert "3 shards for 4 ranks x 3 workers" in found["fewer shards than workers"].text
    assert str(folder) in found["fewer shards than workers"].text, "commands name the shards that were given"
    assert "--size" in found["large pictures"].text
    filters = [parse_filter("similarity>=0.6"), parse_filter("licence=cc0-1.0")]
    report = check_shards(str(folder), CheckOptions(seconds=20, image_size=32, batch_size=8, filters=filters))
    assert report.kept_by_filters == 60 and report.removed_by_filters == {"similarity below 0.6": 60}
    nothing = CheckOptions(seconds=20, image_size=32, batch_size=8, filters=[parse_filter("similarty>=0.6")])
    assert "similarty missing" in subjects(check_shards(str(folder), nothing))["filters leave nothing"].text


def test_compressed_piped_and_served(folder):
    packed = folder / "packed"
    packed.mkdir()
    (packed / "0.tar.gz").write_bytes(gzip.compress((folder / "0.tar").read_bytes()))
    report = check_shards(str(packed / "0.tar.gz"), FAST)
    assert report.is_complete and report.looked_at == 40 and not report.shard_faults
    report = check_shards(f"pipe:cat {folder / '1.tar'}", FAST)
    assert report.looked_at == 40 and report.bad_count == 0
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        report = check_shards([f"{base}/{{0..2}}.tar", f"{base}/gone.tar"], FAST)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert report.looked_at == 120 and list(report.shard_faults) == [f"{base}/gone.tar"]
    assert "404" in report.shard_faults[f"{base}/gone.tar"]


def test_it_ends_in_time(tmp_path):
    for shard in range(40):
        write_tar(tmp_path / f"{shard:02d}.tar", pairs(0, 12))
    begun = time.monotonic()
    report = check_shards(str(tmp_path), CheckOptions(seconds=0.5, image_size=32, batch_size=8))
    assert time.monotonic() - begun < 30, "also on a machine that is busy"
    assert not report.is_complete or report.looked_at == 480
    assert report.looked_at >= 16
    low, high = report.bad_interval
    assert low == 0 and (high > 0 or report.is_complete)


def test_report_for_people(folder, tmp_path):
    (folder / "1.tar").write_bytes((folder / "1.tar").read_bytes()[:20000])
    report = check_shards(str(folder), CheckOptions(seconds=20, filters=[parse_filter("similarity>=0.6")]))
    text = io.StringIO()
    print_report(report, Console(file=text, width=100))
    shown = text.getvalue()
    for expected in (
        "shards      3",
        "pictures/s on one core",
        "caption, CLIP tokens",
        "damaged shards",
        "similarity below",
    ):
        assert expected in shown
    print_report(report, Console(file=io.StringIO(), width=40, force_terminal=True))


def test_hostile_texts_are_shown_as_text(tmp_path):
    hostile = "[bold]\x1b[31mred[/nope] \ud800 half"
    fields = {"caption": "x", hostile: hostile, "wide": hostile}
    good = [("a.jpg", jpeg(0)), ("a.json", json.dumps(fields).encode())]
    bad = [(f"{hostile}.jpg".replace("\ud800", "\udcff"), b"junk"), (f"{hostile}.txt".replace("\ud800", ""), b"x")]
    write_tar(tmp_path / "0.tar", good + bad)
    report = check_shards([str(tmp_path)], CheckOptions(seconds=2))
    out = io.StringIO()
    print_report(report, Console(file=out, width=200))
    told = out.getvalue().encode().decode()  # half a character could not be written
    assert "[bold]\N{REPLACEMENT CHARACTER}[31mred[/nope]" in told and "\x1b" not in told


def test_kinds_of_reasons():
    reason = "the picture of 812 bytes is corrupt or truncated: image file is truncated (3 bytes not processed)"
    assert kind_of(reason) == "corrupt or truncated: image file is truncated (N bytes not processed)"
    assert kind_of("the member 'a/b.jpg' is refused: a hard link") == "the member … is refused: a hard link"
    assert kind_of("the caption is not UTF-8 (byte 3 is 0xff)") == "the caption is not UTF-8 (byte N is N)"
    assert kind_of("it has 30,000 x 20.5 pixels; make it smaller") == "it has N x N pixels"
    assert len(kind_of("x" * 1000)) == 160
