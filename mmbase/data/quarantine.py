"""What became of bad samples: counted, written down once each, and a stop where there are too many."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mmbase.data.prepare import Fault
from mmbase.errors import MmbaseError

logger = logging.getLogger(__name__)

ENOUGH = 1000
"""Samples seen before the share of bad ones is judged, or one epoch where that is fewer."""

_REMEMBERED = 100_000
"""Bad samples known to be in the file; beyond that one may be written again."""


class Quarantine:
    """Keeps the account of bad samples.

    Args:
        path: ``quarantine.jsonl``: a line ``{shard, key, offset, reason}`` per bad sample is appended; None: no file.
        max_share: share of bad samples among those seen, above which :meth:`add` raises.
        epoch: samples of an epoch.
    """

    def __init__(self, path: str | Path | None, max_share: float, epoch: int) -> None:
        self.path = Path(path) if path else None
        self.max_share, self.enough = max_share, min(ENOUGH, epoch)
        self.good = 0
        self.reasons: Counter[str] = Counter()
        self._known: set[tuple[str, int]] | None = None

    @property
    def bad(self) -> int:
        """Bad samples met so far, each time anew."""
        return self.reasons.total()

    def add(self, good: int, faults: Iterable[Fault]) -> None:
        """Account for a batch.

        Raises:
            MmbaseError: more than ``max_share`` of all samples so far were bad, or the file cannot be written.
        """
        self.good += good
        lines = []
        for fault in faults:
            self.reasons[_kind(fault.reason)] += 1
            if self._is_new(fault):
                lines.append(json.dumps(fault._asdict(), ensure_ascii=False) + "\n")
                if len(self._known or ()) == 1:
                    logger.warning("left out sample %s of %s: %s", fault.key, fault.shard, fault.reason)
        if lines and self.path:
            self._append("".join(lines))
        seen = self.good + self.bad
        if seen >= self.enough and self.bad > self.max_share * seen:
            raise MmbaseError(
                f"{self.bad} of {seen} samples so far are bad, more than the share of {self.max_share:g} allowed: "
                f"{self.describe()}; see {self.path or '`mmbase data check`'}, mend the shards or raise max_bad_share"
            )

    def describe(self, most: int = 3) -> str:
        """The commonest reasons, counted."""
        parts = [f"{count} {reason}" for reason, count in self.reasons.most_common(most)]
        rest = len(self.reasons) - len(parts)
        return ", ".join(parts) + (f" and {rest} other reasons" if rest > 0 else "")

    def _is_new(self, fault: Fault) -> bool:
        if self._known is None:
            self._known = _read(self.path)
        place = (fault.shard, fault.offset)
        if place in self._known:
            return False
        if len(self._known) < _REMEMBERED:
            self._known.add(place)
        return True

    def _append(self, text: str) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    text = "\n" + text  # a line torn by a kill stays torn, alone
                os.write(descriptor, text.encode("utf-8", "surrogatepass"))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise MmbaseError(f"cannot write {str(self.path)!r}: {error.strerror}; free space and run again") from error


def _read(path: Path | None) -> set[tuple[str, int]]:
    """Shard and offset of what is in the file already."""
    known: set[tuple[str, int]] = set()
    if path is None or not path.exists():
        return known
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                known.add((row["shard"], row["offset"]))
            except (ValueError, KeyError, TypeError):
                continue
            if len(known) >= _REMEMBERED:
                break
    return known


def _kind(reason: str) -> str:
    """A reason without its particulars, so that like ones are counted together."""
    return reason.partition(":")[0][:80]
