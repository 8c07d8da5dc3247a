"""Claims pending visits, scores them, writes the scores back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

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
from serving.db.tables import DEFAULT_MAPPING, NEWEST, Tables, make_tables
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
        scored = [row for row in batch.rows if row["sepsis_score"] is not None]
        self.batches += 1
        self.scored += len(scored)
        self.observations += sum(row["observations"] for row in scored)
        self.risk_levels.update(row["risk_level"] for row in scored)
        self.rescored += sum((row["client"], row["visit_id"]) in scored_before for row in scored)
        self.unknown.update(batch.unknown)
        self.set_aside.update(batch.set_aside)
        self.unused_codes.update(batch.unused_codes)


Key = tuple[Any, Any]  # (client, visit_id) as the database gives them


class Claim(NamedTuple):
    """A visit to score, whether it has a score already, and whether this model ever assessed it."""

    client: Any
    visit_id: Any
    scored: bool
    known: bool


class Batch(NamedTuple):
    """The result of one batch of visits: rows for the predictions table, visits without a score by reason, rows set
    aside and unused codes; `record` writes it to the prediction log."""

    rows: list[dict[str, Any]]
    unknown: Counter[str]
    set_aside: Counter[str]
    unused_codes: Counter[str]
    record: Callable[[], Any]


_NONE = NO_TIME, NO_TIME


def _when(micros: int) -> datetime | None:
    return (
        None
        if micros == NO_TIME
        else datetime.fromtimestamp(int(micros) // 1_000_000, UTC).replace(
            tzinfo=None, microsecond=int(micros) % 1_000_000
        )
    )


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
        alone = ~sa.exists().where(_same_visit(tables.observations, visits))
        counts = sa.func.count(sa.case((alone, 1))), sa.func.count()
        query = sa.select(*counts).where(_pending(visits)).select_from(visits["client"].table)
        with self.reading.connect() as connection:
            without, pending = connection.execute(query).one()
        return without, pending - without

    def _pass(self, tables: Tables, result: RunResult, rescore: bool, advance: Callable[[int], Any]) -> bool:
        """Goes once through all visits in the order of their keys; says whether another pass may find more."""
        after: Claim | None = None
        before = result.scored
        while True:
            with (self.reading if result.dry_run else self.engine).begin() as connection:
                claims = self._claim(connection, tables, after, rescore, lock=not result.dry_run)
                if not claims:
                    break
                after = claims[-1]
                batch = self._score(connection, tables, claims)
                if batch.rows and not result.dry_run:
                    self._write(connection, tables, batch.rows, {claim[:2] for claim in claims if claim.known})
            # counted and logged only when it is committed
            result.add(batch, {claim[:2] for claim in claims if claim.scored})
            if not result.dry_run:
                batch.record()
            advance(len(claims))
        return result.scored > before and not result.dry_run and not rescore

    def _claim(
        self, connection: sa.Connection, tables: Tables, after: Claim | None, rescore: bool, lock: bool
    ) -> list[Claim]:
        """The next pending visits that have observations, locked until the transaction ends."""
        visits, observations = tables.visits, tables.observations
        own = _same_visit(observations, visits)
        predictions, table = tables.predictions, visits["client"].table
        of_version = predictions["model_version"] == self.pipeline.model_version
        count = sa.select(sa.func.count()).where(own).correlate(table).scalar_subquery()
        up_to_date = predictions["observations"] >= count
        if "newest_observation" in predictions:
            newest = sa.select(_newest(observations)).where(own).correlate(table).scalar_subquery()
            known_newest = predictions["newest_observation"]
            up_to_date = sa.and_(up_to_date, sa.or_(known_newest.is_(None), known_newest == newest))

        def without(*more: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
            return ~sa.exists().where(_same_visit(predictions, visits), up_to_date, *more)

        is_unknown = sa.and_(visits["sepsis_score"].is_(None), visits["risk_level"] == "UNKNOWN")
        due = [_pending(visits), sa.and_(is_unknown, without(of_version))]
        if rescore:
            due.append(sa.and_(visits["sepsis_score"].is_not(None), without()))
        key = visits["client"], visits["visit_id"]
        known = sa.exists().where(_same_visit(predictions, visits), of_version)
        query = sa.select(*map(_raw, key), visits["sepsis_score"].is_not(None), known)
        query = query.where(sa.exists().where(own), sa.or_(*due)).order_by(*key)
        if after is not None:
            query = query.where(sa.tuple_(*key) > (after.client, after.visit_id))
        if lock:  # SQLite ignores it: there BEGIN IMMEDIATE has locked all
            query = query.with_for_update(skip_locked=skips_locked(connection))
        return [Claim(*row) for row in connection.execute(query.limit(self.batch_size))]

    def _score(self, connection: sa.Connection, tables: Tables, claims: list[Claim]) -> Batch:
        """What the claimed visits give, with rows for the predictions table."""
        keys = [claim[:2] for claim in claims]
        newest_date = self._newest(connection, tables, keys)  # first: what comes in between is found next time
        place, table = self._read(connection, tables, keys)
        rows = np.bincount(place, minlength=len(keys))
        model, now = self.deployed.current, self.clock()
        observations = model.read(table, now if self.as_of == NOW else None)
        own = observations.visit_id.astype(np.int64)
        texts = np.array([[as_text(part) for part in keys[i]] for i in own], dtype=object).reshape(-1, 2)
        observations = replace(observations, client_text=texts[:, 0], visit_text=texts[:, 1])
        visit, moments = np.arange(len(own)), moments_of(observations, self.as_of, now)
        began = time.perf_counter()
        assessed = model.score(observations, visit, moments, record=False)
        seconds = time.perf_counter() - began
        place_of = np.full(len(keys), -1)
        place_of[own] = visit
        to_write = rows > 0  # else they were deleted since the claim
        again = [i for i, claim in enumerate(claims) if claim.scored]
        if again:  # another predictor may have done it between our search and our lock
            seen = self._seen(connection, tables, [keys[i] for i in again])
            to_write[again] &= [
                not any(n >= rows[i] and last in (None, newest_date.get(keys[i])) for n, last in seen.get(keys[i], []))
                for i in again
            ]
        written = []
        for i in np.flatnonzero(to_write).tolist():
            j = place_of[i]  # -1: no row names it
            p, as_of, newest = (assessed.probability[j], moments[j], assessed.newest[j]) if j >= 0 else (np.nan, *_NONE)
            row = {
                "client": keys[i][0],
                "visit_id": keys[i][1],
                "sepsis_score": None if np.isnan(p) else float(p),
                "risk_level": str(assessed.level[j]) if j >= 0 else "UNKNOWN",
                "model_version": model.pipeline.model_version,
                "scored_at": datetime.fromtimestamp(now, UTC).replace(tzinfo=None),
                "observations": int(rows[i]),
                "newest_observation": newest_date.get(keys[i]),
                "reason": assessed.reason[j] if j >= 0 else NOTHING_USABLE,
                "as_of": _when(as_of),
                "hours_since_newest": None
                if newest == NO_TIME
                else round(float(as_of - newest) / MICROSECONDS_PER_HOUR, 3),
            }
            written.append({name: value for name, value in row.items() if name in tables.predictions})
        return Batch(
            written,
            Counter(assessed.reason[j] if j >= 0 else NOTHING_USABLE for j in place_of[to_write])
            - Counter({None: len(keys)}),
            Counter(observations.set_aside),
            Counter(model.pipeline.unused_codes(observations)),
            lambda: model.record(observations, visit, moments, assessed, seconds),
        )

    def _read(self, connection: sa.Connection, tables: Tables, keys: list[Key]) -> tuple[np.ndarray, pd.DataFrame]:
        """(place in `keys` of each row's visit, the visits' observations as the driver gives them): dates and numbers
        are the reader's business.

        The rows' visits are told by these places, not by the keys of the observations: what is one key to the
        database, as A and a, 7 and 7.0, may be two to Python, and the other way round.
        """
        columns = {name: column for name, column in tables.observations.items() if name not in ("client", "visit_id")}
        given = [_raw(_as_iso(connection, column)) for column in columns.values()]
        # the driver's own rows: SQLAlchemy's, and a tuple a column, took longer than all the rest
        cursor = connection.execute(self._of(connection, tables, tables.observations, keys, *given)).cursor
        driver = connection.dialect.loaded_dbapi
        try:
            rows = cursor.fetchall()
        except driver.Error as error:
            raise sa.exc.DBAPIError.instance(None, None, error, driver.Error, dialect=connection.dialect) from None
        table = pd.DataFrame(rows, columns=["client", "visit_id", *columns])
        client, clients = pd.factorize(table["client"])
        visit, visits = pd.factorize(table["visit_id"])
        pair, pairs = pd.factorize(client * len(visits) + visit)
        index = {key: i for i, key in enumerate(keys)}
        found = [index[clients[i // len(visits)], visits[i % len(visits)]] for i in pairs.tolist()]
        place = np.array(found, dtype=np.int64)[pair]
        # blank keys name no visit
        named = np.array([[bool(as_text(part)) for part in key] for key in keys])
        table["visit_id"] = np.where(named[place, 1], place, np.nan)
        table["client"] = np.where(named[place, 0], 1.0, np.nan)
        return place, table

    def _newest(self, connection: sa.Connection, tables: Tables, keys: list[Key]) -> dict[Key, str]:
        """The date of each visit's newest observation, as the database writes it."""
        if "newest_observation" not in tables.predictions:
            return {}
        query = self._of(connection, tables, tables.observations, keys, _newest(tables.observations))
        query = query.group_by(tables.visits["client"], tables.visits["visit_id"])
        return {(client, visit): newest for client, visit, newest in connection.execute(query)}

    def _seen(self, connection: sa.Connection, tables: Tables, keys: list[Key]) -> dict[Key, list[tuple[Any, Any]]]:
        """(number of observations, date of the newest) behind each score that these visits have."""
        newest = tables.predictions.get("newest_observation", sa.null())
        query = self._of(connection, tables, tables.predictions, keys, tables.predictions["observations"], newest)
        seen: dict[Key, list[tuple[Any, Any]]] = {}
        for client, visit, *state in connection.execute(query):
            seen.setdefault((client, visit), []).append(tuple(state))
        return seen

    @staticmethod
    def _of(
        connection: sa.Connection,
        tables: Tables,
        other: Mapping[str, sa.Column[Any]],
        keys: list[Key],
        *columns: sa.ColumnElement[Any],
    ) -> sa.Select[Any]:
        """Some columns of another table's rows that belong to these visits, behind the visits' own keys."""
        visits = tables.visits
        return (
            sa.select(_raw(visits["client"]), _raw(visits["visit_id"]), *columns)
            .select_from(visits["client"].table.join(other["client"].table, _same_visit(other, visits)))
            .where(_among(connection, visits, keys))
        )

    def _write(self, connection: sa.Connection, tables: Tables, scored: list[dict[str, Any]], known: set[Key]) -> None:
        """Predictions and visits, two or three statements whatever their number."""
        columns, visits = tables.predictions, tables.visits
        predictions = columns["client"].table
        of_version = columns["model_version"] == self.pipeline.model_version
        keys = [(row["client"], row["visit_id"], row["observations"]) for row in scored]
        # a visit that was made pending again by hand has this very prediction already
        old = [key for key in keys if key[:2] in known]
        if old:
            same = _among(connection, columns, old, "observations")
            connection.execute(sa.delete(predictions).where(of_version, same))
        if connection.dialect.name == "postgresql":
            own = [columns[name] for name in scored[0]]
            rows = _unnested(own, [tuple(row.values()) for row in scored])
            connection.execute(sa.insert(predictions).from_select(own, rows))
        else:
            insert = sa.insert(predictions)
            if connection.dialect.insert_executemany_returning:  # then SQLAlchemy makes one statement of many rows
                insert = insert.returning(columns["client"])
            connection.execute(insert, [{columns[name].key: value for name, value in row.items()} for row in scored])
        changed = connection.execute(
            sa.update(visits["client"].table)
            .where(_same_visit(columns, visits), of_version, _among(connection, columns, keys, "observations"))
            .values(
                {
                    visits["sepsis_score"]: columns["sepsis_score"],
                    visits["risk_level"]: columns["risk_level"],
                    visits["scored_at"]: scored[0]["scored_at"],
                }
            )
        ).rowcount
        if changed != len(scored):
            raise DatabaseError(
                f"{len(scored)} visits were scored, but {changed} rows of {visits['client'].table.name!r} match them; "
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


def _same_visit(a: Mapping[str, sa.Column[Any]], b: Mapping[str, sa.Column[Any]]) -> sa.ColumnElement[bool]:
    return sa.and_(a["client"] == b["client"], a["visit_id"] == b["visit_id"])


def _raw(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """The column as the driver gives it."""
    return sa.type_coerce(column, sa.types.NullType())


def _as_iso(connection: sa.Connection, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """A date as text where the driver would stumble over one: PostgreSQL has infinity, and years that Python lacks."""
    if connection.dialect.name == "postgresql" and isinstance(column.type, sa.DateTime | sa.Date):
        return sa.cast(column, sa.Text)
    return column


def _newest(observations: Mapping[str, sa.Column[Any]]) -> sa.ColumnElement[Any]:
    return sa.cast(sa.func.max(observations["observation_date"]), NEWEST)


def _among(
    connection: sa.Connection, columns: Mapping[str, sa.Column[Any]], keys: Sequence[tuple[Any, ...]], *more: str
) -> sa.ColumnElement[bool]:
    """(client, visit_id, `more`...) is one of `keys`."""
    own = [columns[name] for name in ("client", "visit_id", *more)]
    return sa.tuple_(*own).in_(_unnested(own, keys) if connection.dialect.name == "postgresql" else keys)


def _unnested(columns: Sequence[sa.Column[Any]], rows: Sequence[tuple[Any, ...]]) -> sa.Select[Any]:
    """The rows as a query with one parameter a column: PostgreSQL's driver is slow with thousands of them."""
    parts = zip(columns, zip(*rows, strict=True), strict=True)
    return sa.select(*(sa.func.unnest(sa.literal(list(part), postgresql.ARRAY(column.type))) for column, part in parts))


def skips_locked(connection: sa.Connection) -> bool:
    """Whether the database knows SKIP LOCKED; without it predictors wait for one another."""
    version = connection.dialect.server_version_info or ()
    if connection.dialect.name in MYSQL:
        return version >= ((10, 6) if getattr(connection.dialect, "is_mariadb", False) else (8, 0))
    return True
