"""``pipe:COMMAND``: the output of a shell command as a tar, as webdataset writes it."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from typing import IO

from mmbase.data.cache_config import CacheConfig
from mmbase.data.remote import Facts, Interrupted, Transfer, Unavailable

CHUNK = 1 << 20


class PipeSource:
    """One command. It always begins anew: there is no reading on in the middle of its output."""

    def __init__(self, url: str, config: CacheConfig) -> None:
        self.url, self.config = url, config
        self.command = url.partition(":")[2]

    def facts(self) -> Facts:
        """Nothing: a command tells neither size nor date."""
        return Facts()

    def open(self, offset: int, validator: str | None) -> Transfer:
        """Start the command."""
        return Transfer(Facts(), 0, self._output())

    def _output(self) -> Generator[bytes, None, None]:
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    self.command,
                    shell=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                raise Unavailable(f"the command cannot be started: {error}") from error
            try:
                assert process.stdout is not None
                yield from self._chunks(process.stdout)
                status = process.wait(self.config.stall_timeout)
            except subprocess.TimeoutExpired as error:
                raise Interrupted(f"stalled: no end {self.config.stall_timeout:g} s after its output's") from error
            finally:
                _end(process)
            if status in (126, 127):
                raise Unavailable(f"the command cannot be run (exit {status}): {_last_line(said)}")
            if status:
                raise Interrupted(f"exit {status}: {_last_line(said)}")

    def _chunks(self, output: IO[bytes]) -> Iterator[bytes]:
        seconds = self.config.first_byte_timeout
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                if not selector.select(seconds):
                    raise Interrupted(f"stalled: no byte of the command's output for {seconds:g} s")
                chunk = os.read(output.fileno(), CHUNK)
                if not chunk:
                    return
                yield chunk
                seconds = self.config.stall_timeout


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command with all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


def _last_line(said: IO[bytes]) -> str:
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - 2000))
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
