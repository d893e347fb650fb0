"""The same samples, pixel for pixel, for any number of ranks and workers, after any resume, after kill -9."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from mmbase.data import loader
from mmbase.errors import MmbaseError

from .consume import rows_of
from .little_shards import TOKENIZER, add, picture, write_shards

SIZES, GLOBAL = [9, 7, 0, 11, 8, 6, 9, 7, 5], 8
SAMPLES = sum(SIZES) + 1
BATCHES = 3 * SAMPLES // GLOBAL + 1
OPTIONS = {"image_size": 16, "window": 3, "crop_scale": (0.4, 1.0), "seed": 11, "captions": ["{caption}", "{short}"]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Nine shards, one of them empty, one with a picture that gives way to others."""
    import tarfile

    folder = write_shards(tmp_path_factory.mktemp("exact"), SIZES)
    with tarfile.open(folder / "004.tar", "a") as tar:
        add(tar, "torn.jpg", picture(77)[:300])
        add(tar, "torn.txt", b"torn")
        add(tar, "torn.json", b'{"short": "torn"}')
    return folder


def open_loader(shards, **options):
    return loader(str(shards), tokenizer=TOKENIZER, **OPTIONS | {"batch_size": GLOBAL} | options)


def rows(stream, batches):
    return [row for batch in islice(stream, batches) for row in rows_of(batch)]


@pytest.fixture(scope="module")
def whole(shards):
    """Three epochs read by one process alone."""
    with open_loader(shards) as stream:
        return rows(stream, BATCHES)


def test_an_epoch_is_every_good_sample_once(shards, whole):
    keys = [key for key, _ in whole]
    for epoch in range(3):
        shown = keys[epoch * SAMPLES : (epoch + 1) * SAMPLES]
        assert len(shown) == SAMPLES and len(set(shown)) == SAMPLES - 1 and "torn" not in shown
    assert len({tuple(keys[e * SAMPLES : (e + 1) * SAMPLES]) for e in range(3)}) == 3
    assert len({digest for _, digest in whole}) == len(whole)  # another crop or wording each time


@pytest.mark.parametrize(
    ("world_size", "workers"),
    [
        (1, 1),
        (1, 3),
        (2, 0),
        (2, 1),
        (4, 0),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, 3), (4, 1), (4, 3))),
    ],
)
def test_any_number_of_ranks_and_workers(shards, whole, world_size, workers):
    share = {"batch_size": GLOBAL // world_size, "world_size": world_size, "workers": workers}
    ranks = [open_loader(shards, rank=rank, **share) for rank in range(world_size)]
    try:
        together = [row for _ in range(BATCHES) for stream in ranks for row in rows_of(next(stream))]
    finally:
        for stream in ranks:
            stream.close()
    assert together == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_anywhere(shards, whole, workers):
    draw = random.Random(workers)
    with open_loader(shards, workers=workers) as stream:
        for start in [0, *(draw.randrange(len(whole) - 40) for _ in range(8)), 3]:
            stream.position = start
            assert rows(stream, 3) == whole[start : start + 24] and stream.position == start + 24
    with open_loader(shards, workers=workers, start=100, batch_size=10) as stream:  # and with another batch size
        assert rows(stream, 6) == whole[100:160]


def test_killed_anywhere(shards, whole, tmp_path):
    output, draw, kills = tmp_path / "seen.jsonl", random.Random(5), 0
    tokenizer = TOKENIZER.save(tmp_path)["path"]
    options = OPTIONS | {"shards": str(shards), "tokenizer": str(tmp_path / tokenizer), "batch_size": GLOBAL}
    done = []
    while True:
        start = done[-1]["position"] if done else 0
        asked = json.dumps(options | {"start": start, "workers": draw.choice([0, 1, 2])})
        command = [sys.executable, str(Path(__file__).with_name("consume.py")), str(output), str(3 * SAMPLES), asked]
        process = subprocess.Popen(command, start_new_session=True)
        target = len(done) + draw.randrange(2, 12)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(lines(output)) < target:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert_gone(process.pid)
        done = lines(output)
        output.write_text("".join(json.dumps(line) + "\n" for line in done))  # a torn line goes
        if done and done[-1]["position"] >= 3 * SAMPLES:
            break
    seen = [row for line in done for row in line["rows"]]
    assert seen == whole[: len(seen)] and len(seen) >= 3 * SAMPLES and kills >= 2


def lines(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def assert_gone(session):
    """No process of a session is left: workers end with the process that started them."""
    deadline = time.monotonic() + 20
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and session_of(pid) == session]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def session_of(pid):
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def test_evaluation_is_in_order_once_and_leaves_the_bad_out(shards):
    with open_loader(shards) as reference:
        assert reference.samples == SAMPLES
    found = []
    for workers, world_size in ((0, 1), (2, 1), (0, 3)):
        ranks = [
            open_loader(shards, train=False, workers=workers, rank=rank, world_size=world_size, batch_size=5)
            for rank in range(world_size)
        ]
        batches = [list(stream) for stream in ranks]
        found.append(
            [row for k in range(len(batches[0])) for one in batches for b in one[k : k + 1] for row in rows_of(b)]
        )
        assert sum(stream.counts["bad"] for stream in ranks) == 1
        for stream in ranks:
            stream.close()
    assert found[0] == found[1] == found[2]
    keys = [key for key, _ in found[0]]
    assert keys == [f"{i:05d}" for i in range(SAMPLES - 1)]


def test_batches_stay_what_they_were(shards, whole):
    """A user may keep batches: memory that they lie in is not written again before they are gone."""
    for workers in (0, 2):
        with open_loader(shards, workers=workers) as stream:
            kept = list(islice(stream, 12))
            assert [row for batch in kept for row in rows_of(batch)] == whole[: 12 * GLOBAL]
            image = kept.pop()["image"]
            del kept
            before = image.clone()
            list(islice(stream, 8))
            assert torch.equal(image, before)
        assert torch.equal(image, before)
        with pytest.raises(MmbaseError, match="is closed"):
            next(stream)


def test_filters_and_weights(shards, tmp_path):
    with open_loader(shards, filters=["number<=20", "number>=4"]) as stream:
        assert {key for key, _ in rows(stream, 3)} == {f"{i:05d}" for i in range(4, 21)}
        assert stream.samples == 17 and any("number above 20" in line for line in stream.describe())
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, [20, 20], first=1000)
    with loader([str(shards), str(other)], tokenizer=TOKENIZER, batch_size=50, weights=[1, 3], **OPTIONS) as stream:
        keys = [key for batch in islice(stream, 8) for key in batch["key"]]
        assert 60 < sum(int(key) < 1000 for key in keys) < 140
