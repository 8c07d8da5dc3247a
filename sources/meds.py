"""MEDS 0.3 and 0.4: the Parquet files under data/, with metadata/codes.parquet where it is there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from feature_pipeline import BadConfig, BadObservations
from sources.prepare import add_source, run_sql, scalar
from sources.tables import Table, add_view, columns_of, files_in, scan

EVENT = Table(
    "event",
    ("subject_id", "time", "code", "numeric_value"),
    ("text_value", "hadm_id", "unit", "route", "order_id", "poe_id", "emar_id"),
)
CODE_TABLE = Table("code_table", ("code", "description"), ("parent_codes",))


def read(con: Any, arguments: argparse.Namespace) -> dict[str, bool]:
    folder = Path(arguments.source)
    files = files_in(folder, (".parquet",))
    metadata = [path for path in files if path.parent.name == "metadata"]
    under_data = [path for path in files if "data" in path.relative_to(folder).parts]
    events = under_data or [path for path in files if path not in metadata]
    if not events:
        raise BadConfig(f"{folder}: no Parquet file of events; MEDS has them under data/")
    for path in events:  # all at once would hide which file is of another kind
        if missing := set(EVENT.needs) - columns_of(con, scan([path]), str(path)).keys():
            raise BadObservations(f"{path}: missing column {', '.join(sorted(missing))}; these are no MEDS events")
    add_view(con, EVENT, scan(events), str(folder))
    codes = [path for path in metadata if path.name == "codes.parquet"]
    add_view(con, CODE_TABLE, scan(codes[:1]) if codes else None, str(codes[0]) if codes else "")
    run_sql(con, "meds")
    if not scalar(con, "SELECT count(*) FROM visits"):
        raise BadObservations(f"{folder}: no event is an admission (HOSPITAL_ADMISSION, ADMISSION or VISIT_START)")
    names = ("icu_stays", "antibiotics", "cultures", "vasopressors", "urine")
    have = {name: bool(scalar(con, f"SELECT count(*) FROM {name}")) for name in names}
    return have | {"administrations": bool(scalar(con, "SELECT count(*) FROM antibiotics WHERE administered"))}


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py meds``."""
    add_source(commands, "meds", __doc__, "meds_cohort --out prepared", read, "FOLDER", "folder that holds data/")
