"""The log of every prediction that a serving script makes. `monitor.py` reads it.

A row holds no name and no value: the visit is a keyed hash, features are bins, codes are measured or not. Many
processes write to one database. A row is committed before the prediction is returned. The default is SQLite; any
SQLAlchemy URL works. A new column needs two edits: here, and a file in ``monitoring/migrations/versions/``.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import DATETIME, dialect

from common.command_line import log
from common.pseudonyms import KEY_VARIABLE, Pseudonyms
from feature_pipeline import MICROSECONDS_PER_HOUR, Assessment, Observations, ProductionPipeline
from monitoring.profile import Profile
from monitoring.writer import Writer

URL_VARIABLE = "SEPSIS_MONITOR_URL"
DEFAULT_URL = "sqlite:///data/predictions.db"
OFF = "off"
OPENING_TRIES = 8
PIECE = 1_000  # rows in a transaction
FEW = 50  # rows of a request, or of some: SQLite takes 999 values in a statement
ROLLED_UP = "stream"  # the source that scores a visit again and again
MOST_ROLLED_UP = 200_000  # visits whose last row is remembered
# a connection whose other end has gone is given up in a minute
KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
MIGRATIONS = Path(__file__).with_name("migrations")
WAL_PAGES = 16_000  # of SQLite's write-ahead log, 64 MB: each checkpoint waits for the disk
metadata = sa.MetaData()
predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("time", sa.DateTime(), nullable=False, index=True),  # UTC
    sa.Column("source", sa.String(16), nullable=False),  # api, batch, database, stream
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("visit", sa.String(16), nullable=False),  # Pseudonyms.visit
    sa.Column("as_of", sa.DateTime()),  # the moment that the score is for
    sa.Column("score", sa.Double()),  # NULL if the risk is UNKNOWN
    sa.Column("risk_level", sa.String(8), nullable=False),
    sa.Column("bins", sa.Text(), nullable=False),  # a letter for each watched feature: a, b, ..., - if empty
    sa.Column("codes", sa.Text(), nullable=False),  # for each of the model's codes 1 if the visit has it, else 0
    sa.Column("unknown", sa.Integer(), nullable=False),  # number of observations of codes that the model does not use
    sa.Column("seconds", sa.Double(), nullable=False),  # duration of the call
    sa.Column("reason", sa.String(32)),  # why the risk is UNKNOWN, as `ProductionPipeline.assess` has it
    sa.Column("newest", sa.DateTime()),  # time of the newest observation that was used
    sa.Column("codes_sha256", sa.String(64)),  # of the site map of codes; NULL without one
    sa.Column("shadow", sa.Boolean(), nullable=False),  # by a challenger, shown to nobody
    # predictions that the row counts: its own, and earlier ones of the visit in the same hour at the same level
    sa.Column("n", sa.Integer(), nullable=False, server_default="1"),
)
errors = sa.Table(
    "prediction_errors",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("time", sa.DateTime(), nullable=False, index=True),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("n", sa.Integer(), nullable=False),
)
cards = sa.Table(  # of CDS Hooks
    "cards",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("time", sa.DateTime(), nullable=False, index=True),  # when it was given, UTC
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("card", sa.String(36), nullable=False, unique=True),  # its uuid
    sa.Column("visit", sa.String(16), nullable=False),  # Pseudonyms.visit
    sa.Column("risk_level", sa.String(8), nullable=False),
    sa.Column("outcome", sa.String(16)),  # accepted or overridden; NULL if nobody answered
    sa.Column("reason", sa.String(32)),  # of an overridden card: a code of the service's list, or other
    sa.Column("answered", sa.DateTime()),  # UTC
)
_NEW_PREDICTION, _NEW_ERROR = predictions.insert(), errors.insert()  # made once: SQLAlchemy caches their SQL
_NEW_CARD = cards.insert()
_OF_SNAPSHOTS = [f.name for f in fields(Assessment) if f.name != "inputs"]
_time_text = DATETIME().bind_processor(dialect())  # as SQLAlchemy has times in SQLite
_migrating = threading.Lock()  # Alembic's context belongs to the whole process


def migrate(engine: sa.Engine) -> None:
    """Brings the tables to the newest migration, or leaves them if they are as new or newer."""
    newest = max(path.name for path in (MIGRATIONS / "versions").glob("*.py"))[:4]
    with engine.connect() as connection:
        if sa.inspect(connection).has_table("prediction_log_version"):
            present = connection.scalar(sa.text("SELECT version_num FROM prediction_log_version"))
            if present is not None and present >= newest:  # newer: written by a later release
                return
    from alembic import command  # takes 0.3 s, so only where there is something to do
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with _migrating, engine.connect() as connection:
        config.attributes["connection"] = connection
        driver = connection.connection.driver_connection
        if engine.dialect.name == "sqlite":  # left to itself, the driver begins after the tables were looked at
            before, driver.isolation_level = driver.isolation_level, None
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            command.upgrade(config, "head")
            connection.commit()
        finally:
            connection.rollback()
            if engine.dialect.name == "sqlite":
                driver.isolation_level = before


def open_engine(url: str) -> sa.Engine:
    """An engine whose tables are up to date. With SQLite, writers wait for one another and readers for nobody."""
    address = sa.make_url(url)
    sqlite = address.get_backend_name() == "sqlite"
    if sqlite and address.database and address.database != ":memory:":
        folder = Path(address.database).parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        os.close(os.open(address.database, os.O_CREAT | os.O_WRONLY, 0o600))
    options: dict[str, Any] = {}
    if address.get_driver_name() in ("psycopg", "psycopg2"):
        options["connect_args"] = {"connect_timeout": 10, **KEEPALIVES}
    engine = sa.create_engine(address, pool_pre_ping=not sqlite, **options)
    if sqlite:

        @sa.event.listens_for(engine, "connect")
        def _on_connect(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout = 10000")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = NORMAL")  # safe if a process is killed
            cursor.execute(f"PRAGMA wal_autocheckpoint = {4 * WAL_PAGES}")  # if `_checkpoint` falls behind
            cursor.close()

    for attempt in range(OPENING_TRIES):
        try:
            migrate(engine)
            return engine
        except (sa.exc.DBAPIError, sqlite3.OperationalError):  # another process migrates the same tables
            if attempt == OPENING_TRIES - 1:
                engine.dispose()
                raise
            time.sleep(0.05 * (attempt + 1))
    raise AssertionError("unreachable")


def url_of(url: str | None) -> str:
    """The URL that is given, else that of the environment, else the default."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL


class PredictionLog:
    """Writes rows for one pipeline and one source. A log that cannot be written never stops the scoring: see `Writer`.

    `shadow`: of a challenger. `required`: what cannot be logged at once is not given, and not logged later. A stream
    scores a visit at every observation: of one visit at one level it logs one row an hour, which counts the others.
    """

    def __init__(
        self,
        engine: sa.Engine | None,
        pipeline: ProductionPipeline,
        source: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        shadow: bool = False,
        required: bool = False,
        url: str = OFF,
    ):
        self._shadow, self._required, self._clock = shadow, required, clock
        self._pipeline, self._source = pipeline, source
        self._profile = Profile(pipeline.config)
        self._pseudonyms = Pseudonyms.from_environment()
        self._pages, self._checkpointing = 0, threading.Lock()
        self._rolled_up: OrderedDict[tuple[str, str], list[Any]] = OrderedDict()  # visit -> its last row, count since
        self._told_lost, self._telling = 0, threading.Lock()
        self._writer: Writer | None = None
        if engine is not None or url != OFF:
            self._writer = Writer(lambda: engine or open_engine(url), self._after_write, _probe)
            if not self._pseudonyms.lasting:
                log.info("%s is not set: the prediction log cannot be joined to outcomes later", KEY_VARIABLE)

    @classmethod
    def open(
        cls, url: str | None, pipeline: ProductionPipeline, source: str, shadow: bool = False, required: bool = False
    ) -> PredictionLog:
        """The log at `url` for what `source` scores; `shadow`: with a challenger. None: the URL of the environment,
        else `DEFAULT_URL`. ``off``: no log."""
        opened = cls(None, pipeline, source, shadow=shadow, required=required, url=url_of(url))
        if opened._writer is not None:
            opened._writer.open()
        return opened

    @property
    def works(self) -> bool:
        """False if predictions are not logged at once: the database is silent, locked or away."""
        return self._writer is None or not self._writer.behind

    @property
    def waiting(self) -> int:
        """Rows that wait to be written."""
        return self._writer.waiting if self._writer else 0

    @property
    def lost(self) -> int:
        """Rows that were not written and never will be."""
        return self._writer.lost if self._writer else 0

    def newly_lost(self) -> int:
        """Rows that were lost since it was asked last."""
        with self._telling:
            lost, self._told_lost = self.lost - self._told_lost, self.lost
        return lost

    def __str__(self) -> str:
        """What is not logged, for a summary; empty where all is."""
        parts = [f"{n:,} {what}" for n, what in ((self.waiting, "wait"), (self.lost, "are lost")) if n]
        return f"of the prediction log's rows {', '.join(parts)}" if parts else ""

    def record(
        self,
        observations: Observations,
        visit: np.ndarray,
        as_of: np.ndarray,
        found: Assessment,
        seconds: float,
    ) -> bool:
        """Writes one row for each snapshot. Returns False if they are not all committed: others may be later.

        `found` is what `ProductionPipeline.assess` returned for these snapshots, `seconds` the duration of that call.
        """
        if self._writer is None or not len(visit):
            return self._writer is not None
        n = np.ones(len(visit), dtype=np.int64)
        if self._source == ROLLED_UP:
            n = self._count_together(observations, visit, as_of, found)
            kept = np.flatnonzero(n)
            if not len(kept):
                return self.works
            n, visit, as_of = n[kept], visit[kept], as_of[kept]
            found = replace(found, **{name: getattr(found, name)[kept] for name in _OF_SNAPSHOTS})
        clients, visits = observations.client_text[visit].tolist(), observations.visit_text[visit].tolist()
        codes, unknown = self._profile.present(observations, visit, as_of)
        shared = {
            "time": self._clock().replace(tzinfo=None),
            "source": self._source,
            "model_version": self._pipeline.model_version,
            "seconds": seconds,
            "codes_sha256": self._pipeline.reproducer.codes.sha256,
            "shadow": self._shadow,
        }
        moments, newest = (times.astype("datetime64[us]").astype(object) for times in (as_of, found.newest))  # or None
        rows = [
            {
                **shared,
                "visit": self._pseudonyms.visit(client, number),
                "as_of": moment,
                "score": score if score == score else None,
                "risk_level": level,
                "bins": bins,
                "codes": present,
                "unknown": others,
                "reason": reason,
                "newest": latest,
                "n": together,
            }
            for client, number, moment, score, level, bins, present, others, reason, latest, together in zip(
                clients,
                visits,
                moments,
                found.probability.tolist(),
                found.level.tolist(),
                self._profile.bins(found.features),
                codes,
                unknown,
                found.reason.tolist(),
                newest,
                n.tolist(),
                strict=True,
            )
        ]
        return self._write(_NEW_PREDICTION, rows)

    def _count_together(
        self, observations: Observations, visit: np.ndarray, as_of: np.ndarray, found: Assessment
    ) -> np.ndarray:
        """For each snapshot how many predictions its row counts: itself and those of the visit since its last row. 0
        for a snapshot that has no row: the visit has one of the same hour, level and reason."""
        hours = (as_of // MICROSECONDS_PER_HOUR).tolist()
        levels, reasons = found.level.tolist(), found.reason.tolist()
        n = np.zeros(len(visit), dtype=np.int64)
        for i, place in enumerate(visit.tolist()):
            key = observations.client_text[place], observations.visit_text[place]
            row = hours[i], levels[i], reasons[i]
            last = self._rolled_up.pop(key, [None, 0])
            self._rolled_up[key] = last  # the newest last
            last[1] += 1
            if last[0] != row:
                n[i], last[0], last[1] = last[1], row, 0
        while len(self._rolled_up) > MOST_ROLLED_UP:
            self._rolled_up.popitem(last=False)
        return n

    def record_error(self, kind: str, n: int = 1) -> bool:
        """Logs that `n` requests, files or visits could not be scored."""
        row = {"source": self._source, "model_version": self._pipeline.model_version, "kind": kind, "n": n}
        return self._write(_NEW_ERROR, [{"time": self._clock().replace(tzinfo=None), **row}])

    def record_cards(self, given: Iterable[tuple[str, str, str, str]]) -> bool:
        """Logs cards that are given to clinicians: each with its uuid, client, visit and risk level."""
        shared = {"time": self._clock().replace(tzinfo=None), "model_version": self._pipeline.model_version}
        rows = [
            {**shared, "card": card, "visit": self._pseudonyms.visit(client, visit), "risk_level": level}
            for card, client, visit, level in given
        ]
        return not rows or self._write(_NEW_CARD, rows)

    def record_answers(self, answers: Iterable[tuple[str, str, str | None, datetime]]) -> list[bool] | None:
        """Logs how clinicians answered cards: the card's uuid, ``accepted`` or ``overridden``, the reason, and when
        (UTC, naive). A later answer replaces an earlier one. Returns whether each card is known; None if nothing could
        be written."""
        known: list[bool] = []

        def write(connection: sa.Connection) -> None:
            known.clear()
            for card, outcome, reason, moment in answers:
                own = cards.c.card == card
                first = sa.or_(cards.c.answered.is_(None), cards.c.answered <= moment)
                answer = {"outcome": outcome, "reason": reason, "answered": moment}
                connection.execute(cards.update().where(own, first).values(**answer))
                known.append(connection.scalar(sa.select(cards.c.id).where(own)) is not None)

        return known if self._writer and self._writer.write(write, keep=False) else None

    def _write(self, statement: sa.Insert, rows: list[dict[str, Any]]) -> bool:
        if self._writer is None:
            return False
        written = True
        for start in range(0, len(rows), PIECE):
            piece = rows[start : start + PIECE]
            work = lambda connection, piece=piece: _insert(connection, statement, piece)  # noqa: E731
            written &= self._writer.write(work, len(piece), keep=not self._required)
        return written

    def _after_write(self, engine: sa.Engine, n: int) -> None:
        if engine.dialect.name == "sqlite":
            self._pages += 3 + n // 10  # about as many go to the write-ahead log
            if self._pages >= WAL_PAGES and self._checkpointing.acquire(blocking=False):
                self._pages = 0
                threading.Thread(target=self._checkpoint, args=(engine,), daemon=True).start()

    def _checkpoint(self, engine: sa.Engine) -> None:
        """Brings the write-ahead log into the database. If SQLite did it, the next row would wait for the disk."""
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
        except sa.exc.SQLAlchemyError:  # the next checkpoint tries again
            pass
        finally:
            self._checkpointing.release()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _insert(connection: sa.Connection, statement: sa.Insert, rows: list[dict[str, Any]]) -> None:
    """Writes rows. A few rows go into SQLite by one statement that is its own transaction: between the statements of a
    transaction, this thread may wait for Python's interpreter, and other processes would wait for the database."""
    if connection.dialect.name != "sqlite" or len(rows) > FEW:
        connection.execute(statement, rows)
        return
    places = ", ".join([f"({', '.join('?' * len(rows[0]))})"] * len(rows))
    values = tuple(_time_text(v) if isinstance(v, datetime) else v for row in rows for v in row.values())
    driver = connection.connection.driver_connection
    before, driver.isolation_level = driver.isolation_level, None  # else the driver begins a transaction
    try:
        connection.exec_driver_sql(f"INSERT INTO {statement.table} ({', '.join(rows[0])}) VALUES {places}", values)
    finally:
        driver.isolation_level = before


def _probe(connection: sa.Connection) -> None:
    """Raises where nothing can be written."""
    connection.execute(errors.delete().where(sa.false()))
