"""The OpenAPI document: what the service takes and answers."""

from __future__ import annotations

from typing import Any

from feature_pipeline import RANGE_COLUMNS, REQUIRED_COLUMNS, RISK_LEVELS, UNIT_COLUMN, UNKNOWN_REASONS
from serving.api.cds_hooks import HOOKS
from serving.api.conformance import OPERATION, TYPES
from serving.api.feedback import MOST_ANSWERS, OUTCOMES
from serving.api.settings import Settings


def document(settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sepsis risk",
            "version": "1",
            "description": "Probability of sepsis from observations. Research software, no medical device.",
        },
        "paths": _paths(settings),
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "an API key"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "schemas": _schemas(settings),
        },
    }


def _paths(settings: Settings) -> dict[str, Any]:
    limits = (
        f"At most {settings.max_bytes:,} bytes, {settings.max_rows:,} observations, {settings.max_visits:,} visits, "
        "and as many reasons or moments in all."
    )
    fhir = "application/fhir+json"
    # what any protected route may answer; FHIR routes answer it as an OperationOutcome
    refusals = {401: "no API key", 403: "a wrong API key", 429: "too many requests; Retry-After says when to ask again"}
    broken = {
        500: "an error of the service, with a request id",
        503: "no usable model, another large request, or no log",
    }
    bodies = {
        400: "not JSON, or not of the expected form",
        408: "the body did not arrive in time",
        413: "too large: bytes, observations or visits",
        415: "a wrong Content-Type",
        422: "nothing usable; which rows and why",
    }
    posts = refusals | broken | bodies
    scored = {**posts, 422: "nothing usable, or an option that is no number in its range"}
    return {
        "/predict": {
            "post": {
                "operationId": "predict",
                "summary": "Scores of all visits in a list of observations",
                "description": f"{limits} Rows that cannot be used are reported under set_aside; the others go on.",
                "parameters": [
                    _AS_OF,
                    _option("explain", 20, "the strongest reasons of each visit"),
                    _option("trajectory", 100, "the score at so many earlier moments of each visit"),
                    _option("series", 1, "1: each visit's observations as the model reads them"),
                ],
                "requestBody": _body("application/json", "Observations"),
                "responses": {"200": _answer("Scores", "Predictions"), **_errors(scored)},
                "security": _SECURITY,
            }
        },
        "/fhir/predict": {
            "post": {
                "operationId": "fhirPredict",
                "summary": "A FHIR R4 Bundle of Observations to a Bundle of RiskAssessments",
                "description": f"{limits} LOINC codes are mapped to the model's own, units are converted.",
                "parameters": [_AS_OF],
                "requestBody": _body(fhir, "Bundle", "application/json"),
                "responses": {
                    "200": _answer("A Bundle of RiskAssessments", "Bundle", fhir),
                    **_errors({**posts, 406: _NOT_R4}, "OperationOutcome", fhir),
                },
                "security": _SECURITY,
            }
        },
        **{
            f"/fhir/{name}/${OPERATION}": {
                "post": {
                    "operationId": f"sepsisRisk{name}",
                    "summary": "FHIR operation $sepsis-risk: Parameters or a Bundle to a Bundle of RiskAssessments",
                    "requestBody": _body(fhir, "Bundle", "application/json"),
                    "responses": {
                        "200": _answer("A Bundle of RiskAssessments", "Bundle", fhir),
                        **_errors({**posts, 406: _NOT_R4}, "OperationOutcome", fhir),
                    },
                    "security": _SECURITY,
                }
            }
            for name in TYPES
        },
        **{
            path: {
                "get": {
                    "operationId": name,
                    "summary": f"FHIR {kind}",
                    "responses": {
                        "200": _answer(kind, "Resource", fhir),
                        **_errors({406: _NOT_R4, 500: broken[500]}, "OperationOutcome", fhir),
                    },
                }
            }
            for path, name, kind in (
                ("/fhir/metadata", "fhirMetadata", "CapabilityStatement"),
                (f"/fhir/OperationDefinition/{OPERATION}", "fhirOperation", "OperationDefinition"),
            )
        },
        "/cds-services": {
            "get": {
                "operationId": "cdsServices",
                "summary": "CDS Hooks discovery",
                "responses": {"200": _answer("Services", "Services"), **_errors({500: broken[500]})},
            }
        },
        **{
            f"/cds-services/{name}": {
                "post": {
                    "operationId": f"cds-{name}",
                    "summary": f"CDS Hooks, {hook}: prefetched Observations to cards",
                    "requestBody": _body("application/json", "CdsCall"),
                    "responses": {
                        "200": _answer("Cards", "Cards"),
                        **_errors({**posts, 412: "data are neither in the prefetch nor to be fetched"}),
                    },
                    "security": _SECURITY,
                }
            }
            for name, hook in HOOKS.items()
        },
        **{
            f"/cds-services/{name}/feedback": {
                "post": {
                    "operationId": f"cds-{name}-feedback",
                    "summary": "CDS Hooks: how a clinician answered cards",
                    "requestBody": _body("application/json", "Feedback"),
                    "responses": {"200": _answer("Stored", "Empty"), **_errors(posts)},
                    "security": _SECURITY,
                }
            }
            for name in HOOKS
        },
        "/health": _get("health", "Does the process answer?", "Status", {500: broken[500]}),
        "/ready": _get("ready", "Is the model loaded and checked?", "Status", broken),
        "/model": _get("model", "What the model is", "Model", {401: refusals[401], 403: refusals[403], **broken}, True),
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Counters for Prometheus",
                "responses": {
                    "200": {"description": "Counters", "content": {"text/plain": {"schema": {"type": "string"}}}},
                    **_errors({401: refusals[401], 403: refusals[403], 500: broken[500]}),
                },
                "security": _SECURITY,
            }
        },
    }


_NOT_R4 = "the client accepts no FHIR R4 in JSON"
_SECURITY = [{"bearer": []}, {"header": []}, {}]


_AS_OF = {
    "name": "as_of",
    "in": "query",
    "description": "the moment that is scored: now, last (each visit's last observation), or an ISO 8601 time",
    "schema": {
        "anyOf": [{"enum": ["now", "last"]}, {"type": "string", "format": "date-time"}],
        "default": "now",
    },
}


def _option(name: str, most: int, what: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 0, "maximum": most, "default": 0}
    return {"name": name, "in": "query", "description": what, "schema": schema}


def _body(mime: str, schema: str, *others: str) -> dict[str, Any]:
    content = {"schema": _ref(schema)}
    return {"required": True, "content": {kind: content for kind in (mime, *others)}}


def _answer(what: str, schema: str, mime: str = "application/json") -> dict[str, Any]:
    return {"description": what, "content": {mime: {"schema": _ref(schema)}}}


def _errors(of: dict[int, str], schema: str = "Problem", mime: str = "application/problem+json") -> dict[str, Any]:
    return {str(status): _answer(what, schema, mime) for status, what in sorted(of.items())}


def _get(name: str, what: str, schema: str, errors: dict[int, str], protected: bool = False) -> dict[str, Any]:
    operation = {"operationId": name, "summary": what, "responses": {"200": _answer(what, schema), **_errors(errors)}}
    return {"get": {**operation, "security": _SECURITY} if protected else operation}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas(settings: Settings) -> dict[str, Any]:
    text = {"type": "string"}
    cell = {"type": ["string", "number", "null"]}
    name = {"type": ["string", "integer", "number"]}
    probability = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
    set_aside = _object(
        rows={"type": "integer"},
        reasons={
            "type": "array",
            "items": _object(
                reason=text,
                meaning=text,
                count={"type": "integer"},
                first_rows={"type": "array", "items": {"type": "integer"}, "description": "counted from 0"},
            ),
        },
    )
    number = {"type": ["number", "null"]}
    time_ = {"type": ["string", "null"]}
    why = {"enum": [None, *UNKNOWN_REASONS], "description": "why the risk is UNKNOWN"}
    reason = _object(feature=text, value=number, contribution={"type": "number"}, text=text)
    point = _object(as_of=text, sepsis_probability=probability, reason=why)
    series = _object(
        code=text,
        name=text,
        unit=text,
        used={"type": "boolean", "description": "does the model look at this code?"},
        points={
            "type": "array",
            "description": "time, value, lower and upper bound of the reference range",
            "items": {"type": "array", "items": {"type": ["string", "number", "null"]}},
        },
    )
    prediction = _object(
        visit_id=name,
        client=name,
        sepsis_probability=probability,
        risk_level={"enum": [*RISK_LEVELS]},
        reason=why,
        reason_text={**time_, "description": "the same in words"},
        missing={"type": "array", "items": text, "description": "quantities that were not measured recently"},
        as_of={**time_, "description": "the moment that is scored, UTC"},
        newest_observation={**time_, "description": "of those that the model uses, UTC"},
        hours_since_newest=number,
        num_observations={"type": "integer", "description": "that the model uses"},
    )
    prediction["properties"] |= {
        "series": {"type": "array", "items": series},
        "reasons": {"type": "array", "items": reason},
        "trajectory": {"type": "array", "items": point},
    }
    observation = {
        "type": "object",
        "properties": {
            "visit_id": {**name, "examples": [10001]},
            "client": {**name, "examples": ["demo-00001"]},
            "observation_date": {**text, "description": "ISO 8601", "examples": ["2024-06-01T08:00:00"]},
            "observation_type_code": {**text, "examples": ["HR"]},
            "observation_value": {**cell, "examples": [92]},
            **{bound: {**cell, "description": "may be absent"} for bound in RANGE_COLUMNS},
            UNIT_COLUMN: {"type": ["string", "null"], "description": "UCUM or a usual spelling; may be absent"},
        },
        "required": list(REQUIRED_COLUMNS),
    }
    resource = {"type": "object", "required": ["resourceType"], "properties": {"resourceType": text}}
    return {
        "Observations": {"type": "array", "minItems": 1, "maxItems": settings.max_rows, "items": observation},
        "Predictions": _object(
            status={"const": "success"},
            model_version=text,
            predictions={"type": "array", "items": prediction},
            unused_codes={
                "type": "object",
                "additionalProperties": {"type": "integer"},
                "description": "observations of codes that the model does not use, by code",
            },
            set_aside=set_aside,
            warnings={"type": "array", "items": text},
        ),
        "Problem": {
            "type": "object",
            "description": "RFC 9457",
            "required": ["type", "title", "status", "detail", "request_id"],
            "properties": {
                "type": {"const": "about:blank"},
                "title": text,
                "status": {"type": "integer"},
                "detail": text,
                "request_id": text,
                "set_aside": set_aside,
                "expected": {"type": "array", "items": text},
            },
        },
        "Bundle": {
            **resource,
            "required": ["resourceType", "type"],
            "properties": {
                "resourceType": {"const": "Bundle"},
                "type": {"enum": ["collection", "searchset", "batch", "message", "document"]},
                "entry": {"type": "array", "items": {"type": "object", "properties": {"resource": resource}}},
            },
        },
        "OperationOutcome": resource,
        "Resource": resource,
        "CdsCall": {
            "type": "object",
            "required": ["hook", "hookInstance", "context"],
            "properties": {
                "hook": {"enum": [*HOOKS.values()]},
                "hookInstance": text,
                "context": {
                    "type": "object",
                    "required": ["patientId"],
                    "properties": {
                        "patientId": {**text, "minLength": 1},
                        "encounterId": {**text, "minLength": 1, "description": "else the latest visit is scored"},
                    },
                },
                "prefetch": {"type": "object", "additionalProperties": {"anyOf": [_ref("Resource"), {"type": "null"}]}},
                "fhirServer": {**text, "description": "is asked for what the prefetch lacks, if it is on the list"},
                "fhirAuthorization": {"type": "object", "properties": {"access_token": text}},
            },
        },
        "Feedback": _object(
            feedback={
                "type": "array",
                "minItems": 1,
                "maxItems": MOST_ANSWERS,
                "items": {
                    "type": "object",
                    "required": ["card", "outcome", "outcomeTimestamp"],
                    "properties": {
                        "card": {**text, "description": "the uuid of the card", "minLength": 1, "maxLength": 36},
                        "outcome": {"enum": [*OUTCOMES]},
                        "outcomeTimestamp": {**text, "format": "date-time"},
                        "overrideReason": {"type": "object", "properties": {"reason": {"type": "object"}}},
                    },
                },
            }
        ),
        "Empty": {"type": "object"},
        "Services": _object(services={"type": "array", "items": {"type": "object"}}),
        "Cards": _object(
            cards={
                "type": "array",
                "items": _object(
                    uuid=text,
                    summary={**text, "maxLength": 140},
                    detail=text,
                    indicator={"enum": ["info", "warning", "critical"]},
                    source=_object(label=text),
                    overrideReasons={"type": "array", "items": _object(system=text, code=text, display=text)},
                ),
            }
        ),
        "Status": {
            "type": "object",
            "required": ["status"],
            "properties": {
                "status": text,
                "model_version": text,
                "predictions_logged": {"type": "boolean"},
                "predictions_waiting": {"type": "integer"},
                "predictions_not_logged": {"type": "integer"},
            },
        },
        "Model": {"type": "object", "required": ["model_version", "feature_set", "n_features", "metrics"]},
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}
