"""Bytes and FLOPs per rank: OpenCLIP's are what its source says, ours are half or less."""

import argparse

import pytest

from mmbase_bench.distributed_loss import measure

ROWS, WIDTH, WORLD = 24, 32, 2
FEATURES = ROWS * WIDTH * 4
MND = ROWS * (WORLD * ROWS) * WIDTH


@pytest.fixture(scope="module")
def counts():
    options = argparse.Namespace(kinds=["softmax", "sigmoid"], rows=ROWS, width=WIDTH, seed=0)
    return {(row["kind"], row["contender"]): row for row in measure(WORLD, options)}


def test_openclip_counts_are_those_of_its_source(counts):
    """Both features gathered and both gradients sent back; two rectangles, each 2MND forward and 4MND backward."""
    row = counts["softmax", "openclip"]
    assert row["bytes_sent"] == 4 * (WORLD - 1) * FEATURES and row["flops"] == 12 * MND
    row = counts["sigmoid", "openclip"]
    assert row["bytes_sent"] == 2 * (WORLD - 1) * FEATURES and row["flops"] == 6 * MND


def test_every_loss_ran_and_agrees_with_float64(counts):
    for row in counts.values():
        assert row["problem"] == "" and max(row["image_error"], row["text_error"]) < 5e-6, row


def test_ours_sends_and_computes_half(counts):
    """A few floats per column travel besides the texts and their gradients."""
    row = counts["softmax", "mmbase"]
    statistics = row["bytes_sent"] - 2 * (WORLD - 1) * FEATURES
    assert 0 < statistics <= 16 * WORLD * ROWS + 64
    assert row["flops"] == 6 * MND and counts["softmax", "mmbase-no-stash"]["flops"] == 8 * MND
    assert counts["softmax", "mmbase-ring"]["bytes_sent"] <= counts["softmax", "openclip"]["bytes_sent"]
    assert counts["sigmoid", "mmbase"]["flops"] == 6 * MND
