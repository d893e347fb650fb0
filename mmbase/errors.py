"""The one exception a user's mistake raises: what was wrong, the value, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmbaseError(ValueError):
    """A mistake that the caller can mend. The message is one line: what, the value, the remedy.

    The command line prints it without a traceback and exits with 2.
    """


def nearest(value: str, choices: Iterable[str], count: int = 3) -> str:
    """``"; did you mean 'a' or 'b'?"`` for a misspelt ``value``, or an empty string where nothing is near."""
    choices = list(choices)
    lowered = {choice.lower(): choice for choice in reversed(choices)}
    close = difflib.get_close_matches(value.lower(), lowered, n=count, cutoff=0.5)
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(lowered[name]) for name in close) + "?"
