"""The stream: the same scores as the batch whatever the arrivals, bounds, alerts, lines, restarts, HL7 over MLLP."""

import asyncio
import io
import json
import os
import random
import shutil
import signal
import socket
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

from artifacts import write_atomic
from feature_pipeline import BadConfig, FeaturePlan, resolve_snapshots
from stream import mllp
from stream.alerts import AlertBook, AlertSinks
from stream.feed import Feed
from stream.journal import Journal
from stream.processor import _fold_hours
from stream_processor import StreamProcessor, main
from tests.strategies import cohorts

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def make(config_path, model_path):
    def make(min_observations=1, **changes):
        return StreamProcessor(config_path, model_path, min_observations, **changes)

    return make


def batch_scores(pipeline, records):
    """(client, visit) -> score of the batch."""
    observations = pipeline.reproducer.read(records)
    visit, moments, _ = resolve_snapshots(observations)
    return dict(zip(observations.keys(), pipeline.score(observations, visit, moments).tolist(), strict=True))


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
        assert result["num_observations"] == len(pipeline.reproducer.read(records[:n]).time)


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
    processor = make(idle_hours=1, clock=lambda: now[0])
    processor.add_observation(EXAMPLE[0])
    processor.settle()
    now[0] += 1800
    processor.add_observation({**EXAMPLE[0], "visit_id": 2})
    processor.settle()
    assert processor.close_idle() == []
    now[0] += 1801
    assert [r["visit_id"] for r in processor.close_idle()] == [EXAMPLE[0]["visit_id"]]
    assert [key[1] for key in processor.visits] == ["2"]


def test_too_many_visits_drop_the_longest_silent_with_its_score(make):
    processor = make(max_visits=2)
    for visit in (1, 2, 1, 3):
        processor.add_observation({**EXAMPLE[0], "visit_id": visit})
        processor.settle()
    assert {key[1] for key in processor.visits} == {"1", "3"} and processor.dropped == 1
    assert {r["visit_id"] for r in processor.predict_due()} == {1, 2, 3}


def test_a_visit_beyond_the_limit_is_reported_and_never_scored_in_part(make):
    processor = make(max_observations=10)
    assert _fold_hours(processor.pipeline) is None  # this model looks at whole visits
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
    reproducer = processor.pipeline.reproducer
    plan = FeaturePlan(names)
    whole = reproducer.read(records)
    visit, moments, _ = resolve_snapshots(whole)
    before, reproducer.plan = reproducer.plan, plan
    try:
        assert _fold_hours(processor.pipeline) == 24
    finally:
        reproducer.plan = before
    processor._fold_hours = 24.0
    for record in records:
        processor.add_observation(record)
        processor.settle()
        [kept] = processor.visits.values()
        kept.rows = [processor._folded(processor._distinct(kept))]
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

    return StreamProcessor(folder / "best_model_config.json", folder / "best_model.pkl", 1), deploy


def test_another_model_is_taken_up_between_scores(deployed, monkeypatch):
    processor, deploy = deployed
    monkeypatch.setattr("stream.processor.LOOK_SECONDS", -1)
    old, versions = processor.pipeline.model_version, []
    for n in range(3):
        processor.add_observation({**EXAMPLE[0], "observation_value": n + 1})
        versions += [result["model_version"] for result in processor.predict_due()]
        deploy(**({"model_version": "another"} if n == 0 else {"feature_names": []}))
    assert versions == [old, "another", "another"]  # what cannot be loaded changes nothing


def test_a_model_with_other_meanings_of_codes_waits_for_a_restart(deployed, tmp_path):
    processor, deploy = deployed
    old = processor.pipeline.model_version
    deploy(model_version="another", synonyms={**processor.pipeline.config["synonyms"], "XHR": "heart_rate"})
    processor.add_observations(EXAMPLE)
    for _ in range(2):
        processor.renew()
    assert {result["model_version"] for result in processor.predict_due()} == {old}
    feed = Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    feed.finish()
    files = processor.pipeline._files
    with pytest.raises(BadConfig, match="other meanings"):
        Feed(StreamProcessor(*files, 1), AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())


def test_a_folded_visit_is_not_scored_by_a_model_that_looks_further_back(deployed, tmp_path):
    processor, deploy = deployed
    processor._fold_hours, processor.max_observations = 24.0, 10
    row = {**EXAMPLE[0], "observation_date": "2024-01-09T00:00:00"}
    processor.add_observations([{**row, "observation_date": f"2024-01-0{d}T00:00:00"} for d in range(1, 9)] * 2)
    processor.add_observations([{**row, "observation_value": v} for v in range(5)])
    processor.settle()
    [visit] = processor.visits.values()
    assert visit.folded == 24 and not visit.full
    feed = Feed(processor, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    feed.finish()
    restarted = StreamProcessor(*processor.pipeline._files, 1)
    Feed(restarted, AlertBook(), AlertSinks(), Journal(tmp_path / "state"), io.StringIO())
    deploy(model_version="another")
    processor.renew()
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


def test_dates_of_the_far_future_are_set_aside(make):
    processor = make(clock=lambda: 1_704_067_200.0, future_hours=24)  # 1 January 2024
    dates = ("2024-01-01T23:00:00", "2024-01-02T01:00:00", "2094-01-01T00:00:00")
    processor.add_observations([{**EXAMPLE[2], "observation_date": date} for date in dates])
    assert processor.predict_due()[0]["num_observations"] == 1 and processor.set_aside == {"future": 2}


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
    assert given("low", 0) == []
    assert given("medium", 1, "low") == ["medium"]
    assert given("medium", 2, "medium") == []  # no rise
    assert given("low", 3, "medium") == []
    assert given("medium", 4, "low") == []  # cool-down
    assert given("high", 5, "medium") == ["high"]  # worse than what was told
    assert given("low", 6, "high") == given("medium", 7, "low") == []
    assert given("medium", 12, "low") == ["medium"]
    assert book.rises([result("high", 13, "low", visit=2)])[0]["previous_level"] == "low"


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
        alerts = AlertBook().rises([result("high", 1)])
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
    return subprocess.run([*command, *options], input=text, capture_output=True, text=True, timeout=120)


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_lines_from_stdin(models_dir, pipeline, tmp_path):
    bad = ["this is no JSON", "[" * 100_000, "7", lines_of([{**EXAMPLE[0], "visit_id": None}]).strip()]
    done = run_lines(models_dir, lines_of(EXAMPLE) + "\n".join(bad), "--alerts", str(tmp_path / "alerts.jsonl"))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert last_scores(results) == batch_scores(pipeline, EXAMPLE)
    assert done.returncode == 1 and "4 set aside" in done.stderr and "Traceback" not in done.stderr
    raised = {(r["client"], r["visit_id"]) for r in results if r["risk_level"] != "low"}
    alerts = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert {(a["client"], a["visit_id"]) for a in alerts} == raised and raised
    for row in EXAMPLE:
        assert row["client"] not in done.stderr


def test_a_restart_goes_on_where_it_ended_and_alerts_nobody_twice(models_dir, pipeline, tmp_path):
    options = ["--state", str(tmp_path / "state.jsonl"), "--alerts", str(tmp_path / "alerts.jsonl")]
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
    assert (tmp_path / "state.jsonl").stat().st_mode & 0o077 in (0, 0o040)


def fed(models_dir, state):
    """A stream with the example's lines in its stdin, which stays open."""
    command = [sys.executable, str(ROOT / "stream_processor.py"), "--monitor", "off", "--min-observations", "1"]
    command += ["--config", str(models_dir / "best_model_config.json"), "--model", str(models_dir / "best_model.pkl")]
    process = subprocess.Popen([*command, "--state", str(state)], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)
    process.stdin.write(lines_of(EXAMPLE).encode())
    process.stdin.flush()
    return process


def test_a_killed_process_has_kept_what_it_took(models_dir, pipeline, tmp_path):
    state = tmp_path / "state.jsonl"
    process = fed(models_dir, state)
    seen = set()
    while len(seen) < 8:  # every visit has been scored at least once
        seen.add(json.loads(process.stdout.readline())["visit_id"])
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    with state.open("a") as file:
        file.write('["observation", {"visit_id": 1, "cli')  # torn
    done = run_lines(models_dir, lines_of(EXAMPLE[-30:]), "--state", str(state))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    expected = batch_scores(pipeline, EXAMPLE)
    assert done.returncode == 0 and last_scores(results).items() <= expected.items()


def test_sigterm_finishes_what_was_accepted(models_dir, pipeline, tmp_path):
    state = tmp_path / "state.jsonl"
    process = fed(models_dir, state)
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    kept = [json.loads(line)[1] for line in state.read_text().splitlines() if line.startswith('["observation"')]
    results = [json.loads(line) for line in (first + rest).splitlines()]
    assert last_scores(results) == batch_scores(pipeline, kept)


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
    feed = Feed(make(), AlertBook(), AlertSinks(), Journal(tmp_path / "state.jsonl"), io.StringIO())
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
        (("ORU^R01^ORU_R01", "ADT^A01"), "AR", "not ORU"),
        (("demo-", "^^^^"), "AE", "PID-3"),
        (("ICU^1^2||||||||||||||||", "ICU^1^2||||||||||||||||^"), "AE", "PV1-19"),
        (("|NM|", "|TX|"), "AE", "OBX-2"),
        (("||||F", "||||X"), "AE", "OBX-11"),
        (("|HR||", "|HR||abc"), "AE", "OBX-5"),
    ],
)
def test_hl7_messages_that_cannot_be_used_are_refused_with_the_reason(mllp_feed, change, code, reason):
    row = next(row for row in EXAMPLE if row["observation_type_code"] == "HR")
    answer = mllp_feed[0].send(message_of([row]).replace(*change))
    assert str(answer.segment("MSA")(1)) == code and reason in str(answer.segment("MSA")(3))


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
    told = [(r["observation_type_code"], r["observation_value"], r["observation_date"]) for r in records]
    assert told == [
        ("HR", 90.0, "2024-03-01T08:30:15"),
        (pipeline.own_code("2524-7"), 0.5, "2024-03-01T08:00:00+01:00"),
        (pipeline.own_code("8310-5"), 38.5, "2024-03-01T08:00:00+01:00"),
        ("SBP", 120.0, "2024-03-01T08:00:00+01:00"),
    ]
    assert (records[0]["reference_range_min"], records[0]["reference_range_max"]) == (60.0, 100.0)
    assert records[1]["reference_range_max"] == 2.2 and records[2]["reference_range_min"] == 32.2222
    assert len(left_out) == 1 and "OBX 4" in left_out[0] and "unit" in left_out[0]


# ----------------------------------------------------------------------------------------------------- options


def test_a_bad_address_and_a_missing_model_are_told(capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        main(["--mllp", "nowhere"])
    assert stopped.value.code == 2
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2 and "does not exist" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
