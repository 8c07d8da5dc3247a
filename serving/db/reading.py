"""What the predictor asks of visits: their observations, and rows by their keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import sqlalchemy as sa
from pyarrow import csv
from sqlalchemy.dialects import postgresql

from feature_pipeline import as_text
from serving.db.tables import NEWEST, Tables

KEYS = "client", "visit_id"
Key = tuple[Any, Any]  # (client, visit_id) as the database gives them


class Read(NamedTuple):
    """The observations of some visits: the place of each row's visit among them, the rows as the reader takes them,
    whose visits are these places, and the date of each visit's newest row as the database writes it, if it is known."""

    place: np.ndarray
    rows: pd.DataFrame
    newest: list[str | None]


def read_observations(connection: sa.Connection, tables: Tables, keys: list[Key]) -> Read:
    """The visits' observations. Dates and numbers are the reader's business.

    The rows' visits are told by places in `keys`, not by the keys of the observations: what is one key to the
    database, as A and a, 7 and 7.0, may be two to Python, and the other way round.
    """
    read = (aggregated if connection.dialect.name == "postgresql" else fetched)(connection, tables, keys)
    named = np.array([[bool(as_text(part)) for part in key] for key in keys])  # blank keys name no visit
    for name, is_named in zip(KEYS, named.T, strict=True):
        read.rows[name] = read.place if is_named.all() else np.where(is_named[read.place], read.place, np.nan)
    return read


def aggregated(connection: sa.Connection, tables: Tables, keys: list[Key]) -> Read:
    """Read as one text a visit, in which PostgreSQL has written its rows: the driver has a tenth of the work."""
    visits, columns = tables.visits, _but_keys(tables.observations)
    own = [visits[name] for name in KEYS]
    lists = map(_array, own, zip(*keys, strict=True))
    claimed = sa.func.unnest(*lists).table_valued(*KEYS, with_ordinality="place").render_derived()
    row = sa.cast(sa.func.row(sa.null(), *columns.values(), sa.null()), sa.Text)  # the parentheses are columns too
    query = (
        sa.select(claimed.c.place, newest_of_visit(tables.observations), sa.func.count(), sa.func.string_agg(row, "\n"))
        .select_from(claimed)
        .join(own[0].table, same_visit(visits, claimed.c))
        .join(columns["observation_date"].table, same_visit(tables.observations, visits))
        .group_by(claimed.c.place)
    )
    visit, newest, n, texts = list(zip(*connection.execute(query), strict=True)) or [()] * 4
    place = np.repeat(np.array(visit, dtype=np.int64) - 1, n)
    kinds = {name: pa.float64() if isinstance(c.type, sa.Float) else pa.string() for name, c in columns.items()}
    table = csv.read_csv(
        pa.BufferReader("\n".join(["", *texts, ""]).replace("\\\\", "\\").encode()),
        csv.ReadOptions(column_names=["(", *columns, ")"], use_threads=False),
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(
            column_types=kinds,
            include_columns=list(columns),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    date = columns["observation_date"].type
    if isinstance(date, sa.DateTime | sa.Date):
        zone = "UTC" if getattr(date, "timezone", False) else None
        with suppress(pa.ArrowInvalid):  # Arrow has no infinity, and other years; the reader knows what to do
            times = table["observation_date"].cast(pa.timestamp("us", zone))
            table = table.set_column(table.column_names.index("observation_date"), "observation_date", times)
    newest_of = dict(zip(visit, newest, strict=True))
    return Read(place, table.to_pandas(), [newest_of.get(i + 1) for i in range(len(keys))])


def fetched(connection: sa.Connection, tables: Tables, keys: list[Key]) -> Read:
    """Read as any driver can."""
    newest = newest_dates(connection, tables, keys)  # first: what comes in between is found next time
    columns = _but_keys(tables.observations)
    given = map(raw, columns.values())
    cursor = connection.execute(rows_of(connection, tables, tables.observations, keys, *given)).cursor
    driver = connection.dialect.loaded_dbapi
    try:  # the driver's own rows: SQLAlchemy's, and a tuple a column, took longer than all the rest
        rows = cursor.fetchall()
    except driver.Error as error:
        raise sa.exc.DBAPIError.instance(None, None, error, driver.Error, dialect=connection.dialect) from None
    table = pd.DataFrame(rows, columns=["client", "visit_id", *columns])
    index = {key: i for i, key in enumerate(keys)}
    place = np.fromiter((index[row[:2]] for row in rows), np.int64, len(rows))
    return Read(place, table, [newest.get(key) for key in keys])


def newest_dates(connection: sa.Connection, tables: Tables, keys: list[Key]) -> dict[Key, str]:
    """The date of each visit's newest observation, as the database writes it."""
    if "newest_observation" not in tables.predictions:
        return {}
    query = rows_of(connection, tables, tables.observations, keys, newest_of_visit(tables.observations))
    query = query.group_by(tables.visits["client"], tables.visits["visit_id"])
    return {(client, visit): newest for client, visit, newest in connection.execute(query)}


def rows_of(
    connection: sa.Connection,
    tables: Tables,
    other: Mapping[str, sa.Column[Any]],
    keys: list[Key],
    *columns: sa.ColumnElement[Any],
) -> sa.Select[Any]:
    """Some columns of another table's rows that belong to these visits, behind the visits' own keys."""
    visits = tables.visits
    return (
        sa.select(raw(visits["client"]), raw(visits["visit_id"]), *columns)
        .select_from(visits["client"].table.join(other["client"].table, same_visit(other, visits)))
        .where(among(connection, visits, keys))
    )


def _but_keys(columns: Mapping[str, sa.Column[Any]]) -> dict[str, sa.Column[Any]]:
    return {name: column for name, column in columns.items() if name not in KEYS}


def same_visit(a: Mapping[str, Any], b: Mapping[str, Any]) -> sa.ColumnElement[bool]:
    return sa.and_(a["client"] == b["client"], a["visit_id"] == b["visit_id"])


def raw(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """The column as the driver gives it."""
    return sa.type_coerce(column, sa.types.NullType())


def newest_of_visit(observations: Mapping[str, sa.Column[Any]]) -> sa.ColumnElement[Any]:
    return sa.cast(sa.func.max(observations["observation_date"]), NEWEST)


def among(
    connection: sa.Connection, columns: Mapping[str, sa.Column[Any]], keys: Sequence[tuple[Any, ...]], *more: str
) -> sa.ColumnElement[bool]:
    """(client, visit_id, `more`...) is one of `keys`."""
    own = [columns[name] for name in (*KEYS, *more)]
    by_column = zip(*keys, strict=True)
    return sa.tuple_(*own).in_(_unnested(own, by_column) if connection.dialect.name == "postgresql" else keys)


def _unnested(columns: Sequence[sa.Column[Any]], values: Iterable[Sequence[Any]]) -> sa.Select[Any]:
    """Rows as a query with one parameter a column: PostgreSQL's driver is slow with thousands of them."""
    return sa.select(*(sa.func.unnest(_array(*pair)) for pair in zip(columns, values, strict=True)))


def from_json(columns: Sequence[sa.Column[Any]], rows: Mapping[str, Sequence[Any]]) -> sa.Select[Any]:
    """Rows as a query with one parameter: quicker than an array a column, which the driver writes in Python."""
    names = [column.key for column in columns]
    text = json.dumps([dict(zip(names, row, strict=True)) for row in zip(*rows.values(), strict=True)], default=str)
    given = sa.func.json_to_recordset(sa.cast(sa.literal(text, sa.Text), postgresql.JSON))
    return sa.select(given.table_valued(*(sa.column(c.key, c.type) for c in columns)).render_derived(with_types=True))


def _array(column: sa.Column[Any], values: Sequence[Any]) -> sa.BindParameter[Any]:
    return sa.literal(list(values), postgresql.ARRAY(column.type))
