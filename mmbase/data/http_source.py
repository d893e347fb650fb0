"""Shards on an HTTP server, with a time-out of its own for each stage and ranges to go on after a cut."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any

from mmbase.data.cache_config import CacheConfig
from mmbase.data.checksums import told_by
from mmbase.data.remote import Facts, Interrupted, Transfer, Unavailable

CHUNK = 1 << 20
PASSING = frozenset({408, 409, 423, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
"""Statuses after which a further try may help."""
_BROKEN = (OSError, http.client.HTTPException, ValueError)
"""What urllib raises of a connection: OSError with time-outs, resets and TLS; ValueError of a mangled chunk length."""


class HttpSource:
    """One file of an HTTP server. Proxies come from the environment, redirects are followed."""

    def __init__(self, url: str, config: CacheConfig) -> None:
        self.url, self.config = url, config

    def open(self, offset: int, validator: str | None) -> Transfer:
        """Begin at a byte; see :class:`mmbase.data.remote.Source`."""
        headers = {"Range": f"bytes={offset}-", "Accept-Encoding": "identity", "User-Agent": "mmbase"}
        if offset and validator:
            headers["If-Range"] = validator
        answer, connection = self._answer("GET", headers, offset)
        if answer is None:
            return Transfer(Facts(size=offset), offset, _nothing())
        facts = _facts(answer.headers, answer.status, offset)
        return Transfer(facts, offset if answer.status == 206 else 0, self._body(answer, connection))

    def facts(self) -> Facts:
        """Size, date and checksums, from a HEAD where the server answers one."""
        try:
            answer, _ = self._answer("HEAD", {"Accept-Encoding": "identity", "User-Agent": "mmbase"}, 0)
        except Unavailable:  # some servers, and signed URLs, allow GET alone
            transfer = self.open(0, None)
            transfer.chunks.close()
            return transfer.facts
        assert answer is not None, "only ranges are answered with 416"
        with answer:
            return _facts(answer.headers, answer.status, 0)

    def _answer(self, method: str, headers: dict[str, str], offset: int) -> tuple[Any, _Stages | None]:
        """The answer once it has begun; None where the range asked for begins at the file's end."""
        opened: list[_Stages] = []
        opener = urllib.request.build_opener(_Http(opened, self.config), _Https(opened, self.config))
        # Each wait for a byte has its end, but headers may come byte by byte for hours.
        watch = threading.Timer(self.config.connect_timeout + self.config.first_byte_timeout, _hang_up, [opened])
        watch.daemon = True
        watch.start()
        try:
            request = urllib.request.Request(self.url, headers=headers, method=method)
            answer = opener.open(request, timeout=self.config.connect_timeout)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{offset}":
                    return None, None
                if error.code == 416:
                    return self._answer(method, {k: v for k, v in headers.items() if k != "Range"}, 0)
                said = f"HTTP {error.code} {error.reason}"
                if error.code in PASSING:
                    raise Interrupted(said, _asked_pause(error.headers.get("Retry-After"))) from error
                raise Unavailable(said) from error
        except urllib.error.URLError as error:
            raise self._trouble(error.reason, opened) from error
        except _BROKEN as error:
            raise self._trouble(error, opened) from error
        finally:
            watch.cancel()
        return answer, opened[-1] if opened else None

    def _trouble(self, cause: object, opened: list[_Stages]) -> Exception:
        connected = bool(opened) and opened[-1].connected is not None
        if isinstance(cause, TimeoutError):
            seconds = self.config.first_byte_timeout if connected else self.config.connect_timeout
            waited = "the first byte of an answer" if connected else "a connection"
            return Interrupted(f"timed out: waited {seconds:g} s for {waited}")
        if isinstance(cause, socket.gaierror):
            return Interrupted(f"name not resolved: {cause}")
        if isinstance(cause, ValueError) or "unknown url type" in str(cause):
            return Unavailable(f"bad URL: {cause}")
        return Interrupted(f"{'lost' if connected else 'no'} connection: {cause or type(cause).__name__}")

    def _body(self, answer: Any, connection: _Stages | None) -> Generator[bytes, None, None]:
        if connection is not None and connection.connected is not None:
            connection.connected.settimeout(self.config.stall_timeout)
        with answer:
            while True:
                try:
                    chunk = answer.read1(CHUNK)
                except TimeoutError as error:
                    raise Interrupted(f"stalled: no byte for {self.config.stall_timeout:g} s") from error
                except _BROKEN as error:
                    raise Interrupted(f"cut: {error or type(error).__name__}") from error
                if not chunk:
                    return
                yield chunk


class _Stages(http.client.HTTPConnection):
    """A connection whose first answer has another time-out than its connecting."""

    connected: socket.socket | None = None
    first_byte_timeout = 60.0

    def connect(self) -> None:
        """Connect under the connection's own time-out, then wait for the first byte under another."""
        super().connect()
        self.connected = self.sock
        self.sock.settimeout(self.first_byte_timeout)


class _SecureStages(_Stages, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def __init__(self, opened: list[_Stages], config: CacheConfig) -> None:
        super().__init__()
        self.opened, self.config = opened, config

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(lambda host, **options: _noted(_Stages, host, options, self), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, opened: list[_Stages], config: CacheConfig) -> None:
        super().__init__()
        self.opened, self.config = opened, config

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(lambda host, **options: _noted(_SecureStages, host, options, self), req)


def _noted(kind: type[_Stages], host: str, options: dict[str, Any], handler: _Http | _Https) -> _Stages:
    connection = kind(host, **options)
    connection.first_byte_timeout = handler.config.first_byte_timeout
    handler.opened.append(connection)
    return connection


def _nothing() -> Generator[bytes, None, None]:
    yield from ()


def _hang_up(opened: list[_Stages]) -> None:
    for connection in opened:
        if connection.connected is not None:
            with contextlib.suppress(OSError):
                connection.connected.shutdown(socket.SHUT_RDWR)


def _facts(headers: Any, status: int, offset: int) -> Facts:
    """Facts of an answer; a range that is not the one asked for is trouble."""
    size = int(headers["Content-Length"]) if (headers["Content-Length"] or "").isdigit() else None
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers["Content-Range"] or "")
        if match is None or int(match[1]) != offset:
            raise Interrupted(f"wrong range: asked from byte {offset}, got {headers['Content-Range']!r}")
        size = int(match[3]) if match[3] != "*" else None
    etag = headers["ETag"]
    strong = etag if etag and not etag.startswith("W/") else None
    return Facts(
        size=size,
        validator=strong or headers["Last-Modified"],
        modified_ns=_date(headers["Last-Modified"]),
        checksums=told_by(dict(headers.items())),
    )


def _date(text: str | None) -> int | None:
    try:
        return int(email.utils.parsedate_to_datetime(text).timestamp()) * 10**9 if text else None
    except ValueError:
        return None


def _asked_pause(text: str | None) -> float:
    return min(float(text), 120.0) if text and text.strip().isdigit() else 0.0
