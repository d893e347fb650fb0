"""Every bad input, end to end: batches full, order exact, faults counted and written down; odd but good ones shown."""

import io
import json
import struct
import tarfile
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from mmbase.data import loader
from mmbase.errors import MmbaseError

from .consume import rows_of
from .little_shards import TOKENIZER, add, picture, write_shards


def bomb():
    """A PNG whose header claims 40,000 x 40,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain(mode="RGB", colour=None):
    return Image.new(mode, (32, 24), colour if colour is not None else 128)


BAD = {
    "noise": ({"jpg": bytes(range(256)) * 4, "txt": b"x"}, "not a picture"),
    "cut-jpeg": ({"jpg": picture(1)[:400], "txt": b"x"}, "corrupt or truncated"),
    "cut-png": ({"png": picture(1, "PNG")[:200], "txt": b"x"}, "corrupt or truncated"),
    "nothing": ({"jpg": b"", "txt": b"x"}, "empty picture"),
    "bomb": ({"png": bomb(), "txt": b"x"}, "1600000000|40000"),
    "no-caption": ({"jpg": picture(2)}, "no caption"),
    "wrong-key": ({"jpg": picture(2), "json": b'{"title": "x"}'}, "no caption"),
    "empty-caption": ({"jpg": picture(2), "txt": b"  \n"}, "caption"),
    "latin-1": ({"jpg": picture(2), "txt": "café".encode("latin-1")}, "not UTF-8"),
    "broken-json": ({"jpg": picture(2), "json": b'{"caption": "x"'}, "broken .json"),
    "list-json": ({"jpg": picture(2), "json": b"[1]"}, "holds a list"),
    "no-picture": ({"txt": b"x", "mp3": b"y"}, "no picture"),
    "a/../../b": ({"jpg": picture(2), "txt": b"x"}, "leads out of the archive"),
}

rotated = Image.Exif()
rotated[0x0112] = 6
frames = [plain(colour=(200, 10, 10)), plain(colour=(10, 200, 10))]
ODD = {
    "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), (200, 10, 10)),
    "cmyk": (encoded(plain("CMYK", (0, 255, 255, 0)), "JPEG"), (254, 0, 0)),
    "sixteen": (encoded(Image.fromarray(np.full((24, 32), 257 * 90, np.uint16))), (90, 90, 90)),
    "palette": (encoded(plain(colour=(30, 60, 90)).quantize(8)), (30, 60, 90)),
    "grey": (encoded(plain("L", 77), "JPEG"), (77, 77, 77)),
    "turned": (encoded(plain(colour=(5, 80, 5)), "JPEG", exif=rotated), (5, 80, 5)),
    "alpha": (encoded(plain("RGBA", (50, 60, 70, 128))), (50, 60, 70)),
}


JPEG = bytes([0xFF, 0xD8])


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder, [20, 20, 20])
    with tarfile.open(folder / "bad.tar", "w") as tar:
        for key, (members, _) in BAD.items():
            for extension, content in members.items():
                add(tar, f"{key}.{extension}", content)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link-{kind.decode()}.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
            add(tar, f"link-{kind.decode()}.txt", b"x")
    with tarfile.open(folder / "odd.tar", "w") as tar:
        for key, (data, _) in ODD.items():
            add(tar, f"{key}.{'jpg' if data[:2] == JPEG else 'png'}", data)
            add(tar, f"{key}.txt", key.encode())
    (folder / "empty.tar").write_bytes(b"")
    (folder / "zeros.tar").write_bytes(bytes(10_240))
    return folder


def open_loader(folder, **options):
    return loader(
        folder if isinstance(folder, list) else str(folder),
        **{"tokenizer": TOKENIZER, "image_size": 16, "batch_size": 8, "max_bad_share": 1} | options,
    )


def quarantined(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_bad_sample_gives_way_and_is_written_down(shards, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    good = {f"{i:05d}" for i in range(60)} | set(ODD)
    shown = []
    for workers in (0, 2):
        with open_loader(shards, quarantine=path, workers=workers, seed=3) as stream:
            batches = list(islice(stream, -(-2 * stream.samples // 8)))
            epoch = stream.samples
            counts = stream.counts
        assert all(len(batch["key"]) == 8 == len(batch["image"]) for batch in batches)
        keys = [key for batch in batches for key in batch["key"]]
        assert set(keys[:epoch]) == good == set(keys[epoch : 2 * epoch])
        assert counts["good"] == len(keys) and counts["bad"] >= 2 * (len(BAD) + 2)
        shown.append([row for batch in batches for row in rows_of(batch)])
    assert shown[0] == shown[1]
    told = {row["key"]: row for row in quarantined(path)}
    assert len(told) == len(quarantined(path)) == len(BAD) + 2  # each once, over epochs and runs
    for key, (_, reason) in BAD.items():
        assert any(word in told[key]["reason"] for word in reason.split("|")), told[key]
    for key in ("link-1", "link-2"):
        assert "link" in told[key]["reason"]
    assert set(told["noise"]) == {"shard", "key", "offset", "reason"} and told["noise"]["shard"].endswith("bad.tar")
    assert len({row["offset"] for row in told.values()}) == len(told)


def test_odd_pictures_are_shown_as_they_look(shards):
    with open_loader(shards, crop_scale=(1, 1), crop_ratio=None) as stream:
        for batch in islice(stream, -(-stream.samples // 8)):
            for key, image in zip(batch["key"], batch["image"]):
                if key in ODD:
                    wanted = torch.tensor(ODD[key][1]).view(3, 1, 1)
                    assert (image.int() - wanted).abs().max() <= 3, key


def test_a_caption_under_another_name(tmp_path):
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for number in range(8):
            add(tar, f"{number}.jpg", picture(number))
            add(tar, f"{number}.json", b'{"title": "thing"}')
    with open_loader(tmp_path, caption_field="title") as stream:
        assert all(TOKENIZER.decode(row.tolist()) == "thing" for row in next(stream)["text"])


def test_pictures_turned_by_their_camera_if_asked(tmp_path):
    half = Image.new("RGB", (32, 32), (250, 10, 10))
    half.paste((10, 10, 250), (16, 0, 32, 32))  # red left, blue right; orientation 6 is shown turned to the right
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        add(tar, "0.jpg", encoded(half, "JPEG", exif=rotated, quality=95))
        add(tar, "0.txt", b"x")
    options = {"batch_size": 1, "crop_scale": (1, 1), "crop_ratio": None}
    for exif, blue in ((False, (4, 13)), (True, (13, 4))):
        with open_loader(tmp_path, exif=exif, **options) as stream:
            image = next(stream)["image"][0]
        assert image[2, blue[0], blue[1]] > 200 > 100 > image[0, blue[0], blue[1]]


@pytest.mark.parametrize("alpha", ["white", "black", "keep"])
def test_transparency_as_asked(shards, alpha):
    with open_loader(shards, alpha=alpha, batch_size=20) as stream:
        found = [
            image for batch in islice(stream, 5) for key, image in zip(batch["key"], batch["image"]) if key == "alpha"
        ]
    wanted = {"white": (152, 157, 162), "black": (25, 30, 35), "keep": (50, 60, 70, 128)}[alpha]
    assert (found[0].int() - torch.tensor(wanted).view(-1, 1, 1)).abs().max() <= 1


def test_a_tar_that_is_cut(shards, tmp_path):
    whole = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(whole[: len(whole) // 2 + 100])
    path = tmp_path / "quarantine.jsonl"
    with open_loader(shards, quarantine=path) as stream:
        keys = [key for batch in islice(stream, 10) for key in batch["key"]]
    first_half = {f"{i:05d}" for i in range(20, 28)}
    assert first_half <= set(keys) and "00039" not in keys


def test_a_shard_that_vanishes(shards, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    sizes = {"000.tar": 20, "001.tar": 20, "002.tar": 20}
    with open_loader([str(shards / name) for name in sizes], sizes=sizes, quarantine=path, window=1) as stream:
        (shards / "002.tar").unlink()
        keys = [key for batch in islice(stream, 15) for key in batch["key"]]
    assert set(keys) == {f"{i:05d}" for i in range(40)} and len(keys) == 120
    assert all("002.tar" in row["shard"] for row in quarantined(path))


def test_sizes_that_promise_too_much(shards):
    sizes = {"000.tar": 25, "001.tar": 18}
    with open_loader([str(shards / name) for name in sizes], sizes=sizes) as stream:
        keys = [key for batch in islice(stream, 6) for key in batch["key"]]
        assert stream.samples == 43 and stream.counts["bad"] >= 5
    assert set(keys) <= {f"{i:05d}" for i in range(38)}


def test_too_many_bad_samples_stop_with_the_reasons(shards):
    with open_loader(shards, max_bad_share=0.1) as stream:
        message = (
            r"\d+ of \d+ samples so far are bad, more than the share of 0.1 allowed: \d+ .*; see .*mend the shards"
        )
        with pytest.raises(MmbaseError, match=message):
            list(islice(stream, 50))


def test_a_caption_field_that_no_sample_has(tmp_path):
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for number in range(30):
            add(tar, f"{number}.jpg", picture(number))
            add(tar, f"{number}.json", b'{"caption": "x"}')
    message = "in a row cannot be used.*no caption: neither .txt nor the field 'title'"
    with open_loader(tmp_path, caption_field="title") as stream, pytest.raises(MmbaseError, match=message):
        next(stream)


def test_errors_raise_stops_at_the_first(shards):
    for workers in (0, 2):
        message = r"sample '.*' of '.*bad.tar' at byte \d+: .*set errors=replace"
        with open_loader(shards, errors="raise", workers=workers) as stream, pytest.raises(MmbaseError, match=message):
            list(islice(stream, 50))


def test_a_member_of_gigabytes_is_not_read(tmp_path):
    write_shards(tmp_path, [10])
    with tarfile.open(tmp_path / "001.tar", "w") as tar:
        add(tar, "huge.txt", b"x")
        info = tarfile.TarInfo("huge.jpg")
        info.size = 10 << 30
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
        tar.fileobj.truncate(tar.fileobj.tell() + (10 << 30))  # sparse: takes no room
        tar.fileobj.seek(0, 2)
        tar.offset = tar.fileobj.tell()
        add(tar, "after.jpg", picture(5))
        add(tar, "after.txt", b"after")
    path = tmp_path / "quarantine.jsonl"
    with open_loader(tmp_path, batch_size=6, quarantine=path) as stream:
        keys = [key for batch in islice(stream, 4) for key in batch["key"]]
    assert set(keys) == {"after", *(f"{i:05d}" for i in range(10))}
    assert [row["key"] for row in quarantined(path)] == ["huge"]


def test_a_torn_line_of_the_quarantine_does_no_harm(shards, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"shard": "x", "key": "y", "off')
    with open_loader(shards, quarantine=path) as stream:
        list(islice(stream, 11))
    lines = path.read_text().splitlines()
    assert lines[0] == '{"shard": "x", "key": "y", "off' and len([json.loads(line) for line in lines[1:]]) >= 5
