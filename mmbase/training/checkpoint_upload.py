"""Copies of checkpoints wherever fsspec reaches. Torch-free.

Object stores cannot rename, so the manifest goes up last: a copy without one is not there. What comes back is verified
like any other checkpoint.
"""

from __future__ import annotations

import contextlib
import posixpath
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmbase.errors import MmbaseError
from mmbase.training.checkpoint_config import CheckpointConfig
from mmbase.training.checkpoint_store import MANIFEST, Entry, Store, Torn, decode, kept, name_of, read_entry


class Remote:
    """The folder of copies.

    Args:
        url: of fsspec, such as ``s3://bucket/run``.
        options: of its file system.

    Raises:
        MmbaseError: a URL whose file system is unknown or not installed.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        import fsspec

        try:
            self.files, self.root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise MmbaseError(f"checkpoints.upload={url!r} cannot be used: {error}") from error
        self.url = url

    def put(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint, its manifest last."""
        entry = read_entry(checkpoint)
        there = posixpath.join(self.root, checkpoint.name)
        for name in [*entry.files, MANIFEST]:
            target = posixpath.join(there, name)
            self.files.makedirs(posixpath.dirname(target), exist_ok=True)
            self.files.put_file(str(checkpoint / name), target)

    def entries(self) -> list[Entry]:
        """Of all complete copies, oldest first."""
        found = []
        for name in self.names():
            with contextlib.suppress(Torn, FileNotFoundError):
                found.append(decode(self.files.cat_file(posixpath.join(self.root, name, MANIFEST))))
        return sorted(found, key=lambda entry: entry.samples)

    def names(self) -> list[str]:
        """Of all copies, complete or not."""
        self.files.invalidate_cache()
        if not self.files.exists(self.root):
            return []
        names = [posixpath.basename(path.rstrip("/")) for path in self.files.ls(self.root, detail=False)]
        return sorted(name for name in names if name.isdigit())

    def fetch(self, entry: Entry, store: Store) -> Path:
        """Bring a copy into ``store``, where it appears when all of it is there; it is not verified."""
        temporary = store.begin(entry.step)
        try:
            for name in entry.files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(posixpath.join(self.root, name_of(entry.step), name), str(temporary / name))
            return store.commit(temporary, entry)
        except BaseException:
            store.abandon(temporary)
            raise

    def remove(self, name: str) -> None:
        """Remove a copy, its manifest first."""
        there = posixpath.join(self.root, name)
        if self.files.exists(posixpath.join(there, MANIFEST)):
            self.files.rm_file(posixpath.join(there, MANIFEST))
        self.files.rm(there, recursive=True)


class Uploader:
    """Copies checkpoints in a thread of its own, so that a slow line delays neither training nor saving.

    When checkpoints come faster than they can be copied, those in between are left out: only the newest waits.

    Args:
        remote: where to.
        policy: which copies stay.
        report: gets a line when a copy fails; the next one is tried all the same.
    """

    def __init__(self, remote: Remote, policy: CheckpointConfig, report: Callable[[str], None]) -> None:
        self.remote, self.policy, self.report = remote, policy, report
        self._thread = ThreadPoolExecutor(1, "checkpoint-upload")
        self._lock = threading.Lock()
        self._waiting: Path | None = None
        self._copying: Path | None = None
        self._future: Future[None] | None = None
        self.failed: str | None = None
        """why the newest copy is not there; None: it is, or is on its way"""

    @property
    def protected(self) -> set[str]:
        """Names of the checkpoints that must not be removed yet."""
        with self._lock:
            return {path.name for path in (self._waiting, self._copying) if path}

    def submit(self, checkpoint: Path) -> None:
        """Have a checkpoint copied as soon as the one before it is."""
        with self._lock:
            self._waiting = checkpoint
            self._future = self._thread.submit(self._run)

    def wait(self) -> None:
        """Until all is copied, or has failed."""
        if self._future:
            self._future.result()

    def close(self) -> None:
        """Finish what is on its way and end the thread."""
        self._thread.shutdown(wait=True)

    def _run(self) -> None:
        with self._lock:
            self._copying, self._waiting = self._waiting, None
        if self._copying is None:  # a later one went in its place
            return
        try:
            self.remote.put(self._copying)
            self.failed = None
            staying = {name_of(entry.step) for entry in kept(self.remote.entries(), self.policy)}
            for name in self.remote.names():
                if name not in staying:  # torn ones, too: nobody else writes here
                    self.remote.remove(name)
        except Exception as error:  # file systems raise kinds of their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.failed = f"checkpoint {self._copying.name} was not copied to {self.remote.url}: {reason}"
            self.report(self.failed)
        finally:
            with self._lock:
                self._copying = None
