"""Scores pending visits of a database: several predictors on several hosts share the work, none doubles or loses any.

Tables (another hospital's names can be mapped, see `read_mapping`):

==========================  ==========================================================================================
``patient_observations``    ``visit_id, client, observation_date, observation_type_code, observation_value,
                            reference_range_min, reference_range_max``; filled by the hospital
``visits``                  ``visit_id, client, sepsis_score, risk_level, scored_at``; the hospital adds visits, this
                            script fills the other three. Pending is a visit without ``sepsis_score``
``sepsis_predictions``      ``visit_id, client, sepsis_score, risk_level, model_version, scored_at, observations,
                            newest_observation``: every score ever given, with the number of observation rows that it
                            was made from and the newest one's date as the database writes it. A later score by the
                            same model from as many rows takes the place of the earlier one
==========================  ==========================================================================================

A batch of visits is one transaction: claim (``FOR UPDATE SKIP LOCKED`` where the database has it), read, score,
insert, update, commit. A predictor killed at any moment leaves nothing half-done: its transaction is undone by the
database, and its visits are pending again. All times are UTC.

    predictor = DatabasePredictor(db_url, "models/best_model_config.json", "models/best_model.pkl")
    result = predictor.process_pending_visits()
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from command_line import COULD_NOT_START, DONE, SOME_FAILED, log, make_parser, number, progress, run, run_every
from feature_pipeline import (
    COLUMNS,
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    RANGE_COLUMNS,
    SET_ASIDE_REASONS,
    BadObservations,
    FeaturePipelineError,
    Observations,
    ProductionPipeline,
    as_text,
    listed,
    resolve_snapshots,
)
from prediction_log import OFF, PredictionLog, url_of

DEFAULT_URL = "sqlite:///data/sepsis.db"
URL_VARIABLE = "SEPSIS_DB_URL"
BATCH_SIZE, MOST_VISITS = 500, 10_000  # in a transaction; SQLite takes 32,766 parameters a statement
MIGRATIONS = Path(__file__).with_name("migrations")


class DatabaseError(FeaturePipelineError):
    """The database cannot be used: wrong URL, no connection, missing table. The text holds no password and no data."""

    code = "database_error"


class BatchUndone(DatabaseError):
    """The database failed or went away in mid-work; finished batches are in it, the one under work is undone."""

    code = "batch_undone"


# -------------------------------------------------------------------------------------------------- tables

DEFAULT_MAPPING: dict[str, dict[str, Any]] = {
    "observations": {"table": "patient_observations", "columns": {name: name for name in COLUMNS}},
    "visits": {
        "table": "visits",
        "columns": {name: name for name in ("visit_id", "client", "sepsis_score", "risk_level", "scored_at")},
    },
    "predictions": {
        "table": "sepsis_predictions",
        "columns": {
            name: name
            for name in (
                "visit_id",
                "client",
                "sepsis_score",
                "risk_level",
                "model_version",
                "scored_at",
                "observations",
                "newest_observation",
            )
        },
    },
}

OPTIONAL_COLUMNS = (*RANGE_COLUMNS, "newest_observation")  # without the last --rescore goes by numbers of rows alone

_WHEN = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_NEWEST = sa.String(64)
_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers only INTEGER keys by itself


def schema(
    mapping: Mapping[str, Mapping[str, Any]] = DEFAULT_MAPPING, foreign_visits: sa.Table | None = None
) -> sa.MetaData:
    """The three tables as this project makes them, under the names of `mapping`.

    Beside a visits table that the hospital made, keys have its types, and there is no foreign key to it.
    """
    types = {"client": sa.String(64), "visit_id": sa.String(64)}
    if foreign_visits is not None:
        types = {name: foreign_visits.c[mapping["visits"]["columns"][name]].type for name in types}
    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_visit",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "uq": "uq_%(table_name)s_score",
        }
    )

    def named(which: str) -> tuple[str, str | None, Mapping[str, str]]:
        space, _, table = mapping[which]["table"].rpartition(".")
        return table, space or None, mapping[which]["columns"]

    table, space, c = named("observations")
    sa.Table(
        table,
        metadata,
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column(c["visit_id"], types["visit_id"], nullable=False),
        sa.Column(c["client"], types["client"], nullable=False),
        sa.Column(c["observation_date"], _WHEN, nullable=False),
        sa.Column(c["observation_type_code"], sa.String(64), nullable=False),
        sa.Column(c["observation_value"], sa.Double()),
        *(sa.Column(c[name], sa.Double()) for name in RANGE_COLUMNS if name in c),
        sa.Index(f"ix_{table}_visit", c["client"], c["visit_id"]),
        schema=space,
    )
    table, space, c = named("visits")
    visits = sa.Table(
        table,
        metadata,
        sa.Column(c["client"], sa.String(64), primary_key=True),
        sa.Column(c["visit_id"], sa.String(64), primary_key=True),
        sa.Column(c["sepsis_score"], sa.Double()),
        sa.Column(c["risk_level"], sa.String(16)),
        sa.Column(c["scored_at"], _WHEN),
        sa.CheckConstraint(sa.column(c["sepsis_score"]).between(0, 1), name="score"),
        sa.CheckConstraint(sa.column(c["risk_level"]).in_(["low", "medium", "high"]), name="level"),
        schema=space,
    )
    pending = visits.c[c["sepsis_score"]].is_(None)
    sa.Index(
        f"ix_{table}_pending",
        visits.c[c["client"]],
        visits.c[c["visit_id"]],
        postgresql_where=pending,
        sqlite_where=pending,
    )
    table, space, c = named("predictions")
    key = [c["client"], c["visit_id"]]
    visit_key = [visits.c[mapping["visits"]["columns"][name]] for name in ("client", "visit_id")]
    sa.Table(
        table,
        metadata,
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column(c["visit_id"], types["visit_id"], nullable=False),
        sa.Column(c["client"], types["client"], nullable=False),
        sa.Column(c["sepsis_score"], sa.Double(), nullable=False),
        sa.Column(c["risk_level"], sa.String(16), nullable=False),
        sa.Column(c["model_version"], sa.String(64), nullable=False),
        sa.Column(c["scored_at"], _WHEN, nullable=False),
        sa.Column(c["observations"], sa.Integer(), nullable=False),
        *(sa.Column(c[name], _NEWEST) for name in ("newest_observation",) if name in c),
        *([sa.ForeignKeyConstraint(key, visit_key)] if foreign_visits is None else []),
        sa.UniqueConstraint(*key, c["model_version"], c["observations"]),
        sa.CheckConstraint(sa.column(c["sepsis_score"]).between(0, 1), name="score"),
        sa.CheckConstraint(sa.column(c["risk_level"]).in_(["low", "medium", "high"]), name="level"),
        sa.CheckConstraint(sa.column(c["observations"]) > 0, name="observations"),
        schema=space,
    )
    return metadata


def read_mapping(path: str | Path | None) -> dict[str, dict[str, Any]]:
    """Other names for tables and columns, from a JSON file; what it leaves out keeps its own name.

    ``{"observations": {"table": "lab.results", "columns": {"visit_id": "encounter", "client": "patient"}}}``; the
    parts are ``observations``, ``visits`` and ``predictions``. Of `OPTIONAL_COLUMNS` null says that there is none.
    Raises `DatabaseError`.
    """
    mapping = {part: {"table": d["table"], "columns": dict(d["columns"])} for part, d in DEFAULT_MAPPING.items()}
    if path is None:
        return mapping
    where = f"table mapping {str(path)!r}"
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatabaseError(f"{where} cannot be read as JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(given, dict) or not all(isinstance(part, dict) for part in given.values()):
        raise DatabaseError(f"{where} must hold an object for each of {listed(mapping)}")
    for part, names in given.items():
        columns = names.get("columns", {})
        if part not in mapping or not isinstance(columns, dict) or set(names) - {"table", "columns"}:
            raise DatabaseError(f"{where}: {part!r} must be one of {listed(mapping)} and hold 'table' and 'columns'")
        unknown = set(columns) - set(mapping[part]["columns"])
        if unknown:
            known = listed(mapping[part]["columns"], 10)
            raise DatabaseError(f"{where}: {part!r} has no column {listed(sorted(unknown))}; it has {known}")
        mapping[part]["table"] = names.get("table", mapping[part]["table"])
        mapping[part]["columns"] |= columns
        for name in [name for name, own in columns.items() if own is None]:
            if name not in OPTIONAL_COLUMNS:
                raise DatabaseError(f"{where}: {part!r} needs a column for {name!r}")
            del mapping[part]["columns"][name]
        own_names = [mapping[part]["table"], *mapping[part]["columns"].values()]
        if not all(isinstance(own, str) and own.strip() for own in own_names):
            raise DatabaseError(f"{where}: the names of {part!r} must be texts, not empty")
        _all_differ(own_names[1:], f"{where}: columns of {part!r}")
    _all_differ([names["table"] for names in mapping.values()], f"{where}: tables")
    return mapping


def _all_differ(names: Sequence[str], what: str) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DatabaseError(f"{what} must have different names; {listed(twice)} stands twice")


class Tables:
    """The tables as the database has them; ``tables.visits["client"]`` is a column under the project's name.

    Raises `DatabaseError` that names what is missing.
    """

    def __init__(self, connection: sa.Connection, mapping: Mapping[str, Mapping[str, Any]]):
        self.observations = self._columns(connection, **mapping["observations"])
        self.visits = self._columns(connection, **mapping["visits"])
        self.predictions = self._columns(connection, **mapping["predictions"])

    @staticmethod
    def _columns(connection: sa.Connection, table: str, columns: Mapping[str, str]) -> dict[str, sa.Column[Any]]:
        space, _, name = table.rpartition(".")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sa.exc.SAWarning)  # of types and constraints that are not ours
                # without its links: they may lead to the hospital's whole schema
                found = sa.Table(name, sa.MetaData(), autoload_with=connection, schema=space or None, resolve_fks=False)
        except sa.exc.NoSuchTableError:
            raise DatabaseError(
                f"the database has no table {table!r}; --init-db makes the tables, --tables maps other names"
            ) from None
        missing = [own for name, own in columns.items() if own not in found.c and name not in OPTIONAL_COLUMNS]
        if missing:
            raise DatabaseError(
                f"table {table!r} has no column {listed(missing)}; it has {listed(found.c.keys(), 20)}; "
                "--tables maps other names"
            )
        return {name: found.c[own] for name, own in columns.items() if own in found.c}


def make_tables(engine: sa.Engine, mapping: Mapping[str, Mapping[str, Any]] = DEFAULT_MAPPING) -> None:
    """Makes the tables that are missing, or brings older ones up to date.

    The project's own tables go through the migrations of Alembic; for mapped names the missing tables are made as they
    are today.
    """
    if engine.dialect.name == "sqlite" and engine.url.database:
        Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
    with in_words(engine.url), engine.begin() as connection:
        if mapping != DEFAULT_MAPPING:
            visits = schema(mapping).tables[mapping["visits"]["table"]]
            if sa.inspect(connection).has_table(visits.name, visits.schema):
                visits = sa.Table(visits.name, sa.MetaData(), autoload_with=connection, schema=visits.schema)
                metadata = schema(mapping, visits)
            else:
                metadata = schema(mapping)
            for table in metadata.sorted_tables:
                if not sa.inspect(connection).has_table(table.name, table.schema):
                    table.create(connection)
            return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


# ---------------------------------------------------------------------------------------------- connection


def connect(url: str | sa.URL) -> sa.Engine:
    """An engine for `url`: UTC, no parameters in errors, READ COMMITTED so that a claimed visit is read as it is now.

    Raises `DatabaseError`.
    """
    try:
        url = sa.make_url(url)
        options: dict[str, Any] = {"hide_parameters": True, "pool_pre_ping": True}
        if "@" in (url.host or ""):  # the rest of a password, which no message may show
            raise ValueError
        if url.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": 60}
        else:
            options["isolation_level"] = "READ COMMITTED"
            url = url if "connect_timeout" in url.query else url.update_query_dict({"connect_timeout": "10"})
        engine = sa.create_engine(url, **options)
    except (sa.exc.ArgumentError, ValueError):
        raise DatabaseError(
            "the database URL cannot be read; expected dialect+driver://user:password@host:port/name with special "
            f"characters of the password as %40 and the like, or {DEFAULT_URL}"
        ) from None
    except (sa.exc.NoSuchModuleError, ImportError) as error:
        raise DatabaseError(
            f"no driver for {safe_url(url)}: {' '.join(str(error).split())}; see requirements-database.txt"
        ) from None
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def manual(connection, _):
            connection.isolation_level = None  # the driver's own BEGIN comes too late to claim anything
            connection.execute("PRAGMA foreign_keys = ON")

        @sa.event.listens_for(engine, "begin")
        def begin(connection):
            # one predictor at a time: SQLite locks no rows; who only reads waits for nobody
            only_reads = connection.get_execution_options().get("only_reads")
            connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

    if engine.dialect.name == "postgresql":

        @sa.event.listens_for(engine, "connect")
        def iso_in_utc(connection, _):
            with connection.cursor() as cursor:
                cursor.execute("SET TIME ZONE 'UTC'")
                cursor.execute("SET DateStyle = 'ISO'")
            connection.commit()

    return engine


def safe_url(url: str | sa.URL) -> str:
    """The URL for people: password and options left out."""
    return sa.make_url(url).set(query={}).render_as_string(hide_password=True)


@contextmanager
def in_words(url: sa.URL, raised: type[DatabaseError] = DatabaseError) -> Iterator[None]:
    """Turns what the driver raises into one line without password, statement or data."""
    try:
        yield
    except sa.exc.TimeoutError:
        raise raised(f"{safe_url(url)}: no connection free in time") from None
    except sa.exc.DBAPIError as error:
        raise raised(f"{safe_url(url)}: {_driver_words(error, url)}") from None
    except sa.exc.IdentifierError as error:
        raise raised(f"{safe_url(url)}: {error}") from None


# What speaks of connection, rights, names, room or shutdown is told; other texts may quote data, as a trigger's may.
_TOLD_STATES = ("08", "28", "3D", "3F", "42", "53", "57")  # classes of SQLSTATE
_TOLD_BY_MYSQL = {1040, 1044, 1045, 1049, 1054, 1142, 1143, 1146, *range(2000, 3000)}  # the last are the client's own


def _driver_words(error: sa.exc.DBAPIError, url: sa.URL) -> str:
    original = error.orig
    kind, state = type(original).__name__, getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    first = original.args[0] if original.args else None
    if state is None and isinstance(first, int):  # drivers of MySQL and MariaDB
        state, tells = first, first in _TOLD_BY_MYSQL
    elif state is None:  # no connection; SQLite, whose texts quote data only where they have no code of their own
        tells = url.get_backend_name() != "sqlite" or hasattr(original, "sqlite_errorcode")
    else:
        tells = state[:2] in _TOLD_STATES
    name = f"{kind} {state}" if state else kind
    told = sa.exc.OperationalError | sa.exc.ProgrammingError | sa.exc.InterfaceError
    if not (tells and isinstance(error, told)):
        return name
    text = " ".join(str(original).split("\n")[0].split())[:300]
    hidden = [url.password or "", *(str(value) for key, value in url.query.items() if "pass" in key)]
    for secret in filter(None, hidden):
        for form in (secret, quote(secret), quote_plus(secret)):
            text = text.replace(form, "***")
    return f"{name}: {text}"


# --------------------------------------------------------------------------------------------- the predictor


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
        levels = ", ".join(f"{self.risk_levels[level]:,} {level}" for level in ("high", "medium", "low"))
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
        _check_monitor(monitor, self.engine.url)
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
            query = query.with_for_update(skip_locked=_skips_locked(connection))
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
        scores, features = self.pipeline.evaluate(observations, visit, moments)
        if record and self.monitor != OFF:
            seconds = time.perf_counter() - began
            texts = np.array([[as_text(part) for part in key] for key in keys], dtype=object)
            named = replace(observations, client_text=texts[:, 0], visit_text=texts[:, 1])
            self.prediction_log.record(named, visit, moments, scores, features, seconds)
        return scores

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
    return sa.cast(sa.func.max(observations["observation_date"]), _NEWEST)


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


def _skips_locked(connection: sa.Connection) -> bool:
    """Whether the database knows SKIP LOCKED; without it predictors wait for one another."""
    version = connection.dialect.server_version_info or ()
    if connection.dialect.name in ("mysql", "mariadb"):
        return version >= ((10, 6) if getattr(connection.dialect, "is_mariadb", False) else (8, 0))
    return True


def _check_monitor(monitor: str, url: sa.URL) -> None:
    """Raises `DatabaseError` where the prediction log would wait for the lock on the visits' own SQLite file."""
    if monitor == OFF or url.get_backend_name() != "sqlite":
        return
    try:
        log_url = sa.make_url(monitor)
    except sa.exc.ArgumentError:  # told where the log is opened
        return
    files = [one.database for one in (log_url, url) if one.get_backend_name() == "sqlite" and one.database]
    if len(files) == 2 and Path(files[0]).resolve() == Path(files[1]).resolve():
        raise DatabaseError(
            f"the prediction log cannot lie in the visits' own SQLite file {files[1]!r}; name another --monitor, or off"
        )


# ---------------------------------------------------------------------------------------------- the script


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "Scores the pending visits of a database.",
        f"python db_predictor.py --init-db\n  {URL_VARIABLE}=postgresql+psycopg://scorer:...@db.ward.example/sepsis "
        "python db_predictor.py --watch 60",
        "config",
        "model",
    )
    parser.add_argument(
        "--db-url", help=f"database; {URL_VARIABLE} of the environment, else {DEFAULT_URL}, if not given"
    )
    parser.add_argument("--tables", metavar="FILE", help="JSON file with other names of tables and columns")
    parser.add_argument("--init-db", action="store_true", help="make the tables, or bring them up to date, and stop")
    parser.add_argument(
        "--batch-size", type=number(int, 1, MOST_VISITS), default=BATCH_SIZE, help="visits in a transaction"
    )
    parser.add_argument("--rescore", action="store_true", help="also visits with new observations since their score")
    parser.add_argument("--watch", type=number(float, 1), metavar="SECONDS", help="look again so often, until stopped")
    parser.add_argument("--dry-run", action="store_true", help="compute, but claim and write nothing")
    parser.add_argument("--monitor", metavar="URL", help="database of the prediction log, off for none")
    return parser


def _work(arguments: argparse.Namespace) -> int:
    if arguments.dry_run and arguments.watch is not None:
        log.error("error: --dry-run and --watch do not go together")
        return COULD_NOT_START
    url = arguments.db_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    mapping = read_mapping(arguments.tables)
    if arguments.init_db:
        engine = connect(url)
        make_tables(engine, mapping)
        print(f"tables are ready in {safe_url(engine.url)}")
        engine.dispose()
        return DONE
    predictor = DatabasePredictor(
        url,
        arguments.config,
        arguments.model,
        tables=mapping,
        batch_size=arguments.batch_size,
        monitor=url_of(arguments.monitor),
    )

    def told(result: RunResult) -> None:
        if not arguments.quiet:
            print(result, flush=True)
        if result.set_aside:
            log.info(
                "set aside: %s", "; ".join(f"{n:,} rows: {SET_ASIDE_REASONS[r]}" for r, n in result.set_aside.items())
            )

    try:
        if arguments.watch is not None:
            predictor.watch(arguments.watch, threading.Event(), arguments.rescore, told)
            return DONE
        with progress([], predictor.count_pending(), arguments.quiet, unit=" visits") as bar:
            result = predictor.process_pending_visits(arguments.rescore, arguments.dry_run, bar.update)
        told(result)
        return DONE
    except BatchUndone as error:
        log.error("error: %s", error)
        return SOME_FAILED
    finally:
        predictor.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    parser.set_defaults(go_on="; the next run does the rest")
    return run(_work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
