"""Peak resident memory against known allocations, and what becomes of calls that raise or die."""

import os
from pathlib import Path

import pytest
import torch

from mmbase_bench.memory import cpu_peaks, resident_peak

MEGABYTES = 300


def test_peaks_of_known_allocations(monkeypatch):
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    names = ["once", "raises", "one after the other", "dies", "more than there is", "small"]
    peaks = cpu_peaks("known_allocations:calls", {"megabytes": MEGABYTES}, names, timeout=60)
    assert list(peaks) == names
    for name, megabytes in {"once": MEGABYTES, "one after the other": MEGABYTES, "small": 40}.items():
        assert peaks[name] == pytest.approx(megabytes << 20, rel=0.2), name
    assert peaks["raises"] == "ZeroDivisionError: division by zero"
    assert peaks["dies"] == "the process measuring memory died (exit 3)"
    assert peaks["more than there is"] == "out of memory"


def test_what_was_there_before_does_not_count():
    before = torch.ones(25 << 20)
    assert resident_peak(lambda: before.sum()) < 20 << 20
    assert resident_peak(lambda: before + 1) == pytest.approx(100 << 20, rel=0.2)
