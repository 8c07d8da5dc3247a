"""Asks another server for JSON, within a time and a size: a server that is slow, endless or redirects costs no more."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

MOST_BYTES = 16 * 1024 * 1024


class Unreachable(OSError):
    """No answer came; the text says why, without the address."""


@dataclass(frozen=True)
class Answer:
    """What a server answered, whatever its status; `body` is None where it is no JSON."""

    status: int
    headers: Mapping[str, str]  # names without regard to case
    body: Any
    size: int  # in bytes


def is_safe(url: str) -> bool:
    """May secrets be sent there? By TLS, or to this machine."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (
            parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1"))
        )
    except ValueError:
        return False


def ask(
    url: str,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    seconds: float = 10.0,
    most_bytes: int = MOST_BYTES,
) -> Answer:
    """One request. Follows no redirect. Raises `Unreachable` after `seconds` in all, and for longer bodies."""
    connections: list[socket.socket] = []
    request = urllib.request.Request(url, body, dict(headers or {}), method=method)
    late = threading.Event()
    # a timeout of the socket is for each byte: one now and then would go on for ever
    timer = threading.Timer(seconds, _shut, [connections, late])
    timer.daemon = True
    timer.start()
    try:
        with _opener(connections).open(request, timeout=seconds) as answer:
            status, given, content = answer.status, answer.headers, answer.read(most_bytes + 1)
    except urllib.error.HTTPError as error:
        with error:
            status, given = error.code, error.headers
            try:
                content = error.read(most_bytes + 1)
            except (OSError, http.client.HTTPException):
                content = b""
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL
        why = getattr(error, "reason", error)
        if late.is_set() or isinstance(why, TimeoutError):
            raise Unreachable("the answer comes too slowly") from None
        raise Unreachable(type(why if isinstance(why, Exception) else error).__name__) from None
    finally:
        timer.cancel()
    if late.is_set():
        raise Unreachable("the answer comes too slowly")
    if len(content) > most_bytes:
        raise Unreachable("the answer is too large")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    return Answer(status, given, value, len(content))


def _shut(connections: list[socket.socket], late: threading.Event) -> None:
    late.set()
    for connection in connections:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # also under TLS, whose own state is the reader's


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _opener(connections: list[socket.socket]) -> urllib.request.OpenerDirector:
    """Opens URLs, and notes the sockets."""

    class Noted(http.client.HTTPConnection):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self._create_connection = self._noted  # before TLS, whose handshake may be slow too

        def _noted(self, *arguments: Any) -> socket.socket:
            connections.append(socket.create_connection(*arguments))
            return connections[-1]

        def connect(self) -> None:
            super().connect()
            connections.append(self.sock)

    class Tls(Noted, http.client.HTTPSConnection):
        pass

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Noted, request)

    class TlsHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Tls, request, context=_tls())

    return urllib.request.build_opener(_NoRedirect, PlainHandler, TlsHandler)
