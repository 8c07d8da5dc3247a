"""MIMIC-IV 2.x and 3.x: the folders hosp/ and icu/ as PhysioNet publishes them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sources.prepare import add_source, run_sql
from sources.tables import Table, add_folder

TABLES = (
    Table(
        "admissions",
        ("subject_id", "hadm_id", "admittime", "dischtime"),
        ("edregtime", "hospital_expire_flag", "discharge_location"),
        required=True,
    ),
    Table("patients", ("subject_id", "gender", "anchor_age", "anchor_year")),
    Table(
        "labevents",
        ("subject_id", "hadm_id", "itemid", "charttime", "value", "valuenum"),
        ("storetime", "valueuom", "ref_range_lower", "ref_range_upper", "specimen_id"),
        required=True,
    ),
    Table(
        "chartevents",
        ("subject_id", "hadm_id", "charttime", "itemid", "value", "valuenum"),
        ("storetime", "valueuom", "stay_id"),
    ),
    Table("outputevents", ("subject_id", "hadm_id", "charttime", "itemid", "value"), ("storetime", "valueuom")),
    Table("icustays", ("subject_id", "hadm_id", "stay_id", "intime", "outtime")),
    Table("d_items", ("itemid", "label"), ("lownormalvalue", "highnormalvalue")),
    Table("d_labitems", ("itemid", "label"), ("fluid", "category")),
    Table(
        "prescriptions",
        ("subject_id", "hadm_id", "starttime", "stoptime", "drug"),
        ("drug_type", "route", "pharmacy_id"),
    ),
    Table("pharmacy", ("pharmacy_id",), ("route",)),
    Table("emar", ("subject_id", "hadm_id", "charttime", "medication", "event_txt"), ("pharmacy_id",)),
    Table(
        "inputevents",
        ("subject_id", "hadm_id", "stay_id", "starttime", "endtime", "itemid"),
        ("rate", "rateuom", "patientweight", "orderid", "ordercategoryname", "statusdescription"),
    ),
    Table("procedureevents", ("subject_id", "hadm_id", "starttime", "endtime", "itemid")),
    Table(
        "microbiologyevents",
        ("subject_id", "hadm_id", "micro_specimen_id", "chartdate", "charttime", "spec_type_desc"),
        ("org_itemid", "org_name"),
    ),
    Table("diagnoses_icd", ("hadm_id", "icd_code")),
)


def read(con: Any, arguments: argparse.Namespace) -> dict[str, bool]:
    there = set(add_folder(con, TABLES, Path(arguments.source)))
    run_sql(con, "mimic_iv")
    if arguments.labels != "none":
        run_sql(con, "mimic_iv_labels")
    return {
        "icu_stays": "icustays" in there,
        "antibiotics": bool(there & {"prescriptions", "emar"}),
        "administrations": "emar" in there,
        "cultures": "microbiologyevents" in there,
        "vasopressors": "inputevents" in there,
        "ventilation": "procedureevents" in there,
        "urine": "outputevents" in there,
    }


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py mimic-iv``."""
    example = "physionet.org/files/mimiciv/3.1 --out prepared"
    add_source(commands, "mimic-iv", __doc__, example, read, "FOLDER", "the folder that holds hosp/ and icu/")
