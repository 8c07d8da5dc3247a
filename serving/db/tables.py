"""The tables of visits, observations and predictions, and how a hospital's own are named."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from feature_pipeline import (
    COLUMNS,
    RANGE_COLUMNS,
    RISK_LEVELS,
    UNIT_COLUMN,
    listed,
)
from serving.db.connection import MYSQL, DatabaseError, in_words

MIGRATIONS = Path(__file__).with_name("migrations")


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
                "reason",
                "as_of",
                "hours_since_newest",
            )
        },
    },
}


# without the newest observation --rescore goes by numbers of rows alone
OPTIONAL_COLUMNS = (*RANGE_COLUMNS, UNIT_COLUMN, "newest_observation", "reason", "as_of", "hours_since_newest")


_WHEN = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


NEWEST = sa.String(64)


_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers only INTEGER keys by itself


_DETAILS = {
    "newest_observation": NEWEST,
    "reason": sa.String(32),
    "as_of": _WHEN,
    "hours_since_newest": sa.Double(),
}


class Key(sa.types.TypeDecorator[str]):
    """A text that is equal to no other one: MySQL and MariaDB take A for a, and what is followed by blanks for what is
    not, unless the collation says otherwise."""

    impl = sa.String
    cache_ok = True

    def __init__(self, length: int | None = 64):
        super().__init__(length)

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[str]:
        length = self.impl.length
        if dialect.name not in MYSQL:
            return dialect.type_descriptor(sa.String(length))
        return dialect.type_descriptor(mysql.VARCHAR(length, charset="utf8mb4", collation=exact_collation(dialect)))


def like(foreign: sa.types.TypeEngine[Any], dialect: str) -> sa.types.TypeEngine[Any]:
    """The type of a key beside a foreign key of that type."""
    return Key(foreign.length or 64) if dialect in MYSQL and isinstance(foreign, sa.String) else foreign


def exact_collation(dialect: sa.Dialect) -> str:
    return "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"


def pending_index(client: str, visit_id: str, score: str, dialect: str) -> tuple[list[str], dict[str, Any]]:
    """Columns and options of the index that finds visits without a score, however many have one."""
    if dialect in MYSQL:  # they know no index of a part of the rows
        return [score, client, visit_id], {}
    pending = sa.column(score).is_(None)
    return [client, visit_id], {"postgresql_where": pending, "sqlite_where": pending}


def schema(
    mapping: Mapping[str, Mapping[str, Any]] = DEFAULT_MAPPING,
    foreign_visits: sa.Table | None = None,
    dialect: str = "sqlite",
) -> sa.MetaData:
    """The three tables as this project makes them in a database of the `dialect`, under the names of `mapping`.

    Beside a visits table that the hospital made, keys have its types, and there is no foreign key to it.
    """
    types: dict[str, Any] = {"client": Key(), "visit_id": Key()}
    if foreign_visits is not None:
        types = {name: like(foreign_visits.c[mapping["visits"]["columns"][name]].type, dialect) for name in types}
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
        *(sa.Column(c[name], sa.String(64)) for name in (UNIT_COLUMN,) if name in c),
        sa.Index(f"ix_{table}_visit", c["client"], c["visit_id"]),
        schema=space,
    )
    table, space, c = named("visits")
    visits = sa.Table(
        table,
        metadata,
        sa.Column(c["client"], Key(), primary_key=True),
        sa.Column(c["visit_id"], Key(), primary_key=True),
        sa.Column(c["sepsis_score"], sa.Double()),
        sa.Column(c["risk_level"], sa.String(16)),
        sa.Column(c["scored_at"], _WHEN),
        sa.CheckConstraint(sa.column(c["sepsis_score"]).between(0, 1), name="score"),
        sa.CheckConstraint(sa.column(c["risk_level"]).in_(RISK_LEVELS), name="level"),
        schema=space,
    )
    columns, options = pending_index(*(c[name] for name in ("client", "visit_id", "sepsis_score")), dialect)
    sa.Index(f"ix_{table}_pending", *(visits.c[name] for name in columns), **options)
    table, space, c = named("predictions")
    key = [c["client"], c["visit_id"]]
    visit_key = [visits.c[mapping["visits"]["columns"][name]] for name in ("client", "visit_id")]
    sa.Table(
        table,
        metadata,
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column(c["visit_id"], types["visit_id"], nullable=False),
        sa.Column(c["client"], types["client"], nullable=False),
        sa.Column(c["sepsis_score"], sa.Double()),  # empty where the risk is UNKNOWN
        sa.Column(c["risk_level"], sa.String(16), nullable=False),
        sa.Column(c["model_version"], sa.String(64), nullable=False),
        sa.Column(c["scored_at"], _WHEN, nullable=False),
        sa.Column(c["observations"], sa.Integer(), nullable=False),
        *(sa.Column(c[name], kind) for name, kind in _DETAILS.items() if name in c),
        *([sa.ForeignKeyConstraint(key, visit_key)] if foreign_visits is None else []),
        sa.UniqueConstraint(*key, c["model_version"], c["observations"]),
        sa.CheckConstraint(sa.column(c["sepsis_score"]).between(0, 1), name="score"),
        sa.CheckConstraint(sa.column(c["risk_level"]).in_(RISK_LEVELS), name="level"),
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
        if connection.dialect.name in MYSQL:
            _check_collations(connection, table, [columns[key] for key in ("client", "visit_id")])
        missing = [own for name, own in columns.items() if own not in found.c and name not in OPTIONAL_COLUMNS]
        if missing:
            raise DatabaseError(
                f"table {table!r} has no column {listed(missing)}; it has {listed(found.c.keys(), 20)}; "
                "--tables maps other names"
            )
        return {name: found.c[own] for name, own in columns.items() if own in found.c}


def _check_collations(connection: sa.Connection, table: str, keys: Sequence[str]) -> None:
    """Raises `DatabaseError` where two patients may have equal keys."""
    space, _, name = table.rpartition(".")
    query = sa.text(
        "SELECT column_name, collation_name FROM information_schema.columns "
        "WHERE table_schema = coalesce(:space, database()) AND table_name = :name"
    )
    collations = {own: c for own, c in connection.execute(query, {"space": space or None, "name": name})}
    for own in keys:
        collation = collations.get(own)
        if collation and not collation.endswith(("nopad_bin", "0900_bin")):
            raise DatabaseError(
                f"table {table!r}: by the collation {collation!r} of column {own!r} different patients may have equal "
                f"keys; change it, as in: ALTER TABLE {table} MODIFY {own} VARCHAR(64) CHARACTER SET utf8mb4 COLLATE "
                f"{exact_collation(connection.dialect)} NOT NULL"
            )


@contextmanager
def _alone(connection: sa.Connection) -> Iterator[None]:
    """Keeps others who make the same tables waiting; SQLite's transaction does so anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('sepsis tables'))"))
    if connection.dialect.name in MYSQL:
        connection.execute(sa.text("SELECT get_lock('sepsis tables', 60)"))
    try:
        yield
    finally:
        if connection.dialect.name in MYSQL:
            connection.execute(sa.text("SELECT release_lock('sepsis tables')"))


def make_tables(engine: sa.Engine, mapping: Mapping[str, Mapping[str, Any]] = DEFAULT_MAPPING) -> None:
    """Makes the tables that are missing, or brings older ones up to date.

    The project's own tables go through the migrations of Alembic; for mapped names the missing tables are made as they
    are today.
    """
    if engine.dialect.name == "sqlite" and engine.url.database:
        Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
    with in_words(engine.url), engine.begin() as connection, _alone(connection):
        if mapping != DEFAULT_MAPPING:
            visits = schema(mapping).tables[mapping["visits"]["table"]]
            if sa.inspect(connection).has_table(visits.name, visits.schema):
                visits = sa.Table(visits.name, sa.MetaData(), autoload_with=connection, schema=visits.schema)
                metadata = schema(mapping, visits, engine.dialect.name)
            else:
                metadata = schema(mapping, dialect=engine.dialect.name)
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
