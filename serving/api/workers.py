"""gunicorn's threaded worker, with connections shared evenly between the workers of a service.

It overrides methods of gunicorn's `ThreadWorker` that are not part of gunicorn's documented interface, so
requirements-api.txt pins gunicorn's version. A proxy in front of gunicorn should handle slow clients
(examples/deployment/nginx.conf): gunicorn gives each half-sent request a thread.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import socket
import ssl
import time
from http import HTTPStatus
from typing import Any

from gunicorn import util
from gunicorn.http.errors import (
    ExpectationFailed,
    ForbiddenProxyRequest,
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.workers.gthread import ThreadWorker

_STATUS = {
    LimitRequestLine: 414,
    LimitRequestHeaders: 431,
    UnsupportedTransferCoding: 501,
    ExpectationFailed: 417,
    ForbiddenProxyRequest: 403,
}
SLOTS = 128
# Of each worker the connections it holds plus one, 0 where there is no worker; made in the master, shared by its forks.
_held = memoryview(mmap.mmap(-1, 2 * SLOTS)).cast("H")
WAIT_SECONDS, MOST_WAITS = 0.0005, 10  # for a freer worker to take a new connection
MOVE_SECONDS = 0.05  # between looks whether a connection should move to a freer worker


class Worker(ThreadWorker):
    """A threaded worker that shares its clients evenly with the other workers.

    A connection that is kept open stays with the worker that accepted it. gunicorn's workers accept whatever comes as
    soon as they can, so one worker may end up with all the clients of a service, and a renewed one with none.
    """

    _looked = 0.0

    @property
    def slot(self) -> int:
        return self.age % SLOTS

    def _tell(self) -> None:
        _held[self.slot] = min(self.nr_conns, 2**16 - 2) + 1 if self.alive else 0

    def forget(self) -> None:
        """Says in the master that the worker is no more."""
        _held[self.slot] = 0

    def _more_than_others(self) -> int:
        """How many connections more it holds than the worker that has the fewest."""
        others = [n - 1 for slot, n in enumerate(_held) if n and slot != self.slot]
        return self.nr_conns - min(others, default=self.nr_conns)

    def run(self) -> None:
        self._tell()
        super().run()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        super().wait_for_and_dispatch_events(timeout)
        self._tell()

    def accept(self, listener: socket.socket) -> None:
        """Leaves a new connection to a freer worker, unless none comes."""
        for _ in range(MOST_WAITS):
            if self._more_than_others() <= 0:
                break
            time.sleep(WAIT_SECONDS)
        super().accept(listener)
        self._tell()

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answers what gunicorn could not read as a request. Neither the answer nor the log quotes it: it may hold keys
        and names, and escape sequences."""
        from serving.api.errors import problem_body  # not in the master, which makes the folder of metrics first
        from serving.api.records import code_places

        response_fault = isinstance(exc, InvalidResponseHeader | InvalidResponseHeaderName)
        if isinstance(exc, ParseException | ssl.SSLError) and not response_fault:
            status, detail = _STATUS.get(type(exc), 400), "the request cannot be read as HTTP/1.1"
            self.log.warning("a request cannot be read: %s", type(exc).__name__)
        else:
            status, detail = 500, "an error of this service"
            self.log.error("error: a request failed: %s", code_places(exc))
        body = json.dumps(problem_body(status, detail)).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            util.write_nonblock(client, head.encode() + body)

    def handle_request(self, req: Any, conn: Any) -> bool:
        """Closes a keep-alive connection now and then if another worker has fewer: the client connects anew."""
        if (now := time.monotonic()) - self._looked > MOVE_SECONDS:
            self._looked = now
            if self._more_than_others() > 1:
                req.force_close()
        return super().handle_request(req, conn)
