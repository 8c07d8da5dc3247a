"""Standards, by programs that are not ours: fhirclient, PyJWT, Chromium; and that docs/conformance.md names tests that
exist."""

import ast
import contextlib
import json
import re
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fhirclient import client as smart
from fhirclient.models.bundle import Bundle
from fhirclient.models.capabilitystatement import CapabilityStatement
from fhirclient.models.operationdefinition import OperationDefinition
from fhirclient.models.operationoutcome import OperationOutcome

from serving.api.trust import ASK_SECONDS, FETCH_SECONDS
from tests.test_api import AUDIENCE, CDS, VITALS, bundle_of, cds_call, jwk_of, vital
from tests.test_api_server import ROOT, Server, browser

__all__ = ["browser"]
TABLE = ROOT / "docs" / "conformance.md"
ISSUER = "https://ehr.example.org"


class Ehr:
    """An EHR: its key set over HTTP, and tokens that it signs."""

    def __init__(self, folder):
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP384R1())
        (folder / "jwks.json").write_text(json.dumps({"keys": [jwk_of(self.key, "one")]}))
        (folder / "page.html").write_text("<title>EHR</title>")
        quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder)))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def token(self, key=None, alg="ES384", headers=(), **claims):
        now = int(time.time())
        given = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 300, "jti": str(uuid.uuid4()), **claims}
        # not jwt.encode, which refuses to make some of the attacks
        return jwt.api_jws.encode(json.dumps(given).encode(), key or self.key, alg, {"kid": "one", **dict(headers)})


@pytest.fixture(scope="module")
def ehr(tmp_path_factory):
    made = Ehr(tmp_path_factory.mktemp("ehr"))
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def silent():
    """The port of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def service(ehr, silent, models_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    known = {"iss": ISSUER, "jku": f"http://127.0.0.1:{ehr.port}/jwks.json"}
    slow = {"iss": "https://slow.example.org", "jku": f"http://127.0.0.1:{silent}/jwks.json"}
    (folder / "clients.json").write_text(json.dumps({"audience": [AUDIENCE], "clients": [known, slow]}))
    settings = {"SEPSIS_CDS_CLIENTS": str(folder / "clients.json"), "SEPSIS_ACCESS_LOG": str(folder / "access.jsonl")}
    origins = {"SEPSIS_CORS_ORIGINS": f"http://localhost:{ehr.port}"}
    server = Server(folder, models_dir, **settings, **origins)
    yield server
    server.stop()


# ---------------------------------------------------------------------------------------------------- the table


def test_every_row_of_the_table_names_a_test_that_exists():
    cells = re.findall(r"^\| .* \|.*\| (.*) \|$", TABLE.read_text(), re.M)
    rows = [cell for cell in cells if cell != "test"]
    named = [name for row in rows for name in re.findall(r"`(test_[\w]+)`", row)]
    defined = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(rows) > 40 and all("`test_" in row for row in rows)
    assert {name for name in named if name not in defined} == set()


# ---------------------------------------------------------------------------------------------------- FHIR


def test_fhirclient_reads_what_the_service_says_of_itself(service):
    own = smart.FHIRClient({"app_id": "x", "api_base": f"http://127.0.0.1:{service.port}/fhir"}).server
    statement = own.request_json("metadata")
    known = CapabilityStatement(statement)  # raises for what R4 does not know
    assert known.fhirVersion == "4.0.1" and {r.type for r in known.rest[0].resource} == {"Patient", "Encounter"}
    definition = OperationDefinition(own.request_json("OperationDefinition/sepsis-risk"))
    assert definition.code == "sepsis-risk" and known.rest[0].resource[0].operation[0].definition == definition.url


def test_fhirclient_calls_the_operation_and_reads_its_answers(service):
    own = smart.FHIRClient({"app_id": "x", "api_base": f"http://127.0.0.1:{service.port}/fhir"}).server
    bundle = bundle_of(*(vital(code) for code in VITALS))
    parameters = {
        "resourceType": "Parameters",
        "parameter": [
            {"name": "observations", "resource": bundle},
            {"name": "as-of", "valueString": "2024-07-02T09:30:00Z"},
        ],
    }
    answer = Bundle(own.post_json("Encounter/$sepsis-risk", parameters).json())
    assessment = answer.entry[0].resource
    assert assessment.resource_type == "RiskAssessment" and assessment.subject.reference == "Patient/example"
    assert 0 < assessment.prediction[0].probabilityDecimal < 1
    assert assessment.contained[0].resource_type == "Device" and assessment.performer.reference == "#model"
    with pytest.raises(Exception, match="422") as refused:
        own.post_json("Patient/$sepsis-risk", {"resourceType": "Bundle", "type": "collection"})
    assert OperationOutcome(refused.value.response.json()).issue[0].severity == "error"


# ------------------------------------------------------------------------------------------------- CDS Hooks


def call_with(service, token, path=CDS):
    call = cds_call(*(vital(code) for code in VITALS))
    began = time.monotonic()
    status, text = service.request(path, json.dumps(call).encode(), Authorization=f"Bearer {token}")
    return status, json.loads(text), time.monotonic() - began


def test_a_call_signed_by_an_ehr_is_answered_once_by_all_workers(service, ehr):
    token = ehr.token()
    with ThreadPoolExecutor(8) as pool:
        statuses = [status for status, _, _ in pool.map(lambda _: call_with(service, token), range(8))]
    assert statuses.count(200) == 1 and statuses.count(401) == 7


def test_attacks_on_the_token_are_refused(service, ehr):
    """Each over the wire; the ones that only need other claims are in test_api.py."""
    other = rsa.generate_private_key(65537, 2048)
    evil = ec.generate_private_key(ec.SECP384R1())
    own_key = {"jwk": {**jwk_of(evil, "one")}}
    attacks = {
        "its own key in the header": ehr.token(evil, headers=own_key),
        "a kid that is a path": ehr.token(evil, headers={"kid": "../../../dev/null"}),
        "a kid that is SQL": ehr.token(evil, headers={"kid": "one' OR '1'='1"}),
        "its own key set": ehr.token(evil, headers={"jku": f"http://127.0.0.1:{ehr.port}/evil.json"}),
        "an RSA key under the EC key's name": ehr.token(other, "RS384"),
        "a critical extension": ehr.token(headers={"crit": ["exp2"], "exp2": 1}),
        "an audience among none of ours": ehr.token(aud=["https://elsewhere.example.org"]),
        "numbers that are none": ehr.token(exp="soon"),
        "an end beyond all numbers": ehr.token(exp=10**30),
        "an issuer that is a list": ehr.token(iss=[ISSUER]),
        "an id that is no text": ehr.token(jti=7),
        "a million characters": "a" * 7000 + "." + "b" * 500 + ".c",
        "nested without end": ".".join(["W1tb" * 1500, "e30", "x"]),
    }
    for name, token in attacks.items():
        status, body, _ = call_with(service, token)
        assert status in (401, 429), name  # 429: as many wrong ones as one address may send
        assert token not in json.dumps(body), name
    assert call_with(service, ehr.token())[0] == 200


def test_a_key_set_that_never_comes_costs_others_nothing(service, ehr):
    """One call waits for it, as long as it may; calls of the same issuer meanwhile are refused, others answered."""
    slow = partial(ehr.token, iss="https://slow.example.org")
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(call_with, service, slow()) for _ in range(5)]
        assert call_with(service, ehr.token())[0] == 200
        answers = [task.result(60) for task in waiting]
    assert {status for status, _, _ in answers} <= {401, 429}
    patient = [seconds for _, _, seconds in answers if seconds > FETCH_SECONDS * 0.9]
    assert len(patient) <= 2 and ASK_SECONDS > FETCH_SECONDS  # one of each worker


FETCH = """async ([url, token, call]) => {
  try {
    const answer = await fetch(url, {method: "POST", body: JSON.stringify(call),
      headers: {"Content-Type": "application/json", Authorization: `Bearer ${token}`}});
    return [answer.status, (await answer.json()).cards?.length ?? null, answer.headers.get("X-Request-ID")];
  } catch (error) { return [String(error)]; }
}"""


def test_a_browser_asks_from_an_allowed_origin_only(browser, service, ehr):
    call = cds_call(*(vital(code) for code in VITALS))
    url = f"http://127.0.0.1:{service.port}{CDS}"
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(f"http://localhost:{ehr.port}/page.html")
        status, cards, request_id = page.evaluate(FETCH, [url, ehr.token(), call])
        assert (status, cards) == (200, 1) and request_id
        discovery = page.evaluate("url => fetch(url).then(a => a.json())", url.rpartition("/")[0])
        assert discovery["services"][0]["id"] == "sepsis-risk"
        page.goto(f"http://127.0.0.1:{ehr.port}/page.html")  # the same server under another name is another origin
        assert "Failed to fetch" in page.evaluate(FETCH, [url, ehr.token(), call])[0]


def test_planted_values_names_and_tokens_are_in_no_log_and_no_metric(service, ehr):
    """Through every protected route, in requests that succeed and that fail."""
    number, key = "91.23456", "planted-key-0123456789"
    row = {"visit_id": "planted-visit", "client": "planted-name", "observation_value": float(number)}
    row |= {"observation_type_code": "HR", "observation_date": datetime.now(UTC).isoformat()}
    resource = vital("8867-4", subject={"reference": "Patient/planted-name"}, id="planted-id")
    resource["valueQuantity"]["value"] = float(number)
    call = cds_call(resource, patientId="planted-name", userId="Practitioner/planted-user")
    token = ehr.token(sub="planted-subject")
    bodies = {
        "/predict": [[row], [{**row, "observation_value": "planted-text"}], {"planted-name": 1}],
        "/fhir/predict": [bundle_of(resource), bundle_of({**resource, "status": "planted-status"}), {}],
        CDS: [call, {**call, "hook": "planted-hook"}, {**call, "prefetch": {}}],
        f"{CDS}/feedback": [{"feedback": [{"card": "planted-card", "outcome": "planted-outcome"}]}],
    }
    for path, given in bodies.items():
        for body in given:
            for authorization in ({"Authorization": f"Bearer {token}"}, {"X-API-Key": key}):
                service.request(f"{path}?planted=query", json.dumps(body).encode(), **authorization)
    service.request("/planted-path")
    service.request("/predict", b"[]", **{"X-Request-ID": "planted\x1b[31m id"})
    names = ("log", "access.jsonl", "audit.jsonl")
    logs = "".join((service.folder / name).read_text() for name in names) + service.get("/metrics")[1]
    assert '"route":"/predict"' in logs
    for planted in ("planted", number, token, token.rpartition(".")[2], "\x1b"):
        assert planted not in logs
    assert b"planted" not in (service.folder / "log.db").read_bytes()
