"""train_best_model.py --adapt: a model for the patients of another hospital, or one line that says why not."""

import shutil

import numpy as np
import pandas as pd
import pytest

import train_best_model
from feature_pipeline import ProductionPipeline, load_config
from sources.demo_cohort import make_demo_cohort
from training import adapt as adapt_module
from training import comparison, learning_curve
from training.adapt import AdaptOptions, read_local
from training.comparison import learned_clients
from training.transfer import AS_IT_IS, LOCAL, RECALIBRATED, Candidate, Part
from training.versions import CONFIG, MODEL

REFIT = Candidate("refitted, decay 0.5", ((Part("refitted", 0.5), 1.0),))
MIXED = Candidate("mixed", ((Part("refitted", 0.5), 0.7), (LOCAL, 0.3)))
FEW = (AS_IT_IS, RECALIBRATED, REFIT, MIXED)


@pytest.fixture(scope="module")
def local():
    """(observations, labels) of 250 synthetic patients of another hospital."""
    observations, labels = make_demo_cohort(n_patients=250, seed=11)
    for table in (observations, labels):
        table["client"] = "B" + table["client"].astype(str)
    return observations, labels


@pytest.fixture
def directory(models_dir, tmp_path):
    return shutil.copytree(models_dir, tmp_path / "models")


def run(directory, tables, *options) -> int:
    observations, labels = tables
    observations.to_parquet(directory.parent / "observations.parquet", index=False)
    labels.to_csv(directory.parent / "labels.csv", index=False)
    data = ["--observations", str(directory.parent / "observations.parquet")]
    data += ["--labels", str(directory.parent / "labels.csv")]
    return train_best_model.main(["--models-dir", str(directory), "--adapt", *data, "--jobs", "1", "--quiet", *options])


def files_of(directory) -> dict:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.suffix != ".lock"}


# ------------------------------------------------------------------------------------------------- refused


def few_septic(observations, labels):
    septic = labels[labels["sepsis"] == 1]["client"].unique()[10:]
    return observations, labels[~labels["client"].isin(septic)]


def other_codes(observations, labels):
    static = observations["observation_type_code"].isin(["Age", "Gender", "Unit1", "Unit2", "HospAdmTime"])
    code = observations["observation_type_code"]
    return observations.assign(observation_type_code=code.where(static, "local " + code)), labels


def one_known_client(observations, labels):
    known = labels["client"].iloc[0]
    return tuple(t.assign(client=t["client"].replace(known, known.removeprefix("B"))) for t in (observations, labels))


def no_onsets(observations, labels):
    return observations, labels.drop(columns="sepsis_onset")


BAD = {
    "ten septic patients": (few_septic, "10 septic clients can be used; adapting needs at least 20"),
    "other codes": (other_codes, "uses none of the codes"),
    "a client that the parent was trained on": (one_known_client, "1 of the clients in --labels"),
    "labels without onset": (no_onsets, "has times of onset, the other has none"),
    "no septic patient": (lambda o, y: (o, y[y["sepsis"] == 0]), "both kinds are needed"),
}


@pytest.mark.parametrize("what", BAD)
def test_data_that_nothing_can_be_learned_from_are_refused_in_one_line(what, directory, local, capsys):
    change, expected = BAD[what]
    before = files_of(directory)
    assert run(directory, change(*local)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(errors) == 1 and expected in errors[0]
    assert files_of(directory) == before


def test_local_patients_have_to_be_named(directory, capsys):
    assert train_best_model.main(["--models-dir", str(directory), "--adapt"]) == 2
    assert "--observations and --labels" in capsys.readouterr().err


def test_codes_of_the_hospital_are_read_with_its_map(directory, local, tmp_path, capsys):
    observations, labels = other_codes(*local)
    observations.to_parquet(tmp_path / "o.parquet", index=False)
    labels.to_csv(tmp_path / "l.csv", index=False)
    codes = {"local HR": ("heart_rate", ""), "local Temp": ("temperature", "")}
    options = AdaptOptions(str(tmp_path / "o.parquet"), str(tmp_path / "l.csv"), site_codes=codes)
    found = read_local(directory, options)
    names = found.config.feature_names
    place = names.index(next(name for name in names if name.startswith("HR__last")))
    assert np.isfinite(found.source.table.plain[place]).any()
    groups = found.source.data.group
    assert not set(groups[found.learned]) & set(groups[found.held_out])


# ------------------------------------------------------------------------------------------------- adapted


@pytest.mark.slow
def test_the_adapted_model_is_deployed_with_its_parent_in_the_metadata(directory, local, monkeypatch, capsys):
    monkeypatch.setattr(adapt_module, "candidates", lambda parent, both: [MIXED])
    parent = load_config(directory / CONFIG)
    assert run(directory, local, "--force", "--alert-budget", "20,50", "--reason", "a ward with more nurses") == 0
    config = load_config(directory / CONFIG)
    assert config.model_version != parent.model_version and f"model {config.model_version}" in capsys.readouterr().out
    assert config.adapted["parent"] == parent.model_version and config.adapted["candidate"] == MIXED.name
    assert config.thresholds["high"] == 20 and config.thresholds["reason"] == "a ward with more nurses"
    assert config.metrics["held_out"]["roc_auc"]["old"] > 0.5 and config.metrics["out_of_fold"]["n_visits"] > 200
    assert learned_clients(config) == set(local[1]["client"]) | learned_clients(parent)
    pipeline = ProductionPipeline(directory / CONFIG, directory / MODEL)
    assert pipeline.model.weights == pytest.approx([0.7, 0.3])
    assert (directory / "archive" / parent.model_version / CONFIG).exists()  # to roll back to
    card = (directory / "MODEL_CARD.md").read_text()
    assert f"Adapted from: model {parent.model_version}" in card and "0.7" not in config.feature_set
    observations, _ = local
    levels = pipeline.predict(pipeline.reproducer.read(observations), details=True)["risk_level"]
    called = (levels == "HIGH").mean()
    assert 0.05 < called < 0.4  # about 20 of 100, at the last observation
    # these patients are known now
    assert run(directory, local) == 2 and "was trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worse_model_is_not_deployed(directory, local, monkeypatch, capsys):
    monkeypatch.setattr(adapt_module, "candidates", lambda parent, both: [REFIT])
    monkeypatch.setattr(comparison, "TOLERANCE", -1.0)
    before = files_of(directory)
    assert run(directory, local) == 1
    assert "not promoted" in capsys.readouterr().out
    after = files_of(directory)
    assert after.pop(directory / "comparison.html") and after == before


@pytest.mark.slow
def test_the_learning_curve_is_a_table_and_a_plot_and_deploys_nothing(directory, local, monkeypatch, capsys):
    monkeypatch.setattr(learning_curve, "candidates", lambda parent, both: [AS_IT_IS, REFIT])
    monkeypatch.setattr(learning_curve.curve, "__defaults__", ((5, 60, 1000), 1))
    before = files_of(directory)
    assert run(directory, local, "--learning-curve") == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.endswith((AS_IT_IS.name, REFIT.name))]
    assert [row[0] for row in rows] == ["60", "175"] and "gain" in shown
    after = files_of(directory)
    page = after.pop(directory / learning_curve.PAGE).decode()
    assert after == before and "<img" in page and "average precision" in page


def points(*scores, n=400):
    generator = np.random.default_rng(0)
    label = (np.arange(n) % 4 == 0).astype(int)
    noise = generator.normal(size=n)
    probability = [1 / (1 + np.exp(-(s * label + noise + 0.1 * generator.normal(size=n)))) for s in scores]
    made = [learning_curve.Point(100 * (i + 1), 10, "", {}, p) for i, p in enumerate(probability)]
    return made, label, np.arange(n)


def test_where_the_curve_flattens():
    assert learning_curve.flattens(*points(0.5, 1.5, 1.5)).startswith("From 200 patients")
    assert learning_curve.flattens(*points(0.5, 1.0, 2.0)).startswith("The gain still rises at 300")
    assert learning_curve.flattens(*points(1.0)).startswith("From 100 patients")


def test_the_table_has_the_gains_with_their_intervals():
    figures = {"old": 0.7, "new": 0.8, "difference": 0.1, "low": 0.05, "high": 0.12}
    point = learning_curve.Point(100, 9, "refitted", {"roc_auc": figures, "average_precision": figures}, np.array([]))
    found = learning_curve.table([point])
    assert isinstance(found, pd.DataFrame) and found["roc_auc_gain_low"].tolist() == [0.05]
    assert "(+0.1000, +0.0500 to +0.1200)" in learning_curve.text_lines(found)[1]
