"""FHIR R4: a Bundle of Observations in, a Bundle of RiskAssessments out; OperationOutcomes for errors."""

from __future__ import annotations

import json
import uuid
from typing import Any

from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.operationoutcome import OperationOutcome
from flask import Response, g
from werkzeug.exceptions import BadRequest, UnprocessableEntity

from feature_pipeline import ProductionPipeline
from serving.api.service import count_set_aside
from serving.evidence import unused_text
from serving.fhir.assessment import assessments
from serving.fhir.reading import MOST_ISSUES, NOT_USED, Found, add_people, collect, has_more
from serving.scored import Scored

MIME = "application/fhir+json"


def observations_of(bundle: Any, pipeline: ProductionPipeline) -> Found:
    """The observations of a bundle. Raises 400 or 422 where it is no bundle or has nothing to use."""
    if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle":
        raise BadRequest("expected a FHIR R4 Bundle of Observation resources")
    if bundle.get("implicitRules"):
        raise UnprocessableEntity("the Bundle has implicitRules, which this service does not understand")
    entries = bundle.get("entry")
    if not isinstance(entries, list) or not entries:
        raise UnprocessableEntity("the Bundle has no entry; expected Observation resources")
    found = Found(count=count_set_aside)
    collect(entries, pipeline, found)
    if has_more(bundle):
        found.set_aside("Bundle.link", "further_pages")
    if not found.rows:
        raise UnprocessableEntity(f"the Bundle has no usable Observation: {found.first_issues() or 'none is in it'}")
    add_people(found, pipeline)
    return found


def risk_assessments(found: Found, scored: Scored) -> dict[str, Any]:
    """A Bundle: a RiskAssessment for each visit, then an OperationOutcome where something was not used."""
    entries: list[dict[str, Any]] = []
    for resource in assessments(found, scored):
        number = str(uuid.uuid4())
        entries.append({"fullUrl": f"urn:uuid:{number}", "resource": {**resource, "id": number}})
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
