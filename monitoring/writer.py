"""Brings rows into a database: whoever has rows waits for a moment at most.

What does not succeed at once, or is not in a file of this machine, is written by a thread of its own.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from multiprocessing.util import Finalize  # unlike atexit, also at the end of a worker of a pool
from queue import SimpleQueue
from typing import Any

import sqlalchemy as sa

from common.command_line import log

AT_ONCE = 0.1  # seconds that SQLite may be locked by others, before the thread takes the work over
PATIENCE = 1.0  # seconds without any progress, after which nobody waits any more
OPENING_PATIENCE = 5.0  # the same at the start: the tables may have to be made
MOST_WAITING = 20_000  # rows, about a kilobyte each; more are lost
BACK_OFF = 0.1, 30.0  # seconds between tries after an error: at first, at the longest
LAST_SECONDS = 5.0  # for what still waits at the end
_LOST_FOR_GOOD = sa.exc.DataError, sa.exc.IntegrityError  # the rows' own fault: trying again does not help
_ERRORS = sa.exc.SQLAlchemyError, sqlite3.Error, OSError, ImportError, ValueError

Work = Callable[[sa.Connection], Any]


class _Job:
    __slots__ = ("answered", "n", "work", "written")

    def __init__(self, work: Work, n: int):
        self.work, self.n, self.written = work, n, False  # n: rows
        self.answered = threading.Lock()  # several times as fast as an Event
        self.answered.acquire()


class Writer:
    """Runs pieces of work, each in a transaction, in order. `open_engine` opens the database when it is first needed,
    and again after an error; `after` is called with the rows of each transaction; `probe` is work that writes nothing.

    While the database is silent, locked or away, work waits for it in memory, up to `MOST_WAITING` rows, and is tried
    again and again. `lost` counts the rows that were not written and never will be. A transaction of which the answer
    was lost is tried again too, so its rows may be there twice.
    """

    def __init__(self, open_engine: Callable[[], sa.Engine], after: Callable[[sa.Engine, int], Any], probe: Work):
        self._open_engine, self._after, self._probe = open_engine, after, probe
        self._engine: sa.Engine | None = None
        self._direct: sa.Connection | None = None  # for work that is done at once
        self._doing_directly = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._n_jobs = 0
        self._counting = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._progress = time.monotonic()
        self.waiting = self.lost = 0  # rows
        self.behind = False  # is something not written that should have been?

    def open(self) -> bool:
        """Opens the database; says whether it is open within `OPENING_PATIENCE`."""
        job = self._hand_over(self._probe, 0)
        return job is not None and self._wait(job, OPENING_PATIENCE)

    def write(self, work: Work, n: int = 1, keep: bool = True) -> bool:
        """Has `work`, which writes `n` rows, done; says whether it is committed. If not, it is done later, unless
        `keep` is False. Nobody waits while earlier work is behind."""
        if self._written_at_once(work):
            self._after(self._engine, n)
            return True
        if self.behind and not keep and self._n_jobs:  # which finds out when the database is there again
            return False
        job = self._hand_over(work, n)
        if job is None:
            return False
        if not (written := self._wait(job, PATIENCE)) and not keep:
            with self._counting:
                self.waiting -= job.n
                job.work, job.n = self._probe, 0
        return written

    def _written_at_once(self, work: Work) -> bool:
        """Does work for SQLite in the caller's thread, where nothing waits: to wake the other one takes longer."""
        engine = self._engine
        if engine is None or engine.dialect.name != "sqlite" or self._n_jobs or self._closing.is_set():
            return False
        if not self._doing_directly.acquire(blocking=False):
            return False
        try:
            if self._direct is None:
                self._direct = engine.connect()
                self._direct.exec_driver_sql(f"PRAGMA busy_timeout = {AT_ONCE * 1000:.0f}")
                self._direct.commit()
            with self._direct.begin():
                work(self._direct)
            return True
        except _ERRORS:  # the thread finds out which
            self._close_direct()
            return False
        finally:
            self._doing_directly.release()

    def _close_direct(self) -> None:
        """Closes the connection for good: in the pool it would be one with a short patience."""
        direct, self._direct = self._direct, None
        if direct is not None:
            with contextlib.suppress(*_ERRORS):
                direct.invalidate()
                direct.close()

    def _hand_over(self, work: Work, n: int) -> _Job | None:
        """The job, or None where there is no room for it."""
        job = _Job(work, n)
        with self._counting:
            if self._closing.is_set() or (self.waiting and self.waiting + n > MOST_WAITING):
                self.lost += n
                return None
            if not self._n_jobs:
                self._progress = time.monotonic()  # it had nothing to do before
            self.waiting += n
            self._n_jobs += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="prediction log")
                self._thread.start()
                self._at_end = Finalize(None, self.close, exitpriority=0)
        self._jobs.put(job)
        return job

    def _wait(self, job: _Job, patience: float) -> bool:
        while not self.behind and not job.answered.acquire(timeout=patience / 4):
            if time.monotonic() - self._progress > patience:
                self._tell("does not answer")
        return job.written

    def _tell(self, what: str) -> None:
        """Says once that rows are not written."""
        if not self.behind:
            self.behind = True
            log.error("error: the prediction log %s; predictions go on, and wait to be logged", what)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            pause = 0.0
            while not self._done(job):
                if self._closing.is_set():
                    return
                self._closing.wait(pause := min(max(2 * pause, BACK_OFF[0]), BACK_OFF[1]))

    def _done(self, job: _Job) -> bool:
        """Does the work; says whether it need not be tried again."""
        try:
            if self._engine is None:
                self._engine = self._open_engine()
            with self._engine.begin() as connection:
                job.work(connection)
            job.written = True
        except _ERRORS as error:
            self._tell(f"cannot be {'opened' if self._engine is None else 'written'}: {type(error).__name__}")
            if not isinstance(error, _LOST_FOR_GOOD):
                self._answer(job)
                return False
        with self._counting:
            self.waiting -= job.n
            self.lost += 0 if job.written else job.n
            self._n_jobs -= 1
            self._progress = time.monotonic()
            if self.behind and not self._n_jobs:
                self.behind = False
                log.warning("the prediction log can be written again; %d rows of this process are lost", self.lost)
        self._answer(job)
        if job.written:
            self._after(self._engine, job.n)
        return True

    @staticmethod
    def _answer(job: _Job) -> None:
        if job.answered.locked():
            job.answered.release()

    def close(self) -> None:
        """Writes what waits, until an error and for `LAST_SECONDS` at most, and reports what is lost."""
        with self._counting:
            if self._thread is None or self._closing.is_set():
                return
            self._closing.set()
        self._at_end.cancel()
        self._jobs.put(None)
        self._thread.join(LAST_SECONDS)
        with self._doing_directly:
            self._close_direct()
        self.lost, self.waiting = self.lost + self.waiting, 0
        if self.lost:
            log.error("error: %d rows of the prediction log are lost", self.lost)
        if self._engine is not None and not self._thread.is_alive():
            self._engine.dispose()
