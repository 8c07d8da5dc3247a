"""Turn the PhysioNet/CinC Challenge 2019 files into this project's observations and labels.

The challenge distributes one `.psv` file a patient: hourly rows, one column a vital sign or laboratory value,
`NaN` where nothing was measured. This script makes the long format out of them:

- `visit_id` is the patient number of the file name, `client` a prefix and the same number (`p000001.psv` of
  `training_setA` is visit 1 of client `A000001`).
- `observation_date` is a made-up admission, 2019-01-01 00:00, plus the hour in the ICU (`ICULOS`): the
  challenge gives no dates.
- One row per measured value. Age, Gender, Unit1, Unit2 and HospAdmTime are written once, at the first hour.
- Reference ranges are generic adult ranges, the same for everyone.
- The challenge's hourly label turns 1 six hours before clinical onset, so `sepsis_onset` is the label's start
  plus 6 h. `first_hour` and `last_hour` bound the rows that the challenge scores.

Data: Reyna MA, Josef CS, Jeter R, et al. Early Prediction of Sepsis From Clinical Data: The
PhysioNet/Computing in Cardiology Challenge 2019. Crit Care Med 2020;48:210-217.
Files: doi 10.13026/v64v-d857 (CC BY 4.0).
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from common.artifacts import write_tables
from common.command_line import DONE, SOME_FAILED, add_command, log, progress, table_path
from common.pseudonyms import lasting_pseudonyms, pseudonymized
from feature_pipeline import BadConfig

ADMISSION = np.datetime64("2019-01-01T00:00:00", "us")
ONSET_AFTER_LABEL_HOURS = 6
MOST_HOURS = 100_000  # eleven years; later hours would make dates that no reader takes
STATIC_CODES = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime")
# Generic adult ranges, in the challenge's units; None where a range would mean nothing.
REFERENCE_RANGES: dict[str, tuple[float, float] | None] = {
    "HR": (60, 100),  # beats/min
    "O2Sat": (95, 100),  # %
    "Temp": (36.1, 37.2),  # deg C
    "SBP": (90, 120),  # mm Hg
    "MAP": (70, 100),  # mm Hg
    "DBP": (60, 80),  # mm Hg
    "Resp": (12, 20),  # breaths/min
    "EtCO2": (35, 45),  # mm Hg
    "BaseExcess": (-2, 2),  # mmol/L
    "HCO3": (22, 28),  # mmol/L
    "FiO2": None,  # fraction
    "pH": (7.35, 7.45),
    "PaCO2": (35, 45),  # mm Hg
    "SaO2": (95, 100),  # %
    "AST": (10, 40),  # IU/L
    "BUN": (8, 20),  # mg/dL
    "Alkalinephos": (30, 120),  # IU/L
    "Calcium": (8.6, 10.2),  # mg/dL
    "Chloride": (98, 106),  # mmol/L
    "Creatinine": (0.5, 1.3),  # mg/dL
    "Bilirubin_direct": (0.1, 0.3),  # mg/dL
    "Glucose": (70, 99),  # mg/dL
    "Lactate": (0.5, 2.0),  # mmol/L
    "Magnesium": (1.6, 2.6),  # mg/dL
    "Phosphate": (3.0, 4.5),  # mg/dL
    "Potassium": (3.5, 5.0),  # mmol/L
    "Bilirubin_total": (0.3, 1.0),  # mg/dL
    "TroponinI": (0, 0.04),  # ng/mL
    "Hct": (37, 50),  # %
    "Hgb": (12, 18),  # g/dL
    "PTT": (25, 35),  # s
    "WBC": (4, 11),  # 1000/uL
    "Fibrinogen": (200, 400),  # mg/dL
    "Platelets": (150, 450),  # 1000/uL
}
PSV_COLUMNS = (*REFERENCE_RANGES, *STATIC_CODES, "ICULOS", "SepsisLabel")  # in the order of the files
CODES = PSV_COLUMNS[:-2]


class BadPsvFile(ValueError):
    """A file that is not one patient of the challenge; the message says why, and quotes no measured value."""


class Patient(NamedTuple):
    """One patient's measured values in order of time, and what the label column says."""

    visit_id: int
    client: str
    hours: np.ndarray  # (n_values,) hour in the ICU
    codes: np.ndarray  # (n_values,) index into CODES
    values: np.ndarray  # (n_values,)
    label_hour: int | None  # first hour with label 1
    first_hour: int
    last_hour: int


def default_prefix(folder: Path) -> str:
    """`training_setB` gives `B`; any other folder gives its own name and a dash."""
    name = folder.resolve().name
    match = re.search(r"set_?([A-Za-z])$", name)
    return match.group(1).upper() if match else f"{name}-"


def read_patient(path: Path, prefix: str) -> Patient:
    """Read one `.psv` file. Raises BadPsvFile, or OSError where it can't be read."""
    name = re.fullmatch(r"p(\d+)", path.stem)
    if name is None:
        raise BadPsvFile("the file name is not p and the patient number, such as p000001.psv")
    table = _read_table(path)
    measured, hours, label = table[:, : len(CODES)], table[:, -2], table[:, -1]
    # Negated so that NaN fails too.
    if not (np.all(hours == np.floor(hours)) and hours[0] >= 0 and np.all(np.diff(hours) > 0)):
        raise BadPsvFile("column ICULOS must hold whole hours, each later than the one before")
    if hours[-1] > MOST_HOURS:
        raise BadPsvFile(f"column ICULOS goes beyond {MOST_HOURS} hours: no stay is that long")
    if not np.all((label == 0) | (label == 1)):
        raise BadPsvFile("column SepsisLabel must hold 0 or 1 only")
    hours = hours.astype(np.int64)
    measured[1:, len(REFERENCE_RANGES) :] = np.nan  # the static columns, repeated on every row of the file
    row, code = np.nonzero(~np.isnan(measured))
    label_hour = int(hours[np.argmax(label)]) if label.any() else None
    number = name.group(1)
    return Patient(
        visit_id=int(number),
        client=prefix + number,
        hours=hours[row],
        codes=code,
        values=measured[row, code],
        label_hour=label_hour,
        first_hour=int(hours[0]),
        last_hour=int(hours[-1]),
    )


def _read_table(path: Path) -> np.ndarray:
    """The numbers of a file, shape (n_hours, n_columns)."""
    # A plain parse takes a fifth of the time of pandas.read_csv, which matters for 20,000 small files.
    try:
        header, *lines = path.read_text(encoding="ascii").splitlines() or [""]
    except UnicodeDecodeError:
        raise BadPsvFile("not a text file") from None
    names = header.split("|")
    if names != list(PSV_COLUMNS):
        missing = [name for name in PSV_COLUMNS if name not in names]
        detail = f"without {', '.join(missing[:5])}" if missing else "in another order or with extra columns"
        raise BadPsvFile(f"the header is not the challenge's {len(PSV_COLUMNS)} columns: {detail}")
    if not lines:
        raise BadPsvFile("no rows after the header")
    rows = [line.split("|") for line in lines]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(PSV_COLUMNS):
            raise BadPsvFile(f"line {number} has {len(row)} fields, expected {len(PSV_COLUMNS)}")
    try:
        table = np.array([list(map(float, row)) for row in rows])
    except ValueError:
        raise BadPsvFile(_first_non_number(rows)) from None
    if np.isinf(table).any():
        raise BadPsvFile("an infinite value")
    return table


def _first_non_number(rows: list[list[str]]) -> str:
    for number, row in enumerate(rows, start=2):
        for name, text in zip(PSV_COLUMNS, row, strict=True):
            try:
                float(text)
            except ValueError:
                return f"line {number}, column {name}: not a number"
    raise AssertionError("every field is a number")


def read_folders(
    folders: Iterable[Path], prefix: str | None = None, quiet: bool = True
) -> tuple[list[Patient], list[str]]:
    """Read every patient in the folders, in order of file name.

    Returns the patients and one line for each file or folder that could not be used.
    """
    patients: list[Patient] = []
    failures: list[str] = []
    seen: set[str] = set()
    files: list[tuple[Path, str]] = []
    for folder in folders:
        if not folder.is_dir():
            raise BadConfig(f"{folder}: no such folder")
        found = sorted(folder.glob("*.psv"))
        if not found:
            failures.append(f"{folder}: no .psv files in this folder")
        files += [(path, default_prefix(folder) if prefix is None else prefix) for path in found]
    for path, client_prefix in progress(files, len(files), quiet, unit="file"):
        try:
            patient = read_patient(path, client_prefix)
            if patient.client in seen:
                raise BadPsvFile("the same client was read from another folder; give each its own prefix")
        except BadPsvFile as error:
            failures.append(f"{path}: {error}")
        except OSError as error:
            failures.append(f"{path}: {error.strerror}")
        else:
            seen.add(patient.client)
            patients.append(patient)
    return patients, failures


def to_frames(patients: list[Patient]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Observations and labels of at least one patient, in the order given."""
    sizes = [len(patient.values) for patient in patients]
    codes = np.concatenate([patient.codes for patient in patients])
    ranges = np.array([REFERENCE_RANGES.get(code) or (np.nan, np.nan) for code in CODES], dtype=float)
    visits = np.array([patient.visit_id for patient in patients], dtype=np.int64)
    clients = pd.Series([patient.client for patient in patients], dtype="str")
    observations = pd.DataFrame(
        {
            "visit_id": np.repeat(visits, sizes),
            "client": clients.take(np.repeat(np.arange(len(patients)), sizes)).array,
            "observation_date": _dates(np.concatenate([patient.hours for patient in patients])),
            "observation_type_code": pd.Series(CODES, dtype="str").take(codes).array,
            "observation_value": np.concatenate([patient.values for patient in patients]),
            "reference_range_min": ranges[codes, 0],
            "reference_range_max": ranges[codes, 1],
        }
    )
    septic = np.array([patient.label_hour is not None for patient in patients])
    onset = _dates(np.array([patient.label_hour or 0 for patient in patients]) + ONSET_AFTER_LABEL_HOURS)
    onset[~septic] = np.datetime64("NaT")
    labels = pd.DataFrame(
        {
            "visit_id": visits,
            "client": clients,
            "sepsis": septic.astype(np.int64),
            "sepsis_onset": onset,
            "first_hour": np.array([patient.first_hour for patient in patients], dtype=np.int64),
            "last_hour": np.array([patient.last_hour for patient in patients], dtype=np.int64),
        }
    )
    return observations, labels


def _dates(hours: np.ndarray) -> np.ndarray:
    return ADMISSION + hours.astype("timedelta64[h]")


def work(arguments: argparse.Namespace) -> int:
    if arguments.observations.resolve() == arguments.labels.resolve():
        raise BadConfig("--observations and --labels are the same file")
    names = lasting_pseudonyms() if arguments.pseudonymize else None
    patients, failures = read_folders(arguments.folders, arguments.client_prefix, arguments.quiet)
    for line in failures:
        log.error("error: %s", line)
    if not patients:
        raise BadConfig("no usable .psv file, nothing was written")
    observations, labels = to_frames(patients)
    if names:
        observations = pseudonymized(observations, names)
        labels = pseudonymized(labels, names, also=("first_hour", "last_hour"))
    write_tables({arguments.observations: observations, arguments.labels: labels})
    septic, n = labels["sepsis"].sum(), len(labels)
    log.info("%d patients (%d septic), %d observations; %d inputs failed", n, septic, len(observations), len(failures))
    return SOME_FAILED if failures else DONE


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py physionet2019``."""
    command = add_command(
        commands,
        "physionet2019",
        "Turns the .psv files of the PhysioNet/CinC Challenge 2019 (Reyna et al., Crit Care Med 2020;48:210-217, "
        "doi 10.13026/v64v-d857) into observations and labels.",
        "python prepare_data.py physionet2019 training_setA --observations A.parquet --labels A_labels.parquet",
        work,
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="PSV_FOLDER", help="folder of .psv files")
    for name in ("observations", "labels"):
        command.add_argument(f"--{name}", required=True, type=table_path, metavar="OUT", help=f"{name} to write")
    command.add_argument(
        "--client-prefix",
        metavar="TEXT",
        help="what stands before the patient number in `client`, for every folder; else the letter of a folder named "
        "like training_setA, or the folder's name and a dash",
    )
    command.add_argument(
        "--pseudonymize",
        action="store_true",
        help="client and visit as keyed hashes, dates shifted by client; the key is in SEPSIS_PSEUDONYM_KEY",
    )
