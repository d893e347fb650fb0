"""Packing: every kind of source, the same bytes for any number of threads and after a kill -9, faults, refusals."""

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mmbase.data.datasheet import read_datasheet
from mmbase.data.filters import FilterConfig
from mmbase.data.pack import pack
from mmbase.data.pack_config import PackConfig
from mmbase.data.pack_pictures import PictureConfig, prepare_picture
from mmbase.data.pack_rows import order
from mmbase.data.pack_sources import SourceOptions, open_source
from mmbase.data.perceptual import NearDuplicates, look_the_same, signature
from mmbase.errors import MmbaseError


def picture(seed, size=(60, 40), mode="RGB"):
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    noise = Image.fromarray(rng.integers(0, 256, (5, 6, channels), dtype=np.uint8), mode)
    return noise.resize(size, Image.Resampling.BICUBIC)


def encoded(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    """A folder of 30 pictures and a captions.csv with six bad rows among them."""
    root = tmp_path / "photos"
    root.mkdir()
    rows = []
    for i in range(30):
        (root / f"{i}.jpg").write_bytes(encoded(picture(i)))
        rows.append([f"{i}.jpg", f'number {i}, a "picture"\nof noise', i % 3])
    (root / "nonsense.jpg").write_bytes(b"nonsense")
    (root / "cut.jpg").write_bytes((root / "7.jpg").read_bytes()[:400])
    (root / "empty.jpg").write_bytes(b"")
    rows += [["nonsense.jpg", "x", 0], ["cut.jpg", "x", 0], ["empty.jpg", "x", 0], ["missing.jpg", "x", 0]]
    rows += [["5.jpg", "", 0], ["3.jpg", rows[3][1], 0], ["4.jpg", "the same picture, another caption", 0]]
    with (root / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption", "group"], *rows])
    return root


def contents(folder):
    """Path -> bytes of everything whose bytes are promised to be the same."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".index"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def samples(folder):
    """key -> extension -> bytes, over all tars."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def test_a_table_of_pictures(photos, tmp_path):
    out = tmp_path / "out"
    result = pack(photos, out, PackConfig(shard_size=10, licence="CC0-1.0", source="drawn by a program"))
    assert result.splits == {
        "": {"samples": 31, "shards": 4, "bytes": sum(p.stat().st_size for p in out.glob("*.tar"))}
    }
    assert result.rows == 37 and sum(result.removed.values()) == 6
    assert json.loads((out / "sizes.json").read_text()) == {
        "00000.tar": 10, "00001.tar": 10, "00002.tar": 10, "00003.tar": 1,
    }  # fmt: skip
    packed = samples(out)
    assert list(packed) == [f"{i:09d}" for i in range(31)]
    by_origin = {json.loads(m["json"])["origin"]: m for m in packed.values()}
    first = by_origin["captions.csv:2"]
    assert set(first) == {"jpg", "txt", "json"}
    assert first["jpg"] == (photos / "0.jpg").read_bytes(), "unchanged pictures keep their bytes"
    assert first["txt"].decode() == 'number 0, a "picture" of noise'
    fields = json.loads(first["json"])
    assert fields["group"] == "0" and (fields["width"], fields["original_height"]) == (60, 40)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = {row["row"]: row["reason"] for row in rejected}
    assert "not a picture" in reasons["captions.csv:32"]
    assert "corrupt or truncated" in reasons["captions.csv:33"]
    assert "empty picture" in reasons["captions.csv:34"]
    assert "No such file" in reasons["captions.csv:35"]
    assert reasons["captions.csv:36"] == "no caption"
    assert {"captions.csv:5", "captions.csv:37"} & set(reasons), "one of two equal pairs"
    sheet = read_datasheet(out)
    assert sheet.samples == 31 and sheet.sources[0].licence == "CC0-1.0" and sheet.removed == result.removed
    assert sorted(p.name for p in out.glob("*.index")) == [f"0000{i}.tar.index" for i in range(4)]
    assert not (out / ".pack").exists()


def test_shards_can_be_trained_on(photos, tmp_path):
    from mmbase.data.shards import read_samples

    pack(photos, tmp_path / "out", PackConfig(shard_size=10))
    read = list(read_samples([str(p) for p in sorted((tmp_path / "out").glob("*.tar"))]))
    assert len(read) == 31 and all(s.fields["caption"] for s in read)


def test_the_same_bytes_for_any_number_of_threads_and_once_more(photos, tmp_path):
    config = PackConfig(picture=PictureConfig(size=32), shard_size=7, splits={"val": 0.3}, dedupe="near", seed=3)
    pack(photos, tmp_path / "one", config, workers=1)
    pack(photos, tmp_path / "four", config, workers=4)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "four")
    again = pack(photos, tmp_path / "one", config)
    assert again.complete_before and contents(tmp_path / "one") == one
    other = PackConfig(picture=PictureConfig(size=32), shard_size=7, splits={"val": 0.3}, dedupe="near", seed=4)
    pack(photos, tmp_path / "other", other)
    assert contents(tmp_path / "other")["train/00000.tar"] != one["train/00000.tar"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [1, 9, 10, 11, 25, 36])
@pytest.mark.parametrize("lost", [False, True], ids=["last checkpoint", "checkpoint before"])
def test_resumes_with_the_same_bytes(photos, tmp_path, monkeypatch, stop, lost):
    """Stopped after any row, with all that was written after the last checkpoint lying about as a kill leaves it."""
    import mmbase.data.pack as module

    config = PackConfig(shard_size=5, splits={"val": 0.3}, dedupe="near", seed=1)
    pack(photos, tmp_path / "whole", config, workers=2)

    def progress(done, total, kept):
        if done == stop:
            raise Killed

    # Every row is followed by a checkpoint, or none is: the work since the beginning is done again.
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 1e9 if lost else 0.0)
    if lost:
        monkeypatch.setattr(module._Packer, "checkpoint", lambda self: None)
    with pytest.raises(Killed):
        pack(photos, tmp_path / "out", config, workers=2, progress=progress)
    assert not (tmp_path / "out" / "pack.json").exists()
    monkeypatch.undo()
    result = pack(photos, tmp_path / "out", config, workers=1)
    assert result.resumed_at == (0 if lost else stop)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dedupe", ["pairs", "near"])
def test_a_full_disk_is_said_and_the_same_call_goes_on(photos, tmp_path, monkeypatch, dedupe):
    from mmbase.data.shard_writer import ShardWriter

    config = PackConfig(shard_size=5, dedupe=dedupe)
    pack(photos, tmp_path / "whole", config)
    add = ShardWriter.add

    def full(self, key, members):
        if key == "000000012":
            self._file.write(b"half a member")
            raise OSError(28, "No space left on device")
        add(self, key, members)

    monkeypatch.setattr(ShardWriter, "add", full)
    for _ in range(2):
        with pytest.raises(MmbaseError, match="No space left on device; free space, then the same command goes on"):
            pack(photos, tmp_path / "out", config)
    monkeypatch.undo()
    pack(photos, tmp_path / "out", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_kill_9_and_again(photos, tmp_path):
    """The real thing: a process killed at several moments, then run to its end."""
    code = (
        "import sys, time\nimport mmbase.data.pack as m\nfrom mmbase.data.pack_config import PackConfig\n"
        "m._CHECKPOINT_SECONDS = 0.05\nprepare = m.prepare_picture\n"
        "m.prepare_picture = lambda *a, **k: (time.sleep(0.1), prepare(*a, **k))[1]\n"
        "print('ready', flush=True)\n"
        "m.pack(sys.argv[1], sys.argv[2], PackConfig(shard_size=4, splits={'val': 0.3}), workers=2)\n"
    )
    pack(photos, tmp_path / "whole", PackConfig(shard_size=4, splits={"val": 0.3}))
    for pause in (0.3, 0.5, 0.4):
        process = subprocess.Popen([sys.executable, "-c", code, photos, tmp_path / "out"], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    result = pack(photos, tmp_path / "out", PackConfig(shard_size=4, splits={"val": 0.3}))
    assert not result.complete_before
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_only_one_process_packs_into_a_folder(photos, tmp_path):
    def progress(done, total, kept):
        if done == 5:
            with pytest.raises(MmbaseError, match="another process is packing"):
                pack(photos, tmp_path / "out", PackConfig())

    pack(photos, tmp_path / "out", PackConfig(), progress=progress)
    assert (tmp_path / "out" / "pack.json").exists()


def test_a_folder_belongs_to_one_packing(photos, tmp_path):
    out = tmp_path / "out"
    pack(photos, out, PackConfig(splits={"val": 0.3}))
    with pytest.raises(MmbaseError, match=r"another seed \(0, now 1\).*--restart"):
        pack(photos, out, PackConfig(splits={"val": 0.3}, seed=1))
    (out / "mine.txt").write_text("keep")
    (out / "mine").mkdir()
    (out / "mine" / "00000.tar").write_bytes(b"keep")
    pack(photos, out, PackConfig(seed=1), restart=True)
    assert (out / "mine.txt").read_text() == "keep" and (out / "mine" / "00000.tar").read_bytes() == b"keep"
    assert (out / "00000.tar").exists() and not (out / "train").exists() and not (out / "val").exists()
    (photos / "captions.csv").write_text("file_name,caption\n1.jpg,one\n")
    with pytest.raises(MmbaseError, match="another source"):
        pack(photos, out, PackConfig(seed=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(MmbaseError, match="not empty and no packing"):
        pack(photos, tmp_path / "full")
    with pytest.raises(MmbaseError, match="is a file"):
        pack(photos, tmp_path / "full" / "thesis.tex")


def test_a_damaged_state_is_said(photos, tmp_path):
    out = tmp_path / "out"
    pack(photos, out)
    (out / "pack.json").write_text("{")
    with pytest.raises(MmbaseError, match=r"damaged.*--restart"):
        pack(photos, out)
    assert pack(photos, out, restart=True).resumed_at == 0


def test_splits_keep_pictures_and_groups_together(photos, tmp_path):
    pack(photos, tmp_path / "a", PackConfig(splits={"val": 0.25, "test": 0.25}))
    origins = {split: [json.loads(m["json"]) for m in samples(tmp_path / "a" / split).values()]
               for split in ("train", "val", "test")}  # fmt: skip
    assert sum(map(len, origins.values())) == 31 and all(origins.values())
    home = {f["origin"]: split for split, fields in origins.items() for f in fields}
    assert home["captions.csv:6"] == home["captions.csv:38"], "the same picture with two captions"
    pack(photos, tmp_path / "b", PackConfig(splits={"val": 0.4}, split_by="group", seed=1))
    groups = [{json.loads(m["json"])["group"] for m in samples(tmp_path / "b" / s).values()} for s in ("train", "val")]
    assert groups[0] and not groups[0] & groups[1]
    with pytest.raises(MmbaseError, match=r"not one of 37 rows can be packed: .*no field vendor to split by"):
        pack(photos, tmp_path / "c", PackConfig(splits={"val": 0.4}, split_by="vendor", max_bad_share=1.0))


def test_dedupe(tmp_path):
    root = tmp_path / "p"
    root.mkdir()
    base = picture(0, (200, 150))
    base.save(root / "a.png")
    (root / "b.png").write_bytes((root / "a.png").read_bytes())
    base.resize((150, 112)).save(root / "c.jpg", quality=70)
    picture(1, (200, 150)).save(root / "d.png")
    Image.new("RGB", (64, 64), (200, 0, 0)).save(root / "red.png")
    Image.new("RGB", (64, 64), (0, 0, 200)).save(root / "blue.png")
    for path in list(root.iterdir()):
        path.with_suffix(".txt").write_text("one" if path.stem == "a" else "two")
    kept = {}
    for mode in ("none", "pairs", "images", "near"):
        pack(root, tmp_path / mode, PackConfig(dedupe=mode, shuffle=False))
        kept[mode] = {json.loads(m["json"])["origin"] for m in samples(tmp_path / mode).values()}
    everything = {"a.png", "b.png", "c.jpg", "d.png", "red.png", "blue.png"}
    assert kept["none"] == kept["pairs"] == everything
    assert kept["images"] == everything - {"b.png"}
    assert kept["near"] == everything - {"b.png", "c.jpg"}


def test_filters(photos, tmp_path):
    Image.new("RGB", (500, 20)).save(photos / "0.jpg")
    config = PackConfig(filters=[FilterConfig(field="aspect", max=3), FilterConfig(field="group", one_of=["1", 0])])
    result = pack(photos, tmp_path / "out", config)
    assert result.removed["aspect above 3"] == 1 and result.removed["group not one of 1, 0"] == 10
    with pytest.raises(MmbaseError, match=r"not one of .* rows can be packed"):
        pack(photos, tmp_path / "none", PackConfig(filters=[FilterConfig(field="width", min=999)], max_bad_share=1))
    assert result.splits[""]["samples"] == 20


def test_too_many_bad_rows_stop_it(photos, tmp_path):
    lines = ["file_name,caption"] + [f"gone-{i}.jpg,x" for i in range(300)]
    (photos / "captions.csv").write_text("\n".join(lines))
    with pytest.raises(MmbaseError, match=r"200 of the first 200 rows are bad.*cannot be read.*--max-bad-share"):
        pack(photos, tmp_path / "out")
    with pytest.raises(MmbaseError, match="not one of 300 rows"):
        pack(photos, tmp_path / "out", PackConfig(max_bad_share=1.0))


# --------------------------------------------------------------------------------------------- sources


def origins(path, options=None):
    source = open_source(path, options or SourceOptions())
    rows = [source.read(row) for row in range(len(source))]
    return source, rows


def test_an_image_folder(tmp_path):
    for label in ("tabby_cat", "dog"):
        (tmp_path / label / "more").mkdir(parents=True)
        picture(1).save(tmp_path / label / "2.png")
        picture(2).save(tmp_path / label / "1.PNG")
    source, rows = origins(tmp_path)
    assert source.kind == "imagefolder"
    assert [(row.origin, row.caption) for row in rows] == [
        ("dog/1.PNG", "dog"), ("dog/2.png", "dog"), ("tabby_cat/1.PNG", "tabby cat"), ("tabby_cat/2.png", "tabby cat"),
    ]  # fmt: skip
    _, rows = origins(tmp_path, SourceOptions(template="a photo of a {label}"))
    assert rows[2].caption == "a photo of a tabby cat"
    with pytest.raises(MmbaseError, match=r"names 'lable'.*did you mean 'label'"):
        origins(tmp_path, SourceOptions(template="a {lable}"))
    with pytest.raises(MmbaseError, match="names no field"):
        origins(tmp_path, SourceOptions(template="a cat"))


def test_captions_beside_pictures(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_bytes("\ufeffa cät\n".encode())
    (tmp_path / "0.json").write_text('{"similarity": 0.3}')
    (tmp_path / "1.txt").write_bytes(b"latin \xe9")
    source = open_source(tmp_path, SourceOptions())
    assert source.kind == "textfiles"
    assert source.read(0).caption.strip() == "a cät" and source.read(0).fields["similarity"] == 0.3
    assert "latin" in source.read(1).caption
    with pytest.raises(MmbaseError, match="no caption file"):
        source.read(2)


def test_csv_in_any_dress(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "semi.csv").write_bytes(
        '\ufefffilepath;title;n\r\n0.png;"a; ""b""\r\nc";1\r\n\r\n0.png;d;2\r\n'.encode()
    )
    source, rows = origins(tmp_path / "semi.csv")
    assert [row.caption for row in rows] == ['a; "b"\r\nc', "d"] and rows[1].fields["n"] == "2"
    assert source.read(0) == rows[0], "rows are read in any order"
    (tmp_path / "tabs.tsv").write_text("image\tcaption\n0.png\ta, b\n")
    assert origins(tmp_path / "tabs.tsv")[1][0].caption == "a, b"
    (tmp_path / "short.csv").write_text("image,caption\n0.png\n")
    with pytest.raises(MmbaseError, match="the row has 1 columns, the header 2"):
        origins(tmp_path / "short.csv")


def test_json_lines_and_lists(tmp_path):
    data = encoded(picture(0), "PNG")
    rows = [
        {"image": "0.png", "caption": ["a cat", "a tabby", None], "similarity": 0.3},
        {"image": "data:image/png;base64," + base64.b64encode(data).decode(), "caption": "inline"},
        {"image": "https://example.com/x.jpg", "caption": "elsewhere"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = open_source(tmp_path / "rows.jsonl", SourceOptions())
    assert source.read(1).image == data
    assert source.read(0).caption == ["a cat", "a tabby"] and source.read(0).image == tmp_path / "0.png"
    with pytest.raises(MmbaseError, match="img2dataset"):
        source.read(2)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert open_source(tmp_path / "rows.json", SourceOptions()).read(1).caption == "inline"
    (tmp_path / "bad.jsonl").write_text('{"image": "0.png", "caption": "a"}\n[1]\n')
    with pytest.raises(MmbaseError, match=r"bad.jsonl:2 is no JSON object"):
        open_source(tmp_path / "bad.jsonl", SourceOptions())


def test_several_captions_are_kept(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.png", "captions": ["a cat", "  ", "a  tabby"]}))
    pack(tmp_path / "rows.jsonl", tmp_path / "out")
    (members,) = samples(tmp_path / "out").values()
    assert members["txt"] == b"a cat" and json.loads(members["json"])["captions"] == ["a cat", "a tabby"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(2):
        images = [encoded(picture(10 * part + i)) for i in range(25)]
        table = pyarrow.table(
            {
                "image": [{"bytes": data, "path": None} for data in images],
                "text": [f"part {part}, row {i}" for i in range(25)],
                "score": pyarrow.array([None if i == 3 else i / 25 for i in range(25)], pyarrow.float32()),
                "thumbnail": [b"\xff"] * 25,
            }
        )
        parquet.write_table(table, folder / f"{part}.parquet", row_group_size=10)
    source, rows = origins(folder)
    assert source.kind == "parquet" and list(source.sizes) == [10, 10, 5, 10, 10, 5]
    assert rows[27].caption == "part 1, row 2" and rows[27].origin == "1.parquet:0:2"
    pack(folder, tmp_path / "out", PackConfig(shard_size=20), workers=2)
    packed = [json.loads(m["json"]) for m in samples(tmp_path / "out").values()]
    assert len(packed) == 50 and len({f["caption"] for f in packed}) == 50
    assert not any("thumbnail" in f for f in packed)
    assert sum("score" not in f for f in packed) == 2
    (folder / "0.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(MmbaseError, match="no readable Parquet"):
        open_source(folder, SourceOptions())


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["tabby_cat", "dog"]),
            "n": datasets.Value("int64"),
        }
    )
    rows = {"img": [picture(i) for i in range(12)], "label": [i % 2 for i in range(12)], "n": list(range(12))}
    train = datasets.Dataset.from_dict(rows, features)
    train.info.license = "cc-by-4.0"
    train.save_to_disk(tmp_path / "one")
    source, read = origins(tmp_path / "one")
    assert source.kind == "huggingface" and source.info["licence"] == "cc-by-4.0"
    assert [row.caption for row in read[:2]] == ["tabby cat", "dog"]
    result = pack(tmp_path / "one", tmp_path / "out", options=SourceOptions(template="a {label}, {n}"))
    assert result.licence == "cc-by-4.0" and result.splits[""]["samples"] == 12
    assert sorted(m["txt"] for m in samples(tmp_path / "out").values())[0] == b"a dog, 1"
    datasets.DatasetDict(train=train, test=train.select(range(3))).save_to_disk(tmp_path / "two")
    with pytest.raises(MmbaseError, match="splits train, test; choose one with --subset"):
        open_source(tmp_path / "two", SourceOptions())
    with pytest.raises(MmbaseError, match="did you mean 'test'"):
        open_source(tmp_path / "two", SourceOptions(subset="tset"))
    assert len(open_source(tmp_path / "two", SourceOptions(subset="test"))) == 3


def test_a_missing_package_is_said(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MmbaseError, match=r"needs pyarrow .*pip install 'mmbase\[pack\]'"):
        open_source(tmp_path / "x.parquet", SourceOptions())


def test_shards_again(photos, tmp_path):
    pack(photos, tmp_path / "first", PackConfig(shard_size=10, licence="MIT", name="noise", source="a program"))
    result = pack(tmp_path / "first", tmp_path / "second", PackConfig(picture=PictureConfig(size=20), shard_size=16))
    assert result.splits[""]["samples"] == 31 and result.licence == "MIT"
    packed = [json.loads(m["json"]) for m in samples(tmp_path / "second").values()]
    assert {f["height"] for f in packed} == {20} and {f["group"] for f in packed} == {"0", "1", "2"}
    sheet = read_datasheet(tmp_path / "second")
    assert sheet.sources[0].name == "noise" and sheet.sources[0].source == "a program"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no"),
        (lambda p: p.mkdir(), "holds no pictures"),
        (lambda p: p.write_bytes(b"x"), "cannot tell what"),
        (lambda p: (p.mkdir(), picture(0).save(p / "0.png")), "no captions"),
        (lambda p: (p.mkdir(), (p / "a.csv").write_text("x"), (p / "b.csv").write_text("x")), "several tables"),
        (lambda p: (p.mkdir(), (p / "a.csv").write_text("")), "is empty"),
        (lambda p: (p.mkdir(), (p / "a.csv").write_text("image,caption\n")), "no rows"),
        (lambda p: (p.mkdir(), (p / "a.csv").write_text("a,b\n1,2\n")), r"--image-column \(columns: a, b\)"),
        (lambda p: (p.mkdir(), (p / "a.csv").write_text("image,b\n1,2\n")), r"--caption-column"),
        (lambda p: (p.mkdir(), (p / "state.json").write_text("{}")), "no readable Hugging Face"),
        (lambda p: ((p / "train" / "cat").mkdir(parents=True), (p / "val").mkdir(),
                    picture(0).save(p / "train" / "cat" / "0.png")), "look like splits"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_understood(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(MmbaseError, match=message) as caught:
        open_source(tmp_path / "source", SourceOptions())
    assert "\n" not in str(caught.value)


def test_options_that_cannot_be(photos):
    with pytest.raises(MmbaseError, match=r"no column 'captoin'; did you mean 'caption'"):
        open_source(photos, SourceOptions(caption_column="captoin"))
    with pytest.raises(MmbaseError, match="unknown kind 'parkett'"):
        open_source(photos, SourceOptions(kind="parkett"))
    with pytest.raises(MmbaseError, match="--image-root"):
        open_source(photos, SourceOptions(image_root=photos / "no"))
    refused = {
        "between 0 and 1": {"val": 1.0},
        "nothing for train": {"a": 0.6, "b": 0.4},
        "what the other splits leave": {"train": 0.5},
        "name of letters": {"../x": 0.5},
    }
    for message, splits in refused.items():
        with pytest.raises(ValidationError, match=message):
            PackConfig(splits=splits)


# -------------------------------------------------------------------------------------- pictures, order


def test_pictures_as_asked():
    data = encoded(picture(0, (400, 200)), quality=95)
    same = prepare_picture(data, PictureConfig())
    assert same.data == data and same.extension == "jpg"
    sizes = {
        mode: prepare_picture(data, PictureConfig(size=100, resize=mode)) for mode in ("shortest", "longest", "square")
    }
    assert {mode: (p.width, p.height) for mode, p in sizes.items()} == {
        "shortest": (200, 100), "longest": (100, 50), "square": (100, 100),
    }  # fmt: skip
    assert Image.open(io.BytesIO(sizes["longest"].data)).size == (100, 50)
    assert (sizes["longest"].original_width, sizes["longest"].original_height) == (400, 200)
    assert prepare_picture(data, PictureConfig(size=999)).data == data, "never enlarged"
    png = prepare_picture(data, PictureConfig(format="png"))
    assert png.extension == "png" and Image.open(io.BytesIO(png.data)).format == "PNG"
    with pytest.raises(MmbaseError, match="min_side=201"):
        prepare_picture(data, PictureConfig(min_side=201))


def test_pictures_of_every_dress_come_out_plain():
    clear = picture(1, (50, 50), "RGBA")
    small = prepare_picture(encoded(clear, "PNG"), PictureConfig(size=25))
    assert small.extension == "webp" and Image.open(io.BytesIO(small.data)).mode == "RGBA"
    assert prepare_picture(encoded(clear, "PNG"), PictureConfig(format="jpg")).extension == "jpg"
    frames = [picture(i) for i in range(3)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    cmyk = encoded(picture(2).convert("CMYK"), "JPEG")
    grey = encoded(picture(3).convert("L"), "JPEG")
    palette = encoded(picture(4).convert("P"), "BMP")
    deep = encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG")
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    for data in (gif, cmyk, grey, palette, deep, animated):
        packed = prepare_picture(data, PictureConfig(size=8))
        with Image.open(io.BytesIO(packed.data)) as image:
            assert image.mode in ("RGB", "L") and getattr(image, "n_frames", 1) == 1
    assert prepare_picture(animated, PictureConfig()).extension == "jpg", "an animation is not kept"


def test_turned_pictures_are_packed_upright_and_bare():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    data = encoded(picture(0, (60, 40)), exif=exif)
    turned = prepare_picture(data, PictureConfig())
    with Image.open(io.BytesIO(turned.data)) as image:
        assert image.size == (40, 60) == (turned.width, turned.height) and not image.getexif()
    assert prepare_picture(data, PictureConfig(upright=False)).data == data


def test_order_is_a_permutation_and_resumes():
    class Source:
        sizes = (7, 3, 0, 12, 5)
        window = 2

    whole = list(order(Source, 3, True))
    assert sorted(whole) == list(range(27)) and whole != sorted(whole)
    for start in (0, 1, 13, 26, 27):
        assert list(order(Source, 3, True, start)) == whole[start:]
        assert list(order(Source, 3, False, start)) == list(range(start, 27))


def test_signatures():
    base = picture(0, (300, 200))
    again = Image.open(io.BytesIO(encoded(base.resize((150, 100)), quality=60)))
    assert look_the_same(signature(base), signature(again))
    assert not look_the_same(signature(base), signature(picture(1, (300, 200))))
    red, blue = (Image.new("RGB", (50, 50), colour) for colour in ("red", "blue"))
    assert not look_the_same(signature(red), signature(blue))
    near = NearDuplicates()
    rng = np.random.default_rng(0)
    marks = [rng.bytes(64) for _ in range(300)]
    for mark in marks:
        assert near.find(mark) is None
        near.add(mark)
    for number in (0, 7, 299):
        changed = bytearray(marks[number])
        for bit in rng.choice(128, 6, replace=False):
            changed[bit // 8] ^= 1 << (bit % 8)
        assert near.find(bytes(changed)) == number
