"""The service inside this process: answers, errors, security, logs, FHIR, CDS Hooks, the OpenAPI document."""

import base64
import contextlib
import gc
import hmac
import json
import re
import shutil
import socket
import sqlite3
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jwt
import pytest
import schemathesis
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fhir.resources.R4B.capabilitystatement import CapabilityStatement
from fhir.resources.R4B.operationdefinition import OperationDefinition
from fhir.resources.R4B.riskassessment import RiskAssessment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import monitor
from common.artifacts import write_atomic
from common.command_line import log
from feature_pipeline import CONCEPTS, BadConfig, ProductionPipeline, Unit
from monitoring.log import PredictionLog
from serving.api import app as app_module
from serving.api import fetching, fhir, trust
from serving.api.app import create_app
from serving.api.limits import SharedCounts
from serving.api.security import Key, keep_keys, new_key, read_keys
from serving.api.service import LARGE_BYTES
from serving.api.settings import Settings
from serving.deployed import ServedModel
from tests.test_api_server import MINIMUM, model_with, until

pytestmark = pytest.mark.filterwarnings("ignore::feature_pipeline.MissingCodesWarning")
ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())
LOCAL = {"REMOTE_ADDR": "127.0.0.1"}
PREDICT, FHIR = "/predict?as_of=last", "/fhir/predict?as_of=last"  # the example patients are of 2024
LOINC, UCUM = "http://loinc.org", "http://unitsofmeasure.org"
AFAR = {"REMOTE_ADDR": "192.0.2.7"}


@pytest.fixture(scope="module")
def config_path(models_dir, tmp_path_factory):
    """A config without a minimum of evidence: most tests send a few rows only."""
    return model_with(models_dir, tmp_path_factory.mktemp("lenient") / "models", None)[0]


@pytest.fixture(scope="module")
def pipeline(config_path, model_path):
    return ProductionPipeline(config_path, model_path)


@pytest.fixture
def make_client(config_path, model_path, tmp_path):
    """A test client of a service with its logs in `tmp_path`."""

    def make(**changes):
        given = {
            "config": str(config_path),
            "model": str(model_path),
            "rate_limit": "100000/minute",
            "insecure": "api_keys" not in changes,
            "access_log": str(tmp_path / "access.jsonl"),
            "audit_log": str(tmp_path / "audit.jsonl"),
            "monitor_url": f"sqlite:///{tmp_path}/log.db",
        }
        return create_app(Settings(**given | changes)).test_client()

    return make


@pytest.fixture
def client(make_client):
    return make_client()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- scores


def test_every_visit_is_answered_with_the_pipelines_own_number(client, pipeline):
    answer = client.post(PREDICT, json=EXAMPLE).get_json()
    expected = pipeline.predict(EXAMPLE)
    assert answer["status"] == "success" and answer["model_version"] == pipeline.model_version
    assert [p["sepsis_probability"] for p in answer["predictions"]] == expected["sepsis_probability"].tolist()
    assert [p["visit_id"] for p in answer["predictions"]] == expected["visit_id"].tolist()
    assert {p["risk_level"] for p in answer["predictions"]} <= {"LOW", "MEDIUM", "HIGH"}


def test_rows_set_aside_and_visits_without_anything_usable_are_told(client):
    rows = [
        *EXAMPLE[:30],
        {**EXAMPLE[3], "observation_value": None},
        {**EXAMPLE[3], "visit_id": 77, "observation_value": "high"},
        "not a row",
    ]
    answer = client.post(PREDICT, json=rows).get_json()
    last = answer["predictions"][-1]
    assert (last["visit_id"], last["sepsis_probability"], last["as_of"]) == (77, None, None)
    assert (last["risk_level"], last["reason"], last["num_observations"]) == ("UNKNOWN", "nothing_usable", 0)
    assert {r["reason"]: (r["count"], r["first_rows"]) for r in answer["set_aside"]["reasons"]} == {
        "malformed": (1, []),
        "no_value": (1, [30]),
        "bad_value": (1, [31]),
    }
    assert answer["set_aside"]["rows"] == 3


def test_reasons_are_those_of_the_pipeline(client, pipeline):
    answer = client.post(f"{PREDICT}&explain=3", json=EXAMPLE).get_json()
    expected = pipeline.explain(EXAMPLE, top=3)
    told = [reason for p in answer["predictions"] for reason in p["reasons"]]
    assert [r["feature"] for r in told] == expected["feature"].tolist()
    assert [r["contribution"] for r in told] == expected["contribution"].tolist()


def test_a_trajectory_is_what_was_known_at_each_moment(client, pipeline):
    answer = client.post(f"{PREDICT}&trajectory=5", json=EXAMPLE).get_json()
    for prediction in answer["predictions"]:
        points = prediction["trajectory"]
        assert 1 < len(points) <= 5 and [p["as_of"] for p in points] == sorted(p["as_of"] for p in points)
        assert points[-1] == {name: prediction[name] for name in ("as_of", "sepsis_probability", "reason")}
    first = answer["predictions"][0]
    own = [row for row in EXAMPLE if row["visit_id"] == first["visit_id"]]
    then = pipeline.predict(own, as_of=first["trajectory"][1]["as_of"])
    assert then["sepsis_probability"].iloc[0] == first["trajectory"][1]["sepsis_probability"]


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b'{"visit_id": 1}', "application/json", 400, "JSON list"),
        (b"[" * 200_000, "application/json", 400, "too deep"),
        (b"\xff\xfe", "application/json", 400, "UTF-8"),
        (b"[NaN]", "application/json", 400, "not JSON"),
        (b"[" + b"9" * 5000 + b"]", "application/json", 400, "not JSON"),
        (b"[]", "text/csv", 415, "expected application/json"),
        (b"[]", "application/json", 422, "missing column"),
        (json.dumps([{**EXAMPLE[0], "visit_id": ""}]).encode(), "application/json", 422, "no usable"),
    ],
)
def test_bad_requests_say_what_is_wrong(client, body, kind, status, said):
    answer = client.post("/predict", data=body, content_type=kind)
    assert answer.status_code == status
    problem = answer.get_json()
    assert answer.mimetype == "application/problem+json" and problem["type"] == "about:blank"
    assert problem["title"] == HTTPStatus(status).phrase and problem["status"] == status
    assert said in problem["detail"] and problem["request_id"] == answer.headers["X-Request-ID"]


def test_unusable_observations_name_their_rows(client):
    rows = [{**EXAMPLE[0], "visit_id": None}, {**EXAMPLE[1], "client": ""}]
    answer = client.post(PREDICT, json=rows).get_json()
    assert [(r["reason"], r["first_rows"]) for r in answer["set_aside"]["reasons"]] == [
        ("no_visit", [0]),
        ("no_client", [1]),
    ]
    assert "observation_value" in answer["expected"]


@pytest.mark.parametrize(
    "changes", [{"max_bytes": 1000}, {"max_rows": 10}, {"max_visits": 2}], ids=["bytes", "rows", "visits"]
)
def test_too_large_requests_are_refused(make_client, changes):
    answer = make_client(**changes).post(PREDICT, json=EXAMPLE)
    assert answer.status_code == 413 and answer.get_json()["status"] == 413


@pytest.mark.parametrize("query", ["explain=3", "trajectory=3"])
def test_more_details_than_the_limit_allows_are_refused(make_client, query):
    client = make_client(max_visits=20)  # the request has 8
    assert client.post(f"{PREDICT}&{query}", json=EXAMPLE).status_code == 413
    assert client.post(f"{PREDICT}&{query.replace('3', '2')}", json=EXAMPLE).status_code == 200


@pytest.mark.parametrize("name", ["visit_id", "client"])
@pytest.mark.parametrize("value", ["1e400", "-1e400", "true", "[1]", '{"a": 1}'])
def test_visits_are_named_by_text_or_numbers(client, name, value):
    row = json.dumps({**EXAMPLE[0], name: "HERE"}).replace('"HERE"', value)
    body = f"{json.dumps(EXAMPLE)[:-1]}, {row}]"
    answer = client.post("/predict", data=body, content_type="application/json")
    assert "Infinity" not in answer.get_data(as_text=True) and len(answer.get_json()["predictions"]) == 8
    (reason,) = answer.get_json()["set_aside"]["reasons"]
    assert reason["reason"] == {"visit_id": "no_visit", "client": "no_client"}[name]
    assert reason["first_rows"] == [len(EXAMPLE)]


@pytest.mark.parametrize("query", ["explain=-1", "explain=21", "explain=a", "trajectory=101"])
def test_options_out_of_range_are_refused(client, query):
    assert client.post(f"{PREDICT}&{query}", json=EXAMPLE).status_code == 422


def test_without_a_model_the_service_lives_but_is_not_ready(make_client, tmp_path):
    client = make_client(config=str(tmp_path / "none.json"))
    assert client.get("/health").status_code == 200
    for answer in (client.get("/ready"), client.post(PREDICT, json=EXAMPLE)):
        assert answer.status_code == 503 and "Retry-After" in answer.headers
        assert str(tmp_path) not in answer.get_data(as_text=True)  # no path leaves the process


def asked_together(client, bodies, monkeypatch):
    """Answers to requests that all wait while another one has its turn; then they are scored together."""
    service = client.application.service
    turn, scored = service.take_turn(), []
    score = service._score
    monkeypatch.setattr(service, "_score", lambda batch: scored.append(len(batch)) or score(batch))
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(client.application.test_client().post, PREDICT, json=body) for body in bodies]
        until(lambda: len(service._waiting) == len(bodies), "all requests wait")
        assert not turn.settled
        service.leave(turn)
        return [answer.result() for answer in answers], scored


def visits_of(rows):
    return [[row for row in rows if row["visit_id"] == visit] for visit in dict.fromkeys(r["visit_id"] for r in rows)]


def test_requests_that_wait_are_scored_together_and_alike(client, pipeline, tmp_path, monkeypatch):
    bodies = visits_of(EXAMPLE)
    answers, scored = asked_together(client, bodies, monkeypatch)
    assert scored == [len(bodies)]
    for body, answer in zip(bodies, answers, strict=True):
        (prediction,) = answer.get_json()["predictions"]
        assert prediction["visit_id"] == body[0]["visit_id"]
        assert prediction["sepsis_probability"] == pipeline.predict(body)["sepsis_probability"].item()
    logged = sqlite3.connect(tmp_path / "log.db").execute("select count(*) from predictions").fetchone()
    assert logged == (len(bodies),)
    assert len(lines_of(tmp_path / "audit.jsonl")) == len(bodies)
    assert client.post(PREDICT, json=EXAMPLE).status_code == 200  # no turn is left over


def test_the_fault_of_one_request_is_not_the_others(client, monkeypatch):
    one, two, *_ = visits_of(EXAMPLE)
    bodies = [one, [{**two[0], "visit_id": "?", "client": None}], "not a list", two, [{"a": 1}]]
    answers, scored = asked_together(client, bodies, monkeypatch)
    assert [answer.status_code for answer in answers] == [200, 422, 400, 200, 422]
    assert scored == [2] or scored == [0, 2]  # whoever came first, by the threads' chance
    assert client.post(PREDICT, json=EXAMPLE).status_code == 200


def test_a_visit_that_cannot_be_scored_does_not_take_others_with_it(client, pipeline, monkeypatch):
    bodies = visits_of(EXAMPLE)[:3]
    assess = ProductionPipeline.assess

    def failing(self, observations, visit, as_of):
        if bodies[1][0]["client"] in observations.client:
            raise RuntimeError("a fault in the features")
        return assess(self, observations, visit, as_of)

    monkeypatch.setattr(ProductionPipeline, "assess", failing)
    answers, _ = asked_together(client, bodies, monkeypatch)
    assert [answer.status_code for answer in answers] == [200, 500, 200]


def test_a_large_request_keeps_no_small_one_waiting(client, monkeypatch):
    begun, go_on, parse = threading.Event(), threading.Event(), app_module.parse_json

    def slow(body, most):
        if len(body) > LARGE_BYTES:
            begun.set()
            assert go_on.wait(60)
        return parse(body, most)

    monkeypatch.setattr(app_module, "parse_json", slow)
    large = json.dumps(EXAMPLE).ljust(LARGE_BYTES + 1)

    def post(body):
        return client.application.test_client().post(PREDICT, data=body, content_type="application/json")

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, large)
        assert begun.wait(60)
        try:
            assert post(json.dumps(EXAMPLE)).status_code == 200  # beside it
            refused = post(large)
            assert refused.status_code == 503 and refused.headers["Retry-After"] == "2"
            assert "large" in refused.get_json()["detail"]
        finally:
            go_on.set()
        assert first.result().status_code == 200
    assert post(large).status_code == 200  # the lane is free again


def test_a_large_request_is_scored_in_pieces_and_alike(client, monkeypatch, tmp_path):
    expected = client.post(f"{PREDICT}&explain=2", json=EXAMPLE).get_json()
    pieces = []
    score = ServedModel.score
    monkeypatch.setattr(ServedModel, "score", lambda *a, **k: pieces.append(len(a[2])) or score(*a, **k))
    for together, n in ((1, [1] * 8), (200, None), (10**6, [8])):
        monkeypatch.setattr("serving.api.service.TOGETHER", together)
        pieces.clear()
        body = json.dumps(EXAMPLE).ljust(LARGE_BYTES + 1)
        answer = client.post(f"{PREDICT}&explain=2", data=body, content_type="application/json")
        assert answer.get_json() == expected
        assert sum(pieces) == 8 and ((n is None and 1 < len(pieces) < 8) or pieces == n)
    logged = sqlite3.connect(tmp_path / "log.db").execute("select count(*), count(distinct score) from predictions")
    assert logged.fetchone() == (32, 8)


def test_no_full_collection_stops_all_threads_during_a_large_request(client, monkeypatch):
    seen, parse = [], app_module.parse_json
    monkeypatch.setattr(app_module, "parse_json", lambda *a: seen.append(gc.isenabled()) or parse(*a))
    for body, status in ((json.dumps(EXAMPLE), 200), ("[" * 1000, 400)):
        for size in (len(body), LARGE_BYTES + 1):
            answer = client.post(PREDICT, data=body.ljust(size), content_type="application/json")
            assert answer.status_code == status and gc.isenabled()
    assert seen == [True, False, True, False]


@pytest.mark.parametrize("path", ["/predict", "/fhir/predict", "/cds-services/sepsis-risk"])
def test_a_body_of_too_many_objects_is_not_even_parsed(make_client, path, monkeypatch):
    client = make_client(max_rows=100)
    client.get("/ready")
    monkeypatch.setattr("serving.api.bodies.json.loads", lambda *_, **__: pytest.fail("it is parsed"))
    answer = client.post(path, data=b"[" + b"{}," * 500 + b"{}]", content_type="application/json")
    monkeypatch.undo()
    assert answer.status_code == 413 and "send fewer visits" in answer.get_data(as_text=True)


def test_another_model_is_taken_up_while_the_service_runs(make_client, models_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.deployed.LOOK_SECONDS", -1)
    folder = shutil.copytree(models_dir, tmp_path / "models")
    path = folder / "best_model_config.json"
    config, closed, close = json.loads(path.read_text()), [], PredictionLog.close
    monkeypatch.setattr(PredictionLog, "close", lambda log_: closed.append(log_._pipeline.model_version) or close(log_))
    client = make_client(config=str(path), model=str(folder / "best_model.pkl"))

    def answered():
        answer = client.post(PREDICT, json=EXAMPLE)
        assert answer.status_code == 200
        return answer.get_json()["model_version"]

    assert answered() == config["model_version"]
    write_atomic(path, json.dumps({**config, "model_version": "another"}))
    until(lambda: answered() == "another", "the other model is there")
    write_atomic(path, json.dumps({**config, "model_sha256": "0" * 64}))
    for _ in range(20):
        assert answered() == "another"  # what cannot be loaded changes nothing
    database = sqlite3.connect(tmp_path / "log.db")
    until(lambda: closed == [config["model_version"]], "the log of the old model is closed")
    logged = database.execute("select model_version, count(*) from predictions group by 1").fetchall()
    assert dict(logged).keys() == {config["model_version"], "another"}
    database.close()


def test_a_fault_of_ours_shows_an_id_and_no_detail(client, monkeypatch, caplog):
    def fail(*_):
        raise KeyError("secret detail")

    monkeypatch.setattr(log, "propagate", True)
    client.get("/ready")
    monkeypatch.setattr(ProductionPipeline, "assess", fail)
    answer = client.post(PREDICT, json=EXAMPLE, headers={"X-Request-ID": "abc-1"})
    assert answer.status_code == 500 and answer.get_json()["request_id"] == "abc-1"
    assert "secret" not in answer.get_data(as_text=True) + caplog.text
    assert re.search(r"abc-1 failed: KeyError at test_api.py:\d+ fail", caplog.text)


def test_unknown_pages_and_methods_are_json_too(client):
    assert client.get("/nothing").get_json()["status"] == 404
    answer = client.get("/predict")
    assert answer.status_code == 405 and "POST" in answer.headers["Allow"]


def test_a_path_that_is_too_long_and_a_missing_host_are_refused_in_our_words(client):
    answer = client.post(f"{PREDICT}&x={'a' * 2100}", json=EXAMPLE)
    assert answer.status_code == 414 and "longer than" in answer.get_json()["detail"]
    assert answer.headers["X-Request-ID"] and answer.headers["X-Content-Type-Options"] == "nosniff"
    nameless = client.get("/health", environ_overrides={"HTTP_HOST": "", "SERVER_PROTOCOL": "HTTP/1.1"})
    assert nameless.status_code == 400 and "Host" in nameless.get_json()["detail"]


def test_a_resource_that_is_nested_without_end_is_refused(client):
    extension = {"url": "http://example.org/x", "valueBoolean": True}
    for _ in range(300):
        extension = {"url": "http://example.org/x", "extension": [extension]}
    answer = client.post(FHIR, json=bundle_of(fhir_observation(extension=[extension])))
    assert answer.status_code == 400 and "deep" in answer.get_data(as_text=True)


def test_a_log_that_was_rotated_away_is_begun_anew(client, tmp_path):
    log = tmp_path / "audit.jsonl"
    for name in ("old", "older"):
        client.post(PREDICT, json=EXAMPLE)
        log.rename(tmp_path / name)
    client.post(PREDICT, json=EXAMPLE)
    assert [len(lines_of(path)) for path in (tmp_path / "old", tmp_path / "older", log)] == [1, 1, 1]


def test_a_torn_line_of_a_log_is_ended_before_the_next(client, tmp_path):
    (tmp_path / "audit.jsonl").write_text('{"torn": ')
    client.post(PREDICT, json=EXAMPLE)
    torn, line = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert torn == '{"torn": ' and json.loads(line)["outcome"] == "scored"


# -------------------------------------------------------------------------------------------------- security


SOCKET = {"REMOTE_ADDR": ""}  # as gunicorn has it for a connection through a Unix socket


def test_without_keys_only_a_unix_socket_is_answered(make_client):
    client = make_client(insecure=False)
    assert client.post(PREDICT, json=EXAMPLE, environ_base=SOCKET).status_code == 200
    for where in (LOCAL, AFAR):  # a proxy on this machine may stand for everybody
        answer = client.post(PREDICT, json=EXAMPLE, environ_base=where)
        assert answer.status_code == 401 and "--new-key" in answer.get_json()["detail"]
        assert client.get("/health", environ_base=where).status_code == 200


@pytest.mark.parametrize("header", [{"X-Forwarded-For": "192.0.2.7"}, {"Forwarded": "for=x"}, {"Via": "1.1 x"}])
def test_a_proxy_at_the_socket_does_not_make_a_client_local(make_client, header):
    client = make_client(insecure=False)
    assert client.post(PREDICT, json=EXAMPLE, headers=header, environ_base=SOCKET).status_code == 401


def test_insecure_answers_everybody(make_client):
    assert make_client(insecure=True).post(PREDICT, json=EXAMPLE, environ_base=AFAR).status_code == 200


def test_keys_open_the_service_from_anywhere(make_client, tmp_path):
    key, line = new_key("ward-3")
    keys = tmp_path / "keys"
    keys.write_text(f"# the wards\n{line}\n")
    client = make_client(api_keys=str(keys))
    for header in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
        assert client.post(PREDICT, json=EXAMPLE, headers=header, environ_base=AFAR).status_code == 200
    assert client.post(PREDICT, json=EXAMPLE, environ_base=LOCAL).status_code == 401
    wrong = client.post(PREDICT, json=EXAMPLE, headers={"X-API-Key": key + "x"}, environ_base=AFAR)
    assert wrong.status_code == 403
    assert [entry["client"] for entry in lines_of(tmp_path / "access.jsonl")] == ["ward-3", "ward-3", None, None]
    assert key not in (tmp_path / "access.jsonl").read_text() + keys.read_text()


def test_keys_have_scopes_a_last_day_and_a_last_use(make_client, tmp_path):
    made = {
        name: new_key(name, *more)
        for name, *more in (("scorer", ["score"]), ("watcher", ["metrics"]), ("old", ["score"], "2020-02-29"))
    }
    (tmp_path / "keys").write_text("\n".join(line for _, line in made.values()))
    client = make_client(api_keys=str(tmp_path / "keys"))

    def asked(name, path):
        headers = {"X-API-Key": made[name][0]}
        answer = (
            client.post(path, json=EXAMPLE, headers=headers) if "predict" in path else client.get(path, headers=headers)
        )
        return answer.status_code, answer.get_data(as_text=True)

    assert asked("scorer", PREDICT)[0] == asked("watcher", "/metrics")[0] == 200
    assert asked("scorer", "/model")[0] == asked("watcher", "/model")[0] == 200
    for name, path, said in (
        ("scorer", "/metrics", "for score only"),
        ("watcher", PREDICT, "for metrics only"),
        ("old", PREDICT, "valid to 2020-02-29"),
    ):
        status, text = asked(name, path)
        assert status == 403 and said in text
    text = asked("watcher", "/metrics")[1]
    assert re.search(r'sepsis_key_last_use_seconds{client="scorer"} [1-9]', text) and '{client="old"}' not in text
    for scopes, expires, said in (
        (["all"], "", "scope 'all' is not known"),
        (["score"], "soon", "expected a date"),
        (["score"], "2027-02-30", "expected a date"),
    ):
        with pytest.raises(BadConfig, match=said):
            new_key("ward", scopes, expires)


def test_wrong_keys_are_counted_by_address(make_client):
    key, line = new_key("ward")
    client = make_client(api_keys=line)

    def status(given, where):
        return client.post(PREDICT, json=EXAMPLE, headers={"X-API-Key": given}, environ_base=where).status_code

    found = [status("sepsis_guess", AFAR) for _ in range(22)]
    assert found == [403] * 20 + [429] * 2
    assert status(key, AFAR) == 200  # the right one is answered
    assert status("sepsis_guess", LOCAL) == 403


def test_one_limit_counts_all_routes(make_client):
    client = make_client(rate_limit="3/hour")
    paths = (PREDICT, FHIR, CDS, PREDICT)
    statuses = [client.post(path, json=EXAMPLE).status_code for path in paths]
    assert statuses[-1] == 429 and 429 not in statuses[:-1]


@pytest.mark.parametrize("data", [b"", b"ward:1234", b"a b:" + b"0" * 64, b"\xff\xfe\x00", b"ward:\xe4"])
def test_bad_key_files_are_refused(tmp_path, data):
    (tmp_path / "keys").write_bytes(data)
    with pytest.raises(BadConfig, match="key"):
        read_keys(str(tmp_path / "keys"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_key_files_as_windows_writes_them(tmp_path, encoding):
    _, line = new_key("ward")
    (tmp_path / "keys").write_text(line.upper() + "\r\n", encoding=encoding)
    assert read_keys(str(tmp_path / "keys")) == {line.split(":")[1]: Key("WARD")} == read_keys(line.upper())


@pytest.mark.parametrize("source", ["sepsis_secret", "ward:sepsis_secret", "ward:sepsis_secret," + "x:" + "0" * 64])
def test_a_key_in_the_wrong_place_is_not_shown(source):
    with pytest.raises(BadConfig) as caught:
        read_keys(source)
    assert "secret" not in str(caught.value)


def test_kept_keys_outlast_a_damaged_file(make_client, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.api.security._kept", {})
    key, line = new_key("ward")
    keys = tmp_path / "keys"
    keys.write_text(line)
    keep_keys(str(keys))
    keys.write_text("damaged")
    with pytest.raises(BadConfig):
        keep_keys(str(keys))
    client = make_client(api_keys=str(keys))
    assert client.post(PREDICT, json=EXAMPLE, headers={"X-API-Key": key}).status_code == 200


@pytest.mark.parametrize("changes", [{"rate_limit": x} for x in ("abc", "", "2")] + [{"rate_storage": "none://x"}])
def test_a_rate_limit_that_would_be_none_is_refused(make_client, changes):
    with pytest.raises(BadConfig, match="SEPSIS_RATE"):
        make_client(**changes)


def test_too_many_requests_are_told_when_to_come_back(make_client):
    client = make_client(rate_limit="2/hour")
    answers = [client.post(PREDICT, json=EXAMPLE) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert [a.headers["X-RateLimit-Remaining"] for a in answers] == ["1", "0", "0"]
    assert int(answers[2].headers["Retry-After"]) > 0 and answers[2].get_json()["status"] == 429


def test_of_several_limits_the_one_that_is_exceeded_is_named(make_client):
    client = make_client(rate_limit="100/minute;2/hour")
    answers = [client.post(PREDICT, json=EXAMPLE) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert "2 per 1 hour" in answers[2].get_json()["detail"] and int(answers[2].headers["Retry-After"]) > 60


def test_while_the_store_of_counts_is_away_the_machine_counts_alone(make_client, monkeypatch):
    class Store(SharedCounts):
        away = True

        def incr(self, key, seconds):
            if Store.away:
                raise ConnectionError("the store of counts is away")
            n, self.end = self.hit(key, seconds)
            return n

        def get_expiry(self, key):
            return self.end

    monkeypatch.setattr("serving.api.limits.storage_from_string", lambda url: Store())
    client = make_client(rate_limit="2/hour", rate_storage="redis://counts")
    assert [client.post(PREDICT, json=EXAMPLE).status_code for _ in range(3)] == [200, 200, 429]
    Store.away = False
    assert client.post(PREDICT, json=EXAMPLE).status_code == 429  # the store is not asked again at once
    client.application.limits._away_until = 0.0
    assert [client.post(PREDICT, json=EXAMPLE).status_code for _ in range(3)] == [200, 200, 429]


def test_counts_of_requests_are_exact_among_threads():
    counts, found = SharedCounts(), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            tasks = [pool.submit(lambda: [counts.hit("ward", 3600)[0] for _ in range(500)]) for _ in range(8)]
            for task in tasks:
                found += task.result()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(found) == list(range(1, 4001)) and counts.hit("other", 3600)[0] == 1


def test_counts_of_requests_begin_anew_with_the_window(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("serving.api.limits.time.time", lambda: now[0])
    counts = SharedCounts()
    assert [counts.hit("ward", 60) for _ in range(2)] == [(1, 1060.0), (2, 1060.0)]
    now[0] = 1059.9
    assert counts.hit("ward", 60) == (3, 1060.0)
    now[0] = 1060.0
    assert counts.hit("ward", 60) == (1, 1120.0)


def test_counts_of_more_keys_than_there_is_room_for_lose_the_smallest(monkeypatch):
    monkeypatch.setattr(SharedCounts, "SLOTS", 4)
    monkeypatch.setattr(SharedCounts, "PROBES", 4)
    counts = SharedCounts()
    for _ in range(9):
        counts.hit("guesses keys", 3600)
    for i in range(50):
        counts.hit(f"other {i}", 3600)
    assert counts.hit("guesses keys", 3600)[0] == 10


def test_a_fault_of_the_rate_limit_costs_no_prediction(make_client, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("the store of counts is away")

    client = make_client(rate_limit="2/hour")
    monkeypatch.setattr(SharedCounts, "hit", broken)
    assert [client.post(PREDICT, json=EXAMPLE).status_code for _ in range(3)] == [200] * 3


def test_logs_hold_no_value_and_no_name(client, tmp_path):
    client.post(PREDICT, json=EXAMPLE)
    client.post(PREDICT, json=[{name: value for name, value in EXAMPLE[0].items() if name != "observation_value"}])
    text = (tmp_path / "access.jsonl").read_text() + (tmp_path / "audit.jsonl").read_text()
    for row in EXAMPLE:
        assert str(row["visit_id"]) not in re.findall(r"[\w-]+", text) and row["client"] not in text
    scored, failed = lines_of(tmp_path / "audit.jsonl")
    assert scored["outcome"] == "scored" and scored["visits"] == 8 == len(set(scored["visit_pseudonyms"]))
    assert failed["outcome"] == "error 422" and failed["client"] == "anyone"
    database = sqlite3.connect(tmp_path / "log.db")
    assert database.execute("select count(*), count(distinct visit) from predictions").fetchone() == (8, 8)
    assert database.execute("select source, kind, n from prediction_errors").fetchall() == [("api", "unusable", 1)]


def test_a_log_that_is_away_is_told_and_tried_again(make_client, tmp_path, monkeypatch):
    monkeypatch.setattr("monitoring.writer.BACK_OFF", (0.01, 0.01))
    (tmp_path / "folder").write_text("no folder")
    url = f"sqlite:///{tmp_path}/folder/log.db"
    client = make_client(monitor_url=url)
    assert client.post(PREDICT, json=EXAMPLE).status_code == 200
    told = client.get("/ready").get_json()
    assert (told["predictions_logged"], told["predictions_waiting"], told["predictions_not_logged"]) == (False, 8, 0)
    assert "sepsis_predictions_not_logged_total" in client.get("/metrics").get_data(as_text=True)
    strict = make_client(monitor_url=url, log_required=True)
    answers = [
        strict.post(PREDICT, json=EXAMPLE),
        strict.get("/ready"),
        strict.post(FHIR, json=bundle_of(fhir_observation())),
    ]
    for answer in answers:
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "2"
        assert "sepsis_probability" not in answer.get_data(as_text=True)
    (tmp_path / "folder").unlink()
    for each in (client, strict):
        end = time.monotonic() + 60
        while each.get("/ready").get_json().get("predictions_logged") is not True:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert each.post(PREDICT, json=EXAMPLE).status_code == 200
    # the first client's is logged when that is possible; what was refused is not
    logged = sqlite3.connect(tmp_path / "folder" / "log.db").execute("select count(*) from predictions")
    assert logged.fetchone() == (8 + 8 + 8,)
    with pytest.raises(BadConfig, match="SEPSIS_LOG_REQUIRED"):
        make_client(monitor_url="off", log_required=True)


def test_pages_load_nothing_from_elsewhere(client):
    for path in ("/", "/docs"):
        with client.get(path) as answer:
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            text = answer.get_data(as_text=True)
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text)
        for name in re.findall(r"(?:src|href)=\"(/static/[^\"]+)\"", text):
            with client.get(name) as file:
                assert file.status_code == 200
    assert client.get("/static/../app.py").status_code == 404


@pytest.mark.parametrize(
    ("name", "value"),
    [("SEPSIS_MAX_ROWS", "many"), ("SEPSIS_MAX_ROWS", "0"), ("SEPSIS_MAX_ROWS", "²"), ("SEPSIS_INSECURE", "perhaps")],
)
def test_settings_that_cannot_be_right_are_refused(name, value):
    with pytest.raises(BadConfig, match=name):
        Settings.from_environment({name: value})


# ------------------------------------------------------------------------------------------- FHIR, CDS Hooks


def fhir_observation(**changes):
    """In the shape of the standard's own example of a heart rate, with a range."""
    return {
        "resourceType": "Observation",
        "id": "heart-rate",
        "status": "final",
        "category": [
            {
                "coding": [
                    {"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "vital-signs"}
                ]
            }
        ],
        "code": {
            "coding": [{"system": LOINC, "code": "8867-4", "display": "Heart rate"}],
            "text": "Heart rate",
        },
        "subject": {"reference": "Patient/example"},
        "encounter": {"reference": "Encounter/e1"},
        "effectiveDateTime": "2024-07-02T08:00:00Z",
        "valueQuantity": {
            "value": 104.5,
            "unit": "beats/minute",
            "system": UCUM,
            "code": "/min",
        },
        "referenceRange": [{"low": {"value": 60}, "high": {"value": 100}}],
        **changes,
    }


def blood_pressure():
    """In the shape of the standard's own example of a blood pressure panel."""
    panel = fhir_observation(id="blood-pressure")
    del panel["valueQuantity"], panel["referenceRange"]
    panel["code"] = {"coding": [{"system": LOINC, "code": "85354-9"}]}
    panel["component"] = [
        {
            "code": {"coding": [{"system": LOINC, "code": code}]},
            "valueQuantity": {"value": value, "unit": "mmHg", "system": UCUM, "code": "mm[Hg]"},
        }
        for code, value in (("8480-6", 107), ("8462-4", 60))
    ]
    return panel


def bundle_of(*resources):
    entries = [{"fullUrl": f"urn:uuid:{i}", "resource": resource} for i, resource in enumerate(resources)]
    return {"resourceType": "Bundle", "type": "collection", "entry": entries}


def lab(code, value, unit):
    quantity = {"value": value, "unit": unit, "system": UCUM, "code": unit}
    return fhir_observation(code={"coding": [{"system": LOINC, "code": code}]}, valueQuantity=quantity)


def plain(code, value, low=None, high=None, time="2024-07-02T08:00:00Z"):
    return {
        "visit_id": "e1",
        "client": "example",
        "observation_date": time,
        "observation_type_code": code,
        "observation_value": value,
        "reference_range_min": low,
        "reference_range_max": high,
    }


def test_fhir_gives_the_same_number_to_the_last_bit(client, pipeline):
    bundle = bundle_of(
        fhir_observation(), blood_pressure(), lab("8310-5", 101.3, "[degF]"), lab("2160-0", 176.84, "umol/L")
    )
    answer = client.post(FHIR, json=bundle)
    assert answer.mimetype == "application/fhir+json"
    assessment = answer.get_json()["entry"][0]["resource"]
    own = pipeline.own_code
    rows = [
        plain(own("8867-4"), 104.5, 60, 100),
        plain(own("8480-6"), 107.0),
        plain(own("8462-4"), 60.0),
        plain(own("8310-5"), 38.5, 60, 100),
        plain(own("2160-0"), 2.00041408),
    ]
    rows[3] |= {"reference_range_min": 15.5556, "reference_range_max": 37.7778}
    rows[4] |= {"reference_range_min": 0.67872, "reference_range_max": 1.1312}
    assert own("8867-4") == "HR"
    prediction = assessment["prediction"][0]
    expected = pipeline.predict(rows)["sepsis_probability"][0]
    assert prediction["probabilityDecimal"] == expected
    assert client.post(PREDICT, json=rows).get_json()["predictions"][0]["sepsis_probability"] == expected
    assert prediction["outcome"]["coding"][0]["code"] == "91302008"
    assert prediction["whenPeriod"] == {"start": "2024-07-02T08:00:00Z", "end": "2024-07-02T14:00:00Z"}
    assert "fraction" in prediction["rationale"] and "prediction" in assessment
    assert assessment["subject"] == {"reference": "Patient/example"}
    assert assessment["encounter"] == {"reference": "Encounter/e1"}
    assert [b["reference"] for b in assessment["basis"]] == [f"urn:uuid:{i}" for i in range(4)]


def test_all_example_patients_as_fhir(client, pipeline):
    observations = [
        fhir_observation(
            subject={"reference": f"Patient/{row['client']}"},
            encounter={"reference": f"Encounter/{row['visit_id']}"},
            code={"coding": [{"code": row["observation_type_code"]}]},
            effectiveDateTime=row["observation_date"] + "Z",
            valueQuantity={"value": row["observation_value"]},
            referenceRange=[
                {
                    "low": {"value": row["reference_range_min"]},
                    "high": {"value": row["reference_range_max"]},
                }
            ]
            if "reference_range_min" in row and "reference_range_max" in row
            else [],
        )
        for row in EXAMPLE
        if row["observation_value"] is not None
    ]
    for observation in observations:
        if not observation["referenceRange"]:
            del observation["referenceRange"]
    entries = client.post(FHIR, json=bundle_of(*observations)).get_json()["entry"]
    given = [e["resource"]["prediction"][0]["probabilityDecimal"] for e in entries if "prediction" in e["resource"]]
    usable = [row for row in EXAMPLE if row["observation_value"] is not None]
    assert given == pipeline.predict(usable)["sepsis_probability"].tolist()


@pytest.mark.parametrize(
    ("resource", "said"),
    [
        (fhir_observation(status="entered-in-error"), "no result"),
        (fhir_observation(subject=None), "no subject"),
        (fhir_observation(effectiveDateTime="2024"), "no effective time"),
        (fhir_observation(valueQuantity=None), "no valueQuantity"),
        (lab("2345-7", 5.5, "furlong"), "unit"),
        (fhir_observation(status=7), "not a valid R4 Observation"),
    ],
)
def test_fhir_observations_that_cannot_be_used_are_named_and_the_rest_go_on(client, resource, said):
    resource = {name: value for name, value in resource.items() if value is not None}
    entries = client.post(FHIR, json=bundle_of(resource, fhir_observation())).get_json()["entry"]
    assert entries[0]["resource"]["resourceType"] == "RiskAssessment"
    issues = entries[1]["resource"]["issue"]
    assert any(
        said in issue["diagnostics"] and issue["expression"][0] == "Bundle.entry[0]"
        for issue in issues
        if "expression" in issue
    )
    alone = client.post(FHIR, json=bundle_of(resource))
    assert alone.status_code == 422 and alone.get_json()["resourceType"] == "OperationOutcome"


def without_encounter(subject, value, **changes):
    observation = fhir_observation(subject=subject, **changes)
    del observation["encounter"]
    return {**observation, "valueQuantity": {"value": value, "unit": "/min"}}


@pytest.mark.parametrize(
    "subjects",
    [
        ({"reference": "http://a.org/fhir/Patient/1"}, {"reference": "http://b.org/fhir/Patient/1"}),
        ({"identifier": {"system": "urn:hospA", "value": "1"}}, {"identifier": {"system": "urn:hospB", "value": "1"}}),
        ({"identifier": {"value": "1"}}, {"reference": "Patient/1"}),
        ({"reference": "urn:uuid:9"}, {"reference": "Patient/9"}),
    ],
    ids=["servers", "systems", "identifier", "uuid"],
)
def test_fhir_patients_of_one_number_are_not_one_patient(client, pipeline, tmp_path, subjects):
    bundle = bundle_of(without_encounter(subjects[0], 70), without_encounter(subjects[1], 170))
    entries = client.post(FHIR, json=bundle).get_json()["entry"]
    given = [e["resource"] for e in entries if e["resource"]["resourceType"] == "RiskAssessment"]
    assert [g["subject"] for g in given] == list(subjects)
    alone = [pipeline.predict([plain("HR", v, 60, 100)])["sepsis_probability"].item() for v in (70, 170)]
    assert [g["prediction"][0]["probabilityDecimal"] for g in given] == alone
    assert [[b["reference"] for b in g["basis"]] for g in given] == [["urn:uuid:0"], ["urn:uuid:1"]]
    (entry,) = lines_of(tmp_path / "audit.jsonl")
    assert len(set(entry["visit_pseudonyms"])) == 2


def test_fhir_references_without_a_server_are_on_that_of_their_observation(client):
    bundle = bundle_of(*[without_encounter({"reference": "Patient/1"}, 70) for _ in range(3)])
    for entry, server in zip(bundle["entry"], "aba", strict=True):
        entry["fullUrl"] = f"http://{server}.org/fhir/Observation/x"
    bundle["entry"][2]["resource"]["subject"] = {"reference": "http://a.org/fhir/Patient/1/_history/2"}
    entries = client.post(FHIR, json=bundle).get_json()["entry"]
    assert sum(e["resource"]["resourceType"] == "RiskAssessment" for e in entries) == 2


def test_fhir_an_encounter_of_the_patients_number_is_not_the_patient(client):
    with_one = fhir_observation(subject={"reference": "Patient/1"}, encounter={"reference": "Encounter/1"})
    entries = client.post(FHIR, json=bundle_of(with_one, without_encounter({"reference": "Patient/1"}, 70)))
    assert sum(e["resource"]["resourceType"] == "RiskAssessment" for e in entries.get_json()["entry"]) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": {"reference": "#p"}, "contained": [{"resourceType": "Patient", "id": "p"}]},
        {"subject": {"reference": "Group/1"}},
        {"subject": {"type": "Group", "identifier": {"value": "1"}}},
        {"subject": {"identifier": {"value": "  "}}},
        {"subject": {"reference": "Patient?identifier=1"}},
        {"encounter": {"display": "the one of Monday"}},
    ],
)
def test_fhir_whom_an_observation_is_of_is_never_guessed(client, changes):
    answer = client.post(FHIR, json=bundle_of(fhir_observation(**changes), fhir_observation(**changes)))
    assert answer.status_code == 422 and " which" in answer.get_data(as_text=True)


def test_fhir_a_uuid_in_the_bundle_must_be_a_patients(client):
    bundle = bundle_of(fhir_observation(subject={"reference": "urn:uuid:1"}), {"resourceType": "Device"})
    assert client.post(FHIR, json=bundle).status_code == 422
    bundle["entry"][1]["resource"] = {"resourceType": "Patient"}
    assert client.post(FHIR, json=bundle).status_code == 200


def test_fhir_odd_numbers_and_names_are_no_fault_of_ours(client):
    spaces = fhir_observation(subject={"identifier": {"value": " 4711 "}})
    plain_name = fhir_observation(subject={"identifier": {"value": "4711"}})
    answer = client.post(FHIR, json=bundle_of(spaces, plain_name))
    assert answer.status_code == 200 and len(answer.get_json()["entry"]) <= 2
    long = fhir_observation(valueQuantity={"value": 10**400, "unit": "/min"})
    answer = client.post(FHIR, json=bundle_of(long, fhir_observation()))
    assert answer.status_code == 200 and "infinite" in answer.get_data(as_text=True)


def test_fhir_ranges_have_units_of_their_own_and_are_those_of_healthy_people(pipeline):
    def bound(value, unit):
        return {"value": value, "unit": unit, "system": UCUM, "code": unit}

    observation = lab("2160-0", 90, "umol/L")
    of_aim = {"type": {"coding": [{"code": "treatment"}]}, "low": {"value": 1}}
    normal = {"low": bound(0.6, "mg/dL"), "high": bound(100, "umol/L")}
    record = fhir.observations_of(bundle_of({**observation, "referenceRange": [of_aim, normal]}), pipeline).records[0]
    assert record["observation_value"] == 1.01808
    assert (record["reference_range_min"], record["reference_range_max"]) == (0.6, 1.1312)
    record = fhir.observations_of(bundle_of({**observation, "referenceRange": [of_aim]}), pipeline).records[0]
    assert record["reference_range_min"] is None


def test_fhir_errors_are_operation_outcomes(client, monkeypatch):
    for body, status in (([], 400), ({"resourceType": "Patient"}, 400), ({"resourceType": "Bundle"}, 422)):
        answer = client.post(FHIR, json=body)
        assert answer.status_code == status and answer.get_json()["resourceType"] == "OperationOutcome"
    with monkeypatch.context() as closed:
        closed.setattr(client.application.gate, "open_to_all", False)
        assert client.post(FHIR, json={}).get_json()["issue"][0]["code"] == "login"
    monkeypatch.setattr(ProductionPipeline, "assess", lambda *_: 1 / 0)
    answer = client.post(FHIR, json=bundle_of(fhir_observation()), headers={"X-Request-ID": "abc-1"})
    assert answer.status_code == 500 and "abc-1" in answer.get_json()["issue"][0]["diagnostics"]


CDS = "/cds-services/sepsis-risk"
NOW = datetime(2024, 7, 2, 9, 30, tzinfo=UTC)


@pytest.fixture
def viewed(client):
    """The service on the day of the observations."""
    client.application.service.clock = NOW.timestamp
    return client


def cds_call(*resources, **context):
    return {
        "hook": "patient-view",
        "hookInstance": "d1577c69-dfbe-44ad-ba6d-3e05e953b2ea",
        "context": {"userId": "Practitioner/1", "patientId": "example", **context},
        "prefetch": prefetch_of(bundle_of(*resources)),
    }


def prefetch_of(vitals):
    return {"patient": None, "vitals": vitals, "laboratory": None}


def at(time, encounter="Encounter/e1", value=104.5, **changes):
    quantity = {"value": value, "unit": "/min", "system": UCUM, "code": "/min"}
    return fhir_observation(
        effectiveDateTime=time, encounter={"reference": encounter}, valueQuantity=quantity, **changes
    )


def test_cds_hooks_discovery_and_cards(viewed, pipeline):
    service = viewed.get("/cds-services").get_json()["services"][0]
    assert {"hook", "id", "description", "prefetch"} <= service.keys()
    assert service["prefetch"].keys() == {"patient", "vitals", "laboratory"}
    assert all("_sort=-date" in service["prefetch"][name] for name in ("vitals", "laboratory"))
    cards = viewed.post(f"/cds-services/{service['id']}", json=cds_call(fhir_observation())).get_json()["cards"]
    assert len(cards) == 1 and len(cards[0]["summary"]) < 140
    level = pipeline.risk_level(pipeline.predict([plain("HR", 104.5, 60, 100)], as_of=NOW)["sepsis_probability"][0])
    assert cards[0]["indicator"] == {"LOW": "info", "MEDIUM": "warning", "HIGH": "critical"}[level]
    assert pipeline.model_version in cards[0]["source"]["label"]
    assert "2024-07-02 09:30 UTC" in cards[0]["summary"] and "Not used" not in cards[0]["detail"]
    assert "is 2 h old" in cards[0]["detail"] and "__" not in cards[0]["detail"]


def test_cds_the_audit_names_the_user_as_a_keyed_hash(viewed, tmp_path):
    for call in (cds_call(fhir_observation()), cds_call()):
        viewed.post(CDS, json=call)
    viewed.post(CDS, json=cds_call(fhir_observation(), userId="Practitioner/2"))
    one, nothing, two = (line["user_pseudonym"] for line in lines_of(tmp_path / "audit.jsonl"))
    assert one == nothing != two and re.fullmatch("[0-9a-f]{16}", one)
    assert "Practitioner" not in (tmp_path / "audit.jsonl").read_text()


def test_cds_cards_are_of_the_encounter_that_is_viewed_else_of_the_latest(viewed):
    old, now = at("2015-03-01T08:00:00Z", "Encounter/old"), at("2024-07-02T08:00:00Z", "Encounter/now")

    def times(*resources, **context):
        cards = viewed.post(CDS, json=cds_call(*resources, **context)).get_json()["cards"]
        return ["2024" if "is 2 h old" in card["detail"] else "2015" for card in cards]

    assert times(old, now) == ["2024"] and times(now, old) == ["2024"]
    assert times(old, now, encounterId="old") == ["2015"] and times(old, now, encounterId="now") == ["2024"]
    assert times(old, now, encounterId="another") == []
    nameless = at("2024-07-02T08:00:00Z")
    del nameless["encounter"]
    assert times(nameless, encounterId="now") == ["2024"]


def test_cds_cards_are_of_the_patient_that_is_viewed(viewed):
    other = at("2024-07-02T09:00:00Z", subject={"reference": "Patient/somebody-else"})
    (card,) = viewed.post(CDS, json=cds_call(other)).get_json()["cards"]
    assert "UNKNOWN" in card["summary"] and "of another patient" in card["detail"]
    (card,) = viewed.post(CDS, json=cds_call(other, at("2024-07-02T08:00:00Z"))).get_json()["cards"]
    assert "is 2 h old" in card["detail"] and "Not used: 1 x of another patient" in card["detail"]
    one, two = (at("2024-07-02T09:00:00Z", subject={"reference": f"http://{x}.org/Patient/example"}) for x in "ab")
    assert viewed.post(CDS, json=cds_call(one)).status_code == 200
    assert viewed.post(CDS, json=cds_call(one, two)).status_code == 422


@pytest.mark.parametrize(
    "changes",
    [
        {"context": None},
        {"context": {}},
        {"context": {"patientId": ""}},
        {"context": {"patientId": "1", "encounterId": 7}},
        {"hook": "order-sign"},
    ],
)
def test_cds_calls_must_say_whom_they_are_about(viewed, changes):
    assert viewed.post(CDS, json={**cds_call(fhir_observation()), **changes}).status_code == 400
    assert viewed.post(CDS, json=[]).status_code == 400


def test_cds_failures_are_no_advice_that_all_is_well(viewed, tmp_path):
    def answered(vitals, status):
        answer = viewed.post(CDS, json={**cds_call(), "prefetch": prefetch_of(vitals)})
        entry = lines_of(tmp_path / "audit.jsonl")[-1]
        assert answer.status_code == status
        return answer.get_json(), entry["outcome"]

    failure = {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": "exception"}]}
    assert answered(failure, 412)[1] == answered(bundle_of(failure), 412)[1] == "error 412"
    assert viewed.post(CDS, json={**cds_call(), "prefetch": {}}).status_code == 412
    body, outcome = answered(bundle_of(lab("2345-7", 5.5, "furlong")), 200)
    assert outcome == "no observations" and "unit" in body["cards"][0]["detail"]
    assert "UNKNOWN" in body["cards"][0]["summary"]
    for none in (None, bundle_of()):
        assert answered(none, 200) == ({"cards": []}, "no observations")  # the patient has none
    partly = bundle_of(fhir_observation(), lab("2345-7", 5.5, "furlong"), failure)
    partly["link"] = [{"relation": "next", "url": "http://a.org/next"}]
    body, _ = answered(partly, 200)
    detail = body["cards"][0]["detail"]
    for said in ("1 x its unit cannot be converted", "1 x the source reports an error", "more observations than"):
        assert said in detail
    metrics = viewed.get("/metrics").get_data(as_text=True)
    assert 'sepsis_rows_set_aside_total{reason="bad_unit"}' in metrics


def test_cds_hooks_of_other_moments(viewed):
    for service in viewed.get("/cds-services").get_json()["services"]:
        path = f"/cds-services/{service['id']}"
        call = {**cds_call(fhir_observation()), "hook": service["hook"]}
        assert len(viewed.post(path, json=call).get_json()["cards"]) == 1
        assert viewed.post(path, json={**call, "hook": "order-sign"}).status_code == 400


def test_cds_cards_speak_a_clinicians_words(viewed):
    height = fhir_observation(
        code={"coding": [{"system": LOINC, "code": "8302-2"}], "text": "Body *height* <b>"},
        valueQuantity={"value": 180, "unit": "cm", "system": UCUM, "code": "cm"},
    )
    (card,) = viewed.post(CDS, json=cds_call(fhir_observation(), height)).get_json()["cards"]
    assert "does not look at: Body height &lt;b&gt;." in card["detail"]
    assert "not here:" in card["detail"] and "diastolic blood pressure" in card["detail"]
    for technical in ("__", "8302-2", "DBP", "AUC", "row"):
        assert technical not in card["detail"]


def answer_to(card, outcome="overridden", minute=0, **changes):
    moment = f"2024-07-02T09:{minute:02}:00Z"
    return {"feedback": [{"card": card["uuid"], "outcome": outcome, "outcomeTimestamp": moment, **changes}]}


def test_cds_feedback_is_kept_beside_the_cards_and_reported(viewed, tmp_path, config_path):
    (card,) = viewed.post(CDS, json=cds_call(fhir_observation())).get_json()["cards"]
    (other,) = viewed.post(CDS, json=cds_call(fhir_observation())).get_json()["cards"]
    useless = cds_call(lab("2345-7", 5.5, "furlong"), encounterId="e1")
    (unanswered,) = viewed.post(CDS, json=useless).get_json()["cards"]
    ours = {"reason": card["overrideReasons"][0], "userComment": "Mrs Smith is on antibiotics"}
    theirs = {"reason": {"system": "http://a.org", "code": "Smith", "display": "Smith knows"}}

    def send(answer, status=200):
        answered = viewed.post(f"{CDS}/feedback", json=answer)
        assert answered.status_code == status
        return answered

    send(answer_to(card, minute=20, overrideReason=ours))
    send(answer_to(card, "accepted", minute=10))  # an earlier answer that comes later
    send({"feedback": [*answer_to(other, overrideReason=theirs)["feedback"], *answer_to({"uuid": "x"})["feedback"]]})
    for bad in ([], {"feedback": []}, answer_to(card, "ignored"), answer_to(card, outcomeTimestamp="today")):
        assert "feedback" in send(bad, 400).get_json()["detail"]
    log_db = sqlite3.connect(tmp_path / "log.db")
    one, two, three = log_db.execute("select card, outcome, reason from cards order by id")
    assert one == (card["uuid"], "overridden", "treated") and two[1:] == ("overridden", "other")
    assert three == (unanswered["uuid"], None, None)
    of_cards, of_scores = (set(log_db.execute(f"select visit from {table}")) for table in ("cards", "predictions"))
    assert of_cards == of_scores and len(of_cards) == 1
    assert 'sepsis_card_answers_total{outcome="unknown card"}' in viewed.get("/metrics").get_data(as_text=True)
    everything = (tmp_path / "log.db").read_bytes() + (tmp_path / "audit.jsonl").read_bytes()
    assert b"Smith" not in everything
    page = tmp_path / "report.html"
    options = ["report", "--monitor", f"sqlite:///{tmp_path}/log.db", "--config", str(config_path), "--html", str(page)]
    assert monitor.main(options) == 0
    text = page.read_text()
    assert "Cards and their answers" in text and "1 treated, 1 other" in text


def test_cds_feedback_that_cannot_be_stored_is_to_be_sent_again(viewed, monkeypatch):
    (card,) = viewed.post(CDS, json=cds_call(fhir_observation())).get_json()["cards"]
    monkeypatch.setattr(PredictionLog, "record_answers", lambda *_: None)
    answer = viewed.post(f"{CDS}/feedback", json=answer_to(card))
    assert answer.status_code == 503 and "Retry-After" in answer.headers


@pytest.fixture
def ehr():
    """A FHIR server as far as a CDS Hooks call asks it: searches in two pages, with a token."""
    asked, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization"), self.headers.get("Accept")))
            status, body = answers.get(self.path.partition("?")[0], (404, {}))
            if callable(body):
                body = body(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/fhir", answers, asked
        server.shutdown()


def test_cds_what_the_prefetch_lacks_is_fetched_with_the_calls_token(make_client, ehr, tmp_path):
    base, answers, asked = ehr
    client = make_client(fhir_servers=f"https://other.example.org/fhir, {base}/")
    client.application.service.clock = NOW.timestamp
    vitals = at("2024-07-02T08:00:00Z"), at("2024-07-02T07:00:00Z", id="earlier")

    def page(path):
        if "laboratory" in path:
            return bundle_of()
        n = int("page=2" in path)
        links = [{"relation": "next", "url": f"{base}/Observation?page=2"}] if not n else []
        return {**bundle_of(), "entry": bundle_of(*vitals)["entry"][n : n + 1], "link": links}

    answers["/fhir/Observation"] = (200, page)
    patient = {"resourceType": "Patient", "id": "example", "birthDate": "1950-01-01"}
    answers["/fhir/Patient/example"] = (200, patient)
    authorization = {"access_token": "secret-of-the-ehr", "token_type": "Bearer", "expires_in": 300, "scope": "x"}
    call = {**cds_call(), "fhirServer": base, "fhirAuthorization": authorization}
    del call["prefetch"]
    (fetched,) = client.post(CDS, json=call).get_json()["cards"]
    sent_call = cds_call(*vitals)
    sent_call["prefetch"]["patient"] = patient
    (sent,) = client.post(CDS, json=sent_call).get_json()["cards"]
    assert fetched["summary"] == sent["summary"] and fetched["detail"] == sent["detail"]
    paths = [path.partition("?")[0] for path, _, _ in asked]
    assert sorted(paths) == ["/fhir/Observation"] * 3 + ["/fhir/Patient/example"]
    assert {tuple(given) for _, *given in asked} == {("Bearer secret-of-the-ehr", "application/fhir+json")}

    def refused(said, **changes):
        answer = client.post(CDS, json={**call, **changes})
        assert answer.status_code == 412 and said in answer.get_json()["detail"]

    n = len(asked)
    refused("not on this service's list", fhirServer="https://evil.example.org/fhir")
    refused("no fhirAuthorization", fhirAuthorization=None)
    refused("laboratory", fhirServer=None, prefetch={"vitals": bundle_of(*vitals)})
    assert len(asked) == n
    assert client.post(CDS, json={**call, "context": {"patientId": "../Patient"}}).status_code == 400
    answers["/fhir/Observation"] = (401, {})
    refused("answers 401")
    elsewhere = {**bundle_of(), "link": [{"relation": "next", "url": "http://evil.example.org/next"}]}
    answers["/fhir/Observation"] = (200, elsewhere)
    refused("another server")
    kept = (tmp_path / "access.jsonl").read_text() + (tmp_path / "audit.jsonl").read_text()
    assert "secret-of-the-ehr" not in kept


def test_cds_a_slow_fhir_server_keeps_nobody_else_waiting(make_client, monkeypatch):
    """Calls that wait for it are few, and end in time; others are scored meanwhile."""
    monkeypatch.setattr(fetching, "SECONDS", 0.5)
    monkeypatch.setattr(fetching, "_lane", threading.Semaphore(1))
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it accepts and says nothing
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = make_client(fhir_servers=base)
        call = {**cds_call(), "prefetch": {}, "fhirServer": base, "fhirAuthorization": {"access_token": "x"}}
        ask = lambda: client.application.test_client().post(CDS, json=call)  # noqa: E731
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(ask)
            until(lambda: not fetching._lane._value, "the call waits for the FHIR server")
            assert client.post(PREDICT, json=EXAMPLE).status_code == 200
            assert slow.result(60).status_code == 412
        fetching._lane.acquire()
        busy = ask()
        assert busy.status_code == 503 and "Retry-After" in busy.headers


# ----------------------------------------------------------------------------- CDS Hooks: trust, other origins

AUDIENCE = "https://risk.example.org/cds-services/sepsis-risk"


@pytest.fixture(scope="module")
def signers():
    return {"ES384": ec.generate_private_key(ec.SECP384R1()), "RS384": rsa.generate_private_key(65537, 2048)}


def jwk_of(key, kid):
    kind = jwt.algorithms.ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else jwt.algorithms.RSAAlgorithm
    return {**json.loads(kind.to_jwk(key.public_key())), "kid": kid, "use": "sig"}


@pytest.fixture
def trusting(make_client, signers, tmp_path):
    """A service that trusts one EHR with two keys; and the tokens that this EHR signs."""
    keys = [jwk_of(key, name) for name, key in signers.items()]
    clients = {"audience": [AUDIENCE], "clients": [{"iss": "https://ehr.example.org", "keys": keys, "tenant": "north"}]}
    (tmp_path / "clients.json").write_text(json.dumps(clients))
    client = make_client(cds_clients=str(tmp_path / "clients.json"), insecure=False)
    client.application.service.clock = NOW.timestamp

    def token(alg="ES384", key=None, kid=None, headers=(), **claims):
        now = int(time.time())
        given = {
            "iss": "https://ehr.example.org",
            "aud": AUDIENCE,
            "iat": now,
            "exp": now + 300,
            "jti": str(uuid.uuid4()),
        }
        given = {name: value for name, value in (given | claims).items() if value is not None}
        key = signers[alg] if key is None else key
        return jwt.encode(given, key, alg, headers={"kid": kid or alg, **dict(headers)})

    def post(given, path=CDS):
        headers = {"Authorization": f"Bearer {given}"}
        return client.post(path, json=cds_call(fhir_observation()), headers=headers, environ_base=AFAR)

    return token, post


@pytest.mark.parametrize("alg", ["ES384", "RS384"])
def test_a_signed_cds_call_is_answered_once(trusting, alg, tmp_path):
    token, post = trusting
    signed = token(alg)
    answer = post(signed)
    assert answer.status_code == 200 and len(answer.get_json()["cards"]) == 1
    again = post(signed)
    assert again.status_code == 401 and "used before" in again.get_json()["detail"]
    assert lines_of(tmp_path / "audit.jsonl")[0]["client"] == "cds:north"
    assert post(token(alg), "/predict").status_code == 401  # it opens nothing else
    assert signed not in (tmp_path / "access.jsonl").read_text() + (tmp_path / "audit.jsonl").read_text()


def test_cds_tokens_that_are_not_to_be_trusted_are_refused(trusting, signers):
    token, post = trusting
    now, public = int(time.time()), signers["RS384"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def unsigned(alg, key):
        """Made by hand: the library would not."""
        head, body = (
            base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
            for part in (
                {"alg": alg, "typ": "JWT", "kid": "RS384"},
                {"iss": "https://ehr.example.org", "aud": AUDIENCE, "iat": now, "exp": now + 300, "jti": "x"},
            )
        )
        signature = hmac.digest(key, head + b"." + body, "sha256") if key else b""
        return b".".join([head, body, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()

    head, body, signature = token().split(".")
    refused = {
        "forged": (token(key=ec.generate_private_key(ec.SECP384R1())), "signature"),
        "changed": (f"{head}.{body[:-4]}AAAA.{signature}", "JSON Web Token"),
        "expired": (token(iat=now - 500, exp=now - 200), "expired"),
        "of tomorrow": (token(iat=now + 3600, exp=now + 3900), "not valid yet"),
        "for ever": (token(exp=now + 10**6), "more than 600 s"),
        "another audience": (token(aud="https://elsewhere.example.org"), "audience"),
        "another issuer": (token(iss="https://evil.example.org"), "list of allowed"),
        "without an id": (token(jti=None), "lacks"),
        "of an unknown key": (token(kid="other"), "key set"),
        "its own key set": (token(headers={"jku": "https://evil.example.org/jwks"}, kid="other"), "key set"),
        "none": (unsigned("none", b""), "algorithm"),
        "the public key as a secret": (unsigned("HS256", pem), "algorithm"),
        "the other algorithm": (token("RS384", kid="ES384"), "algorithm"),
        "dots": ("a.b.c", "JSON Web Token"),
    }
    for name, (wrong, said) in refused.items():
        answer = post(wrong)
        assert answer.status_code == 401, name
        assert said in answer.get_json()["detail"], name
        assert answer.headers["WWW-Authenticate"] == "Bearer" and wrong not in answer.get_data(as_text=True)


def test_key_sets_are_fetched_kept_and_rotated(signers, tmp_path, monkeypatch):
    now, served, asked = [1000.0], {"keys": [jwk_of(signers["ES384"], "first")]}, []

    def fetch(url):
        asked.append(url)
        if served is None:
            raise OSError("the server is away")
        return served

    monkeypatch.setattr(trust, "fetch", fetch)
    monkeypatch.setattr(trust.time, "monotonic", lambda: now[0])
    issuer = {"iss": "https://ehr.example.org", "jku": "https://ehr.example.org/jwks"}
    (tmp_path / "clients.json").write_text(json.dumps({"audience": [AUDIENCE], "clients": [issuer]}))
    client = trust.Clients(str(tmp_path / "clients.json"), lambda _: False).clients[issuer["iss"]]
    assert client.key("first", now[0]) and client.key("first", now[0]) and len(asked) == 1
    assert client.key("second", now[0]) is None and len(asked) == 1  # asked for just now
    served = {"keys": [jwk_of(signers["RS384"], "second")]}
    now[0] += trust.ASK_SECONDS + 1
    assert client.key("second", now[0]) and client.key("first", now[0]) is None and len(asked) == 2
    served = None
    now[0] += trust.KEYS_SECONDS + 1
    assert client.key("second", now[0]) and len(asked) == 3  # the kept set serves while the issuer's server is away
    now[0] += trust.OLDEST_KEYS
    assert client.key("second", now[0]) is None


def test_a_key_set_that_comes_slowly_is_given_up(monkeypatch):
    """A byte now and then, without end."""
    monkeypatch.setattr(trust, "FETCH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{")
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.01)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(OSError, match="too slowly"):
            trust.fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join(60)
        assert not thread.is_alive()


ONE = '{"audience": ["x"], "clients": [{"iss": "a", %s}]}'


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"audience": [], "clients": []}',
        ONE % '"x": 1',
        ONE % '"jku": "http://a.org/jwks"',
        ONE % '"keys": [{"kty": "oct", "kid": "1", "k": "AAAA"}]',
    ],
)
def test_a_list_of_cds_clients_that_cannot_be_is_refused(make_client, tmp_path, text):
    (tmp_path / "clients.json").write_text(text)
    with pytest.raises(BadConfig, match="SEPSIS_CDS_CLIENTS"):
        make_client(cds_clients=str(tmp_path / "clients.json"))


def test_browsers_of_allowed_origins_may_ask_cds_hooks(make_client):
    client = make_client(cors_origins="https://ehr.example.org, https://other.example.org", insecure=False)
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    for origin, allowed in (("https://ehr.example.org", True), ("https://evil.example.org", False)):
        answer = client.options(CDS, headers={"Origin": origin, **asks})
        assert answer.status_code == 200
        assert answer.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        assert ("Authorization" in answer.headers.get("Access-Control-Allow-Headers", "")) is allowed
        discovery = client.get("/cds-services", headers={"Origin": origin})
        assert discovery.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        assert "Origin" in discovery.headers["Vary"]
        assert client.post(CDS, json={}, headers={"Origin": origin}).status_code == 401  # it still has to say who it is
    assert (
        "Access-Control-Allow-Origin" not in client.get("/model", headers={"Origin": "https://ehr.example.org"}).headers
    )


# ------------------------------------------------------------------------------------- evidence and moments

VITALS = {"8867-4": (124, "/min"), "9279-1": (29, "/min"), "8480-6": (84, "mm[Hg]"), "8310-5": (39.2, "Cel")}


@pytest.fixture
def strict(models_dir, tmp_path, make_client):
    """A service whose model needs three of four vital signs, none of them older than 8 h."""
    config, model = model_with(models_dir, tmp_path / "strict", MINIMUM)
    client = make_client(config=str(config), model=str(model))
    client.application.service.clock = NOW.timestamp
    return client


def vital(code, time="2024-07-02T09:00:00Z", **changes):
    value, unit = VITALS[code]
    return {**lab(code, value, unit), "id": f"v{code}", "effectiveDateTime": time, **changes}


def rows_of(*resources):
    """The same as rows of a table."""
    return [
        {
            **plain(r["code"]["coding"][0]["code"], r["valueQuantity"]["value"], time=r["effectiveDateTime"]),
            "unit": r["valueQuantity"]["unit"],
        }
        for r in resources
    ]


def answers_of(client, *resources):
    """(the prediction, the RiskAssessment, the card) of the same observations."""
    prediction = client.post("/predict?explain=3", json=rows_of(*resources)).get_json()["predictions"][0]
    assessment = client.post("/fhir/predict", json=bundle_of(*resources)).get_json()["entry"][0]["resource"]
    (card,) = client.post(CDS, json=cds_call(*resources)).get_json()["cards"]
    return prediction, assessment, card


HEIGHT = {"code": {"coding": [{"system": LOINC, "code": "8302-2"}]}, "valueQuantity": {"value": 180, "unit": "cm"}}


@pytest.mark.parametrize(
    ("resources", "reason", "missing", "said"),
    [
        ([{**vital("8867-4"), **HEIGHT}], "insufficient_evidence", 4, "too little"),
        ([vital("8867-4"), vital("8480-6")], "insufficient_evidence", 2, "missing: respiratory rate, temperature"),
        ([vital(code, "2024-07-02T01:00:00Z") for code in VITALS], "stale", 0, "8 h old"),
        ([vital(code, "2017-07-02T09:00:00Z") for code in VITALS], "stale", 0, "2,557 days old"),
        ([vital(code, "2024-07-04T09:00:00Z") for code in VITALS], "nothing_usable", 0, "no observation can be used"),
    ],
    ids=["height alone", "two vital signs", "of last night", "seven years old", "from the future"],
)
def test_without_enough_evidence_no_route_gives_a_number(strict, resources, reason, missing, said, tmp_path):
    prediction, assessment, card = answers_of(strict, *resources)
    assert (prediction["risk_level"], prediction["sepsis_probability"]) == ("UNKNOWN", None)
    assert (prediction["reason"], len(prediction["missing"])) == (reason, missing) and prediction["reasons"] == []
    assert "prediction" not in assessment and reason in assessment["note"][0]["text"]
    assert said in assessment["note"][0]["text"]
    assert "UNKNOWN" in card["summary"] and said in card["detail"] and card["indicator"] == "info"
    assert "does not mean that it is low" in card["detail"] and "%" not in card["summary"]
    logged = sqlite3.connect(tmp_path / "log.db").execute("select risk_level, reason, score from predictions")
    assert set(logged) == {("UNKNOWN", reason, None)}
    assert f'sepsis_unknown_risk_total{{reason="{reason}"}}' in strict.get("/metrics").get_data(as_text=True)


def test_the_same_quantities_in_other_codes_and_units_give_the_same_number(strict, pipeline):
    """A shock: oximeter's heart rate, invasive pressure, oral temperature in Fahrenheit."""
    others = {"8867-4": ("8889-8", 124, "{beats}/min"), "8480-6": ("76215-3", 11.199022, "kPa")}
    others["8310-5"] = ("8331-1", 102.56, "[degF]")
    usual = [vital(code) for code in VITALS]
    foreign = [{**lab(*others[code]), "effectiveDateTime": "2024-07-02T09:00:00Z"} for code in others]
    foreign.append(vital("9279-1"))
    expected = pipeline.predict(rows_of(*usual), as_of=NOW)["sepsis_probability"].item()
    for resources in (usual, foreign):
        prediction, assessment, card = answers_of(strict, *resources)
        assert prediction["sepsis_probability"] == pytest.approx(expected, rel=1e-9)
        assert assessment["prediction"][0]["probabilityDecimal"] == prediction["sepsis_probability"]
        assert prediction["risk_level"] in card["summary"]
        assert prediction["num_observations"] == len(assessment["basis"]) == 4


def every_spelling(pipeline):
    """(code, value, unit, the model's code, its value) of every code and unit of every concept that the model uses."""
    codes = pipeline.reproducer.codes
    for concept in CONCEPTS:
        own = codes.own_code(concept.name)
        if concept.static or not pipeline.reproducer.is_used(own) or concept.unit in ("code", "0/1"):
            continue
        low, high = max(concept.low, 0.0), concept.high
        value = round(low + 0.37 * (min(high, 200) - low), 3)
        named = [*concept.units, Unit(concept.unit)]
        for default, listed_codes in ((concept.unit, concept.codes), *concept.coded_in.items()):
            for code in map(str.strip, listed_codes.split(",")):
                if not re.fullmatch(r"\d+-\d", code):
                    continue  # a table's names are the reader's business
                for unit in named:
                    sent = (value - unit.offset) / unit.factor
                    yield code, sent, unit.spellings.partition(",")[0], own, value
                if default == concept.unit:
                    yield code, value, None, own, value
                else:
                    other = concept.unit_named(default)
                    yield code, (value - other.offset) / other.factor, None, own, value


def test_every_code_and_unit_of_every_concept_gives_the_number_of_the_models_own(client, pipeline):
    spellings = list(every_spelling(pipeline))
    assert len(spellings) > 100
    rows, resources, own = [], [], []
    for i, (code, value, unit, own_code, own_value) in enumerate(spellings):
        rows.append({**plain(code, value), "visit_id": f"v{i}", "unit": unit})
        own.append({**plain(own_code, own_value), "visit_id": f"v{i}"})
        quantity = {"value": value, **({"unit": unit} if unit else {})}
        resources.append(
            fhir_observation(
                code={"coding": [{"system": LOINC, "code": code}]},
                encounter={"reference": f"Encounter/v{i}"},
                valueQuantity=quantity,
                referenceRange=[],
            )
        )
        del resources[-1]["referenceRange"]
    expected = pipeline.predict(own)["sepsis_probability"].to_numpy()
    answer = client.post(PREDICT, json=rows).get_json()
    assert answer["unused_codes"] == {} and not answer["set_aside"]["reasons"]
    found = [p["sepsis_probability"] for p in answer["predictions"]]
    assert found == pytest.approx(expected, rel=1e-6)
    entries = client.post(FHIR, json=bundle_of(*resources)).get_json()["entry"]
    of_fhir = [e["resource"]["prediction"][0]["probabilityDecimal"] for e in entries if "prediction" in e["resource"]]
    assert of_fhir == pytest.approx(expected, rel=1e-6)


def test_what_the_model_does_not_use_is_named_and_is_no_evidence(strict):
    used, height = [vital(code) for code in VITALS], {**vital("8867-4"), **HEIGHT}
    note = {**height, "code": {"coding": [{"system": "http://example.org/codes", "code": "8867-4"}]}}
    body = strict.post("/predict", json=rows_of(*used, height, {**height, "effectiveDateTime": "2024-07-02T08:00Z"}))
    assert (
        body.get_json()["unused_codes"] == {"8302-2": 2} and body.get_json()["predictions"][0]["num_observations"] == 4
    )
    entries = strict.post("/fhir/predict", json=bundle_of(*used, height, note)).get_json()["entry"]
    assert [b["reference"] for b in entries[0]["resource"]["basis"]] == [f"urn:uuid:{i}" for i in range(4)]
    told = " ".join(issue["diagnostics"] for issue in entries[1]["resource"]["issue"])
    assert "'8302-2' (1 row)" in told and "'http://example.org/codes|8867-4' (1 row)" in told
    (card,) = strict.post(CDS, json=cds_call(*used, height)).get_json()["cards"]
    assert "The model does not look at: 8302-2." in card["detail"]
    assert "sepsis_unused_observations_total" in strict.get("/metrics").get_data(as_text=True)


def test_a_row_from_the_future_changes_no_number_and_is_named(strict):
    used = [vital(code) for code in VITALS]
    late = {**vital("8867-4", "2024-07-04T09:30:00Z"), **HEIGHT, "id": "late"}
    for before, after in zip(answers_of(strict, *used), answers_of(strict, *used, late), strict=True):
        for told in (before, after):
            for name in ("uuid", "id", "detail"):
                told.pop(name, None)
        assert before == after
    (reason,) = strict.post("/predict", json=rows_of(*used, late)).get_json()["set_aside"]["reasons"]
    assert (reason["reason"], reason["count"], reason["first_rows"]) == ("future", 1, [4])
    (card,) = strict.post(CDS, json=cds_call(*used, late)).get_json()["cards"]
    assert "later than now" in card["detail"]
    soon = vital("8867-4", "2024-07-02T09:34:00Z")  # clocks differ
    assert not strict.post("/predict", json=rows_of(*used, soon)).get_json()["set_aside"]["reasons"]


def test_live_answers_are_of_now_and_past_stays_of_the_moment_that_is_asked_for(strict, pipeline):
    used = [vital(code) for code in VITALS]
    predicted = {}
    for query in ("", "?as_of=now", "?as_of=last", "?as_of=2024-07-02T12:00:00Z"):
        (prediction,) = strict.post(f"/predict{query}", json=rows_of(*used)).get_json()["predictions"]
        predicted[query] = prediction["as_of"], prediction["hours_since_newest"]
        own = strict.post(f"/fhir/predict{query}", json=bundle_of(*used)).get_json()["entry"][0]["resource"]
        assert own["occurrenceDateTime"] == prediction["as_of"]
        assert own["prediction"][0]["probabilityDecimal"] == prediction["sepsis_probability"]
        assert prediction["newest_observation"] == "2024-07-02T09:00:00Z" in own["note"][0]["text"]
    assert predicted[""] == predicted["?as_of=now"] == ("2024-07-02T09:30:00Z", 0.5)
    assert predicted["?as_of=last"] == ("2024-07-02T09:00:00Z", 0)
    assert predicted["?as_of=2024-07-02T12:00:00Z"] == ("2024-07-02T12:00:00Z", 3)
    for query in ("?as_of=yesterday", "?as_of=2400-01-01"):
        assert strict.post(f"/predict{query}", json=rows_of(*used)).status_code == 422
        assert strict.post(f"/fhir/predict{query}", json=bundle_of(*used)).status_code == 422


def test_a_clock_slightly_ahead_moves_its_own_visit_only(strict, pipeline):
    used = [vital(code, "2024-07-02T09:33:00Z") for code in VITALS]
    others = [{**row, "visit_id": "e2", "observation_date": "2024-07-02T09:00:00Z"} for row in rows_of(*used)]
    one, two = strict.post("/predict?explain=2", json=rows_of(*used) + others).get_json()["predictions"]
    assert (one["as_of"], one["hours_since_newest"]) == ("2024-07-02T09:33:00Z", 0)
    assert (two["as_of"], two["hours_since_newest"]) == ("2024-07-02T09:30:00Z", 0.5)
    expected = pipeline.explain(others, top=2, as_of=NOW)["contribution"].tolist()
    assert [reason["contribution"] for reason in two["reasons"]] == expected and len(one["reasons"]) == 2


def test_a_trajectory_tells_where_the_risk_was_unknown(strict):
    times = [f"2024-07-02T0{hour}:00:00Z" for hour in (1, 2)]
    used = [vital("8867-4", times[0]), *(vital(code, times[1]) for code in VITALS)]
    (prediction,) = strict.post("/predict?trajectory=9", json=rows_of(*used)).get_json()["predictions"]
    assert [(p["as_of"], p["reason"]) for p in prediction["trajectory"]] == [
        (times[0], "insufficient_evidence"),
        (times[1], None),
        ("2024-07-02T09:30:00Z", None),
    ]


def test_series_are_the_observations_as_the_model_reads_them(strict):
    rows = [plain("8889-8", 90), {**plain("Temp", 100.4), "unit": "[degF]"}, plain("blood pressure", "120/80")]
    rows += [plain("8302-2", 180), {**plain("HR", 80, 60, 100), "observation_date": "2024-07-02T07:00:00Z"}]
    (prediction,) = strict.post("/predict?series=1", json=rows).get_json()["predictions"]
    series = {own["code"]: own for own in prediction["series"]}
    assert (series["HR"]["name"], series["HR"]["unit"], series["HR"]["used"]) == ("heart rate", "/min", True)
    assert series["HR"]["points"] == [
        ["2024-07-02T07:00:00Z", 80, 60, 100],
        ["2024-07-02T08:00:00Z", 90, None, None],
    ]
    assert series["Temp"]["points"][0][1] == 38 and series["8302-2"]["used"] is False
    assert {own["name"] for own in prediction["series"]} >= {"systolic blood pressure", "diastolic blood pressure"}


def test_a_site_map_of_codes_takes_effect_without_a_new_search(make_client, pipeline, tmp_path):
    site = tmp_path / "codes.csv"
    site.write_text("code,concept,unit\nPO-SAT,spo2,\nTEMPERATUR,temperature,[degF]\n")
    rows = [plain("PO-SAT", 71), plain("TEMPERATUR", 102.2), plain("HR", 120)]
    own = [plain("O2Sat", 71), plain("Temp", 39), plain("HR", 120)]
    without = make_client().post(PREDICT, json=rows).get_json()
    assert without["unused_codes"] == {"PO-SAT": 1, "TEMPERATUR": 1}
    client = make_client(codes=str(site))
    answer = client.post(PREDICT, json=rows).get_json()
    expected = pipeline.predict(own)["sepsis_probability"].item()
    assert answer["predictions"][0]["sepsis_probability"] == pytest.approx(expected, rel=1e-9)
    assert answer["unused_codes"] == {}
    digests = (
        sqlite3.connect(tmp_path / "log.db").execute("select codes_sha256 from predictions order by id").fetchall()
    )
    assert digests[0] == (None,) and digests[1][0]
    assert client.get("/model").get_json()["site_codes"] == {
        "PO-SAT": ["spo2", ""],
        "TEMPERATUR": ["temperature", "[degF]"],
    }


def test_a_site_map_that_contradicts_the_training_is_refused(make_client, tmp_path):
    (tmp_path / "codes.csv").write_text("code,concept\nHR,temperature\n")
    assert make_client(codes=str(tmp_path / "codes.csv")).get("/ready").status_code == 503


# ------------------------------------------------------------------------- FHIR: versions, people, what is said


def basis_of(client, bundle):
    entries = client.post(FHIR, json=bundle).get_json()["entry"]
    told = " ".join(i["diagnostics"] for e in entries for i in e["resource"].get("issue", []))
    return [b["reference"] for b in entries[0]["resource"].get("basis", [])], told


def test_fhir_a_newer_version_replaces_the_older(client, pipeline):
    def version(value, number, **changes):
        return {**lab("8867-4", value, "/min"), "meta": {"versionId": str(number)}, **changes}

    url = "http://a.org/fhir/Observation/heart-rate"
    for versions in ([version(70, 1), version(170, 2)], [version(170, 10), version(70, 9)]):
        bundle = bundle_of(*versions)
        for entry, more in zip(bundle["entry"], ("", "/_history/2"), strict=True):
            entry["fullUrl"] = url + more
        entries = client.post(FHIR, json=bundle).get_json()["entry"]
        expected = pipeline.predict([plain("HR", 170, 60, 100)])["sepsis_probability"].item()
        assert entries[0]["resource"]["prediction"][0]["probabilityDecimal"] == expected
        assert "a newer version" in basis_of(client, bundle)[1]
    bundle["entry"][0]["resource"]["status"] = "entered-in-error"  # the newest withdraws them all
    assert client.post(FHIR, json=bundle).status_code == 422
    bundle["entry"].append(bundle_of(fhir_observation(id="another"))["entry"][0])
    references, told = basis_of(client, bundle)
    assert references == ["urn:uuid:0"] and "its status says" in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"implicitRules": "http://example.org/rules"}, "implicitRules"),
        ({"modifierExtension": [{"url": "http://example.org/not", "valueBoolean": True}]}, "modifierExtension"),
        ({"focus": [{"reference": "Patient/donor"}]}, "about another one"),
    ],
)
def test_fhir_what_may_change_the_meaning_sets_a_resource_aside(client, changes, said):
    references, told = basis_of(client, bundle_of(fhir_observation(**changes), fhir_observation()))
    assert references == ["urn:uuid:1"] and said in told
    panel = blood_pressure()
    if "modifierExtension" in changes:
        panel["component"][0] |= changes
        assert said in basis_of(client, bundle_of(panel, fhir_observation()))[1]
    bundle = {**bundle_of(fhir_observation()), "implicitRules": "http://example.org/rules"}
    assert client.post(FHIR, json=bundle).status_code == 422


def test_fhir_a_code_counts_with_its_system(client, pipeline):
    """A hospital's own number that looks like LOINC's is no LOINC code, its own code of the model is."""
    alike = fhir_observation(code={"coding": [{"system": "http://a.org/codes", "code": "8867-4"}]})
    own = fhir_observation(code={"coding": [{"system": "http://a.org/codes", "code": "HR"}]})
    entries = client.post(FHIR, json=bundle_of(alike, lab("8310-5", 38, "Cel"))).get_json()["entry"]
    assert [b["reference"] for b in entries[0]["resource"]["basis"]] == ["urn:uuid:1"]
    expected = pipeline.predict([plain("HR", 104.5, 60, 100)])["sepsis_probability"].item()
    entries = client.post(FHIR, json=bundle_of(own)).get_json()["entry"]
    assert entries[0]["resource"]["prediction"][0]["probabilityDecimal"] == expected


@pytest.mark.parametrize("url", ["urn:uuid:p", "http://a.org/fhir/Patient/example", None])
def test_fhir_a_patients_age_and_sex_are_used(client, pipeline, url):
    person = {"resourceType": "Patient", "id": "example", "birthDate": "1950-07-03", "gender": "male"}
    bundle = bundle_of(fhir_observation(), person)
    bundle["entry"][1]["fullUrl"] = url
    if url is None:
        del bundle["entry"][1]["fullUrl"]
    elif url.startswith("http"):
        bundle["entry"][0]["fullUrl"] = "http://a.org/fhir/Observation/heart-rate"
    assert {"Age", "Gender"} & set(pipeline.config.codes)
    rows = [plain("HR", 104.5, 60, 100), plain("Age", 73), plain("Gender", 1)]
    rows = [row for row in rows if pipeline.reproducer.is_used(row["observation_type_code"])]
    answer = client.post(FHIR, json=bundle).get_json()["entry"][0]["resource"]
    expected = pipeline.predict(rows)["sepsis_probability"].item()
    assert answer["prediction"][0]["probabilityDecimal"] == expected
    if pipeline.reproducer.is_used("Age"):
        assert {"reference": "Patient/example"} in answer["basis"]


def test_fhir_a_bundle_full_of_faults_is_told_in_short(client):
    bad = [fhir_observation(valueQuantity={"value": 1, "unit": "furlong"}) for _ in range(200)]
    (_, outcome) = client.post(FHIR, json=bundle_of(*bad, fhir_observation())).get_json()["entry"]
    issues = outcome["resource"]["issue"]
    assert len(issues) < 60 and any("200 not used in all" in issue["diagnostics"] for issue in issues)


def test_fhir_an_assessment_says_who_made_it_and_what_it_is(client, pipeline):
    entry, *_ = client.post(FHIR, json=bundle_of(fhir_observation())).get_json()["entry"]
    assessment = RiskAssessment.model_validate(entry["resource"])
    assert entry["fullUrl"] == f"urn:uuid:{assessment.id}" and assessment.performer.reference == "#model"
    (device,) = assessment.contained
    assert device.version[0].value == pipeline.model_version
    assert assessment.code.coding[0].code == "225338004"
    assert "Risk of sepsis" in assessment.text.div and "whenRange" not in entry["resource"]["prediction"][0]


def test_fhir_metadata_and_the_operation_that_it_names(client, pipeline):
    answer = client.get("/fhir/metadata")
    statement = CapabilityStatement.model_validate(answer.get_json())
    assert answer.mimetype == "application/fhir+json" and statement.fhirVersion == "4.0.1"
    expected = client.post(FHIR, json=bundle_of(fhir_observation())).get_json()["entry"][0]["resource"]["prediction"]
    for resource in statement.rest[0].resource:
        (operation,) = resource.operation
        path = operation.definition.removeprefix("http://localhost")
        definition = OperationDefinition.model_validate(client.get(path).get_json())
        assert definition.resource == ["Patient", "Encounter"] and definition.code == operation.name
        names = {parameter.name for parameter in definition.parameter if parameter.use == "in"}
        assert names == {"observations", "as-of"}
        parameters = [{"name": "observations", "resource": bundle_of(fhir_observation())}]
        parameters.append({"name": "as-of", "valueString": "last"})
        body = {"resourceType": "Parameters", "parameter": parameters}
        done = client.post(f"/fhir/{resource.type}/${operation.name}", json=body)
        assert done.get_json()["entry"][0]["resource"]["prediction"] == expected
        body["parameter"][1]["valueString"] = "yesterday"
        assert client.post(f"/fhir/{resource.type}/${operation.name}", json=body).status_code == 422
        assert (
            client.post(f"/fhir/{resource.type}/${operation.name}", json={**body, "parameter": {}}).status_code == 400
        )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Accept": "application/fhir+json; fhirVersion=4.0"}, 200),
        ({"Accept": "text/html, */*;q=0.1"}, 200),
        ({"Accept": "application/fhir+xml"}, 406),
        ({"Accept": "application/fhir+json; fhirVersion=5.0"}, 406),
        ({"Content-Type": "application/fhir+json; fhirVersion=3.0"}, 415),
    ],
)
def test_fhir_media_types_and_versions_are_honoured(client, headers, status):
    body, headers = json.dumps(bundle_of(fhir_observation())), {"Content-Type": "application/fhir+json", **headers}
    answer = client.post(FHIR, data=body, headers=headers)
    assert answer.status_code == status and answer.mimetype == "application/fhir+json"
    if status != 200:
        assert answer.get_json()["resourceType"] == "OperationOutcome"
    if status == 406:
        assert client.get("/fhir/metadata", headers=headers).status_code == 406


def test_fhir_further_pages_are_told(client):
    bundle = {**bundle_of(fhir_observation()), "link": [{"relation": "next", "url": "http://a.org/next"}]}
    assert "more observations than were sent" in basis_of(client, bundle)[1]


# --------------------------------------------------------------------------------------------- OpenAPI, metrics


def test_a_model_without_a_version_is_described(client, monkeypatch):
    pipeline = client.application.service.pipeline()
    monkeypatch.setattr(pipeline, "config", replace(pipeline.config, model_version=None))
    assert client.get("/model").get_json()["model_version"] == pipeline.model_version


TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_the_time_of_each_stage_is_measured(client):
    client.post(PREDICT, json=EXAMPLE)
    text = client.get("/metrics").get_data(as_text=True)
    for stage in ("queue", "reading", "features", "model", "logging"):
        count = re.search(rf'sepsis_stage_seconds_count{{stage="{stage}"}} ([0-9.]+)', text)
        assert float(count[1]) > 0


def test_a_callers_trace_is_taken_over_into_the_logs(client, tmp_path):
    client.post(PREDICT, json=EXAMPLE, headers={"traceparent": TRACEPARENT})
    for wrong in (
        "",
        "00-0-0-01",
        TRACEPARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        f"{TRACEPARENT}-x",
    ):
        client.post(PREDICT, json=EXAMPLE, headers={"traceparent": wrong})
    for name in ("access", "audit"):
        first, *others = lines_of(tmp_path / f"{name}.jsonl")
        assert (first["trace_id"], first["parent_id"]) == tuple(TRACEPARENT.split("-")[1:3])
        assert not any("trace_id" in line for line in others) and len(others) == 4


def test_spans_of_a_request_and_its_stages(make_client, monkeypatch):
    exported = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    monkeypatch.setattr(app_module, "otlp_provider", lambda: provider)
    client = make_client(otel=True, api_keys=new_key("ward")[1])
    wrong = {"X-API-Key": "sepsis_planted-key", "traceparent": TRACEPARENT}
    assert client.post(PREDICT, json=EXAMPLE, headers=wrong).status_code == 403
    client = make_client(otel=True)
    planted = [{**row, "client": "planted-Smith", "observation_value": 91.23456} for row in EXAMPLE]
    assert (
        client.post(f"{PREDICT}&planted=query", json=planted, headers={"traceparent": TRACEPARENT}).status_code == 200
    )
    assert client.post("/predict", data="planted-body", content_type="application/json").status_code == 400
    spans = exported.get_finished_spans()
    requests = [span for span in spans if span.name == "POST /predict"]
    assert [span.attributes["http.response.status_code"] for span in requests] == [403, 200, 400]
    assert f"{requests[1].context.trace_id:032x}" == TRACEPARENT.split("-")[1]
    assert f"{requests[1].parent.span_id:016x}" == TRACEPARENT.split("-")[2]
    own = [span.name for span in spans if span.parent and span.parent.span_id == requests[1].context.span_id]
    assert {"queue", "reading", "features", "model", "logging"} <= {*own}
    assert requests[2].context.trace_id != requests[1].context.trace_id
    everything = "".join(span.to_json() for span in spans)
    assert "planted" not in everything and "91.23456" not in everything


def test_metrics_count_what_was_answered(client):
    def count(name):
        text = client.get("/metrics").get_data(as_text=True)
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*?}})? (\S+)$", text, re.M))

    before = count("sepsis_predictions_total"), count("sepsis_score_count"), count("sepsis_rows_set_aside_total")
    client.post(PREDICT, json=[*EXAMPLE, {**EXAMPLE[0], "observation_value": ""}])
    after = count("sepsis_predictions_total"), count("sepsis_score_count"), count("sepsis_rows_set_aside_total")
    assert [b - a for a, b in zip(before, after, strict=True)] == [8, 8, 1]
    assert 'sepsis_model_info{version="' in client.get("/metrics").get_data(as_text=True)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            name: st.none() | st.text(max_size=8) | st.integers() | st.floats()
            for name in ("observation_value", "reference_range_min")
        }
        | {
            "visit_id": st.integers(0, 3) | st.text(max_size=3),
            "client": st.integers(0, 2) | st.text(max_size=3),
            "observation_date": st.datetimes().map(str) | st.text(max_size=10) | st.none(),
            "observation_type_code": st.sampled_from(["HR", "Temp", "NA", "X", ""]),
        }
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS)
def test_whatever_the_rows_hold_the_answer_is_scores_or_one_clear_error(make_client, rows):
    global _fuzzed
    _fuzzed = _fuzzed or make_client(access_log="", audit_log="", monitor_url="off")
    answer = _fuzzed.post("/predict", data=json.dumps(rows), content_type="application/json")
    assert answer.status_code in (200, 400, 422)
    if answer.status_code == 200:
        named = {(str(r["client"]).strip(), str(r["visit_id"]).strip()) for r in rows}
        shown = {(str(p["client"]).strip(), str(p["visit_id"]).strip()) for p in answer.get_json()["predictions"]}
        assert shown == {(client, visit) for client, visit in named if client and visit}


_fuzzed = None


def test_the_openapi_document_holds_for_whatever_is_sent(make_client):
    """Schemathesis makes requests from the document, right and wrong ones; answers are as documented, none is 5xx."""
    client = make_client(insecure=True, access_log="", audit_log="", monitor_url="off")
    client.get("/ready")
    schema = schemathesis.openapi.from_wsgi("/openapi.json", client.application)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    tried = 0
    for operation in schema.get_all_operations():

        @settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def check(case):
            nonlocal tried
            tried += 1
            case.call_and_validate(checks=checks)

        check()
    assert tried > 60


def test_fhir_a_ucum_code_counts_with_its_case(client):
    for code, used in (("mmol/L", True), ("mmol/l", True), ("Mmol/L", False), ("MMOL/L", False)):
        answer = client.post(FHIR, json=bundle_of(fhir_observation(), lab("2345-7", 5.5, code))).get_json()
        told = json.dumps([entry["resource"].get("issue") for entry in answer["entry"]])
        assert ("its unit cannot be converted" in told) is not used


def test_a_unit_code_without_its_system_is_a_unit(strict):
    mass, amount = lab("3094-0", 44.816, "mg/dL"), lab("3094-0", 16, "mmol/L")
    del amount["valueQuantity"]["system"], amount["valueQuantity"]["unit"]
    amount["valueQuantity"]["code"] = "mmol/L"
    answers = [
        strict.post("/fhir/predict", json=bundle_of(*map(vital, VITALS), urea)).get_json()["entry"][0]["resource"]
        for urea in (mass, amount)
    ]
    one, other = (answer["prediction"][0]["probabilityDecimal"] for answer in answers)
    assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("turned", [False, True])
def test_a_version_without_a_date_replaces_by_its_number(strict, turned):
    first = vital("8867-4", meta={"versionId": "1", "lastUpdated": "2024-07-02T09:01:00Z"})
    withdrawn = {**first, "status": "entered-in-error", "meta": {"versionId": "2"}}
    versions = [withdrawn, first] if turned else [first, withdrawn]
    bundle = bundle_of(*versions, vital("8480-6"), vital("9279-1"))
    for entry in bundle["entry"]:
        del entry["fullUrl"]
    assessment = strict.post("/fhir/predict", json=bundle).get_json()["entry"][0]["resource"]
    assert "prediction" not in assessment and "heart rate" in assessment["note"][0]["text"]


def test_an_observation_of_tomorrow_does_not_choose_the_visit(strict):
    now = [vital(code, encounter={"reference": "Encounter/1"}) for code in VITALS]
    tomorrow = vital("8867-4", "2024-07-03T09:00:00Z", id="t", encounter={"reference": "Encounter/2"})
    call = cds_call(*now, tomorrow)
    call["context"].pop("encounterId", None)
    (card,) = strict.post(CDS, json=call).get_json()["cards"]
    (alone,) = strict.post(CDS, json={**call, "prefetch": prefetch_of(bundle_of(*now))}).get_json()["cards"]
    assert card["summary"] == alone["summary"] and "UNKNOWN" not in card["summary"]
