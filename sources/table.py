"""Any other table: a short file says what its columns mean, or an SQL query makes the columns of observations.

The query runs in DuckDB over the files of a folder, each a view with the file's name, or in a database, whose rows are
streamed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from common.artifacts import read_toml
from feature_pipeline import BadConfig, BadObservations, check_synonyms, listed
from sources.meanings import given_concepts
from sources.prepare import add_source, mixed_offsets
from sources.tables import SUFFIXES, add_database_query, columns_of, duckdb, files_in, is_url, quoted, reason_of, scan

# What a map or a query may name; the first ones it must.
NEEDED = ("visit_id", "observation_date", "observation_type_code", "observation_value")
ALSO = (
    "client",
    "unit",
    "available",
    "observation_name",
    "reference_range_min",
    "reference_range_max",
    "visit_start",
    "visit_end",
)
# Words in names of columns, of which the first column that has one is taken; for `inspect`.
GUESSES = {
    "visit_id": r"csn|encounter|visit|stay_?id|hadm|unitstay|episode|admission_?id|case_?(id|no|num)|^fall",
    "client": r"pat(ient)?_?(id|mrn)|mrn|subject|person|client|uniquepid|^pid$",
    "observation_date": r"recorded|observ\w*(date|time)|measure?\w*time|chart\w*time|taken|collect|effective|"
    r"event_?time|result_?(time|date)|date_?time|timestamp|^time$|^date$",
    "observation_type_code": r"(obs\w*|type|item|test|meas\w*|component|lab|concept|param\w*)_?(code|id|name)|^code$|"
    r"loinc|flo_meas_name|^item$|^label$|variable|^parameter$|labname",
    "observation_value": r"^value|meas_value|value_?num|result_?(value|num)|ord_value|numeric|^result$|labresult$",
    "unit": r"unit|uom",
    "available": r"store|available|filed|released|issued|result\w*_time|verified",
    "reference_range_min": r"(ref|range|normal)\w*(low|min)",
    "reference_range_max": r"(ref|range|normal)\w*(high|max|upper)",
}


def read_map(path: Path) -> dict[str, Any]:
    """A map.toml: [columns], and optionally [time] and [concepts]; for a database also the name of the table."""
    content = read_toml(path, "map")
    if unknown := content.keys() - {"columns", "time", "concepts", "table"}:
        raise BadConfig(f"{path}: unknown {listed(sorted(unknown))}; known: columns, time, concepts, table")
    columns = content.get("columns", {})
    if unknown := columns.keys() - {*NEEDED, *ALSO}:
        raise BadConfig(f"{path}: [columns] names {listed(sorted(unknown))}; known: {', '.join((*NEEDED, *ALSO))}")
    if missing := [name for name in NEEDED if name not in columns]:
        raise BadConfig(f"{path}: [columns] does not say which column is {listed(missing)}")
    if unknown := content.get("time", {}).keys() - {"format", "minutes_after"}:
        raise BadConfig(f"{path}: [time] knows format and minutes_after, not {listed(sorted(unknown))}")
    return content


def mapped_query(source: str, content: dict[str, Any], have: dict[str, tuple[str, str]], where: str) -> str:
    """The query that a map stands for."""
    columns = content["columns"]
    if missing := sorted({name for name in columns.values() if name.lower() not in have}):
        raise BadObservations(f"{where}: missing column {listed(missing)} among {len(have)}")
    cells = {name: f"CAST({quoted(have[own.lower()][0])} AS VARCHAR)" for name, own in columns.items()}
    time = content.get("time", {})
    for name in ("observation_date", "available", "visit_start", "visit_end"):
        if name not in cells:
            continue
        if "minutes_after" in time:
            origin, cell = time["minutes_after"].replace("'", "''"), cells[name]
            cells[name] = f"CAST(TRY(TIMESTAMP '{origin}' + to_minutes(try_cast({cell} AS BIGINT))) AS VARCHAR)"
        elif "format" in time:
            if not re.search("%-?[HIcXs]", time["format"]):
                raise BadConfig(f"{where}: the [time] format {time['format']!r} has no hour; a date alone is no time")
            cells[name] = (
                f"CAST(try_strptime({cells[name]}, '{time['format'].replace(chr(39), chr(39) * 2)}') AS VARCHAR)"
            )
    return f"SELECT {', '.join(f'{cell} AS {name}' for name, cell in cells.items())} FROM {source}"


def guess_map(have: dict[str, tuple[str, str]]) -> dict[str, str]:
    """{column of observations: own column} by the names of the columns; each own column once."""
    guessed: dict[str, str] = {}
    for name in (*NEEDED, *ALSO):
        if name in have:
            guessed[name] = have[name][0]
    for name, pattern in GUESSES.items():
        free = [own for key, (own, _) in have.items() if own not in guessed.values() and re.search(pattern, key)]
        if name not in guessed and free:
            guessed[name] = free[0]
    return guessed


def read(con: Any, arguments: argparse.Namespace) -> dict[str, bool]:
    if (arguments.map is None) == (arguments.sql is None):
        raise BadConfig("a table needs either --map map.toml or --sql query.sql; inspect writes a map to begin with")
    content = read_map(arguments.map) if arguments.map else {}
    query = arguments.sql.read_text(encoding="utf-8").strip().rstrip(";") if arguments.sql else ""
    if is_url(arguments.source):
        if content and "table" not in content:
            raise BadConfig(f'{arguments.map}: it does not name the table of the database, as in table = "flowsheet"')
        if content:
            names = sorted(set(content["columns"].values()))
            add_database_query(con, "own_table", (content["table"], names), arguments)
            query = mapped_query("own_table", content, columns_of(con, "own_table", content["table"]), content["table"])
            con.execute(f"CREATE VIEW mapped AS {query}")
        else:
            add_database_query(con, "mapped", query, arguments)
    else:
        path = Path(arguments.source)
        con.execute("CREATE SCHEMA files")  # a file may be called as one of our own tables
        if content:
            source = scan([path])
            query = mapped_query(source, content, columns_of(con, source, str(path)), str(path))
        else:
            for file in files_in(path) if path.is_dir() else [path]:
                name = re.sub(r"\W", "_", file.name[: -len(next(s for s in SUFFIXES if file.name.lower().endswith(s)))])
                con.execute(f"CREATE OR REPLACE VIEW files.{quoted(name)} AS SELECT * FROM {scan([file])}")
        con.execute("SET search_path = 'files,main'")
        try:
            con.execute(f"CREATE TABLE main.mapped AS {query}")
        except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException) as error:
            raise BadConfig(f"{arguments.sql or arguments.map}: {reason_of(error)}") from None
        con.execute("SET search_path = 'main'")
    have = columns_of(con, "mapped", str(arguments.sql or arguments.source))
    if missing := [name for name in NEEDED if name not in have]:
        raise BadConfig(f"{arguments.sql}: the query gives no column {listed(missing)}; needed: {', '.join(NEEDED)}")
    if content.get("concepts"):
        take_concepts(arguments, content["concepts"])
    times = [name for name in ("observation_date", "available", "visit_start", "visit_end") if name in have]
    found = " UNION ".join(f"SELECT offset_of(CAST({name} AS VARCHAR)) AS o FROM mapped" for name in times)
    offsets = con.execute(f"SELECT o FROM ({found}) WHERE o IS NOT NULL").fetchall()
    if remark := mixed_offsets(row[0] for row in offsets):
        arguments.notices.append(remark)
    fill(con, have)
    return {}


def take_concepts(arguments: argparse.Namespace, concepts: dict[str, str]) -> None:
    """[concepts] of the map count as if --synonyms named them; a file that is named comes first."""
    check_synonyms(concepts, f"{arguments.map}: [concepts]")
    arguments.concepts = concepts | given_concepts(arguments.synonyms)


def fill(con: Any, have: dict[str, tuple[str, str]]) -> None:
    """`source_rows`, `visits` and `code_names` from the table `mapped`. Without a client, the visit is its own; without
    a start and an end, a visit lasts from its first observation to its last. Two clients may have the same visit_id."""

    def cell(name: str, otherwise: str = "NULL::VARCHAR") -> str:
        return f"CAST({name} AS VARCHAR)" if name in have else otherwise

    con.execute(
        f"CREATE TABLE mapped_rows AS SELECT nullif(whole({cell('visit_id')}), '') AS visit_id, "
        f"nullif(whole({cell('client')}), '') AS client, "
        f"moment({cell('observation_date')}) AS charted, moment({cell('available')}) AS available, "
        f"whole({cell('observation_type_code')}) AS code, {cell('observation_value')} AS value, "
        f"{cell('unit')} AS unit, "
        f"number_in({cell('reference_range_min')}) AS low, number_in({cell('reference_range_max')}) AS high, "
        f"{cell('observation_name')} AS name, wall({cell('visit_start')}) AS visit_start, "
        f"wall_end({cell('visit_end')}) AS visit_end FROM mapped"
    )
    n, n_timed = con.execute("SELECT count(*), count(charted) FROM mapped_rows").fetchone()
    if not n_timed:
        raise BadObservations(
            f"none of the {n} rows has a time of day in observation_date; expected 2024-12-31T20:30, or [time] in a map"
        )
    con.execute(
        # a row without a client has the one of its visit, unless there are several
        "CREATE TABLE clients AS SELECT visit_id, CASE WHEN min(client) IS NULL THEN visit_id "
        "WHEN min(client) = max(client) THEN min(client) END AS only_client FROM mapped_rows GROUP BY visit_id;"
        "CREATE VIEW whose AS SELECT * EXCLUDE (only_client) REPLACE (coalesce(client, only_client) AS client) "
        "FROM mapped_rows LEFT JOIN clients USING (visit_id);"
        "CREATE VIEW source_rows AS SELECT * EXCLUDE (name, visit_start, visit_end) FROM whose;"
        "CREATE TABLE code_names AS SELECT code, min(name) AS name FROM mapped_rows WHERE name <> '' GROUP BY code;"
        "CREATE TABLE visits AS SELECT visit_id, client, "
        "coalesce(min(visit_start), min(least(charted, coalesce(available, charted)))) AS visit_start, "
        "coalesce(max(visit_end), max(greatest(charted, coalesce(available, charted)))) AS visit_end, "
        "NULL::BOOLEAN AS died FROM whose WHERE visit_id IS NOT NULL AND client IS NOT NULL GROUP BY visit_id, client"
    )


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py table``."""
    example = "flowsheet.csv.gz --map map.toml --out prepared"
    what = "table (.csv, .csv.gz, .parquet), a folder of such for --sql, or a database"
    command = add_source(commands, "table", __doc__, example, read, "FILE|FOLDER|URL", what)
    command.add_argument("--map", type=Path, metavar="TOML", help="names the columns; inspect writes one to begin with")
    command.add_argument("--sql", type=Path, metavar="SQL", help="a query whose columns are those of observations")
