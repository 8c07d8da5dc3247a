"""OMOP CDM 5.3 and 5.4: a folder of CSV or Parquet files, or a database by its SQLAlchemy URL."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from feature_pipeline import BadObservations
from sources.prepare import add_source, run_sql, scalar
from sources.tables import Table, add_database, add_folder, is_url

TABLES = (
    Table(
        "measurement",
        ("person_id", "measurement_concept_id", "measurement_date", "value_as_number"),
        (
            *("visit_occurrence_id", "measurement_datetime", "measurement_time", "measurement_source_value"),
            *("value_source_value", "unit_concept_id", "unit_source_value", "range_low", "range_high"),
        ),
        required=True,
    ),
    Table(
        "visit_occurrence",
        ("visit_occurrence_id", "person_id", "visit_concept_id", "visit_start_date", "visit_end_date"),
        ("visit_start_datetime", "visit_end_datetime", "visit_source_value"),
        required=True,
    ),
    Table(
        "person",
        ("person_id",),
        ("year_of_birth", "gender_concept_id", "gender_source_value", "person_source_value"),
    ),
    Table(
        "observation",
        ("person_id", "observation_concept_id", "observation_datetime", "value_as_number"),
        (
            *("visit_occurrence_id", "observation_source_value", "value_as_string", "value_source_value"),
            *("unit_concept_id", "unit_source_value"),
        ),
    ),
    Table("concept", ("concept_id", "concept_name", "concept_code", "vocabulary_id")),
    Table("death", ("person_id", "death_date"), ("death_datetime",)),
    Table("care_site", ("care_site_id", "care_site_name")),
    Table(
        "visit_detail",
        ("visit_detail_id", "visit_occurrence_id", "visit_detail_start_datetime", "visit_detail_end_datetime"),
        ("visit_detail_concept_id", "care_site_id"),
    ),
    Table(
        "drug_exposure",
        ("drug_exposure_id", "person_id", "drug_concept_id", "drug_exposure_start_date"),
        (
            *("drug_exposure_start_datetime", "drug_exposure_end_date", "drug_exposure_end_datetime"),
            *("drug_type_concept_id", "drug_source_concept_id", "drug_source_value", "visit_occurrence_id"),
            *("route_concept_id", "route_source_value"),
        ),
    ),
    Table(
        "specimen",
        ("specimen_id", "person_id", "specimen_date"),
        ("specimen_datetime", "specimen_concept_id", "specimen_source_value"),
    ),
    Table(
        "procedure_occurrence",
        ("person_id", "procedure_concept_id"),
        ("procedure_datetime", "procedure_end_datetime", "visit_occurrence_id"),
    ),
)


def read(con: Any, arguments: argparse.Namespace) -> dict[str, bool]:
    con.execute(f"SET VARIABLE ids = '{arguments.ids}'")
    con.execute(f"SET VARIABLE codes = '{arguments.codes}'")
    if is_url(arguments.source):
        add_database(con, TABLES, arguments)
    else:
        add_folder(con, TABLES, Path(arguments.source))
    for table in ("measurement", "visit_occurrence"):
        if not scalar(con, f"SELECT count(*) FROM (FROM {table} LIMIT 1)"):
            raise BadObservations(f"{arguments.source}: the table {table} is empty")
    run_sql(con, "omop")
    names = ("icu_stays", "antibiotics", "cultures", "vasopressors", "ventilation", "urine")
    have = {name: bool(scalar(con, f"SELECT count(*) FROM {name}")) for name in names}
    return have | {"administrations": bool(scalar(con, "SELECT count(*) FROM antibiotics WHERE administered"))}


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py omop``."""
    example = "postgresql+psycopg://reader@localhost/omop --out prepared"
    command = add_source(commands, "omop", __doc__, example, read, "FOLDER|URL", "folder of tables, or database")
    option = command.add_argument
    option(
        "--ids",
        choices=("omop", "source"),
        default="omop",
        help="ids of clients and visits: those of the tables, or person_source_value and visit_source_value",
    )
    option(
        "--codes",
        choices=("standard", "source"),
        default="standard",
        help="codes of the standard concepts, such as LOINC, or the hospital's own (measurement_source_value)",
    )
    option("--schema", help="schema of the tables in a database")
