"""gunicorn's worker of the service."""

from __future__ import annotations

import contextlib
import mmap
import re
import selectors
import socket
import ssl
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any

from gunicorn.http import get_parser
from gunicorn.sock import ssl_wrap_socket
from gunicorn.workers.gthread import _DEFER, TConn, ThreadWorker

SLOTS = 128
# Of each worker the connections it holds and one, 0 where there is none; made in the master, shared by all it forks.
_held = memoryview(mmap.mmap(-1, 2 * SLOTS)).cast("H")
WAIT_SECONDS, MOST_WAITS = 0.0005, 10  # for a freer worker to take a new connection
MOVE_SECONDS = 0.05  # between looks whether a connection should be given up to a freer worker
STALLED_SECONDS = 10  # a client that sends nothing for so long in mid-request is cut off
LINGER_SECONDS, MOST_LINGERING = 2.0, 200  # for a client to close a connection that is answered
MOST_HEAD = 64 * 1024  # bytes of a request's head that are waited for
MOST_WAITING = 64 * 1024 * 1024  # bytes of unfinished requests in a worker; beyond that threads wait for the rest
_MESSAGE = b'{"status":"error","message":"the request did not arrive in time"}'
TOO_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_MESSAGE), _MESSAGE)
)
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,12})[ \t]*(?:\r|$)")
_LAST_CHUNK = re.compile(rb"\r\n0+[ \t]*(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n")
MOST_TRAILER = 4096  # bytes of a chunked request's end that may come in pieces
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r)", re.IGNORECASE)


def is_whole(request: bytearray, most: int, looked: int = 0) -> bool:
    """Is the whole request there, as far as can be told? Yes also for what gunicorn or the service will refuse: an
    odd head, a body of more than `most` bytes. Of a chunked one the first `looked` bytes were looked at before."""
    end = request.find(b"\r\n\r\n", 0, MOST_HEAD)
    if end < 0:
        return len(request) > MOST_HEAD or b"\n\n" in request
    head = bytes(request[:end]).lower()
    if b"\ntransfer-encoding" in head:
        return len(request) - end > most or bool(_LAST_CHUNK.search(request, max(end, looked - MOST_TRAILER)))
    length = _LENGTH.search(head)
    return not length or int(length[1]) > most or len(request) >= end + 4 + int(length[1])


class Worker(ThreadWorker):
    """A threaded worker that shares its clients evenly with the others, and does not wait for slow ones.

    Connections that are kept open stay with the worker that accepted them. gunicorn's workers accept whatever comes
    as soon as they can, so one may end up with all the clients of a service, and a renewed one with none.

    In gunicorn's own worker a client that has sent half a request holds a thread, and one that does not close its end
    after the answer holds the loop that serves all others. Here both wait in the loop's selector.
    """

    _looked = 0.0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lingering: deque[TConn] = deque()  # answered, but the client has not closed its end
        self._bytes_waiting = 0  # of requests that are not whole; changed in the loop only

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

    def handle_request(self, req: Any, conn: Any) -> bool:
        """Asks a client now and then to connect anew where another worker has fewer."""
        if (now := time.monotonic()) - self._looked > MOVE_SECONDS:
            self._looked = now
            if self._more_than_others() > 1:
                req.force_close()
        return super().handle_request(req, conn)

    # ------------------------------------------------------------------------------------------ slow clients

    def enqueue_req(self, conn: TConn) -> None:
        """Gives a connection to a thread; a new one not before something has come."""
        if conn.initialized or conn.data_ready:
            super().enqueue_req(conn)
        else:
            conn.waiting, conn.began, conn.looked = bytearray(), 0.0, 0  # what has come, since when, looked at up to
            self._wait(conn)

    def _wait(self, conn: TConn) -> None:
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + STALLED_SECONDS
        self._bytes_waiting += len(conn.waiting)
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def on_pending_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        self._bytes_waiting -= len(conn.waiting)
        super().on_pending_socket_readable(conn, client)

    def handle(self, conn: TConn) -> Any:
        """Handles a request once it is whole; in a thread."""
        try:
            if not self._read(conn):
                if time.monotonic() - conn.began < self.wsgi.settings.body_seconds:
                    return _DEFER
                conn.sock.send(TOO_LATE)
                return False
        except OSError:  # the client is gone, or speaks no TLS
            return False
        return super().handle(conn)

    def _read(self, conn: TConn) -> bool:
        """Reads what has come of a request. True when it is the parser's turn: the request is whole, or will not be."""
        if not conn.began:
            conn.began = time.monotonic()
        if not conn.initialized and self.cfg.is_ssl and not self._has_shaken_hands(conn):
            return False
        conn.init()
        if conn.is_http2:
            return True
        conn.sock.setblocking(False)
        waiting, most = conn.waiting, self.wsgi.settings.max_bytes
        waiting += conn.parser.unreader.take_buffered()
        over, looked = False, conn.looked
        while not (over := over or is_whole(waiting, most, looked)):
            looked = len(waiting)
            try:
                chunk = conn.sock.recv(1 << 18)
            except (BlockingIOError, ssl.SSLWantReadError):
                break
            waiting += chunk
            over = not chunk
        if not over and self._bytes_waiting + len(waiting) > MOST_WAITING:
            over = True
        conn.looked, head = looked, max(waiting.find(b"\r\n\r\n", 0, MOST_HEAD), 0) + 2
        if not over and b" HTTP/1.1\r" in waiting[:4096] and (expect := _EXPECT.search(waiting, 0, head)):
            del waiting[expect.start() : expect.end()]  # else gunicorn would send it again
            conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if over:
            conn.parser.unreader.unread(bytes(waiting))
            conn.waiting, conn.began, conn.looked = bytearray(), 0.0, 0
        return over

    def _has_shaken_hands(self, conn: TConn) -> bool:
        """Goes on with TLS' handshake. In gunicorn's own, which HTTP/2 needs, a thread waits without end."""
        if self.cfg.do_handshake_on_connect or "h2" in self.cfg.http_protocols:
            return True
        if not isinstance(conn.sock, ssl.SSLSocket):
            conn.sock = ssl_wrap_socket(conn.sock, self.cfg)
        try:
            conn.sock.do_handshake()
        except ssl.SSLWantReadError:
            return False
        conn.parser = get_parser(self.cfg, conn.sock, conn.client)  # with one, `init` leaves the socket as it is
        return True

    def finish_request(self, conn: TConn, fs: Future) -> None:
        """What becomes of a connection; in the loop."""
        try:
            result = fs.result()
        except Exception:
            result = False
        if result is _DEFER:
            self._wait(conn)
        elif result:
            super().finish_request(conn, fs)
        else:
            self._let_go(conn)

    def _let_go(self, conn: TConn) -> None:
        """Closes this end; the other one has some time, or its system might not show it the answer (RFC 9112, 9.6)."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._drain, conn))
        except (OSError, ValueError):  # it is closed
            self._drop(conn)
        else:
            conn.timeout = time.monotonic() + LINGER_SECONDS
            self.lingering.append(conn)

    def _drain(self, conn: TConn, client: socket.socket) -> None:
        try:
            left = client.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            left = b""
        if not left:
            self.lingering.remove(conn)
            self._drop(conn)

    def _drop(self, conn: TConn) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):  # it may be registered or not, closed or not
            self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """Cuts off who has sent nothing for too long, and who does not close."""
        now = time.monotonic()
        while self.pending_conns and self.pending_conns[0].timeout <= now:
            conn = self.pending_conns.popleft()
            self._bytes_waiting -= len(conn.waiting)
            if conn.waiting:
                with contextlib.suppress(OSError):
                    conn.sock.send(TOO_LATE)
            self._drop(conn)
        while self.lingering and (self.lingering[0].timeout <= now or len(self.lingering) > MOST_LINGERING):
            self._drop(self.lingering.popleft())
