"""Which rows of a shard a selection keeps: decided once from the text members, then kept beside the index."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmbase.data.filters import Selection
from mmbase.data.index_store import digest_of
from mmbase.data.open_tar import OpenTar
from mmbase.data.samples import SampleFault, fields_of
from mmbase.errors import MmbaseError
from mmbase.files import write_atomically

logger = logging.getLogger(__name__)

_TEXT = frozenset({"json", "txt"})


class Rows(NamedTuple):
    """What a selection leaves of a shard."""

    rows: np.ndarray
    """int64, ascending"""
    removed: Counter[str]
    """reason -> samples left out for it"""


def selected_rows(tar: OpenTar, selection: Selection, cache: Path) -> Rows:
    """The rows that ``selection`` keeps; a sample whose fields cannot be read stays, for whoever reads it to refuse."""
    index = tar.index
    digest = digest_of(f"{tar.shard} {index.size} {index.mtime_ns} {selection.digest}")
    place = cache / "selections" / digest[:2] / f"{digest}.json"
    try:
        kept = json.loads(place.read_bytes())
        return Rows(np.array(kept["rows"], np.int64), Counter(kept["removed"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rows: list[int] = []
    removed: Counter[str] = Counter()
    for row in range(len(index)):
        try:
            reason = selection.reason(fields_of(tar.sample(row, _TEXT)))
        except SampleFault:
            reason = None
        if reason is None:
            rows.append(row)
        else:
            removed[reason] += 1
    try:
        write_atomically(place, json.dumps({"rows": rows, "removed": removed}))
    except MmbaseError as error:
        logger.debug("the selection of %s is not kept: %s", tar.shard, error)
    return Rows(np.array(rows, np.int64), removed)
