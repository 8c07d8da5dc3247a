"""gunicorn's worker of the service."""

from __future__ import annotations

import socket
import time

from gunicorn.workers.gthread import ThreadWorker

SECONDS_A_CONNECTION = 0.0005  # an idle worker needs less to wake up
MOST_SECONDS = 0.002


class Worker(ThreadWorker):
    """A threaded worker that leaves a new connection to one that has fewer.

    Connections that are kept open stay with the worker that accepted them. gunicorn's workers accept whatever comes
    as soon as they can, so one may end up with all the clients of a service and the others with none.
    """

    def accept(self, listener: socket.socket) -> None:
        """Waits in proportion to the connections at hand; by then a freer worker has taken the new one."""
        if self.nr_conns:
            time.sleep(min(self.nr_conns * SECONDS_A_CONNECTION, MOST_SECONDS))
        super().accept(listener)
