"""Random numbers that are functions of a place: seed, epoch and sample, never of what was drawn before.

Everything rests on Philox bits and on one 64-bit mixer, both of which are fixed by definition; NumPy may change its
``permutation`` or ``shuffle`` with a release, and an order must not change with it.

Letters: B samples, n numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHARDS, WINDOW, WORDS, CROP, REPLACEMENT, SOURCES = range(100, 106)
"""Purposes: two kinds of draws for the same place share nothing."""

_MASK = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def generator(seed: int, *position: int) -> np.random.Generator:
    """Random numbers that depend on the seed and a place alone, never on what was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *position))))


class KeyedGenerator:
    """One generator that is moved from place to place: as good as a new one each time, at a tenth of the cost."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(0)
        self._state: Any = dict(self._bits.state) | {"buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        self._generator = np.random.Generator(self._bits)

    def at(self, key: int, purpose: int) -> np.random.Generator:
        """Random numbers of a sample's key (:func:`sample_keys`) and a purpose; good until the next call."""
        keyed = np.array([key & _MASK, purpose], np.uint64)
        self._bits.state = self._state | {"state": {"counter": np.zeros(4, np.uint64), "key": keyed}}
        return self._generator

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def mix64(values: np.ndarray) -> np.ndarray:
    """uint64 to uint64, bijective and without visible pattern: the finaliser of SplitMix64 (Steele et al., 2014)."""
    z = values.astype(np.uint64, copy=True)
    z ^= z >> np.uint64(30)
    z *= np.uint64(_FIRST)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_SECOND)
    z ^= z >> np.uint64(31)
    return z


def sample_keys(seed: int, epoch_B: np.ndarray, sample_B: np.ndarray) -> np.ndarray:
    """int64 ``[B]``: one number per (seed, epoch, sample), from which everything random about a showing is drawn."""
    start = mix64(np.array([(seed + _STEP) & _MASK], np.uint64))
    by_epoch = mix64(start ^ (np.asarray(epoch_B).astype(np.uint64) * np.uint64(_FIRST)))
    return mix64(by_epoch ^ (np.asarray(sample_B).astype(np.uint64) * np.uint64(_STEP))).view(np.int64)


def permutation(count: int, seed: int, *position: int) -> np.ndarray:
    """int64 ``[count]``: a uniformly random order of ``range(count)``, a function of seed and place."""
    bits = np.random.Philox(np.random.SeedSequence((seed, *position)))
    return np.argsort(bits.random_raw(count), kind="stable")
