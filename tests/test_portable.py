"""generate_features.py --portable: a model for a hospital that names its codes otherwise and uses other units."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import generate_features
import train_best_model
from common.command_line import read_site_codes
from common.labels import read_labels
from feature_pipeline import (
    CONCEPT,
    BadConfig,
    Codes,
    FeaturePlan,
    ProductionPipeline,
    SnapshotSettings,
    concept_of,
    load_config,
    read_observations,
)
from sources.demo_cohort import make_demo_cohort
from training import adapt as adapt_module
from training.package import without_places
from training.portable import describe_portable
from training.retraining import RetrainOptions, search_options
from training.snapshots import make_training_data
from training.transfer import AS_IT_IS, RECALIBRATED
from training.trials import prepare_search
from training.versions import CONFIG, MODEL

SEARCH = ["--feature-sets", "clinical", "--models", "lightgbm_shallow", "--finalists", "1", "--folds", "2"]
SI = {  # concept -> unit of the second hospital
    "hemoglobin": "g/L",
    "creatinine": "umol/L",
    "bun": "mmol/L",
    "glucose": "mmol/L",
    "bilirubin_total": "umol/L",
    "lactate": "mg/dL",
    "fio2": "%",
    "temperature": "[degF]",
    "paco2": "kPa",
    "systolic_bp": "kPa",
    "hematocrit": "L/L",
}
VALUES = ["observation_value", "reference_range_min", "reference_range_max"]


@pytest.fixture(scope="module")
def directory(cohort_files, tmp_path_factory):
    """Models that were searched with --portable, and trained."""
    directory = tmp_path_factory.mktemp("portable")
    observations, labels = map(str, cohort_files)
    data = ["--observations", observations, "--labels", labels, "--models-dir", str(directory), "--jobs", "1"]
    assert generate_features.main([*data, *SEARCH, "--portable", "--quiet"]) == 0
    assert train_best_model.main(["--models-dir", str(directory), "--full", "--jobs", "1", "--quiet"]) == 0
    return directory


def second_hospital(observations: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the observations with all codes and many units named otherwise, the map of these codes)."""
    codes = observations["observation_type_code"]
    concepts = {code: concept_of(code) for code in codes.unique()}
    number = {name: k for k, name in enumerate(dict.fromkeys(c.name for c in concepts.values()))}
    found, rows = observations.copy(), []
    for code, concept in concepts.items():
        own = codes == code
        found.loc[own, "observation_type_code"] = f"B{number[concept.name]:03}"
        unit = concept.unit_named(SI.get(concept.name, concept.unit))
        values = observations.loc[own, VALUES].astype(float)
        if code == "Temp":  # one ward of the demo cohort writes these in degrees Fahrenheit already
            fahrenheit = values["observation_value"] > 60
            found.loc[own, VALUES] = values.where(fahrenheit, (values - unit.offset) / unit.factor)
        else:
            found.loc[own, VALUES] = (values - unit.offset) / unit.factor
        rows.append((f"B{number[concept.name]:03}", concept.name, SI.get(concept.name, "")))
    assert not set(found["observation_type_code"]) & set(codes)
    return found, pd.DataFrame(rows, columns=["code", "concept", "unit"]).drop_duplicates()


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """(observations as the first hospital writes them, the same as the second does, labels, the second's map)."""
    observations, labels = make_demo_cohort(n_patients=150, seed=12)
    for table in (observations, labels):
        table["client"] = "B" + table["client"].astype(str)
    theirs, codes = second_hospital(observations)
    path = tmp_path_factory.mktemp("second") / "codes.csv"
    codes.to_csv(path, index=False)
    return observations, theirs, labels, path


def scores(directory, observations, site_codes=None):
    pipeline = ProductionPipeline(directory / CONFIG, directory / MODEL, site_codes)
    read = pipeline.reproducer.read(observations)
    return pipeline.assess(read, np.arange(read.n_visits), read.last_time)


def test_features_are_named_by_concept_and_the_summary_tells_what_that_costs(directory):
    config = load_config(directory / CONFIG)
    assert config.portable and set(config.codes) <= set(CONCEPT)
    assert "heart_rate__last" in config.feature_names and set(FeaturePlan(config.feature_names).codes) <= set(CONCEPT)
    cost = config.metrics["portable"]["roc_auc"]
    assert cost["low"] <= cost["difference"] <= cost["high"] and cost["old"] > 0.5
    summary = (directory / "optimization_summary.txt").read_text()
    assert "features are named by concept" in summary and f"{cost['difference']:+.4f}" in summary


def test_the_hospital_that_trained_it_goes_on_with_its_own_codes(directory, cohort, pipeline):
    some = cohort[0][cohort[0]["visit_id"].isin(cohort[0]["visit_id"].unique()[:40])]
    found = scores(directory, some)
    assert np.isfinite(found.probability).mean() > 0.8
    ours = ProductionPipeline(directory / CONFIG, directory / MODEL)
    assert not ours.unused_codes(ours.reproducer.read(some))
    temperature = ours.feature_names.index("temperature__last")
    both = [pipeline.feature_names.index(f"{code}__last") for code in ("Temp", "TEMP")]
    theirs = scores(pipeline.directory, some).features[:, both]
    assert np.array_equal(np.isnan(theirs).all(axis=1), np.isnan(found.features[:, temperature]))  # one of the two


def test_a_second_hospital_with_other_codes_and_units_gets_the_same_scores(directory, second):
    ours, theirs, _, path = second
    expected, found = scores(directory, ours), scores(directory, theirs, read_site_codes(str(path)))
    known = np.isfinite(expected.probability)
    assert known.sum() > 100 and np.array_equal(known, np.isfinite(found.probability))
    assert np.allclose(found.probability[known], expected.probability[known], rtol=1e-6)
    assert found.level.tolist() == expected.level.tolist()


def test_units_may_stand_with_each_value(directory, second):
    ours, theirs, _, path = second
    table = pd.read_csv(path, keep_default_na=False).set_index("code")
    rows = theirs.assign(unit=theirs["observation_type_code"].map(table["unit"]))
    site_codes = {code: (concept, "") for code, concept in table["concept"].items()}
    expected, found = scores(directory, ours), scores(directory, rows, site_codes)
    assert np.allclose(found.probability, expected.probability, rtol=1e-6, equal_nan=True)


@pytest.mark.slow
def test_it_is_adapted_to_patients_of_the_second_hospital(directory, second, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adapt_module, "candidates", lambda parent, both: [AS_IT_IS, RECALIBRATED])
    models = shutil.copytree(directory, tmp_path / "models")
    _, theirs, labels, path = second
    theirs.to_parquet(tmp_path / "o.parquet", index=False)
    labels.to_csv(tmp_path / "l.csv", index=False)
    options = ["--models-dir", str(models), "--adapt", "--force", "--jobs", "1", "--quiet", "--codes", str(path)]
    options += ["--observations", str(tmp_path / "o.parquet"), "--labels", str(tmp_path / "l.csv")]
    assert train_best_model.main(options) == 0, capsys.readouterr().err
    config = load_config(models / CONFIG)
    assert config.portable and config.adapted["parent"] == load_config(directory / CONFIG).model_version
    found = scores(models, theirs, read_site_codes(str(path)))
    assert np.isfinite(found.probability).mean() > 0.8


def test_codes_of_the_first_hospital_do_not_travel(directory):
    config = replace(load_config(directory / CONFIG), synonyms={"220045": "heart_rate"})
    assert without_places(config).synonyms == {}
    assert without_places(replace(config, portable=False)).synonyms == config.synonyms


def test_retraining_keeps_it_portable(directory, tmp_path):
    options = search_options(load_config(directory / CONFIG), ("o", "l"), RetrainOptions(None, None, tmp_path))
    assert options.portable


def test_codes_without_a_concept_give_no_features(cohort, tmp_path):
    observations, labels = cohort
    codes = observations["observation_type_code"]

    def prepared(codes):
        frame = observations.assign(observation_type_code=codes)
        data = make_training_data(read_observations(frame, Codes.by_concept()), read_labels(labels), SnapshotSettings())
        return data, prepare_search(data, feature_sets=["latest"], portable=True)

    data, search = prepared(codes.replace({"HR": "local HR"}))
    assert "local HR" in data.observations.codes and "local HR" not in search.codes
    assert not any(name.startswith("local") for name in search.names)
    assert "concept is not known: 'local HR'" in describe_portable(data, {})[-1]
    with pytest.raises(BadConfig, match="no code of the observations has a known concept"):
        prepared("local " + codes)
