"""An evaluation of new synthetic patients, as fixtures."""

import json

import numpy as np
import pandas as pd
import pytest

import evaluate_model
from feature_pipeline import load_config
from sources.demo_cohort import make_demo_cohort


@pytest.fixture(scope="session")
def new_patients(tmp_path_factory):
    """Other patients than those of the model, with a ward and a first antibiotic."""
    folder = tmp_path_factory.mktemp("new")
    observations, labels = make_demo_cohort(n_patients=160, seed=99)
    observations["client"] = "new-" + observations["client"].astype(str)
    labels["client"] = "new-" + labels["client"].astype(str)
    onset = pd.to_datetime(labels["sepsis_onset"])
    labels["antibiotic_time"] = (onset + pd.Timedelta(hours=3)).astype(str).where(labels["sepsis"] == 1, "")
    labels[["visit_id", "client"]].assign(site=np.where(np.arange(len(labels)) % 2, "north", "south")).to_csv(
        folder / "groups.csv", index=False
    )
    observations.to_parquet(folder / "past.parquet", index=False)
    labels.to_csv(folder / "labels.csv", index=False)
    return folder


def options(folder, models_dir, out, *more):
    named = ["--observations", str(folder / "past.parquet"), "--labels", str(folder / "labels.csv")]
    return [*named, "--models-dir", str(models_dir), "--out", str(out), "--score-every", "6", "--quiet", *more]


@pytest.fixture(scope="session")
def evaluated(new_patients, models_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    more = ["--groups", str(new_patients / "groups.csv"), "--by", "site", "--alerts-a-day", "1", "--synthetic"]
    version = load_config(models_dir / "best_model_config.json").model_version
    more += ["--compare", version, "--export", "papers", "seismometer"]
    assert evaluate_model.main(options(new_patients, models_dir, out, *more)) == 0
    return out


@pytest.fixture(scope="session")
def record(evaluated):
    return json.loads((evaluated / "evaluation.json").read_text())
