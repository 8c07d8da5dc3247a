"""Claims pending visits, scores them, writes the scores back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from common.command_line import run_every
from feature_pipeline import (
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    NOTHING_USABLE,
    UNKNOWN_REASONS,
    ProductionPipeline,
    SiteCodes,
    as_text,
    to_micros,
)
from monitoring.log import OFF
from serving.db.connection import DEFAULT_URL, MYSQL, BatchUndone, DatabaseError, check_monitor, connect, in_words
from serving.db.reading import (
    Key,
    Read,
    among,
    from_json,
    newest_of_visit,
    raw,
    read_observations,
    rows_of,
    same_visit,
)
from serving.db.tables import DEFAULT_MAPPING, Tables, make_tables
from serving.deployed import LAST, NOW, Deployed, moments_of
from serving.evidence import unused_text

BATCH_SIZE, MOST_VISITS = 500, 10_000  # in a transaction; SQLite takes 32,766 parameters a statement


@dataclass
class RunResult:
    """What a run did. `unknown` counts visits without enough evidence by reason: they are written as UNKNOWN, and are
    pending again when new observations come. `without_observations` visits stay pending, and so do those that are
    `held` by other predictors, or came at the end. `not_logged` says what the prediction log does not have."""

    model_version: str
    scored: int = 0
    rescored: int = 0
    batches: int = 0
    observations: int = 0
    risk_levels: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    set_aside: Counter[str] = field(default_factory=Counter)
    unused_codes: Counter[str] = field(default_factory=Counter)
    without_observations: int = 0
    held: int = 0
    not_logged: str = ""
    seconds: float = 0.0
    dry_run: bool = False

    def __str__(self) -> str:
        levels = ", ".join(f"{self.risk_levels[level]:,} {level}" for level in ("HIGH", "MEDIUM", "LOW"))
        text = (
            f"{'would score' if self.dry_run else 'scored'} {self.scored:,} visits ({levels}) from "
            f"{self.observations:,} observations with model {self.model_version} in {self.seconds:.1f} s"
        )
        if self.rescored:
            text += f"; {self.rescored:,} of them again, for new observations"
        if self.unknown:
            told = ", ".join(f"{n:,} x {UNKNOWN_REASONS[reason]}" for reason, n in sorted(self.unknown.items()))
            text += f"; {self.unknown.total():,} more are UNKNOWN: {told}"
        if self.without_observations:
            text += f"; {self.without_observations:,} pending visits have no observations"
        if self.held:
            text += f"; {self.held:,} are held by others"
        if self.unused_codes:
            text += f"; {unused_text(self.unused_codes)}"
        return text + (f"; {self.not_logged}" if self.not_logged else "")

    def add(self, batch: Batch, scored_before: set[Key]) -> None:
        """Counts a batch that is committed."""
        rows = batch.rows
        names = "sepsis_score", "observations", "risk_level", "client", "visit_id"
        scored = [row[1:] for row in zip(*(rows[name] for name in names), strict=True) if row[0] is not None]
        self.batches += 1
        self.scored += len(scored)
        self.observations += sum(n for n, *_ in scored)
        self.risk_levels.update(level for _, level, *_ in scored)
        self.rescored += sum(tuple(key) in scored_before for _, _, *key in scored)
        self.unknown.update(batch.unknown)
        self.set_aside.update(batch.set_aside)
        self.unused_codes.update(batch.unused_codes)


class Claim(NamedTuple):
    """A visit to score, whether it has a score already, and whether this model ever assessed it."""

    client: Any
    visit_id: Any
    scored: bool
    known: bool


class Work(NamedTuple):
    """A transaction with the visits that it claimed, which nobody else scores until it ends, and what was read."""

    connection: sa.Connection
    claims: list[Claim]
    read: Read | None


class Batch(NamedTuple):
    """The result of one batch of visits: columns for the predictions table, visits without a score by reason, rows set
    aside and unused codes; `record` writes it to the prediction log."""

    rows: dict[str, list[Any]]
    unknown: Counter[str]
    set_aside: Counter[str]
    unused_codes: Counter[str]
    record: Callable[[], Any]


def _pending(visits: Mapping[str, sa.Column[Any]]) -> sa.ColumnElement[bool]:
    """A visit without a score that is not known to lack evidence."""
    return sa.and_(visits["sepsis_score"].is_(None), visits["risk_level"].is_distinct_from("UNKNOWN"))


class DatabasePredictor:
    """Scores the pending visits of a database with one config and model.

    `tables` maps other table and column names (see `read_mapping`). `as_of` is the moment that visits are scored for:
    ``now``, ``last`` (the last observation of each), or a time. `codes` is the site's map of codes, `clock` returns the
    time in seconds since 1970, `monitor` is the URL of the prediction log. Raises `DatabaseError`, `BadConfig`,
    `BadModel`, `BadObservations` (for `as_of`).
    """

    def __init__(
        self,
        db_url: str | sa.URL = DEFAULT_URL,
        config_path: str | Path = DEFAULT_CONFIG,
        model_path: str | Path = DEFAULT_MODEL,
        *,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        batch_size: int = BATCH_SIZE,
        as_of: str = NOW,
        codes: SiteCodes | None = None,
        clock: Callable[[], float] = time.time,
        monitor: str = OFF,
    ):
        if not 1 <= batch_size <= MOST_VISITS:
            raise ValueError(f"batch_size is {batch_size}, expected 1 to {MOST_VISITS}")
        if as_of not in (NOW, LAST):
            to_micros(as_of)  # raises `BadObservations`
        self.mapping = tables or DEFAULT_MAPPING
        self.batch_size, self.as_of, self.clock = batch_size, as_of, clock
        self.engine = connect(db_url)
        self.reading = self.engine.execution_options(only_reads=True)
        check_monitor(monitor, self.engine.url)
        self.deployed = Deployed(ProductionPipeline(config_path, model_path, codes), "database", monitor)
        self._tables: Tables | None = None

    @property
    def pipeline(self) -> ProductionPipeline:
        return self.deployed.pipeline

    @property
    def tables(self) -> Tables:
        """The tables as found at first use."""
        if self._tables is None:
            database = self.engine.url.database
            if self.engine.dialect.name == "sqlite" and database and not Path(database).exists():
                raise DatabaseError(f"the database file {database!r} does not exist; --init-db makes it")
            with in_words(self.engine.url), self.reading.connect() as connection:
                self._tables = Tables(connection, self.mapping)
        return self._tables

    def init_db(self) -> None:
        """Makes the tables that are missing, or brings them up to date."""
        make_tables(self.engine, self.mapping)
        self._tables = None

    def close(self) -> None:
        self.engine.dispose()

    def process_pending_visits(
        self, rescore: bool = False, dry_run: bool = False, advance: Callable[[int], Any] = lambda n: None
    ) -> RunResult:
        """Scores every pending visit that has observations, a batch a transaction.

        A visit without enough evidence for a score is written as UNKNOWN. It is no longer pending until it has more
        observations, or another newest one, or another model is deployed; empty its ``risk_level`` to try it again.
        `rescore`: visits count as pending too that have more observations than any score was made from, or another
        newest one. A value that was corrected in place, or an older row that came in exchange for one that went, is not
        seen: empty the visit's ``sepsis_score`` to have it scored again.
        `dry_run`: computes, but claims and writes nothing. `advance` is told the number of visits of each batch.

        Raises `DatabaseError`; a `BatchUndone` tells how much was finished before.
        """
        started = time.monotonic()
        result = RunResult(self.pipeline.model_version, dry_run=dry_run)
        tables = self.tables
        try:
            with in_words(self.engine.url, BatchUndone):
                while self._pass(tables, result, rescore, advance):
                    pass  # for visits that others claimed and gave up meanwhile
                result.without_observations, left = self._count_left(tables)
                result.held = 0 if dry_run else left
        except BatchUndone as error:
            self.deployed.current.log.record_error("batch_undone")
            raise BatchUndone(
                f"{error}; {result.scored:,} visits were scored before and are kept, run again to go on"
            ) from None
        result.seconds, result.not_logged = time.monotonic() - started, str(self.deployed.current.log)
        return result

    def count_pending(self) -> int:
        """Pending visits, with observations or without."""
        visits = self.tables.visits
        query = sa.select(sa.func.count()).where(_pending(visits)).select_from(visits["client"].table)
        with in_words(self.engine.url), self.reading.connect() as connection:
            return connection.execute(query).scalar_one()

    def _count_left(self, tables: Tables) -> tuple[int, int]:
        """Pending visits without observations, and with some."""
        visits = tables.visits
        alone = ~sa.exists().where(same_visit(tables.observations, visits))
        counts = sa.func.count(sa.case((alone, 1))), sa.func.count()
        query = sa.select(*counts).where(_pending(visits)).select_from(visits["client"].table)
        with self.reading.connect() as connection:
            without, pending = connection.execute(query).one()
        return without, pending - without

    def _pass(self, tables: Tables, result: RunResult, rescore: bool, advance: Callable[[int], Any]) -> bool:
        """Goes once through all visits in the order of their keys; says whether another pass may find more.

        On PostgreSQL the next batch is claimed and read, in a transaction of its own, while this one is scored. SQLite
        has one transaction at a time; MariaDB's claims lock index records of visits that they skip, and this batch
        would wait for them.
        """
        before = result.scored

        def begin(after: Claim | None) -> Work:
            return self._begin(tables, after, rescore, result.dry_run)

        work = begin(None)
        ahead = self.engine.dialect.name == "postgresql"
        with ThreadPoolExecutor(1) as thread:
            while work.read is not None:
                claims = work.claims
                coming = thread.submit(begin, claims[-1]) if ahead else None
                try:
                    with closing(work.connection) as connection:
                        batch = self._score(connection, tables, claims, work.read)
                        if not result.dry_run:
                            self._write(connection, tables, batch.rows, {claim[:2] for claim in claims if claim.known})
                            connection.commit()
                    # counted and logged only when it is committed
                    result.add(batch, {claim[:2] for claim in claims if claim.scored})
                    if not result.dry_run:
                        batch.record()
                    advance(len(claims))
                except BaseException:
                    if coming is not None:
                        with suppress(Exception):
                            coming.result().connection.close()
                    raise
                work = coming.result() if coming is not None else begin(claims[-1])
            work.connection.close()
        return result.scored > before and not result.dry_run and not rescore

    def _begin(self, tables: Tables, after: Claim | None, rescore: bool, dry_run: bool) -> Work:
        """A transaction with the next visits after that one; the caller closes its connection."""
        connection = (self.reading if dry_run else self.engine).connect()
        try:
            connection.begin()
            claims = self._claim(connection, tables, after, rescore, lock=not dry_run)
            read = read_observations(connection, tables, [claim[:2] for claim in claims]) if claims else None
            return Work(connection, claims, read)
        except BaseException:
            connection.close()
            raise

    def _claim(
        self, connection: sa.Connection, tables: Tables, after: Claim | None, rescore: bool, lock: bool
    ) -> list[Claim]:
        """The next pending visits that have observations, locked until the transaction ends."""
        visits, observations = tables.visits, tables.observations
        own = same_visit(observations, visits)
        predictions, table = tables.predictions, visits["client"].table
        of_version = predictions["model_version"] == self.pipeline.model_version
        count = sa.select(sa.func.count()).where(own).correlate(table).scalar_subquery()
        up_to_date = predictions["observations"] >= count
        if "newest_observation" in predictions:
            newest = sa.select(newest_of_visit(observations)).where(own).correlate(table).scalar_subquery()
            known_newest = predictions["newest_observation"]
            up_to_date = sa.and_(up_to_date, sa.or_(known_newest.is_(None), known_newest == newest))

        def without(*more: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
            return ~sa.exists().where(same_visit(predictions, visits), up_to_date, *more)

        is_unknown = sa.and_(visits["sepsis_score"].is_(None), visits["risk_level"] == "UNKNOWN")
        due = [_pending(visits), sa.and_(is_unknown, without(of_version))]
        if rescore:
            due.append(sa.and_(visits["sepsis_score"].is_not(None), without()))
        key = visits["client"], visits["visit_id"]
        known = sa.exists().where(same_visit(predictions, visits), of_version)
        query = sa.select(*map(raw, key), visits["sepsis_score"].is_not(None), known)
        query = query.where(sa.exists().where(own), sa.or_(*due)).order_by(*key)
        if after is not None:
            query = query.where(sa.tuple_(*key) > (after.client, after.visit_id))
        if lock:  # SQLite ignores it: there BEGIN IMMEDIATE has locked all
            query = query.with_for_update(skip_locked=skips_locked(connection))
        rows = connection.execute(query.limit(self.batch_size))
        return list({row[:2]: Claim(*row) for row in rows}.values())  # of a table without its key `_write` tells

    def _score(self, connection: sa.Connection, tables: Tables, claims: list[Claim], read: Read) -> Batch:
        """What the claimed visits give, with rows for the predictions table."""
        keys = [claim[:2] for claim in claims]
        n_rows = np.bincount(read.place, minlength=len(keys))
        model, now = self.deployed.current, self.clock()
        observations = model.read(read.rows, now if self.as_of == NOW else None)
        own = observations.visit_id.astype(np.int64)
        texts = np.array([[as_text(part) for part in keys[i]] for i in own], dtype=object).reshape(-1, 2)
        observations = replace(observations, client_text=texts[:, 0], visit_text=texts[:, 1])
        visit, moments = np.arange(len(own)), moments_of(observations, self.as_of, now)
        began = time.perf_counter()
        assessed = model.score(observations, visit, moments, record=False)
        seconds = time.perf_counter() - began
        to_write = n_rows > 0  # else they were deleted since the claim
        again = [i for i, claim in enumerate(claims) if claim.scored]
        if again:  # another predictor may have done it between our search and our lock
            seen = self._seen(connection, tables, [keys[i] for i in again])
            to_write[again] &= [
                not any(n >= n_rows[i] and last in (None, read.newest[i]) for n, last in seen.get(keys[i], []))
                for i in again
            ]
        written = np.flatnonzero(to_write)
        place_of = np.full(len(keys), -1)  # no row names the visit: the values that are appended
        place_of[own] = visit
        j = place_of[written]
        as_of, newest = (np.append(times, NO_TIME)[j] for times in (moments, assessed.newest))
        hours = np.where(newest == NO_TIME, np.nan, (as_of - newest) / MICROSECONDS_PER_HOUR)
        reasons = np.append(assessed.reason, NOTHING_USABLE)[j].tolist()
        shared = {
            "model_version": model.pipeline.model_version,
            "scored_at": datetime.fromtimestamp(now, UTC).replace(tzinfo=None),
        }
        columns = {
            "client": [keys[i][0] for i in written],
            "visit_id": [keys[i][1] for i in written],
            "sepsis_score": [_or_none(p) for p in np.append(assessed.probability, np.nan)[j].tolist()],
            "risk_level": np.append(assessed.level, "UNKNOWN")[j].tolist(),
            **{name: [value] * len(written) for name, value in shared.items()},
            "observations": n_rows[written].tolist(),
            "newest_observation": [read.newest[i] for i in written],
            "reason": reasons,
            "as_of": as_of.astype("datetime64[us]").astype(object).tolist(),
            "hours_since_newest": [_or_none(round(age, 3)) for age in hours.tolist()],
        }
        return Batch(
            {name: values for name, values in columns.items() if name in tables.predictions},
            Counter(reason for reason in reasons if reason is not None),
            Counter(observations.set_aside),
            Counter(model.pipeline.unused_codes(observations)),
            lambda: model.record(observations, visit, moments, assessed, seconds),
        )

    def _seen(self, connection: sa.Connection, tables: Tables, keys: list[Key]) -> dict[Key, list[tuple[Any, Any]]]:
        """(number of observations, date of the newest) behind each score that these visits have."""
        newest = tables.predictions.get("newest_observation", sa.null())
        query = rows_of(connection, tables, tables.predictions, keys, tables.predictions["observations"], newest)
        seen: dict[Key, list[tuple[Any, Any]]] = {}
        for client, visit, *state in connection.execute(query):
            seen.setdefault((client, visit), []).append(tuple(state))
        return seen

    def _write(self, connection: sa.Connection, tables: Tables, rows: dict[str, list[Any]], known: set[Key]) -> None:
        """Predictions and visits, two or three statements whatever their number."""
        columns, visits = tables.predictions, tables.visits
        keys = list(zip(rows["client"], rows["visit_id"], rows["observations"], strict=True))
        if not keys:
            return
        predictions = columns["client"].table
        of_version = columns["model_version"] == self.pipeline.model_version
        # a visit that was made pending again by hand has this very prediction already
        old = [key for key in keys if key[:2] in known]
        if old:
            same = among(connection, columns, old, "observations")
            connection.execute(sa.delete(predictions).where(of_version, same))
        own = [columns[name] for name in rows]
        if connection.dialect.name == "postgresql":
            insert = sa.insert(predictions).from_select(own, from_json(own, rows)).returning(predictions)
            written = insert.cte("written")
            new: Mapping[str, Any] = {name: written.c[column.key] for name, column in columns.items()}
            of_batch = [same_visit(new, visits)]
        else:
            statement, new = sa.insert(predictions), columns
            if connection.dialect.insert_executemany_returning:  # then SQLAlchemy makes one statement of many rows
                statement = statement.returning(columns["client"])
            names = [column.key for column in own]
            connection.execute(
                statement, [dict(zip(names, row, strict=True)) for row in zip(*rows.values(), strict=True)]
            )
            of_batch = [same_visit(new, visits), of_version, among(connection, columns, keys, "observations")]
        state = {visits[name]: new[name] for name in ("sepsis_score", "risk_level", "scored_at")}
        changed = connection.execute(sa.update(visits["client"].table).where(*of_batch).values(state)).rowcount
        if changed != len(keys):
            raise DatabaseError(
                f"{len(keys)} visits were scored, but {changed} rows of {visits['client'].table.name!r} match them; "
                "(client, visit_id) must be its key. Nothing of this batch was written"
            )

    def watch(
        self, seconds: float, stop: threading.Event, rescore: bool = False, told: Callable[[RunResult], Any] = print
    ) -> None:
        """Scores what is pending every so many seconds until `stop`; takes up a new config or model in between."""

        def work() -> None:
            self.deployed.renew()
            told(self.process_pending_visits(rescore))

        run_every(seconds, work, stop)


def _or_none(number: float) -> float | None:
    return None if number != number else number


def skips_locked(connection: sa.Connection) -> bool:
    """Whether the database knows SKIP LOCKED; without it predictors wait for one another."""
    version = connection.dialect.server_version_info or ()
    if connection.dialect.name in MYSQL:
        return version >= ((10, 6) if getattr(connection.dialect, "is_mariadb", False) else (8, 0))
    return True
