"""FHIR R4: a Bundle of Observations in, a Bundle of RiskAssessments out.

Resources are checked by fhir.resources (its R4B models, which are R4 for the resources used here). LOINC codes are
mapped to the model's own codes of the same concept, values in another unit are converted, and what cannot be told for
sure is set aside and reported, never guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.observation import Observation
from fhir.resources.R4B.operationoutcome import OperationOutcome
from fhir.resources.R4B.riskassessment import RiskAssessment
from flask import Response
from pydantic import ValidationError
from werkzeug.exceptions import BadRequest, UnprocessableEntity

from api.service import Scored
from feature_pipeline import ProductionPipeline
from units import own_terms

MIME = "application/fhir+json"
LOINC = "http://loinc.org"
SEPSIS = {"system": "http://snomed.info/sct", "code": "91302008", "display": "Sepsis"}
RISK_CODES = {"low": "low", "medium": "moderate", "high": "high"}
NOT_A_RESULT = {"entered-in-error", "cancelled", "registered", "unknown"}
MOST_ISSUES = 50


@dataclass
class Found:
    """Observations of a bundle as records, whose they are in FHIR's words, and what was not used."""

    records: list[dict[str, Any]] = field(default_factory=list)
    basis: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)  # visit -> references, as keys
    subject: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    encounter: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    issues: list[dict[str, Any]] = field(default_factory=list)

    def set_aside(self, where: str, why: str) -> None:
        issue = {"severity": "warning", "code": "not-supported", "diagnostics": why, "expression": [where]}
        self.issues.append(issue)


def observations_of(bundle: Any, pipeline: ProductionPipeline) -> Found:
    """The observations of a bundle. Raises 400 or 422 where it is no bundle or has nothing to use."""
    if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle":
        raise BadRequest("expected a FHIR R4 Bundle of Observation resources")
    entries = bundle.get("entry")
    if not isinstance(entries, list) or not entries:
        raise UnprocessableEntity("the Bundle has no entry; expected Observation resources")
    found = Found()
    collect(entries, pipeline, found)
    if not found.records:
        raise UnprocessableEntity(
            "the Bundle has no usable Observation: "
            + ("; ".join(f"{i['expression'][0]}: {i['diagnostics']}" for i in found.issues[:5]) or "none is in it")
        )
    return found


def collect(entries: list[Any], pipeline: ProductionPipeline, found: Found, path: str = "Bundle.entry") -> None:
    """Adds the Observations among `entries` to `found`."""
    for i, entry in enumerate(entries):
        where = f"{path}[{i}]"
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if not isinstance(resource, dict):
            found.set_aside(where, "no resource")
        elif resource.get("resourceType") == "Observation":
            try:
                observation = Observation.model_validate(resource)
            except (ValidationError, ValueError, TypeError, ArithmeticError) as error:
                found.set_aside(where, f"not a valid R4 Observation: {_first_problem(error)}")
            else:
                url = entry.get("fullUrl")
                _add(observation, resource, url if isinstance(url, str) else None, where, pipeline, found)


def _first_problem(error: Exception) -> str:
    """Where a resource is wrong, without its values."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'resource'} ({first['type']})"
    return type(error).__name__


def _add(observation, resource, url, where, pipeline, found) -> None:
    if observation.status in NOT_A_RESULT:
        return found.set_aside(where, "its status says that it is no result")
    client = _id(observation.subject)
    if not client:
        return found.set_aside(where, "no subject")
    visit = _id(observation.encounter) or client  # a patient without encounters is one visit
    time = observation.effectiveDateTime or observation.effectiveInstant
    if time is None and observation.effectivePeriod is not None:
        time = observation.effectivePeriod.end or observation.effectivePeriod.start
    if not hasattr(time, "hour"):
        return found.set_aside(where, "no effective time of day")
    # a time without a zone is taken as UTC, as everywhere
    moment = time.isoformat()
    used = False
    for k, part in enumerate([observation, *(observation.component or [])]):
        here = where if k == 0 else f"{where}.component[{k - 1}]"
        raw = resource if k == 0 else resource["component"][k - 1]
        quantity = _quantity(part, raw)
        if quantity is None:
            if k or not observation.component:
                found.set_aside(here, "no valueQuantity")
            continue
        record = _record(part, *quantity, pipeline)
        if isinstance(record, str):
            found.set_aside(here, record)
            continue
        found.records.append({"visit_id": visit, "client": client, "observation_date": moment, **record})
        used = True
    if used:
        key = (client, visit)
        found.subject[key] = resource["subject"]
        if "encounter" in resource:
            found.encounter[key] = resource["encounter"]
        reference = url or (f"Observation/{observation.id}" if observation.id else "")
        if reference:
            found.basis.setdefault(key, {})[reference] = reference


def _id(reference: Any) -> str:
    """`123` of ``Patient/123`` or of a URL that ends so; else the identifier's value."""
    if reference is None:
        return ""
    if reference.reference:
        return reference.reference.split("/_history/")[0].rpartition("/")[2].removeprefix("urn:uuid:")
    return reference.identifier.value or "" if reference.identifier else ""


def _quantity(part: Any, raw: dict[str, Any]) -> tuple[float | str, str | None] | None:
    """(value, unit); the value keeps a comparator, as in ``<0.5``."""
    if part.valueQuantity is not None and part.valueQuantity.value is not None:
        quantity = part.valueQuantity
        value = float(raw["valueQuantity"]["value"])  # the number that was sent, not its Decimal
        unit = quantity.code if quantity.system == "http://unitsofmeasure.org" and quantity.code else quantity.unit
        return value, unit
    if part.valueInteger is not None:
        return float(part.valueInteger), None
    return None


def _record(part: Any, value: float, unit: str | None, pipeline: ProductionPipeline) -> dict[str, Any] | str:
    """The observation's code, value and range in the model's own terms, or why there is none."""
    codings = [c for c in (part.code.coding or []) if c.code]
    codings.sort(key=lambda coding: coding.system != LOINC)
    known = [c.code for c in codings if pipeline.own_code(c.code) in pipeline.config["codes"]]
    code = known[0] if known else codings[0].code if codings else (part.code.text or "")
    if not code:
        return "no code"
    low = high = None
    for reference in (part.referenceRange or [])[:1]:
        low = float(reference.low.value) if reference.low and reference.low.value is not None else None
        high = float(reference.high.value) if reference.high and reference.high.value is not None else None
    return own_terms(pipeline, code, value, unit, low, high)


# ---------------------------------------------------------------------------------------------------- answers


def risk_assessments(found: Found, scored: Scored) -> dict[str, Any]:
    """A Bundle: a RiskAssessment for each visit, then an OperationOutcome where something was not used.

    Probabilities are fractions from 0 to 1, and the `whenRange` is the hours from the last observation.
    """
    entries = []
    for key, prediction in zip(scored.observations.keys(), scored.predictions(), strict=True):
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
            "subject": found.subject[key],
            "method": {"text": f"sepsis risk model {scored.pipeline.model_version}"},
            "basis": [{"reference": reference} for reference in found.basis.get(key, ())],
            "prediction": [outcome],
        }
        if prediction["as_of"]:
            resource["occurrenceDateTime"] = prediction["as_of"]
        if key in found.encounter:
            resource["encounter"] = found.encounter[key]
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


def outcome_response(status: int, message: str, aside: dict[str, Any] | None = None) -> Response:
    """An OperationOutcome for an error."""
    code = _ISSUE_CODES.get(status, "exception" if status >= 500 else "invalid")
    issues = [{"severity": "error", "code": code, "diagnostics": message}]
    return response(operation_outcome(issues + _set_aside_issues(aside or {"reasons": []})), status)


def response(resource: dict[str, Any], status: int = 200) -> Response:
    # our own dump: the probability keeps every digit
    return Response(json.dumps(resource, allow_nan=False), status, mimetype=MIME)
