"""What a FHIR client asks before it sends anything: CapabilityStatement, OperationDefinition, media type, version."""

from __future__ import annotations

from typing import Any

from fhir.resources.R4B.capabilitystatement import CapabilityStatement
from fhir.resources.R4B.operationdefinition import OperationDefinition
from flask import Request
from werkzeug.exceptions import BadRequest, NotAcceptable, UnsupportedMediaType
from werkzeug.http import parse_options_header

from serving.api.bodies import FHIR_TYPES

VERSION = "4.0.1"  # of FHIR
DATE = "2026-11-25"  # of the last change of what follows
OPERATION = "sepsis-risk"
TYPES = ("Patient", "Encounter")


def capability_statement(base: str) -> dict[str, Any]:
    """CapabilityStatement of the service whose FHIR base URL is `base`."""
    operation = {"name": OPERATION, "definition": f"{base}/OperationDefinition/{OPERATION}"}
    statement = {
        "resourceType": "CapabilityStatement",
        "status": "active",
        "date": DATE,
        "kind": "instance",
        "implementation": {"description": "Sepsis risk. Research software, no medical device.", "url": base},
        "fhirVersion": VERSION,
        "format": ["application/fhir+json", "json"],
        "rest": [
            {
                "mode": "server",
                "documentation": "Scores the Observations of a Bundle; nothing that is sent is stored as a resource.",
                "security": {"description": "An API key, sent as a bearer token."},
                "resource": [{"type": name, "operation": [operation]} for name in TYPES],
            }
        ],
    }
    CapabilityStatement.model_validate(statement)
    return statement


def operation_definition(base: str) -> dict[str, Any]:
    """OperationDefinition of ``$sepsis-risk``."""
    definition = {
        "resourceType": "OperationDefinition",
        "id": OPERATION,
        "url": f"{base}/OperationDefinition/{OPERATION}",
        "name": "SepsisRisk",
        "title": "Risk of sepsis",
        "status": "active",
        "kind": "operation",
        "affectsState": False,
        "code": OPERATION,
        "resource": list(TYPES),
        "system": False,
        "type": True,
        "instance": False,
        "parameter": [
            {
                "name": "observations",
                "use": "in",
                "min": 1,
                "max": "1",
                "documentation": "Observations, and the Patient and Encounter resources that they name",
                "type": "Bundle",
            },
            {
                "name": "as-of",
                "use": "in",
                "min": 0,
                "max": "1",
                "documentation": "the moment that is scored: now (the default), last, or a dateTime",
                "type": "string",
            },
            {
                "name": "return",
                "use": "out",
                "min": 1,
                "max": "1",
                "documentation": "a RiskAssessment for each encounter, and an OperationOutcome",
                "type": "Bundle",
            },
        ],
    }
    OperationDefinition.model_validate(definition)
    return definition


def check_media_type(request: Request) -> None:
    """Raises 406 where the client accepts no FHIR R4 in JSON, 415 where it says that it sends another version."""
    _, options = parse_options_header(request.headers.get("Content-Type", ""))
    if not _is_r4(options):
        raise UnsupportedMediaType(f"this service reads FHIR R4 (fhirVersion={VERSION[:3]})")
    accepted = [parse_options_header(part) for part in request.headers.get("Accept", "*/*").split(",")]
    if not any(
        kind in (*FHIR_TYPES, "application/*", "*/*") and _is_r4(options) and options.get("q") not in ("0", "0.0")
        for kind, options in accepted
    ):
        raise NotAcceptable(f"this service answers {FHIR_TYPES[0]}; fhirVersion={VERSION[:3]}")


def _is_r4(options: dict[str, str]) -> bool:
    return options.get("fhirversion", options.get("fhirVersion", VERSION)) in (VERSION, VERSION[:3])


def parameters_of(resource: Any) -> tuple[Any, str | None]:
    """(the Bundle, the moment) of a Parameters resource; (the resource, None) of any other. Raises 400."""
    if not isinstance(resource, dict) or resource.get("resourceType") != "Parameters":
        return resource, None
    parameters = resource.get("parameter")
    named = {p.get("name"): p for p in parameters if isinstance(p, dict)} if isinstance(parameters, list) else {}
    as_of = named.get("as-of", {})
    moment = as_of.get("valueString") or as_of.get("valueDateTime") or as_of.get("valueCode")
    bundle = named.get("observations", {}).get("resource")
    if bundle is None or not isinstance(moment, str | None):
        raise BadRequest("expected Parameters with the Bundle `observations` and, optional, the string `as-of`")
    return bundle, moment
