"""Thresholds from an alert budget: what they come to, and setting them without training."""

import json
from dataclasses import replace

import numpy as np
import pytest

import train_best_model
from feature_pipeline import MICROSECONDS_PER_HOUR, BadConfig, ProductionPipeline, load_config
from training.snapshots import load_training_data
from training.thresholds import STEP, Rule, alert_curves, set_thresholds, with_thresholds
from training.versions import CONFIG, MODEL


@pytest.fixture(scope="module")
def data(cohort_files):
    return load_training_data(*cohort_files)


def reaching(data, probability, threshold, counts=True):
    """Visits of 100 that ever reach a threshold."""
    return 100 * len(np.unique(data.visit[(probability >= threshold) & counts])) / len(np.unique(data.visit))


@pytest.mark.parametrize("decimals", [17, 2, 0])  # without ties, with some, a constant
def test_no_larger_share_of_the_visits_reaches_a_level_than_the_budget(data, decimals):
    probability = np.random.default_rng(0).beta(1, 20, len(data.label)).round(decimals)
    rows = np.arange(len(data.label))
    curve = alert_curves(data, rows, probability)["alert_budget"]
    assert len(curve) == 100 / STEP and np.all(np.diff(curve) <= 0)
    for budget in (0.5, 10, 30, 99.5):
        threshold = curve[int(budget / STEP) - 1]
        assert reaching(data, probability, threshold) <= budget
        if decimals == 17:  # and it is the lowest such threshold, but for the rounding of visits
            assert reaching(data, probability, threshold) > budget - 100 / len(np.unique(data.visit))
            assert reaching(data, probability, np.nextafter(threshold, 0)) > budget


def test_scores_after_onset_and_without_evidence_do_not_count(data):
    probability = np.random.default_rng(0).random(len(data.label))
    rows, known = np.arange(len(data.label)), np.arange(len(data.label)) % 3 > 0
    early = replace(data, onset=np.where(data.onset > 0, data.as_of - 1, data.onset))  # every septic snapshot is after
    septic = data.onset > 0
    curve = alert_curves(early, rows, probability, known)["alert_budget"]
    assert reaching(early, probability, curve[19], ~septic & known) <= 10
    assert reaching(early, probability, curve[19]) > 10


def test_alerts_of_patient_days_count_a_visit_once_a_day(data):
    probability = np.random.default_rng(0).random(len(data.label))
    rows = np.arange(len(data.label))
    threshold = alert_curves(data, rows, probability)["alerts_per_100_patient_days"][int(8 / STEP) - 1]
    elapsed = (data.as_of - data.observations.first_time[data.visit]) / (24 * MICROSECONDS_PER_HOUR)
    days = sum(elapsed[data.visit == v].max() for v in np.unique(data.visit))
    called = probability >= threshold
    alerts = len({(v, int(d)) for v, d in zip(data.visit[called], elapsed[called], strict=True)})
    assert 7.9 < 100 * alerts / days <= 8


def test_a_constant_score_gives_two_thresholds_that_nothing_reaches(data, models_dir):
    config = load_config(models_dir / CONFIG)
    curves = alert_curves(data, np.arange(len(data.label)), np.full(len(data.label), 0.25))
    levels = with_thresholds(config, Rule(), curves).risk_thresholds
    assert 0.25 < levels["medium"] < levels["high"] < 0.2501


# --------------------------------------------------------------------------------- the same model, other thresholds


def run(directory, *arguments):
    return train_best_model.main(["--models-dir", str(directory), "--quiet", *arguments])


def test_other_thresholds_are_a_version_of_the_same_model(deployment, capsys, monkeypatch):
    monkeypatch.setenv("LOGNAME", "head nurse")
    before = ProductionPipeline(deployment / CONFIG, deployment / MODEL)
    assert run(deployment, "--set-thresholds", "--alert-budget", "5,20", "--reason", "five beds") == 0
    assert "HIGH is reached by 5 of 100 visits" in capsys.readouterr().out
    after = ProductionPipeline(deployment / CONFIG, deployment / MODEL)
    assert after.model_file == before.model_file and after.model_version != before.model_version
    how = after.config.thresholds
    assert [how[key] for key in ("by", "reason", "kind", "high")] == ["head nurse", "five beds", "alert_budget", 5]
    assert how["curves"] == before.config.thresholds["curves"]
    levels = after.config.risk_thresholds
    assert levels["high"] == after.config.decision_threshold == how["curves"]["alert_budget"][9]
    changed = ("model_version", "thresholds", "risk_thresholds", "decision_threshold")
    assert replace(before.config, **{key: getattr(after.config, key) for key in changed}) == after.config
    for name in ("production_model_info.txt", "MODEL_CARD.md"):
        text = (deployment / name).read_text()
        assert f"HIGH (alert) from {levels['high']:.4g}" in text and before.model_version not in text

    assert run(deployment, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"* {after.model_version}") and "head nurse" in lines[0] and "five beds" in lines[0]
    assert lines[1].startswith(f"  {before.model_version}")
    assert run(deployment, "--rollback", before.model_version) == 0
    assert load_config(deployment / CONFIG) == before.config


def test_thresholds_as_given_and_a_decision_threshold_of_its_own(deployment):
    content = json.loads((deployment / CONFIG).read_text())
    (deployment / CONFIG).write_text(json.dumps({**content, "decision_sensitivity": 0.8, "decision_threshold": 0.03}))
    set_thresholds(deployment, Rule("risk_thresholds", 0.7, 0.4), "as in the guide")
    config = load_config(deployment / CONFIG)
    assert config.risk_thresholds == {"medium": 0.4, "high": 0.7} and config.decision_threshold == 0.03


def test_what_cannot_be_set(deployment, tmp_path, capsys):
    assert run(deployment, "--set-thresholds") == 2 and "needs --alert-budget" in capsys.readouterr().err
    assert run(deployment, "--alert-budget", "5,20") == 2 and "with --set-thresholds" in capsys.readouterr().err
    content = json.loads((deployment / CONFIG).read_text())
    (deployment / CONFIG).write_text(json.dumps({**content, "model_version": None, "model_sha256": None}))
    with pytest.raises(BadConfig, match="no model is deployed"):
        set_thresholds(deployment, Rule(), "")
