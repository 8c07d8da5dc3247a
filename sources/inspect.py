"""Guesses the meaning of a table's columns and codes, and shows why. Writes a map and codes to correct."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from common.artifacts import write_atomic
from common.command_line import DONE, add_command, table_path
from feature_pipeline import BadObservations, listed
from sources import table
from sources.prepare import common_options, working_database
from sources.prepare import work as prepare_work
from sources.tables import columns_of, quoted, scan

# where times are no ISO 8601; of two that read as many of them the first counts
FORMATS = (
    *("%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d.%m.%Y %H:%M:%S"),
    *(
        "%d.%m.%Y %H:%M",
        "%m/%d/%Y %I:%M:%S %p",
        "%m/%d/%Y %I:%M %p",
        "%Y%m%d%H%M%S",
        "%Y%m%d %H:%M:%S",
        "%d-%b-%Y %H:%M:%S",
    ),
)
LOOKED_AT = 10_000  # times whose form is looked at
SHOWN = 25  # codes


def time_of(con: Any, source: str, column: str) -> dict[str, str]:
    """The [time] part of a map, from the form of some of the column's times, whatever their place; empty where they are
    ISO 8601."""
    con.execute(
        f"CREATE TEMP TABLE times AS SELECT DISTINCT CAST({quoted(column)} AS VARCHAR) AS t FROM {source} "
        f"WHERE t <> '' ORDER BY hash(t), t LIMIT {LOOKED_AT}"
    )

    def share(test: str) -> float:
        return con.execute(f"SELECT coalesce(avg((({test}) IS NOT NULL)::INTEGER), 1) FROM times").fetchone()[0]

    if share("wall(t)") > 0.5:
        return {}
    shares = {form: share(f"try_strptime(t, '{form}')") for form in FORMATS}
    best = max(FORMATS, key=lambda form: shares[form])
    if shares[best] > 0.5:
        other = best.replace("%m/%d", "%d/%m")
        if other != best and shares.get(other) == shares[best]:
            print(
                f"{column}: day and month cannot be told apart; correct the format {best} in map.toml if it is {other}"
            )
        return {"format": best}
    return {"minutes_after": "2000-01-01"} if share("try_cast(t AS BIGINT)") > 0.95 else {}


def map_text(guessed: dict[str, str], time: dict[str, str], left: list[str]) -> str:
    """A map.toml, with the columns that nothing was found for as comments."""
    lines = ["[columns]"]
    for name in (*table.NEEDED, *table.ALSO):
        if name in guessed:
            lines.append(f"{name} = {json.dumps(guessed[name])}")
        elif name in table.NEEDED:
            lines.append(f"# {name} = ")
    lines += ["", "[time]", *(f"{key} = {json.dumps(value)}" for key, value in time.items())] if time else []
    return "\n".join([*lines, f"# not used: {', '.join(left) or 'none'}", ""])


def work(arguments: argparse.Namespace) -> int:
    source, out = scan([Path(arguments.source)]), arguments.out
    with working_database(arguments) as con:
        have = columns_of(con, source, arguments.source)
        guessed = table.guess_map(have)
        time = time_of(con, source, guessed["observation_date"]) if "observation_date" in guessed else {}
    own = [name for name, _ in have.values()]
    write_atomic(out / "map.toml", map_text(guessed, time, [name for name in own if name not in guessed.values()]))
    print("columns")
    for name in (*table.NEEDED, *table.ALSO):
        if name in guessed or name in table.NEEDED:
            print(f"  {name:22} {guessed.get(name, 'not found')}")
    if missing := [name for name in table.NEEDED if name not in guessed]:
        raise BadObservations(
            f"{arguments.source}: no column looks like {listed(missing)}; complete {out / 'map.toml'}, then run "
            "prepare_data.py table"
        )
    with tempfile.TemporaryDirectory(dir=out, prefix=".inspect") as folder:
        seen = argparse.Namespace(**vars(arguments), shown=arguments.source)
        seen.reader, seen.map, seen.sql, seen.out = table.read, out / "map.toml", None, Path(folder)
        prepare_work(seen)
        for name in ("codes.csv", "report.json", "report.html"):
            shutil.move(Path(folder) / name, out / name)
    _show(pd.read_csv(out / "codes.csv", keep_default_na=False), json.loads((out / "report.json").read_text()))
    return DONE


def _show(codes: pd.DataFrame, report: dict[str, Any]) -> None:
    print(f"\nrows {report['rows']}, visits {report['visits']}; left out: {report['left_out'] or 'none'}")
    print(f"\ncodes, the {min(SHOWN, len(codes))} most frequent of {len(codes)}")
    for row in codes.sort_values(["rows", "code"], ascending=[False, True]).head(SHOWN).itertuples():
        why = f" ({row.why})" if row.why else ""
        print(f"  {row.code:24.24} {row.rows:>9} {row.unit or '-':10.10} {row.concept or '-'}{why}")
    for row in codes[(codes["unit_unknown"] > 0) | (codes["outside_limits"] > 0)].itertuples():
        limits = f"{row.outside_limits} outside of {row.concept}'s limits"
        print(f"  {row.code}: {row.unit_unknown} rows in an unknown unit, {limits}")
    absent = [entry["concept"] for entry in report["coverage"] if not entry["rows"]]
    print(f"\nconcepts: {len(report['coverage']) - len(absent)} found; none for {', '.join(absent) or 'no other'}")


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py inspect``."""
    command = add_command(
        commands, "inspect", __doc__, "python prepare_data.py inspect flowsheet.csv.gz --out look", work
    )
    command.add_argument("source", type=lambda text: str(table_path(text)), metavar="FILE", help="one table")
    common_options(command)
    command.set_defaults(labels="none")
