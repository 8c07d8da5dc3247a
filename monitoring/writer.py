"""Brings rows into a database by a thread of its own: whoever has rows waits for a moment at most."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.util import Finalize  # unlike atexit, also at the end of a worker of a pool
from typing import Any

import sqlalchemy as sa

from common.command_line import log

PATIENCE = 1.0  # seconds without any progress, after which nobody waits any more
OPENING_PATIENCE = 5.0  # the same at the start: the tables may have to be made
MOST_WAITING = 20_000  # rows, about a kilobyte each; more are lost
BACK_OFF = 0.1, 30.0  # seconds between tries after an error: at first, at the longest
LAST_SECONDS = 5.0  # for what still waits at the end
_LOST_FOR_GOOD = sa.exc.DataError, sa.exc.IntegrityError  # the rows' own fault: trying again does not help
_ERRORS = sa.exc.SQLAlchemyError, sqlite3.Error, OSError, ImportError, ValueError

Work = Callable[[sa.Connection], Any]


@dataclass(eq=False)
class _Job:
    work: Work
    n: int  # rows
    answered: threading.Event = field(default_factory=threading.Event)
    written: bool = False


class Writer:
    """Runs pieces of work, each in a transaction, in order. `open_engine` opens the database, when it is first needed
    and after errors.

    While the database is silent, locked or away, work waits for it in memory, up to `MOST_WAITING` rows, and is tried
    again and again. `lost` counts the rows that were not written and never will be. A transaction of which the answer
    was lost is tried again too, so its rows may be there twice.
    """

    def __init__(self, open_engine: Callable[[], sa.Engine], after: Callable[[sa.Engine, int], Any], probe: Work):
        self._open_engine, self._after, self._probe = open_engine, after, probe
        self._engine: sa.Engine | None = None
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._progress = time.monotonic()
        self.waiting = self.lost = 0  # rows
        self.behind = False  # is something not written that should have been?

    def open(self) -> bool:
        """Opens the database; says whether it is open within `OPENING_PATIENCE`."""
        return self._wait(self._hand_over(self._probe, 0), OPENING_PATIENCE)

    def write(self, work: Work, n: int = 1, keep: bool = True) -> bool:
        """Has `work`, which writes `n` rows, done; says whether it is committed. If not, it is done later, unless
        `keep` is False. Nobody waits while earlier work is behind."""
        job = self._hand_over(work, n, keep)
        written = self._wait(job, PATIENCE)
        if job is not None and not (written or keep):
            self._withdraw(job)
        return written

    def _withdraw(self, job: _Job) -> None:
        with self._changed:
            self.waiting -= job.n
            job.work, job.n = self._probe, 0
            if job in self._waiting and job is not self._waiting[0]:
                self._waiting.remove(job)  # the first one still finds out when the database is there again

    def _hand_over(self, work: Work, n: int, keep: bool = True) -> _Job | None:
        """The job, or None where there is no room for it."""
        job = _Job(work, n)
        with self._changed:
            while self.waiting and self.waiting + n > MOST_WAITING:
                if self.behind or self._closing.is_set():
                    self.lost += n if keep else 0
                    return None
                self._changed.wait(0.05)
                self._judge(PATIENCE)
            self.waiting += n
            self._waiting.append(job)
            if len(self._waiting) == 1:
                self._progress = time.monotonic()  # it had nothing to do before
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="prediction log")
                self._thread.start()
                self._at_end = Finalize(None, self.close, exitpriority=0)
            self._changed.notify_all()
        return job

    def _judge(self, patience: float) -> None:
        if not self.behind and time.monotonic() - self._progress > patience:
            self._tell("does not answer")

    def _wait(self, job: _Job | None, patience: float) -> bool:
        while job is not None and not self.behind and not job.answered.wait(patience / 4):
            self._judge(patience)
        return job is not None and job.written

    def _tell(self, what: str) -> None:
        """Says once that rows are not written."""
        if not self.behind:
            self.behind = True
            log.error("error: the prediction log %s; predictions go on, and wait to be logged", what)

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closing.is_set():
                        return
                    self._changed.wait()
                job = self._waiting[0]
                work = job.work
            try:
                if self._engine is None:
                    self._engine = self._open_engine()
                with self._engine.begin() as connection:
                    work(connection)
            except _ERRORS as error:
                job.answered.set()
                self._tell(f"cannot be {'opened' if self._engine is None else 'written'}: {type(error).__name__}")
                if isinstance(error, _LOST_FOR_GOOD):
                    self.lost += job.n
                    self._finish(job)
                elif self._closing.is_set():
                    return
                else:
                    self._closing.wait(pause := min(max(2 * pause, BACK_OFF[0]), BACK_OFF[1]))
                continue
            pause, job.written = 0.0, True
            self._finish(job)
            job.answered.set()
            self._after(self._engine, job.n)

    def _finish(self, job: _Job) -> None:
        with self._changed:
            self._waiting.remove(job)
            self.waiting -= job.n
            self._progress = time.monotonic()
            if self.behind and not self._waiting:
                self.behind = False
                log.warning("the prediction log can be written again; %d rows of this process are lost", self.lost)
            self._changed.notify_all()

    def close(self) -> None:
        """Writes what waits, until an error and for `LAST_SECONDS` at most, and reports what is lost."""
        if self._thread is None or self._closing.is_set():
            return
        self._at_end.cancel()
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(LAST_SECONDS)
        self.lost, self.waiting = self.lost + self.waiting, 0
        if self.lost:
            log.error("error: %d rows of the prediction log are lost", self.lost)
        if self._engine is not None and not self._thread.is_alive():
            self._engine.dispose()
