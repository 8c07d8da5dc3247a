"""The search from the shell: what it writes, what it keeps apart, how it goes on, what it says when it cannot."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import pytest

import generate_features
from common import command_line
from feature_pipeline import FeaturePlan, SnapshotSettings, load_config, parse_feature
from sources.demo_cohort import make_demo_cohort
from training import fitting, trials
from training import search as search_module
from training import snapshots as training_data
from training.candidates import CONFIGURATION, FEATURE_SETS, MODEL_CONFIGURATIONS, feature_set_names
from training.fitting import FeatureTable, filled
from training.snapshots import TEST, TRAIN, load_training_data, split_parts

SETS, MODELS = ("latest", "clinical"), ("lightgbm_shallow", "logistic_regression")
WRITTEN = ("best_model_config.json", "optimization_log.json", "optimization_summary.txt")
QUICK = set(itertools.product(search_module.QUICK_SETS, search_module.QUICK_MODELS))
SCRIPT = Path(generate_features.__file__)


def options(files, directory, *more, sets=SETS[:1], models=MODELS, jobs=1) -> list[str]:
    observations, labels = files
    return [
        *("--observations", str(observations), "--labels", str(labels), "--models-dir", str(directory)),
        *("--feature-sets", ",".join(sets), "--models", ",".join(models), "--jobs", str(jobs)),
        *("--finalists", "1", "--folds", "2", *more),
    ]


def searched(files, directory, *more, status=0, **settings):
    """Runs the search; gives the entries of its log."""
    assert generate_features.main(options(files, directory, *more, **settings)) == status
    return log_of(directory)


def log_of(directory) -> list[dict]:
    return json.loads((directory / "optimization_log.json").read_text())


def config_of(directory):
    """The config without the time at which its thresholds were set."""
    config = load_config(directory / "best_model_config.json")
    return replace(config, thresholds={**config.thresholds, "at": ""})


def summary_of(directory) -> str:
    return (directory / "optimization_summary.txt").read_text()


def without_times(entries) -> list[dict]:
    """The entries in an order of their own, without what differs from run to run."""
    kept = [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]
    return sorted(kept, key=lambda entry: (entry["feature_set"], entry["model"]))


def results(entries) -> list[dict]:
    """What the candidates reached, whatever the data were called."""
    return [{key: value for key, value in entry.items() if key != "fingerprint"} for entry in without_times(entries)]


@pytest.fixture
def counted(monkeypatch):
    """The names of the model configurations that are fitted while a test runs, in order."""
    fitted, original = [], fitting.Fits.model

    def model(self, configuration):
        fitted.append(configuration.name)
        return original(self, configuration)

    monkeypatch.setattr(fitting.Fits, "model", model)
    return fitted


def fails(error):
    def fit(*_):
        raise error

    return fit


@pytest.fixture(scope="module")
def search(cohort_files, tmp_path_factory):
    """The models directory after a search over four candidates."""
    directory = tmp_path_factory.mktemp("search")
    searched(cohort_files, directory, "--quiet", sets=SETS)
    return directory


# ------------------------------------------------------------------------------------------- the candidates


def test_the_feature_sets_and_model_configurations():
    assert len(FEATURE_SETS) == 10 and len(MODEL_CONFIGURATIONS) == len(CONFIGURATION) == 8
    kinds = {c.kind for c in MODEL_CONFIGURATIONS}
    assert kinds == {"lightgbm", "logistic_regression", "extra_trees", "hist_gradient_boosting"}
    native = {c.fill_value is None for c in MODEL_CONFIGURATIONS if c.kind == "lightgbm"}
    assert native == {True, False}  # missing values left to the model, and filled


@pytest.mark.parametrize("feature_set", FEATURE_SETS)
def test_every_feature_of_every_set_can_be_parsed_back(feature_set):
    names = feature_set_names(feature_set, ["HR", "Age", "NA", "odd__code", "X__min", "6h"])
    assert names and len(set(names)) == len(names)
    assert [str(parse_feature(name)) for name in names] == names
    assert FeaturePlan(names).names == names


def test_feature_sets_differ():
    names = [frozenset(feature_set_names(feature_set, ["HR", "Temp"])) for feature_set in FEATURE_SETS]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def latest(cohort_files):
    """(table of the latest values, labels) of the cohort."""
    data = load_training_data(*cohort_files)
    return FeatureTable.of(data, feature_set_names("latest", data.observations.codes)), data.label


def fitted(configuration, table, label, seed=3):
    rows, columns = np.arange(len(label)), np.arange(len(table.plain))
    return fitting.fit_model(configuration, table, rows, columns, label, seed)


@pytest.mark.parametrize("configuration", MODEL_CONFIGURATIONS, ids=lambda c: c.name)
def test_every_model_configuration_fits_and_repeats_itself(configuration, latest):
    table, label = latest
    features = filled(table.plain.T, configuration.fill_value)
    one, two = (fitted(configuration, table, label).log_odds(features) for _ in range(2))
    assert np.array_equal(one, two)
    assert np.isfinite(one).all() and one[label == 1].mean() > one[label == 0].mean()


def test_logistic_regression_bears_what_training_never_saw(latest):
    """Features that were empty in training, and values far from any."""
    table, label = replace(latest[0], plain=latest[0].plain.copy()), latest[1]
    table.plain[3] = np.nan
    model = fitted(CONFIGURATION["logistic_regression"], table, label)
    odd = np.array([[1e6], [-1e6]]) * np.ones(len(table.plain))
    assert np.abs(model.log_odds(odd)).max() < 50


# --------------------------------------------------------------------------------------------- what it writes


def test_the_search_writes_its_three_files_and_nothing_else(search):
    assert sorted(path.name for path in search.iterdir()) == sorted(WRITTEN)


def test_the_log_has_every_candidate_with_scores_sizes_and_seconds(search):
    entries = log_of(search)
    expected = set(itertools.product(SETS, MODELS))
    assert len(entries) == len(expected) and {(e["feature_set"], e["model"]) for e in entries} == expected
    for entry in entries:
        assert 0 < entry["average_precision"] < entry["roc_auc"] <= 1
        assert entry["score"] == entry["roc_auc"] + entry["average_precision"]
        assert entry["seconds"] >= 0 and entry["n_features"] > 0 and len(entry["fingerprint"]) == 16


def test_the_summary_ranks_by_score_and_names_the_winner(search):
    text, entries = summary_of(search), log_of(search)
    table = text.split("candidates by validation")[1].splitlines()[2:]
    ranked = sorted(entries, key=lambda e: -e["score"])
    assert [line.split()[-2:] for line in table] == [[e["feature_set"], e["model"]] for e in ranked]
    assert [line.split()[:2] for line in table] == [[str(i), f"{e['score']:.4f}"] for i, e in enumerate(ranked, 1)]
    config = load_config(search / "best_model_config.json")
    assert (config.feature_set, config.model["name"]) == (ranked[0]["feature_set"], ranked[0]["model"])
    assert f"Winner: {config.feature_set} with {config.model['name']}" in text
    assert f"{config.metrics['test']['roc_auc']:.4f} (" in text
    for heading in ("threshold  sensitivity  specificity    PPV", "used once, with 95% intervals resampled by client"):
        assert heading in text


def test_the_config_holds_what_a_pipeline_and_a_reader_need(search, cohort_files):
    config = load_config(search / "best_model_config.json")
    assert config.model_sha256 is None  # nothing is deployed yet
    assert config.model == json.loads(json.dumps(asdict(CONFIGURATION[config.model["name"]])))
    assert config.snapshots == SnapshotSettings()
    assert 0 < config.risk_thresholds["medium"] < config.risk_thresholds["high"] == config.decision_threshold < 1
    assert config.data["fingerprint"] == load_training_data(*cohort_files).fingerprint
    assert config.data["grouped_by"] == "client" and config.data["synthetic"] is False
    assert config.library_versions.keys() >= {"python", "numpy", "lightgbm"} and config.seed == 0
    low, high = config.metrics["test"]["roc_auc_95"]
    assert low <= config.metrics["test"]["roc_auc"] <= high
    text = (search / "best_model_config.json").read_text()
    assert "NaN" not in text and "Infinity" not in text  # JSON that any reader takes


def test_the_config_passes_after_training(config_path):
    config = load_config(config_path)
    assert config.feature_names and config.golden["probability"]


def test_quick_runs_a_part_of_the_candidates(cohort_files, tmp_path, monkeypatch):
    seen = []

    def judge(search, todo, *_):
        seen.extend((feature_set, configuration.name) for feature_set, configuration in todo)
        raise KeyboardInterrupt

    monkeypatch.setattr(search_module, "run_candidates", judge)
    observations, labels = map(str, cohort_files)
    named = ["--observations", observations, "--labels", labels, "--models-dir", str(tmp_path)]
    assert generate_features.main([*named, "--quick", "--quiet"]) == 130
    assert set(seen) == QUICK and len(seen) == len(QUICK)
    seen.clear()
    assert generate_features.main([*named, "--quiet"]) == 130
    assert set(seen) == set(itertools.product(FEATURE_SETS, CONFIGURATION)) and len(seen) == len(set(seen))


@pytest.mark.slow
def test_quick_gives_a_winner(cohort_files, tmp_path):
    observations, labels = map(str, cohort_files)
    named = ["--observations", observations, "--labels", labels, "--models-dir", str(tmp_path), "--jobs", "2"]
    assert generate_features.main([*named, "--quick", "--quiet", "--finalists", "2"]) == 0
    assert len(log_of(tmp_path)) == len(QUICK) and "score" in log_of(tmp_path)[0]
    load_config(tmp_path / "best_model_config.json")


# ------------------------------------------------------------------------------------------------- notices


def test_synthetic_data_are_named_in_the_first_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_data, "make_demo_cohort", lambda: make_demo_cohort(n_patients=250, seed=7))
    demo = options(("", ""), tmp_path, models=MODELS[:1])[4:]
    assert generate_features.main(demo) == 0
    shown = capsys.readouterr()
    for text in (summary_of(tmp_path), shown.out, shown.err):
        assert "synthetic demo cohort (no real patients)" in text.splitlines()[0]
    assert load_config(tmp_path / "best_model_config.json").data["synthetic"] is True


def test_retrospective_figures_are_called_so_in_the_first_line(cohort, cohort_files, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    cohort[1].drop(columns="sepsis_onset").to_csv(labels, index=False)
    searched((cohort_files[0], labels), tmp_path / "models", models=MODELS[:1])
    shown = capsys.readouterr()
    for text in (summary_of(tmp_path / "models"), shown.out, shown.err):
        assert text.startswith("RETROSPECTIVE: ")
    assert "Positive means: septic at all" in summary_of(tmp_path / "models")


def test_what_was_set_aside_and_left_out_stands_in_the_summary(cohort, cohort_files, tmp_path):
    observations, labels = cohort
    rows = observations.astype({"observation_value": object})
    rows.loc[rows.index[:5], "observation_value"] = "plenty"
    rows.to_csv(tmp_path / "observations.csv", index=False)
    labels.iloc[3:].to_csv(tmp_path / "labels.csv", index=False)
    directory = tmp_path / "models"
    searched((tmp_path / "observations.csv", tmp_path / "labels.csv"), directory, "--quiet", models=MODELS[:1])
    text = summary_of(directory)
    assert "5 rows: observation_value is not a number" in text
    assert "Left out: 3 visits without a label." in text


# -------------------------------------------------------------------------------------------------- failures


def test_a_candidate_that_fails_is_logged_and_the_search_goes_on(cohort_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fitting._FIT, "logistic_regression", fails(ValueError("no luck")))
    entries = searched(cohort_files, tmp_path, sets=SETS, status=1)
    failed = [e for e in entries if "error" in e]
    assert len(entries) == 4 and [e["model"] for e in failed] == ["logistic_regression"] * 2
    assert all(e["error"] == "ValueError: no luck" and "score" not in e and e["seconds"] >= 0 for e in failed)
    assert "logistic_regression with clinical failed: ValueError: no luck" in capsys.readouterr().err
    assert "failed  latest with logistic_regression: ValueError: no luck" in summary_of(tmp_path)
    assert load_config(tmp_path / "best_model_config.json").model["name"] == "lightgbm_shallow"


def test_a_model_whose_scores_are_not_finite_has_failed(cohort_files, tmp_path, monkeypatch):
    fit = fitting._FIT["logistic_regression"]

    def broken(*arguments):
        member = fit(*arguments)
        member.intercept = float("nan")
        return member

    monkeypatch.setitem(fitting._FIT, "logistic_regression", broken)
    entries = searched(cohort_files, tmp_path, "--quiet", status=1)
    assert [e["error"] for e in entries if "error" in e] == ["ValueError: the model gives scores that are not finite"]


def test_nothing_is_chosen_when_all_candidates_fail(cohort_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fitting._FIT, "lightgbm", fails(MemoryError()))
    entries = searched(cohort_files, tmp_path, "--quiet", models=MODELS[:1], status=2)
    assert "MemoryError" in entries[0]["error"]
    assert "error: all 1 candidates failed; see" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["optimization_log.json"]


# ------------------------------------------------------------------------------------ the test part stays out


def of_the_test_part(cohort_files, *flags):
    """(observations, labels, visits of the test part) of the cohort."""
    data = load_training_data(*cohort_files, SnapshotSettings(after_onset="--after-onset" in flags))
    visits = data.observations.visit_text[np.unique(data.visit[split_parts(data) == TEST])]
    observations, labels = pd.read_parquet(cohort_files[0]), pd.read_csv(cohort_files[1], parse_dates=["sepsis_onset"])
    return observations, labels, visits.astype(int)


def with_other_onsets(observations, labels, visits):
    """Septic test visits are septic from their first hour on: other labels, the same visits with and without sepsis."""
    start = observations.groupby("visit_id")["observation_date"].min()
    septic = labels["visit_id"].isin(visits) & (labels["sepsis"] == 1)
    moved = labels["sepsis_onset"].where(~septic, labels["visit_id"].map(start))
    assert septic.sum() > 5
    return observations, labels.assign(sepsis_onset=moved)


def with_other_values(observations, labels, visits):
    """The values of the test visits are those of other rows of the same code."""
    rows = observations["visit_id"].isin(visits) & observations["observation_value"].notna()
    rows &= observations["observation_type_code"] != "Age"
    by_code = observations[rows].groupby("observation_type_code")["observation_value"]
    other = by_code.transform(lambda values: np.roll(values, len(values) // 2))
    return observations.assign(observation_value=observations["observation_value"].where(~rows, other)), labels


@pytest.mark.parametrize("change", [with_other_onsets, with_other_values])
def test_the_test_part_has_no_say_in_any_choice(cohort_files, tmp_path, change):
    """Altered test visits change the test figures and nothing else that was chosen, ranked or fitted."""
    observations, labels = change(*of_the_test_part(cohort_files, "--after-onset"))
    observations.to_parquet(tmp_path / "observations.parquet")
    labels.to_csv(tmp_path / "labels.csv", index=False)
    altered = tmp_path / "observations.parquet", tmp_path / "labels.csv"
    flags = ("--after-onset", "--quiet")
    first = searched(cohort_files, tmp_path / "first", *flags, sets=SETS)
    second = searched(altered, tmp_path / "second", *flags, sets=SETS)

    assert results(first) == results(second)
    one, two = (load_config(tmp_path / name / "best_model_config.json") for name in ("first", "second"))
    assert one.data["fingerprint"] != two.data["fingerprint"]
    assert one.metrics.pop("test")["roc_auc"] != two.metrics.pop("test")["roc_auc"]
    chosen = ("feature_set", "model", "feature_names", "codes", "fill_value", "metrics", "risk_thresholds", "golden")
    assert [getattr(one, key) for key in chosen] == [getattr(two, key) for key in chosen]

    changing = re.compile(
        r"ROC AUC lost.*|set by .*|  \w+ +on the test part: .*|\(\d+ s in all\)|\d+\.\d(?=  \w+ +\w+$)", re.M
    )
    texts = [changing.sub("", summary_of(tmp_path / n).split("Grouped cross-")[1]) for n in ("first", "second")]
    assert texts[0] == texts[1]


def test_candidates_are_fitted_on_training_rows_alone(cohort_files, tmp_path, monkeypatch):
    """First the training part; then, for the winner, folds of training and validation parts, and both parts whole."""
    part = split_parts(load_training_data(*cohort_files))
    seen, original = [], fitting.Fits.model

    def model(self, configuration):
        seen.append(self.rows)
        return original(self, configuration)

    monkeypatch.setattr(fitting.Fits, "model", model)
    searched(cohort_files, tmp_path, "--quiet", models=MODELS[:1])
    train, *folds, winner, again = seen
    assert np.array_equal(again, train)  # for the minimum of evidence
    assert np.array_equal(train, np.flatnonzero(part == TRAIN))
    assert np.array_equal(winner, np.flatnonzero(part != TEST))
    assert np.array_equal(np.sort(np.concatenate(folds)), winner)  # of two folds, each row trains one


# -------------------------------------------------------------------------------------------- resume, interrupt


def test_resume_keeps_what_was_finished_and_fits_the_rest(cohort_files, tmp_path, counted, capsys):
    before = searched(cohort_files, tmp_path, sets=SETS)
    entries = [e for e in before if (e["feature_set"], e["model"]) != ("clinical", "logistic_regression")]
    (tmp_path / "optimization_log.json").write_text(json.dumps(entries))
    winner = config_of(tmp_path)
    counted.clear()
    after = searched(cohort_files, tmp_path, "--resume", sets=SETS)
    assert counted[0] == "logistic_regression"
    assert counted[1:] == [winner.model["name"]] * 4  # two folds, the winner, and on the training part alone
    assert after[:3] == entries  # not even their seconds
    assert without_times(after) == without_times(before)
    assert "resumed: 3 of 4 candidates were finished before" in capsys.readouterr().err
    assert config_of(tmp_path) == winner


def test_without_resume_everything_is_done_again(cohort_files, tmp_path, counted):
    searched(cohort_files, tmp_path, "--quiet")
    counted.clear()
    searched(cohort_files, tmp_path, "--quiet")
    assert set(counted[:2]) == set(MODELS)


def test_resume_tries_failed_candidates_again(cohort_files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(fitting._FIT, "logistic_regression", fails(ValueError("no luck")))
        searched(cohort_files, tmp_path, "--quiet", status=1)
    entries = searched(cohort_files, tmp_path, "--quiet", "--resume")
    assert len(entries) == 2 and all("score" in e for e in entries)


SETTINGS = (
    ["--snapshot-every", "12"],
    ["--horizon", "8"],
    ["--after-onset"],
    ["--seed", "1"],
)


@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
def test_resume_does_not_reuse_entries_of_other_settings(cohort_files, tmp_path, counted, setting):
    searched(cohort_files, tmp_path, "--quiet")
    counted.clear()
    searched(cohort_files, tmp_path, "--quiet", "--resume", *setting)
    assert set(counted[:2]) == set(MODELS)


def test_resume_does_not_reuse_entries_of_other_data(cohort, cohort_files, tmp_path, counted):
    before = searched(cohort_files, tmp_path, "--quiet")
    observations = cohort[0].copy()
    row = observations.index[observations["observation_type_code"] == "HR"][3]
    observations.loc[row, "observation_value"] += 1
    observations.to_parquet(tmp_path / "other.parquet")
    counted.clear()
    after = searched((tmp_path / "other.parquet", cohort_files[1]), tmp_path, "--quiet", "--resume")
    assert set(counted[:2]) == set(MODELS)
    assert not {e["fingerprint"] for e in before} & {e["fingerprint"] for e in after}


def test_resume_does_not_reuse_entries_of_other_synonyms(cohort, cohort_files, tmp_path, counted):
    """What a code means changes the clinical scores, though neither an observation nor a feature's name changes."""
    observations = cohort[0].replace({"observation_type_code": {"SBP": "p1", "DBP": "p2"}})
    observations.to_parquet(tmp_path / "observations.parquet")
    files = tmp_path / "observations.parquet", cohort_files[1]

    def meaning(p1, p2):
        (tmp_path / "synonyms.csv").write_text(f"code,concept\np1,{p1}\np2,{p2}\n")
        return "--quiet", "--synonyms", str(tmp_path / "synonyms.csv")

    before = searched(files, tmp_path, *meaning("diastolic_bp", "systolic_bp"), sets=["clinical"])  # mixed up at first
    counted.clear()
    right = meaning("systolic_bp", "diastolic_bp")
    after = searched(files, tmp_path, *right, "--resume", sets=["clinical"])
    assert set(counted[:2]) == set(MODELS)
    assert results(after) == results(searched(files, tmp_path / "afresh", *right, sets=["clinical"])) != results(before)


@pytest.mark.parametrize("content", ["", "[{", "{}", '"text"', "[1, 2]", '[{"score": 1.0}]'])
def test_resume_from_a_log_that_is_none_starts_anew(cohort_files, tmp_path, content):
    (tmp_path / "optimization_log.json").write_text(content)
    assert len(searched(cohort_files, tmp_path, "--quiet", "--resume", models=MODELS[:1])) == 1


def test_an_interrupted_search_keeps_its_log_and_says_how_to_go_on(cohort_files, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(fitting._FIT, "logistic_regression", fails(KeyboardInterrupt()))
        first = searched(cohort_files, tmp_path, "--quiet", status=130)
    assert [e["model"] for e in first] == ["lightgbm_shallow"]
    assert capsys.readouterr().err == (
        "interrupted; finished work is kept; run the same command with --resume to continue\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["optimization_log.json"]
    after = searched(cohort_files, tmp_path, "--quiet", "--resume")
    assert after[0] == first[0] and len(after) == 2
    assert without_times(after) == without_times(searched(cohort_files, tmp_path / "whole", "--quiet"))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupt_from_the_keyboard(cohort_files, tmp_path, jobs):
    """SIGINT to the script itself, as soon as the first candidate is logged."""
    code = f"""
import os, signal, sys
import generate_features
from training import trials
write = trials.write_json
def write_and_interrupt(path, content):
    write(path, content)
    os.kill(os.getpid(), signal.SIGINT)
trials.write_json = write_and_interrupt
sys.exit(generate_features.main({options(cohort_files, tmp_path, sets=SETS, jobs=jobs)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].endswith("run the same command with --resume to continue")
    assert "Traceback" not in done.stderr
    finished = log_of(tmp_path)
    assert 1 <= len(finished) < 4
    after = searched(cohort_files, tmp_path, "--quiet", "--resume", sets=SETS)
    assert after[: len(finished)] == finished and len(after) == 4


# -------------------------------------------------------------------------------------------- many processes


def test_two_processes_give_the_scores_of_one(search, cohort_files, tmp_path):
    entries = searched(cohort_files, tmp_path, "--quiet", sets=SETS, jobs=2)
    assert without_times(entries) == without_times(log_of(search))
    one, two = map(config_of, (search, tmp_path))
    assert one == two


def test_other_processes_get_the_table_as_it_is(cohort_files, tmp_path):
    """joblib hands large arrays over as memory maps; each value must stay in its place."""
    data = load_training_data(*cohort_files)
    names = feature_set_names("summary_trend", data.observations.codes)
    table = FeatureTable.of(data, names)
    assert np.array_equal(table.plain.T, data.evaluate(names), equal_nan=True)
    rows, columns = np.arange(len(data.label))[::7], np.arange(len(names))[::-3]
    for hand_over in (table, table.at(np.arange(len(data.label)))):  # a file; in memory
        there = joblib.Parallel(n_jobs=2, max_nbytes="10K")(
            joblib.delayed(FeatureTable.rows)(hand_over, rows, columns, hidden) for hidden in (False, True)
        )
        for hidden, values in zip((False, True), there, strict=True):
            assert np.array_equal(values, table.rows(rows, columns, hidden), equal_nan=True)
    assert np.array_equal(table.rows(rows, columns), data.evaluate(names)[np.ix_(rows, columns)], equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets that the cluster leaves to its processes' end
@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
def test_a_dask_cluster_of_two_processes_gives_the_scores_of_one(search, cohort_files, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        flags = ("--backend", "dask", "--scheduler", cluster.scheduler_address)
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *options(cohort_files, tmp_path, *flags, sets=SETS)],
            capture_output=True,
            text=True,
            timeout=180,
        )
        with distributed.Client(cluster) as client:
            workers = client.run(lambda: "training.candidates" in sys.modules)
    assert done.returncode == 0, done.stderr
    assert list(workers.values()) == [True, True]  # both had work
    assert without_times(log_of(tmp_path)) == without_times(log_of(search))
    one, two = map(config_of, (search, tmp_path))
    assert one == two


# ---------------------------------------------------------------------------------------------------- bad input


def refused(capsys, arguments) -> str:
    """The one line on stderr of a search that could not start."""
    assert generate_features.main([*arguments, "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def files_with(cohort, folder, observations=lambda table: table, labels=lambda table: table):
    """The cohort as CSV files, changed."""
    observations(cohort[0]).to_csv(folder / "observations.csv", index=False)
    labels(cohort[1]).to_csv(folder / "labels.csv", index=False)
    return folder / "observations.csv", folder / "labels.csv"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": lambda t: t.drop(columns="observation_value")}, "missing column 'observation_value'; found"),
        ({"observations": lambda t: t.drop(columns=["client", "visit_id"])}, "missing column 'visit_id', 'client'"),
        ({"observations": lambda t: t.head(0)}, "no usable observation in 0 rows"),
        ({"observations": lambda t: t.assign(observation_value="much")}, "observation_value is not a number"),
        ({"labels": lambda t: t.drop(columns="sepsis")}, "missing column 'sepsis' among"),
        ({"labels": lambda t: t.drop(columns="client")}, "missing column 'client' among"),
        ({"labels": lambda t: t.head(0)}, "both kinds are needed"),
        ({"labels": lambda t: t[t["sepsis"] == 0]}, "0 of them positive: both kinds are needed"),
        ({"labels": lambda t: t.assign(sepsis=1).drop(columns="sepsis_onset")}, "both kinds are needed"),
        ({"labels": lambda t: t.assign(client="nobody")}, "'labels without observations': 279"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(cohort, tmp_path, capsys, changes, message):
    files = files_with(cohort, tmp_path, **changes)
    assert message in refused(capsys, options(files, tmp_path / "models"))
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "exist"),
        ("none.parquet", None, "exist"),
        ("empty.csv", b"", "empty"),
        ("half.parquet", b"PAR1", "cannot be read"),
        ("table.xlsx", b"PK", "unknown kind of file|missing column"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_files_that_are_absent_empty_or_broken(cohort_files, tmp_path, capsys, name, content, message, which):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    files = list(cohort_files)
    files[which] = tmp_path / name
    line = refused(capsys, options(files, tmp_path / "models"))
    assert name in line and re.search(message, line)
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())


def test_labels_alone_are_refused(cohort_files, tmp_path, capsys):
    assert "go together" in refused(capsys, options(cohort_files, tmp_path)[2:])


def test_a_file_without_a_header_is_not_quoted(cohort, tmp_path, capsys):
    """Its first row is a patient."""
    for which, name in enumerate(("observations", "labels")):
        files = list(files_with(cohort, tmp_path))
        cohort[which].to_csv(files[which], index=False, header=False)
        line = refused(capsys, options(files, tmp_path / "models"))
        assert "missing column" in line and name in line
        assert cohort[which]["client"].iloc[0] not in line and str(cohort[which]["visit_id"].iloc[0]) not in line


def test_too_few_visits_for_three_parts(cohort, tmp_path, capsys):
    few = files_with(cohort, tmp_path, labels=lambda t: t.groupby("sepsis").head(2))
    assert "part lacks septic or other visits" in refused(capsys, options(few, tmp_path / "models"))


def test_a_refused_search_leaves_an_earlier_one_as_it_was(search, cohort, tmp_path, capsys):
    directory = tmp_path / "models"
    directory.mkdir()
    for name in WRITTEN:
        (directory / name).write_bytes((search / name).read_bytes())
    files = files_with(cohort, tmp_path, labels=lambda t: t.drop(columns="sepsis"))
    refused(capsys, options(files, directory))
    assert all((directory / name).read_bytes() == (search / name).read_bytes() for name in WRITTEN)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--snapshot-every", "0"],
        ["--snapshot-every", "-1"],
        ["--snapshot-every", "nan"],
        ["--horizon", "-3"],
        ["--horizon", "nan"],
        ["--folds", "1"],
        ["--finalists", "0"],
        ["--jobs", "0"],
        ["--seed", "-1"],
        ["--sensitivity", "2"],
        ["--sensitivity", "0"],
        ["--risk-thresholds", "0.9,0.1"],
        ["--risk-thresholds", "0.5"],
        ["--alert-budget", "30,10"],
        ["--alert-budget", "0,10"],
        ["--alerts-per-100-patient-days", "5"],
        ["--feature-sets", "latest,none"],
        ["--models", ""],
        ["--backend", "spark"],
        ["--scheduler", "tcp://127.0.0.1:8786"],  # without --backend dask
        ["--snapshot-every", "1e300"],
        ["--horizon", "1e300"],
        ["--snapshot-ever", "oops"],
    ],
    ids=" ".join,
)
def test_settings_out_of_range_are_refused_by_name(cohort_files, tmp_path, capsys, arguments):
    """As argparse does, or as one line; but before any work, and naming the option."""
    try:
        status = generate_features.main(options(cohort_files, tmp_path / "models", *arguments, "--quiet"))
    except SystemExit as stopped:
        status = stopped.code
    shown = capsys.readouterr().err.splitlines()
    assert status == 2 and arguments[0] in shown[-1]
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())


def test_a_scheduler_that_is_none(cohort_files, tmp_path, capsys):
    pytest.importorskip("distributed")
    line = refused(capsys, options(cohort_files, tmp_path, "--backend", "dask", "--scheduler", "garbage://1"))
    assert "--scheduler 'garbage://1' cannot be reached" in line


def test_without_dask(cohort_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    line = refused(capsys, options(cohort_files, tmp_path, "--backend", "dask", "--scheduler", "tcp://127.0.0.1:1"))
    assert "needs the packages of requirements-dask.txt" in line


def test_a_name_that_stands_twice_is_searched_once(cohort_files, tmp_path):
    assert len(searched(cohort_files, tmp_path, "--quiet", sets=("latest", "latest"), models=MODELS[1:] * 2)) == 1


def test_a_finalist_that_fails_is_dropped_and_the_others_go_on(cohort_files, tmp_path, monkeypatch, capsys):
    original = fitting.judge_candidates

    def judge(configurations, *rest, hide=True, **more):
        if not hide and configurations[0].name in failing:
            return [{"error": "ValueError: too little", "seconds": 0.0}]
        return original(configurations, *rest, hide=hide, **more)

    monkeypatch.setattr(fitting, "judge_candidates", judge)
    failing = {"lightgbm_shallow"}
    assert len(searched(cohort_files, tmp_path, "--finalists", "2", "--quiet", status=1)) == 2
    assert "lightgbm_shallow failed in cross-validation: ValueError: too little" in capsys.readouterr().err
    assert load_config(tmp_path / "best_model_config.json").model["name"] == "logistic_regression"
    failing |= {"logistic_regression"}
    assert generate_features.main(options(cohort_files, tmp_path, "--finalists", "2", "--quiet")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_histogram_boosting_bears_a_column_that_training_never_saw():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, 3))
    label = (features[:, 0] + generator.normal(size=400) > 0).astype(int)
    never = np.column_stack([features, np.full(400, np.nan)])
    params = {**CONFIGURATION["hist_gradient_boosting"].params, "max_features": 1.0}
    samples = (SimpleNamespace(features=x.copy, label=label, weight=None) for x in (never, features))
    with_it, without = (fitting._FIT["hist_gradient_boosting"](params, sample, 0) for sample in samples)
    measured = np.column_stack([features, generator.normal(size=400)])
    assert np.array_equal(with_it.log_odds(measured), without.log_odds(features))


def test_a_killed_worker_is_one_line_that_says_how_to_go_on(cohort_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trials, "_candidates", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    line = refused(capsys, options(cohort_files, tmp_path, jobs=2))
    assert "ended a worker process" in line and "--resume" in line


def test_sigterm_ends_a_script_as_ctrl_c_does(tmp_path, capsys):
    parser = command_line.make_parser("Waits.", "wait")
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def work(arguments):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append(True)  # temporary files go, pools close
        return 0

    assert command_line.run(work, parser, []) == command_line.TERMINATED == 128 + signal.SIGTERM
    assert ended and capsys.readouterr().err == "interrupted; finished work is kept\n"
    assert signal.getsignal(signal.SIGTERM) == before

    own = signal.signal(signal.SIGTERM, lambda *_: ended.append("own"))
    try:  # a script that has its own way keeps it
        assert command_line.run(work, parser, []) == 0 and "own" in ended
    finally:
        signal.signal(signal.SIGTERM, own)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("code,meaning\nX,heart_rate\n", "expected code,concept"),
        ("code,concept\nHR,fortune\n", "'fortune'"),
        ("code,concept\nnever observed,fortune\n", "'fortune'"),
    ],
)
def test_bad_synonyms(cohort_files, tmp_path, capsys, content, message):
    (tmp_path / "synonyms.csv").write_text(content)
    line = refused(capsys, options(cohort_files, tmp_path / "models", "--synonyms", str(tmp_path / "synonyms.csv")))
    assert message in line


def test_synonyms_of_codes_that_look_missing(cohort_files, tmp_path):
    """NA is a code, and so is null."""
    (tmp_path / "synonyms.csv").write_text("code,concept\nNA,sodium\nnull,heart_rate\n")
    searched(cohort_files, tmp_path, "--quiet", "--synonyms", str(tmp_path / "synonyms.csv"), models=MODELS[:1])
    assert load_config(tmp_path / "best_model_config.json").synonyms == {"NA": "sodium", "null": "heart_rate"}


def test_no_observed_value_and_no_client_in_the_log_or_the_files(search, cohort):
    """Files that are shown around hold neither a client nor a visit."""
    text = "".join((search / name).read_text() for name in WRITTEN)
    observations = cohort[0]
    assert not any(client in text for client in observations["client"].unique())
    assert not any(f'"{visit}"' in text for visit in observations["visit_id"].unique())


def test_leaf_sizes_follow_the_number_of_positives():
    params = CONFIGURATION["lightgbm_shallow"].params
    assert fitting.scaled(params, fitting.ENOUGH_POSITIVES) == params == fitting.scaled(params, 10_000)
    small = fitting.scaled(params, fitting.ENOUGH_POSITIVES // 4)
    assert small["min_data_in_leaf"] == params["min_data_in_leaf"] // 4 and small["num_leaves"] == params["num_leaves"]
    assert fitting.scaled(params, 1)["min_data_in_leaf"] == 5


@pytest.mark.parametrize("configuration", MODEL_CONFIGURATIONS, ids=lambda c: c.name)
def test_few_visits_give_no_constant(configuration):
    """As many as the demo of MIMIC-IV has: one snapshot a visit, few of them positive."""
    generator = np.random.default_rng(0)
    label = (np.arange(280) < 24).astype(np.int8)
    features = generator.normal(size=(6, 280)) + 1.5 * label
    table = FeatureTable(features, features, np.ones(280, dtype=bool))
    model = fitted(configuration, table, label)
    assert len(np.unique(model.log_odds(filled(features.T, configuration.fill_value)).round(9))) > 20
