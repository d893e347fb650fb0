"""What ``impl="auto"`` takes: what the environment asks for, else Triton where a measurement says that it is faster.

``MMBASE_KERNELS`` stands in for ``auto`` alone: an ``impl`` that a caller names is what runs. A row of WINS is added
from a committed result file of ``benchmarks/results`` and names it; nothing is measured at run time. There has been no
measurement yet. The losses have no rows: with 16-bit products they take Triton on every GPU that it knows.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmbase_kernels.tuning import architecture

ENVIRONMENT = "MMBASE_KERNELS"
"""Environment variable: one of PREFERENCES; unset or empty: what was measured."""
PREFERENCES = ("triton", "torch", "reference")
OPERATORS = ("attention", "layer_norm", "activation", "head")
"""Those whose ``auto`` goes by WINS."""


@dataclass(frozen=True)
class Win:
    """Shapes at which the Triton kernels were measured to be faster, forward and backward together."""

    operator: str
    """One of OPERATORS."""
    architecture: str
    """One of :data:`mmbase_kernels.tuning.ARCHITECTURES`."""
    dtype: torch.dtype
    case: str
    """What else tells calls of the operator apart: ``""``, ``causal``, ``varlen`` or ``causal varlen`` of attention,
    ``plain`` or ``add`` of layer_norm, activation's name, ``""`` of head."""
    width: int
    """Last axis of the input; of attention a head's."""
    smallest: int
    """Tokens of a sequence (attention; the longest one's if they differ), or rows: from here ..."""
    largest: int | None
    """... to here, both included, with no loss between; None: and any more."""
    compiled: bool
    """Whether it was also faster than what ``torch.compile`` makes of the PyTorch operations; a compiled graph takes it
    only then. Of attention, whose peers are kernels of their own either way: whether a compiled graph was measured."""
    result: str
    """File of ``benchmarks/results`` that says so."""


WINS: Sequence[Win] = ()


def preferred() -> str | None:
    """What the environment asks for, one of PREFERENCES, or None.

    Read at every call. A compiled graph keeps what stood there when it was traced.

    Raises:
        ValueError: names the value, and the nearest that there is.
    """
    value = os.environ.get(ENVIRONMENT)
    if not value:
        return None
    if value not in PREFERENCES:
        raise ValueError(
            f"{ENVIRONMENT} must be {', '.join(PREFERENCES[:-1])} or {PREFERENCES[-1]}, not {value!r}"
            f"{nearest(value, PREFERENCES)}; unset it for what was measured"
        )
    return value


def asked(impl: str, names: Sequence[str]) -> tuple[str, str]:
    """What an argument ``impl`` asks for after the environment had its say, and in whose words.

    Args:
        impl: the argument; only ``auto`` is open to the environment.
        names: what there is: ``auto``, ``triton``, PyTorch's by its name, ``reference``.

    Returns:
        One of ``names``, and ``impl='...'`` or ``MMBASE_KERNELS=...`` for messages.

    Raises:
        ValueError: a name, or a value of the environment, that there is not.
    """
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(names)}, not {impl!r}{nearest(impl, names)}")
    value = preferred() if impl == "auto" else None
    if value is None:
        return impl, f"impl={impl!r}"
    return names[1 + PREFERENCES.index(value)], f"{ENVIRONMENT}={value}"


def measured_faster(
    operator: str, device: torch.device, dtype: torch.dtype, *, width: int, size: int, case: str = ""
) -> bool:
    """Whether a row of WINS covers this call; arguments are named as the fields of :class:`Win`."""
    if not WINS:
        return False
    call = operator, architecture(device), dtype, case, width
    rows = [win for win in WINS if call == (win.operator, win.architecture, win.dtype, win.case, win.width)]
    if torch.compiler.is_compiling():
        rows = [win for win in rows if win.compiled]
    return any(win.smallest <= size and (win.largest is None or size <= win.largest) for win in rows)


def nearest(value: object, names: Sequence[str]) -> str:
    """``"; did you mean 'a'?"`` for a misspelt name, or an empty string where nothing is near."""
    close = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
