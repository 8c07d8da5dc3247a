"""The prediction log and what is read from it: drift, missing codes, quality, alerts; no row lost, none broken."""

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import alembic.command
import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from common import metrics
from common.labels import read_labels
from feature_pipeline import ProductionPipeline, read_observations, resolve_snapshots
from monitor import main
from monitoring import log as prediction_log
from monitoring import writer
from monitoring.drift import psi, psi_by_chance, share_by_chance
from monitoring.findings import Findings, distributions, read_challengers, read_rows, read_scores
from monitoring.log import PredictionLog, open_engine, predictions
from monitoring.look import look
from monitoring.profile import AT_END, DURING, Profile
from monitoring.quality import look_at_challengers, look_at_quality, read_outcomes
from monitoring.report import report_html
from sources.demo_cohort import make_demo_cohort
from training.snapshots import make_training_data

ROOT = Path(__file__).resolve().parents[1]
DAY = datetime(2026, 3, 2, 12)
KEY = "a key of more than sixteen letters"


@pytest.fixture(scope="module")
def ward(pipeline):
    """Other patients of the same synthetic ward: snapshots as in training, with outcomes."""
    observations, labels = make_demo_cohort(n_patients=400, seed=99)
    return observations, labels


def snapshots_of(observations, labels, pipeline):
    settings = pipeline.config.snapshots
    read = read_observations(observations, pipeline.config.synonyms)
    return make_training_data(read, read_labels(labels), settings)


def log_of(path, pipeline, data, days=7, until=DAY):
    """A log in which the visits of `data` were scored over the days before `until`."""
    engine = open_engine(f"sqlite:///{path}")
    now = [until]
    log = PredictionLog(engine, pipeline, "api", clock=lambda: now[0])
    parts = np.array_split(np.unique(data.visit), days)
    for k, visits in enumerate(parts):
        now[0] = until - timedelta(days=days - 1 - k, hours=1)
        rows = np.isin(data.visit, visits)
        visit, moments = data.visit[rows], data.as_of[rows]
        assert log.record(data.observations, visit, moments, pipeline.assess(data.observations, visit, moments), 0.002)
    return engine


def logged(pipeline, data, n=None, seconds=0.1):
    """Arguments of `PredictionLog.record` for the first `n` snapshots."""
    visit, moments = data.visit[:n], data.as_of[:n]
    return data.observations, visit, moments, pipeline.assess(data.observations, visit, moments), seconds


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("SEPSIS_PSEUDONYM_KEY", KEY)


# ----------------------------------------------------------------------------------------------------- the log


def test_a_row_holds_no_name_and_no_value(pipeline, ward, tmp_path, key):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    log_of(tmp_path / "log.db", pipeline, data)
    with sqlite3.connect(tmp_path / "log.db") as database:
        rows = database.execute("select * from predictions").fetchall()
    database.close()
    assert len(rows) == len(data.label)
    text = json.dumps(rows)
    assert not any(client in text for client in ward[0]["client"].unique())
    assert (tmp_path / "log.db").stat().st_mode & 0o077 == 0


def distributed(path, profile, frame):
    """The distributions of a log with these rows."""
    engine, until = open_engine(f"sqlite:///{path}"), datetime(2100, 1, 1)
    same = {"time": DAY, "source": "api", "model_version": "v", "risk_level": "LOW", "seconds": 0.1, "shadow": False}
    rows = frame.assign(visit=frame["visit"].astype(str)).astype(object)
    rows = rows.where(frame.notna(), None).to_dict("records")
    with engine.begin() as connection:
        connection.execute(predictions.delete())
        connection.execute(predictions.insert(), [{**same, **row} for row in rows])
    scores = read_scores(engine, None, until, "v", len(profile.features))
    found = distributions(engine, None, until, "v", scores, profile)
    engine.dispose()
    return found


def test_the_reference_is_what_service_sees(pipeline, cohort, tmp_path):
    """The patients of training at their last observations have the shares that the profile holds, and nearly so at
    random times during their stays."""
    data = snapshots_of(*cohort, pipeline)
    reference, profile = pipeline.config.reference_profile, Profile(pipeline.config)
    visits, last = np.unique(data.visit), data.observations.last_time
    now = data.as_of + (np.random.default_rng(0).random(len(data.as_of)) * 6 * 3.6e9).astype(np.int64)
    stayed = now <= last[data.visit]
    for moments, visit, as_of in ((AT_END, visits, last[visits]), (DURING, data.visit[stayed], now[stayed])):
        probability, features = pipeline.evaluate(data.observations, visit, as_of)
        codes, unknown = profile.present(data.observations, visit, as_of)
        frame = pd.DataFrame(
            {
                **{"visit": visit, "score": probability, "bins": profile.bins(features)},
                **{"codes": codes, "unknown": unknown, "as_of": as_of.astype("datetime64[us]")},
            }
        )
        frame["newest"] = pd.NaT if moments == DURING else frame["as_of"]
        current = distributed(tmp_path / "log.db", profile, frame)
        assert set(current) == {moments}
        tolerance = 0.0 if moments == AT_END else 0.03
        for name in ("features", "codes"):
            for what, shares in reference[moments][name].items():
                assert np.allclose(current[moments][name][what], shares, rtol=0, atol=tolerance), what
        assert current[moments]["n_visits"] == pytest.approx(reference[moments]["n_visits"], rel=0.02)


def test_visits_count_by_their_hours(pipeline, tmp_path):
    """Two visits of 30 h and 10 h: patient-hours count, not how often a visit was scored in an hour."""
    profile = Profile(pipeline.config)
    hours = [*range(30), *range(10)]
    start = datetime(2026, 3, 2)
    row = {"codes": "0" * len(profile.codes), "unknown": 0, "newest": start - timedelta(days=1)}
    frame = pd.DataFrame(
        {
            "visit": ["a"] * 30 + ["b"] * 10,
            "as_of": [start + timedelta(hours=hour) for hour in hours],
            "score": [0.0] * 30 + [1.0] * 10,
            "bins": ["a" * len(profile.features)] * 40,
            **row,
        }
    )
    often = pd.concat([frame, frame[frame["visit"] == "b"].assign(as_of=frame["as_of"] + timedelta(minutes=20))])
    for rows in (frame, often.reset_index(drop=True)):
        found = distributed(tmp_path / "log.db", profile, rows)[DURING]
        assert found["score"][0] == 0.75 and found["score"][-2] == 0.25
        assert found["n_visits"] == 1.6  # 40^2 / (30^2 + 10^2)


def test_a_log_that_cannot_be_written_stops_nothing(pipeline, ward, tmp_path, caplog):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    everything = logged(pipeline, data)
    log = PredictionLog.open(f"sqlite:///{tmp_path}/log.db", pipeline, "api")
    assert log.record(*everything)
    with sqlite3.connect(tmp_path / "log.db") as database:
        database.execute("drop table predictions")
    database.close()
    assert not log.record(*everything) and not log.record(*everything)
    broken = [
        PredictionLog.open(url, pipeline, "api") for url in ("sqlite:////proc/nowhere/x.db", "postgresql://h:p/x")
    ]
    for one in broken:
        assert not one.record(*everything)
    assert not PredictionLog.open("off", pipeline, "api").record(*everything)
    n = len(data.visit)
    for one, lost in zip([log, *broken], [2 * n, n, n], strict=True):
        assert not one.works and (one.waiting, one.lost) == (lost, 0)
        one.close()
        assert (one.waiting, one.lost) == (0, lost)
        assert caplog.messages[-1] == f"error: {lost} rows of the prediction log are lost"


@pytest.fixture
def hurried(monkeypatch):
    """Nobody waits long for the log, and it is tried again soon."""
    monkeypatch.setattr(writer, "PATIENCE", 0.05)
    monkeypatch.setattr(writer, "BACK_OFF", (0.01, 0.01))


@contextlib.contextmanager
def silent(url):
    """While it lasts, nothing is written to the log at `url` and no error comes."""
    engine = sa.create_engine(url)
    with contextlib.closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        if engine.dialect.name == "sqlite":
            connection.driver_connection.isolation_level = None
            cursor.execute("BEGIN IMMEDIATE")
        else:
            cursor.execute("LOCK TABLE predictions")
        yield
        cursor.execute("ROLLBACK")
    engine.dispose()


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("required", [False, True])
def test_a_silent_log_keeps_nobody_waiting(url, required, pipeline, ward, hurried, caplog):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    one, n = logged(pipeline, data, 7), 7
    log = PredictionLog.open(url, pipeline, "api", required=required)
    until(lambda: log.works)
    with silent(url):
        for _ in range(20):
            assert not log.record(*one)
        assert not log.works and (log.waiting, log.lost) == (0 if required else 20 * n, 0)
    until(lambda: log.works and log.record(*one))
    until(lambda: not log.waiting)
    # what was refused for want of a log is not in it
    assert count(url, predictions) in ([n, 2 * n] if required else [21 * n])
    assert sum("error: the prediction log" in line for line in caplog.messages) == 1
    log.close()


def test_a_silent_log_takes_only_so_much_memory(url, pipeline, ward, hurried, monkeypatch):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    one = logged(pipeline, data, 7)
    log = PredictionLog.open(url, pipeline, "api")
    until(lambda: log.works)
    monkeypatch.setattr(writer, "MOST_WAITING", 20)
    with silent(url):
        assert not any([log.record(*one), log.record(*one), log.record(*one), log.record_error("bad_file")])
        assert (log.waiting, log.lost, log.newly_lost(), log.newly_lost()) == (15, 7, 7, 0)
        assert str(log) == "of the prediction log's rows 15 wait, 7 are lost"
    until(lambda: log.works)
    assert str(log) == "of the prediction log's rows 7 are lost"
    assert count(url, predictions) == 14 and count(url, prediction_log.errors) == 1
    log.close()


def test_rows_that_no_database_takes_hold_up_no_others(postgres, pipeline, ward, hurried):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    log = PredictionLog.open(postgres, pipeline, "a source of more than sixteen letters")
    assert not log.record(*logged(pipeline, data, 7))
    until(lambda: log.works)
    assert (log.waiting, log.lost) == (0, 7)
    log.close()


def test_a_stream_logs_a_visit_once_an_hour_and_at_every_change(pipeline, ward, tmp_path):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    observations, visit, moments, found, seconds = logged(pipeline, data, 1)
    log = PredictionLog.open(f"sqlite:///{tmp_path}/log.db", pipeline, "stream")
    hour = 3_600_000_000
    start = moments - moments % hour
    levels = [(0, "LOW"), (1, "LOW"), (59, "LOW"), (59, "HIGH"), (59, "HIGH"), (60, "HIGH"), (61, "LOW"), (62, "LOW")]
    for minutes, level in levels:
        as_of = start + minutes * hour // 60
        assert log.record(observations, visit, as_of, replace(found, level=np.array([level], dtype=object)), seconds)
    log.close()
    engine = open_engine(f"sqlite:///{tmp_path}/log.db")
    rows = read_rows(engine, None, datetime(2100, 1, 1))
    told = rows.assign(as_of=rows["as_of"].dt.minute)[["as_of", "risk_level", "n"]].itertuples(index=False, name=None)
    assert list(told) == [(0, "LOW", 1), (59, "HIGH", 3), (0, "HIGH", 2), (1, "LOW", 1)]
    engine.dispose()


def test_the_write_ahead_log_goes_into_the_database(pipeline, ward, tmp_path, monkeypatch):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    one = logged(pipeline, data, 1)
    log = PredictionLog.open(f"sqlite:///{tmp_path}/log.db", pipeline, "api")
    monkeypatch.setattr(prediction_log, "WAL_PAGES", 20)  # far fewer than SQLite itself, opened before, goes by
    before = (tmp_path / "log.db").stat().st_size
    for _ in range(1000):
        assert log.record(*one)
        if (tmp_path / "log.db").stat().st_size > before:
            break
        time.sleep(0.01)
    assert (tmp_path / "log.db").stat().st_size > before
    log.close()


WRITER = """
import sys, numpy as np
sys.path.insert(0, {root!r})
from feature_pipeline import ProductionPipeline, resolve_snapshots
from monitoring.log import PredictionLog
pipeline = ProductionPipeline({config!r}, {model!r})
observations = pipeline.reproducer.read({rows!r})
visit, moments, _ = resolve_snapshots(observations)
found = pipeline.assess(observations, visit, moments)
log = PredictionLog.open("sqlite:///{path}", pipeline, sys.argv[1])
for n in range(int(sys.argv[2])):
    assert log.record(observations, visit, moments, found, float(n))
    print(n, flush=True)  # answered
"""


def test_four_writers_at_once_and_one_killed(config_path, model_path, tmp_path):
    rows = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())[:40]
    path = tmp_path / "log.db"
    code = WRITER.format(root=str(ROOT), config=str(config_path), model=str(model_path), rows=rows, path=path)
    environment = {**os.environ, "SEPSIS_PSEUDONYM_KEY": KEY}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"w{k}", "100000" if k == 0 else "150"],
            stdout=-1,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for k in range(4)
    ]
    answered = 0
    while answered < 60:
        answered = int(writers[0].stdout.readline())
    writers[0].send_signal(signal.SIGKILL)
    answered = max([answered, *(int(line) for line in writers[0].stdout.read().split())])
    told = [writer.communicate(timeout=120)[0].split() for writer in writers[1:]]
    writers[0].stdout.close()
    writers[0].wait()
    assert [len(lines) for lines in told] == [150] * 3
    with sqlite3.connect(path) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        count = dict(database.execute("select source, count(*) from predictions group by source").fetchall())
        broken = database.execute("select count(*) from predictions where score is null or bins = ''").fetchone()
    database.close()
    assert count["w1"] == count["w2"] == count["w3"] == 150 and count["w0"] >= answered + 1 and broken == (0,)


def test_many_that_open_a_new_log_at_once_all_can_write_to_it(url):
    together = threading.Barrier(6)

    def open_and_write(_):
        together.wait(60)
        engine = open_engine(url)
        with engine.begin() as connection:
            connection.execute(prediction_log.errors.insert(), [error_row()])
        engine.dispose()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(open_and_write, range(6)))
    assert count(url, prediction_log.errors) == 6


def error_row():
    return {"time": DAY, "source": "batch", "model_version": "20250101_000000", "kind": "file", "n": 6}


def count(url, table):
    engine = open_engine(url)
    with engine.connect() as connection:
        n = connection.scalar(sa.select(sa.func.count()).select_from(table))
    engine.dispose()
    return n


def test_the_migrations_make_the_tables_of_the_code(url):
    engine = open_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "prediction_log_version"})
        assert compare_metadata(context, prediction_log.metadata) == []
    engine.dispose()


def test_an_older_log_gets_its_new_columns_and_keeps_its_rows(url, pipeline, ward, key, monkeypatch):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    upgrade = alembic.command.upgrade
    monkeypatch.setattr(alembic.command, "upgrade", lambda config, revision: upgrade(config, "0001"))
    engine = open_engine(url)
    monkeypatch.undo()
    monkeypatch.setenv("SEPSIS_PSEUDONYM_KEY", KEY)
    columns = {column["name"] for column in sa.inspect(engine).get_columns("predictions")}
    assert "bins" in columns and "reason" not in columns
    old = {"time": DAY, "source": "api", "model_version": "x", "visit": "v", "risk_level": "LOW"}
    with engine.begin() as connection:
        row = {**old, "bins": "", "codes": "", "unknown": 0, "seconds": 0.1}
        connection.execute(sa.insert(sa.table("predictions", *map(sa.column, row))), [row])
    engine.dispose()
    log = PredictionLog.open(url, pipeline, "api")
    assert log.record(*logged(pipeline, data))
    log.close()
    assert count(url, predictions) == 1 + len(data.visit)


def test_a_log_of_a_later_release_can_still_be_written(url):
    """As after a rollback of the code."""
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE predictions ADD COLUMN later INTEGER"))
        connection.execute(sa.text("UPDATE prediction_log_version SET version_num = '9999'"))
    engine.dispose()
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(prediction_log.errors.insert(), [error_row()])
    engine.dispose()
    assert count(url, prediction_log.errors) == 1


def test_a_row_says_why_a_risk_is_unknown_and_how_old_its_evidence_is(config_path, model_path, ward, tmp_path, key):
    site_codes = {"PULSE": ("heart_rate", "")}
    pipeline = ProductionPipeline(config_path, model_path, site_codes)
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    log = PredictionLog.open(f"sqlite:///{tmp_path}/log.db", pipeline, "api")
    last = data.observations.last_time[data.visit[:1]]
    late, never = last + 10**6 * 3600 * 24 * 365 * 7, last * 0
    for moments in (last, late, never):
        found = pipeline.assess(data.observations, data.visit[:1], moments)
        assert log.record(data.observations, data.visit[:1], moments, found, 0.1)
    log.close()
    engine = open_engine(f"sqlite:///{tmp_path}/log.db")
    rows = read_rows(engine, None, datetime(9000, 1, 1))
    engine.dispose()
    assert rows["codes_sha256"].tolist() == [pipeline.reproducer.codes.sha256] * 3
    assert rows["reason"].isna().tolist()[0] and rows["reason"][2] == "nothing_usable"
    assert rows["newest"][0] == rows["newest"][1] <= rows["as_of"][0] and pd.isna(rows["newest"][2])
    assert rows["risk_level"][2] == "UNKNOWN" and pd.isna(rows["score"][2])


# ------------------------------------------------------------------------------------------------------- drift


def test_psi_by_chance_is_what_theory_says():
    """Without drift the PSI of two samples exceeds its limit about as often as it should."""
    generator = np.random.default_rng(0)
    p, n, m = np.full(10, 0.1), 400, 250
    found = [psi(generator.multinomial(n, p) / n, generator.multinomial(m, p) / m) for _ in range(2000)]
    assert np.mean([psi_by_chance(index, n, m, 10) < 0.05 for index in found]) == pytest.approx(0.05, abs=0.02)
    pairs = [(generator.binomial(n, 0.3) / n, generator.binomial(m, 0.3) / m) for _ in range(2000)]
    assert np.mean([share_by_chance(p, q, n, m) < 0.05 for p, q in pairs]) == pytest.approx(0.05, abs=0.02)


def test_psi_of_known_shares():
    assert psi(np.array([0.2, 0.8]), np.array([0.4, 0.6])) == pytest.approx(0.2 * np.log(2) - 0.2 * np.log(0.75))


def drifts(pipeline, data, tmp_path):
    engine = log_of(tmp_path / "log.db", pipeline, data)
    findings = look(engine, pipeline.config, DAY)
    engine.dispose()
    return findings


def test_undrifted_data_are_silent(pipeline, ward, tmp_path, key):
    findings = drifts(pipeline, snapshots_of(*ward, pipeline), tmp_path)
    assert findings.warnings == [] and max(map(len, findings.drift.values())) > 21
    assert "right only if they are calibrated" in findings.service["estimate without outcomes"]


def without_code(observations):
    return observations[observations["observation_type_code"] != "HR"]


def other_unit(observations):
    change = observations["observation_type_code"].eq("Creatinine")
    values = pd.to_numeric(observations["observation_value"], errors="coerce")
    # micromoles where milligrams were, as far as the plausible limits let them pass
    return observations.assign(observation_value=values.where(~change, values * 20))


def shifted(observations):
    change = observations["observation_type_code"].eq("Resp")
    values = pd.to_numeric(observations["observation_value"], errors="coerce")
    return observations.assign(observation_value=values.where(~change, values + 8))


@pytest.mark.parametrize(
    ("change", "named"),
    [(without_code, "code HR"), (other_unit, "Creatinine"), (shifted, "Resp")],
    ids=["a code goes missing", "a unit changes", "values shift"],
)
def test_drifted_data_are_named(pipeline, ward, tmp_path, key, change, named):
    findings = drifts(pipeline, snapshots_of(change(ward[0]), ward[1], pipeline), tmp_path)
    assert any(named in warning for warning in findings.warnings), findings.warnings


def test_unknown_codes_are_named(pipeline, ward, tmp_path, key):
    extra = ward[0].groupby("visit_id").head(1).assign(observation_type_code="NEW", observation_value=1.0)
    findings = drifts(pipeline, snapshots_of(pd.concat([ward[0], extra]), ward[1], pipeline), tmp_path)
    assert any("does not use" in warning for warning in findings.warnings)


def constant_ward(engine, once, start, days, visits_a_day, versions):
    """Fills the log with days of a ward that does not change: each day other visits, drawn from the rows of `once`,
    each scored at some time of the day. `versions`: from which day on which model version serves."""
    generator = np.random.default_rng(0)
    visits, parts = once["visit"].unique(), []
    for day in range(days):
        version = [name for first, name in versions if first <= day][-1]
        chosen = generator.choice(visits, visits_a_day, replace=False)
        seconds = pd.Series(generator.integers(1, 86400, visits_a_day), index=chosen)
        rows = once[once["visit"].isin(chosen)]
        time = start + timedelta(days=day) + pd.to_timedelta(rows["visit"].map(seconds), unit="s")
        parts.append(rows.assign(time=time, visit=f"{day}-" + rows["visit"].str[:10], model_version=version))
    pd.concat(parts).drop(columns="id").to_sql("predictions", engine, if_exists="append", index=False)


@pytest.fixture
def once(pipeline, ward, tmp_path, key):
    """The ward's predictions as rows of the log."""
    engine = log_of(tmp_path / "once.db", pipeline, snapshots_of(*ward, pipeline))
    rows = read_rows(engine, None, DAY, None)
    engine.dispose()
    return rows


def live_ward(stays, start, days, admissions, seed=0):
    """Rows of a ward whose visits are scored during their stays: `admissions` a day of visits drawn from `stays`."""
    generator = np.random.default_rng(seed)
    begin = stays.groupby("visit")["as_of"].min()
    drawn = pd.DataFrame({"visit": generator.choice(begin.index, days * admissions)})
    admitted = start + pd.to_timedelta(generator.uniform(0, days * 86400, len(drawn)), unit="s")
    drawn = drawn.assign(shift=admitted - drawn["visit"].map(begin), number=[f"n{k}" for k in range(len(drawn))])
    rows = stays.merge(drawn, on="visit")
    times = {name: rows[name] + rows["shift"] for name in ("as_of", "newest")}
    return rows.assign(**times, time=times["as_of"], visit=rows["number"]).drop(columns=["id", "shift", "number"])


def ended_visits(pipeline, ward, tmp_path, start, days, visits_a_day):
    """Rows of files with past stays, each scored once, for the time of its last observation."""
    read = pipeline.reproducer.read(ward[0])
    visit, as_of, _ = resolve_snapshots(read)
    engine = log_of(tmp_path / "ended.db", pipeline, SimpleNamespace(observations=read, visit=visit, as_of=as_of))
    rows = read_rows(engine, None, DAY)
    engine.dispose()
    generator, parts = np.random.default_rng(0), []
    for day in range(days):
        some = rows.sample(visits_a_day, random_state=generator)
        parts.append(some.assign(time=start + timedelta(days=day, hours=6), visit=f"{day}-" + some["visit"].str[:10]))
    return pd.concat(parts).drop(columns="id")


@pytest.mark.slow
@pytest.mark.parametrize("moments", [DURING, AT_END])
def test_200_undrifted_days_have_few_warnings(pipeline, ward, once, tmp_path, moments):
    """A day with a warning for whatever reason counts. Both as services score, and as batch does."""
    engine, start = open_engine(f"sqlite:///{tmp_path}/log.db"), datetime(2026, 1, 1)
    if moments == DURING:
        rows = live_ward(once, start - timedelta(days=10), 211, 40)
    else:
        rows = ended_visits(pipeline, ward, tmp_path, start, 200, 60)
    rows.to_sql("predictions", engine, if_exists="append", index=False)
    found = [look(engine, pipeline.config, start + timedelta(days=day + 1), days=1) for day in range(200)]
    engine.dispose()
    assert not any("not judged" in remark for findings in found for remark in findings.remarks)
    warned = [findings.warnings for findings in found if findings.warnings]
    print(f"{moments}: warnings on {len(warned)} of 200 days")
    assert len(warned) <= 10, warned  # 5%


@pytest.mark.parametrize("days", [1, 7])
def test_a_constant_ward_is_silent_from_first_deployment_through_a_promotion(pipeline, once, tmp_path, days):
    engine, start, promoted = open_engine(f"sqlite:///{tmp_path}/log.db"), datetime(2026, 1, 1), 30
    constant_ward(engine, once, start, 50, 20, [(0, "20250101_000000"), (promoted, "20260131_000000")])
    moments = [start + timedelta(days=day, hours=hour) for day in range(1, 50) for hour in (0, 13)]
    change = start + timedelta(days=promoted)
    for until in sorted([*moments, start + timedelta(hours=6), change + timedelta(minutes=1)]):
        version = "20250101_000000" if until <= change else "20260131_000000"
        findings = look(engine, replace(pipeline.config, model_version=version), until, days=days)
        assert findings.warnings == [], until
    engine.dispose()


def test_volume_and_errors_are_those_of_all_versions(pipeline, once, tmp_path):
    engine, start = open_engine(f"sqlite:///{tmp_path}/log.db"), datetime(2026, 1, 1)
    constant_ward(engine, once, start, 30, 40, [(0, "20250101_000000")])
    config = replace(pipeline.config, model_version="20260130_000000")
    with engine.begin() as connection:
        row = {**error_row(), "time": start + timedelta(days=29.5)}
        connection.execute(prediction_log.errors.insert(), [row])
    findings = look(engine, config, start + timedelta(days=30), days=1)
    assert findings.warnings == [] and any("20260130_000000 has no score" in line for line in findings.remarks)
    # a whole outage and a flood are told, whichever version serves
    assert "no prediction in 1 days" in look(engine, config, start + timedelta(days=32), days=1).warnings
    flood = pd.concat([once.assign(time=start + timedelta(days=30, hours=k), visit=f"f{k}") for k in range(1, 9)])
    flood.drop(columns="id").to_sql("predictions", engine, if_exists="append", index=False)
    assert any("volume" in warning for warning in look(engine, config, start + timedelta(days=31), days=1).warnings)
    engine.dispose()


def test_volume_is_not_judged_without_history(pipeline, once, tmp_path):
    engine, start = open_engine(f"sqlite:///{tmp_path}/log.db"), datetime(2026, 1, 1)
    # a few trials on the first day, then the whole ward
    once.head(30).assign(time=start + timedelta(hours=1)).drop(columns="id").to_sql(
        "predictions", engine, if_exists="append", index=False
    )
    constant_ward(engine, once, start + timedelta(days=1), 10, 60, [(0, pipeline.model_version)])
    for day in range(2, 11):
        assert look(engine, pipeline.config, start + timedelta(days=day)).warnings == []
    engine.dispose()


def test_scores_that_are_all_empty_are_told(pipeline, once, tmp_path, config_path, capsys):
    engine = open_engine(f"sqlite:///{tmp_path}/log.db")
    empty = once.head(40).assign(score=None, risk_level="UNKNOWN", reason="stale").drop(columns="id")
    empty.to_sql("predictions", engine, if_exists="append", index=False)
    engine.dispose()
    common = ["--monitor", f"sqlite:///{tmp_path}/log.db", "--config", str(config_path), "--until", DAY.isoformat()]
    for more in ([], ["--baseline-days", "3"]):
        assert main(["check", *common, *more]) == 1
        assert capsys.readouterr().out.splitlines() == ["the risk is UNKNOWN in 40 of 40 predictions: 40 stale"]
    assert main(["report", *common, "--html", str(tmp_path / "page.html")]) == 0


# ----------------------------------------------------------------------------------------------------- quality


def files_of(tmp_path, labels):
    labels.to_csv(tmp_path / "labels.csv", index=False)
    return str(tmp_path / "labels.csv")


def test_quality_by_week_with_outcomes_and_its_fall(pipeline, ward, tmp_path, key, capsys, config_path):
    data = snapshots_of(*ward, pipeline)
    engine = log_of(tmp_path / "log.db", pipeline, data, days=5, until=DAY + timedelta(days=5))
    engine.dispose()
    labels = files_of(tmp_path, ward[1])
    common = ["--monitor", f"sqlite:///{tmp_path}/log.db", "--config", str(config_path), "--labels", labels]
    common += ["--until", (DAY + timedelta(days=5)).isoformat()]
    assert main(["check", *common]) == 0
    findings = look(open_engine(common[1]), pipeline.config, DAY + timedelta(days=5), labels=read_outcomes(labels))
    week = findings.quality.iloc[0]
    truth = data.label
    scores = pipeline.score(data.observations, data.visit, data.as_of)
    assert week["predictions"] == len(truth) and week["positives"] == truth.sum()
    assert week["roc_auc"] == pytest.approx(metrics.figures(truth, scores, data.visit, data.visit)["roc_auc"])
    # outcomes that have nothing to do with the scores: the model has fallen
    mixed = ward[1].copy()
    generator = np.random.default_rng(1)
    order = generator.permutation(len(mixed))
    first = ward[0].groupby("visit_id")["observation_date"].median()
    mixed["sepsis"] = mixed["sepsis"].to_numpy()[order]
    mixed["sepsis_onset"] = mixed["visit_id"].map(first).where(mixed["sepsis"].eq(1))
    fallen = files_of(tmp_path, mixed)
    assert main(["check", *common[:4], "--labels", fallen, "--until", common[-1]]) == 1
    assert "quality in the week of" in capsys.readouterr().out


def test_a_challenger_is_compared_on_the_same_visits_and_moments(
    pipeline, ward, tmp_path, key, config_path, model_path
):
    data = snapshots_of(*ward, pipeline)
    data = data.at(np.flatnonzero(data.visit < 150))
    engine = log_of(tmp_path / "log.db", pipeline, data, days=5)
    other = ProductionPipeline(config_path, model_path)
    other.model_version, other.model.slope = "other", -other.model.slope
    log = PredictionLog(engine, other, "api", clock=lambda: DAY - timedelta(hours=1), shadow=True)
    scored = np.arange(len(data.label)) % 5 > 0  # the challenger left out some
    visit, moments = data.visit[scored], data.as_of[scored]
    log.record(data.observations, visit, moments, other.assess(data.observations, visit, moments), 0.002)
    shown, challengers = read_rows(engine, None, DAY), read_challengers(engine, DAY - timedelta(days=7), DAY)
    assert not len(read_challengers(engine, DAY, DAY + timedelta(days=7)))
    engine.dispose()
    labels = read_outcomes(files_of(tmp_path, ward[1]))

    findings = Findings()
    look_at_challengers(findings, shown, challengers, labels, pipeline.config)
    [(title, table)] = findings.challengers.items()
    assert "Challenger other (new)" in title and f"{scored.sum():,} scores" in title
    auc = table.set_index("figure").loc["roc auc"]
    expected = metrics.ranking_scores(data.label[scored], pipeline.score(data.observations, visit, moments))["roc_auc"]
    assert auc["old"] == pytest.approx(expected) and auc["new"] == pytest.approx(1 - expected)
    assert auc["high"] < 0 and "challenger other: ROC AUC" in findings.remarks[0]
    assert "Challenger other" in report_html(findings, pipeline.config, DAY, 7)

    few = Findings()
    look_at_challengers(few, shown, challengers, labels[labels["sepsis"] == 0], pipeline.config)
    assert not few.challengers and "0 septic visits that both scored" in few.remarks[0]


def in_mmol(frame):
    factor = np.where(frame["observation_type_code"] == "Glucose", 1 / 18.016, 1.0)
    return frame.assign(observation_value=frame["observation_value"] * factor)


def pressures_swapped(frame):
    return frame.assign(observation_type_code=frame["observation_type_code"].replace({"SBP": "DBP", "DBP": "SBP"}))


@pytest.mark.parametrize(
    ("spoil", "expected"), [(lambda frame: frame, None), (in_mmol, "Glucose__last"), (pressures_swapped, "DBP__last")]
)
def test_sixty_visits_show_what_an_interface_spoils(spoil, expected, pipeline, tmp_path):
    observations, _ = make_demo_cohort(n_patients=60, seed=77)
    read = pipeline.reproducer.read(spoil(observations))
    visit, moments = np.arange(read.n_visits), read.last_time
    engine = open_engine(f"sqlite:///{tmp_path}/log.db")
    log = PredictionLog(engine, pipeline, "batch", clock=lambda: DAY - timedelta(hours=1))
    log.record(read, visit, moments, pipeline.assess(read, visit, moments), 0.002)
    warnings = look(engine, pipeline.config, DAY).warnings
    engine.dispose()
    assert not warnings if expected is None else any(f"feature {expected}" in warning for warning in warnings)


def test_outcomes_cannot_be_joined_without_the_key(tmp_path, ward, config_path, monkeypatch, capsys):
    monkeypatch.delenv("SEPSIS_PSEUDONYM_KEY", raising=False)
    labels = files_of(tmp_path, ward[1])
    url = f"sqlite:///{tmp_path}/log.db"
    open_engine(url).dispose()
    assert main(["check", "--monitor", url, "--config", str(config_path), "--labels", labels]) == 2
    assert "SEPSIS_PSEUDONYM_KEY" in capsys.readouterr().err


def weekly(n_visits, scores_an_hour=6, septic=0.2, seed=0, week=0):
    """(rows, labels) of a week of visits that were scored often, by a model whose scores are calibrated."""
    generator = np.random.default_rng(seed)
    time = datetime(2026, 3, 2, 12) + timedelta(weeks=week)
    n = scores_an_hour * 5
    risk = generator.beta(0.5, 0.5 * (1 - septic) / septic, n_visits)
    sick = generator.random(n_visits) < risk
    rows = pd.DataFrame(
        {
            "visit": np.repeat([f"{week}-{k}" for k in range(n_visits)], n),
            "time": time,
            "as_of": np.tile(time - pd.to_timedelta(np.arange(n) / scores_an_hour, unit="h"), n_visits),
            "score": np.repeat(risk, n),
            "risk_level": np.repeat(np.where(risk > 0.5, "HIGH", "LOW"), n),
        }
    )
    onset = pd.Series(time + timedelta(hours=0.5), index=range(n_visits)).where(sick)  # within 6 h of all
    labels = pd.DataFrame({"visit": rows["visit"].unique(), "sepsis": sick.astype(int), "onset": onset})
    return rows, labels


def quality(pipeline, weeks, since=None, told=0.8):
    findings = Findings()
    config = replace(pipeline.config, metrics={"test": {"roc_auc": told, "roc_auc_95": [told - 0.03, told + 0.03]}})
    rows, labels = (pd.concat(tables) for tables in zip(*weeks, strict=True))
    look_at_quality(findings, rows, labels, config, since)
    return findings


@pytest.mark.parametrize("n_visits", [20, 60])
def test_quality_of_small_weeks_that_are_scored_often_is_silent(pipeline, n_visits, monkeypatch):
    """Snapshots of a visit are no independent evidence: by them most of these weeks would seem to be off."""
    few = partial(metrics.bootstrap_intervals, n_resamples=200)
    monkeypatch.setattr(metrics, "bootstrap_intervals", few)
    told = metrics.figures(*(np.concatenate([part]) for part in _labelled(weekly(3000))))["roc_auc"]
    alerted = sum(bool(quality(pipeline, [weekly(n_visits, seed=seed)], told=told).warnings) for seed in range(100))
    assert alerted <= 2


def _labelled(week):
    rows = week[0].merge(week[1], on="visit")
    return rows["sepsis"].to_numpy(), rows["score"].to_numpy(), rows["visit"].to_numpy(), rows["visit"].to_numpy()


def test_quality_has_intervals_that_hold_for_visits(pipeline):
    week = weekly(60)
    row = quality(pipeline, [week]).quality.iloc[0]
    for name in ("roc_auc", "average_precision", "expected_over_observed", "visits_alerted"):
        assert row[f"{name}_from"] < row[name] < row[f"{name}_to"], name
    assert (row["visits"], row["septic_visits"], row["predictions"]) == (60, week[1]["sepsis"].sum(), len(week[0]))
    # scoring each visit more often tells nothing new
    rarely = quality(pipeline, [weekly(60, scores_an_hour=1)]).quality.iloc[0]
    for name in ("roc_auc_from", "roc_auc_to", "expected_over_observed_from", "visits_alerted_to"):
        assert row[name] == pytest.approx(rarely[name], abs=1e-9), name


def test_scores_that_promise_too_much_are_told_also_where_nobody_is_septic(pipeline):
    rows, labels = weekly(60)
    nobody = labels.assign(sepsis=0, onset=pd.NaT)
    assert any("0 seen" in warning for warning in quality(pipeline, [(rows, nobody)]).warnings)
    timid = rows.assign(score=rows["score"] / 10)
    assert any("calibration" in warning for warning in quality(pipeline, [(timid, labels)]).warnings)


def test_only_weeks_of_the_period_are_alerted_about(pipeline):
    rows, labels = weekly(100)
    bad = (rows.assign(score=1 - rows["score"]), labels)
    weeks = [bad, *(weekly(100, seed=k, week=k) for k in range(1, 5))]
    everything = quality(pipeline, weeks)
    assert any("week of 2026-03-02" in warning for warning in everything.warnings)
    recent = quality(pipeline, weeks, since=datetime(2026, 3, 29, 12))
    assert recent.warnings == [] and "2026-03-02" in set(recent.quality["week"])


def test_few_septic_visits_a_week_are_judged_together(pipeline):
    weeks = [weekly(20, seed=k, week=k) for k in range(8)]
    good = quality(pipeline, weeks)
    assert good.warnings == [] and any("is not judged: 2 septic visits" in remark for remark in good.remarks)
    fallen = [(rows.assign(score=1 - rows["score"]), labels) for rows, labels in weeks]
    assert any(warning.startswith("quality in the whole period") for warning in quality(pipeline, fallen).warnings)


def test_outcomes_are_those_of_training(pipeline, tmp_path, key):
    """Of repeated visits the last counts; septic visits without an onset are left out."""
    table = pd.DataFrame(
        {
            "visit_id": ["1", "2", "3", "1", "2"],
            "client": ["a", "a", "a", "a", "b"],
            "sepsis": ["0", "1", "1", "1", "0"],
            "sepsis_onset": ["", "2026-03-02 13:00", "", "2026-03-02 14:00", ""],
        }
    )
    labels = read_outcomes(files_of(tmp_path, table))
    assert len(labels) == labels["visit"].nunique() == 4
    times = {"time": datetime(2026, 3, 2, 12), "as_of": datetime(2026, 3, 2, 12)}
    rows = labels[["visit"]].assign(**times, score=[0.1, 0.2, 0.3, 0.4], risk_level="LOW")
    findings = quality(pipeline, [(rows, labels)])
    row = findings.quality.iloc[0]
    assert (row["predictions"], row["positives"]) == (3, 2)
    assert any(remark.startswith("1 septic visits") for remark in findings.remarks)


# ---------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "--monitor", "off"], "no prediction log to read"),
        (["check", "--monitor", "postgresql+psycopg://u:geheim@127.0.0.1:1/x"], "check that the server runs"),
        (["check", "--monitor", "postgresql+psycopg://u:geheim@127.0.0.1:geheim/x"], "URL of the prediction log"),
        (["check", "--monitor", "geheim"], "URL of the prediction log"),
        (["check", "--monitor", "nosuch://u:geheim@h/x"], "needs a driver"),
        (["export", "--monitor", "sqlite:///{tmp}/text.db"], "text.db: file is not a database"),
        (["check", "--monitor", "sqlite:///{tmp}/torn.db"], "torn.db: database disk image is malformed"),
        (["export", "--monitor", "sqlite:///{tmp}/torn.db"], "torn.db: database disk image is malformed"),
        (["check", "--webhook", "hooks.example.org/geheim"], "expected http"),
        (["check", "--webhook", "http://hooks.example.org:99999/geheim"], "expected http"),
        (["check", "--webhook", "http://[geheim/x"], "expected http"),
        (["check", "--days", "99999999"], "from 1 to"),
        (["export", "--days", "99999999"], "from 1 to"),
        (["check", "--baseline-days", "99999999"], "from 0 to"),
        (["prune", "--older-than", "99999999"], "from 0 to"),
        (["check", "--until", "0001-01-01"], "1970"),
        (["check", "--until", "9999-12-31T23:59:59-05:00"], "1970"),
    ],
)
def test_what_cannot_start_says_so_in_a_line(arguments, said, once, tmp_path, config_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction_log, "OPENING_TRIES", 1)
    engine = open_engine(f"sqlite:///{tmp_path}/torn.db")
    once.drop(columns="id").to_sql("predictions", engine, if_exists="append", index=False)
    engine.dispose()
    torn = bytearray((tmp_path / "torn.db").read_bytes())
    for page in range(10, len(torn) // 4096):
        torn[page * 4096 : page * 4096 + 2000] = b"x" * 2000
    (tmp_path / "torn.db").write_bytes(torn)
    (tmp_path / "text.db").write_text("no database " * 1000)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--monitor" not in arguments:
        arguments += ["--monitor", f"sqlite:///{tmp_path}/new.db"]
    if "--until" not in arguments:
        arguments += ["--until", DAY.isoformat()]
    if arguments[0] == "check":
        arguments += ["--config", str(config_path)]
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    assert status == 2 and shown.out == ""
    assert said in shown.err.splitlines()[-1] and "geheim" not in shown.err and "Traceback" not in shown.err


def test_options_of_every_script_stand_before_and_after_the_command(once, tmp_path, config_path, capsys):
    common = ["--monitor", f"sqlite:///{tmp_path}/log.db", "--config", str(config_path)]
    open_engine(common[1]).dispose()
    for arguments in (["check", "--quiet"], ["--quiet", "check"]):
        assert main([*arguments, *common]) == 1
        assert capsys.readouterr() == ("no prediction in 7 days\n", "")
    main(["--log-format", "json", "check", *common])
    assert json.loads(capsys.readouterr().err.splitlines()[0])["level"] == "info"
    for command in ("report", "check", "export", "prune"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert f"python monitor.py {command} --" in text
        assert "(default: " in text and ("(default: 7)" in text) == (command != "prune")


def test_a_log_that_does_not_exist_is_no_empty_log(tmp_path, config_path, capsys):
    path = tmp_path / "mistyped.db"
    assert main(["check", "--monitor", f"sqlite:///{path}", "--config", str(config_path)]) == 2
    assert f"no file '{path}'" in capsys.readouterr().err and not path.exists()


def test_report_check_export_prune(pipeline, ward, tmp_path, key, capsys, config_path):
    data = snapshots_of(shifted(ward[0]), ward[1], pipeline)
    log_of(tmp_path / "log.db", pipeline, data).dispose()
    common = ["--monitor", f"sqlite:///{tmp_path}/log.db", "--until", DAY.isoformat()]
    labels = ["--labels", files_of(tmp_path, ward[1])]
    page = tmp_path / "report.html"
    assert main(["report", *common, "--config", str(config_path), "--html", str(page), *labels]) == 0
    text = page.read_text()
    assert (
        "drift of feature Resp" in text and text.count("data:image/png") == 2 and "http" not in text.split("base64")[0]
    )
    assert "latency by day" in text
    assert (
        text.count("ROC AUC</th>") == 1 and len(re.findall(r"<td>\d\.\d{3} \(\d\.\d{3}–\d+\.\d{3}\)</td>", text)) >= 4
    )
    capsys.readouterr()
    assert main(["check", *common, "--config", str(config_path), "--webhook", "http://127.0.0.1:9/x"]) == 1
    shown = capsys.readouterr()
    assert all(line for line in shown.out.splitlines()) and "webhook cannot be reached" in shown.err
    with socket.create_server(("127.0.0.1", 0)) as server:  # something that speaks no HTTP

        def answer():
            for _ in range(2):
                with server.accept()[0] as caller:
                    caller.recv(65536)
                    caller.sendall(b"220 ready\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        webhook = f"http://127.0.0.1:{server.getsockname()[1]}/geheim"
        assert main(["check", *common, "--config", str(config_path), "--webhook", webhook]) == 1
        answering.join()
    shown = capsys.readouterr()
    assert "webhook cannot be reached" in shown.err and "geheim" not in shown.err
    assert main(["export", *common, "--out", str(tmp_path / "rows.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(data.label)
    capsys.readouterr()
    assert main(["prune", *common, "--older-than", "3"]) == 0
    deleted = json.loads(capsys.readouterr().out)["predictions_deleted"]
    with open_engine(common[1]).connect() as connection:
        left = connection.execute(sa.select(sa.func.count()).select_from(predictions)).scalar_one()
    assert 0 < deleted < len(data.label) and left == len(data.label) - deleted
    assert main(["check", "--monitor", common[1], "--config", str(config_path), "--until", "2027-01-01"]) == 1
    assert "no prediction in 7 days" in capsys.readouterr().out


def test_old_rows_are_deleted_in_steps(url, pipeline, ward, monkeypatch, capsys):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    engine, now = open_engine(url), [DAY]
    log = PredictionLog(engine, pipeline, "api", clock=lambda: now[0])
    assert log.record(*logged(pipeline, data, 25))
    now[0] = DAY + timedelta(days=2)
    assert log.record(*logged(pipeline, data, 5)) and log.record_error("bad_file")
    log.close()
    steps = []
    monkeypatch.setattr("monitor.PRUNED_AT_ONCE", 10)
    monkeypatch.setattr("monitor.time.sleep", lambda seconds: steps.append(count(url, predictions)))
    assert main(["prune", "--monitor", url, "--older-than", "1", "--until", (DAY + timedelta(days=2)).isoformat()]) == 0
    assert json.loads(capsys.readouterr().out)["predictions_deleted"] == 25
    assert steps == [20, 10, 5] and count(url, prediction_log.errors) == 1


def test_slow_and_failing_services_are_told(pipeline, ward, tmp_path, key):
    data = snapshots_of(ward[0].head(3000), ward[1], pipeline)
    engine = open_engine(f"sqlite:///{tmp_path}/log.db")
    log = PredictionLog(engine, pipeline, "api", clock=lambda: DAY - timedelta(hours=1))
    log.record(*logged(pipeline, data, seconds=3.0))
    log.record_error("unusable", 50)
    alerts = look(engine, pipeline.config, DAY).warnings
    assert any("latency" in warning for warning in alerts) and any("errors" in warning for warning in alerts)


def test_a_fallen_volume_is_told(pipeline, ward, tmp_path, key):
    data = snapshots_of(*ward, pipeline)
    engine = log_of(tmp_path / "log.db", pipeline, data, days=28, until=DAY)
    assert any("volume" in warning for warning in look(engine, pipeline.config, DAY + timedelta(days=6)).warnings)


def test_a_model_without_a_reference_profile_is_logged_without_bins(config_path, model_path, tmp_path, ward, key):
    pipeline = ProductionPipeline(config_path, model_path)
    pipeline.config = replace(pipeline.config, reference_profile={})
    engine = log_of(tmp_path / "log.db", pipeline, snapshots_of(ward[0].head(2000), ward[1], pipeline))
    assert any("no reference profile" in remark for remark in look(engine, pipeline.config, DAY).remarks)
