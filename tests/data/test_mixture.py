"""Mixtures: shares as asked, also while they change; each source once through before again; found anywhere at once."""

import pickle

import numpy as np
import pytest

from mmbase.data.config import DataConfig
from mmbase.data.mixture import BLOCK, MixtureOrder
from mmbase.data.order import SampleOrder
from mmbase.errors import MmbaseError


def sources():
    return [
        SampleOrder([100] * 5, seed=1, window=2),
        SampleOrder([70] * 5, seed=2, window=2, first_shard=5),
        SampleOrder([11], seed=3, first_shard=10),
    ]


def source_of(places):
    return np.searchsorted([5, 10], places.shard, side="right")


def test_constant_weights_are_kept_and_sources_go_through_epochs_of_their_own():
    mixture = MixtureOrder(sources(), [2, 1, 1], seed=4)
    places = mixture.span(0, 20_000)
    source = source_of(places)
    assert np.abs(np.bincount(source) / 20_000 - [0.5, 0.25, 0.25]).max() < 0.01
    for number, order in enumerate(sources()):
        mine = np.flatnonzero(source == number)
        alone = order.span(0, len(mine))
        for column, expected in zip(places, alone):
            assert np.array_equal(column[mine], expected)
    assert len(mixture) == 861


def test_shares_of_a_whole_block_are_exact_and_the_smallest_gets_its_due():
    mixture = MixtureOrder(sources(), [1, 1, 1e-6], seed=0)
    blocks = 40
    counts = np.bincount(source_of(mixture.span(0, blocks * BLOCK)), minlength=3)
    assert abs(counts[0] - counts[1]) < 4 * blocks**0.5 and 0 < counts[2] < 10  # 1.3 expected


def test_weights_that_change():
    points = [(0.0, 0.0), (4.0 * BLOCK, 0.0), (8.0 * BLOCK, 3.0)]
    mixture = MixtureOrder(sources()[:2], [1.0, points], seed=0)
    share = [source_of(mixture.span(b * BLOCK, (b + 1) * BLOCK)).mean() for b in (0, 3, 6, 9)]
    middle = 3 * 2.5 / 4
    assert share == pytest.approx([0, 0, middle / (1 + middle), 0.75], abs=2e-4)
    assert mixture.shares(np.array([0.0, 1e12])).tolist() == [[1, 0.25], [0, 0.75]]
    assert all(shard < 5 for shard in mixture.upcoming_shards(0))
    assert {shard // 5 for shard in mixture.upcoming_shards(6 * BLOCK)} == {0, 1}


def test_any_span_is_a_part_of_the_whole():
    mixture = MixtureOrder(sources(), [3, [(0, 1), (1e5, 0)], 0.5], seed=9)
    whole = mixture.span(0, 3 * BLOCK)
    for start, stop in ((0, 5), (BLOCK - 3, BLOCK + 3), (100_000, 140_000), (7, 7)):
        fresh = pickle.loads(pickle.dumps(MixtureOrder(sources(), [3, [(0, 1), (1e5, 0)], 0.5], seed=9)))
        for part, column in zip(fresh.span(start, stop), whole):
            assert np.array_equal(part, column[start:stop])


def test_a_billion_positions_in():
    mixture = MixtureOrder(sources(), [1, 1, 1], seed=1)
    places = mixture.span(10**9, 10**9 + 3000)
    assert np.abs(np.bincount(source_of(places)) - 1000).max() < 150
    assert places.epoch[source_of(places) == 2].min() > 10**7


def test_neighbours_are_of_the_same_source():
    mixture = MixtureOrder(sources(), [1, 1, 1])
    for shard, first, last in ((3, 0, 5), (7, 5, 10), (10, 10, 11)):
        for wide in (False, True):
            found = mixture.neighbours(0, shard, np.arange(500), wide=wide).shard
            assert first <= found.min() and found.max() < last


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "3 sources needs as many weights, not 2"),
        ([1, -1, 1], "weight of a mixture is negative: -1"),
        ([0, 0, 0], "all weights of the mixture are 0 at position 0"),
        ([0, [(0, 1), (100, 0)], 0], "all weights of the mixture are 0 at position 100"),
        ([1, [(5, 1), (2, 1)], 1], "rising order"),
        ([1, [], 1], "rising order"),
    ],
)
def test_mistakes(weights, message):
    with pytest.raises(MmbaseError, match=message):
        MixtureOrder(sources(), weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data.shards or data.mixture"),
        ({"shards": "a", "mixture": [{"shards": "b"}]}, "not both"),
        ({"mixture": [{"shards": "b", "weight": -1}]}, "0 or more"),
        ({"mixture": [{"shards": "b", "weight": [[0, 1], [2, 1]]}]}, "rise from 0 to 1"),
    ],
)
def test_mistakes_in_a_recipe(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)
    assert DataConfig(mixture=[{"shards": ["a", "b"]}, {"shards": "c"}]).shard_specs() == ["a", "b", "c"]
