"""The connection to the database, and its errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import sqlalchemy as sa

from feature_pipeline import (
    FeaturePipelineError,
)
from monitoring.log import KEEPALIVES, OFF

DEFAULT_URL = "sqlite:///data/sepsis.db"


URL_VARIABLE = "SEPSIS_DB_URL"


LEASE_SECONDS = 300  # after which the database ends the transaction of a predictor that has frozen


MYSQL = ("mysql", "mariadb")  # MariaDB has either name, by its URL


class DatabaseError(FeaturePipelineError):
    """The database cannot be used: wrong URL, no connection, missing table. The text holds no password and no data."""

    code = "database_error"


class BatchUndone(DatabaseError):
    """The database failed or went away in mid-work; finished batches are in it, the one under work is undone."""

    code = "batch_undone"


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
            if url.get_driver_name() in ("psycopg", "psycopg2"):
                options["connect_args"] = dict(KEEPALIVES)
            if url.get_driver_name() == "psycopg":  # a pooler's next session does not know what was prepared
                options["connect_args"]["prepare_threshold"] = None
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
        settings = {"TimeZone": "UTC", "DateStyle": "ISO", "idle_in_transaction_session_timeout": f"{LEASE_SECONDS}s"}
        query = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())

        @sa.event.listens_for(engine, "begin")
        def set_for_transaction(connection):
            # not for the session: a pooler such as pgbouncer gives each transaction another one
            connection.exec_driver_sql(f"SELECT {query}")

    if engine.dialect.name in MYSQL:

        @sa.event.listens_for(engine, "connect")
        def set_for_session(connection, _):
            with connection.cursor() as cursor:
                cursor.execute("SET time_zone = '+00:00'")
                cursor.execute(f"SET wait_timeout = {LEASE_SECONDS}")

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
        raise raised(f"{safe_url(url)}: {driver_words(error, url)}") from None
    except sa.exc.IdentifierError as error:
        raise raised(f"{safe_url(url)}: {error}") from None


# What speaks of connection, rights, names, room or shutdown is told; other texts may quote data, as a trigger's may.
_TOLD_STATES = ("08", "28", "3D", "3F", "42", "53", "57")  # classes of SQLSTATE


_TOLD_BY_MYSQL = {1040, 1044, 1045, 1049, 1054, 1142, 1143, 1146, *range(2000, 3000)}  # the last are the client's own


def driver_words(error: sa.exc.DBAPIError, url: sa.URL) -> str:
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


def check_monitor(monitor: str, url: sa.URL) -> None:
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
