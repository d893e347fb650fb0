"""Stage times, the verdict on a starving run, and batches on their way to the device."""

import re

import pytest
import torch

from mmbase.data import loader
from mmbase.data.prefetch import on_device
from mmbase.data.timing import DataWatch, StageTimes, verdict

from .little_shards import TOKENIZER, write_shards


class Stream:
    def __init__(self, workers=2):
        self.times, self.workers, self.counts = StageTimes(), workers, {"bad": 3}


SECONDS = {"read": 1.0, "decode": 7.1, "tokenise": 0.9, "collate": 1.0, "wait": 4.0, "copy": 0.0}


def test_the_verdict_names_share_stage_workers_and_remedy():
    told = verdict(SECONDS, 10.0, 2)
    assert told.startswith(
        "data-bound: training waits for data 40% of the time; decoding takes 71% of worker time; 2 workers; try "
    )
    assert verdict(SECONDS | {"wait": 0.5}, 10.0, 2) is None
    assert verdict(SECONDS, 10.0, 0).count("no workers") == 1
    slow_disk = verdict(SECONDS | {"read": 50.0}, 10.0, 4)
    assert "reading takes 85%" in slow_disk and "data.cache" in slow_disk


def test_more_workers_are_proposed_only_where_there_are_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert "try data.workers=5 (16 cores)" in verdict(SECONDS | {"wait": 2.0}, 10.0, 4)
    assert "try data.workers=8 (16 cores)" in verdict(SECONDS | {"wait": 5.0}, 10.0, 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert re.search("all 2 cores are in use", verdict(SECONDS, 10.0, 2))


def test_a_watch_speaks_once_for_a_stage_and_not_of_the_start(monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stream = Stream()
    watch, said = DataWatch(stream), []
    for stage in ("decode", "decode", "decode", "read"):
        stream.times.add({"wait": 5.0, stage: 9.0})
        metrics = watch.lap()
        assert metrics == {"data_wait": 5.0, f"data_{stage}": 9.0, "data_bad": 3}
        said.append(watch.verdict)
    assert said[0] is None and "decoding" in said[1] and said[2] is None and "reading" in said[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_stages_of_a_real_loader_add_up(tmp_path, workers):
    shards = str(write_shards(tmp_path, [40, 40]))
    with loader(shards, tokenizer=TOKENIZER, image_size=32, batch_size=40, workers=workers) as stream:
        for _ in range(6):
            next(stream)
        seconds = stream.times.lap()
        assert all(seconds[stage] > 0 for stage in ("read", "decode", "tokenise", "collate", "wait"))
        assert seconds["decode"] > seconds["tokenise"]
        assert all(value == 0 for value in stream.times.lap().values())
        if not workers:
            assert sum(seconds[s] for s in ("read", "decode", "tokenise", "collate")) <= seconds["wait"]


def test_batches_pass_through_to_a_cpu():
    batches = [{"image": torch.full((2, 3), i), "key": [str(i)]} for i in range(3)]
    found = list(on_device(iter(batches), torch.device("cpu"), StageTimes(), prepare=lambda b: b | {"seen": True}))
    assert [b["key"] for b in found] == [["0"], ["1"], ["2"]] and all(b["seen"] for b in found)
    assert found[1]["image"] is batches[1]["image"]


@pytest.mark.gpu
def test_batches_arrive_on_a_gpu_as_they_were():
    def batches():
        for i in range(50):
            yield {"image": torch.full((64, 3, 64, 64), i, dtype=torch.uint8), "key": [str(i)]}
        raise ValueError("the end")

    times, seen = StageTimes(), []
    with pytest.raises(ValueError, match="the end"):
        for batch in on_device(batches(), torch.device("cuda"), times):
            assert batch["image"].device.type == "cuda"
            busy = torch.randn(2000, 2000, device="cuda")
            for _ in range(5):
                busy = busy @ busy / 100
            seen.append((int(batch["key"][0]), batch["image"].float().mean() + 0 * busy.nan_to_num().sum()))
    assert [number for number, _ in seen] == list(range(50)) == [round(float(mean)) for _, mean in seen]
    assert times.seconds["copy"] > 0 and times.seconds["wait"] > 0
