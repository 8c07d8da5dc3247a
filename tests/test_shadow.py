"""A challenger in the shadow: it scores the same visits, is logged, is shown to nobody, and never disturbs."""

import argparse
import hashlib
import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

import batch_processor
import train_best_model
from common.command_line import start_logging
from common.pseudonyms import KEY_VARIABLE
from common.shadow import SHADOW, challenger, write_shadow
from feature_pipeline import BadConfig, ProductionPipeline
from monitoring.findings import read_counts, read_rows
from monitoring.log import open_engine
from serving import shadow as shadow_module
from serving.api.app import create_app
from serving.api.settings import Settings
from serving.deployed import ServedModel
from training.versions import CONFIG, MODEL, archive_version, list_versions

OTHER = "20200101_000000"
EXAMPLE = json.loads((Path(__file__).resolve().parents[1] / "examples" / "new_patient_data.json").read_text())


@pytest.fixture
def directory(models_dir, tmp_path):
    """Models with an archived version that is steeper than the deployed one."""
    directory = shutil.copytree(models_dir, tmp_path / "models")
    folder = directory / "archive" / list_versions(directory)[0][0].model_version
    pipeline = ProductionPipeline(folder / CONFIG, folder / MODEL)
    pipeline.model.slope *= 1.5
    content = pickle.dumps(pipeline.model)
    config = json.loads((folder / CONFIG).read_text())
    features = np.array(config["golden"]["features"], dtype=np.float64)
    config["golden"]["probability"] = pipeline.model.probability(features).tolist()
    config |= {"model_version": OTHER, "model_sha256": hashlib.sha256(content).hexdigest()}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    archive_version(directory, OTHER, {**files, MODEL: content, CONFIG: json.dumps(config)})
    return directory


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/log.db"


def set_shadow(directory, version=OTHER, status=0):
    assert train_best_model.main(["--models-dir", str(directory), "--shadow", version, "--quiet"]) == status


class Service:
    """A served model with the visits of a few patients."""

    def __init__(self, directory, url, cohort):
        self.pipeline = ProductionPipeline(directory / CONFIG, directory / MODEL)
        self.model = ServedModel(self.pipeline, "api", url)
        some = cohort[0][cohort[0]["visit_id"].isin(cohort[0]["visit_id"].unique()[:15])]
        self.observations = self.model.read(some)
        self.visit, self.moments = np.arange(self.observations.n_visits), self.observations.last_time

    @property
    def shadow(self):
        return self.model._shadows._current

    def score(self):
        return self.model.score(self.observations, self.visit, self.moments)

    def settle(self):
        """Waits until the challenger has scored what it was given."""
        shadow = self.shadow
        shadow.stop()
        shadow._thread.join(60)
        assert not shadow._thread.is_alive()


@pytest.fixture
def service(directory, url, cohort, monkeypatch):
    monkeypatch.setattr(shadow_module, "SHARE", 1.0)
    monkeypatch.setenv(KEY_VARIABLE, "0" * 64)
    set_shadow(directory)
    return Service(directory, url, cohort)


def logged(url):
    engine = open_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text("select model_version, shadow, visit, score, risk_level from predictions")
        ).all()
    engine.dispose()
    return rows


def test_both_are_logged_and_only_the_deployed_one_is_shown(service, url, directory):
    found = service.score()
    service.settle()
    rows = logged(url)
    deployed = [row for row in rows if not row.shadow]
    other = [row for row in rows if row.shadow]
    assert len(deployed) == len(other) == len(found.probability) == 15
    assert {row.model_version for row in deployed} == {service.pipeline.model_version}
    assert {row.model_version for row in other} == {OTHER}
    assert [row.visit for row in deployed] == [row.visit for row in other]
    own = challenger(service.pipeline, directory, OTHER).assess(service.observations, service.visit, service.moments)
    assert [row.score for row in other] == [None if p != p else p for p in own.probability.tolist()]
    assert [row.score for row in deployed] == [None if p != p else p for p in found.probability.tolist()]
    assert {row.score for row in deployed} != {row.score for row in other}


def test_the_report_counts_what_was_shown_and_finds_the_challenger_by_its_version(service, url):
    service.score()
    service.settle()
    engine = open_engine(url)
    now = datetime.now(UTC).replace(tzinfo=None) + timedelta(minutes=1)
    assert set(read_rows(engine, None, now)["model_version"]) == {service.pipeline.model_version}
    assert len(read_rows(engine, None, now, OTHER)) == 15
    assert read_counts(engine, now, now + timedelta(days=7), 7)[0] == 0
    engine.dispose()


def test_a_failing_challenger_disturbs_nobody_and_is_told_once(service, url, capsys):
    start_logging(argparse.Namespace(log_format="text", quiet=True))

    def fail(*_):
        raise MemoryError

    service.shadow.pipeline.assess = fail
    expected = service.pipeline.assess(service.observations, service.visit, service.moments)
    for _ in range(3):
        assert np.array_equal(service.score().probability, expected.probability, equal_nan=True)
    service.settle()
    told = capsys.readouterr().err.splitlines()
    assert told == [f"the challenger {OTHER} fails: MemoryError"]
    assert len(logged(url)) == 45


def test_a_slow_challenger_is_not_waited_for(service, url, monkeypatch):
    go_on, assess = threading.Event(), service.shadow.pipeline.assess
    service.shadow.pipeline.assess = lambda *job: go_on.wait(60) and assess(*job)
    n = shadow_module.WAITING + 10
    for _ in range(n):
        service.score()  # would never return if it waited
    assert service.shadow.left_out >= 15 * (n - shadow_module.WAITING - 1)
    assert len(logged(url)) == 15 * n
    shadow = service.shadow
    go_on.set()
    service.settle()
    assert sum(row.shadow for row in logged(url)) + shadow.left_out >= 15 * (n - 1)  # one makes room for the end


def test_a_challenger_whose_files_are_gone_leaves_the_deployed_model_alone(service, directory, url, cohort, capsys):
    shutil.rmtree(directory / "archive" / OTHER)
    service.score()  # it is loaded already
    service.settle()
    start_logging(argparse.Namespace(log_format="text", quiet=True))
    again = Service(directory, url, cohort)
    assert again.shadow is None and np.isfinite(again.score().probability).any()
    assert "no model runs in the shadow" in capsys.readouterr().err
    (directory / SHADOW).write_text("{")
    assert Service(directory, url, cohort).shadow is None


def raising(directory, shadow):
    def fail(*_):
        raise ValueError

    shadow.pipeline.assess = fail


def deleted(directory, shadow):
    shutil.rmtree(directory / "archive" / OTHER)
    write_shadow(directory, OTHER)  # so that it is looked for again


def ten_times_as_long(directory, shadow):
    assess = shadow.pipeline.assess
    shadow.pipeline.assess = lambda *job: [assess(*job) for _ in range(10)][-1]


@pytest.mark.filterwarnings("ignore::feature_pipeline.MissingCodesWarning")
@pytest.mark.parametrize("fault", [raising, deleted, ten_times_as_long])
def test_no_request_of_many_at_once_fails_with_the_challenger(fault, directory, url, tmp_path, monkeypatch):
    monkeypatch.setattr(shadow_module, "LOOK_SECONDS", 0.0)
    set_shadow(directory)
    files = {"config": str(directory / CONFIG), "model": str(directory / MODEL), "monitor_url": url}
    logs = {name: str(tmp_path / name) for name in ("access_log", "audit_log")}
    app = create_app(Settings(**files, **logs, insecure=True, rate_limit="100000/minute"))
    answers = []

    def ask(_):
        answers.append(app.test_client().post("/predict?as_of=last", json=EXAMPLE))

    ask(0)
    shadow = app.service.model()._shadows._current
    assert shadow.pipeline.model_version == OTHER
    fault(directory, shadow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(60)))
    assert {answer.status_code for answer in answers} == {200}
    given = [[p["sepsis_probability"] for p in answer.get_json()["predictions"]] for answer in answers]
    assert all(scores == given[0] for scores in given)
    shown = [row for row in logged(url) if not row.shadow]
    assert len(shown) == len(answers) * len(given[0])
    app.service.model()._shadows.stop()


def test_a_running_service_takes_the_challenger_up_and_lets_it_go(directory, url, cohort, monkeypatch):
    monkeypatch.setattr(shadow_module, "LOOK_SECONDS", 0.0)
    service = Service(directory, url, cohort)

    def until(done):
        for _ in range(600):
            service.score()
            if done():
                return
            threading.Event().wait(0.05)
        pytest.fail("the service did not take it up")

    assert service.shadow is None
    set_shadow(directory)
    until(lambda: service.shadow is not None)
    assert service.shadow.pipeline.model_version == OTHER
    set_shadow(directory, "off")
    until(lambda: service.shadow is None)


def test_a_service_that_ends_lets_the_challenger_finish(service, url):
    for _ in range(5):
        service.score()
    service.shadow.close()
    assert sum(row.shadow for row in logged(url)) == 75


def test_what_is_not_recorded_is_not_scored_in_the_shadow(service):
    service.model.score(service.observations, service.visit, service.moments, record=False)
    assert service.shadow._thread is None
    service.shadow.stop()


@pytest.mark.parametrize("version", ["20990101_000000", "../models", ""])
def test_a_version_that_is_not_there_is_refused(version, directory, capsys):
    set_shadow(directory, version, status=2)
    assert "no version" in capsys.readouterr().err and not (directory / SHADOW).exists()


def test_the_deployed_version_is_not_its_own_challenger(directory, capsys):
    set_shadow(directory, ProductionPipeline(directory / CONFIG, directory / MODEL).model_version, status=2)
    assert "is the deployed one" in capsys.readouterr().err


def test_a_challenger_with_codes_that_are_read_otherwise_is_refused(directory, monkeypatch):
    pipeline = ProductionPipeline(directory / CONFIG, directory / MODEL)
    monkeypatch.setattr(pipeline, "own_code", lambda code: "pulse" if code == "HR" else code)
    with pytest.raises(BadConfig, match="'HR'"):
        challenger(pipeline, directory, OTHER)


def test_without_a_prediction_log_no_challenger_runs(directory, cohort):
    set_shadow(directory)
    assert Service(directory, "off", cohort).shadow is None


@pytest.mark.slow
def test_worker_processes_of_a_batch_score_with_the_challenger_too(directory, url, cohort, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "0" * 64)
    monkeypatch.setattr("serving.batch.directory.WORTH_A_POOL", 0)
    set_shadow(directory)
    (tmp_path / "in").mkdir()
    for k, part in enumerate(np.array_split(cohort[0]["visit_id"].unique()[:20], 4)):
        some = cohort[0][cohort[0]["visit_id"].isin(part)]
        some.to_csv(tmp_path / "in" / f"{k}.csv", index=False)
    options = ["--input-dir", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out"), "--settle-seconds", "0"]
    options += ["--jobs", "2", "--quiet"]
    options += ["--config", str(directory / CONFIG), "--model", str(directory / MODEL), "--monitor", url]
    assert batch_processor.main(options) == 0
    rows = logged(url)
    shown, unseen = ({row.visit for row in rows if row.shadow == flag} for flag in (False, True))
    assert len(shown) == 20 and unseen and unseen <= shown  # a busy machine may end before the last are scored
