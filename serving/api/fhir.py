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
from typing import Any

from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.observation import Observation
from fhir.resources.R4B.operationoutcome import OperationOutcome
from fhir.resources.R4B.riskassessment import RiskAssessment
from flask import Response
from pydantic import ValidationError
from werkzeug.exceptions import BadRequest, UnprocessableEntity

from common.fhir import NOT_USED as PART_NOT_USED
from common.fhir import Identity, NotUsed, Reading, readings
from common.units import own_terms
from feature_pipeline import ProductionPipeline
from serving.api.service import Scored, count_set_aside

MIME = "application/fhir+json"
SEPSIS = {"system": "http://snomed.info/sct", "code": "91302008", "display": "Sepsis"}
RISK_CODES = {"LOW": "low", "MEDIUM": "moderate", "HIGH": "high"}
MOST_ISSUES = 50
# why something of a bundle is not used; the keys are the metrics' reasons
NOT_USED = {
    **PART_NOT_USED,
    "malformed": "no resource",
    "source_failed": "the source reports an error",
    "bad_unit": "its unit cannot be converted",
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
                Observation.model_validate(resource)
            except (ValidationError, ValueError, TypeError, ArithmeticError) as error:
                found.set_aside(where, "bad_resource", f": {_first_problem(error)}")
            else:
                url = entry.get("fullUrl")
                _add(resource, url if isinstance(url, str) else "", where, pipeline, found, kinds)


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


def _add(resource, url, where, pipeline, found, kinds) -> None:
    server = re.fullmatch(r"(https?://[^\s?#|]+/)Observation/[^/]+", url)
    reference = url or (f"Observation/{resource['id']}" if resource.get("id") else "")
    for part in readings(resource, server[1] if server else "", kinds):
        if isinstance(part, NotUsed):
            found.set_aside(f"{where}{part.where}", part.reason)
            continue
        record = _record(part, f"{where}{part.where}", pipeline, found)
        if record:
            # a time without a zone is taken as UTC, as everywhere
            moment = part.time if part.time.tzinfo else part.time.replace(tzinfo=UTC)
            visit = (part.patient, part.encounter)
            found.rows.append(Row(visit, moment, record, resource["subject"], resource.get("encounter"), reference))


def _record(part: Reading, where: str, pipeline: ProductionPipeline, found: Found) -> dict[str, Any] | None:
    """The observation's code, value and range in the model's own terms; None where it is set aside."""
    known = [code for code in part.codes if pipeline.own_code(code) in pipeline.config.codes]
    code = known[0] if known else part.codes[0]
    record = own_terms(pipeline, code, part.value, part.unit, None, None)
    if isinstance(record, str):
        return found.set_aside(where, "bad_unit", f": {record}")
    for name, bound in (("reference_range_min", part.low), ("reference_range_max", part.high)):
        if bound is not None:
            own = own_terms(pipeline, code, *bound, None, None)
            record[name] = None if isinstance(own, str) else own["observation_value"]
    return record


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
