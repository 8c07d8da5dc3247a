"""Versions: the list, rollback, promotion, retraining; whoever loads while they are switched has one whole version."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest

import train_best_model
from common.metrics import compared, sensitivity_at_alert_rate
from feature_pipeline import BadConfig, ProductionPipeline, load_config
from sources.demo_cohort import make_demo_cohort
from tests.test_api_server import Server
from training.comparison import Comparison
from training.config import golden_example
from training.versions import CONFIG, DEPLOYED, deploy, list_versions, new_version, switch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())


@pytest.fixture(scope="module")
def two_versions(models_dir, cohort_files, tmp_path_factory):
    """A models directory with two archived versions, and their names; the second is deployed."""
    directory = tmp_path_factory.mktemp("versions") / "models"
    shutil.copytree(models_dir, directory)
    first = load_config(directory / CONFIG).model_version
    arguments = ["--models-dir", str(directory), "--full", "--seed", "5", "--jobs", "1", "--quiet"]
    assert train_best_model.main(arguments) == 0
    second = load_config(directory / CONFIG).model_version
    assert first != second
    return directory, first, second


@pytest.fixture
def models(two_versions, tmp_path):
    """A copy that a test may change: (directory, first version, second version)."""
    directory, first, second = two_versions
    return shutil.copytree(directory, tmp_path / "models"), first, second


def new_patients(seed, n=150, flip=False):
    observations, labels = make_demo_cohort(n_patients=n, seed=seed)
    clients = "n" + observations["client"].astype(str)
    labels = labels.assign(client="n" + labels["client"].astype(str))
    if flip:
        labels["sepsis_onset"] = labels["sepsis_onset"].sample(frac=1, random_state=0).to_numpy()
    return observations.assign(client=clients), labels


def files(folder, frames):
    paths = [str(folder / "new_observations.parquet"), str(folder / "new_labels.csv")]
    frames[0].to_parquet(paths[0], index=False)
    frames[1].to_csv(paths[1], index=False)
    return ["--observations", paths[0], "--labels", paths[1]]


def run(directory, *arguments):
    return train_best_model.main(["--models-dir", str(directory), "--quiet", "--jobs", "1", *arguments])


# ---------------------------------------------------------------------------------------------- list, rollback


def test_list_and_rollback(models, capsys):
    directory, first, second = models
    assert run(directory, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"* {second}") and lines[1].startswith(f"  {first}")
    scored = {}
    for version in (first, second, first):
        assert run(directory, "--rollback", version) == 0
        pipeline = ProductionPipeline(directory / CONFIG, directory / "best_model.pkl")
        scores = pipeline.predict(EXAMPLE)["sepsis_probability"].tolist()
        assert pipeline.model_version == version and scores == scored.setdefault(version, scores)
    assert scored[first] != scored[second]
    assert [deployed for _, deployed in list_versions(directory)] == [False, True]


def test_a_broken_archived_config_does_not_hide_the_others(models, capsys):
    directory, first, second = models
    (directory / "archive" / first / CONFIG).write_text("{")
    assert run(directory, "--list") == 0
    shown = capsys.readouterr()
    assert second in shown.out and first not in shown.out and first in shown.err


@pytest.mark.parametrize("option", ["--rollback", "--compare", "--promote"])
def test_an_empty_version_is_refused(models, option, capsys):
    """As `--rollback "$UNSET"` gives it."""
    assert run(models[0], option, "") == 2
    assert "no version" in capsys.readouterr().err


def test_models_that_are_deployed_at_once_get_versions_of_their_own(models):
    """Whichever comes last is deployed whole, and both are archived."""
    directory, first, second = models
    configs = [load_config(directory / "archive" / v / CONFIG) for v in (first, second)]

    def deploy_one(k):
        version = new_version(directory / "archive")
        deploy_changed(directory, (first, second)[k], version)
        return version

    with ThreadPoolExecutor(2) as pool:
        versions = list(pool.map(deploy_one, range(2)))
    assert len(set(versions)) == 2
    for version, config in zip(versions, configs, strict=True):
        pipeline = ProductionPipeline(
            directory / "archive" / version / CONFIG, directory / "archive" / version / "best_model.pkl"
        )
        assert pipeline.model_version == version and pipeline.config.seed == config.seed
    assert ProductionPipeline(directory / CONFIG, directory / "best_model.pkl").model_version in versions


@pytest.mark.parametrize("version", ["20000101_000000", "../models", ""])
def test_unknown_versions_are_refused(models, version):
    with pytest.raises(BadConfig, match="no version"):
        switch(models[0], version)


def test_a_spoilt_version_is_not_deployed(models, capsys):
    directory, first, second = models
    (directory / "archive" / first / "best_model.pkl").write_bytes(b"spoilt")
    assert run(directory, "--rollback", first) == 2 and "SHA-256" in capsys.readouterr().err
    assert load_config(directory / CONFIG).model_version == second


LOADER = """
import sys, warnings
sys.path.insert(0, {root!r})
from feature_pipeline import ProductionPipeline, UnfinishedSwitchWarning
warnings.simplefilter("ignore", UnfinishedSwitchWarning)
versions = set()
while True:
    versions.add(ProductionPipeline({config!r}, {model!r}).model_version)
    print(*versions, flush=True)
"""


def test_loading_while_versions_are_switched_gives_one_whole_version(models):
    """Config and model of different versions never come together, and nobody is refused."""
    directory, first, second = models
    code = LOADER.format(root=str(ROOT), config=str(directory / CONFIG), model=str(directory / "best_model.pkl"))
    loaders = [
        subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    seen = [set(), set()]
    stop = threading.Event()

    def read(k):
        for line in loaders[k].stdout:
            seen[k] |= set(line.split())

    readers = [threading.Thread(target=read, args=(k,)) for k in range(2)]
    for reader in readers:
        reader.start()
    for n in range(400):
        switch(directory, (first, second)[n % 2])
        if n > 40 and all(s == {first, second} for s in seen):
            break
    stop.set()
    assert [loader.poll() for loader in loaders] == [None, None]
    for loader in loaders:
        loader.kill()
    for reader in readers:
        reader.join()
    for loader in loaders:
        assert loader.stderr.read() == ""
        loader.stdout.close()
        loader.stderr.close()
        loader.wait()
    assert seen == [{first, second}] * 2


@pytest.mark.slow
def test_ten_switches_under_ten_thousand_requests(two_versions, tmp_path):
    directory, first, second = two_versions
    expected = {}
    for version in (first, second):
        folder = directory / "archive" / version
        pipeline = ProductionPipeline(folder / CONFIG, folder / "best_model.pkl")
        expected[version] = pipeline.predict(EXAMPLE[:20])["sepsis_probability"].tolist()
    server = Server(tmp_path, directory)
    body = json.dumps(EXAMPLE[:20]).encode()
    answers = []

    def ask(_):
        status, answer = server.predict(body)
        scores = [p["sepsis_probability"] for p in answer.get("predictions", [])]
        answers.append((status, answer.get("model_version"), scores))

    try:
        with ThreadPoolExecutor(8) as pool:
            futures = []
            for n in range(10):
                futures += [pool.submit(ask, k) for k in range(1000)]
                while len(answers) < 1000 * n + 300:
                    futures[len(answers)].result()
                wanted = (first, second)[n % 2]
                switch(server.models, wanted)
                if n % 2:  # the others are seen by the workers themselves
                    server.process.send_signal(1)  # SIGHUP
                for _ in range(100_000):
                    if server.predict(body)[1].get("model_version") == wanted:
                        break
            for future in futures:
                future.result()
    finally:
        server.stop()
    assert len(answers) == 10_000 and {status for status, _, _ in answers} == {200}
    assert {version for _, version, _ in answers} == {first, second}
    assert all(scores == expected[version] for _, version, scores in answers)


# --------------------------------------------------------------------------------------------------- comparison


def test_paired_intervals_of_a_known_difference():
    generator = np.random.default_rng(0)
    label = (generator.random(4000) < 0.1).astype(int)
    good = 1 / (1 + np.exp(-(label * 2 + generator.normal(size=4000) - 2)))
    bad = 1 / (1 + np.exp(-(label * 0.5 + generator.normal(size=4000) - 2)))
    group = np.arange(4000) // 4
    same = compared(label, good, good, group, 0.1)
    assert all(f["difference"] == f["low"] == f["high"] == 0 for f in same.values())
    better = compared(label, bad, good, group, 0.1)
    assert better["roc_auc"]["low"] > 0.1 and better["sensitivity"]["low"] > 0 and better["brier"]["high"] < 0


def test_sensitivity_at_an_alert_rate_does_not_gain_by_ties():
    generator = np.random.default_rng(0)
    label = (generator.random(2000) < 0.1).astype(int)
    assert sensitivity_at_alert_rate(label, np.full(2000, 0.3), 0.05) == pytest.approx(0.05)
    probability = generator.random(2000)
    highest = np.argsort(-probability)[:100]
    assert sensitivity_at_alert_rate(label, probability, 0.05) == pytest.approx(label[highest].sum() / label.sum())
    # equal ones in any order: the mean over what breaking the ties at random would give
    rounded = probability.round(1)
    broken = [sensitivity_at_alert_rate(label, rounded + 1e-6 * generator.random(2000), 0.07) for _ in range(2000)]
    assert sensitivity_at_alert_rate(label, rounded, 0.07) == pytest.approx(np.mean(broken), abs=0.002)


def figures_of(difference, low, high):
    one = {"old": 0.8, "new": 0.8 + difference, "difference": difference, "low": low, "high": high}
    return {name: one for name in ("roc_auc", "average_precision", "brier", "sensitivity")}


@pytest.mark.parametrize(
    ("difference", "low", "high", "worse"),
    [
        (0.01, -0.01, 0.03, False),
        (-0.001, -0.02, 0.02, False),
        (-0.02, -0.05, 0.01, True),
        (-0.002, -0.004, -0.001, True),
    ],
)
def test_what_counts_as_worse(difference, low, high, worse):
    comparison = Comparison("a", "b", figures_of(difference, low, high), 100, 10, "x", 0.05)
    assert bool(comparison.objections) == worse


def use_synonyms(config, synonyms):
    golden = golden_example(config.feature_names, synonyms, config.fill_value)
    return replace(config, synonyms=synonyms, golden={**golden, "probability": config.golden["probability"]})


def deploy_changed(directory, like, version, change=lambda config, model: config, of=None):
    """Deploys a changed copy of a version of the archive `of`, by default its own."""
    folder = (of or directory) / "archive" / like
    model, config = joblib.load(folder / "best_model.pkl"), load_config(folder / CONFIG)
    config, content = change(config, model) or config, io.BytesIO()
    joblib.dump(model, content)
    golden = model.probability(np.array(config.golden["features"], dtype=float)).tolist()
    config = replace(
        config,
        model_version=version,
        model_sha256=hashlib.sha256(content.getvalue()).hexdigest(),
        golden={**config.golden, "probability": golden},
    )
    files = {name: (folder / name).read_bytes() for name in DEPLOYED}
    deploy(directory, version, {**files, "best_model.pkl": content.getvalue(), CONFIG: config.text()})


def add_version(directory, like, version, change):
    """Archives a changed copy of a version."""
    scratch = directory / f"scratch_{version}"
    deploy_changed(scratch, like, version, change, of=directory)
    shutil.copytree(scratch / "archive" / version, directory / "archive" / version)


def test_ruined_probabilities_are_not_promoted(models, tmp_path, capsys):
    """The ranking is the same: only the Brier score tells."""
    directory, first, second = models

    def shout(config, model):
        model.intercept += 6

    add_version(directory, first, "20010101_000000", shout)
    assert run(directory, "--promote", "20010101_000000", *files(tmp_path, new_patients(77))) == 1
    assert "worse: brier" in capsys.readouterr().out and load_config(directory / CONFIG).model_version == second
    page = (directory / "comparison.html").read_text()
    assert "not promoted" in page and "The new model is worse" in page and "brier" in page


def test_each_version_reads_with_its_own_synonyms(models, tmp_path, capsys):
    """What a version's hospital calls its codes decides units and limits: no version is judged by another's reading."""
    directory, _, second = models

    def strange(config, model):
        return use_synonyms(config, {"HR": "spo2"})  # heart rates above 100 are set aside

    add_version(directory, second, "20010101_000000", strange)
    options = files(tmp_path, new_patients(77))
    figures = []
    steps = (
        ["--compare", "20010101_000000"],
        ["--promote", "20010101_000000", "--force"],
        ["--compare", second],
    )
    for step in steps:
        assert run(directory, *step, *options) == 0
        line = next(text for text in capsys.readouterr().out.splitlines() if text.strip().startswith("roc auc"))
        figures.append(re.findall(r"0\.\d{4}", line)[:2])
    assert figures[0] == figures[1] == figures[2][::-1] and figures[0][0] != figures[0][1]


def test_promotion_needs_a_model_that_is_not_worse(models, tmp_path, capsys):
    directory, first, second = models
    new = files(tmp_path, new_patients(77))
    assert run(directory, "--compare", first, *new) == 0
    assert f"{first} against {second}" in capsys.readouterr().out and (directory / "comparison.html").exists()

    # a version that knows nothing: all its patients' scores are turned round
    def turn(config, model):
        model.slope = -model.slope

    add_version(directory, first, "20010101_000000", turn)
    assert run(directory, "--promote", "20010101_000000", *new) == 1
    assert "not promoted" in capsys.readouterr().out and load_config(directory / CONFIG).model_version == second
    assert "not promoted" in (directory / "comparison.html").read_text()
    assert run(directory, "--promote", "20010101_000000", "--force", *new) == 0
    assert load_config(directory / CONFIG).model_version == "20010101_000000"
    assert "promoted by --force" in (directory / "comparison.html").read_text()


def test_comparing_on_the_training_patients_is_refused(models, cohort_files, capsys):
    directory, first, _ = models
    observations, labels = map(str, cohort_files)
    assert run(directory, "--compare", first, "--observations", observations, "--labels", labels) == 2
    assert "trained on these patients" in capsys.readouterr().err
    assert run(directory, "--promote", first) == 2


def test_clients_that_were_trained_on_are_left_out_of_a_comparison(models, cohort, tmp_path, capsys):
    directory, first, _ = models
    new, all_ = new_patients(77), []
    for frames in (new, [pd.concat([a, b]) for a, b in zip(new, cohort, strict=True)]):
        assert run(directory, "--compare", first, *files(tmp_path, frames)) == 0
        all_.append(capsys.readouterr().out)
    assert all_[0] == all_[1]


# --------------------------------------------------------------------------------------------------- retraining


@pytest.mark.slow
def test_retraining_promotes_once_and_keeps_the_deployed_model_where_it_must(models, tmp_path, capsys):
    directory, _, before = models
    new = files(tmp_path, new_patients(78))
    options = ["--retrain", "--keep-config", "--data-dir", str(tmp_path / "training"), *new]
    status = run(directory, *options, "--force")
    shown = capsys.readouterr().out
    assert status == 0 and "promoted" in shown, shown
    config = load_config(directory / CONFIG)
    assert config.model_version != before and len(config.retrained_with) == 1
    assert (directory / "archive" / config.model_version).is_dir() and (directory / "comparison.html").exists()
    assert config.model_version in (directory / "comparison.html").read_text()
    clients = pd.read_parquet(config.trained_on["labels"])["client"]
    assert clients.str.startswith("n").any() and not clients.str.startswith("n").all()
    ProductionPipeline(directory / CONFIG, directory / "best_model.pkl")
    # the same data once more: nothing to do
    assert run(directory, *options) == 0 and "already" in capsys.readouterr().out
    assert load_config(directory / CONFIG).model_version == config.model_version
    assert not (directory / ".retrain").exists() and not list((tmp_path / "training").glob(".*"))


@pytest.mark.slow
def test_retraining_with_a_search_keeps_what_the_hospital_has_set(models, cohort, cohort_files, tmp_path, capsys):
    """Synonyms, that the first data were synthetic, thresholds; the search's reports are those of the new search."""
    directory = models[0]
    config = load_config(directory / CONFIG)
    synonyms = {"Puls": "heart_rate"}
    config = replace(config, synonyms=synonyms, trained_on={**config.trained_on, "synthetic": True})
    (directory / CONFIG).write_text(config.text())
    before = (directory / "optimization_summary.txt").read_text()
    # what a killed retraining left
    (directory / ".retrain").mkdir()
    (directory / ".retrain" / "rest_observations.parquet").write_bytes(b"patients")
    options = ["--retrain", "--quick", "--force", "--data-dir", str(tmp_path / "training")]
    assert run(directory, *options, *files(tmp_path, new_patients(78))) == 0, capsys.readouterr()
    config = load_config(directory / CONFIG)
    assert config.synonyms == synonyms and config.trained_on["synthetic"]
    assert "synthetic" in (directory / "MODEL_CARD.md").read_text().casefold()
    summary = (directory / "optimization_summary.txt").read_text()
    assert summary != before and config.feature_set in summary
    assert "warning: these are not the data" not in capsys.readouterr().err
    assert run(directory, "--seed", "1") == 0  # figures of the search's own test part can be repeated
    assert "not the data of the search" not in capsys.readouterr().err
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "training").iterdir()}
    assert modes == {"0o640"} and not (directory / ".retrain").exists()


def test_retraining_with_too_little_or_nothing_says_so(models, tmp_path, capsys):
    directory, _, before = models
    assert run(directory, "--retrain") == 2
    observations, labels = new_patients(79, n=10)
    new = files(tmp_path, (observations, labels))
    assert run(directory, "--retrain", "--keep-config", *new) == 2
    assert "are needed to compare" in capsys.readouterr().err
    assert load_config(directory / CONFIG).model_version == before


@pytest.mark.parametrize(
    "options", [["--quick"], ["--full", "--keep-config"], ["--compare", "x", "--force"], ["--learning-curve"]]
)
def test_options_without_effect_are_refused(tmp_path, capsys, options):
    assert run(tmp_path, *options) == 2
    assert f"{options[-1]} has an effect only with --" in capsys.readouterr().err


def test_two_retrainings_do_not_meet(models, tmp_path, capsys):
    import fcntl

    directory = models[0]
    with open(directory / ".retrain.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(directory, "--retrain", *files(tmp_path, new_patients(80, n=10))) == 0
    assert "another retraining" in capsys.readouterr().err
