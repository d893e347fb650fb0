"""An HTTP server, or a proxy before one, that fails on purpose: by a seeded plan, counted by kind.

Tests put it before a folder; ``data_faults`` before nginx and before an S3 server.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

FAULTS = {
    "error": "status 500 or 503 in place of an answer",
    "reset": "the connection is reset before an answer",
    "slow": "the first byte comes after the client's patience",
    "stall": "half of the body, then nothing",
    "cut": "half of the body, then a reset",
    "truncate": "half of the body, declared as if it were all",
    "trickle": "a few bytes a second",
    "corrupt": "one byte of the body changed",
}
"""Kinds of fault; ``corrupt`` can be noticed only where the server tells a checksum."""


class Answer(NamedTuple):
    """What a backend answers."""

    status: int
    headers: dict[str, str]
    body: bytes


Backend = Callable[[str, str, dict[str, str]], Answer]
"""(method, path, headers) -> answer"""


@dataclass
class Plan:
    """Which requests fail, and how.

    Args:
        share: probability that a GET fails.
        kinds: of :data:`FAULTS`, chosen evenly.
        in_a_row: faults for one path in a row at most, so that a client with more tries gets through.
        seconds: how long slow, stalled and trickling answers hold the connection.
        seed: the same requests in the same order fail alike.
        only: what a path must match to be picked, a regular expression.
        gone: paths that are answered with 404.
    """

    share: float = 0.0
    kinds: Sequence[str] = tuple(FAULTS)
    in_a_row: int = 3
    seconds: float = 3.0
    seed: int = 0
    only: str = ""
    gone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._row: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.script: list[str | None] = []
        """kinds for the next GETs, before chance decides; None: no fault"""

    def next(self, path: str) -> str | None:
        """The fault of this request."""
        with self._lock:
            if not re.search(self.only, path):
                return None
            if self.script:
                return self.script.pop(0)
            if self._random.random() >= self.share or self._row[path] >= self.in_a_row:
                self._row[path] = 0
                return None
            self._row[path] += 1
            return self._random.choice(list(self.kinds))


class FaultServer:
    """A server on a free port of this machine, in threads of this process. A context manager.

    Attributes:
        url: ``http://127.0.0.1:PORT``.
        counts: faults injected by kind; ``requests`` counts all.
        requests: (method, path, range asked for) of all requests.
    """

    def __init__(self, backend: Backend, plan: Plan | None = None) -> None:
        self.backend, self.plan = backend, plan or Plan()
        self.counts: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str | None]] = []
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


def folder(root: Path, *, ranges: bool = True, etag: bool = True, md5: bool = False) -> Backend:
    """A backend that serves files as a plain server does; with ``md5`` it tells the checksum of the whole file."""

    def answer(method: str, path: str, headers: dict[str, str]) -> Answer:
        file = root / unquote(urlsplit(path).path).lstrip("/")
        if not file.is_file():
            return Answer(404, {}, b"no such file\n")
        content, status = file.read_bytes(), file.stat()
        told = {"Last-Modified": formatdate(status.st_mtime, usegmt=True)}
        if etag:
            told["ETag"] = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if md5:
            told["x-goog-hash"] = "md5=" + base64.b64encode(hashlib.md5(content).digest()).decode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")) if ranges else None
        if asked is None or headers.get("if-range", told.get("ETag")) not in (told.get("ETag"), told["Last-Modified"]):
            return Answer(200, told, content)
        begin, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if begin >= len(content):
            return Answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        told["Content-Range"] = f"bytes {begin}-{min(end, len(content) - 1)}/{len(content)}"
        return Answer(206, told, content[begin : end + 1])

    return answer


def upstream(host: str, port: int) -> Backend:
    """A backend that asks another server; the client's headers go on, ``Host`` with them, since it may be signed."""

    def answer(method: str, path: str, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            connection.request(method, path, headers={**headers, "connection": "close"})
            response = connection.getresponse()
            passed = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            return Answer(response.status, passed, response.read())
        finally:
            connection.close()

    return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: FaultServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what half of the faults are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyrefly: ignore[bad-override-mutable-attribute]

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_GET(self) -> None:
        self._serve("GET")

    def _serve(self, method: str) -> None:
        owner = self.server.owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        owner.requests.append((method, self.path, headers.get("range")))
        owner.counts["requests"] += 1
        path = urlsplit(self.path).path
        gone = path in owner.plan.gone
        answer = Answer(404, {}, b"gone\n") if gone else owner.backend(method, self.path, headers)
        fault = (
            owner.plan.next(path) if method == "GET" and answer.status in (200, 206) and len(answer.body) > 1 else None
        )
        if fault:
            owner.counts[fault] += 1
        if fault == "slow":
            owner.stopping.wait(owner.plan.seconds)
        if fault == "reset":
            self._reset()
        elif fault == "error":
            self._send(Answer(500 + 3 * (owner.counts["error"] % 2), {}, b"out of order\n"), method)
        else:
            self._send(answer, method, fault)

    def _send(self, answer: Answer, method: str, fault: str | None = None) -> None:
        body, half = answer.body, len(answer.body) // 2
        if fault == "corrupt":
            body = body[:half] + bytes([body[half] ^ 0x20]) + body[half + 1 :]
        if fault == "truncate":
            body = body[:half]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "date", "server"):
                self.send_header(name, value)
        told = {name.lower(): value for name, value in answer.headers.items()}
        length = told.get("content-length") if method == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if method == "HEAD":
            return
        if fault not in ("stall", "cut", "trickle"):
            self.wfile.write(body)
            return
        self._broken_off(body, half, fault)

    def _broken_off(self, body: bytes, half: int, fault: str) -> None:
        owner = self.server.owner
        if fault == "trickle":
            end = time.monotonic() + owner.plan.seconds
            for at in range(half):
                self.wfile.write(body[at : at + 1])
                if time.monotonic() > end or owner.stopping.wait(0.05):
                    break
        else:
            self.wfile.write(body[:half])
            self.wfile.flush()
            if fault == "stall":
                owner.stopping.wait(owner.plan.seconds)
        self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
