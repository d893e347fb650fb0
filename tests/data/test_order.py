"""The order: a permutation every epoch, reached anywhere at once, within its windows, and well mixed."""

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbase.data.draws import KeyedGenerator, permutation, sample_keys
from mmbase.data.order import SampleOrder
from mmbase.errors import MmbaseError


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 1 << 70),
    window=st.integers(1, 14),
    shuffle=st.booleans(),
)
def test_every_epoch_shows_every_sample_once(sizes, seed, window, shuffle):
    order = SampleOrder(sizes, seed, window, shuffle=shuffle)
    every = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    places = order.span(0, 3 * len(order))
    for epoch in range(3):
        rows = slice(epoch * len(order), (epoch + 1) * len(order))
        assert set(zip(places.shard[rows].tolist(), places.row[rows].tolist())) == every
        assert (places.epoch[rows] == epoch).all()
    if not shuffle:
        assert list(zip(*(c[: len(order)].tolist() for c in places[1:]))) == sorted(every)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), data=st.data())
def test_any_span_is_a_part_of_the_whole(sizes, data):
    order = SampleOrder(sizes, seed=5, window=3)
    whole = order.span(0, 4 * len(order))
    start = data.draw(st.integers(0, 4 * len(order)))
    stop = data.draw(st.integers(start, 4 * len(order)))
    fresh = pickle.loads(pickle.dumps(SampleOrder(sizes, seed=5, window=3)))
    for part, column in zip(fresh.span(start, stop), whole):
        assert np.array_equal(part, column[start:stop])
    if start < stop:
        assert fresh.at(start) == tuple(int(column[start]) for column in whole)


def test_samples_stay_within_the_windows_that_are_fetched():
    order = SampleOrder([7, 0, 5, 9, 3, 8, 6, 4], seed=2, window=3)  # three windows of 2, 3 and 3 shards
    for position in range(3 * len(order)):
        upcoming = order.upcoming_shards(position)
        _, shard, _ = order.at(position)
        assert shard in upcoming[:3] and len(set(upcoming)) == len(upcoming) <= 6 and 1 not in upcoming
        soon = order.span(position, position + 3).shard  # the next window is on its way, over the end of an epoch too
        assert set(soon.tolist()) <= set(upcoming)


def test_neighbours_are_of_the_same_window_or_of_all_shards():
    order = SampleOrder([10] * 9, seed=1, window=3)
    first = set(order.span(0, 30).shard.tolist())
    shard = next(iter(first))
    places = order.neighbours(0, shard, np.arange(1000) * 7919)
    assert set(places.shard.tolist()) == first and set(places.row.tolist()) == set(range(10))
    wide = order.neighbours(0, shard, np.arange(1000) * 7919, wide=True)
    assert set(wide.shard.tolist()) == set(range(9))


def test_the_order_is_fixed_for_good():
    """A change here breaks the resume of every run in progress: it must be meant."""
    places = SampleOrder([5, 3, 4], seed=7, window=2).span(0, 16)
    assert list(zip(*(column.tolist() for column in places))) == FIXED
    assert sample_keys(7, np.array([0, 3]), np.array([5, 1 << 40])).tolist() == FIXED_KEYS


FIXED = [
    (0, 1, 2),
    (0, 1, 0),
    (0, 1, 1),
    (0, 2, 0),
    (0, 2, 3),
    (0, 0, 0),
    (0, 0, 1),
    (0, 2, 1),
    (0, 0, 4),
    (0, 0, 2),
    (0, 2, 2),
    (0, 0, 3),
    (1, 2, 3),
    (1, 2, 1),
    (1, 2, 2),
    (1, 2, 0),
]
FIXED_KEYS = [-6855275664416539713, -6766862332653070271]


def test_seeds_and_epochs_differ():
    def rows(seed, epoch):
        return SampleOrder([50] * 8, seed=seed, window=4).span(400 * epoch, 400 * epoch + 400)[1:]

    for one, other in (((0, 0), (1, 0)), ((0, 0), (0, 1)), ((0, 1), (1, 0))):
        assert (np.stack(rows(*one)) == np.stack(rows(*other))).all(0).mean() < 0.05


def test_a_permutation_is_uniform():
    counts = np.zeros((6, 6), int)
    for seed in range(6000):
        counts[np.arange(6), permutation(6, seed)] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi square, 25 degrees of freedom: p < 1e-4


def test_keyed_generators_are_as_new():
    moved = KeyedGenerator()
    for key in (3, -5, 1 << 62):
        moved.at(99, 1).integers(10, size=3, dtype=np.int32)  # leaves half a word behind
        fresh = np.random.Generator(np.random.Philox(key=np.array([key & (1 << 64) - 1, 4], np.uint64)))
        again = moved.at(key, 4)
        assert again.random(5).tolist() == fresh.random(5).tolist()
        assert again.integers(9, dtype=np.int32) == fresh.integers(9, dtype=np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "hold no sample"),
        (([0, 0],), "the 2 shards hold no sample"),
        (([3, -1],), "shard 1 has size -1"),
        (([3], 0, 0), "window=0 must be at least 1"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(MmbaseError, match=message):
        SampleOrder(*arguments)
    with pytest.raises(MmbaseError, match="position -1 is below 0"):
        SampleOrder([1]).span(-1, 0)


BILLION = """
import re, time
import numpy as np
from mmbase.data.order import SampleOrder
started = time.perf_counter()
order = SampleOrder(np.full(100_000, 10_000), seed=3)
places = order.span(50_000_000, 50_004_096)
seconds = time.perf_counter() - started
assert len(order) == 10**9 and len(set(zip(*(c.tolist() for c in places[1:])))) == 4096
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(seconds, int(peak) / 1024)
"""


def test_fifty_millions_into_a_billion():
    seconds, megabytes = min(_run(BILLION) for _ in range(2))
    assert seconds < 1 and megabytes < 300


def _run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def test_positions_are_found_fast():
    order = SampleOrder(np.full(1000, 1000), seed=3)
    order.span(0, 1)
    started = time.perf_counter()
    for position in range(0, 12_800, 64):
        order.span(position, position + 64)
    assert time.perf_counter() - started < 1
