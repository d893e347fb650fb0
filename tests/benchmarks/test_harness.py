"""Percentiles, floors, ratios and the order of the timed calls."""

import time

import numpy as np
import pytest
import torch

from mmbase_bench.ceilings import Ceilings, measure_ceilings
from mmbase_bench.harness import Measurement, Work, describe, floor, percentile, ratio, reason, time_alternating

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_percentile_is_numpys(count):
    samples = np.random.default_rng(count).exponential(size=count)
    for q in (0, 20, 50, 80, 100):
        assert percentile(list(samples), q) == pytest.approx(np.percentile(samples, q))


def test_floor_is_the_larger_of_the_two_terms():
    ceilings = Ceilings(matmul_flops=1e12, copy_bytes=1e9, matmul_shapes={})
    assert floor(Work(flops=2e12, bytes=1e9), ceilings) == (2000, "matmul")
    assert floor(Work(flops=2e12, bytes=3e9), ceilings) == (3000, "copy")
    row = Measurement("loss", {}, "x", timing=describe([[5000.0], [5000.0]]))
    row.set_floor(Work(2e12, 1e9), ceilings)
    assert row.ratio_to_floor == 2.5


def test_noise_is_the_same_version_timed_twice():
    timing = describe([[10.0, 11.0, 12.0], [20.0, 22.0, 24.0], [11.0], [22.0]])
    assert timing.rounds_ms == (11.0, 22.0, 11.0, 22.0)
    assert timing.noise == 0.5
    assert (timing.p20_ms, timing.p50_ms, timing.p80_ms) == tuple(
        np.percentile([10, 11, 12, 20, 22, 24, 11, 22], [20, 50, 80])
    )


def test_ratio_pairs_the_rounds():
    """A machine that slows down threefold midway changes both alike."""
    ours, theirs = describe([[1.0], [3.0], [3.0]]), describe([[2.0], [6.0], [6.3]])
    assert ratio(ours, theirs) == 0.5


def test_contenders_alternate_in_swapped_order_and_a_failing_one_keeps_its_reason():
    order = []

    def call(name):
        def run(index):
            order.append(name)
            if name == "bad" and len(order) > 6:
                raise MemoryError("no room\nfor two lines")
            time.sleep({"slow": 0.02}.get(name, 0.005))

        return run

    timings = time_alternating({n: call(n) for n in ("fast", "slow", "bad")}, device=CPU, rounds=3, warmup=1)
    assert order == ["bad", "slow", "fast", "fast", "slow", "bad", "bad", "slow", "fast", "fast", "slow"]
    assert timings["bad"] == "MemoryError: no room"
    assert 5 <= timings["fast"].p50_ms < timings["slow"].p50_ms and timings["slow"].p20_ms >= 20
    with pytest.raises(ValueError, match="at least 2, not 1"):
        time_alternating({}, device=CPU, rounds=1)


def test_reasons_are_one_line():
    assert reason(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")) == "out of memory"
    assert reason(RuntimeError("")) == "RuntimeError: no message"


def test_ceilings_bound_what_is_measured():
    ceilings = measure_ceilings(CPU, torch.float32, 128, 32, torch.get_num_threads())
    assert set(ceilings.matmul_shapes) == {"128x128x32", "128x32x128"}
    assert 1e8 < ceilings.matmul_flops == max(ceilings.matmul_shapes.values()) < 1e14
    assert 1e8 < ceilings.copy_bytes < 1e13


def test_errors_that_are_not_finite_are_a_problem_and_no_number():
    row = Measurement("loss", {"size": 8}, "x")
    row.set_errors({"loss": float("nan"), "image": 0.5, "text": float("inf")})
    flat = row.flat()
    assert flat["problem"] == "not finite: loss, text"
    assert (flat["loss_error"], flat["image_error"], flat["text_error"]) == (None, 0.5, None)
