"""What the stream accepted, in a SQLite file: a killed process loses nothing that it acknowledged.

Damage is found when the file is read: every entry has a checksum, the number of entries and the sum of their checksums
are kept with them, and the lock file beside it has the number of finished transactions.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import struct
import threading
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import locked
from common.command_line import log
from feature_pipeline import BadConfig
from serving.stream.alerts import visit_of
from serving.stream.visits import REMEMBERED, ROW, Key, Visit

APPLICATION = 0x53455053  # marks SQLite files of this program
SCHEMA = f"""
BEGIN;
CREATE TABLE entries (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, visit INTEGER NOT NULL, content BLOB NOT NULL,
    checksum INTEGER NOT NULL);
CREATE INDEX entries_of_visit ON entries (kind, visit);
CREATE TABLE total (entries INTEGER NOT NULL, checksums INTEGER NOT NULL, transactions INTEGER NOT NULL);
INSERT INTO total VALUES (0, 0, 0);
CREATE TRIGGER added AFTER INSERT ON entries BEGIN
    UPDATE total SET entries = entries + 1, checksums = checksums + new.checksum; END;
CREATE TRIGGER removed AFTER DELETE ON entries BEGIN
    UPDATE total SET entries = entries - 1, checksums = checksums - old.checksum; END;
PRAGMA application_id = {APPLICATION};
COMMIT;
"""
# kind of an entry -> its `visit` and content
KINDS = {
    "raw": "0; observations as they came, JSON: accepted, their scores not yet given",
    "visit": "its number; what is known of an open visit, JSON",
    "rows": "its number; observations of it, the bytes of `ROW`s",
    "code": "its place in the rows; the code's text",
    "alert": "its number; an alert that may not be everywhere yet, JSON",
    "sent": "its number; an alert of an open visit that is everywhere, JSON",
    "dropped": "the visit's mark as a number; nothing",
    "meaning": "0; tells by which meanings of codes the rows were read, and of which topic",
    "position": "a partition of a topic; up to where its observations are here, JSON",
}
PIECES = 32  # of a visit's rows, before they are written as one
CHECKPOINT_PAGES = 8_000  # about so many are in the write-ahead log: 32 MB
COUNTER = struct.Struct("<QI")  # finished transactions, checksum


@dataclass
class Alert:
    """An alert in the file."""

    number: int
    id: str
    visit: Key
    content: bytes
    sent: bool

    @classmethod
    def of(cls, number: int, content: bytes, sent: bool) -> Alert:
        alert = json.loads(content)
        return cls(number, alert["alert_id"], visit_of(alert), content, sent)


@dataclass
class Kept:
    """What an earlier process left."""

    visits: list[tuple[int, dict[str, Any], np.ndarray]] = field(default_factory=list)  # number, content, rows
    codes: dict[int, str] = field(default_factory=dict)
    raw: list[Any] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    unsent: set[str] = field(default_factory=set)  # ids of alerts
    dropped: list[bytes] = field(default_factory=list)  # marks, the oldest first
    meaning: str | None = None
    positions: dict[int, Any] = field(default_factory=dict)  # of partitions


class Damaged(BadConfig):
    """The file is not as it was written."""


class Journal:
    """The file of one stream; a lock file beside it keeps others out.

    An entry is on disk when the call that writes it returns, so a killed process has kept it. With `durable` it also
    survives a power cut. Space of what is deleted is used again: the file is never written anew. Raises `BadConfig`
    where another process has the file.
    """

    def __init__(self, path: str | Path, durable: bool = False):
        self.path, self.durable = Path(path), durable
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._lock = contextlib.ExitStack()
        if not self._lock.enter_context(locked(f"{self.path}.lock", wait=False)):
            self._lock.close()
            raise BadConfig(
                f"state file {str(self.path)!r} belongs to a stream that is running; give each stream its own --state"
            )
        self._counter = os.open(f"{self.path}.lock", os.O_RDWR)
        self._lock.callback(os.close, self._counter)
        self.database: sqlite3.Connection | None = None
        self.accepted = False  # are there observations of which nothing is settled?
        self._transactions = self._pages = 0
        self._numbers = 0  # of visits
        self._codes: list[str] = []
        self._alerts: list[Alert] = []
        self._meaning: str | None = None
        self._checkpointing: threading.Thread | None = None

    # --------------------------------------------------------------------------------------------- opening

    def load(self) -> Kept:
        """What an earlier process left. Raises `BadConfig` where the file is damaged or none of this program's; it is
        left as it is then."""
        try:
            self._open()
            return self._read()
        except (sqlite3.Error, ValueError, KeyError, TypeError, struct.error) as error:
            self._let_go()
            raise self._damaged(type(error).__name__) from None
        except BadConfig:
            self._let_go()
            raise

    def _damaged(self, what: str) -> Damaged:
        return Damaged(
            f"state file {str(self.path)!r} is damaged ({what}); observations that were acknowledged may be missing. "
            "Move it away, and send the observations of open visits again, else they are scored from a part"
        )

    def _open(self) -> None:
        finished = self._finished()
        if not self.path.exists():
            finished = 0
            os.ftruncate(self._counter, 0)
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
        with self.path.open("rb") as file:
            start = file.read(16)
        if start and start != b"SQLite format 3\0":
            raise BadConfig(
                f"{str(self.path)!r} is not a state file of this program, or its beginning is damaged; it is left as "
                "it is: give --state another name"
            )
        self.database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        [(application,)] = self.database.execute("PRAGMA application_id")
        [(tables,)] = self.database.execute("SELECT count(*) FROM sqlite_master")
        if not tables and not application and not finished:
            self.database.executescript(SCHEMA)
        elif not tables:
            raise self._damaged("it is empty")
        elif application != APPLICATION:
            raise BadConfig(f"{str(self.path)!r} is not a state file of this program; give --state another name")
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA wal_autocheckpoint = 0")  # a thread does it: nobody waits for the disk
        self.database.execute(f"PRAGMA synchronous = {'FULL' if self.durable else 'NORMAL'}")
        [(self._transactions,)] = self.database.execute("SELECT transactions FROM total")
        if finished is not None and self._transactions < finished:
            raise self._damaged(f"its last {finished - self._transactions} transactions are missing")

    def _finished(self) -> int | None:
        """The number of transactions that were finished, as the lock file has it; None where it does not say."""
        content = os.pread(self._counter, COUNTER.size + 1, 0)
        if not content:
            return 0
        with contextlib.suppress(struct.error):
            finished, checksum = COUNTER.unpack(content)
            if checksum == zlib.crc32(content[:8]):
                return finished
        log.warning("%s.lock is damaged: whether the newest observations are missing cannot be told", self.path.name)
        return None

    def _read(self) -> Kept:
        kept, rows, visits, order = Kept(), [], {}, {}
        numbers: list[int] = []
        n = checksums = 0
        query = "SELECT kind, visit, content, checksum FROM entries ORDER BY id"
        for kind, visit, content, checksum in self.database.execute(query):
            if _checksum(kind, visit, content) != checksum:
                raise self._damaged("an entry's checksum differs")
            n, checksums = n + 1, checksums + checksum
            if kind == "rows":
                rows.append(content)
                numbers.append(visit)
                order[visit] = n
            elif kind == "visit":
                visits[visit] = json.loads(content)
            elif kind == "code":
                kept.codes[visit] = content.decode()
            elif kind == "raw":
                kept.raw += json.loads(content)
                self.accepted = True
            elif kind in ("alert", "sent"):
                self._alerts.append(Alert.of(visit, content, kind == "sent"))
            elif kind == "dropped":
                kept.dropped.append(visit.to_bytes(8, "big", signed=True))
            elif kind == "position":
                kept.positions[visit] = json.loads(content)
            elif kind == "meaning":
                kept.meaning = self._meaning = content.decode()
        [(entries, total)] = self.database.execute("SELECT entries, checksums FROM total")
        if (entries, total) != (n, checksums):
            raise self._damaged(f"{entries} entries were written, {n} are there")
        if order.keys() - visits.keys():
            raise self._damaged("rows of no visit")
        lengths = [len(content) // ROW.itemsize for content in rows]
        together = np.frombuffer(b"".join(rows), dtype=ROW)
        del rows
        of_row = np.repeat(np.array(numbers, dtype=np.int64), lengths)
        by_visit = np.argsort(of_row, kind="stable")
        of_row = of_row[by_visit]
        for number in sorted(visits, key=lambda number: order.get(number, 0)):
            start, end = np.searchsorted(of_row, [number, number + 1])
            kept.visits.append((number, visits[number], together[by_visit[start:end]]))
        kept.alerts = [json.loads(alert.content) for alert in self._alerts]
        kept.unsent = {alert.id for alert in self._alerts if not alert.sent}
        self._numbers = max(visits, default=0)
        self._codes = [kept.codes.get(place, "") for place in range(max(kept.codes, default=-1) + 1)]
        if len(kept.dropped) > REMEMBERED:
            with self._transaction():
                oldest = "SELECT id FROM entries WHERE kind = 'dropped' ORDER BY id LIMIT ?"
                self.database.execute(f"DELETE FROM entries WHERE id IN ({oldest})", (len(kept.dropped) - REMEMBERED,))
        return kept

    # --------------------------------------------------------------------------------------------- writing

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything of it is on disk afterwards, or nothing. Raises `OSError`."""
        try:
            self.database.execute("BEGIN IMMEDIATE")
            yield self.database
            self.database.execute("UPDATE total SET transactions = transactions + 1")
            self.database.execute("COMMIT")
            self._transactions += 1
            number = self._transactions.to_bytes(8, "little")
            os.pwrite(self._counter, number + zlib.crc32(number).to_bytes(4, "little"), 0)
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self.database.execute("ROLLBACK")
            number = errno.ENOSPC if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL" else errno.EIO
            raise OSError(number, f"the state cannot be kept: {os.strerror(number)}", str(self.path)) from None
        self._checkpoint()

    def _insert(self, entries: Iterable[tuple[str, int, bytes]]) -> None:
        rows = [(kind, visit, content, _checksum(kind, visit, content)) for kind, visit, content in entries]
        self.database.executemany("INSERT INTO entries (kind, visit, content, checksum) VALUES (?, ?, ?, ?)", rows)
        self._pages += 4 + len(rows) + sum(len(row[2]) for row in rows) // 2048

    def accept(self, observations: Sequence[Mapping[str, Any]]) -> None:
        """Keeps observations as they came. Raises `OSError`, with nothing of them kept."""
        if observations:
            with self._transaction():
                self._insert([("raw", 0, json.dumps(observations).encode())])
            self.accepted = True

    def keep_alerts(self, alerts: Sequence[Mapping[str, Any]]) -> None:
        """Keeps alerts that are about to be sent. Raises `OSError`."""
        if alerts:
            first = max((alert.number for alert in self._alerts), default=0) + 1
            contents = [json.dumps(alert).encode() for alert in alerts]
            with self._transaction():
                self._insert([("alert", number, content) for number, content in enumerate(contents, first)])
            self._alerts += [Alert.of(number, content, sent=False) for number, content in enumerate(contents, first)]

    def settle(
        self,
        visits: Sequence[Visit],
        closed: Sequence[Visit],
        dropped: Sequence[bytes],
        codes: Sequence[str],
        sent: Container[str],
        is_open: Container[Key],
        meaning: str,
        positions: Mapping[int, Any] | None = None,
    ) -> None:
        """Keeps what became of all observations that were accepted; their scores are out.

        `visits` are the open visits that changed, `closed` those that ended since, `dropped` the marks of visits that
        must not be scored again, `codes` the texts of the rows' codes, `sent` the ids of alerts that are everywhere;
        those of visits that are not open any more are deleted. `positions` are those of a topic's partitions. Raises
        `OSError`; the same may be tried again then.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM entries WHERE kind = 'raw' AND visit = 0")
            entries: list[tuple[str, int, bytes]] = []
            if meaning != self._meaning:
                db.execute("DELETE FROM entries WHERE kind = 'meaning' AND visit = 0")
                entries.append(("meaning", 0, meaning.encode()))
            places = [i for i, code in enumerate(codes) if i >= len(self._codes) or self._codes[i] != code]
            db.executemany("DELETE FROM entries WHERE kind = 'code' AND visit = ?", [(place,) for place in places])
            entries += [("code", place, codes[place].encode("utf-8", "surrogatepass")) for place in places]
            if positions is not None:
                db.execute("DELETE FROM entries WHERE kind = 'position'")
                entries += [("position", place, json.dumps(to).encode()) for place, to in positions.items()]
            numbers = [(visit.number,) for visit in closed if visit.number]
            for kind in ("visit", "rows"):
                db.executemany(f"DELETE FROM entries WHERE kind = '{kind}' AND visit = ?", numbers)
            entries += [("dropped", int.from_bytes(mark, "big", signed=True), b"") for mark in dropped]
            last = self._numbers
            written = []
            for visit in visits:
                number, last = (visit.number, last) if visit.number else (last + 1, last + 1)
                content = visit.content()
                if content != visit.kept:
                    if visit.number:
                        db.execute("DELETE FROM entries WHERE kind = 'visit' AND visit = ?", (number,))
                    entries.append(("visit", number, content))
                whole = visit.rewrite or (visit.pieces >= PIECES and visit.n_rows > 1.5 * visit.n_rows_kept)
                if whole and visit.number:
                    db.execute("DELETE FROM entries WHERE kind = 'rows' AND visit = ?", (number,))
                pieces = visit.rows if whole else visit.fresh
                if pieces:
                    entries.append(("rows", number, b"".join(piece.tobytes() for piece in pieces)))
                written.append((visit, number, content, whole))
            everywhere = [alert for alert in self._alerts if alert.sent or alert.id in sent]
            ended = [alert for alert in everywhere if alert.visit not in is_open]
            now_sent = [alert for alert in everywhere if not alert.sent]
            for kind, alerts in (("sent", ended), ("alert", now_sent)):
                gone = [(kind, alert.number) for alert in alerts]
                db.executemany("DELETE FROM entries WHERE kind = ? AND visit = ?", gone)
            entries += [("sent", a.number, a.content) for a in now_sent if a.visit in is_open]
            self._insert(entries)
        self._numbers, self._meaning, self._codes, self.accepted = last, meaning, list(codes), False
        for visit, number, content, whole in written:
            visit.number, visit.kept, visit.rewrite = number, content, False
            visit.pieces = 1 if whole else visit.pieces + bool(visit.fresh)
            visit.n_rows_kept = visit.n_rows if whole else visit.n_rows_kept
            visit.fresh = []
        for alert in now_sent:
            alert.sent = True
        if ended:
            self._alerts = [alert for alert in self._alerts if alert not in ended]

    def _checkpoint(self) -> None:
        """Brings the write-ahead log into the file from time to time. A thread does most of it, so that the stream does
        not wait for the disk; the rest, in which nothing may be written, is short. Then the log begins anew."""
        thread = self._checkpointing
        if thread is None and self._pages > CHECKPOINT_PAGES:
            self._pages = 0
            self._checkpointing = threading.Thread(target=self._bring_over, name="checkpoint", daemon=True)
            self._checkpointing.start()
        elif thread is not None and not thread.is_alive():
            self._checkpointing = None
            with contextlib.suppress(sqlite3.Error):
                self.database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _bring_over(self) -> None:
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.path)) as own:
            for _ in range(3):  # each round has less to do
                own.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Lets another process have the file."""
        if self._checkpointing is not None:
            self._checkpointing.join()
        self._let_go()
        self._lock.close()

    def _let_go(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None


def _checksum(kind: str, visit: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(f"{kind} {visit}".encode()))
