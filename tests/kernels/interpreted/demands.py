"""The demands on the Triton kernels, as ..pairs has them, with the roundings that powers of two add in float32."""

import math

import torch

from ..pairs import distances


def assert_close_to_float64(got, want, peer, magnitude, dtype, names, scale):
    """Loss within 1e-5 (16-bit inputs 2e-3), gradients within 2e-5 (2e-3), and within 1.5 times PyTorch's error.

    On top of both come 3e-6 of what the terms of a sum amount to before they cancel: a logit in powers of two is larger
    than in nats, and so are the units of its last place, which the interpreter, without fused operations, rounds twice.
    """
    narrow = dtype != torch.float32
    for name, error, other, b, size in zip(names, distances(got, want), distances(peer, want), want, magnitude):
        rounding = 3e-6 * size
        if narrow and name in ("images", "texts"):
            rounding += 1.01 * float((b.to(dtype).double() - b).norm())
        norm = float(b.norm())
        bound = (2e-3 if narrow else max(1e-5, 2.4e-7 * abs(float(scale))) if name == "loss" else 2e-5) * norm
        assert error <= bound + rounding, (name, error, other, norm, size)
        # PyTorch's own is NaN where its float32 odds overflow.
        assert math.isnan(other) or error <= 1.5 * other + rounding, (name, error, other, norm, size)
