"""Batches on the device before they are asked for.

On a CUDA device a thread takes batches, pins them and copies them on a stream of its own, so that neither loading nor
copying holds up the kernels; the consumer's stream waits for the copy, the consumer does not. Elsewhere batches pass
through as they are.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from mmbase.data.collate import Batch
from mmbase.data.timing import COPY, WAIT, StageTimes
from mmbase.errors import MmbaseError

_TICK = 0.5


def on_device(
    batches: Iterator[Batch],
    device: torch.device,
    times: StageTimes,
    *,
    prepare: Callable[[Batch], Batch] | None = None,
    ahead: int = 2,
) -> Generator[Batch]:
    """``batches`` with their tensors on ``device``; each is to be used before the next is asked for.

    Args:
        batches: an endless or finite iterator; read in another thread where the device is CUDA.
        device: where to.
        times: takes the seconds waited and, on CUDA, spent pinning and issuing copies.
        prepare: applied to a batch before it is copied.
        ahead: batches copied ahead; each takes memory on the device.

    Raises:
        whatever ``batches`` raises, in the consumer.
    """
    if device.type == "cuda":
        yield from _Feed(batches, device, times, prepare, ahead)
        return
    for batch in batches:
        batch = prepare(batch) if prepare else batch
        yield batch if device.type == "cpu" else _moved(batch, lambda value: value.to(device))


class _Feed:
    """The thread, its stream, and the batches between it and the consumer."""

    def __init__(
        self,
        batches: Iterator[Batch],
        device: torch.device,
        times: StageTimes,
        prepare: Callable[[Batch], Batch] | None,
        ahead: int,
    ) -> None:
        self.batches, self.device, self.times, self.prepare = batches, device, times, prepare
        self.stream = torch.cuda.Stream(device)
        self.ready: queue.Queue[tuple[Batch, torch.cuda.Event] | BaseException | None] = queue.Queue(ahead)
        # Memory of a batch is the copying stream's: it may not be written anew before the kernels that read it ran.
        self.used: deque[tuple[Batch, torch.cuda.Event]] = deque()
        self.stopped = threading.Event()
        times.overlapped = True
        self.thread = threading.Thread(target=self._run, name="mmbase-prefetch", daemon=True)

    def __iter__(self) -> Iterator[Batch]:
        self.thread.start()
        try:
            while (item := self._next()) is not None:
                batch, copied = item
                current = torch.cuda.current_stream(self.device)
                current.wait_event(copied)
                yield batch
                used = torch.cuda.Event()
                used.record(current)
                self.used.append((batch, used))
                del batch, item
        finally:
            self.stopped.set()
            self.thread.join()  # it may be taking a batch, and the stream is somebody else's from here on

    def _next(self) -> tuple[Batch, torch.cuda.Event] | None:
        before = time.perf_counter()
        while True:
            try:
                item = self.ready.get(timeout=_TICK)
                break
            except queue.Empty:
                if not self.thread.is_alive() and self.ready.empty():
                    raise MmbaseError("the thread that copies batches to the device ended; run again") from None
        self.times.add({WAIT: time.perf_counter() - before})
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            for batch in self.batches:
                started = time.perf_counter()
                pinned = _moved(self.prepare(batch) if self.prepare else batch, lambda value: value.pin_memory())
                while self.used:
                    _, done = self.used.popleft()
                    self.stream.wait_event(done)
                with torch.cuda.stream(self.stream):
                    moved = _moved(pinned, lambda value: value.to(self.device, non_blocking=True))
                    copied = torch.cuda.Event()
                    copied.record(self.stream)
                self.times.add({COPY: time.perf_counter() - started})
                if not self._put((moved, copied)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self.stopped.is_set():
            try:
                self.ready.put(item, timeout=_TICK)
                return True
            except queue.Full:
                continue
        return False


def _moved(value: Any, move: Callable[[Any], Any]) -> Any:
    """``value`` with ``move`` applied to the tensors in it, in mappings and lists, and to what moves as they do."""
    if isinstance(value, dict):
        return {name: _moved(part, move) for name, part in value.items()}
    if isinstance(value, list):
        return [_moved(part, move) for part in value]
    return move(value) if hasattr(value, "pin_memory") else value
