"""The minimum of evidence that the search writes, and what training and serving make of it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from common.artifacts import write_atomic
from feature_pipeline import (
    MICROSECONDS_PER_HOUR,
    FeaturePlan,
    MinimumEvidence,
    ProductionPipeline,
    load_config,
)
from training.evidence import VITAL_SIGNS, Inputs, alone, enough
from training.search import SearchOptions, search
from training.snapshots import load_training_data
from training.versions import CONFIG, MODEL


@pytest.fixture(scope="module")
def data(cohort_files):
    return load_training_data(*cohort_files)


@pytest.fixture(scope="module")
def deployment(cohort_files, models_dir, tmp_path_factory):
    """The shared deployment with the minimum of evidence that the search writes."""
    searched, directory = tmp_path_factory.mktemp("searched"), tmp_path_factory.mktemp("evidence") / "models"
    options = SearchOptions(*map(str, cohort_files), feature_sets=("clinical",), models=("lightgbm_shallow",))
    found = search(options, searched).config
    shutil.copytree(models_dir, directory)
    config = load_config(directory / CONFIG)
    metrics = {**config.metrics, "evidence": found.metrics["evidence"]}
    write_atomic(directory / CONFIG, replace(config, minimum_evidence=found.minimum_evidence, metrics=metrics).text())
    return directory


@pytest.fixture(scope="module")
def config(deployment):
    return load_config(deployment / CONFIG)


def test_the_search_writes_vital_signs_and_what_it_measured(config):
    minimum = config.minimum_evidence
    assert set(minimum.inputs) <= set(VITAL_SIGNS) and len(minimum.inputs) / 2 <= minimum.at_least
    assert minimum.within_hours == 24 and 2 <= minimum.newest_hours <= 24
    rows = {row["evidence"]: row for row in config.metrics["evidence"]}
    n = len(minimum.inputs)
    assert rows["all"] == {**rows[f"{n} of {n} inputs, all others"], "evidence": "all"}  # nothing was hidden
    assert rows[f"0 of {n} inputs, no others"]["roc_auc"] < rows["all"]["roc_auc"]


def test_training_and_serving_agree_on_which_snapshots_have_enough(data, config, deployment):
    pipeline = ProductionPipeline(deployment / CONFIG, deployment / MODEL)
    visit, as_of = data.visit, data.as_of + 7 * MICROSECONDS_PER_HOUR * (np.arange(len(data.visit)) % 3)
    moved = replace(data, as_of=as_of)
    assessed = pipeline.assess(data.observations, visit, as_of)
    known = enough(config.minimum_evidence, moved, config.feature_names)
    assert 0.3 < known.mean() < 1
    assert np.array_equal(known, assessed.reason == None)  # noqa: E711, element by element


def test_a_snapshot_alone_has_the_features_that_it_has_in_its_visit(data, config):
    rows = np.arange(len(data.label))[::37]
    plan = FeaturePlan(config.feature_names)
    whole = plan.evaluate(data.observations, data.visit[rows], data.as_of[rows])
    assert np.array_equal(
        plan.evaluate(alone(data, rows), np.arange(len(rows)), data.as_of[rows]), whole, equal_nan=True
    )
    late = alone(data, rows, 3.0)
    has = late.visit_group_start[:-1] < late.visit_group_start[1:]
    assert (late.last_time[has] <= data.as_of[rows][has] - 3 * MICROSECONDS_PER_HOUR).all() and has.any()


def test_inputs_are_what_the_model_looks_at_and_not_static(data, config):
    inputs = Inputs.of(data.observations, ["HR__last", "Age__last", "clinical__shock_index"])
    assert set(inputs.names) == {"heart_rate", "systolic_bp"}
    nothing = MinimumEvidence([], 0, 24.0, 1e6)
    assert enough(nothing, data, ["HR__last"]).mean() > 0.5


@pytest.mark.filterwarnings("ignore::feature_pipeline.MissingCodesWarning")
@pytest.mark.filterwarnings("ignore::feature_pipeline.UnknownRiskWarning")
def test_old_vital_signs_are_not_made_recent_by_a_laboratory_value(data, config, deployment):
    pipeline = ProductionPipeline(deployment / CONFIG, deployment / MODEL)
    newest_hours = config.minimum_evidence.newest_hours

    def reason_with(hours):
        own = pipeline.reproducer.codes
        rows = [(own.own_code(name), 40.0 if name == "temperature" else 90.0, hours) for name in VITAL_SIGNS]
        now = np.datetime64("2024-05-02T00:00:00")
        records = [
            {
                "visit_id": "1",
                "client": "a",
                "observation_date": str(now - np.timedelta64(round(h * 60), "m")),
                "observation_type_code": code,
                "observation_value": value,
            }
            for code, value, h in [*rows, (own.own_code("glucose"), 110.0, 0.5)]
        ]
        (found,) = pipeline.predict(records, as_of=now, details=True).to_dict("records")
        return found["reason"], found["missing"]

    assert newest_hours < 23
    assert reason_with(newest_hours - 0.5)[0] is None
    reason, missing = reason_with(newest_hours + 0.5)
    assert reason == "insufficient_evidence" and "heart_rate" in missing


@pytest.mark.filterwarnings("ignore::feature_pipeline.MissingCodesWarning")
@pytest.mark.filterwarnings("ignore::feature_pipeline.UnknownRiskWarning")
@pytest.mark.parametrize("minimum", [None, MinimumEvidence([], 0, 24.0, 48.0)], ids=["no minimum", "nothing asked for"])
@pytest.mark.parametrize("code", ["8302-2", "Age"])
def test_unused_and_static_codes_alone_give_no_number(models_dir, tmp_path, code, minimum):
    folder = shutil.copytree(models_dir, tmp_path / "models")
    write_atomic(folder / CONFIG, replace(load_config(folder / CONFIG), minimum_evidence=minimum).text())
    row = {"visit_id": "1", "client": "a", "observation_date": "2024-05-01T12:00:00", "observation_value": 70.0}
    records = [{**row, "observation_type_code": code}]
    found = ProductionPipeline(folder / CONFIG, folder / MODEL).predict(records, details=True)
    assert found["risk_level"].tolist() == ["UNKNOWN"] and found["reason"].tolist() == ["insufficient_evidence"]
