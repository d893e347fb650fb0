"""Workers that die, hang, fail or are left alone: a clear error in time, and nothing left behind."""

import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from mmbase.data import loader
from mmbase.data.prepare import IDLE
from mmbase.errors import MmbaseError

from .little_shards import TOKENIZER, write_shards
from .test_exactness import session_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return str(write_shards(tmp_path_factory.mktemp("workers"), [16, 16, 16]))


def open_loader(shards, **options):
    return loader(shards, **{"tokenizer": TOKENIZER, "image_size": 16, "batch_size": 12, "workers": 2} | options)


def gone(processes):
    deadline = time.monotonic() + 10
    while any(session_of(pid) is not None for pid in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_killed_worker_is_told_at_once(shards):
    stream = open_loader(shards)
    next(stream)
    processes = stream._pool.processes()
    os.kill(processes[1], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(
        MmbaseError, match=rf"worker 1 \(process {processes[1]}\) was killed by SIGKILL \(out of memory\?\)"
    ):
        list(islice(stream, 20))
    assert time.monotonic() - started < 20 and gone(processes)
    with pytest.raises(MmbaseError, match="closed"):
        next(stream)


def stop_while(stream, number, idle):
    """Stop a worker at work, or waiting for some."""
    process, status = stream._pool.processes()[number], stream._arena.status[number]
    for _ in range(10_000):
        os.kill(process, signal.SIGSTOP)
        time.sleep(0.002)
        if (status[0] == IDLE) == idle:
            return
        os.kill(process, signal.SIGCONT)
        time.sleep(0.001)
        if not idle:
            next(stream)
    raise AssertionError("never seen so")


def test_a_stuck_worker_is_told_within_the_timeout(shards):
    stream = open_loader(shards, image_size=256)
    next(stream)
    stream._pool.timeout = 5.0  # only now: a busy machine may take longer to start them
    stop_while(stream, 0, idle=False)
    processes = stream._pool.processes()
    message = rf"worker 0 \(process {processes[0]}\) has not moved for [\d]+ s while \w+ sample \d+ of '.*\.tar'"
    with pytest.raises(MmbaseError, match=message):
        list(islice(stream, 40))
    assert gone(processes)


def test_workers_stopped_while_they_wait_are_told_too(shards):
    stream = open_loader(shards)
    next(stream)
    stream._pool.timeout = 1.0
    for number in range(2):
        stop_while(stream, number, idle=True)
    with pytest.raises(MmbaseError, match=r"data workers have not moved for \d+ s while \d+ pieces of work wait"):
        list(islice(stream, 400))


def test_a_nursery_that_dies_is_told(shards):
    stream = open_loader(shards)
    next(stream)
    processes = stream._pool.processes()
    stream._pool._nursery.kill()
    with pytest.raises(MmbaseError, match="process that starts data workers ended with code -9"):
        list(islice(stream, 100_000))
    assert gone(processes)


ORPHANS = """
import os, signal, sys, time
from mmbase.data import loader
from mmbase.data.prepare import IDLE
stream = loader(sys.argv[1], image_size=16, batch_size=12, workers=3, tokenizer={"kind": "clip"})
next(stream)
processes = stream._pool.processes()
os.kill(processes[0], signal.SIGSTOP)  # one that cannot leave by itself
print(*processes, stream._pool._nursery.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_training_process_is_killed(shards):
    done = subprocess.run([sys.executable, "-c", ORPHANS, shards], capture_output=True, text=True)
    processes = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and len(processes) == 4 and gone(processes)


def test_workers_go_on_while_nobody_asks(shards):
    """All that is planned gets done during a long training step, not only what each worker has in hand."""
    with open_loader(shards, prefetch=3) as stream:
        while next(stream) and stream._pool.outstanding <= stream.workers:
            pass  # on a busy machine all of it may be back before we look
        seen, since = None, time.monotonic()
        while time.monotonic() - since < 2:
            status = stream._arena.status.tolist()
            if status != seen or any(row[0] != IDLE for row in status):
                seen, since = status, time.monotonic()
            time.sleep(0.01)
        while stream._pool.outstanding:
            stream._pool.take()
        assert stream._arena.status.tolist() == seen


def test_a_fork_of_the_loading_process_leaves_the_workers_alone(shards):
    with open_loader(shards) as stream:
        next(stream)
        child = os.fork()
        if not child:
            stream.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        list(islice(stream, 10))


def test_closing_ends_the_workers_and_so_does_forgetting(shards):
    stream = open_loader(shards)
    first = next(stream)
    processes = stream._pool.processes()
    stream.close()
    stream.close()
    assert gone(processes) and first["image"].float().mean() > 0
    stream = open_loader(shards)
    next(stream)
    processes = stream._pool.processes()
    del stream
    assert gone(processes)


def open_tars():
    files = Path("/proc/self/fd").iterdir()
    return [link for file in files if (link := os.path.realpath(file)).endswith(".tar")]


def test_closing_closes_the_shards_and_so_does_forgetting(shards):
    stream = open_loader(shards, workers=0)
    next(stream)
    assert len(open_tars()) == 3
    stream.close()
    assert not open_tars()
    stream = open_loader(shards, workers=0)
    next(stream)
    del stream
    assert not open_tars()


def test_workers_do_not_import_what_lies_in_the_working_folder(shards, tmp_path, monkeypatch):
    for name in ("mmbase", "torch", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    with open_loader(shards) as stream:
        assert len(next(stream)["key"]) == stream.batch_size


class Broken(type(TOKENIZER)):
    kind = "broken for a test"

    def __init__(self):
        self.__dict__.update(TOKENIZER.__dict__)

    def __reduce__(self):
        return pickle.loads, (b"cno_such_module\nThing\n.",)


class NotSent(Broken):
    kind = "not sent, for a test"

    def __reduce__(self):
        raise TypeError("cannot pickle a lock")


def test_what_cannot_be_sent_or_loaded(shards):
    with pytest.raises(
        MmbaseError, match="cannot send the data settings to workers: cannot pickle a lock; use workers=0"
    ):
        open_loader(shards, tokenizer=NotSent())
    stream = open_loader(shards, tokenizer=Broken())
    with pytest.raises(RuntimeError, match=r"(?s)a data worker failed.*no_such_module"):
        next(stream)


def test_an_error_of_the_data_is_raised_as_one(shards, tmp_path):
    bad = write_shards(tmp_path, [20])
    (bad / "000.tar").write_bytes(
        (bad / "000.tar").read_bytes().replace(b"JFIF", b"JUNK").replace(b"\xff\xda", b"\xff\x00")
    )
    stream = open_loader(str(bad), errors="raise")
    with pytest.raises(MmbaseError, match=r"sample '\d+' of '.*000.tar' at byte \d+: .*; repair or remove it"):
        list(islice(stream, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"rank": 2, "world_size": 2}, "rank=2 of world_size=2: ranks count from 0"),
        ({"start": -5}, "start=-5 must be at least 0"),
        ({"prefetch": 0}, "prefetch=0 must be at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 is no whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"image_size": 0}, "image_size=0 must be a side in pixels"),
        ({"image_size": (16,)}, r"image_size=\(16,\) must be a side in pixels"),
        ({"crop_scale": (1, 0.5)}, r"crop_scale=\(1, 0.5\) must be a range within 0 to 1"),
        ({"crop_ratio": (0, 0)}, r"crop_ratio=\(0, 0\) must be a range above 0"),
        ({"alpha": "grey"}, "alpha='grey' is none of 'keep', 'drop', 'white', 'black'"),
        ({"decode": "slow"}, "decode='slow' is none of 'fast', 'exact'"),
        ({"weights": [float("nan")]}, "no finite number: nan"),
        ({"errors": "skip"}, "errors='skip' is neither"),
        ({"tokenizer": "ViT-B-33"}, "did you mean 'ViT-B-32'"),
        ({"batch_size": 49}, "batch_size=49 is larger than the 48 samples"),
        ({"captions": ["plain"]}, "names no field"),
        ({"captions": ["{open"]}, "malformed"),
        ({"filters": ["similarity>=0.3"]}, "similarity"),
        ({"cache": {"max_bytes": 5}}, "'max_bytes': 5.* is no cache: max_bytes: Input should be greater than"),
        ({"cache": {"max_byte": 5}}, "is no cache: max_byte: Extra inputs"),
        ({"weights": [1, 2]}, "a mixture of 1 sources needs as many weights, not 2"),
    ],
)
def test_mistakes(shards, options, message):
    with pytest.raises(MmbaseError, match=message):
        open_loader(shards, **{"workers": 0} | options)


def test_shapes_captions_and_fields(shards):
    options = {"image_size": (24, 16), "workers": 0, "batch_size": 40, "crop_ratio": None}
    with open_loader(shards, captions=[{"field": "short"}], **options) as stream:
        batch = next(stream)
        assert batch["image"].shape == (40, 3, 24, 16) and batch["text"].shape == (40, 12)
        texts = [TOKENIZER.decode(row.tolist()) for row in batch["text"]]
    assert texts == [f"thing {int(key)}" for key in batch["key"]]
    mixed = [{"field": "txt", "weight": 1}, {"template": "no {number}", "weight": 3}, {"field": "absent"}]
    with open_loader(shards, captions=mixed, **options) as stream:
        texts = [TOKENIZER.decode(row.tolist()) for row in next(stream)["text"]]
    assert 20 <= sum(text.startswith("no ") for text in texts) <= 38
    assert all(text.startswith(("no ", "a picture of thing ")) for text in texts)


def test_a_tokenizer_by_a_models_name(shards):
    with open_loader(shards, workers=0, tokenizer="ViT-B-32") as stream:
        assert next(stream)["text"].shape == (12, 77)
