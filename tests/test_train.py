"""Retraining, archiving, deploying, and the check of what is deployed."""

import hashlib
import json
import shutil
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest

import generate_features
import run_tests
import train_best_model
import training.check
import training.train
from common import artifacts
from feature_pipeline import BadModel, Codes, ProductionPipeline, UnknownRiskWarning, load_config, read_observations
from training import versions
from training.model_card import groups_of
from training.snapshots import TEST, load_training_data, split_parts
from training.versions import CONFIG, DEPLOYED

pytestmark = pytest.mark.filterwarnings("ignore::feature_pipeline.SetAsideWarning")  # the cohort has dirt on purpose


def trained(directory, *flags, status=0):
    arguments = ["--models-dir", str(directory), "--jobs", "1", *flags]
    assert train_best_model.main([*arguments, "--quiet"]) == status


def pipeline_of(directory) -> ProductionPipeline:
    return ProductionPipeline(directory / "best_model_config.json", directory / "best_model.pkl")


def scores_of(directory, observations) -> np.ndarray:
    return pipeline_of(directory).predict(observations)["sepsis_probability"].to_numpy()


def files_of(directory) -> dict[str, bytes]:
    """The files of a models directory without its archive."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def change_config(directory, **changes) -> None:
    path = directory / "best_model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def searched(cohort_files, tmp_path_factory):
    """A models directory after a search, before any training."""
    directory = tmp_path_factory.mktemp("searched")
    observations, labels = map(str, cohort_files)
    arguments = ["--observations", observations, "--labels", labels, "--models-dir", str(directory), "--quiet"]
    arguments += ["--feature-sets", "latest", "--models", "lightgbm_shallow", "--finalists", "1", "--jobs", "1"]
    assert generate_features.main(arguments) == 0
    return directory


@pytest.fixture
def directory(searched, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(searched, tmp_path / "models")


@pytest.fixture(scope="module")
def some(cohort):
    """Observations of 30 visits."""
    observations = cohort[0]
    return observations[observations["visit_id"].isin(observations["visit_id"].unique()[:30])]


# ------------------------------------------------------------------------------------------------- holdout


def test_without_flags_the_test_part_is_reported_and_nothing_deployed(directory, cohort_files, capsys):
    config = (directory / "best_model_config.json").read_bytes()
    trained(directory)
    assert not any((directory / name).exists() for name in ("best_model.pkl", "feature_names.json", "archive"))
    assert (directory / "best_model_config.json").read_bytes() == config
    scores = json.loads((directory / "holdout_metrics.json").read_text())
    data = load_training_data(*cohort_files)
    test = split_parts(data) == TEST
    assert (scores["n_snapshots"], scores["n_visits"]) == (test.sum(), len(np.unique(data.visit[test])))
    assert scores["positive_rate"] == data.label[test].mean()
    # the same model on the same part as the search's winner
    for key, value in json.loads(config)["metrics"]["test"].items():
        assert scores[key] == pytest.approx(value, rel=1e-9), key
    out = capsys.readouterr().out
    assert f"Test part: ROC AUC: {scores['roc_auc']:.4f} (" in out and "Test part: Brier score" in out
    report = (directory / "holdout_report.html").read_text()
    assert "predictions on the test part" in report and "trained without the test part" in report


def test_holdout_figures_keep_the_searchs_test_part_whatever_the_seed(directory):
    """With another seed the search's winner was chosen on other parts: the same rows must stay held out."""
    before = json.loads((directory / "best_model_config.json").read_text())["metrics"]["test"]
    trained(directory, "--seed", "5")
    scores = json.loads((directory / "holdout_metrics.json").read_text())
    assert [scores[key] for key in ("n_snapshots", "n_visits", "positive_rate")] == [
        before[key] for key in ("n_snapshots", "n_visits", "positive_rate")
    ]


# --------------------------------------------------------------------------------------------------- --full


def test_full_writes_every_file_and_an_archived_copy(models_dir):
    assert set(DEPLOYED) <= set(files_of(models_dir))
    assert not (models_dir / "holdout_metrics.json").exists()
    (version,) = (models_dir / "archive").iterdir()
    config = load_config(models_dir / "best_model_config.json")
    assert version.name == config.model_version
    assert files_of(version) == {name: (models_dir / name).read_bytes() for name in DEPLOYED}


def test_full_leaves_the_search_as_it_was(searched, directory, capsys):
    trained(directory, "--full")
    before, after = (load_config(d / "best_model_config.json") for d in (searched, directory))
    same = (
        "feature_set",
        "feature_names",
        "model",
        "codes",
        "fill_value",
        "data",
        "snapshots",
        "seed",
    )
    assert [getattr(before, key) for key in same] == [getattr(after, key) for key in same]
    assert after.metrics.pop("out_of_fold")["n_visits"] == 279
    assert after.metrics == before.metrics
    for name in ("optimization_log.json", "optimization_summary.txt"):
        assert (directory / name).read_bytes() == (searched / name).read_bytes()
    assert capsys.readouterr().out.strip() == (directory / "production_model_info.txt").read_text().strip()


@pytest.mark.filterwarnings("ignore::feature_pipeline.MissingCodesWarning")  # one visit, with twelve codes at most
def test_config_names_the_models_digest_and_its_golden_probability(models_dir):
    config = load_config(models_dir / "best_model_config.json")
    assert config.model_sha256 == hashlib.sha256((models_dir / "best_model.pkl").read_bytes()).hexdigest()
    assert json.loads((models_dir / "feature_names.json").read_text()) == config.feature_names
    scores = pipeline_of(models_dir).predict(config.golden["observations"])
    assert scores["sepsis_probability"].tolist() == pytest.approx(config.golden["probability"], rel=1e-12)
    assert 0 < config.golden["probability"][0] < 1


def test_the_archived_version_is_a_deployment(models_dir, some):
    (version,) = (models_dir / "archive").iterdir()
    assert np.array_equal(scores_of(version, some), scores_of(models_dir, some))


def test_rolling_back_is_copying_the_archived_files(deployment, some):
    (old,) = (deployment / "archive").iterdir()
    expected = scores_of(deployment, some)
    trained(deployment, "--full", "--seed", "11")
    assert len(list((deployment / "archive").iterdir())) == 2
    assert not np.array_equal(scores_of(deployment, some), expected)
    for path in old.iterdir():
        shutil.copy(path, deployment)
    assert np.array_equal(scores_of(deployment, some), expected)


def test_the_same_seed_and_data_give_the_same_model(directory, some, tmp_path):
    other = shutil.copytree(directory, tmp_path / "other")
    for models in (directory, other):
        trained(models, "--full")
    assert np.array_equal(scores_of(directory, some), scores_of(other, some))
    one, two = (load_config(models / "best_model_config.json") for models in (directory, other))
    for key in ("golden", "decision_threshold", "metrics"):
        assert getattr(one, key) == getattr(two, key)


def test_the_model_file_names_no_class_of_the_training_scripts(models_dir):
    model = joblib.load(models_dir / "best_model.pkl")
    assert {type(part).__module__ for part in (model, *model.members)} == {"feature_pipeline"}
    assert model.metadata["model_version"] == load_config(models_dir / "best_model_config.json").model_version


def test_probabilities_are_calibrated_out_of_fold(directory, cohort_files, monkeypatch):
    seen = {}
    original = training.train.calibrated

    def calibrated(model, out_of_fold, label):
        probability = original(model, out_of_fold, label)
        seen.update(model=model, probability=probability, label=label, out_of_fold=out_of_fold)
        return probability

    monkeypatch.setattr(training.train, "calibrated", calibrated)
    trained(directory, "--full")
    assert len(seen["probability"]) == len(load_training_data(*cohort_files).label)  # every snapshot was held out once
    assert seen["probability"].mean() == pytest.approx(seen["label"].mean(), rel=0.1)
    assert np.array_equal(seen["probability"], seen["model"].calibrate(seen["out_of_fold"]))
    brier = load_config(directory / "best_model_config.json").metrics["out_of_fold"]["brier"]
    assert brier == pytest.approx(np.mean((seen["probability"] - seen["label"]) ** 2))
    # the better of a constant forecast and the model
    assert brier <= 1.02 * seen["label"].mean() * (1 - seen["label"].mean())


def test_the_decision_threshold_is_that_of_high(models_dir):
    config = load_config(models_dir / "best_model_config.json")
    assert config.decision_sensitivity is None and config.decision_threshold == config.risk_thresholds["high"]


def test_reports_are_self_contained(models_dir):
    report = (models_dir / "training_report.html").read_text()
    assert 'src="data:image/png;base64,' in report and report.count("src=") == 1
    assert "http://" not in report and "https://" not in report
    for heading in ("Calibration", "Operating points", "ROC AUC", "Brier score", "not a medical device"):
        assert heading in report
    info = (models_dir / "production_model_info.txt").read_text()
    for part in ("Trained at", "Cross-validated: ROC AUC", "Libraries: python", "Use: ", "Do not "):
        assert part in info


def test_reports_hold_neither_clients_nor_visits(models_dir, cohort):
    text = "".join((models_dir / name).read_text() for name in DEPLOYED[1:])
    assert not any(client in text for client in cohort[0]["client"].unique())


# --------------------------------------------------------------------------------------------- what it refuses


def refused(capsys, *arguments) -> str:
    assert train_best_model.main([*map(str, arguments), "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    return shown.err


@pytest.mark.parametrize("flags", [[], ["--full"]])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema version 99, this code reads version"),
        ({"model": {"name": "x", "colour": "red"}}, "not a model configuration"),
        ({"model": {"name": "x", "kind": "oracle"}}, "oracle"),
        ({"feature_names": ["HR__fortune"]}, "unknown feature 'HR__fortune'"),
        ({"data": {"synthetic": False}}, "data"),
        ({"snapshots": {"weekly": True}}, "snapshots"),
    ],
)
def test_a_config_that_cannot_be_used(directory, capsys, flags, changes, message):
    change_config(directory, **changes)
    before = files_of(directory)
    assert message in refused(capsys, "--models-dir", directory, "--jobs", 1, *flags)
    assert files_of(directory) == before


def test_no_search_yet(tmp_path, capsys):
    assert "run generate_features.py first" in refused(capsys, "--models-dir", tmp_path)


def test_data_that_are_gone(directory, cohort_files, tmp_path, capsys):
    config = load_config(directory / "best_model_config.json")
    change_config(directory, data={**config.data, "observations": str(tmp_path / "gone.parquet")})
    assert "gone.parquet" in refused(capsys, "--models-dir", directory)
    assert "go together" in refused(capsys, "--models-dir", directory, "--observations", cohort_files[0])


def test_other_data_than_the_searchs_give_a_warning(directory, cohort, cohort_files, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    cohort[1].iloc[1:].to_csv(labels, index=False)
    trained(directory, "--full", "--observations", str(cohort_files[0]), "--labels", str(labels))
    shown = capsys.readouterr()
    assert shown.err == ("warning: these are not the data of the search; the config's test figure is of other data\n")
    assert "Test part of the search" not in shown.out
    pipeline_of(directory)


def test_the_config_tells_what_the_deployed_model_was_trained_on(directory, cohort, cohort_files, tmp_path):
    labels = tmp_path / "labels.csv"
    cohort[1].iloc[1:].to_csv(labels, index=False)
    trained(directory, "--full", "--observations", str(cohort_files[0]), "--labels", str(labels))
    fingerprint = load_training_data(cohort_files[0], labels).fingerprint
    assert fingerprint in (directory / "best_model_config.json").read_text()


def test_the_searchs_data_give_no_warning(directory, capsys):
    trained(directory)
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------- interrupted writes


@pytest.fixture(scope="module")
def second_version(models_dir, tmp_path_factory):
    """What a second training would deploy: everything that `deploy` is given but the directory."""
    directory = shutil.copytree(models_dir, tmp_path_factory.mktemp("second") / "models")
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.train, "deploy", lambda directory, *rest: given.extend(rest))
        trained(directory, "--full", "--seed", "11")
    return given


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
@pytest.mark.parametrize("at", range(2 * len(DEPLOYED)))
@pytest.mark.filterwarnings("ignore::feature_pipeline.UnfinishedSwitchWarning")
def test_a_write_that_fails_never_mixes_two_versions(deployment, some, second_version, monkeypatch, at, error):
    """Each write in turn fails: the old version stays in place, or a pipeline refuses to start."""
    expected = scores_of(deployment, some)
    left, original = [at], artifacts.write_atomic

    def write(path, content):
        if not left[0]:
            raise error
        left[0] -= 1
        original(path, content)

    monkeypatch.setattr(versions, "write_atomic", write)
    with pytest.raises(type(error)):
        versions.deploy(deployment, *second_version)
    assert {path.name for path in deployment.rglob(".*") if path.is_file()} <= {".deploy.lock"}  # no temporary files
    try:
        assert np.array_equal(scores_of(deployment, some), expected)
    except BadModel as refused:
        assert at > len(DEPLOYED), "the archive comes first and touches nothing"
        assert "SHA-256 differs" in str(refused)
    left[0] = 99
    versions.deploy(deployment, *second_version)  # done again, it is whole
    assert not np.array_equal(scores_of(deployment, some), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill_value": 7}, "'fill_value' differs from the model's"),
        ({"seed": None}, "'seed' is missing"),
        ({"metrics": None, "decision_sensitivity": None}, "'metrics' is missing"),
    ],
)
def test_an_edited_config_is_refused_before_training(deployment, capsys, changes, message):
    change_config(deployment, **changes)
    before = files_of(deployment)
    assert message in refused(capsys, "--models-dir", deployment, "--jobs", 1, "--full")
    assert files_of(deployment) == before


def test_what_would_not_load_is_neither_deployed_nor_archived(deployment, second_version, some):
    """The golden example of the new version is checked before a file of the deployed one is touched."""
    expected, before = scores_of(deployment, some), files_of(deployment)
    version, files = second_version
    config = json.loads(files[CONFIG])
    config["golden"]["features"][0][0] = 12345.0
    with pytest.raises(BadModel, match="golden example gives other features"):
        versions.deploy(deployment, version, {**files, CONFIG: json.dumps(config)})
    assert files_of(deployment) == before
    assert not (deployment / "archive" / version).exists()
    assert np.array_equal(scores_of(deployment, some), expected)


def test_the_card_knows_groups_by_the_hospitals_own_codes(cohort):
    observations, labels = cohort
    own = {"Age": "own age", "Gender": "own sex"}
    renamed = observations.assign(
        observation_type_code=observations["observation_type_code"].map(lambda code: own.get(code, code))
    )
    groups = [
        {attribute for attribute, _, _ in groups_of(load_training_data(table, labels, codes=Codes(synonyms)))}
        for table, synonyms in ((observations, {}), (renamed, {"own age": "age", "own sex": "sex"}), (renamed, {}))
    ]
    assert groups[0] == groups[1] >= {"age", "sex"}
    assert not groups[2] & {"age", "sex"}


@pytest.mark.parametrize(("error", "status"), [(OSError("no space left"), 2), (KeyboardInterrupt(), 130)])
def test_a_write_that_fails_is_one_line(deployment, some, monkeypatch, capsys, error, status):
    before = files_of(deployment)

    def write(path, content):
        raise error

    monkeypatch.setattr(versions, "write_atomic", write)
    trained(deployment, "--full", "--seed", "11", status=status)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert files_of(deployment) == before
    # an archived version is whole or not there
    assert all(set(files_of(version)) == set(DEPLOYED) for version in (deployment / "archive").iterdir())


# -------------------------------------------------------------------------------------- run_tests.py pipeline


def checked(directory, tmp_path, **paths):
    """Exit status of the pipeline check."""
    paths = {"config": directory / "best_model_config.json", "model": directory / "best_model.pkl", **paths}
    sample = tmp_path / "sample" / "new.csv"
    arguments = ["pipeline", "--config", str(paths["config"]), "--model", str(paths["model"]), "--patients", "40"]
    return run_tests.main([*arguments, "--sample", str(sample), "--quiet"]), sample


def test_the_check_passes_and_writes_new_patients(models_dir, tmp_path, capsys):
    status, sample = checked(models_dir, tmp_path)
    out = capsys.readouterr().out
    assert status == 0 and out.count("ok: ") == 5 and "FAILED" not in out
    for part in ("golden example reproduced", "feature names", "visits scored", "median"):
        assert part in out
    assert read_observations(sample).n_visits == 20
    scores = pipeline_of(models_dir).predict(sample)
    assert len(scores) == 20 and scores["sepsis_probability"].between(0, 1).all()


@pytest.mark.parametrize(
    "names", [lambda names: names[::-1], lambda names: names[1:], lambda names: [*names, "HR__last__6h"], lambda _: {}]
)
def test_the_check_fails_where_feature_names_differ(deployment, tmp_path, capsys, names):
    path = deployment / "feature_names.json"
    path.write_text(json.dumps(names(json.loads(path.read_text()))))
    assert checked(deployment, tmp_path)[0] == 1
    out = capsys.readouterr().out
    assert "FAILED: feature names: " in out and out.count("ok: ") == 4


@pytest.mark.parametrize("content", [None, "[half"])
def test_the_check_fails_where_feature_names_are_missing_or_broken(deployment, tmp_path, capsys, content):
    path = deployment / "feature_names.json"
    path.unlink() if content is None else path.write_text(content)
    assert checked(deployment, tmp_path)[0] == 1
    assert "FAILED: feature names: " in capsys.readouterr().out


def tampered(directory: Path) -> None:
    content = bytearray((directory / "best_model.pkl").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "best_model.pkl").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (tampered, "SHA-256 differs"),
        (lambda d: (d / "best_model.pkl").unlink(), "cannot be read"),
        (lambda d: change_config(d, schema_version=0), "schema version 0"),
        (lambda d: (d / "best_model_config.json").unlink(), "does not exist"),
        (lambda d: change_config(d, golden={}), "golden"),
    ],
)
def test_the_check_cannot_start(deployment, tmp_path, capsys, spoil, message):
    spoil(deployment)
    status, sample = checked(deployment, tmp_path)
    shown = capsys.readouterr()
    assert status == 2 and not sample.exists()
    assert len(shown.err.splitlines()) == 1 and shown.err.startswith("error: ") and message in shown.err


def test_the_check_sees_features_that_depend_on_the_company(models_dir, cohort):
    """A reproducer that looks at the other visits in the call is found out."""
    pipeline = pipeline_of(models_dir)
    original = pipeline.reproducer.transform

    def transform(rows):
        features = original(rows)
        features[pipeline.feature_names[0]] = len(features)
        return features

    pipeline.reproducer.transform = transform
    with pytest.raises(AssertionError, match="features differ when the rows come"):
        training.check.check_features(pipeline, cohort[0])


def test_the_check_misses_no_prediction(models_dir):
    pipeline = pipeline_of(models_dir)
    lost = training.check.own_visits(pipeline.config, 30)
    lost.loc[lost["visit_id"].isin([f"v{i}" for i in range(15)]), "observation_value"] = np.nan
    with (
        pytest.warns(UnknownRiskWarning),
        pytest.raises(AssertionError, match="30 visits, 15 with a number"),
    ):
        training.check.check_predictions(pipeline, lost)


def test_without_an_argument_the_suite_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(pytest, "main", lambda options: calls.append(options) or 0)
    assert run_tests.main(["--jobs", "1"]) == 0 and run_tests.main(["--fast", "--jobs", "1"]) == 0
    assert calls == [[], ["-m", "not slow"]]
    monkeypatch.setattr(pytest, "main", lambda options: 1)
    assert run_tests.main(["all", "--jobs", "1"]) == 1


def test_sample_file_of_the_check_is_plain_csv(models_dir, tmp_path):
    sample = checked(models_dir, tmp_path)[1]
    assert list(pd.read_csv(sample, nrows=0).columns)[:2] == ["visit_id", "client"]
