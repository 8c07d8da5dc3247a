"""What many tests need: a small cohort and a model trained on it by the project's own scripts, once a session."""

import os
from pathlib import Path

import pytest

import generate_features
import train_best_model
from feature_pipeline import ProductionPipeline
from sources.demo_cohort import make_demo_cohort

os.environ["SEPSIS_MONITOR_URL"] = "off"  # tests that look at the prediction log name one


@pytest.fixture(scope="session")
def cohort():
    """(observations, labels) of 250 synthetic patients."""
    return make_demo_cohort(n_patients=250, seed=7)


@pytest.fixture(scope="session")
def cohort_files(cohort, tmp_path_factory):
    """The cohort as files (observations.parquet, labels.csv)."""
    folder = tmp_path_factory.mktemp("cohort")
    observations, labels = cohort
    observations.to_parquet(folder / "observations.parquet", index=False)
    labels.to_csv(folder / "labels.csv", index=False)
    return folder / "observations.parquet", folder / "labels.csv"


@pytest.fixture(scope="session")
def models_dir(cohort_files, tmp_path_factory) -> Path:
    """A models directory after a small search and ``train_best_model.py --full``."""
    directory = tmp_path_factory.mktemp("models")
    observations, labels = map(str, cohort_files)
    search = ["--observations", observations, "--labels", labels, "--models-dir", str(directory)]
    search += ["--feature-sets", "clinical,windows", "--models", "lightgbm_shallow", "--finalists", "1"]
    search += ["--risk-thresholds", "0.02,0.1", "--jobs", "1", "--quiet"]
    assert generate_features.main(search) == 0
    assert train_best_model.main(["--models-dir", str(directory), "--full", "--jobs", "1", "--quiet"]) == 0
    return directory


@pytest.fixture(scope="session")
def config_path(models_dir) -> Path:
    return models_dir / "best_model_config.json"


@pytest.fixture(scope="session")
def model_path(models_dir) -> Path:
    return models_dir / "best_model.pkl"


@pytest.fixture(scope="session")
def pipeline(config_path, model_path) -> ProductionPipeline:
    return ProductionPipeline(config_path, model_path)
