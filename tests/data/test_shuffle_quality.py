"""How well an epoch is mixed, beside webdataset's shuffle as OpenCLIP sets it up. Printed with -s; figures in the docs.

S shards of R samples. OpenCLIP shuffles the list of shards, deals it to workers, and passes each worker's samples
through a buffer of 5,000 that starts at 1,000.
"""

import itertools

import numpy as np
import pytest

from mmbase.data.order import SampleOrder

BATCH = 256


def openclip_order(shards, rows, workers, seed):
    """Sample numbers in the order in which webdataset's own shuffles give them to the trainer."""
    import webdataset

    shard_list = list(webdataset.detshuffle(bufsize=2000, initial=500, seed=seed, epoch=0).run(iter(range(shards))))

    def worker(number):
        mine = (shard * rows + row for shard in shard_list[number::workers] for row in range(rows))
        return webdataset.detshuffle(bufsize=5000, initial=1000, seed=seed + 1 + number, epoch=0).run(mine)

    streams = [worker(number) for number in range(workers)]
    found = []
    while streams:  # batches come from the workers in turn
        for stream in list(streams):
            batch = list(itertools.islice(stream, BATCH))
            found.extend(batch)
            if len(batch) < BATCH:
                streams.remove(stream)
    return np.array(found)


def quality(order, rows):
    """What a perfect shuffle has as (0, 0, 0.29, 1 + 1 / S, about 0)."""
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    shard = order // rows
    within = place.reshape(-1, rows)
    neighbours = np.abs(np.diff(within, axis=1)) / len(order)
    ranks = within.argsort(1).argsort(1)
    runs = len(order) / (1 + np.count_nonzero(np.diff(shard)))
    same = np.mean([np.mean(b[:, None] == b) for b in shard[: len(shard) // BATCH * BATCH].reshape(-1, BATCH)])
    return {
        "rank correlation within a shard": float(np.mean([np.corrcoef(r, np.arange(rows))[0, 1] for r in ranks])),
        "rank correlation of the epoch": float(np.corrcoef(place, np.arange(len(order)))[0, 1]),
        "distance of neighbours, median": float(np.median(neighbours)),
        "run length": runs,
        "pairs of a batch from one shard": (same * BATCH - 1) / (BATCH - 1),
    }


@pytest.mark.parametrize(("shards", "rows", "workers"), [(64, 1000, 1), (400, 250, 4), (100, 10_000, 4)])
def test_mixed_better_than_a_buffer(shards, rows, workers):
    theirs = quality(openclip_order(shards, rows, workers, 0), rows)
    places = SampleOrder([rows] * shards, seed=0).span(0, shards * rows)
    ours = quality(places.shard * rows + places.row, rows)
    perfect = quality(np.random.default_rng(0).permutation(shards * rows), rows)
    print(f"\n{shards} shards of {rows}, {workers} workers")
    for name in ours:
        print(f"{name:<34} ours {ours[name]:8.4f}   webdataset {theirs[name]:8.4f}   perfect {perfect[name]:8.4f}")
    # As stored, samples of a shard come out of the buffer in much the order they went in.
    assert abs(ours["rank correlation within a shard"]) < 0.02 < theirs["rank correlation within a shard"]
    assert ours["run length"] < 1.1 and ours["pairs of a batch from one shard"] < 1 / 16 + 0.01
    assert ours["pairs of a batch from one shard"] < 0.9 * theirs["pairs of a batch from one shard"]
