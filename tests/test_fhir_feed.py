"""The client of a FHIR server: what it reads, scores and writes; its token; faults, and where it goes on after them."""

import json
import shutil
import subprocess
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fhir.resources.R4B.riskassessment import RiskAssessment

import db_predictor
from common.artifacts import locked
from common.web import ask
from feature_pipeline import BadConfig, ProductionPipeline
from serving.fhir_feed.feed import SYSTEM, FhirFeed
from serving.fhir_feed.server import FhirError, ServerSettings
from tests.fhir_server import FhirServer
from tests.test_api import LOINC, UCUM, VITALS, jwk_of, plain
from tests.test_api_server import MINIMUM, model_with

pytestmark = pytest.mark.filterwarnings("ignore::feature_pipeline.MissingCodesWarning")
START = datetime(2024, 7, 2, 9, 30, tzinfo=UTC).timestamp()


@pytest.fixture(scope="module")
def model_files(models_dir, tmp_path_factory):
    return model_with(models_dir, tmp_path_factory.mktemp("strict") / "models", MINIMUM)


@pytest.fixture(scope="module")
def keys():
    return {"RS384": rsa.generate_private_key(65537, 2048), "ES384": ec.generate_private_key(ec.SECP384R1())}


class Ward:
    """A server with patients, and a feed of it. Time passes only when somebody sleeps."""

    def __init__(self, tmp_path, model_files, **server):
        self.time, self.slept, self.folder, self.model_files = START, [], tmp_path, model_files
        self.server = FhirServer(lambda: self.time, **server)
        self.settings = ServerSettings(self.server.base, state=str(tmp_path / "state.db"))
        self._feed = None

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds

    @property
    def feed(self):
        if self._feed is None:
            monitor = f"sqlite:///{self.folder}/log.db"
            times = {"clock": lambda: self.time, "sleep": self.sleep}
            self._feed = FhirFeed(self.settings, *self.model_files, monitor=monitor, **times)
        return self._feed

    def restart(self):
        if self._feed is not None:
            self._feed.close()
        self._feed = None
        return self.feed

    def admit(self, number, *codes, status="in-progress", time="2024-07-02T09:00:00Z", shift=0.0):
        subject = {"reference": f"Patient/p{number}"}
        self.server.put({"resourceType": "Patient", "id": f"p{number}", "birthDate": "1950-02-03", "gender": "female"})
        encounter = {"resourceType": "Encounter", "id": f"e{number}", "status": status, "subject": subject}
        self.server.put({**encounter, "class": {"code": "IMP"}})
        for code in codes:
            self.observe(number, code, time, shift=shift)

    def observe(self, number, code, time="2024-07-02T09:00:00Z", id=None, shift=0.0, **changes):
        value, unit = VITALS[code]
        return self.server.put(
            {
                "resourceType": "Observation",
                "id": id or f"o{number}-{code}",
                "status": "final",
                "code": {"coding": [{"system": LOINC, "code": code}]},
                "subject": {"reference": f"Patient/p{number}"},
                "encounter": {"reference": f"Encounter/e{number}"},
                "effectiveDateTime": time,
                "valueQuantity": {"value": value + shift, "unit": unit, "system": UCUM, "code": unit},
                **changes,
            }
        )

    def assessments(self):
        """The newest version of each encounter's."""
        found = {}
        for resource in self.server.all("RiskAssessment"):
            (identifier,) = resource["identifier"]
            assert identifier["system"] == SYSTEM and identifier["value"] not in found, "two of one encounter"
            RiskAssessment.model_validate(resource)
            found[identifier["value"]] = resource
        return found


@pytest.fixture
def ward(tmp_path, model_files):
    wards = []

    def make(**server):
        wards.append(Ward(tmp_path, model_files, **server))
        return wards[-1]

    yield make
    for made in wards:
        made.feed.close()
        made.server.stop()


def test_encounters_in_progress_are_scored_and_written_back(ward, model_files):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.admit(2, "8867-4")
    ward.admit(3, *VITALS, status="finished")
    ward.admit(4)
    result = ward.feed.run()
    assert (result.in_progress, result.created, result.updated, result.without_observations) == (3, 2, 0, 1)
    written = ward.assessments()
    assert written.keys() == {"e1", "e2"}
    rows = [
        {**plain(code, value, time="2024-07-02T09:00:00Z"), "unit": unit, "client": "p1"}
        for code, (value, unit) in VITALS.items()
    ]
    people = [plain("30525-0", 74, time="2024-07-02T09:00:00Z"), plain("46098-0", 0, time="2024-07-02T09:00:00Z")]
    rows += [{**row, "client": "p1"} for row in people]
    pipeline = ProductionPipeline(*model_files)
    expected = pipeline.predict(rows, as_of=datetime.fromtimestamp(START, UTC))["sepsis_probability"].iloc[0]
    assert written["e1"]["prediction"][0]["probabilityDecimal"] == expected
    assert written["e1"]["subject"] == {"reference": "Patient/p1"}
    assert written["e1"]["encounter"] == {"reference": "Encounter/e1"}
    basis = {one["reference"].rpartition("/")[2] for one in written["e1"]["basis"]}
    assert {f"o1-{code}" for code in VITALS} <= basis
    assert "prediction" not in written["e2"] and "UNKNOWN" in written["e2"]["note"][0]["text"]
    assert "2 of 3 encounters in progress" in str(result) and "1 UNKNOWN" in str(result)


def test_a_run_reads_only_what_is_new_and_updates_with_a_version_check(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.admit(2, *VITALS)
    ward.feed.run()
    ward.time += 600
    assert (result := ward.feed.run()).created == result.updated == 0
    ward.observe(2, "8867-4", "2024-07-02T09:40:00Z", id="later")
    ward.time += 60
    del ward.server.asked[:]
    result = ward.feed.run()
    assert (result.created, result.updated) == (0, 1) and ward.assessments()["e1"]["meta"]["versionId"] == "1"
    assert ward.assessments()["e2"]["meta"]["versionId"] == "2"
    ((_, path, headers),) = [asked for asked in ward.server.asked if asked[0] == "PUT"]
    assert {name.lower(): value for name, value in headers.items()}["if-match"] == 'W/"1"' and path.startswith(
        "/fhir/RiskAssessment/"
    )
    assert not any("Encounter%2Fe1" in path for _, path, _ in ward.server.asked)
    assert (again := ward.feed.run()).updated == 0 and again.in_progress == 2  # within the overlap, and known


def test_an_observation_that_is_corrected_or_deleted_counts_as_it_is_now(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.feed.run()
    first = ward.assessments()["e1"]["prediction"][0]["probabilityDecimal"]
    ward.time += 60
    ward.observe(1, "8867-4", shift=-50)
    ward.feed.run()
    corrected = ward.assessments()["e1"]["prediction"][0]["probabilityDecimal"]
    assert corrected != first
    ward.time += 60
    ward.server.delete("Observation", "o1-8480-6")
    ward.server.before["GET", "Patient"] = lambda: ward.server.delete("Observation", "o1-9279-1")  # while it reads
    ward.observe(1, "8867-4")
    ward.feed.run()
    basis = [one["reference"] for one in ward.assessments()["e1"]["basis"]]
    assert not any("8480-6" in reference for reference in basis)
    for code in VITALS:
        ward.observe(1, code, status="entered-in-error")
    ward.time += 60
    result = ward.feed.run()
    assert result.withdrawn == 1 and ward.assessments()["e1"]["status"] == "entered-in-error"
    for code in VITALS:
        ward.observe(1, code)
    ward.time += 60
    ward.feed.run()
    assert ward.assessments()["e1"]["status"] == "final"


def test_an_encounter_that_gets_stale_becomes_unknown_without_news(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.feed.run()
    ward.time += MINIMUM["newest_hours"] * 3600
    assert ward.feed.run().updated == 1
    assert "stale" in ward.assessments()["e1"]["note"][0]["text"] and "prediction" not in ward.assessments()["e1"]
    assert ward.feed.run().updated == 0


@pytest.mark.parametrize("algorithm", ["RS384", "ES384"])
def test_the_token_is_got_by_a_signed_assertion_and_renewed(ward, keys, tmp_path, algorithm):
    pem = keys[algorithm].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "key.pem").write_bytes(pem)
    ward = ward(jwks={"keys": [jwk_of(keys[algorithm], "one")]})
    own = {"client_id": "sepsis-risk", "key": str(tmp_path / "key.pem"), "kid": "one"}
    ward.settings = ServerSettings(ward.server.base, state=str(tmp_path / "state.db"), **own)
    ward.admit(1, *VITALS)
    assert ward.feed.run().created == 1 and len(ward.server.tokens) == 1
    ward.server.tokens.clear()  # the server forgets it: 401
    ward.observe(1, "8867-4", id="later")
    assert ward.feed.run().updated == 1 and len(ward.server.tokens) == 1
    ward.time += 290
    ward.feed.run()
    assert len(ward.server.tokens) == 2  # renewed before it expires
    ward.server.jwks = {"keys": [jwk_of(rsa.generate_private_key(65537, 2048), "one")]}
    ward.time += 290
    with pytest.raises(FhirError, match=r"token endpoint answers 401|gives no token|401"):
        ward.feed.run()


def test_faults_that_pass_are_waited_for(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    fault = ward.server.faults.append
    fault(("GET", "Encounter", 503, {"Retry-After": "7"}))
    fault(("GET", "Observation", 429, {"Retry-After": "Tue, 02 Jul 2024 09:30:30 GMT"}))
    fault(("GET", "Patient", 502, {}))
    fault(("POST", "RiskAssessment", 503, {"Retry-After": "3"}))
    assert ward.feed.run().created == 1
    assert ward.slept == [7, 23, 1, 3]  # the date is 23 s after the first wait
    fault(("GET", "Encounter", 503, {"Retry-After": "3600"}))
    n = len(ward.server.asked)
    for _ in range(2):
        with pytest.raises(FhirError, match="left alone for 3600 s"):
            ward.feed.run()
    assert len(ward.server.asked) == n + 1  # it is left alone
    ward.time += 3600
    ward.feed.run()


@pytest.mark.parametrize(
    "fault", [("POST", "RiskAssessment", 500), ("GET", "Patient", 403), ("PUT", "RiskAssessment", 500)]
)
def test_after_a_fault_the_next_process_goes_on_where_it_stopped(ward, fault):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.feed.run()
    ward.time += 600
    for number in range(2, 26):  # two batches
        ward.admit(number, *VITALS)
    ward.observe(1, "8867-4", "2024-07-02T09:35:00Z", id="later")
    ward.server.faults.append((*fault, {}))
    with pytest.raises(FhirError, match=str(fault[2])):
        ward.feed.run()
    ward.time += 3600  # far beyond the overlap
    ward.restart().run()
    written = ward.assessments()
    assert written.keys() == {f"e{n}" for n in range(1, 26)}
    assert {resource["meta"]["versionId"] for name, resource in written.items() if name != "e1"} == {"1"}
    assert written["e1"]["meta"]["versionId"] == "2"


def test_a_create_whose_answer_was_lost_makes_no_second(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.feed.run()
    ward.feed.state._database.execute("UPDATE encounters SET assessment = NULL, version = NULL, pending = 1")
    assert ward.restart().run().updated == 1 and len(ward.assessments()) == 1


def test_changes_of_others_are_seen_and_a_deleted_assessment_is_made_anew(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.feed.run()
    ward.server.put({**ward.assessments()["e1"], "mitigation": "seen by a physician"})
    ward.time += 60
    ward.observe(1, "8867-4", id="later")
    assert ward.feed.run().updated == 1 and ward.assessments()["e1"]["meta"]["versionId"] == "3"
    ward.server.delete("RiskAssessment", ward.assessments()["e1"]["id"])
    ward.time += 60
    ward.observe(1, "8867-4", id="later-still")
    assert ward.feed.run().created == 1 and ward.assessments()["e1"]["meta"]["versionId"] == "1"


def test_an_encounter_that_the_server_refuses_is_counted_and_keeps_nobody_waiting(ward, caplog):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.admit(2, *VITALS)
    ward.server.faults.append(("POST", "RiskAssessment", 422, {}))
    result = ward.feed.run()
    assert (result.created, result.failed) == (1, 1) and ward.assessments().keys() == {"e2"}
    assert "422 to POST RiskAssessment" in caplog.text and "e1" not in caplog.text
    assert ward.feed.run().failed == 0  # until it has news
    ward.time += 60
    ward.observe(1, "8867-4", id="later")
    ward.feed.run()
    assert ward.assessments().keys() == {"e1", "e2"}


def test_pages_are_followed_and_a_page_that_comes_twice_changes_nothing(ward):
    ward = ward()
    for number in range(1, 4):
        ward.admit(number, *VITALS)
    ward.server.page_size, ward.server.page_twice = 1, True
    assert ward.feed.run().created == 3
    whole = {name: resource["prediction"] for name, resource in ward.assessments().items()}
    assert len({json.dumps(prediction) for prediction in whole.values()}) == 1
    ward.server.circular = True
    ward.time += 60
    ward.observe(1, "8867-4", id="later")
    with pytest.raises(FhirError, match="do not end"):
        ward.feed.run()
    ward.server.circular = ward.server.page_twice = False
    assert ward.feed.run().updated == 1


def test_an_observation_of_another_patient_is_not_the_encounters(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    ward.observe(1, "8867-4", id="mixed-up", subject={"reference": "Patient/p2"}, shift=60)
    result = ward.feed.run()
    assert result.set_aside["other_patient"] == 1 and result.created == 1
    assert not any("mixed" in one["reference"] for one in ward.assessments()["e1"]["basis"])


def test_next_pages_of_another_server_get_no_token(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    bundle = {"resourceType": "Bundle", "link": [{"relation": "next", "url": "https://evil.example.org/fhir?page=2"}]}
    ward.feed.server.call = lambda *_, **__: type("Answer", (), {"body": bundle})()
    with pytest.raises(FhirError, match="another server"):
        ward.feed.run()


def test_a_dry_run_writes_and_notes_nothing(ward):
    ward = ward()
    ward.admit(1, *VITALS)
    result = ward.feed.run(dry_run=True)
    assert "would assess 1 of 1" in str(result) and ward.assessments() == {}
    assert not [path for method, path, _ in ward.server.asked if method != "GET"]
    assert ward.feed.run().created == 1


def test_the_script(ward, tmp_path, model_files, capsys):
    ward = ward()
    ward.admit(1, *VITALS)
    file = tmp_path / "server.toml"
    file.write_text(f'base = "{ward.server.base}"\nstate = "{tmp_path}/own.db"\nencounters = "class=IMP"\n')
    options = ["--config", str(model_files[0]), "--model", str(model_files[1]), "--fhir", str(file), "--monitor", "off"]
    run = partial(db_predictor.main, [*options, "--as-of", "2024-07-02T09:30:00Z"])
    assert run() == 0 and "1 created" in capsys.readouterr().out
    assert ward.assessments().keys() == {"e1"} and any("class=IMP" in path for _, path, _ in ward.server.asked)
    with locked(f"{tmp_path}/own.db.lock"):
        assert run() == 2
    ward.server.faults.append(("GET", "Encounter", 400, {}))
    assert run() == 1 and "answers 400 to GET Encounter" in capsys.readouterr().err
    assert db_predictor.main([*options, "--init-db"]) == 2
    file.write_text(file.read_text().replace(ward.server.base, "https://other.example.org/fhir"))
    assert run() == 2 and "belongs to another FHIR server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "base is no https URL"),
        ('base = "http://ehr.example.org/fhir"', "base is no https URL"),
        ('base = "https://ehr.example.org"\nclient_id = "x"', "needs key"),
        ('base = "https://ehr.example.org"\nbsae = "x"', "unknown 'bsae'"),
        ('base = "https://ehr.example.org"\noverlap_seconds = "5"', "no whole number"),
        ("base = ", "cannot be read"),
    ],
)
def test_a_file_of_a_server_that_cannot_be_is_refused(tmp_path, text, said):
    (tmp_path / "server.toml").write_text(text)
    with pytest.raises(BadConfig, match=said):
        ServerSettings.read(str(tmp_path / "server.toml"))


def test_private_keys_that_the_standard_does_not_take_are_refused(tmp_path, model_files):
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for content, said in ((pem, "P-384"), (b"no key", "cannot be read")):
        (tmp_path / "key.pem").write_bytes(content)
        own = {"client_id": "x", "key": str(tmp_path / "key.pem"), "kid": "1", "state": str(tmp_path / "state.db")}
        with pytest.raises(BadConfig, match=said):
            FhirFeed(ServerSettings("https://ehr.example.org/fhir", **own), *model_files)


# ------------------------------------------------------------------------------------------ a server that is not ours

ROUTER = Path(__file__).with_name("fhir_router")


@pytest.fixture
def medplum():
    """The base URL of Medplum's FHIR router. ``npm install --prefix tests/fhir_router`` installs it."""
    if not (ROUTER / "node_modules").is_dir() or not shutil.which("node"):
        pytest.skip("npm install --prefix tests/fhir_router was not run")
    command = ["node", "--experimental-websocket", "server.mjs"]
    with subprocess.Popen(command, cwd=ROUTER, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/fhir"
        process.terminate()


def stored(base, resource):
    """The resource as the server has it then."""
    number = resource.get("id")
    path = f"{base}/{resource['resourceType']}" + (f"/{number}" if number else "")
    headers = {"Content-Type": "application/fhir+json"}
    answer = ask(path, "PUT" if number else "POST", json.dumps(resource).encode(), headers, 60)
    assert answer.status in (200, 201), answer
    return answer.body


@pytest.mark.slow
def test_a_server_that_is_not_ours(medplum, model_files, tmp_path):
    """Searches, create once, update with a version check against its 412 and 404, and what a lost state finds again."""
    stays, time = [], datetime.now(UTC).isoformat()

    def observe(patient, encounter, code, shift=0, **changes):
        value, unit = VITALS[code]
        observation = {
            "resourceType": "Observation",
            "status": "final",
            "code": {"coding": [{"system": LOINC, "code": code}]},
            "subject": {"reference": f"Patient/{patient}"},
            "encounter": {"reference": f"Encounter/{encounter}"},
            "effectiveDateTime": time,
            "valueQuantity": {"value": value + shift, "unit": unit, "system": UCUM, "code": unit},
        }
        return stored(medplum, {**observation, **changes})

    for status in ["in-progress"] * 22 + ["finished"]:
        patient = stored(medplum, {"resourceType": "Patient", "gender": "male", "birthDate": "1944-02-02"})["id"]
        encounter = {"resourceType": "Encounter", "status": status, "subject": {"reference": f"Patient/{patient}"}}
        number = stored(medplum, {**encounter, "class": {"code": "IMP"}})["id"]
        stays.append((patient, number, [observe(patient, number, code) for code in VITALS]))
    feed = FhirFeed(ServerSettings(medplum, state=str(tmp_path / "state.db")), *model_files)

    def counts():
        result = feed.run()
        return result.created, result.updated

    assert counts() == (22, 0) and counts() == (0, 0)
    (patient, number, _), (_, _, (corrected, *_)) = stays[:2]
    observe(patient, number, "8867-4", -20)
    stored(medplum, {**corrected, "status": "corrected"})
    assert counts() == (0, 2)
    found = ask(f"{medplum}/RiskAssessment?identifier={SYSTEM}|{number}").body["entry"]
    (own,) = [entry["resource"] for entry in found]
    stored(medplum, {**own, "mitigation": "seen by a physician"})
    observe(patient, number, "8867-4", -30)
    assert counts() == (0, 1)  # after its 412
    assert ask(f"{medplum}/RiskAssessment/{own['id']}", "DELETE").status == 200
    observe(patient, number, "8867-4", -40)
    assert counts() == (1, 0)  # after its 404
    feed.state._database.execute("UPDATE encounters SET assessment = NULL, version = NULL, pending = 1")
    assert counts() == (0, 22)
    feed.close()
