"""The observations and labels that a model was trained on, as they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.artifacts import write_tables
from common.command_line import log
from common.labels import read_cells, read_labels
from feature_pipeline import COLUMNS, BadConfig, BadObservations, as_text, read_table
from sources.demo_cohort import make_demo_cohort

HELD_OUT = 0.3  # of the new data's clients


FEWEST_POSITIVE = 5  # held-out visits


def raw_data(source: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Observations and labels that the deployed model was trained on. Raises `BadObservations`."""
    if source["synthetic"] and not source["observations"]:
        return tuple(as_cells(frame) for frame in make_demo_cohort())
    if not (source["observations"] and source["labels"]):
        raise BadObservations("the data that the model was trained on are not here")
    return read_raw(source["observations"], source["labels"])


def read_raw(observations: str, labels: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The columns that count, every cell a text as it stands. Raises `BadObservations`."""
    frame, malformed = read_table(Path(observations))
    if malformed:
        log.warning("warning: %s: %d lines with too many fields are left out", observations, malformed)
    return as_cells(frame), as_cells(read_cells(labels, f"labels {labels!r}"))


def as_cells(frame: pd.DataFrame) -> pd.DataFrame:
    known = [name for name in (*COLUMNS, "sepsis", "sepsis_onset") if name in frame.columns]
    return pd.DataFrame({name: [_cell(cell) for cell in frame[name].tolist()] for name in known}, dtype=object)


def _cell(cell: Any) -> str:
    if cell is None or cell is pd.NaT or cell != cell:
        return ""
    return cell.isoformat() if isinstance(cell, pd.Timestamp) else as_text(cell)


def write_raw(folder: Path, name: str, frames: tuple[pd.DataFrame, pd.DataFrame]) -> tuple[str, str]:
    """Writes both as parquet; gives their paths."""
    paths = tuple(str(folder / f"{name}_{kind}.parquet") for kind in ("observations", "labels"))
    write_tables({Path(path): frame.astype(str) for path, frame in zip(paths, frames, strict=True)})
    return paths


def held_out_clients(old: tuple[pd.DataFrame, ...], new: tuple[pd.DataFrame, ...]) -> set[str]:
    """Some of the clients that only the new data have, septic and other ones alike."""
    labels = read_labels(new[1])
    seen = set(old[1]["client"].map(as_text))
    septic = labels.groupby("client")["sepsis"].max()
    septic = septic[[client not in seen for client in septic.index]]
    generator, chosen = np.random.default_rng(0), set()
    for outcome in (0, 1):
        clients = np.sort(septic[septic == outcome].index.to_numpy(dtype=object).astype(str))
        chosen |= set(generator.permutation(clients)[: int(np.ceil(HELD_OUT * len(clients)))].tolist())
    n_positive = int(septic[[c for c in septic.index if c in chosen]].eq(1).sum())
    if n_positive < FEWEST_POSITIVE:
        raise BadConfig(
            f"the new data have {n_positive} septic patients to hold out that the deployed model has not seen; "
            f"{FEWEST_POSITIVE} are needed to compare: collect more and try again"
        )
    return chosen
