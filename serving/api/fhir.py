"""FHIR R4: a Bundle of Observations in, a Bundle of RiskAssessments out.

Resources are checked by fhir.resources (its R4B models, which are R4 for the resources used here). LOINC codes are
mapped to the model's own codes of the same concept, values in another unit are converted, and what cannot be told for
sure is set aside and reported, never guessed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.observation import Observation
from fhir.resources.R4B.operationoutcome import OperationOutcome
from fhir.resources.R4B.riskassessment import RiskAssessment
from flask import Response
from pydantic import ValidationError
from werkzeug.exceptions import BadRequest, UnprocessableEntity

from common.units import own_terms
from feature_pipeline import ProductionPipeline
from serving.api.service import Scored, count_set_aside

MIME = "application/fhir+json"
LOINC = "http://loinc.org"
UCUM = "http://unitsofmeasure.org"
SEPSIS = {"system": "http://snomed.info/sct", "code": "91302008", "display": "Sepsis"}
RISK_CODES = {"LOW": "low", "MEDIUM": "moderate", "HIGH": "high"}
NOT_A_RESULT = {"entered-in-error", "cancelled", "registered", "unknown"}
MOST_ISSUES = 50
# why something of a bundle is not used; the keys are the metrics' reasons
NOT_USED = {
    "malformed": "no resource",
    "bad_resource": "not a valid R4 Observation",
    "source_failed": "the source reports an error",
    "no_result": "its status says that it is no result",
    "no_subject": "no subject that says which Patient: Patient/ID, its URL, urn:uuid or an identifier",
    "no_encounter": "its encounter does not say which: Encounter/ID, its URL, urn:uuid or an identifier",
    "no_date": "no effective time of day",
    "no_value": "no valueQuantity",
    "bad_value": "its value is no JSON number",
    "no_code": "no code",
    "bad_unit": "its unit cannot be converted",
    "other_patient": "of another patient",
    "further_pages": "there are more observations than were sent",
}


class Identity(NamedTuple):
    """What a reference names: `value` alone is not unique, the same number may come from another server or system."""

    place: str  # server and type, ``http://a.org/fhir/Patient``; or an identifier's system with | behind it
    value: str


Visit = tuple[Identity, Identity | None]  # patient, encounter; a patient's observations without encounter are one visit


@dataclass(frozen=True)
class Row:
    """An observation in the model's terms, and what the answer says about where it comes from, in FHIR's words."""

    visit: Visit
    moment: datetime
    record: dict[str, Any]
    subject: dict[str, Any]
    encounter: dict[str, Any] | None
    reference: str  # to the Observation


@dataclass
class Found:
    """What a bundle holds: rows to score, and what was not used."""

    rows: list[Row] = field(default_factory=list)
    issues: list[dict[str, Any]] = field(default_factory=list)
    set_aside_counts: Counter[str] = field(default_factory=Counter)

    def set_aside(self, where: str, reason: str, more: str = "", n: int = 1) -> None:
        """Notes that what stands at `where`, `n` observations, is not used, for a reason of `NOT_USED`."""
        why = f"{NOT_USED[reason]}{more}"
        issue = {"severity": "warning", "code": "not-supported", "diagnostics": why, "expression": [where]}
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
    entries = bundle.get("entry")
    if not isinstance(entries, list) or not entries:
        raise UnprocessableEntity("the Bundle has no entry; expected Observation resources")
    found = Found()
    collect(entries, pipeline, found)
    if not found.rows:
        raise UnprocessableEntity(f"the Bundle has no usable Observation: {found.first_issues() or 'none is in it'}")
    return found


def collect(entries: list[Any], pipeline: ProductionPipeline, found: Found, path: str = "Bundle.entry") -> None:
    """Adds the Observations among `entries` to `found`."""
    kinds = {}  # what a full URL stands for
    for entry in entries:
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("fullUrl"), str)
            and isinstance(entry.get("resource"), dict)
        ):
            kinds[entry["fullUrl"]] = entry["resource"].get("resourceType")
    for i, entry in enumerate(entries):
        where = f"{path}[{i}]"
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if not isinstance(resource, dict):
            found.set_aside(where, "malformed")
        elif failed(resource):
            found.set_aside(where, "source_failed")
        elif resource.get("resourceType") == "Observation":
            try:
                observation = Observation.model_validate(resource)
            except (ValidationError, ValueError, TypeError, ArithmeticError) as error:
                found.set_aside(where, "bad_resource", f": {_first_problem(error)}")
            else:
                url = entry.get("fullUrl")
                _add(observation, resource, url if isinstance(url, str) else "", where, pipeline, found, kinds)


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


def _add(observation, resource, url, where, pipeline, found, kinds) -> None:
    if observation.status in NOT_A_RESULT:
        return found.set_aside(where, "no_result")
    server = re.fullmatch(r"(https?://[^\s?#|]+/)Observation/[^/]+", url)
    base = server[1] if server else ""
    patient = _identity(observation.subject, "Patient", base, kinds)
    if patient is None:
        return found.set_aside(where, "no_subject")
    encounter = _identity(observation.encounter, "Encounter", base, kinds)
    if encounter is None and observation.encounter is not None:
        return found.set_aside(where, "no_encounter")
    time = observation.effectiveDateTime or observation.effectiveInstant
    if time is None and observation.effectivePeriod is not None:
        time = observation.effectivePeriod.end or observation.effectivePeriod.start
    if not hasattr(time, "hour"):
        return found.set_aside(where, "no_date")
    # a time without a zone is taken as UTC, as everywhere
    moment = time if time.tzinfo else time.replace(tzinfo=UTC)
    reference = url or (f"Observation/{observation.id}" if observation.id else "")
    for k, part in enumerate([observation, *(observation.component or [])]):
        here = where if k == 0 else f"{where}.component[{k - 1}]"
        raw = resource if k == 0 else resource["component"][k - 1]
        if part.valueQuantity is None and part.valueInteger is None:
            if k or not observation.component:  # a panel has no value of its own
                found.set_aside(here, "no_value")
            continue
        record = _record(part, raw, here, pipeline, found)
        if record:
            row = Row((patient, encounter), moment, record, resource["subject"], resource.get("encounter"), reference)
            found.rows.append(row)


def _identity(reference: Any, kind: str, base: str, kinds: dict[str, Any]) -> Identity | None:
    """What a reference to a resource of `kind` names, one without a server being on `base`; None where that cannot be
    told: a contained resource (``#p``) has a name inside its Observation only."""
    if reference is None or (reference.type and reference.type.rpartition("/")[2] != kind):
        return None
    text = (reference.reference or "").strip()
    if text and not text.startswith("#"):
        text = text.partition("/_history/")[0]
        if match := re.fullmatch(rf"(https?://[^\s?#|]+/)?{kind}/([^\s/?#|]+)", text):
            return Identity(f"{match[1] or base}{kind}", match[2])
        if match := re.fullmatch(r"(urn:(?:uuid|oid)):([^\s|]+)", text):
            return Identity(match[1], match[2]) if kinds.get(text, kind) == kind else None
        return None
    value = ((reference.identifier and reference.identifier.value) or "").strip()
    return Identity(f"{reference.identifier.system or ''}|", value) if value else None


def _float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of hundreds of digits; the reader sets it aside as infinite
        return float("inf")


def _unit(quantity: Any) -> str | None:
    return quantity.code if quantity.system == UCUM and quantity.code else quantity.unit


def _record(
    part: Any, raw: dict[str, Any], where: str, pipeline: ProductionPipeline, found: Found
) -> dict[str, Any] | None:
    """The observation's code, value and range in the model's own terms; None where it is set aside.

    A comparator is left out: ``<0.5`` counts as its number, as everywhere.
    """
    quantity = part.valueQuantity
    # the number that was sent, not its Decimal
    number, unit = (raw["valueQuantity"].get("value"), _unit(quantity)) if quantity else (raw["valueInteger"], None)
    if number is None:
        return found.set_aside(where, "no_value")
    if isinstance(number, bool) or not isinstance(number, int | float):
        return found.set_aside(where, "bad_value")
    codings = [c for c in (part.code.coding or []) if c.code]
    codings.sort(key=lambda coding: coding.system != LOINC)
    known = [c.code for c in codings if pipeline.own_code(c.code) in pipeline.config.codes]
    code = known[0] if known else codings[0].code if codings else (part.code.text or "")
    if not code.strip():
        return found.set_aside(where, "no_code")
    record = own_terms(pipeline, code, _float(number), unit, None, None)
    if isinstance(record, str):
        return found.set_aside(where, "bad_unit", f": {record}")
    for reference in _normal_ranges(part)[:1]:
        for name, bound in (("reference_range_min", reference.low), ("reference_range_max", reference.high)):
            if bound is not None and bound.value is not None:
                own = own_terms(pipeline, code, float(bound.value), _unit(bound) or unit, None, None)
                record[name] = None if isinstance(own, str) else own["observation_value"]
    return record


def _normal_ranges(part: Any) -> list[Any]:
    """The ranges of healthy people, those that say so first; one without a type is such by the standard, one for a
    treatment's aim is none."""
    codes = [({c.code for c in (r.type.coding or [])} if r.type else set(), r) for r in part.referenceRange or []]
    return [r for own, r in codes if "normal" in own] + [r for own, r in codes if not own]


# ---------------------------------------------------------------------------------------------------- answers


def risk_assessments(found: Found, scored: Scored) -> dict[str, Any]:
    """A Bundle: a RiskAssessment for each visit, then an OperationOutcome where something was not used.

    Probabilities are fractions from 0 to 1, and the `whenRange` is the hours from the last observation.
    """
    rows_of: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        rows_of.setdefault(found.names[row.visit], []).append(row)
    entries = []
    for key, prediction in zip(scored.observations.keys(), scored.predictions(), strict=True):
        first, references = rows_of[key][0], dict.fromkeys(row.reference for row in rows_of[key] if row.reference)
        outcome: dict[str, Any] = {"outcome": {"coding": [SEPSIS], "text": "Sepsis"}}
        if (p := prediction["sepsis_probability"]) is not None:
            outcome["probabilityDecimal"] = p
            level = prediction["risk_level"]
            system = "http://terminology.hl7.org/CodeSystem/risk-probability"
            outcome["qualitativeRisk"] = {"coding": [{"system": system, "code": RISK_CODES[level]}], "text": level}
        if (hours := scored.horizon_hours) is not None:
            bound = {"unit": "h", "system": "http://unitsofmeasure.org", "code": "h"}
            outcome["whenRange"] = {"low": {"value": 0, **bound}, "high": {"value": hours, **bound}}
        resource = {
            "resourceType": "RiskAssessment",
            "status": "final",
            "subject": first.subject,
            "method": {"text": f"sepsis risk model {scored.pipeline.model_version}"},
            "basis": [{"reference": reference} for reference in references],
            "prediction": [outcome],
        }
        if prediction["as_of"]:
            resource["occurrenceDateTime"] = prediction["as_of"]
        if first.encounter is not None:
            resource["encounter"] = first.encounter
        if not resource["basis"]:
            del resource["basis"]
        RiskAssessment.model_validate(resource)
        entries.append({"resource": resource})
    issues = found.issues + _set_aside_issues(scored.set_aside())
    issues += [{"severity": "information", "code": "incomplete", "diagnostics": text} for text in scored.warnings()]
    if issues:
        entries.append({"resource": operation_outcome(issues)})
    bundle = {"resourceType": "Bundle", "type": "collection", "entry": entries}
    Bundle.model_validate(bundle)
    return bundle


def _set_aside_issues(aside: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"severity": "warning", "code": "value", "diagnostics": f"{r['count']} observations set aside: {r['meaning']}"}
        for r in aside["reasons"]
    ]


def operation_outcome(issues: list[dict[str, Any]]) -> dict[str, Any]:
    shown = issues[:MOST_ISSUES]
    if len(issues) > len(shown):
        more = f"and {len(issues) - len(shown)} more"
        shown = [*shown, {"severity": "information", "code": "informational", "diagnostics": more}]
    resource = {"resourceType": "OperationOutcome", "issue": shown}
    OperationOutcome.model_validate(resource)
    return resource


_ISSUE_CODES = {401: "login", 403: "forbidden", 404: "not-found", 413: "too-long", 422: "processing", 429: "throttled"}


def outcome_response(status: int, message: str, more: dict[str, Any]) -> Response:
    """An OperationOutcome for an error; `more` is what a JSON answer says beside the message."""
    if "request_id" in more:
        message += f"; request {more['request_id']}"
    code = _ISSUE_CODES.get(status, "exception" if status >= 500 else "invalid")
    issues = [{"severity": "error", "code": code, "diagnostics": message}]
    return response(operation_outcome(issues + _set_aside_issues(more.get("set_aside") or {"reasons": []})), status)


def response(resource: dict[str, Any], status: int = 200) -> Response:
    # our own dump: the probability keeps every digit
    return Response(json.dumps(resource, allow_nan=False), status, mimetype=MIME)
