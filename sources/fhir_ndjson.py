"""FHIR R4: Bulk Data exports (.ndjson, .ndjson.gz) and Bundles (.json, .json.gz).

Observations are read as the service's /fhir/predict reads them; a patient's and an encounter's ids are the identifiers
that the hospital gave them, where they have such.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.command_line import progress
from common.fhir import NotUsed, Reading, readings
from feature_pipeline import BadObservations
from sources.prepare import add_source, mixed_offsets, run_sql
from sources.tables import files_in

SUFFIXES = (".ndjson", ".ndjson.gz", ".json", ".json.gz")
BATCH = 50_000
# kinds that fhir.sql reads beside Observations
KINDS = {"Patient", "Encounter", "Specimen", "Medication", "MedicationRequest", "MedicationAdministration", "Procedure"}
KINDS |= {"Microbiology"}  # which an Observation may be
# an Observation that is about a culture: its codes, category or profile say so
_MICROBIOLOGY = re.compile(r"micro(biology|-)|culture|bacteria identified|gram stain|\bMB\b", re.IGNORECASE)

RESOURCES = pa.schema([(name, pa.string()) for name in ("kind", "id", "own", "body")])
READINGS = pa.schema(
    [
        *((name, pa.string()) for name in ("patient", "encounter", "issued", "code", "name", "specimen", "unit")),
        ("time", pa.timestamp("us")),
        *((name, pa.float64()) for name in ("value", "low", "high")),
    ]
)


# The offsets of the times that are read beside those of Observations; the server's own time is none of them.
OFFSETS = r"""
SELECT offset_of(issued) FROM readings WHERE issued IS NOT NULL
UNION
SELECT offset_of(unnest(regexp_extract_all(
    regexp_replace(body, '"lastUpdated": "[^"]*"', '', 'g'), '"(\d{4}-\d\d-\d\dT[^"]*)"', 1))) FROM resources
"""


class Batches:
    """Rows that go to a DuckDB table some thousand at a time."""

    def __init__(self, con: Any, table: str, schema: pa.Schema):
        self.con, self.table, self.schema, self.rows = con, table, schema, []
        con.register(f"{table}_batch", schema.empty_table())
        con.execute(f"CREATE TABLE {table} AS SELECT * FROM {table}_batch")

    def add(self, *row: Any) -> None:
        self.rows.append(row)
        if len(self.rows) >= BATCH:
            self.write()

    def write(self) -> None:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.schema)
        batch = pa.table(
            [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)],
            schema=self.schema,
        )
        self.con.register(f"{self.table}_batch", batch)
        self.con.execute(f"INSERT INTO {self.table} SELECT * FROM {self.table}_batch")
        self.rows.clear()


def resources_of(path: Path, problems: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(full URL or "", resource) of a file. A line that is no JSON object is counted, half a gzip file is an error."""
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            bundle = ".ndjson" not in path.name
            for text in [file.read()] if bundle else file:
                if not text.strip():
                    continue
                try:
                    resource = json.loads(text)
                    if b"\\ud" in text.lower():
                        json.dumps(resource, ensure_ascii=False).encode()
                except ValueError:  # no JSON, or half a character
                    resource = None
                if not isinstance(resource, dict):
                    problems[path.name] += 1
                elif resource.get("resourceType") == "Bundle":
                    for entry in resource.get("entry") or []:
                        if isinstance(entry, dict) and isinstance(entry.get("resource"), dict):
                            url = entry.get("fullUrl")
                            yield url if isinstance(url, str) else "", entry["resource"]
                        else:
                            problems[path.name] += 1
                else:
                    yield "", resource
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadObservations(f"{path}: it is no whole gzip file") from None


def own_identifier(resource: dict[str, Any]) -> str | None:
    """The number that the hospital knows a patient or stay by: a medical record number (MR) or visit number (VN) first,
    then the usual identifier, then any; but not one that is retired."""
    found = [i for i in resource.get("identifier") or [] if isinstance(i, dict) and i.get("value")]
    found = [identifier for identifier in found if identifier.get("use") != "old"]

    def rank(identifier: dict[str, Any]) -> tuple[bool, bool]:
        kind = identifier.get("type")
        codings = kind.get("coding") or [] if isinstance(kind, dict) else []
        return not any(c.get("code") in ("MR", "VN") for c in codings), identifier.get("use") != "usual"

    return str(min(found, key=rank)["value"]) if found else None


def add_observation(
    resource: dict[str, Any], target: Batches, left_out: Counter[tuple[str, str]], offsets: set[timedelta | None]
) -> None:
    names: dict[str, str] = {}
    for part in readings(resource):
        if isinstance(part, NotUsed):
            left_out[part.reason, part.code] += 1
            continue
        if not names:
            names = _displays(resource)
        target.add(*_row(part, resource, names))
        offsets.add(part.time.utcoffset())


def _row(part: Reading, resource: dict[str, Any], names: dict[str, str]) -> tuple[Any, ...]:
    specimen = (resource.get("specimen") or {}).get("reference")
    code = part.codes[0]
    bounds = [bound[0] if bound is not None and bound[1] == part.unit else None for bound in (part.low, part.high)]
    encounter = part.encounter.value if part.encounter else None
    time: datetime = part.time.replace(tzinfo=None)  # the wall clock
    return (
        *(part.patient.value, encounter, resource.get("issued"), code, names.get(code), specimen, part.unit),
        *(time, part.value, *bounds),
    )


def _displays(resource: dict[str, Any]) -> dict[str, str]:
    """{code: its name} of an Observation and its components."""
    names = {}
    for part in (resource, *(resource.get("component") or [])):
        concept = part.get("code") or {}
        for coding in concept.get("coding") or []:
            names[coding.get("code")] = coding.get("display") or concept.get("text")
    return names


def is_microbiology(resource: dict[str, Any]) -> bool:
    parts = [resource.get("code"), resource.get("category"), (resource.get("meta") or {}).get("profile")]
    return _about_microbes(json.dumps(parts))


@lru_cache(maxsize=10_000)  # there are few codes, and many Observations
def _about_microbes(text: str) -> bool:
    return _MICROBIOLOGY.search(text) is not None


def read(con: Any, arguments: argparse.Namespace) -> dict[str, bool]:
    paths = files_in(Path(arguments.source), SUFFIXES)
    if not paths:
        raise BadObservations(f"{arguments.source}: no file that ends in {', '.join(SUFFIXES)}")
    problems: Counter[str] = Counter()
    left_out: Counter[tuple[str, str]] = Counter()
    kinds: Counter[str] = Counter()
    offsets: set[timedelta | None] = set()
    resources, observations = Batches(con, "resources", RESOURCES), Batches(con, "readings", READINGS)
    for path in progress(paths, len(paths), arguments.quiet, unit="file"):
        for url, resource in resources_of(path, problems):
            kind = resource.get("resourceType")
            if not isinstance(kind, str):
                problems[path.name] += 1
                continue
            kinds[kind] += 1
            try:
                if kind == "Observation":
                    add_observation(resource, observations, left_out, offsets)
                    kind = "Microbiology" if is_microbiology(resource) else kind
                if kind in KINDS:
                    name = url.rpartition(":")[2] if url.startswith("urn:") else resource.get("id")
                    resources.add(kind, str(name), own_identifier(resource), json.dumps(resource))
            except (AttributeError, KeyError, TypeError):  # something is no object or list where it should be one
                left_out["bad_resource", ""] += 1
    resources.write()
    observations.write()
    if not kinds["Observation"] or not kinds["Encounter"]:
        found = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) or "no resource"
        missing = "Observation" if not kinds["Observation"] else "Encounter"
        raise BadObservations(f"{arguments.source}: no {missing} among the resources of {len(paths)} files ({found})")
    con.execute("CREATE TABLE source_left_out (reason VARCHAR, code VARCHAR, n BIGINT)")
    if left_out:
        con.executemany(
            "INSERT INTO source_left_out VALUES (?, ?, ?)", [[*key, n] for key, n in sorted(left_out.items())]
        )
    con.execute("CREATE TABLE source_problems (file VARCHAR, n BIGINT)")
    for name, n in sorted(problems.items()):
        con.execute("INSERT INTO source_problems VALUES (?, ?)", [name, n])
    sent = {"" if offset is None else str(timezone(offset))[3:] or "Z" for offset in offsets}
    sent |= {row[0] for row in con.execute(OFFSETS).fetchall() if row[0] is not None}
    if remark := mixed_offsets(sent):
        arguments.notices.append(remark)
    run_sql(con, "fhir")
    return {
        "icu_stays": bool(con.execute("SELECT count(*) FROM icu_stays").fetchone()[0]),
        "antibiotics": bool(kinds["MedicationRequest"] or kinds["MedicationAdministration"]),
        "administrations": bool(kinds["MedicationAdministration"]),
        "cultures": bool(con.execute("SELECT count(*) FROM cultures").fetchone()[0]),
        "vasopressors": bool(kinds["MedicationAdministration"]),
        "ventilation": bool(kinds["Procedure"]),
        "urine": bool(con.execute("SELECT count(*) FROM urine").fetchone()[0]),
    }


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py fhir``."""
    add_source(commands, "fhir", __doc__, "export --out prepared", read, "FOLDER", "folder of .ndjson or .json files")
