"""Shards fetched in the background, first needed first."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from mmbase.data.shard_cache import CacheFull

logger = logging.getLogger(__name__)


class Prefetcher:
    """A few threads that work off the latest list of shards and end when it is empty.

    Args:
        fetch: brings one shard; returns at once where another process is at it. Its errors wait for whoever reads.
        threads: shards at a time.
    """

    def __init__(self, fetch: Callable[[str], object], threads: int) -> None:
        self.fetch, self.threads = fetch, threads
        self._wanted: deque[str] = deque()
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def want(self, urls: Sequence[str]) -> None:
        """Fetch these, in this order, and no longer what was asked for before and has not begun."""
        with self._lock:
            self._wanted = deque(dict.fromkeys(url for url in urls if url not in self._busy))
            for _ in range(min(len(self._wanted), self.threads - len(self._busy))):
                # Taken here, so that as many threads start as there are shards for.
                url = self._wanted.popleft()
                self._busy.add(url)
                threading.Thread(target=self._work, args=(url,), name="mmbase-prefetch", daemon=True).start()

    def close(self) -> None:
        """Begin no more."""
        with self._lock:
            self._wanted.clear()

    def _work(self, url: str) -> None:
        while True:
            full = False
            try:
                self.fetch(url)
            except Exception as error:  # of whatever kind: a thread that dies would keep its place for ever
                full = isinstance(error, CacheFull)
                logger.debug("not fetched ahead: %s", error)
            with self._lock:
                self._busy.discard(url)
                if full:
                    self._wanted.clear()
                if not self._wanted:
                    return
                url = self._wanted.popleft()
                self._busy.add(url)
