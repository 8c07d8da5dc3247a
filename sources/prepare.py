"""What every source shares: options, the tables that it fills, and what is written from them.

A source fills `visits`, `source_rows`, `code_names` and, where it has them, `icu_stays`, `patients_known`,
`antibiotics`, `cultures`, `vasopressors`, `ventilation` and `urine`: tables or views of a DuckDB database, with
times of the wall clock. From these come ``observations.parquet``, ``labels.parquet``, ``codes.csv`` and the report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.command_line import DONE, add_command, available_cores, log, number, progress
from common.fhir import NOT_USED
from feature_pipeline import BLOOD_PRESSURE_CODES, DIASTOLIC, SYSTOLIC, BadObservations, listed
from sources.labels import add_label_options, settings_of, write_labels
from sources.meanings import given_concepts
from sources.tables import duckdb, interruptible, open_database, reason_of

HERE = Path(__file__).parent

# What SQL files of sources may use.
MACROS = r"""
-- Wall-clock time to the second: the offset of 2180-05-06T22:23:00-04:00 is left out, not applied. A date alone is its
-- midnight. The years are those that the reader takes.
CREATE MACRO wall(t) AS CASE WHEN t >= '1900' AND t < '2300' THEN try_cast(left(t, 19) AS TIMESTAMP) END;
-- When something was measured or seen: a date alone does not tell it, and at midnight it would be known too early.
CREATE MACRO moment(t) AS CASE WHEN contains(t, ':') THEN wall(t) END;
-- An end that is a date alone is the end of that day.
CREATE MACRO wall_end(t) AS CASE WHEN contains(t, ':') THEN wall(t) ELSE wall(t) + INTERVAL 86399 SECOND END;
-- The offset from UTC that a time has, empty for none; NULL where it is no time of day.
CREATE MACRO offset_of(t) AS CASE WHEN contains(t, ':')
    THEN upper(regexp_extract(t, ':\d\d(:\d\d)?([.,]\d+)? ?([Zz]|[+-]\d\d(:?\d\d)?)$', 3)) END;
-- The number in a text; <0.5 and > 200 count as their number, nan and infinity are none.
CREATE MACRO finite(x) AS CASE WHEN isfinite(x) THEN x END;
CREATE MACRO number_in(t) AS finite(try_cast(ltrim(t, '<>=≤≥~ ') AS DOUBLE));
-- A whole number that a program wrote as 7.0, because its column has gaps, is 7.
CREATE MACRO whole(t) AS regexp_replace(t, '\.0$', '');
-- Does the word that a nurse's record has for a dose say that it was given?
CREATE MACRO given(t) AS regexp_matches(lower(t), 'administered|applied|started|infus|given|completed|confirmed')
    AND NOT regexp_matches(lower(t), '(^|\W)not |flush|stopp|removed|assess|hold');
-- The vasopressor that a drug's name stands for, with or without its last e. With a local anaesthetic, for the eye,
-- nose, skin or airways, or in a pen it is none.
CREATE MACRO pressor(t) AS CASE
    WHEN regexp_matches(lower(t), 'caine|racepin|racemic|ophth|nasal|spray|drops|inhal|nebul|topical|cream|ointment'
         '|suppos|injector|\bpen\b') THEN NULL
    WHEN regexp_matches(lower(t), 'norepinephrin|noradrenalin|levophed|arterenol') THEN 'norepinephrine'
    WHEN regexp_matches(lower(t), 'phenylephrin') THEN 'phenylephrine'
    WHEN regexp_matches(lower(t), 'epinephrin|adrenalin|suprarenin') THEN 'epinephrine'
    WHEN regexp_matches(lower(t), 'dopamin') THEN 'dopamine'
    WHEN regexp_matches(lower(t), 'dobutamin') THEN 'dobutamine'
    WHEN regexp_matches(lower(t), 'vasopressin|argipressin') AND NOT contains(lower(t), 'desmo') THEN 'vasopressin' END;
-- A rate in ug/kg/min; NULL where the unit is another kind of rate.
CREATE MACRO per_kg(rate, unit, weight) AS CASE replace(replace(lower(unit), 'µ', 'u'), 'mcg', 'ug')
    WHEN 'ug/kg/min' THEN rate WHEN 'mg/kg/min' THEN rate * 1000 WHEN 'ug/kg/hour' THEN rate / 60
    WHEN 'ug/min' THEN rate / nullif(weight, 0) WHEN 'mg/min' THEN rate * 1000 / nullif(weight, 0)
    WHEN 'ug/hour' THEN rate / 60 / nullif(weight, 0) WHEN 'mg/hour' THEN rate * 1000 / 60 / nullif(weight, 0) END;
CREATE MACRO is_urine(name) AS regexp_matches(
        lower(name), 'urine|foley|^void|condom cath|suprapubic|straight cath|nephrost|ileoconduit|texas cath')
    AND NOT regexp_matches(lower(name), 'incontinen|irrig|count|stool');
"""

# A source that lacks one of them leaves it empty.
CONTRACT = {
    "visits": "visit_id VARCHAR, client VARCHAR, visit_start TIMESTAMP, visit_end TIMESTAMP, died BOOLEAN",
    "icu_stays": "stay_id VARCHAR, visit_id VARCHAR, client VARCHAR, stay_start TIMESTAMP, stay_end TIMESTAMP",
    "rows": "visit_id VARCHAR, client VARCHAR, charted TIMESTAMP, available TIMESTAMP, code VARCHAR, value VARCHAR, "
    "number DOUBLE, unit VARCHAR, low DOUBLE, high DOUBLE",
    "code_names": "code VARCHAR, name VARCHAR",
    "patients_known": "client VARCHAR, birth_year INTEGER, sex VARCHAR",
    "antibiotics": "client VARCHAR, visit_id VARCHAR, stay_id VARCHAR, start TIMESTAMP, stop TIMESTAMP, name VARCHAR, "
    "route VARCHAR, administered BOOLEAN, order_id VARCHAR",
    "cultures": "client VARCHAR, visit_id VARCHAR, time TIMESTAMP, has_time BOOLEAN, specimen VARCHAR, blood BOOLEAN, "
    "positive BOOLEAN, culture_id VARCHAR",
    "vasopressors": "client VARCHAR, visit_id VARCHAR, start TIMESTAMP, stop TIMESTAMP, drug VARCHAR, rate DOUBLE",
    "ventilation": "client VARCHAR, visit_id VARCHAR, start TIMESTAMP, stop TIMESTAMP",
    "urine": "client VARCHAR, visit_id VARCHAR, time TIMESTAMP, volume DOUBLE",
}
KINDS = ("icu_stays", "antibiotics", "administrations", "cultures", "vasopressors", "ventilation", "urine")

# Why a row is no observation; the first that holds.
LEFT_OUT = {
    "no_code": "no code",
    "no_time": "no time of day, or none that can be read",
    "no_visit": "not within a visit: neither its visit_id nor its time belongs to one",
    "no_value": "no value",
    "no_number": "its value is not a number",
}

LEFT_OUT |= {reason: text for reason, text in NOT_USED.items() if reason not in LEFT_OUT}

Reader = Callable[[Any, argparse.Namespace], dict[str, bool]]  # fills a database, tells which kinds there are


def add_source(
    commands: Any, name: str, about: str, example: str, reader: Reader, source: str, help_of_source: str
) -> argparse.ArgumentParser:
    """The command `name` of the door, with the options that every source has."""
    command = add_command(commands, name, about, f"python prepare_data.py {name} {example}", work)
    command.set_defaults(reader=reader)
    command.add_argument("source", metavar=source, help=help_of_source)
    common_options(command)
    add_label_options(command)
    return command


def common_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(concepts=None)
    option = command.add_argument
    option("--out", required=True, type=Path, metavar="DIR", help="folder for the tables and the report")
    option(
        "--time",
        choices=("available", "charted"),
        default="available",
        help="time of an observation: when clinicians could see it, if the source has this time; or when it was taken",
    )
    option("--visits", choices=("hospital", "icu"), default="hospital", help="hospital stays, or intensive-care stays")
    option("--synonyms", metavar="FILE", help="a corrected codes.csv; its concepts replace the suggested ones")
    option("--memory", default="1GB", help="memory limit of DuckDB; data beyond it are kept in files under --out")
    option("--threads", type=number(int, 1), default=available_cores(), help="number of threads of DuckDB")


def run_sql(con: duckdb.DuckDBPyConnection, name: str) -> None:
    con.execute((HERE / f"{name}.sql").read_text(encoding="utf-8"))


@contextlib.contextmanager
def working_database(arguments: argparse.Namespace) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database under --out with the macros, gone at the end. What DuckDB says of a file becomes one line."""
    arguments.out.mkdir(parents=True, exist_ok=True, mode=0o750)
    with tempfile.TemporaryDirectory(dir=arguments.out, prefix=".prepare") as folder:
        con = open_database(Path(folder) / "tables.duckdb", arguments.memory)
        try:
            con.execute(f"SET threads = {arguments.threads}")
            con.execute(f"SET VARIABLE time = '{arguments.time}'")
            con.execute(f"SET VARIABLE by_time = {arguments.visits == 'icu'}")
            con.execute(MACROS)
            with interruptible(con):
                yield con
        except duckdb.OutOfMemoryException:
            raise BadObservations(
                f"--memory {arguments.memory} is not enough for this source; try more of it, or fewer --threads"
            ) from None
        except (duckdb.IOException, duckdb.InvalidInputException, duckdb.ConversionException) as error:
            if getattr(arguments, "debug", False):
                raise
            raise BadObservations(f"{arguments.source}: {broken_file(error)}{reason_of(error)}") from None
        finally:
            con.close()


def work(arguments: argparse.Namespace) -> int:
    """Reads a source and writes what is made of it."""
    from sources.report import tabulate_codes, write_report  # they draw, which takes a second to load

    arguments.notices = []  # what the report says before all else
    settings_of(arguments)  # options that do not go together are refused before anything is read
    with working_database(arguments) as con, progress(None, 4, arguments.quiet, desc=arguments.command) as steps:
        have = arguments.reader(con, arguments)
        steps.update()
        facts = prepare(con, arguments, have)
        steps.update()
        facts["codes"] = tabulate_codes(con, arguments.concepts or given_concepts(arguments.synonyms))
        steps.update()
        facts["labels"] = write_labels(con, arguments)
        write_report(con, arguments, facts, LEFT_OUT)
        steps.update()
    log.info(
        "%s: %d observations of %d visits from %d rows; left out: %s",
        getattr(arguments, "shown", arguments.out),
        facts["observations"],
        facts["visits_with_observations"],
        facts["rows"],
        ", ".join(f"{n} {reason}" for reason, n in facts["left_out"].items()) or "nothing",
    )
    for notice in arguments.notices:
        log.warning("%s", notice)
    for name, n in facts["rejected_lines"].items():
        log.warning("%s: %d lines are no rows of it and left out; is the file UTF-8?", name, n)
    return DONE


def mixed_offsets(offsets: Iterable[str]) -> str:
    """What is wrong with times of such offsets from UTC (``Z``, ``-05:00``, or empty for none); empty for nothing. One
    hour more in summer is right.

    >>> mixed_offsets(["-05:00", "-04:00"]), mixed_offsets(["Z", "-05:00"])[:40]
    ('', "The times have the offsets '-05:00', 'Z'")
    """
    found = sorted(set(offsets))
    hours = [
        0.0 if text in ("", "Z") else int(text[:3]) + int(text[0] + (text[3:].strip(":") or "0")) / 60 for text in found
    ]
    if len(found) < 2 or ("" not in found and max(hours) - min(hours) <= 1):
        return ""
    shown = listed([text or "none" for text in found])
    return (
        f"The times have the offsets {shown}. The clock's time is kept and the offset is not applied, so that times of "
        "different offsets do not go together: convert them to one zone first"
    )


def broken_file(error: Exception) -> str:
    """The name of the file that DuckDB speaks of, where it does."""
    match = re.search(r"[^\s\"':]+\.(csv\.gz|csv|parquet|ndjson|json)\b", str(error))
    return f"{Path(match[0]).name}: " if match else ""


def prepare(con: duckdb.DuckDBPyConnection, arguments: argparse.Namespace, have: dict[str, bool]) -> dict[str, Any]:
    """From the source's tables to `observations.parquet`; gives the facts for the report."""
    complete_tables(con, arguments, have)
    facts: dict[str, Any] = {"source": arguments.command, "time": arguments.time, "visits_are": arguments.visits}
    facts |= visits_of(con, arguments)
    observations = arguments.out / "observations.parquet"
    con.execute(PLACED)
    facts["rows"] = scalar(con, "SELECT count(*) FROM rows")
    if not facts["rows"]:
        raise BadObservations(f"{arguments.source}: the tables of measurements are empty")
    write_parquet(con, SELECT_OBSERVATIONS, observations)
    con.execute(f"CREATE VIEW observations AS SELECT * FROM read_parquet('{sql_text(observations)}')")
    con.execute(COUNTED)
    given_by_time = "SELECT coalesce(sum(n), 0)::BIGINT FROM counted WHERE reason IS NULL AND by_time"
    facts["visit_by_time"] = scalar(con, given_by_time)
    if n := scalar(con, "SELECT sum(with_comma)::BIGINT FROM counted"):
        arguments.notices.append(f"{n} values have a comma, such as 37,5, and are left out: write them with a point")
    if table_exists(con, "source_left_out"):  # what the source could not make a row of
        con.execute("INSERT INTO left_out SELECT reason, code, n FROM source_left_out")
        facts["rows"] += scalar(con, "SELECT coalesce(sum(n), 0)::BIGINT FROM source_left_out")
    facts["left_out"] = dict(
        con.execute("SELECT reason, sum(n)::BIGINT FROM left_out GROUP BY reason ORDER BY reason").fetchall()
    )
    facts["observations"] = scalar(con, "SELECT count(*) FROM observations")
    measured, midnight = con.execute(MIDNIGHT).fetchone()
    if midnight:
        arguments.notices.append(
            f"Most times of {listed(midnight)} are midnight. If the source only has their dates, a result seems known "
            "before it was, and a model that learns from it is too good to be true"
        )
    with_rows = "SELECT count(*) FROM (SELECT DISTINCT client, visit_id FROM observations)"
    facts["visits_with_observations"] = scalar(con, with_rows)
    if not measured:
        observations.unlink()
        reasons = "; ".join(f"{n} x {LEFT_OUT[reason]}" for reason, n in facts["left_out"].items())
        raise BadObservations(f"{arguments.source}: no observation in {facts['rows']} rows ({reasons})")
    facts["rejected_lines"] = rejected(con)
    facts["notices"] = [f"{notice}." for notice in arguments.notices]
    facts["has"] = {kind: bool(have.get(kind)) for kind in KINDS}
    return facts


def scalar(con: duckdb.DuckDBPyConnection, query: str) -> Any:
    return con.execute(query).fetchone()[0]


def table_exists(con: duckdb.DuckDBPyConnection, name: str) -> bool:
    return scalar(con, f"SELECT count(*) FROM duckdb_tables() WHERE table_name = '{name}'") > 0


def sql_text(value: Any) -> str:
    return str(value).replace("'", "''")


def rejected(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """{file: lines that were no rows of its table}"""
    if table_exists(con, "source_problems"):
        return dict(con.execute("SELECT file, n FROM source_problems").fetchall())
    if not table_exists(con, "reject_errors"):
        return {}
    return {
        Path(path).name: n
        for path, n in con.execute(
            # a quote that is not closed takes the lines behind it along
            "SELECT file_path, sum(n)::BIGINT FROM (SELECT file_path, line, 1 + max(length(own) - length("
            "replace(own, chr(10), ''))) AS n FROM (SELECT *, rtrim(csv_line, chr(10)) AS own FROM reject_errors) "
            "JOIN reject_scans USING (scan_id, file_id) GROUP BY ALL) GROUP BY 1 ORDER BY 1"
        ).fetchall()
    }


def write_parquet(con: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    """The rows of `query` as a file that is written whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        con.execute(f"COPY ({query}) TO '{sql_text(part)}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 100000)")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def complete_tables(con: duckdb.DuckDBPyConnection, arguments: argparse.Namespace, have: dict[str, bool]) -> None:
    """Empty tables for what the source lacks; `rows` from `source_rows`, which it reads once."""
    there = {row[0] for row in con.execute("SELECT table_name FROM information_schema.tables").fetchall()}
    for name, columns in CONTRACT.items():
        if name not in there:
            con.execute(f"CREATE TABLE {name} ({columns})")
    con.execute(
        "CREATE TABLE sources_have AS SELECT unnest(?::VARCHAR[]) AS name, unnest(?::BOOLEAN[]) AS present",
        [list(KINDS), [bool(have.get(kind)) for kind in KINDS]],
    )
    have_columns = {row[0] for row in con.execute("DESCRIBE source_rows").fetchall()}
    number = "finite(try_cast(number AS DOUBLE))" if "number" in have_columns else "NULL"
    names = [part.split()[0] for part in CONTRACT["rows"].split(", ")]
    # text that is a number needs no second copy of it
    cells = {name: name if name in have_columns else "NULL" for name in names} | {"number": number}
    con.execute(f"INSERT INTO rows SELECT {', '.join(cells[name] for name in names)} FROM source_rows")
    con.execute(SPLIT_PRESSURES)
    con.execute(ADD_COMA_SCALE)
    con.execute(ADD_PATIENTS)


def visits_of(con: duckdb.DuckDBPyConnection, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes `stays`, the visits that rows are given to; gives facts about them."""
    if arguments.visits == "icu":
        if not scalar(con, "SELECT count(*) FROM icu_stays"):
            raise BadObservations(f"{arguments.source}: no intensive-care stay is told, so --visits icu finds none")
        stays = "SELECT stay_id AS visit_id, client, stay_start AS visit_start, stay_end AS visit_end FROM icu_stays"
    else:
        stays = "SELECT visit_id, client, visit_start, visit_end FROM visits"
    con.execute(STAYS.format(stays=stays))
    total, usable = con.execute(f"SELECT count(*), count(DISTINCT (client, visit_id)) FROM ({stays})").fetchone()
    n = scalar(con, "SELECT count(*) FROM stays")
    if not n:
        raise BadObservations(f"{arguments.source}: no hospital stay is among the visits, or none has a start")
    return {
        "visits": n,
        "visits_left_out": {
            key: count
            for key, count in {"the same visit_id again": total - usable, "no start": usable - n}.items()
            if count
        },
    }


# The visits that rows are given to. A visit_id that a client has twice counts once: the row that starts first. By time
# a row belongs to the visit of its client that started last.
STAYS = """
CREATE TABLE stays AS
WITH once AS (
    SELECT * FROM ({stays}) WHERE visit_start IS NOT NULL AND visit_id IS NOT NULL AND client IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY client, visit_id ORDER BY visit_start, visit_end) = 1
)
SELECT *, lead(visit_start) OVER (PARTITION BY client ORDER BY visit_start, visit_id) AS next_start FROM once;
"""

# `rows` with the visit that each belongs to, and why it is no observation.
PLACED = """
CREATE VIEW timed AS
SELECT *, CASE WHEN getvariable('time') = 'charted' THEN charted
               ELSE coalesce(greatest(available, charted), charted) END AS time
FROM rows;
CREATE VIEW placed AS
SELECT coalesce(own.visit_id, by_time.visit_id) AS visit_id, coalesce(own.client, by_time.client) AS client,
       own.visit_id IS NULL AS by_time,
       r.time AS observation_date, r.code AS observation_type_code, r.value,
       coalesce(r.number, number_in(r.value)) AS observation_value,
       r.low AS reference_range_min, r.high AS reference_range_max, nullif(trim(r.unit), '') AS unit,
       CASE WHEN trim(coalesce(r.code, '')) = '' THEN 'no_code'
            WHEN r.time IS NULL THEN 'no_time'
            WHEN coalesce(own.visit_id, by_time.visit_id) IS NULL THEN 'no_visit'
            WHEN r.number IS NULL AND trim(coalesce(r.value, '')) = '' THEN 'no_value'
            WHEN coalesce(r.number, number_in(r.value)) IS NULL THEN 'no_number' END AS reason
FROM timed r
LEFT JOIN stays own ON own.visit_id = r.visit_id AND own.client = r.client AND NOT getvariable('by_time')
LEFT JOIN stays by_time
       ON own.visit_id IS NULL AND by_time.client = r.client AND r.charted >= by_time.visit_start
      AND r.charted <= coalesce(by_time.visit_end, 'infinity'::TIMESTAMP)
      AND r.charted < coalesce(by_time.next_start, 'infinity'::TIMESTAMP);
"""

SELECT_OBSERVATIONS = """
SELECT visit_id, client, observation_date, observation_type_code, observation_value,
       reference_range_min, reference_range_max, unit
FROM placed WHERE reason IS NULL
ORDER BY client, visit_id, observation_date, observation_type_code, observation_value,
         reference_range_min, reference_range_max, unit
"""

# How many observations were measured, and the codes of those that are nearly all at midnight.
MIDNIGHT = """
SELECT coalesce(sum(n), 0)::BIGINT, list(code ORDER BY n DESC, code) FILTER (n >= 20 AND at_midnight > 0.5)
FROM (SELECT observation_type_code AS code, count(*) AS n,
             avg((observation_date = date_trunc('day', observation_date))::INTEGER) AS at_midnight
      FROM observations WHERE observation_type_code NOT IN ('Age', 'Gender') GROUP BY code)
"""

COUNTED = r"""
CREATE TABLE counted AS
SELECT reason, observation_type_code AS code, by_time, count(*) AS n,
       count(*) FILTER (reason = 'no_number' AND regexp_full_match(value, '\s*-?\d+,\d+\s*')) AS with_comma
FROM placed GROUP BY ALL;
CREATE TABLE left_out AS
SELECT reason, code, sum(n)::BIGINT AS n FROM counted WHERE reason IS NOT NULL GROUP BY ALL;
"""

# A blood pressure that is charted as 120/80 becomes two rows.
SPLIT_PRESSURES = rf"""
CREATE TEMP VIEW pairs AS
SELECT r.* EXCLUDE (code), r.rowid AS row_number, string_split(value, '/') AS two
FROM rows r LEFT JOIN (SELECT code, min(name) AS name FROM code_names GROUP BY code) n USING (code)
WHERE regexp_full_match(r.value, '\s*\d{{2,3}}\s*/\s*\d{{2,3}}\s*') AND r.number IS NULL
  AND (regexp_matches(lower(concat(r.code, ' ', n.name)), '\bn?i?a?bp\b|blood pressure')
       OR r.code IN ({", ".join(f"'{code}'" for code in BLOOD_PRESSURE_CODES)}));
INSERT INTO rows BY NAME
SELECT * EXCLUDE (two, row_number, number), try_cast(two[1] AS DOUBLE) AS number, '{SYSTOLIC}' AS code FROM pairs
UNION ALL BY NAME
SELECT * EXCLUDE (two, row_number, number), try_cast(two[2] AS DOUBLE) AS number, '{DIASTOLIC}' AS code FROM pairs;
DELETE FROM rows WHERE rowid IN (SELECT row_number FROM pairs);
DROP VIEW pairs;
INSERT INTO code_names VALUES ('{SYSTOLIC}', 'systolic blood pressure'), ('{DIASTOLIC}', 'diastolic blood pressure');
"""

# Age and sex at the start of the visit. Years of birth are all that every source has: the age is their difference.
ADD_PATIENTS = """
INSERT INTO rows
WITH starts AS (
    SELECT visit_id, client, visit_start FROM visits WHERE NOT getvariable('by_time')
    UNION ALL
    SELECT stay_id, client, stay_start FROM icu_stays WHERE getvariable('by_time')
)
SELECT visit_id, client, visit_start, visit_start, 'Age', NULL, year(visit_start) - birth_year, 'years', NULL, NULL
FROM starts JOIN patients_known USING (client) WHERE birth_year IS NOT NULL
UNION ALL
SELECT visit_id, client, visit_start, visit_start, 'Gender', NULL,
       CASE lower(left(sex, 1)) WHEN 'm' THEN 1 WHEN 'f' THEN 0 END, NULL, NULL, NULL
FROM starts JOIN patients_known USING (client) WHERE lower(left(sex, 1)) IN ('m', 'f');
INSERT INTO code_names VALUES ('Age', 'age in years'), ('Gender', 'sex: 1 male, 0 female');
"""

# The Glasgow coma scale where only its three parts are charted, all at one time.
ADD_COMA_SCALE = """
CREATE TABLE coma_parts AS
SELECT code, CASE WHEN regexp_matches(lower(name), 'eye') THEN 1 WHEN regexp_matches(lower(name), 'verbal') THEN 2
                  ELSE 3 END AS part
FROM (SELECT code, any_value(name ORDER BY name) AS name FROM code_names GROUP BY code)
WHERE regexp_matches(lower(name), 'gcs|glasgow') AND regexp_matches(lower(name), 'eye|verbal|motor');
INSERT INTO coma_parts
SELECT * FROM (VALUES ('9267-6', 1), ('9270-0', 2), ('9268-4', 3), ('220739', 1), ('223900', 2), ('223901', 3))
WHERE col0 NOT IN (SELECT code FROM coma_parts);
INSERT INTO rows
SELECT any_value(visit_id ORDER BY visit_id), client, charted, max(available), '9269-2', NULL,
       sum(score), NULL, NULL, NULL
FROM (
    SELECT r.client, r.charted, p.part, any_value(r.visit_id ORDER BY r.visit_id) AS visit_id,
           max(r.available) AS available, min(coalesce(r.number, number_in(r.value))) AS score
    FROM rows r JOIN coma_parts p USING (code)
    GROUP BY r.client, r.charted, p.part
)
WHERE score IS NOT NULL AND charted IS NOT NULL
GROUP BY client, charted HAVING count(*) = 3;
INSERT INTO code_names VALUES ('9269-2', 'Glasgow coma scale, sum of its three parts');
"""
