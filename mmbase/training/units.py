"""Numbers as people read them, in few letters. Torch-free."""

from __future__ import annotations

_STEPS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def say_flops(flops: float) -> str:
    """``4.43 TFLOP``."""
    return f"{_scaled(flops)}FLOP"


def say_count(count: float) -> str:
    """``12.8 M``; numbers up to 9,999 as they are."""
    return f"{count:,.0f}" if abs(count) < 10_000 else _scaled(count).strip()


def say_bytes(size: float) -> str:
    """``1.5 GB``, of 10⁹ bytes."""
    return f"{_scaled(size)}B"


def say_seconds(seconds: float) -> str:
    """``42 s``, ``12:05``, ``3:12:05`` or ``4 d 03 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{hours // 24} d {hours % 24:02d} h"


def _scaled(value: float) -> str:
    """Three digits, a space and the letter of the power of a thousand."""
    size, letter = next(((size, letter) for size, letter in _STEPS if abs(value) >= size * 0.9995), (1.0, ""))
    number = value / size
    digits = 0 if abs(number) >= 99.95 or number == 0 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f} {letter}"
