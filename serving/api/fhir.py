"""FHIR R4: a Bundle of Observations in, a Bundle of RiskAssessments out.

Resources are checked by fhir.resources (its R4B models, which are R4 for the resources used here). LOINC codes are
mapped to the model's own codes of the same concept, values in another unit are converted, and what cannot be told for
sure is set aside and reported, never guessed.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from html import escape
from typing import Any

from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.observation import Observation
from fhir.resources.R4B.operationoutcome import OperationOutcome
from fhir.resources.R4B.riskassessment import RiskAssessment
from flask import Response, g
from pydantic import ValidationError
from werkzeug.exceptions import BadRequest, UnprocessableEntity

from common.fhir import NOT_USED as PART_NOT_USED
from common.fhir import Identity, NotUsed, Reading, readings
from feature_pipeline import MICROSECONDS_PER_HOUR, ProductionPipeline, iso_times, to_micros, to_unit
from serving.api.service import Scored, count_set_aside
from serving.evidence import unused_text

MIME = "application/fhir+json"
SEPSIS = {"system": "http://snomed.info/sct", "code": "91302008", "display": "Sepsis"}
RISK_CODES = {"LOW": "low", "MEDIUM": "moderate", "HIGH": "high"}
RISK_ASSESSMENT = {"system": "http://snomed.info/sct", "code": "225338004", "display": "Risk assessment"}
AGE, SEX = "30525-0", "46098-0"  # LOINC
SEXES = {"male": 1, "female": 0}  # as a table of observations has them
MOST_ISSUES = 50
DEEPEST = 60  # levels of a resource; R4's own have some 20
# why something of a bundle is not used; the keys are the metrics' reasons
NOT_USED = {
    **PART_NOT_USED,
    "malformed": "no resource",
    "source_failed": "the source reports an error",
    "bad_unit": "its unit cannot be converted",
    "superseded": "a newer version of it is in the Bundle",
    "other_patient": "of another patient",
    "further_pages": "there are more observations than were sent",
}


Visit = tuple[Identity, Identity | None]  # patient, encounter; a patient's observations without encounter are one visit


@dataclass(frozen=True)
class Row:
    """An observation in the model's terms, and what the answer says about where it comes from, in FHIR's words."""

    visit: Visit
    moment: datetime
    record: dict[str, Any]
    subject: dict[str, Any]
    encounter: dict[str, Any] | None
    reference: str  # to the Observation; empty where there is none


@dataclass
class Found:
    """What a bundle holds: rows to score, and what was not used."""

    rows: list[Row] = field(default_factory=list)
    issues: list[dict[str, Any]] = field(default_factory=list)
    set_aside_counts: Counter[str] = field(default_factory=Counter)
    patients: dict[Identity, dict[str, Any]] = field(default_factory=dict)  # Patient resources
    same: dict[Identity, Identity] = field(default_factory=dict)  # other names of a resource of the Bundle
    labels: dict[str, str] = field(default_factory=dict)  # the sender's words for a code

    def set_aside(self, where: str, reason: str, more: str = "", n: int = 1) -> None:
        """Notes that what stands at `where`, `n` observations, is not used, for a reason of `NOT_USED`."""
        why = f"{NOT_USED[reason]}{more}"
        issue = {"severity": "warning", "code": "not-supported", "diagnostics": why, "expression": [where]}
        if len(self.issues) < MOST_ISSUES:  # the rest is counted
            self.issues.append(issue)
        self.set_aside_counts[reason] += n
        count_set_aside({reason: n})

    def first_issues(self) -> str:
        return "; ".join(f"{issue['expression'][0]}: {issue['diagnostics']}" for issue in self.issues[:5])

    @cached_property
    def names(self) -> dict[Visit, tuple[str, str]]:
        """(client, visit_id) of each visit: bare numbers, or all in full where these would name two visits alike."""
        visits = dict.fromkeys(row.visit for row in self.rows)
        names = {(patient, encounter): (patient.value, (encounter or patient).value) for patient, encounter in visits}
        if len(set(names.values())) < len(names):
            names = {visit: (json.dumps(visit[0]), json.dumps(visit[1])) for visit in visits}
        return names

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows as the reader takes them."""
        return [
            {
                "visit_id": visit,
                "client": client,
                "observation_date": row.moment.isoformat(),
                **row.record,
            }
            for row in self.rows
            for client, visit in [self.names[row.visit]]
        ]


def observations_of(bundle: Any, pipeline: ProductionPipeline) -> Found:
    """The observations of a bundle. Raises 400 or 422 where it is no bundle or has nothing to use."""
    if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle":
        raise BadRequest("expected a FHIR R4 Bundle of Observation resources")
    if bundle.get("implicitRules"):
        raise UnprocessableEntity("the Bundle has implicitRules, which this service does not understand")
    entries = bundle.get("entry")
    if not isinstance(entries, list) or not entries:
        raise UnprocessableEntity("the Bundle has no entry; expected Observation resources")
    found = Found()
    collect(entries, pipeline, found)
    if has_more(bundle):
        found.set_aside("Bundle.link", "further_pages")
    if not found.rows:
        raise UnprocessableEntity(f"the Bundle has no usable Observation: {found.first_issues() or 'none is in it'}")
    add_people(found, pipeline)
    return found


def has_more(bundle: dict[str, Any]) -> bool:
    """Are there observations that the bundle does not hold?"""
    links = bundle.get("link")
    return isinstance(links, list) and any(isinstance(link, dict) and link.get("relation") == "next" for link in links)


@dataclass(frozen=True)
class Entry:
    """A resource of a Bundle and where it stands."""

    resource: dict[str, Any]
    url: str  # its full URL, without a version
    where: str

    @property
    def base(self) -> str:
        """The server that it is on, as far as its URL tells."""
        match = re.fullmatch(r"(https?://[^\s?#|]+/)[A-Z][A-Za-z]+/[^/]+", self.url)
        return match[1] if match else ""

    @property
    def identity(self) -> Identity | None:
        """What a reference to it names."""
        kind, number = self.resource.get("resourceType"), self.resource.get("id")
        if match := re.fullmatch(r"(urn:(?:uuid|oid)):([^\s|]+)", self.url):
            return Identity(match[1], match[2])
        if self.base:
            return Identity(f"{self.base}{kind}", self.url.rpartition("/")[2])
        return Identity(str(kind), number) if isinstance(number, str) and number else None

    def replaces(self, other: Entry) -> bool:
        """Is it a later version of the same resource, or the same version further back in the Bundle?"""
        (updated, number), (other_updated, other_number) = self.version, other.version
        if updated and other_updated and updated != other_updated:
            return updated > other_updated
        return number >= other_number

    @property
    def version(self) -> tuple[str, int]:
        """When it was made, empty where that is not told, and its number, 0 where it has none."""
        meta = self.resource.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        try:
            updated = iso_times([to_micros(meta["lastUpdated"])])[0]
        except Exception:
            updated = ""
        number = str(meta.get("versionId", ""))
        return updated or "", int(number) if re.fullmatch("[0-9]{1,18}", number) else 0


def collect(entries: list[Any], pipeline: ProductionPipeline, found: Found, places: Sequence[str] = ()) -> None:
    """Adds the Observations and Patients among `entries` to `found`, of each resource the newest version. `places` say
    where the entries stand; in the Bundle itself if not given."""
    newest: dict[Any, Entry] = {}
    for i, given in enumerate(entries):
        where = places[i] if places else f"Bundle.entry[{i}]"
        resource = given.get("resource") if isinstance(given, dict) else None
        if not isinstance(resource, dict):
            found.set_aside(where, "malformed")
            continue
        if is_deeper(resource, DEEPEST):
            raise BadRequest(f"{where} is nested more than {DEEPEST} deep")
        if failed(resource):
            found.set_aside(where, "source_failed")
            continue
        url = given.get("fullUrl")
        entry = Entry(resource, url.partition("/_history/")[0] if isinstance(url, str) else "", where)
        key = (resource.get("resourceType"), entry.identity) if entry.identity else where
        if (other := newest.get(key)) is not None:
            older, entry = (other, entry) if entry.replaces(other) else (entry, other)
            if older.resource != entry.resource and resource.get("resourceType") == "Observation":
                found.set_aside(older.where, "superseded")
        newest[key] = entry
    kinds = {entry.url: entry.resource.get("resourceType") for entry in newest.values() if entry.url}
    for entry in newest.values():
        _know(entry, found)
    for entry in newest.values():
        if entry.resource.get("resourceType") != "Observation":
            continue
        try:
            Observation.model_validate(entry.resource)
        except (ValidationError, ValueError, TypeError, ArithmeticError) as error:
            found.set_aside(entry.where, "bad_resource", f": {_first_problem(error)}")
        else:
            _add(entry, pipeline, found, kinds)


def is_deeper(value: Any, most: int) -> bool:
    """Is a JSON value nested more than `most` deep? What checks it recursively would not come to an end."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _know(entry: Entry, found: Found) -> None:
    """Notes a Patient's or an Encounter's names, and what a Patient says of a person."""
    resource, identity, number = entry.resource, entry.identity, entry.resource.get("id")
    kind = resource.get("resourceType")
    if kind not in ("Patient", "Encounter") or identity is None:
        return
    if identity.place.startswith("urn:") and isinstance(number, str) and number:
        found.same[Identity(kind, number)] = identity  # a relative reference to an entry whose URL is a urn
    if kind == "Patient" and not (resource.get("implicitRules") or resource.get("modifierExtension")):
        found.patients[identity] = resource


def failed(resource: dict[str, Any]) -> bool:
    """Is it an OperationOutcome that tells of an error?"""
    if resource.get("resourceType") != "OperationOutcome":
        return False
    issues = resource.get("issue")
    issues = issues if isinstance(issues, list) else []
    return any(isinstance(issue, dict) and issue.get("severity") in ("error", "fatal") for issue in issues)


def _first_problem(error: Exception) -> str:
    """Where a resource is wrong, without its values."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'resource'} ({first['type']})"
    return type(error).__name__


def _add(entry: Entry, pipeline: ProductionPipeline, found: Found, kinds: dict[str, Any]) -> None:
    resource = entry.resource
    reference = entry.url or (f"Observation/{resource['id']}" if resource.get("id") else "")
    for part in readings(resource, entry.base, kinds):
        where = f"{entry.where}{part.where}"
        if isinstance(part, NotUsed):
            found.set_aside(where, part.reason)
        elif (record := _record(part, pipeline)) is None:
            found.set_aside(where, "bad_unit")
        else:
            # a time without a zone is taken as UTC, as everywhere
            moment = part.time if part.time.tzinfo else part.time.replace(tzinfo=UTC)
            patient, encounter = (found.same.get(name, name) for name in (part.patient, part.encounter))
            row = Row((patient, encounter), moment, record, resource["subject"], resource.get("encounter"), reference)
            found.rows.append(row)
            if part.label:
                found.labels.setdefault(record["observation_type_code"], part.label)


def _record(part: Reading, pipeline: ProductionPipeline) -> dict[str, Any] | None:
    """The observation's code, and its value and range in the unit of the code's concept; None where that cannot be."""
    reproducer = pipeline.reproducer
    code = next((code for code in part.codes if reproducer.is_used(reproducer.codes.own_code(code))), part.codes[0])
    concept, coded_in = reproducer.codes.meaning(code)
    bounds = {"reference_range_min": part.low, "reference_range_max": part.high}
    if concept is None or (part.unit is None and coded_in == concept.unit):
        plain = {name: bound[0] if bound and bound[1] == part.unit else None for name, bound in bounds.items()}
        return {"observation_type_code": code, "observation_value": part.value, **plain}
    value = to_unit(concept, part.value, part.unit or coded_in)
    if value is None:
        return None
    own = {name: bound and to_unit(concept, bound[0], bound[1] or coded_in) for name, bound in bounds.items()}
    return {"observation_type_code": code, "observation_value": value, "unit": concept.unit, **own}


def add_people(found: Found, pipeline: ProductionPipeline) -> None:
    """Adds age and sex from the Patient resources to visits without such observations, if the model uses them. They
    count from the visit's first observation on."""
    codes = pipeline.reproducer.codes
    wanted = [code for code in (AGE, SEX) if pipeline.reproducer.is_used(codes.own_code(code))]
    by_visit: dict[Visit, list[Row]] = {}
    for row in found.rows:
        by_visit.setdefault(row.visit, []).append(row)
    for visit, rows in by_visit.items():
        patient = found.patients.get(visit[0], {})
        first = min(rows, key=lambda row: row.moment)
        told = {codes.own_code(row.record["observation_type_code"]) for row in rows}
        for code in wanted:
            value = age_at(patient.get("birthDate"), first.moment) if code == AGE else SEXES.get(patient.get("gender"))
            if value is not None and codes.own_code(code) not in told:
                record = {"observation_type_code": code, "observation_value": value}
                reference = f"{patient['resourceType']}/{patient['id']}" if patient.get("id") else ""
                found.rows.append(Row(visit, first.moment, record, first.subject, first.encounter, reference))


def age_at(born: Any, moment: datetime) -> int | None:
    """Full years; of a date without day or month its middle is taken.

    >>> age_at("1950-07-02", datetime(2024, 7, 1)), age_at("1950", datetime(2024, 7, 1)), age_at("?", datetime.now())
    (73, 74, None)
    """
    if not isinstance(born, str) or not re.fullmatch(r"\d{4}(-\d\d){0,2}", born, re.ASCII):
        return None
    try:
        birth = date.fromisoformat(born + ("-07-01", "-15", "")[born.count("-")])
    except ValueError:
        return None
    age = moment.year - birth.year - ((moment.month, moment.day) < (birth.month, birth.day))
    return age if 0 <= age <= 130 else None


# ---------------------------------------------------------------------------------------------------- answers


def risk_assessments(found: Found, scored: Scored) -> dict[str, Any]:
    """A Bundle: a RiskAssessment for each visit, then an OperationOutcome where something was not used.

    Probabilities are fractions from 0 to 1. A visit of unknown risk has a RiskAssessment without prediction, and the
    reason as a note.
    """
    rows_of: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        rows_of.setdefault(found.names[row.visit], []).append(row)
    used = used_references(found, scored)
    entries = []
    for key, prediction in zip(scored.observations.keys(), scored.predictions(), strict=True):
        first = rows_of[key][0]
        number = str(uuid.uuid4())
        resource = {
            "resourceType": "RiskAssessment",
            "id": number,
            "contained": [device(scored.pipeline.model_version)],
            "status": "final",
            "code": {"coding": [RISK_ASSESSMENT], "text": "Risk of sepsis"},
            "subject": first.subject,
            "performer": {"reference": "#model"},
            "method": {"text": f"sepsis risk model {scored.pipeline.model_version}"},
            "basis": [{"reference": reference} for reference in used.get(key, {})],
        }
        if prediction["reason"] is None:
            resource["prediction"] = [_prediction(prediction, scored.horizon_hours)]
        else:
            resource["note"] = [{"text": f"Risk UNKNOWN ({prediction['reason']}): {prediction['reason_text']}."}]
        if (newest := prediction["newest_observation"]) is not None:
            text = f"Newest observation that the model uses: {newest}, {prediction['hours_since_newest']:g} h before."
            resource.setdefault("note", []).append({"text": text})
        if prediction["as_of"]:
            resource["occurrenceDateTime"] = prediction["as_of"]
        if first.encounter is not None:
            resource["encounter"] = first.encounter
        if not resource["basis"]:
            del resource["basis"]
        resource["text"] = narrative(prediction, resource.get("note", []))
        RiskAssessment.model_validate(resource)
        entries.append({"fullUrl": f"urn:uuid:{number}", "resource": resource})
    issues = found.issues + _set_aside_issues(scored.set_aside())
    if (n := sum(found.set_aside_counts.values())) > len(found.issues):
        counts = "; ".join(f"{n} x {NOT_USED[reason]}" for reason, n in found.set_aside_counts.items())
        issues.append({"severity": "warning", "code": "not-supported", "diagnostics": f"{n} not used in all: {counts}"})
    told = [*scored.warnings(), *([unused_text(scored.unused_codes, MOST_ISSUES)] if scored.unused_codes else [])]
    issues += [{"severity": "information", "code": "incomplete", "diagnostics": text} for text in told]
    if issues:
        entries.append({"resource": operation_outcome(issues)})
    bundle = {"resourceType": "Bundle", "type": "collection", "entry": entries}
    Bundle.model_validate(bundle)
    return bundle


def _prediction(prediction: dict[str, Any], hours: float | None) -> dict[str, Any]:
    level = prediction["risk_level"]
    system = "http://terminology.hl7.org/CodeSystem/risk-probability"
    outcome: dict[str, Any] = {
        "outcome": {"coding": [SEPSIS], "text": "Sepsis"},
        "probabilityDecimal": prediction["sepsis_probability"],
        "qualitativeRisk": {"coding": [{"system": system, "code": RISK_CODES[level]}], "text": level},
        # the specification's comment says percent, its invariant allows both
        "rationale": "probabilityDecimal is a fraction from 0 to 1, not a percentage",
    }
    if hours is not None:
        start = to_micros(prediction["as_of"])
        ends = iso_times([start, start + round(hours * MICROSECONDS_PER_HOUR)])
        outcome["whenPeriod"] = dict(zip(("start", "end"), ends, strict=True))
    return outcome


def device(version: str) -> dict[str, Any]:
    """The model, as the one who performed the assessment."""
    name = {"name": "Sepsis risk model", "type": "model-name"}
    return {"resourceType": "Device", "id": "model", "deviceName": [name], "version": [{"value": version}]}


def narrative(prediction: dict[str, Any], notes: list[dict[str, str]]) -> dict[str, str]:
    """The assessment as text for people."""
    p = prediction["sepsis_probability"]
    first = "Risk of sepsis UNKNOWN." if p is None else f"Risk of sepsis {prediction['risk_level']}: {100 * p:.1f}%."
    text = escape(" ".join([first, *(note["text"] for note in notes)]))
    return {"status": "generated", "div": f'<div xmlns="http://www.w3.org/1999/xhtml"><p>{text}</p></div>'}


def used_references(found: Found, scored: Scored) -> dict[tuple[str, str], dict[str, None]]:
    """Of each visit the resources that the model's features were computed from, in the order of the Bundle."""
    o = scored.observations
    keys, codes = o.keys(), o.codes
    group = [(keys[visit], codes[code]) for visit, code in zip(o.group_visit, o.group_code, strict=True)]
    length = (o.group_start[1:] - o.group_start[:-1]).tolist()
    of_row: Iterable[Any] = (name for name, n in zip(group, length, strict=True) for _ in range(n))
    used = {
        (*name, time) for name, time, is_used in zip(of_row, o.time.tolist(), scored.used_rows, strict=True) if is_used
    }
    out: dict[tuple[str, str], dict[str, None]] = {}
    for row in found.rows:
        key, code = found.names[row.visit], scored.codes.own_code(row.record["observation_type_code"])
        if row.reference and (key, code, round(row.moment.timestamp() * 1e6)) in used:
            out.setdefault(key, {})[row.reference] = None
    return out


def _set_aside_issues(aside: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"severity": "warning", "code": "value", "diagnostics": f"{r['count']} observations set aside: {r['meaning']}"}
        for r in aside["reasons"]
    ]


def operation_outcome(issues: list[dict[str, Any]]) -> dict[str, Any]:
    resource = {"resourceType": "OperationOutcome", "issue": issues}
    OperationOutcome.model_validate(resource)
    return resource


_ISSUE_CODES = {
    401: "login",
    403: "forbidden",
    404: "not-found",
    406: "not-supported",
    413: "too-long",
    415: "not-supported",
    422: "processing",
    429: "throttled",
}


def outcome_response(status: int, message: str, more: dict[str, Any]) -> Response:
    """An OperationOutcome for an error; `more` is what a JSON answer says beside the message."""
    if status >= 500:
        message += f"; request {g.get('request_id')}"
    code = _ISSUE_CODES.get(status, "exception" if status >= 500 else "invalid")
    issues = [{"severity": "error", "code": code, "diagnostics": message}]
    return response(operation_outcome(issues + _set_aside_issues(more.get("set_aside") or {"reasons": []})), status)


def response(resource: dict[str, Any], status: int = 200) -> Response:
    # our own dump: the probability keeps every digit
    return Response(json.dumps(resource, allow_nan=False), status, mimetype=MIME)
