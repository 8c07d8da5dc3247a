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

from common.command_line import log, run_every
from feature_pipeline import (
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    BadObservations,
    Observations,
    ProductionPipeline,
    as_text,
    resolve_snapshots,
)
from monitoring.log import OFF, PredictionLog
from serving.db.connection import DEFAULT_URL, BatchUndone, DatabaseError, check_monitor, connect, in_words
from serving.db.tables import DEFAULT_MAPPING, NEWEST, Tables, make_tables

BATCH_SIZE, MOST_VISITS = 500, 10_000  # in a transaction; SQLite takes 32,766 parameters a statement


@dataclass
class RunResult:
    """What a run did. `without_observations` visits are pending but have no observation yet, `unusable` ones have
    none that can be used; both stay pending."""

    model_version: str
    scored: int = 0
    rescored: int = 0
    batches: int = 0
    observations: int = 0
    risk_levels: Counter[str] = field(default_factory=Counter)
    set_aside: Counter[str] = field(default_factory=Counter)
    without_observations: int = 0
    unusable: int = 0
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
        if self.without_observations:
            text += f"; {self.without_observations:,} pending visits have no observations"
        if self.unusable:
            text += f"; {self.unusable:,} have none that can be used"
        return text


Key = tuple[Any, Any]  # (client, visit_id) as the database gives them


class Claim(NamedTuple):
    """A visit to score, whether it has a score already, and whether this model ever gave it one."""

    client: Any
    visit_id: Any
    scored: bool
    known: bool


class DatabasePredictor:
    """Scores the pending visits of a database with one config and model.

    `tables` maps other table and column names (see `read_mapping`). `clock` gives the time in seconds since 1970,
    `monitor` is the URL of the prediction log. Raises `DatabaseError`, `BadConfig`, `BadModel`.
    """

    def __init__(
        self,
        db_url: str | sa.URL = DEFAULT_URL,
        config_path: str | Path = DEFAULT_CONFIG,
        model_path: str | Path = DEFAULT_MODEL,
        *,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        batch_size: int = BATCH_SIZE,
        clock: Callable[[], float] = time.time,
        monitor: str = OFF,
    ):
        if not 1 <= batch_size <= MOST_VISITS:
            raise ValueError(f"batch_size is {batch_size}, expected 1 to {MOST_VISITS}")
        self.mapping = tables or DEFAULT_MAPPING
        self.batch_size, self.clock, self.monitor = batch_size, clock, monitor
        self.engine = connect(db_url)
        self.reading = self.engine.execution_options(only_reads=True)
        check_monitor(monitor, self.engine.url)
        self._use(ProductionPipeline(config_path, model_path))
        self._tables: Tables | None = None

    def _use(self, pipeline: ProductionPipeline) -> None:
        self.pipeline = pipeline
        self.prediction_log = PredictionLog.open(self.monitor, pipeline, "database")

    def load_if_changed(self) -> None:
        """Takes up what was deployed since. Raises `BadConfig`, `BadModel`."""
        if successor := self.pipeline.successor():
            self._use(successor)
            log.info("model %s is loaded", successor.model_version)

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
                unusable: set[Key] = set()
                while self._pass(tables, result, unusable, rescore, dry_run, advance):
                    pass  # for visits that others claimed and gave up meanwhile
                result.without_observations = self._count_without_observations(tables)
        except BatchUndone as error:
            raise BatchUndone(
                f"{error}; {result.scored:,} visits were scored before and are kept, run again to go on"
            ) from None
        result.seconds = time.monotonic() - started
        return result

    def count_pending(self) -> int:
        """Pending visits, with observations or without."""
        visits = self.tables.visits
        query = sa.select(sa.func.count()).where(visits["sepsis_score"].is_(None)).select_from(visits["client"].table)
        with in_words(self.engine.url), self.reading.connect() as connection:
            return connection.execute(query).scalar_one()

    def _count_without_observations(self, tables: Tables) -> int:
        visits = tables.visits
        alone = ~sa.exists().where(_same_visit(tables.observations, visits))
        query = sa.select(sa.func.count()).select_from(visits["client"].table)
        with self.reading.connect() as connection:
            return connection.execute(query.where(visits["sepsis_score"].is_(None), alone)).scalar_one()

    def _pass(
        self,
        tables: Tables,
        result: RunResult,
        unusable: set[Key],
        rescore: bool,
        dry_run: bool,
        advance: Callable[[int], Any],
    ) -> bool:
        """Goes once through all visits in the order of their keys; says whether another pass may find more."""
        after: Claim | None = None
        before = result.scored
        while True:
            with (self.reading if dry_run else self.engine).begin() as connection:
                claims = self._claim(connection, tables, after, rescore, lock=not dry_run)
                if not claims:
                    break
                after = claims[-1]
                claims = [claim for claim in claims if claim[:2] not in unusable]
                scored = self._score(connection, tables, claims, result, unusable)
                if scored and not dry_run:
                    self._write(connection, tables, scored, {claim[:2] for claim in claims if claim.known})
            # counted only when it is committed
            result.batches += 1
            result.scored += len(scored)
            result.observations += sum(row["observations"] for row in scored)
            result.risk_levels.update(row["risk_level"] for row in scored)
            rescored = {(claim.client, claim.visit_id) for claim in claims if claim.scored}
            result.rescored += sum((row["client"], row["visit_id"]) in rescored for row in scored)
            advance(len(claims))
        result.unusable = len(unusable)
        return result.scored > before and not dry_run and not rescore

    def _claim(
        self, connection: sa.Connection, tables: Tables, after: Claim | None, rescore: bool, lock: bool
    ) -> list[Claim]:
        """The next pending visits that have observations, locked until the transaction ends."""
        visits, observations = tables.visits, tables.observations
        own = _same_visit(observations, visits)
        pending = sa.and_(visits["sepsis_score"].is_(None), sa.exists().where(own))
        if rescore:
            predictions, table = tables.predictions, visits["client"].table
            count = sa.select(sa.func.count()).where(own).correlate(table).scalar_subquery()
            up_to_date = predictions["observations"] >= count
            if "newest_observation" in predictions:
                newest = sa.select(_newest(observations)).where(own).correlate(table).scalar_subquery()
                known_newest = predictions["newest_observation"]
                up_to_date = sa.and_(up_to_date, sa.or_(known_newest.is_(None), known_newest == newest))
            new = ~sa.exists().where(_same_visit(predictions, visits), up_to_date)
            pending = sa.or_(pending, sa.and_(visits["sepsis_score"].is_not(None), sa.exists().where(own), new))
        key = visits["client"], visits["visit_id"]
        of_version = tables.predictions["model_version"] == self.pipeline.model_version
        known = sa.exists().where(_same_visit(tables.predictions, visits), of_version)
        query = sa.select(*map(_raw, key), visits["sepsis_score"].is_not(None), known).where(pending).order_by(*key)
        if after is not None:
            query = query.where(sa.tuple_(*key) > (after.client, after.visit_id))
        if lock:  # SQLite ignores it: there BEGIN IMMEDIATE has locked all
            query = query.with_for_update(skip_locked=skips_locked(connection))
        return [Claim(*row) for row in connection.execute(query.limit(self.batch_size))]

    def _score(
        self, connection: sa.Connection, tables: Tables, claims: list[Claim], result: RunResult, unusable: set[Key]
    ) -> list[dict[str, Any]]:
        """Rows of the predictions table for the claimed visits that can be scored; adds the others to `unusable`."""
        if not claims:
            return []
        keys = [claim[:2] for claim in claims]
        newest = self._newest(connection, tables, keys)  # first: what comes in between is found next time
        place, table = self._read(connection, tables, keys)
        rows = np.bincount(place, minlength=len(keys))
        probability = np.full(len(keys), np.nan)
        try:
            observations = self.pipeline.reproducer.read(table)
        except BadObservations as error:  # no usable row, or the rows were deleted since the claim
            result.set_aside.update(error.set_aside)
        else:
            result.set_aside.update(observations.set_aside)
            own = observations.visit_id.astype(np.int64)
            probability[own] = self._evaluate(observations, [keys[i] for i in own], record=not result.dry_run)
        usable = ~np.isnan(probability)
        unusable.update(keys[i] for i in np.flatnonzero(~usable & (rows > 0)))
        again = [i for i, claim in enumerate(claims) if claim.scored and usable[i]]
        if again:  # another predictor may have done it between our search and our lock
            seen = self._seen(connection, tables, [keys[i] for i in again])
            usable[again] = [
                not any(n >= rows[i] and last in (None, newest.get(keys[i])) for n, last in seen.get(keys[i], []))
                for i in again
            ]
        levels = self.pipeline.risk_level(probability)
        moment = datetime.fromtimestamp(self.clock(), UTC).replace(tzinfo=None)
        return [
            {
                "client": keys[i][0],
                "visit_id": keys[i][1],
                "sepsis_score": float(probability[i]),
                "risk_level": str(levels[i]),
                "model_version": self.pipeline.model_version,
                "scored_at": moment,
                "observations": int(rows[i]),
                **({"newest_observation": newest.get(keys[i])} if "newest_observation" in tables.predictions else {}),
            }
            for i in np.flatnonzero(usable)
        ]

    def _evaluate(self, observations: Observations, keys: list[Key], record: bool) -> np.ndarray:
        """Probabilities of the visits, whose keys are `keys`; they go to the prediction log if `record`."""
        visit, moments, _ = resolve_snapshots(observations)
        began = time.perf_counter()
        found = self.pipeline.assess(observations, visit, moments)
        if record and self.monitor != OFF:
            seconds = time.perf_counter() - began
            texts = np.array([[as_text(part) for part in key] for key in keys], dtype=object)
            named = replace(observations, client_text=texts[:, 0], visit_text=texts[:, 1])
            self.prediction_log.record(named, visit, moments, found, seconds)
        return found.probability

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
        run_every(seconds, self, lambda: told(self.process_pending_visits(rescore)), stop)


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
    if connection.dialect.name in ("mysql", "mariadb"):
        return version >= ((10, 6) if getattr(connection.dialect, "is_mariadb", False) else (8, 0))
    return True
