"""prepare_data.py on one hospital in several formats: memory and rows a second, and what the formats agree on.

``scale`` multiplies the OMOP tables of a folder and reads them in a process of its own, beside a plain DuckDB scan of
the same file. ``agree`` prepares a folder that holds raw/, omop/, meds/ and fhir/ (such as the demo of MIMIC-IV),
compares the observations code by code, and scores each with one model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prepare_data
from common.command_line import DONE, add_command, make_parser, number, read_site_codes, run_command
from feature_pipeline import ProductionPipeline
from sources.omop import TABLES
from sources.tables import files_in, files_of

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {
    "raw": ("mimic-iv",),
    "omop": ("omop", "--ids", "source", "--codes", "source"),
    "meds": ("meds",),
    "fhir": ("fhir",),
}
KEY = "client, code, time, value"


# ------------------------------------------------------------------------------------------------------- scale


def multiplied(source: Path, folder: Path, rows: int, form: str) -> int:
    """Copies of the OMOP tables in `source`, with new patients and visits each, until there are `rows` measurements."""
    con = duckdb.connect()
    con.execute("SET preserve_insertion_order = false")
    con.execute(f"SET temp_directory = '{folder}/tmp'")
    files = files_in(source)
    own = f"read_csv({[str(path) for path in files_of('measurement', files)]}, all_varchar = true)"
    copies = -(-rows // con.execute(f"SELECT count(*) FROM {own}").fetchone()[0])
    for table in (table.name for table in TABLES):
        if not (found := files_of(table, files)):
            continue
        scan = f"read_csv({[str(path) for path in found]}, all_varchar = true, union_by_name = true)"
        names = [row[0] for row in con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()]
        many = not {"concept_id", "care_site_name"} & {name.lower() for name in names}
        moved = [
            f"({name}::BIGINT // 1000 * 1000 + copy)::VARCHAR AS {name}"
            for name in names
            if many and name.lower() in ("person_id", "visit_occurrence_id", "visit_detail_id")
        ]
        replaced = f"REPLACE ({', '.join(moved)})" if moved else ""
        copied = f"CROSS JOIN range({copies if many else 1}) AS c(copy)"
        ending = "FORMAT parquet" if form == "parquet" else "FORMAT csv, HEADER"
        target = folder / f"{table}.{form}"
        con.execute(f"COPY (SELECT * EXCLUDE (copy) {replaced} FROM {scan} {copied}) TO '{target}' ({ending})")
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    return copies


def scale(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        (folder / "omop").mkdir()
        copies = multiplied(arguments.folder, folder / "omop", arguments.rows, arguments.format)
        path = folder / "omop" / f"measurement.{arguments.format}"
        con = duckdb.connect()
        con.execute("SET threads = 2")
        reader = "read_parquet" if arguments.format == "parquet" else "read_csv"
        option = "" if arguments.format == "parquet" else ", all_varchar = true"
        start, processor = time.perf_counter(), time.process_time()
        columns = con.execute(f"DESCRIBE SELECT * FROM {reader}('{path}'{option})").fetchall()
        lengths = ", ".join(f"sum(length({column[0]}::VARCHAR))" for column in columns)
        n = con.execute(f"SELECT count(*), {lengths} FROM {reader}('{path}'{option})").fetchone()[0]
        plain, processor = time.perf_counter() - start, time.process_time() - processor
        con.close()
        print(f"{n:,} measurements ({copies} copies), {path.stat().st_size / 1e6:.0f} MB of {arguments.format}")
        print(f"plain scan of every cell: {plain:.1f} s, {n / plain:,.0f} rows/s; processor {processor:.0f} s")
        command = ["omop", str(folder / "omop"), "--out", str(folder / "out"), "--memory", arguments.memory]
        command += ["--labels", arguments.labels]
        start = time.perf_counter()
        done = subprocess.Popen([sys.executable, str(ROOT / "prepare_data.py"), *command])
        _, status, used = os.wait4(done.pid, 0)
        done.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        print(f"prepare_data.py omop, DuckDB within {arguments.memory}: {seconds:.1f} s, {n / seconds:,.0f} rows/s")
        print(f"most memory of the process: {used.ru_maxrss / 1024:.0f} MB; processor {used.ru_utime:.0f} s")
        return done.returncode


# ------------------------------------------------------------------------------------------------------- agree


def agree(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    con = duckdb.connect()
    for name, (command, *options) in FORMATS.items():
        target = out / name
        if not (target / "observations.parquet").exists():
            call = [command, str(arguments.folder / name), *options, "--time", "charted", "--labels", "none", "--quiet"]
            if status := prepare_data.main([*call, "--out", str(target)]):
                return status
        con.execute(
            f"CREATE TABLE {name} AS SELECT *, observation_type_code AS code, observation_date AS time, "
            f"round(observation_value, 4) AS value FROM '{target}/observations.parquet'"
        )
        visits, rows = con.execute(f"SELECT count(DISTINCT (client, visit_id)), count(*) FROM {name}").fetchone()
        print(f"{name:5} {visits} visits, {rows:,} observations")
    for name in list(FORMATS)[1:]:
        table = differences(con, name)
        table.to_csv(out / f"raw_and_{name}.csv", index=False)
        both = table[(table["in_other"] > 0) & (table["in_raw"] > 0)]
        print(f"\nraw and {name}: {table['same'].sum():,} observations equal")
        for kind, part in (("raw", table[table["in_other"] == 0]), (name, table[table["in_raw"] == 0])):
            print(f"  {len(part)} codes are only in {kind}: {part[['only_raw', 'only_other']].sum().sum():,} rows")
        print(f"  of {len(both)} codes in both {both['only_raw'].sum():,} rows are only in raw,", end=" ")
        print(f"{both['only_other'].sum():,} only in {name}")
        print(both.head(arguments.codes).to_string(index=False))
    if arguments.config:
        scores(arguments, con)
    return DONE


def differences(con: duckdb.DuckDBPyConnection, name: str) -> pd.DataFrame:
    """One row a code: how many observations (client, time, value) raw and `name` share, and how many only one has."""
    return con.execute(f"""
        WITH counted AS (
            SELECT code, sum(least(a, b)) AS same, sum(a - least(a, b)) AS only_raw, sum(b - least(a, b)) AS only_other,
                   sum(a) AS in_raw, sum(b) AS in_other
            FROM (SELECT {KEY}, count(*) FILTER (part = 'raw') AS a, count(*) FILTER (part <> 'raw') AS b
                  FROM (SELECT {KEY}, 'raw' AS part FROM raw UNION ALL SELECT {KEY}, 'other' FROM {name})
                  GROUP BY {KEY})
            GROUP BY code)
        SELECT * REPLACE (same::BIGINT AS same, only_raw::BIGINT AS only_raw, only_other::BIGINT AS only_other,
                          in_raw::BIGINT AS in_raw, in_other::BIGINT AS in_other)
        FROM counted ORDER BY only_raw + only_other DESC, code
    """).df()


def scores(arguments: argparse.Namespace, con: duckdb.DuckDBPyConnection) -> None:
    """One model's scores of all visits, from the codes that every format carries. MEDS has no reference ranges, so they
    are left out; it has no number of a stay either, so a client's visits are numbered in order of time."""
    shared = " INTERSECT ".join(f"SELECT code FROM {name}" for name in FORMATS)
    found = {}
    for name in FORMATS:
        rows = con.execute(f"""
            SELECT * EXCLUDE (visit_id, code, time, value, reference_range_min, reference_range_max),
                   dense_rank() OVER (PARTITION BY client ORDER BY start) AS visit_id
            FROM (SELECT *, min(time) OVER (PARTITION BY client, visit_id) AS start FROM {name})
            WHERE code IN ({shared})
            ORDER BY client, visit_id, observation_date, observation_type_code, observation_value
        """).df()
        codes = read_site_codes(str(arguments.out / "raw" / "codes.csv"))
        pipeline = ProductionPipeline(arguments.config, arguments.model, codes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # visits without enough evidence, which have no score
            scored = pipeline.predict(rows).set_index(["client", "visit_id"])["sepsis_probability"]
        columns = ["observation_date", "observation_type_code", "observation_value"]
        content = {
            key: hash(tuple(part[columns].itertuples(index=False))) for key, part in rows.groupby(scored.index.names)
        }
        found[name] = scored, pd.Series(content)
    scored, content = found["raw"]
    for name in list(FORMATS)[1:]:
        other = found[name][0].reindex(scored.index)
        same_rows = found[name][1].reindex(scored.index) == content.reindex(scored.index)
        same = (other == scored) | (other.isna() & scored.isna())
        print(
            f"scores from raw and {name}: {same.sum()} of {len(scored)} visits equal; {same_rows.sum()} visits have "
            f"equal observations of the shared codes, {(same & same_rows).sum()} of them equal scores"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/prepare.py scale omop --rows 10000000")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "memory and rows a second on an OMOP table of many rows"
    example = "python benchmarks/prepare.py scale omop --rows 10000000"
    command = add_command(commands, "scale", about, example, scale)
    option = command.add_argument
    option("folder", type=Path, help="OMOP tables (.csv, .csv.gz) to multiply")
    option("--rows", type=number(int, 1), default=10_000_000, help="measurements")
    option("--format", choices=("csv", "parquet"), default="csv", help="of the multiplied tables")
    option("--memory", default="1GB", help="of DuckDB")
    option("--labels", default="none", help="as of prepare_data.py")
    option("--scratch", default=None, help="folder for the tables and the output (default: the system's)")
    about = "observations and scores of one hospital in four formats"
    example = "python benchmarks/prepare.py agree mimic_iv_demo --out agreement"
    command = add_command(commands, "agree", about, example, agree)
    option = command.add_argument
    option("folder", type=Path, help="holds raw/, omop/, meds/ and fhir/")
    option("--out", type=Path, required=True, help="where the prepared tables and the differences go")
    option("--codes", type=number(int, 1), default=15, help="codes shown for each format")
    option("--config", help="config of a model that scores the visits of each format")
    option("--model", help="file of the model")
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
