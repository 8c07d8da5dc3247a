"""A hospital's tables as DuckDB views: files of a folder, or tables of a database.

Every column is read as text, so that a 64-bit number never passes through a float and a code keeps its zeros. A source
names the columns that it needs and those that it can do without; a column or table of the second kind that is absent is
empty. The SQL file of the source then reads tables that always have the same form.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.command_line import Terminated, progress
from feature_pipeline import BadConfig, BadObservations, listed

try:
    import duckdb
except ModuleNotFoundError:  # the commands of prepare_data.py that read no such tables do without it
    duckdb = None

SUFFIXES = (".csv", ".csv.gz", ".parquet")
BATCH = 50_000  # rows that are fetched from a database at once


@dataclass(frozen=True)
class Table:
    """A table that a source reads."""

    name: str
    needs: tuple[str, ...]  # columns
    also: tuple[str, ...] = ()  # columns that may be absent
    required: bool = False  # the source is of no use without the table


def open_database(path: Path, memory: str) -> duckdb.DuckDBPyConnection:
    """A DuckDB database in the file `path`, with bounded memory; what does not fit is kept beside the file."""
    if duckdb is None:
        raise BadConfig("reading tables needs DuckDB: pip install -r requirements-prepare.txt")
    con = duckdb.connect(str(path))
    try:
        con.execute("SET memory_limit = ?", [memory])
    except duckdb.Error:
        raise BadConfig(f"--memory {memory!r} is no amount of memory; write it as 1GB or 800MB") from None
    con.execute("SET preserve_insertion_order = false")
    con.execute("SET enable_progress_bar = false")
    con.execute("SET TimeZone = 'UTC'")
    con.execute("SET temp_directory = ?", [f"{path}.tmp"])
    return con


@contextlib.contextmanager
def interruptible(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a running query and raise `KeyboardInterrupt`. Python calls no handler while DuckDB works,
    so a thread learns of the signal from the file that Python writes its number to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    seen: list[int] = []

    def watch() -> None:
        while number := os.read(reader, 1)[0]:
            if number in (signal.SIGINT, signal.SIGTERM):
                seen.append(number)
                con.interrupt()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.write(writer, b"\0")
            thread.join()  # by then it has seen the signal that ended the query
            os.close(reader)
            os.close(writer)
    except (RuntimeError, duckdb.InterruptException) as error:
        if "interrupt" in str(error).lower():
            raise (Terminated if signal.SIGTERM in seen else KeyboardInterrupt) from None
        raise


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def files_in(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files of a folder and its subfolders whose names end so, hidden ones left out, in order of their paths."""
    if not folder.is_dir():
        raise BadConfig(f"{folder}: no such folder")
    found = [path for path in folder.rglob("*") if path.name.lower().endswith(tuple(suffixes)) and path.is_file()]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def files_of(name: str, files: Sequence[Path]) -> list[Path]:
    """Those of `files` that hold the table `name`: called so, its parts (name_0001), or all of a folder called so."""
    called = re.compile(rf"(2b_)?{re.escape(name)}([-_.]?\d+)*\.(csv|csv\.gz|parquet)", re.IGNORECASE)
    found = [path for path in files if called.fullmatch(path.name) or path.parent.name.lower() == name]
    whole = [path for path in found if path.name.lower() in {f"{name}{suffix}" for suffix in SUFFIXES}]
    if len(whole) > 1:
        raise BadConfig(f"two files hold the table {name}: {whole[0]} and {whole[1]}; name the folder of one")
    return found


def scan(files: Sequence[Path]) -> str:
    """The SQL that reads files of one table. Lines that are no rows of the table are rejected, and counted."""
    names = ["'" + str(path).replace("'", "''") + "'" for path in files]
    parquet = [path.name.lower().endswith(".parquet") for path in files]
    if all(parquet):
        return f"read_parquet([{', '.join(names)}], union_by_name = true)"
    if any(parquet):
        raise BadConfig(f"{files[0]} and {files[-1]} are two formats of one table; keep one")
    # rejects are counted only where DuckDB does not itself unite the files
    parts = [f"FROM read_csv({name}, {AS_TEXT}, quote = {quote_of(name)})" for name in names]
    return f"({' UNION ALL BY NAME '.join(parts)})"


AS_TEXT = "all_varchar = true, header = true, store_rejects = true"


def quote_of(name: str) -> str:
    """The quotation mark of a file. DuckDB looks at its first rows; where they have none, it would take those of later
    rows for text and reject a row such as ``1,"a, b"``."""
    try:
        (found,) = duckdb.execute(f"SELECT Quote FROM sniff_csv({name}, {AS_TEXT})").fetchone()
    except duckdb.Error:  # what is wrong with the file, reading it will say
        found = ""
    return "''''" if found == "'" else "'\"'"


def columns_of(con: duckdb.DuckDBPyConnection, source: str, where: str) -> dict[str, tuple[str, str]]:
    """{name in lower case: (name, type)} of a table, file or query."""
    try:
        described = con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    except duckdb.Error as error:
        raise BadObservations(f"{where} cannot be read: {reason_of(error)}") from None
    return {row[0].lower(): (row[0], row[1]) for row in described}


def reason_of(error: Exception) -> str:
    """What DuckDB says of a file, in one line without the file's content."""
    text = one_line(error)
    for sign, reason in {
        "GZIP": "it is no whole gzip file",
        "gzip": "it is no whole gzip file",
        "sniffing": "it is no table of comma-separated values with a header",
        "magic bytes": "it is no Parquet file",
        "too small to be a Parquet": "it is no Parquet file",
        "not UTF-8": "it is not UTF-8 text",
        "utf-8": "it is not UTF-8 text",
    }.items():
        if sign in text:
            return reason
    return re.split(r"Original Line|CSV Error|LINE \d", text)[0][:200].strip()


def add_view(con: duckdb.DuckDBPyConnection, table: Table, source: str | None, where: str) -> None:
    """The view `table.name` over `source`, with the columns that the table should have, all of them text."""
    have = columns_of(con, source, where) if source else {}
    if source and (missing := [name for name in table.needs if name not in have]):
        # the names that it has are not shown: in a file without a header they are a patient's data
        raise BadObservations(
            f"{where}: missing column {listed(missing)} among {len(have)}; the table {table.name} needs "
            f"{', '.join(table.needs)}"
        )
    cells = []
    for name in (*table.needs, *table.also):
        if name not in have:
            cells.append(f"NULL::VARCHAR AS {name}")
            continue
        own, kind = have[name]
        cell = '"' + own.replace('"', '""') + '"'
        if kind in ("DOUBLE", "FLOAT") and name.endswith("_id"):
            cell = f"CAST({cell} AS BIGINT)"
        cells.append(f"CAST({cell} AS VARCHAR) AS {name}")
    con.execute(f"CREATE VIEW {table.name} AS SELECT {', '.join(cells)} FROM {source or '(SELECT 1) WHERE false'}")


def add_folder(con: duckdb.DuckDBPyConnection, tables: Sequence[Table], folder: Path) -> list[str]:
    """Views of the tables of a folder; gives the names of those that are there."""
    files, present = files_in(folder), []
    found = {table.name: files_of(table.name, files) for table in tables}
    if missing := [table.name for table in tables if table.required and not found[table.name]]:
        raise BadConfig(
            f"{folder}: no file of the table {listed(missing)} (such as {missing[0]}.csv.gz) among {len(files)} tables"
        )
    for table in tables:
        own = found[table.name]
        add_view(con, table, scan(own) if own else None, str(own[0]) if own else "")
        present += [table.name] if own else []
    return present


# -------------------------------------------------------------------------------------------------- databases


@contextlib.contextmanager
def connected(url: str) -> Iterator[Any]:
    """A SQLAlchemy connection that streams. Its errors are one line, without the URL's password."""
    import sqlalchemy as sa

    engine = None
    try:
        engine = sa.create_engine(url)
        with engine.connect() as connection:
            yield connection.execution_options(stream_results=True, yield_per=BATCH)
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        shown = engine.url.render_as_string(hide_password=True) if engine else "the URL"
        kind = type(getattr(error, "orig", None) or error).__name__
        raise BadConfig(f"{shown}: the database cannot be read ({kind})") from None
    finally:
        if engine is not None:
            engine.dispose()


def is_url(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+]*://", text) is not None


def stream(con: duckdb.DuckDBPyConnection, name: str, columns: Sequence[str], rows: Any, arguments: Any) -> int:
    """Fills the DuckDB table `name`, all text, from an iterator of rows, a batch at a time. Returns their number."""
    con.execute(f"CREATE TABLE {name} ({', '.join(quoted(column) + ' VARCHAR' for column in columns)})")
    number = 0
    with progress(None, None, arguments.quiet, unit=" rows", desc=name) as bar:
        for part in rows:
            texts = [[None if cell is None else str(cell) for cell in column] for column in zip(*part, strict=True)]
            batch = pa.table([pa.array(column, pa.string()) for column in texts], names=[*map(str, columns)])
            con.register("batch_of_rows", batch)
            con.execute(f"INSERT INTO {name} SELECT * FROM batch_of_rows")
            con.unregister("batch_of_rows")
            number += len(part)
            bar.update(len(part))
    return number


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def add_database(con: duckdb.DuckDBPyConnection, tables: Sequence[Table], arguments: argparse.Namespace) -> list[str]:
    """As `add_folder`, from the tables of a database, of which the needed columns are streamed into DuckDB."""
    import sqlalchemy as sa

    present = []
    with connected(arguments.source) as connection:
        inspector = sa.inspect(connection)
        schema = arguments.schema
        names = inspector.get_table_names(schema=schema) + inspector.get_view_names(schema=schema)
        there = {name.lower(): name for name in names}
        if missing := [table.name for table in tables if table.required and table.name not in there]:
            raise BadConfig(f"the database has no table {listed(missing)} among {len(there)}")
        for table in tables:
            if table.name not in there:
                add_view(con, table, None, "")
                continue
            have = {
                column["name"].lower(): column["name"]
                for column in inspector.get_columns(there[table.name], schema=schema)
            }
            wanted = [name for name in (*table.needs, *table.also) if name in have]
            source = sa.table(there[table.name], *(sa.column(have[name]) for name in wanted), schema=schema)
            # the database turns its cells into text itself: numbers come without a rounding, and far quicker
            query = sa.select(*(sa.cast(source.c[have[name]], sa.Text) for name in wanted))
            if wanted:
                stream(con, f"read_{table.name}", wanted, connection.execute(query).partitions(), arguments)
            add_view(con, table, f"read_{table.name}" if wanted else None, f"the table {table.name}")
            present.append(table.name)
    return present


def add_database_query(
    con: duckdb.DuckDBPyConnection, name: str, query: str | tuple[str, Sequence[str]], arguments: argparse.Namespace
) -> None:
    """The table `name` with the rows that a query of a database gives, or columns of one of its tables, streamed."""
    import sqlalchemy as sa

    with connected(arguments.source) as connection:
        if isinstance(query, str):
            result = connection.exec_driver_sql(query)
        else:
            table, columns = query
            result = connection.execute(sa.select(sa.table(table, *map(sa.column, columns))))
        stream(con, name, [column.lower() for column in list(result.keys())], result.partitions(), arguments)
