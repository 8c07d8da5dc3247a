"""The stream: the same scores as the batch whatever the arrivals, bounds, alerts, lines, restarts, HL7 over MLLP."""

import asyncio
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import hl7
import numpy as np
import pytest
from hl7.client import MLLPClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.artifacts import write_atomic
from feature_pipeline import BadConfig, FeaturePlan, iso_times, resolve_snapshots
from serving.stream import mllp
from serving.stream.alerts import AlertBook, AlertSinks
from serving.stream.feed import Feed, read_lines
from serving.stream.hl7_mapping import read_hl7_mapping
from serving.stream.journal import Journal
from serving.stream.visits import RAW, ROW
from stream_processor import StreamProcessor, main
from tests.strategies import cohorts

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def make(config_path, model_path):
    def make(min_observations=1, **changes):
        """Scores for each visit's last observation, unless told otherwise: the examples are of past years."""
        return StreamProcessor(config_path, model_path, min_observations, **{"as_of": "last", **changes})

    return make


def batch_scores(pipeline, records):
    """(client, visit) -> score of the batch."""
    observations = pipeline.reproducer.read(records)
    visit, moments, _ = resolve_snapshots(observations)
    scores = pipeline.assess(observations, visit, moments).probability.tolist()
    return {key: p if p == p else None for key, p in zip(observations.keys(), scores, strict=True)}


def last_scores(results):
    return {(str(r["client"]), str(r["visit_id"])): r["sepsis_probability"] for r in results}


# --------------------------------------------------------------------------------------------- the same scores


@quick
@given(records=cohorts(), data=st.data())
def test_any_order_repetition_and_interleaving_ends_at_the_batch_score(make, pipeline, records, data):
    again = data.draw(st.lists(st.sampled_from(records), max_size=6))
    arrivals = data.draw(st.permutations(records + again))
    processor = make()
    results = []
    for record in arrivals:
        processor.add_observation(record)
        if data.draw(st.booleans()):
            results += processor.predict_due()
    results += processor.predict_due()
    assert last_scores(results) == batch_scores(pipeline, records)
    assert not processor.predict_due()  # nothing changed since


@quick
@given(records=cohorts(max_visits=1))
def test_each_score_is_what_the_batch_knows_then(make, pipeline, records):
    processor = make()
    for n, record in enumerate(records, 1):
        processor.add_observation(record)
        result = processor.predict_visit(record["visit_id"], record["client"])
        [expected] = batch_scores(pipeline, records[:n]).values()
        assert result["sepsis_probability"] == expected
        read = pipeline.reproducer.read(records[:n])
        assert result["num_observations"] == len(read.time) - sum(pipeline.unused_codes(read).values())
        assert result["unused_codes"] == pipeline.unused_codes(read)


def test_dirty_rows_are_counted_and_the_rest_gives_the_batch_score(make, pipeline, cohort):
    frame = cohort[0].head(4000).astype({"observation_date": str})
    records = frame.to_dict("records")
    random.Random(1).shuffle(records)
    processor = make()
    processor.add_observations(records)
    assert last_scores(processor.predict_due()) == batch_scores(pipeline, records)
    assert dict(processor.set_aside) == pipeline.reproducer.read(records).set_aside


# -------------------------------------------------------------------------------------------------- the guide


def test_the_guides_way(make):
    processor = make(min_observations=5)
    rows = EXAMPLE[:5]
    for row in rows[:4]:
        processor.add_observation(row)
    processor.add_observation(rows[0])  # a repetition is no new observation
    assert not processor.should_predict(rows[0]["visit_id"])
    processor.add_observation(rows[4])
    assert processor.should_predict(rows[0]["visit_id"])
    result = processor.predict_visit(rows[0]["visit_id"])
    wanted = {"visit_id", "client", "sepsis_probability", "risk_level", "num_observations", "timestamp"}
    assert wanted <= result.keys() and result["num_observations"] == 5
    assert not processor.should_predict(rows[0]["visit_id"])  # nothing new
    processor.clear_buffer(rows[0]["visit_id"])
    with pytest.raises(KeyError):
        processor.predict_visit(rows[0]["visit_id"])


def test_two_clients_may_share_a_visit_number(make):
    processor = make()
    processor.add_observations([EXAMPLE[0], {**EXAMPLE[0], "client": "other"}])
    with pytest.raises(ValueError, match="which client"):
        processor.should_predict(EXAMPLE[0]["visit_id"])
    assert processor.predict_visit(EXAMPLE[0]["visit_id"], "other")["client"] == "other"


def test_importing_loads_no_model_and_no_broker():
    unwanted = "{'lightgbm', 'sklearn', 'confluent_kafka', 'hl7'}"
    code = f"import sys, stream_processor; print({unwanted} & set(sys.modules) or '')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ----------------------------------------------------------------------------------------------------- bounds


def test_idle_visits_are_scored_a_last_time_and_dropped(make):
    now = [2e9]
    processor = make(idle_hours=1, steady=lambda: now[0])
    processor.add_observation(EXAMPLE[0])
    processor.settle()
    now[0] += 1800
    processor.add_observation({**EXAMPLE[0], "visit_id": 2})
    processor.settle()
    assert processor.close_idle() == []
    now[0] += 1801
    assert [r["visit_id"] for r in processor.close_idle()] == [EXAMPLE[0]["visit_id"]]
    assert [key[1] for key in processor.visits] == ["2"]


class Clocks:
    """The system's clock and a steady one, set by hand."""

    def __init__(self, wall):
        self.wall, self.steady = wall, 1000.0

    def go_on(self, seconds):
        self.wall, self.steady = self.wall + seconds, self.steady + seconds

    def options(self):
        return {"clock": lambda: self.wall, "steady": lambda: self.steady, "as_of": "now"}


@pytest.mark.parametrize("step", [3 * 86400, -3 * 86400])
def test_a_step_of_the_clock_drops_nobody_and_loses_nothing(make, evidence_cases, step, caplog):
    rows, moment = evidence_cases
    records = [r for r in json.loads(rows.to_json(orient="records", date_format="iso")) if r["visit_id"] == "known"]
    clocks = Clocks(moment.timestamp())
    processor = make(**clocks.options())
    processor.add_observations(records)
    [before] = processor.predict_due()
    clocks.wall += step
    clocks.go_on(60)
    assert processor.close_idle() == [] and len(processor.visits) == 1
    processor.add_observation({**records[0], "observation_date": "2024-05-01T12:01:00", "observation_value": 91})
    [after] = processor.predict_due()
    assert processor.set_aside == {}
    assert (before["as_of"], after["as_of"]) == ("2024-05-01T12:00:00Z", "2024-05-01T12:01:00Z")


def test_a_clock_that_is_set_right_is_followed(make, evidence_cases):
    """It was three days slow; what arrives says so."""
    rows, moment = evidence_cases
    records = [r for r in json.loads(rows.to_json(orient="records", date_format="iso")) if r["visit_id"] == "known"]
    clocks = Clocks(moment.timestamp() - 3 * 86400)
    processor = make(**clocks.options())
    processor.add_observation(records[0])
    assert processor.predict_due() == [] and processor.set_aside == {"future": 1}
    clocks.wall = moment.timestamp()
    processor.add_observations([{**row, "observation_date": "2024-05-01T11:59:00"} for row in records])
    assert processor.predict_due()[0]["as_of"] == "2024-05-01T12:00:00Z"


def test_too_many_visits_drop_the_longest_silent_with_its_score(make):
    processor = make(max_visits=2)
    for visit in (1, 2, 1, 3):
        processor.add_observation({**EXAMPLE[0], "visit_id": visit})
        processor.settle()
    assert {key[1] for key in processor.visits} == {"1", "3"} and processor.dropped == 1
    assert {r["visit_id"] for r in processor.predict_due()} == {1, 2, 3}


def test_a_visit_beyond_the_limit_is_reported_and_never_scored_in_part(make):
    processor = make(max_observations=10)
    assert processor.look_back is None  # this model looks at whole visits
    rows = [row for row in EXAMPLE if row["visit_id"] == EXAMPLE[0]["visit_id"]]
    processor.add_observations(rows)
    assert processor.predict_due() == [] and processor.set_aside["visit_full"] >= 10
    with pytest.raises(KeyError):
        processor.predict_visit(rows[0]["visit_id"])


@quick
@given(records=cohorts(max_visits=1, max_size=30))
def test_old_observations_are_folded_away_where_no_feature_sees_them(make, records):
    """With a model of windows and latest values alone a visit may be of any length."""
    names = ["HR__last", "HR__mean__6h", "Temp__max__12h", "Age__last", "clinical__news2", "context__observations_6h"]
    processor = make()
    plan = processor.pipeline.reproducer.plan = FeaturePlan(names)
    assert processor.look_back == 24
    whole = processor.pipeline.reproducer.read(records)
    visit, moments, _ = resolve_snapshots(whole)
    for record in records:
        processor.add_observation(record)
        processor.settle()
        [kept] = processor.visits.values()
        kept.rows = [processor._folded(processor._distinct(kept).view(ROW)).view(RAW)]
    observations = processor._observations(list(processor.visits))
    assert np.array_equal(
        plan.evaluate(observations, visit, moments), plan.evaluate(whole, visit, moments), equal_nan=True
    )


@pytest.fixture
def deployed(make, models_dir, tmp_path):
    """A processor with models of its own, and a function that deploys the same model with changes in its config."""
    folder = shutil.copytree(models_dir, tmp_path / "models")
    config = json.loads((folder / "best_model_config.json").read_text())

    def deploy(**changes):
        write_atomic(folder / "best_model_config.json", json.dumps(config | changes))

    return StreamProcessor(folder / "best_model_config.json", folder / "best_model.pkl", 1, as_of="last"), deploy


def test_another_model_is_taken_up_between_scores(deployed, monkeypatch):
    processor, deploy = deployed
    monkeypatch.setattr("serving.deployed.LOOK_SECONDS", -1)
    old, versions = processor.pipeline.model_version, []
    for n in range(3):
        processor.add_observation({**EXAMPLE[0], "observation_value": n + 1})
        versions += [result["model_version"] for result in processor.predict_due()]
        deploy(**({"model_version": "another"} if n == 0 else {"feature_names": []}))
    assert versions == [old, "another", "another"]  # what cannot be loaded changes nothing


def test_a_model_with_other_meanings_of_codes_waits_for_a_restart(deployed, tmp_path):
    processor, deploy = deployed
    old = processor.pipeline.model_version
    deploy(model_version="another", synonyms={**processor.pipeline.config.synonyms, "XHR": "heart_rate"})
    feed = Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    feed.accept(EXAMPLE)
    for _ in range(2):
        processor.renew()
    feed.finish()
    assert {json.loads(line)["model_version"] for line in feed.results.getvalue().splitlines()} == {old}
    restarted = StreamProcessor(*processor.pipeline._files, 1, as_of="last")
    with pytest.raises(BadConfig, match="other meanings"):
        Feed(restarted, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())


def test_a_folded_visit_is_not_scored_by_a_model_that_looks_further_back(deployed, tmp_path):
    processor, deploy = deployed
    processor.pipeline.reproducer.plan = FeaturePlan(["HR__last", "clinical__news2"])
    processor.max_observations, processor.min_observations = 10, 1000
    row = {**EXAMPLE[0], "observation_date": "2024-01-09T00:00:00"}
    feed = Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    feed.accept([{**row, "observation_date": f"2024-01-0{d}T00:00:00"} for d in range(1, 9)] * 2)
    feed.accept([{**row, "observation_value": v} for v in range(5)])
    feed.score()
    [visit] = processor.visits.values()
    assert visit.folded == 24 and not visit.full
    feed.finish()
    restarted = StreamProcessor(*processor.pipeline._files, 1, as_of="last")
    Feed(restarted, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO()).finish()
    deploy(model_version="another")
    processor.renew()
    processor.min_observations = 1
    for after in (processor, restarted):
        after.add_observation(row | {"observation_value": 6})
        assert after.predict_due() == [] and after.set_aside["visit_full"]


def test_a_visit_that_was_given_up_stays_so_after_a_restart(make, tmp_path):
    processor = make(max_observations=10)
    rows = [row for row in EXAMPLE if row["visit_id"] == EXAMPLE[0]["visit_id"]]
    feed = Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    feed.accept(rows)
    feed.finish()
    restarted = make()
    Feed(restarted, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    restarted.add_observations(rows[:12])
    assert restarted.predict_due() == []


def test_dates_of_the_future_are_set_aside(make):
    processor = make(clock=lambda: 1_704_067_200.0)  # 1 January 2024
    dates = ("2024-01-01T00:04:00", "2024-01-01T01:00:00", "2094-01-01T00:00:00")
    processor.add_observations([{**EXAMPLE[2], "observation_date": date} for date in dates])
    assert processor.predict_due()[0]["num_observations"] == 1 and processor.set_aside == {"future": 2}


def test_a_risk_that_cannot_be_told_has_its_reason(careful_files, evidence_cases, tmp_path):
    rows, moment = evidence_cases
    records = json.loads(rows.to_json(orient="records", date_format="iso"))
    processor = StreamProcessor(*careful_files, 1, clock=moment.timestamp, steady=lambda: 0.0)
    feed = Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    feed.accept(records)
    feed.score()
    results = {r["visit_id"]: r for r in map(json.loads, feed.results.getvalue().splitlines())}
    assert results.keys() == {"known", "heights", "stale", "ahead"}  # words open no visit
    assert {v: r["reason"] for v, r in results.items() if r["risk_level"] == "UNKNOWN"} == {
        "heights": "insufficient_evidence",
        "stale": "stale",
    }
    assert results["heights"]["sepsis_probability"] is None and results["heights"]["num_observations"] == 0
    assert results["heights"]["missing"] == ["heart_rate", "respiratory_rate", "temperature"]
    assert results["heights"]["unused_codes"] == {"8302-2": 2} and results["known"]["unused_codes"] == {}
    assert results["known"]["sepsis_probability"] == results["ahead"]["sepsis_probability"] > 0
    assert [results[v]["hours_since_newest"] for v in ("known", "stale", "heights")] == [1.0, 40.0, None]
    assert {r["as_of"] for r in results.values()} == {"2024-05-01T12:00:00Z"}
    assert processor.set_aside == {"no_value": 1, "future": 1}
    feed.finish()
    scored = StreamProcessor(*careful_files, 1, clock=lambda: moment.timestamp() + 7200, steady=lambda: 0.0)
    Feed(scored, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO()).finish()
    assert scored.predict_visit("known")["hours_since_newest"] == 3.0  # now is another moment


def test_a_visit_that_becomes_stale_is_unknown_once_without_new_observations(careful_files, evidence_cases, tmp_path):
    rows, moment = evidence_cases
    records = json.loads(rows[rows["visit_id"] == "known"].to_json(orient="records", date_format="iso"))
    time = {"now": moment.timestamp()}

    def feed():
        processor = StreamProcessor(*careful_files, 1, clock=lambda: time["now"], steady=lambda: time["now"])
        return Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())

    def given(feed, hours):
        time["now"] = moment.timestamp() + hours * 3600
        feed.results.truncate(feed.results.seek(0))
        feed.score()
        return [(r["risk_level"], r["reason"]) for r in map(json.loads, feed.results.getvalue().splitlines())]

    first = feed()
    first.accept(records)
    assert [reason for _, reason in given(first, 0)] == [None]
    assert given(first, 10.9) == []  # measured an hour before the moment, good for twelve
    first.finish()
    second = feed()
    assert given(second, 11.1) == [("UNKNOWN", "stale")] and given(second, 30) == []
    second.accept([{**records[0], "observation_date": "2024-05-02T17:59:00"}])
    assert [level for level, _ in given(second, 30)] == ["UNKNOWN"]
    second.finish()


def test_a_site_map_of_codes_makes_foreign_codes_count(careful_files, site_codes, site_cases):
    lines = site_cases.to_json(orient="records", lines=True, date_format="iso")
    options = ["--codes", str(site_codes), "--as-of", "2024-05-01T12:00:00"]
    done = run_lines(careful_files[0].parent, lines, *options)
    results = {r["visit_id"]: r["sepsis_probability"] for r in map(json.loads, done.stdout.splitlines())}
    assert results["own"] == results["theirs"] and done.returncode == 0, done.stderr


def test_an_alert_follows_a_risk_that_was_unknown():
    book = AlertBook()
    assert book.rises([result("UNKNOWN", 1)]) == []
    assert [a["previous_level"] for a in book.rises([result("HIGH", 2, "UNKNOWN")])] == ["UNKNOWN"]


def test_dropped_visits_are_not_scored_from_a_part(make, tmp_path):
    now = [2e9]
    rows = [row for row in EXAMPLE if row["visit_id"] == EXAMPLE[0]["visit_id"]]

    def feed():
        processor = make(idle_hours=1, max_visits=2, steady=lambda: now[0])
        return Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())

    first = feed()
    first.accept(rows[:20])
    first.score()
    now[0] += 3601
    first._give(first.processor.close_idle)
    first.accept([{**row, "visit_id": visit} for visit in ("b", "c", "d") for row in rows[:3]])
    first.score()
    first.accept([*rows[20:], {**rows[3], "visit_id": "b"}, {**rows[3], "visit_id": "c"}])
    first.score()
    assert [key[1] for key in first.processor.visits] == ["d", "c"]
    assert first.processor.set_aside["visit_dropped"] == len(rows[20:]) + 1
    first.finish()
    for _ in range(2):  # before and after the file was written anew
        later = feed()
        assert later.processor.set_aside["visit_dropped"] == 0
        later.accept(rows[20:])
        later.score()
        assert later.results.getvalue() == "" and later.processor.set_aside["visit_dropped"] == len(rows[20:])
        later.finish()
    later.processor.clear_buffer(rows[0]["visit_id"], rows[0]["client"])
    later.processor.add_observations(rows)
    assert len(later.processor.predict_due()) == 1  # begun anew, as asked


def test_codes_that_no_visit_has_any_more_are_forgotten(make, pipeline, monkeypatch):
    monkeypatch.setattr("serving.stream.processor.FORGETTABLE", 10)
    processor, results = make(), []
    for n, row in enumerate(EXAMPLE):
        junk = {**row, "visit_id": f"junk {n}", "observation_type_code": f"free text {n}", "observation_value": 1}
        processor.add_observations([junk, row])
        results += [r for r in processor.predict_due() if not str(r["visit_id"]).startswith("junk")]
        processor.clear_buffer(f"junk {n}", row["client"])
    assert len(processor.codes) < 200 < len(EXAMPLE)
    assert last_scores(results) == batch_scores(pipeline, EXAMPLE)


# ----------------------------------------------------------------------------------------------------- alerts


def result(level, hour, before=None, visit=1):
    return {
        "visit_id": visit,
        "client": "a",
        "sepsis_probability": 0.5,
        "risk_level": level,
        "previous_level": before,
        "num_observations": 9,
        "timestamp": f"2024-01-0{1 + hour // 24}T{hour % 24:02d}:00:00Z",
        "model_version": "v",
    }


def test_an_alert_when_risk_rises_once_with_a_cool_down():
    book = AlertBook(cooldown_hours=6)
    given = lambda *r: [a["risk_level"] for a in book.rises([result(*r)])]  # noqa: E731
    assert given("LOW", 0) == []
    assert given("MEDIUM", 1, "LOW") == ["MEDIUM"]
    assert given("MEDIUM", 2, "MEDIUM") == []  # no rise
    assert given("LOW", 3, "MEDIUM") == []
    assert given("MEDIUM", 4, "LOW") == []  # cool-down
    assert given("HIGH", 5, "MEDIUM") == ["HIGH"]  # worse than what was told
    assert given("LOW", 6, "HIGH") == given("MEDIUM", 7, "LOW") == []
    assert given("MEDIUM", 12, "LOW") == ["MEDIUM"]
    assert book.rises([result("HIGH", 13, "LOW", visit=2)])[0]["previous_level"] == "LOW"


def test_alerts_go_to_file_and_webhook_and_a_dead_webhook_stops_nothing(tmp_path, caplog):
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        alerts = AlertBook().rises([result("HIGH", 1)])
        sinks = AlertSinks(str(tmp_path / "a.jsonl"), f"http://127.0.0.1:{server.server_port}/x")
        sinks.send(alerts)
        sinks.close()
        server.shutdown()
    assert received == alerts == [json.loads((tmp_path / "a.jsonl").read_text())]
    dead = AlertSinks(str(tmp_path / "a.jsonl"), "http://127.0.0.1:9/secret")
    dead.send(alerts)
    dead.close()
    assert dead.failed == 1 and "secret" not in caplog.text and alerts[0]["alert_id"] not in caplog.text
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------ lines and restarts


def run_lines(models_dir, text, *options):
    command = [sys.executable, str(ROOT / "stream_processor.py"), "--monitor", "off", "--min-observations", "1"]
    command += ["--config", str(models_dir / "best_model_config.json"), "--model", str(models_dir / "best_model.pkl")]
    options = options if "--as-of" in options else (*options, "--as-of", "last")
    return subprocess.run([*command, *options], input=text, capture_output=True, text=True, timeout=120)


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_lines_from_stdin(models_dir, pipeline, tmp_path):
    bad = ["this is no JSON", "[" * 100_000, "7", lines_of([{**EXAMPLE[0], "visit_id": None}]).strip()]
    done = run_lines(models_dir, lines_of(EXAMPLE) + "\n".join(bad), "--alerts", str(tmp_path / "alerts.jsonl"))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert last_scores(results) == batch_scores(pipeline, EXAMPLE)
    assert done.returncode == 1 and "4 set aside" in done.stderr and "Traceback" not in done.stderr
    raised = {(r["client"], r["visit_id"]) for r in results if r["risk_level"] != "LOW"}
    alerts = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert {(a["client"], a["visit_id"]) for a in alerts} == raised and raised
    for row in EXAMPLE:
        assert row["client"] not in done.stderr


def test_a_restart_goes_on_where_it_ended_and_alerts_nobody_twice(models_dir, pipeline, tmp_path):
    options = ["--state", str(tmp_path / "state.db"), "--alerts", str(tmp_path / "alerts.jsonl")]
    half = len(EXAMPLE) // 2
    first = run_lines(models_dir, lines_of(EXAMPLE[:half]), *options)
    second = run_lines(models_dir, lines_of(EXAMPLE[half:]), *options)
    third = run_lines(models_dir, lines_of(EXAMPLE[-1:]), *options)
    assert first.returncode == second.returncode == third.returncode == 0
    results = [json.loads(line) for line in (first.stdout + second.stdout).splitlines()]
    assert last_scores(results) == batch_scores(pipeline, EXAMPLE)
    alerts = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    told = [(a["client"], a["visit_id"], a["risk_level"]) for a in alerts]
    assert len(told) == len(set(told)) > 0
    assert (tmp_path / "state.db").stat().st_mode & 0o077 in (0, 0o040)


def fed(models_dir, state):
    """A stream with the example's lines in its stdin, which stays open."""
    command = [sys.executable, str(ROOT / "stream_processor.py"), "--monitor", "off", "--min-observations", "1"]
    command += ["--config", str(models_dir / "best_model_config.json"), "--model", str(models_dir / "best_model.pkl")]
    command += ["--as-of", "last"]
    process = subprocess.Popen([*command, "--state", str(state)], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)
    process.stdin.write(lines_of(EXAMPLE).encode())
    process.stdin.flush()
    return process


def test_a_killed_process_has_kept_what_it_took(models_dir, pipeline, tmp_path):
    state = tmp_path / "state.db"
    process = fed(models_dir, state)
    seen = set()
    while len(seen) < 8:  # every visit has been scored at least once
        seen.add(json.loads(process.stdout.readline())["visit_id"])
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    done = run_lines(models_dir, lines_of(EXAMPLE[-30:]), "--state", str(state))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    expected = batch_scores(pipeline, EXAMPLE)
    assert done.returncode == 0 and last_scores(results).items() <= expected.items()


def test_sigterm_finishes_what_was_accepted(models_dir, make, tmp_path):
    state = tmp_path / "state.db"
    process = fed(models_dir, state)
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    results = [json.loads(line) for line in (first + rest).splitlines()]
    assert last_scores(results) == scores_of(make, state)


def scores_of(make, state):
    """The scores of the visits that a state file has kept."""
    processor = make()
    Feed(processor, AlertBook(), AlertSinks(), Journal(state), io.StringIO()).finish()
    return last_scores([processor.predict_visit(visit, client) for client, visit in processor.visits])


def killed(feed):
    """What a kill leaves: the file as it is, and the lock open."""
    feed.journal.close()


def test_what_was_kept_and_not_scored_is_scored_by_the_next(make, pipeline, tmp_path):
    def feed():
        sinks = AlertSinks(str(tmp_path / "alerts"))
        return Feed(make(), AlertBook(), sinks, Journal(tmp_path / "state"), io.StringIO())

    def alerts():
        file = tmp_path / "alerts"
        return [json.loads(line)["alert_id"] for line in file.read_text().splitlines()] if file.exists() else []

    first = feed()
    first.accept(EXAMPLE)
    killed(first)
    second = feed()
    results = [json.loads(line) for line in second.results.getvalue().splitlines()]
    assert last_scores(results) == batch_scores(pipeline, EXAMPLE) and alerts()
    told = alerts()
    killed(second)
    third = feed()
    assert third.results.getvalue() == "" and alerts() == told  # once is enough
    third.sinks.send = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)  # killed before the alert is sent
    worse = [{**row, "visit_id": "new"} for row in EXAMPLE if row["visit_id"] == 10010] or EXAMPLE
    third.accept([{**row, "client": "other"} for row in worse])
    with pytest.raises(KeyboardInterrupt):
        third.score()
    killed(third)
    killed(feed())
    again = alerts()
    killed(feed())
    assert alerts() == again and len(set(again)) == len(again) > len(told)


def test_a_kill_after_an_alert_was_kept_sends_that_one(make, tmp_path):
    def feed(*sinks):
        return Feed(make(), AlertBook(), AlertSinks(*sinks), Journal(tmp_path / "state"), io.StringIO())

    first = feed()
    first.accept(EXAMPLE)
    first.results.close()  # cannot be written to: the process ends
    with pytest.raises(ValueError, match="closed file"):
        first.score()
    first.finish()
    with contextlib.closing(sqlite3.connect(tmp_path / "state")) as db:
        kept = [json.loads(content) for (content,) in db.execute("SELECT content FROM entries WHERE kind = 'alert'")]
    second = feed(str(tmp_path / "alerts"))
    assert len(second.results.getvalue().splitlines()) == 8
    second.finish()
    sent = [json.loads(line) for line in (tmp_path / "alerts").read_text().splitlines()]
    assert sent == kept != []


def test_restored_scores_are_not_recorded_again(make, tmp_path, monkeypatch):
    recorded = []
    for _ in range(3):
        processor = make()
        log = processor.deployed.current.log
        monkeypatch.setattr(log, "record", lambda observations, *_: recorded.extend(observations.keys()))
        feed = Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
        feed.accept(EXAMPLE if not recorded else [])
        feed.finish()
    assert len(recorded) == 8


def test_two_streams_do_not_share_a_state_file(models_dir, make, tmp_path):
    state = tmp_path / "state"
    feed = Feed(make(), AlertBook(), AlertSinks(), Journal(state), io.StringIO())
    feed.accept(EXAMPLE[:5])
    before = state.read_bytes()
    done = run_lines(models_dir, lines_of(EXAMPLE), "--state", str(state))
    assert done.returncode == 2 and "--state" in done.stderr and len(done.stderr.splitlines()) == 1
    assert state.read_bytes() == before
    feed.finish()


@pytest.mark.parametrize("content", [lines_of(EXAMPLE), "7\n", '["foo", 1]\n', "a\x00b", '["alert", {"client": 1}]\n'])
def test_a_file_that_is_no_state_is_left_as_it_is(make, tmp_path, content):
    state = tmp_path / "state"
    state.write_text(content)
    with pytest.raises(BadConfig, match="not a state file"):
        Feed(make(), AlertBook(), AlertSinks(), Journal(state), io.StringIO())
    assert state.read_text() == content


@contextlib.contextmanager
def full_disk(state):
    """No file of this process may grow beyond the size that the state file's log has."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{state}-wal").stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_that_was_acknowledged(make, pipeline, tmp_path):
    feed = Feed(make(), AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    feed.accept(EXAMPLE[:1])
    with full_disk(tmp_path / "state"):
        with pytest.raises(OSError, match="cannot be kept"):
            feed.accept(EXAMPLE[1:2])
        feed.score()  # goes on
        assert feed.results.getvalue() and feed.not_kept
    feed.accept(EXAMPLE[2:3])
    killed(feed)
    assert scores_of(make, tmp_path / "state") == batch_scores(pipeline, [EXAMPLE[0], EXAMPLE[2]])


def test_a_line_without_end_is_counted_and_the_others_go_on(make, pipeline):
    reading, writing = os.pipe()
    feed = Feed(make(), AlertBook(), AlertSinks(), None, io.StringIO())

    def write():
        with os.fdopen(writing, "wb") as file:
            file.write(b"x" * 20_000_000 + b"\n" + lines_of(EXAMPLE).encode() + b'"' + b"y" * 3_000_000)

    thread = threading.Thread(target=write)
    thread.start()
    read_lines(feed, reading, lambda: False)
    thread.join()
    os.close(reading)
    feed.finish()
    results = [json.loads(line) for line in feed.results.getvalue().splitlines()]
    assert last_scores(results) == batch_scores(pipeline, EXAMPLE) and feed.unreadable == 2


# ------------------------------------------------------------------------------------------------ HL7 over MLLP


def message_of(rows, control="1"):
    head = rows[0]
    segments = [
        f"MSH|^~\\&|LAB|HOSP|RISK|HOSP|20240102||ORU^R01^ORU_R01|{control}|P|2.5",
        f"PID|1||{head['client']}^^^HOSP^MR||Doe^Jane",
        f"PV1|1|I|ICU^1^2||||||||||||||||{head['visit_id']}",
    ]
    for n, row in enumerate(rows, 1):
        time = row["observation_date"].replace("-", "").replace(":", "").replace("T", "")
        low, high = row.get("reference_range_min"), row.get("reference_range_max")
        bounds = f"{low}-{high}" if low is not None and high is not None else f"<{high}" if high is not None else ""
        segments.append(f"OBR|{n}|||PANEL|||{time}")
        segments.append(f"OBX|{n}|NM|{row['observation_type_code']}||{row['observation_value']}||{bounds}||||F")
    return "\r".join(segments) + "\r"


class MllpServer:
    """`stream.mllp.serve` in a thread, on a free port."""

    def __init__(self, feed):
        self.ready, self.port = threading.Event(), 0
        self.thread = threading.Thread(target=lambda: asyncio.run(self._work(feed)))
        self.thread.start()
        assert self.ready.wait(60)

    async def _work(self, feed):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        await mllp.serve(feed, "127.0.0.1", 0, self.stop, self._started)

    def _started(self, port):
        self.port = port
        self.ready.set()

    def send(self, message):
        with MLLPClient("127.0.0.1", self.port) as client:
            return hl7.parse(client.send_message(message).strip(b"\x0b\x1c\r").decode())

    def end(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def mllp_feed(make, tmp_path):
    feed = Feed(make(), AlertBook(), AlertSinks(), Journal(tmp_path / "state.db"), io.StringIO())
    server = MllpServer(feed)
    yield server, feed
    server.end()
    feed.journal.close()


def by_visit(rows):
    grouped = {}
    for row in rows:
        if row["observation_value"] is not None:
            grouped.setdefault(row["visit_id"], []).append(row)
    return grouped.values()


def as_sent(row):
    """What the message says of a row: a range with one bound below only is not sent."""
    one_sided = row.get("reference_range_max") is None
    return {**row, "reference_range_min": None if one_sided else row.get("reference_range_min")}


def test_hl7_messages_give_the_batch_scores(mllp_feed, pipeline):
    server, feed = mllp_feed
    sent = [[as_sent(row) for row in rows] for rows in by_visit(EXAMPLE)]
    for n, rows in enumerate(sent):
        answer = server.send(message_of(rows, f"c{n}"))
        assert str(answer.segment("MSA")(1)) == "AA" and str(answer.segment("MSA")(2)) == f"c{n}"
    server.end()
    feed.finish()
    results = [json.loads(line) for line in feed.results.getvalue().splitlines()]
    assert last_scores(results) == batch_scores(pipeline, [row for rows in sent for row in rows])


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (("ORU^R01^ORU_R01", "ADT^A01"), "AR", "not one of ORU, ORU"),
        (("demo-", "^^^^"), "AE", "PID-3"),
        (("ICU^1^2||||||||||||||||", "ICU^1^2||||||||||||||||^"), "AE", "PV1-19"),
        # nothing in them would be different if they were sent again
        (("|NM|", "|TX|"), "AA", "OBX-2"),
        (("||||F", "||||X"), "AA", "OBX-11"),
        (("|HR||", "|HR||abc"), "AA", "OBX-5"),
    ],
)
def test_hl7_messages_that_cannot_be_used_are_answered_with_the_reason(mllp_feed, change, code, reason):
    row = next(row for row in EXAMPLE if row["observation_type_code"] == "HR")
    answer = mllp_feed[0].send(message_of([row]).replace(*change))
    assert str(answer.segment("MSA")(1)) == code and reason in str(answer.segment("MSA")(3))
    assert str(answer.segment("MSA")(2)) == "1" and mllp_feed[1].accepted == 0


def test_each_patient_of_a_message_gets_his_own(pipeline):
    obx = "OBX|1|NM|HR||{}|/min|||||F|||20240301083000"
    segments = ["MSH|^~\\&|L|H|R|H|20240301||ORU^R01|1|P|2.5", "PID|1||A", f"PV1|1|I{'|' * 17}a", obx.format(90)]
    segments += ["PID|2||B", f"PV1|1|I{'|' * 17}b", obx.format(150), "PID|3||C", obx.format(160)]
    records, left_out = mllp.observations_of(hl7.parse("\r".join(segments) + "\r"), pipeline)
    assert [(r["client"], r["visit_id"], r["observation_value"]) for r in records] == [("A", "a", 90), ("B", "b", 150)]
    assert left_out == ["OBX 3: PV1-19 names no visit"]  # not that of the patient before


@pytest.mark.parametrize(
    ("change", "value", "date"),
    [
        ({}, 90.0, "2024-03-01T08:30:00"),
        ({"now": "20240301090000+0100"}, 90.0, "2024-03-01T08:30:00+01:00"),  # the zone of the message
        ({"now": "20240301090000+0100", "time": "202403010830-0500"}, 90.0, "2024-03-01T08:30:00-05:00"),
        ({"time": "2024030108"}, 90.0, "2024-03-01T08:00:00"),
        ({"time": "20240301"}, None, None),
        ({"unit": r"{beats}\F\min"}, None, None),
        ({"code": "WBC", "unit": r"10\S\3/uL"}, 90.0, "2024-03-01T08:30:00"),
        ({"value": "1_00"}, None, None),
        ({"value": "nan"}, None, None),
        ({"value": "90~95"}, None, None),
        ({"kind": "SN", "value": "^10^-^20"}, None, None),
        ({"kind": "SN", "value": ">^60"}, 60.0, "2024-03-01T08:30:00"),
        ({"status": "x"}, None, None),
        ({"status": "C"}, 90.0, "2024-03-01T08:30:00"),
    ],
)
def test_details_of_the_standard(pipeline, change, value, date):
    said = {"now": "20240301", "time": "202403010830", "code": "HR", "kind": "NM", "value": "90", "unit": ""}
    said |= {"status": "F"} | change
    segments = [
        f"MSH|^~\\&|L|H|R|H|{said['now']}||ORU^R01|1|P|2.5",
        r"PID|1||A\T\B&x",
        f"PV1|1|I{'|' * 17}v",
        f"OBX|1|{said['kind']}|{said['code']}||{said['value']}|{said['unit']}|||||{said['status']}|||{said['time']}",
    ]
    records, left_out = mllp.observations_of(hl7.parse("\r".join(segments) + "\r"), pipeline)
    told = [(r["observation_value"], r["observation_date"], r["client"]) for r in records]
    assert told == ([] if value is None else [(value, date, "A&B")]) and len(left_out) == (value is None)


def hl7_text(**change):
    """A message with one heart rate, and changes to it."""
    said = {"kind": "ORU^R01", "pid": "PID|1||A", "pv1": f"PV1|1|I{'|' * 17}v", "now": "20240301"}
    said |= {"obx": "NM|HR||90|/min", "time": "202403010830"} | change
    obx = f"OBX|1|{said['obx']}{'|' * (9 - said['obx'].count('|'))}F|||{said['time']}"
    segments = [f"MSH|^~\\&|L|H|R|H|{said['now']}||{said['kind']}|7|P|2.5", said["pid"], said["pv1"], obx]
    return "\r".join(segment for segment in segments if segment) + "\r"


ACCOUNT = {"visit": ["PV1-19", "PID-18"]}
FORMS = {  # changes, mapping -> (client, visit, code, value in the model's unit, time), or why it was not taken
    "version 2.1 names no event": ({"kind": "ORU"}, {}, ("A", "v", "HR", 90.0, "08:30")),
    "point of care": ({"kind": "ORU^R30^ORU_R30"}, {}, ("A", "v", "HR", 90.0, "08:30")),
    "point of care, without an order": ({"kind": "ORU^R31"}, {}, ("A", "v", "HR", 90.0, "08:30")),
    "point of care, without a visit": ({"kind": "ORU^R32"}, {}, ("A", "v", "HR", 90.0, "08:30")),
    "alarms": ({"kind": "ORU^R40"}, {}, ("A", "v", "HR", 90.0, "08:30")),
    "an event that is not taken": ({}, {"events": ["R30"]}, "AR"),
    "another type": ({"kind": "ADT^A01"}, {}, "AR"),
    "no visit": ({"pv1": ""}, {}, "AE"),
    "account number": ({"pv1": "", "pid": f"PID|1||A{'|' * 15}acc"}, {"visit": ["PV1-19", "PID-18"]}, ("A", "acc")),
    "the first place that is filled": ({"pid": f"PID|1||A{'|' * 15}acc"}, {"visit": ["PV1-19", "PID-18"]}, ("A", "v")),
    "alternate visit": ({"pv1": f"PV1|1|I{'|' * 48}alt"}, {"visit": ["PV1-50"]}, ("A", "alt")),
    "identifiers by type": (
        {"pid": "PID|1||9^^^H^PI~A^^^H^MR~V5^^^H^VN", "pv1": ""},
        {"client": ["PID-3:MR"], "visit": ["PID-3:VN"]},
        ("A", "V5"),
    ),
    "a type that is not there": ({"pid": "PID|1||9^^^H^PI"}, {"client": ["PID-3:MR"]}, "AE"),
    "the zone of the site, in winter": ({}, {"zone": "Europe/Berlin"}, ("A", "v", "HR", 90.0, "07:30")),
    "and in summer": ({"time": "202407010830"}, {"zone": "Europe/Berlin"}, ("A", "v", "HR", 90.0, "06:30")),
    "an offset": ({}, {"zone": "-0500"}, ("A", "v", "HR", 90.0, "13:30")),
    "a zone of its own": ({"time": "202403010830+0300"}, {"zone": "-0500"}, ("A", "v", "HR", 90.0, "05:30")),
    "the zone of the message": ({"now": "20240301+0200"}, {"zone": "-0500"}, ("A", "v", "HR", 90.0, "06:30")),
    "no such date": ({"time": "202413010830"}, {"zone": "-0500"}, "left out"),
    "SN with a plain number": ({"obx": "SN|HR||90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "SN with a comparator": ({"obx": "SN|HR||>^90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "SN as a ratio": ({"obx": "SN|HR||^1^:^8"}, {}, "left out"),
    "cells": ({"obx": "NM|WBC||8.5|K/mm3"}, {}, ("A", "v", "WBC", 8.5)),
    "thousands": ({"obx": "NM|WBC||8.5|Thousand/mm3"}, {}, ("A", "v", "WBC", 8.5)),
    "giga": ({"obx": "NM|WBC||8.5|G/l"}, {}, ("A", "v", "WBC", 8.5)),
    "per microlitre": ({"obx": "NM|WBC||8500|/uL"}, {}, ("A", "v", "WBC", 8.5)),
    "by name": ({"obx": "NM|WBC||8.5|x1000/uL"}, {}, ("A", "v", "WBC", 8.5)),
    "in German": ({"obx": "NM|Platelets||250|Tsd/µl"}, {}, ("A", "v", "Platelets", 250.0)),
    "Fahrenheit": ({"obx": "NM|8310-5||100.4|[degF]"}, {}, ("A", "v", "Temp", 38.0)),
    "two pressures in one": ({"obx": "ST|85354-9||120/80|mm[Hg]"}, {}, ("A", "v", "DBP", 80.0)),  # and SBP
    "a ratio": ({"obx": "ST|HR||120/80"}, {}, "left out"),
    "version 2.1, visit in the account": (
        {"kind": "ORU", "pv1": "", "pid": f"PID|1||A{'|' * 15}acc"},
        ACCOUNT,
        ("A", "acc"),
    ),
    "point of care, visit in the account": (
        {"kind": "ORU^R32", "pv1": "", "pid": f"PID|1||A{'|' * 15}acc"},
        ACCOUNT,
        ("A", "acc", "HR", 90.0, "08:30"),
    ),
    "an account with its assigner": ({"pv1": "", "pid": f"PID|1||A{'|' * 15}acc^^^H^AN"}, ACCOUNT, ("A", "acc")),
    "an empty account": ({"pv1": "", "pid": f"PID|1||A{'|' * 15}^^^H"}, ACCOUNT, "AE"),
    "alternate visit after an empty one": (
        {"pv1": f"PV1|1|I{'|' * 17}^^^H{'|' * 31}alt"},
        {"visit": ["PV1-19", "PV1-50"]},
        ("A", "alt"),
    ),
    "alternate visit by its type": (
        {"pv1": f"PV1|1|I{'|' * 48}x^^^H^PI~alt^^^H^VN"},
        {"visit": ["PV1-50:VN"]},
        ("A", "alt"),
    ),
    "null in quotes is empty": ({"pv1": f'PV1|1|I{"|" * 17}""'}, {}, "AE"),
    "structure of messages named": ({"kind": "ORU^R01^ORU_R01"}, {}, ("A", "v", "HR", 90.0)),
    "lower case": ({"kind": "oru^r01"}, {}, ("A", "v", "HR", 90.0)),
    "an event of others": ({"kind": "ORU^W01"}, {}, "AR"),
    "orders": ({"kind": "ORM^O01"}, {}, "AR"),
    "documents": ({"kind": "MDM^T02"}, {}, "AR"),
    "a query's answer": ({"kind": "ORF^R04"}, {}, "AR"),
    "seconds and fractions": ({"time": "20240301083059.1234"}, {}, ("A", "v", "HR", 90.0, "08:30")),
    "an hour alone": ({"time": "2024030108"}, {}, ("A", "v", "HR", 90.0, "08:00")),
    "a date alone": ({"time": "20240301"}, {}, "left out"),
    "no time at all": ({"time": ""}, {}, "left out"),
    "an hour that does not exist, in spring": (
        {"time": "202403310230"},
        {"zone": "Europe/Berlin"},
        ("A", "v", "HR", 90.0),
    ),
    "the day before, by the zone": ({"time": "202403010030"}, {"zone": "+0200"}, ("A", "v", "HR", 90.0, "22:30")),
    "SN with equals": ({"obx": "SN|HR||=^90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "SN without a comparator": ({"obx": "SN|HR||^90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "SN at most": ({"obx": "SN|HR||<=^90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "SN as a range": ({"obx": "SN|HR||^80^-^90"}, {}, "left out"),
    "SN with a plus": ({"obx": "SN|HR||^2^+"}, {}, "left out"),
    "NM above the limit of the method": ({"obx": "NM|HR||>90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "ST with a number": ({"obx": "ST|HR||90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "ST with words": ({"obx": "ST|HR||see below"}, {}, "left out"),
    "text": ({"obx": "TX|HR||90"}, {}, "left out"),
    "formatted text": ({"obx": "FT|HR||90"}, {}, "left out"),
    "a coded result": ({"obx": "CE|HR||P^positive"}, {}, "left out"),
    "a document beside": ({"obx": "ED|HR||^application^pdf^Base64^JVBERi0="}, {}, "left out"),
    "no type": ({"obx": "|HR||90|/min"}, {}, ("A", "v", "HR", 90.0)),
    "no code": ({"obx": "NM|||90|/min"}, {}, "left out"),
    "no value": ({"obx": "NM|HR|||/min"}, {}, "left out"),
    "several values": ({"obx": "NM|HR||90~95|/min"}, {}, "left out"),
    "a decimal comma": ({"obx": "NM|HR||90,5|/min"}, {}, "left out"),
    "the code of the system beside": (
        {"obx": "NM|xyz^Pulse^L^8867-4^Heart rate^LN||90|/min"},
        {},
        ("A", "v", "HR", 90.0),
    ),
    "cells, escaped": ({"obx": r"NM|WBC||8.5|10\S\3/uL"}, {}, ("A", "v", "WBC", 8.5)),
    "cells, in UCUM": ({"obx": "NM|WBC||8.5|10*3/uL"}, {}, ("A", "v", "WBC", 8.5)),
    "cells, to the ninth": ({"obx": "NM|WBC||8.5|10*9/L"}, {}, ("A", "v", "WBC", 8.5)),
    "cells by the thousand": ({"obx": "NM|Platelets||250|K/uL"}, {}, ("A", "v", "Platelets", 250.0)),
    "cells, one by one": ({"obx": "NM|Platelets||250000|/mm3"}, {}, ("A", "v", "Platelets", 250.0)),
    "a unit of something else": ({"obx": "NM|HR||90|mmol/L"}, {}, "left out"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_messages(pipeline, tmp_path, form):
    change, mapping, expected = FORMS[form]
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    mapping = read_hl7_mapping(tmp_path / "mapping.json")
    try:
        records, left_out = mllp.observations_of(hl7.parse(hl7_text(**change)), pipeline, mapping)
    except mllp.Rejected as refused:
        assert refused.code == expected
        return
    if expected == "left out":
        assert not records and len(left_out) == 1
        return
    read = pipeline.reproducer.read(records)
    time = iso_times(read.time)[0][11:16]
    found = (read.client[0], read.visit_id[0], read.codes[read.group_code[0]], read.value[0], time)
    assert found[: len(expected)] == expected and not left_out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "expected an object"),
        ('{"visits": ["PV1-19"]}', "expected an object"),
        ('{"visit": "PV1-19"}', "must be lists"),
        ('{"visit": ["OBX-3"]}', "is no place such as PV1-19"),
        ('{"zone": "Europe/Nowhere"}', "Nowhere"),
    ],
)
def test_a_mapping_that_cannot_be_read_is_one_line(tmp_path, content, told):
    (tmp_path / "mapping.json").write_text(content)
    with pytest.raises(BadConfig, match=told) as error:
        read_hl7_mapping(tmp_path / "mapping.json")
    assert "\n" not in str(error.value)


def test_a_batch_is_answered_message_by_message(mllp_feed):
    server, feed = mllp_feed
    batch = (
        "FHS|^~\\&|L\rBHS|^~\\&|L\r"
        + hl7_text()
        + hl7_text(kind="ADT^A01")
        + hl7_text(pid="PID|1||B")
        + "BTS|3\rFTS|1\r"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as s:
        s.sendall(b"\x0b" + batch.encode() + b"\x1c\r")
        answer = b""
        while not answer.endswith(b"\x1c\r"):
            answer += s.recv(65536)
    segments = answer.decode().strip("\x0b\x1c\r").split("\r")
    assert segments[0].startswith("BHS|") and segments[-1] == "BTS|3"
    assert [s.split("|")[1] for s in segments if s.startswith("MSA")] == ["AA", "AR", "AA"] and feed.accepted == 2


def test_a_message_without_a_usable_result_is_acknowledged_with_its_reasons(mllp_feed):
    answer = mllp_feed[0].send(hl7_text(obx="TX|HR||see the report"))
    assert str(answer.segment("MSA")(1)) == "AA" and "OBX 1: its type (OBX-2) is no number" in str(answer)


def answers(port, *sent):
    """What comes back over one connection for bytes that are sent as they are."""
    found = []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        for data in sent:
            s.sendall(data)
            answer = b""
            while not answer.endswith(b"\x1c\r"):
                answer += s.recv(65536) or pytest.fail("the connection was dropped")
            segment = answer.strip(b"\x0b\x1c\r").split(b"\r")[-1]
            found.append(segment.decode().split("|")[1:3])
    return found


def test_hl7_in_every_charset_and_of_any_ordinary_size(mllp_feed):
    server, feed = mllp_feed
    rows = next(iter(by_visit(EXAMPLE)))[:3]
    text = message_of(rows).replace("Doe^Jane", "Müller^Jörg")
    latin = text.replace("|P|2.5", "|P|2.5||||||8859/1").encode("latin-1")
    report = f"OBX|99|ED|PDF||^application^pdf^Base64^{'A' * 1_000_000}||||||F\r"
    sent = [latin, text.encode(), text.encode("latin-1"), (text + report).encode(), text.replace("\r", "\r\n").encode()]
    assert answers(server.port, *(b"\x0b" + data + b"\x1c\r" for data in sent)) == [["AA", "1"]] * 5
    assert feed.accepted == 5 * len(rows)


def test_hl7_frames_that_are_too_large_or_not_begun_are_refused_by_number(mllp_feed):
    server, _ = mllp_feed
    good = message_of(next(iter(by_visit(EXAMPLE)))[:3])
    large = b"\x0b" + good.encode() + b"x" * (17 << 20) + b"\x1c\r"
    begun_twice = b"\x0b" + good[:100].encode() + b"\x0b" + good.encode() + b"\x1c\r"
    headless = b"\x0bMSH|^~\\&|||||||||P\x1c\r"
    sent = (large, good.encode() + b"\x1c\r", begun_twice, headless, b"\x0b" + good.encode() + b"\x1c\r")
    assert answers(server.port, *sent) == [["AR", "1"], ["AR", "1"], ["AA", "1"], ["AR", ""], ["AA", "1"]]


def test_hl7_that_cannot_be_kept_is_asked_for_again(mllp_feed):
    server, feed = mllp_feed
    message = message_of(next(iter(by_visit(EXAMPLE))))
    with full_disk(feed.journal.path):
        assert str(server.send(message).segment("MSA")(1)) == "AE"
    assert feed.accepted == 0
    assert str(server.send(message).segment("MSA")(1)) == "AA"


def test_a_stop_does_not_wait_for_senders_who_stay(mllp_feed):
    server, _ = mllp_feed
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(b"\x0b" + message_of(EXAMPLE[:3]).encode() + b"\x1c\r")
        assert b"MSA|AA" in s.recv(4096)
        server.end()
        assert s.recv(4096) == b""


def test_a_slow_webhook_keeps_nobody_waiting(make, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and never answers
        sinks = AlertSinks(webhook=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        feed = Feed(make(), AlertBook(), sinks, Journal(tmp_path / "state"), io.StringIO())
        feed.accept([row for row in EXAMPLE if row["observation_value"] is not None])
        feed.score()  # would not come back
        assert feed.alerted
        sinks.close(patience=0.01)
        assert sinks.failed == feed.alerted
        feed.finish()
    again = AlertSinks(str(tmp_path / "alerts"))
    Feed(make(), AlertBook(), again, Journal(tmp_path / "state"), io.StringIO()).finish()
    assert len((tmp_path / "alerts").read_text().splitlines()) == feed.alerted  # by the next process


def test_hl7_frames_that_are_none_do_not_stop_the_others(mllp_feed):
    server, feed = mllp_feed
    rows = next(iter(by_visit(EXAMPLE)))
    with socket.create_connection(("127.0.0.1", server.port)) as s:  # half a frame, then gone
        s.sendall(b"\x0b" + message_of(rows).encode()[:100])
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(b"\x0bthis is no HL7\x1c\r")
        assert b"MSA|AR" in s.recv(4096)
    assert str(server.send(message_of(rows)).segment("MSA")(1)) == "AA"
    assert feed.accepted == len(rows)


def test_a_hundred_senders_at_once(mllp_feed, pipeline):
    server, feed = mllp_feed
    rows = next(iter(by_visit(EXAMPLE)))
    sent = [[as_sent({**row, "visit_id": 1000 + n}) for row in rows[: 5 + n % 9]] for n in range(100)]
    answers = [None] * 100

    def send(n):
        answers[n] = str(server.send(message_of(sent[n], str(n))).segment("MSA")(1))

    threads = [threading.Thread(target=send, args=(n,)) for n in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == ["AA"] * 100
    server.end()
    feed.finish()
    results = [json.loads(line) for line in feed.results.getvalue().splitlines()]
    assert last_scores(results) == batch_scores(pipeline, [row for rows in sent for row in rows])


def test_units_ranges_and_structured_numbers(pipeline):
    text = "\r".join(
        [
            r"MSH|^~\&|L|H|R|H|20240102||ORU^R01|1|P|2.5",
            "PID|1||p1",
            "PV1|1|I|||||||||||||||||v1",
            "OBR|1|||P|||20240301080000+0100",
            "OBX|1|NM|8867-4^Heart rate^LN||90|/min^^UCUM|60-100||||F|||20240301083015",
            "OBX|2|SN|2524-7^Lactate^LN||<^0.5|mmol/L|<2.2||||F",
            "OBX|3|NM|8310-5||101.3|[degF]|>90||||F",
            "OBX|4|NM|2345-7||5|furlong|||||F",
            "OBX|5|NM|XX^own^L^8480-6^Systolic^LN||120|mm[Hg]|||||F",
        ]
    )
    records, left_out = mllp.observations_of(hl7.parse(text + "\r"), pipeline)
    read = pipeline.reproducer.read(records)
    told = {read.codes[code]: row for code, row in zip(read.group_code, read.group_start[:-1], strict=True)}
    value = {code: (read.value[row], iso_times(read.time[[row]])[0]) for code, row in told.items()}
    assert value == {
        "HR": (90.0, "2024-03-01T08:30:15Z"),
        pipeline.own_code("2524-7"): (0.5, "2024-03-01T07:00:00Z"),
        pipeline.own_code("8310-5"): (38.5, "2024-03-01T07:00:00Z"),
        "SBP": (120.0, "2024-03-01T07:00:00Z"),
    }
    assert (read.low[told["HR"]], read.high[told["HR"]]) == (60.0, 100.0)
    assert read.high[told[pipeline.own_code("2524-7")]] == 2.2
    assert read.low[told[pipeline.own_code("8310-5")]] == 32.2222
    assert len(left_out) == 1 and "OBX 4" in left_out[0] and "unit" in left_out[0]


# ----------------------------------------------------------------------------------------------------- options


def test_a_bad_address_and_a_missing_model_are_told(capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        main(["--mllp", "nowhere"])
    assert stopped.value.code == 2
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2 and "does not exist" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_options_without_effect_are_refused(capsys):
    assert main(["--kafka", "localhost:9092", "--alerts", "x", "--webhook", "http://localhost"]) == 2
    assert "--kafka goes without --alerts, --webhook" in capsys.readouterr().err
