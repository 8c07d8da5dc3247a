"""The challenge's utility, thresholds and hourly snapshots, on cases worked by hand."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

import prepare_data
from benchmarks import physionet2019
from benchmarks.physionet2019 import (
    best_threshold,
    hourly_data,
    inner_splits,
    normalized_utility,
    patient_level,
    report,
    utilities,
)
from common.labels import read_labels
from feature_pipeline import SnapshotSettings, read_observations
from sources.physionet2019 import ADMISSION, PSV_COLUMNS
from training.snapshots import make_training_data

NAN = math.nan  # hours from onset of a patient without sepsis


# --------------------------------------------------------------------------------------------------- utility


@pytest.mark.parametrize(
    ("hours", "call", "silent"),
    [
        (-100, -0.05, 0),
        (-13, -0.05, 0),
        (-12.01, -0.05, 0),
        (-12, 0, 0),
        (-9, 0.5, 0),  # half way up
        (-6, 1, 0),
        (-1.5, 0.5, -1),  # half way down
        (0, 1 / 3, -4 / 3),
        (3, 0, -2),
        (3.01, 0, 0),
        (4, 0, 0),
        (NAN, -0.05, 0),
    ],
)
def test_utilities_at_each_breakpoint(hours, call, silent):
    assert [float(u[0]) for u in utilities(np.array([hours]))] == pytest.approx([call, silent])


def official(hours, called) -> float:
    """The utility of one call as the challenge's own evaluation defines it: slopes and intercepts, whole hours."""
    early, optimal, late, most, least, alarm = -12, -6, 3, 1, -2, -0.05
    if math.isnan(hours):
        return alarm if called else 0
    if hours > late:
        return 0
    if called and hours <= optimal:
        slope = most / (optimal - early)
        return max(slope * hours + most - slope * optimal, alarm)
    if called:
        slope = -most / (late - optimal)
        return slope * hours - slope * late
    if hours <= optimal:
        return 0
    slope = least / (late - optimal)
    return slope * hours - slope * optimal


@pytest.mark.parametrize("hours", [*range(-20, 10), NAN])
def test_utilities_are_the_challenges(hours):
    call, silent = utilities(np.array([float(hours)]))
    assert (call[0], silent[0]) == pytest.approx((official(hours, True), official(hours, False)))


def test_normalized_utility_by_hand():
    """Septic: hours -7, -6 and 3; another patient: two hours.

    Never calling: 0 + 0 - 2 = -2. Best: 5/6 + 1 + 0 = 11/6. Calling at -6 and one false alarm:
    1 - 2 - 0.05 = -1.05, so (-1.05 + 2) / (11/6 + 2) = 0.95 * 6 / 23.
    """
    hours = np.array([-7, -6, 3, NAN, NAN])
    called = np.array([0, 1, 0, 1, 0], dtype=bool)
    assert normalized_utility(hours, called) == pytest.approx(0.95 * 6 / 23)


def test_calling_too_late_earns_nothing_back():
    hours = np.array([-8.0, -4, 0, 4])
    late = normalized_utility(hours, np.array([0, 0, 0, 1], dtype=bool))
    assert late == 0 and normalized_utility(hours, np.array([0, 0, 1, 0], dtype=bool)) > 0


patients = st.lists(
    st.tuples(st.sampled_from([NAN, *map(float, range(-15, 7))]), st.integers(0, 6)), min_size=1, max_size=25
).filter(lambda rows: any(-12 < h < 3 for h, _ in rows))


@settings(max_examples=80, deadline=None)
@given(patients)
def test_never_calling_is_0_and_the_best_calls_are_1(rows):
    hours = np.array([h for h, _ in rows])
    call, silent = utilities(hours)
    assert normalized_utility(hours, np.zeros(len(hours), bool)) == 0
    assert normalized_utility(hours, call > silent) == pytest.approx(1)
    assert normalized_utility(hours, np.array([s % 2 == 0 for _, s in rows])) <= 1 + 1e-12


@settings(max_examples=80, deadline=None)
@given(patients)
def test_best_threshold_is_that_of_brute_force(rows):
    hours, score = np.array([h for h, _ in rows]), np.array([s / 10 for _, s in rows])
    threshold = best_threshold(hours, score)
    best = max(normalized_utility(hours, score >= t) for t in score)
    assert threshold in score
    assert normalized_utility(hours, score >= threshold) == pytest.approx(best, abs=1e-12)


def test_best_threshold_by_hand():
    hours = np.array([-6.0, NAN, NAN, -9.0, NAN])
    assert best_threshold(hours, np.array([0.9, 0.8, 0.7, 0.6, 0.5])) == 0.6  # 0.5 is worth two false alarms
    assert best_threshold(hours, np.array([0.9, 0.9, 0.9, 0.1, 0.1])) == 0.1  # ties are called together


# --------------------------------------------------------------------------------------------- hourly snapshots


def psv_of(hours, septic_from=None, **measured) -> str:
    """A patient's file of the challenge; `measured` gives a code's values, one an hour."""
    rows = []
    for i, hour in enumerate(hours):
        values = dict.fromkeys(PSV_COLUMNS, "NaN") | {"Age": 60, "Gender": 1, "HospAdmTime": -1}
        values |= {code: column[i] for code, column in measured.items()}
        values |= {"ICULOS": hour, "SepsisLabel": int(septic_from is not None and hour >= septic_from)}
        rows.append("|".join(str(values[name]) for name in PSV_COLUMNS))
    return "\n".join(["|".join(PSV_COLUMNS), *rows]) + "\n"


def imported(folder, files: dict[str, str], kind="parquet") -> tuple[str, str]:
    """Observations and labels of the challenge's files, as the importer writes them."""
    psv = folder / "training_setA"
    psv.mkdir()
    for name, text in files.items():
        (psv / f"{name}.psv").write_text(text)
    out = [folder / f"{what}.{kind}" for what in ("observations", "labels")]
    arguments = [str(psv), "--observations", str(out[0]), "--labels", str(out[1]), "--quiet"]
    assert prepare_data.main(["physionet2019", *arguments]) == 0
    return str(out[0]), str(out[1])


def hours_of(data) -> np.ndarray:
    return (data.as_of.astype("datetime64[us]") - ADMISSION) / np.timedelta64(1, "h")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_snapshot_for_every_hour_with_the_challenges_label(tmp_path, kind):
    """The first hour may be later than 1, hours may lack any value, and sepsis may be there from the first hour."""
    files = {
        "p000003": psv_of(range(1, 11), septic_from=4, HR=[80 + i for i in range(10)]),
        "p000001": psv_of(range(3, 8), HR=[70, "NaN", "NaN", 71, "NaN"]),
        "p000007": psv_of(range(2, 5), septic_from=2),
    }
    data, from_onset = hourly_data(*imported(tmp_path, files, kind))
    client = data.observations.client_text[data.visit]
    shown = {}
    for patient, hour, label in zip(client, hours_of(data), data.label, strict=True):
        shown.setdefault(patient, []).append((hour, label))
    assert shown == {
        "A000001": [(h, 0) for h in range(3, 8)],
        "A000003": [(h, int(h >= 4)) for h in range(1, 11)],
        "A000007": [(h, 1) for h in range(2, 5)],
    }
    # onset six hours after the label's start
    assert from_onset[client == "A000003"].tolist() == [h - 10 for h in range(1, 11)]
    assert from_onset[client == "A000007"].tolist() == [-6, -5, -4]
    assert np.isnan(from_onset[client == "A000001"]).all()
    assert data.grouped_by == "client" and len(set(data.group)) == 3
    assert data.describe().endswith("18 snapshots (55.56% positive)")


def test_each_hour_knows_what_was_measured_until_then(tmp_path):
    files = {"p000001": psv_of(range(1, 5), HR=[70, 75, "NaN", 90]), "p000002": psv_of([1], septic_from=1)}
    data, _ = hourly_data(*imported(tmp_path, files))
    client = data.observations.client_text[data.visit]
    features = data.evaluate(["HR__last", "HR__count", "HR__age"])[client == "A000001"]
    assert features.tolist() == [[70, 1, 0], [75, 2, 0], [75, 2, 1], [90, 3, 0]]


def test_a_patient_whose_first_hour_measured_nothing_keeps_its_hours(tmp_path):
    empty = {"Age": ["NaN"] * 4, "Gender": ["NaN"] * 4, "HospAdmTime": ["NaN"] * 4}
    files = {"p000001": psv_of(range(1, 5), septic_from=3, HR=["NaN", 80, 81, 82], **empty)}
    data, from_onset = hourly_data(*imported(tmp_path, files))
    assert hours_of(data).tolist() == [1, 2, 3, 4]
    assert data.label.tolist() == [0, 0, 1, 1] and from_onset.tolist() == [-8, -7, -6, -5]


# --------------------------------------------------------------------------------------------- patient level


def made(hours_of_patient, onset_of_patient):
    """(data with hourly snapshots, hours from onset) of patients with so many hours; onset None: without sepsis."""
    rows, from_onset = [], []
    labels = []
    for number, (hours, onset) in enumerate(zip(hours_of_patient, onset_of_patient, strict=True)):
        for hour in (0, hours - 1):
            moment = pd.Timestamp(ADMISSION) + pd.Timedelta(hours=hour)
            rows.append(
                {
                    "visit_id": number,
                    "client": f"p{number}",
                    "observation_date": moment,
                    "observation_type_code": "HR",
                    "observation_value": 80,
                }
            )
        from_onset += [NAN if onset is None else hour - onset for hour in range(hours)]
        date = pd.NaT if onset is None else pd.Timestamp(ADMISSION) + pd.Timedelta(hours=onset)
        labels.append({"visit_id": number, "client": f"p{number}", "sepsis": onset is not None, "sepsis_onset": date})
    every_hour = SnapshotSettings(1, 6, after_onset=True)
    data = make_training_data(read_observations(rows), read_labels(pd.DataFrame(labels)), every_hour)
    return data, np.array(from_onset)


def test_patient_level_by_hand():
    """Septic patients by their highest score before onset, the others over as many hours, here always two."""
    data, from_onset = made([4, 3, 2, 3], [2, 2, None, None])
    assert data.label.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    score = np.array([
        *(0.1, 0.6, 0.9, 0.9),  # 0.6 before onset; what comes after does not count
        *(0.2, 0.1, 0.9),  # 0.2
        *(0.3, 0.1),  # 0.3
        *(0.1, 0.05, 0.99),  # 0.1 in the first two hours
    ])  # fmt: skip
    figures = patient_level(data, from_onset, score)
    # 0.6+ > 0.3- > 0.2+ > 0.1-: three of four pairs are in order
    assert figures["roc_auc"] == 0.75
    assert figures["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_patients_with_no_hour_before_onset_do_not_count():
    data, from_onset = made([3, 3, 3], [2, 0, None])
    score = np.array([0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.4, 0.4, 0.4])
    assert patient_level(data, from_onset, score)["roc_auc"] == 1.0


def test_shorter_stays_than_any_septic_ones_count_whole():
    data, from_onset = made([8, 2], [7, None])
    score = np.array([*[0.3] * 8, 0.1, 0.9])
    assert patient_level(data, from_onset, score)["roc_auc"] == 0.0


# -------------------------------------------------------------------------------------------------- thresholds


def folds_of(data, n_folds):
    rows = np.arange(len(data.label))
    return [(rows[data.group % n_folds != k], rows[data.group % n_folds == k]) for k in range(n_folds)]


def test_inner_models_see_neither_the_fold_nor_the_one_its_threshold_is_chosen_on():
    data, _ = made([3] * 8, [2, 2, 2, 2, None, None, None, None])
    folds = folds_of(data, 4)
    for k, (fit, held_out) in enumerate(inner_splits(folds)):
        scored = folds[k][1]
        assert np.array_equal(held_out, folds[(k + 1) % 4][1])
        assert not set(data.group[fit]) & set(data.group[np.concatenate([held_out, scored])])
        assert len(fit) + len(held_out) + len(scored) == len(data.label)


def test_a_fold_has_no_part_in_its_own_threshold(monkeypatch):
    """Other labels and onsets in one fold leave the calls in that fold as they were."""
    data, from_onset = made([6] * 40, [5] * 8 + [None] * 32)
    folds = folds_of(data, 4)
    score = np.random.default_rng(0).normal(size=len(from_onset)) + 2 * np.isfinite(from_onset)
    calls = []
    monkeypatch.setattr(physionet2019, "normalized_utility", lambda hours, called: calls.append(called) or 0.0)
    fold = folds[0][1]
    other = from_onset.copy()
    other[fold] = np.where(np.isnan(from_onset[fold]), -6, NAN)
    for onsets in (from_onset, other):
        report(data, onsets, score, folds)
    assert np.array_equal(calls[0][fold], calls[1][fold]) and 0 < calls[0][fold].sum() < len(fold)
    assert not np.array_equal(calls[0], calls[1])


# ------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A tiny hospital in which the heart rate tells sepsis."""
    generator = np.random.default_rng(4)
    files = {}
    for number in range(48):
        hours = int(generator.integers(8, 20))
        septic_from = int(generator.integers(3, hours)) if number % 3 == 0 else None
        rate = 80 + generator.normal(scale=4, size=hours).round(1)
        rate += 25 * (np.arange(1, hours + 1) >= (septic_from or 99))
        files[f"p{number:06d}"] = psv_of(range(1, hours + 1), septic_from, HR=rate.tolist())
    return imported(tmp_path_factory.mktemp("hospital"), files)


@pytest.mark.slow
def test_the_benchmark_runs_and_prints_figures(hospital, tmp_path, capsys):
    observations, labels = hospital
    arguments = ["--observations", observations, "--labels", labels, "--feature-set", "latest", "--jobs", "1"]
    arguments += ["--model-configuration", "logistic_regression", "--json", str(tmp_path / "figures.json"), "--quiet"]
    assert physionet2019.main(arguments) == 0
    out = capsys.readouterr().out
    assert "latest with logistic_regression" in out and "whole benchmark" in out
    figures = json.loads((tmp_path / "figures.json").read_text())["latest with logistic_regression"]
    assert f"utility {figures['normalized_utility']:.4f}" in out
    assert f"hourly ROC AUC {figures['hourly']['roc_auc']:.4f}" in out
    assert figures["n_patients"] == 48 and figures["hourly"]["roc_auc"] > 0.8
    assert 0.2 < figures["normalized_utility"] <= 1


@pytest.mark.parametrize("arguments", [["--observations", "none.parquet", "--labels", "none.parquet"], []])
def test_the_benchmark_says_what_is_missing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = physionet2019.main([*arguments, "--quiet"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and "error: " in capsys.readouterr().err


def test_labels_without_hours_are_refused_by_name(hospital, tmp_path, capsys):
    labels = tmp_path / "labels.parquet"
    pd.read_parquet(hospital[1]).drop(columns="first_hour").to_parquet(labels)
    assert physionet2019.main(["--observations", hospital[0], "--labels", str(labels), "--quiet"]) == 2
    assert "first_hour" in capsys.readouterr().err
