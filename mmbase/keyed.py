"""Random numbers on the device that are functions of a key and a place, never of what was drawn before.

Augmentation and the towers' dropout draw from the key of a sample, that of (seed, epoch, sample). What a sample meets
is then the same on any rank, in any batch or part of one, and once more when activations are computed again.

Places of a sample's own key: augmentation takes 1 to 64, the towers take :data:`IMAGE` and :data:`TEXT`.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE, TEXT = 201, 202
"""Places of the keys from which the towers go on."""

_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64 as signed numbers."""


def draw(key: Tensor, place: Tensor | int) -> Tensor:
    """64 random bits as int64, of the shape that ``key`` (int64) and ``place`` broadcast to; keys in turn, if wanted.

    SplitMix64 (Steele et al., 2014) in signed arithmetic: products wrap, and a shift to the right is masked to what an
    unsigned one gives. Whole numbers only, so that devices agree to the bit.
    """
    z = key + (place * _STEP if isinstance(place, Tensor) else _signed(place * _STEP))
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)


def unit(bits: Tensor) -> Tensor:
    """Bits of :func:`draw` as float32 numbers, at least 0 and below 1."""
    return (bits >> 40 & (1 << 24) - 1).float() * 2.0**-24


def counted(key: Tensor, count: int, *, first: int = 0) -> Tensor:
    """Bits of ``count`` places from ``first`` on, along a new last axis."""
    return draw(key[..., None], torch.arange(first, first + count, device=key.device))


def _signed(number: int) -> int:
    """The last 64 bits of a number, as int64 reads them."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
