import pytest

from mmbase.errors import MmbaseError
from mmbase.evaluation import latency
from mmbase.evaluation.latency import measure_latency, model_size, time_call


class Clock:
    """A clock that moves only when a call says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_percentiles_of_known_durations_without_the_warmup(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock.perf_counter)
    durations = iter([9.0, 9.0, *(milliseconds / 1e3 for milliseconds in range(1, 12))])

    def call():
        clock.now += next(durations)

    timing = time_call(call, repeats=11, warmup=2, budget_s=60)
    assert timing["median_ms"] == pytest.approx(6.0)
    assert timing["p10_ms"] == pytest.approx(2.0)
    assert timing["p90_ms"] == pytest.approx(10.0)
    assert timing["calls"] == 11


def test_a_slow_call_stops_at_the_budget_but_after_three(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock.perf_counter)

    def call():
        clock.now += 5.0

    assert time_call(call, repeats=50, warmup=0, budget_s=1.0)["calls"] == 3


def test_every_encoder_is_timed_at_its_batch_size(model, emoji_samples):
    images = [sample["image"] for sample in emoji_samples[:3]]
    record = measure_latency(model, images, ["a cat"], (1, 5), repeats=4, warmup=1)
    assert set(record["timings"]) == {"image_batch_1", "image_batch_5", "text_batch_1"}
    assert model.image_calls == [1] * 5 + [5] * 5
    assert model.text_calls == [1] * 5
    batch = record["timings"]["image_batch_5"]
    assert batch["per_item_ms"] == pytest.approx(batch["median_ms"] / 5)
    assert 0 < batch["p10_ms"] <= batch["median_ms"] <= batch["p90_ms"]
    assert record["device"] == "cpu"
    assert record["threads"] >= 1
    assert record["image_size"] == 8


def test_preprocessing_is_timed_where_the_model_exposes_it(model, emoji_samples):
    seen = []
    model.preprocess = seen.append
    record = measure_latency(model, [emoji_samples[0]["image"]], repeats=3, warmup=0)
    assert "preprocess_1" in record["timings"]
    assert len(seen) == 3


def test_nothing_to_time_is_refused(model, emoji_samples):
    with pytest.raises(MmbaseError, match="an image and a text"):
        measure_latency(model, [])
    with pytest.raises(MmbaseError, match="at least 1"):
        measure_latency(model, [emoji_samples[0]["image"]], batch_sizes=(0,))
    with pytest.raises(MmbaseError, match="at least one call"):
        time_call(lambda: None, repeats=0)


def test_size_trusts_the_total_for_shared_weights():
    assert model_size({"image": 3, "text": 4}) == {"parts": {"image": 3, "text": 4}, "total": 7, "megabytes": 28e-6}
    assert model_size({"image": 3_000_000, "text": 4_000_000, "total": 5_000_000})["megabytes"] == 20.0
