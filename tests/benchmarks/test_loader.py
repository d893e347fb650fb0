"""The loaders' benchmark: its shards, and a whole run at a small size with its files."""

import importlib.metadata
import io
import json
import sys
import tarfile

import pytest
from PIL import Image

from mmbase.errors import MmbaseError
from mmbase_bench import loader
from mmbase_bench.photo_shards import SIDES, photo_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("photos")
    photo_shards(folder, samples=24, shards=2, seed=3, qualities=(75, 95))
    return folder


def test_shards_hold_pictures_of_the_stated_sizes_with_captions(folder, tmp_path):
    made = photo_shards(folder, samples=24, shards=2, seed=3, qualities=(75, 95))  # found, not built again
    assert made.urls(folder).endswith("{00000..00001}.tar")
    assert json.loads((folder / "sizes.json").read_text()) == {"00000.tar": 12, "00001.tar": 12}
    names, pictures = [], []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                names.append(member.name)
                content = tar.extractfile(member).read()
                if member.name.endswith("jpg"):
                    pictures.append(Image.open(io.BytesIO(content)))
                else:
                    assert content.decode().strip()
    assert names == [f"{row:08d}.{ending}" for row in range(24) for ending in ("jpg", "txt")]
    assert all(SIDES[0] <= side <= SIDES[1] for picture in pictures for side in picture.size)
    assert len({picture.size for picture in pictures}) > 15
    assert {picture.quantization[0][0] for picture in pictures} == {8, 2}  # of qualities 75 and 95
    again = tmp_path / "again"
    photo_shards(again, samples=24, shards=2, seed=4, qualities=(75, 95))
    assert (again / "00001.tar").read_bytes() != (folder / "00001.tar").read_bytes()
    with pytest.raises(
        MmbaseError, match=r"holds 24 samples of seed 3 and qualities \[75, 95\] in 2 shards; name another"
    ):
        photo_shards(folder, samples=25, shards=2, seed=3)


@pytest.mark.slow
def test_a_run_and_its_files(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--shards", str(folder), "--samples", "24", "--shard-count", "2", "--seed", "3"]
    arguments += ["--qualities", "75", "95"]
    arguments += ["--batch-size", "4", "--image-size", "32", "--workers", "1", "--rounds", "2", "--seconds", "0.2"]
    monkeypatch.setattr(sys, "argv", ["mmbase bench loader", *arguments, "--output", str(tmp_path)])
    if importlib.metadata.version("webdataset") != "0.2.86":
        with pytest.raises(MmbaseError, match=r"openclip failed: .*peers\.sh and name it with --peer-python"):
            loader.main()
        monkeypatch.setattr(loader, "BASELINE", "mmbase_float")  # no peer here: ours against itself
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--contenders", "mmbase", "mmbase_float"])
    loader.main()
    printed = capsys.readouterr().out
    assert "24 JPEGs of quality 75, 95," in printed and "built in" in printed
    record = json.loads((tmp_path / "loader.json").read_text())
    assert record["shards"]["samples"] == 24
    rows = {row["contender"]: row for row in record["results"]}
    assert rows[loader.BASELINE]["ratio"] == 1 and rows["mmbase"]["samples_per_s"] > 0
    assert all(row["cpu_ms"] > 0 and row["first_batch_s"] > 0 for row in rows.values())
    assert (tmp_path / "loader.csv").read_text().count("\n") == 1 + len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "mmbase"], "--contenders must include openclip"),
        (["--contenders", "openclipp"], "did you mean 'openclip'"),
        (["--workers", "0"], "--workers=0 must be at least 1"),
        (["--workers", "8"], "--shard-count=4 must be at least 8"),
        (["--rounds", "1"], "--rounds=1 must be at least 2"),
    ],
)
def test_mistakes(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmbase bench loader", *arguments])
    with pytest.raises(MmbaseError, match=message):
        loader.parse()
