"""Labels of past visits: which became septic, and when."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import pandas as pd

from feature_pipeline import (
    NO_TIME,
    BadObservations,
    as_text,
    listed,
    parse_times,
)

LABEL_COLUMNS = ("visit_id", "client", "sepsis")
RETROSPECTIVE = (
    "RETROSPECTIVE: the labels have no onset times, so each visit was scored once, at its end. The figures do not show "
    "how early sepsis is recognised."
)


def read_labels(source: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Labels as a frame ``visit_id, client, sepsis, sepsis_onset, bad_onset``: texts, 0 or 1 (-1 if neither),
    microseconds, and whether an onset is given that is not a date.

    Reads .csv, .csv.gz and .parquet. Without a column `sepsis_onset`, warns of the columns that are not used: one may
    hold the onset under another name. Raises `BadObservations` if a column is missing or occurs twice, if no onset of a
    septic visit is a date, or if the file cannot be read.
    """
    if not isinstance(source, str | Path | pd.DataFrame):
        raise BadObservations(f"labels must be a file or a frame, not {type(source).__name__}")
    where = "labels" if isinstance(source, pd.DataFrame) else f"labels {str(source)!r}"
    table = source if isinstance(source, pd.DataFrame) else read_cells(source, where)
    missing = [name for name in LABEL_COLUMNS if name not in table.columns]
    if missing:
        # the other names are not shown: in a file without a header they are data of a patient
        raise BadObservations(
            f"{where}: missing column {listed(missing)} among {table.shape[1]}; "
            "expected visit_id, client, sepsis and optionally sepsis_onset"
        )
    names = [name for name in table.columns if name in (*LABEL_COLUMNS, "sepsis_onset")]
    if len(set(names)) < len(names):
        raise BadObservations(f"{where}: a column occurs twice; expected visit_id, client, sepsis, sepsis_onset")
    known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1}
    sepsis = table["sepsis"].map(lambda cell: known.get(as_text(cell).casefold(), -1)).to_numpy()
    out = pd.DataFrame(
        {"visit_id": table["visit_id"].map(as_text), "client": table["client"].map(as_text), "sepsis": sepsis}
    )
    if "sepsis_onset" in table.columns:
        out["sepsis_onset"], empty = parse_times(table["sepsis_onset"])
        out["bad_onset"] = (out["sepsis_onset"] == NO_TIME) & ~empty
        septic = out[out["sepsis"] == 1]
        n_bad = int(septic["bad_onset"].sum())
        if n_bad and (septic["sepsis_onset"] == NO_TIME).all():
            raise BadObservations(
                f"{where}: none of the {n_bad} values in sepsis_onset of septic visits is a date; "
                "expected ISO 8601, such as 2024-12-31T20:30, between 1900 and 2299"
            )
    else:
        out["sepsis_onset"], out["bad_onset"] = NO_TIME, False
        if others := [name for name in table.columns if name not in LABEL_COLUMNS]:
            warnings.warn(f"{where}: no column sepsis_onset; not used: {listed(others)}", stacklevel=2)
    return out


def read_cells(path: str | Path, where: str) -> pd.DataFrame:
    """A file as it is, the cells of a text file as texts. Raises `BadObservations`, which names the file as `where`."""
    try:
        if str(path).endswith(".parquet"):
            return pd.read_parquet(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            # without index_col a comma at the end of each row would shift the columns
            return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except pd.errors.ParserWarning:
        raise BadObservations(
            f"{where} cannot be read: a row has more fields than the header; is there a comma at its end?"
        ) from None
    except FileNotFoundError:
        raise BadObservations(f"{where} does not exist") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        plain = isinstance(error, OSError | pd.errors.ParserError | pd.errors.EmptyDataError)  # others quote the file
        reason = " ".join(str(error).split())[:200] if plain else type(error).__name__
        raise BadObservations(f"{where} cannot be read: {reason}") from error
