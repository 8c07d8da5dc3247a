"""Scores as FHIR R4 RiskAssessments."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from fhir.resources.R4B.riskassessment import RiskAssessment

from feature_pipeline import MICROSECONDS_PER_HOUR, iso_times, to_micros
from serving.fhir.reading import Found, Row
from serving.scored import Scored

SEPSIS = {"system": "http://snomed.info/sct", "code": "91302008", "display": "Sepsis"}
RISK_CODES = {"LOW": "low", "MEDIUM": "moderate", "HIGH": "high"}
RISK_ASSESSMENT = {"system": "http://snomed.info/sct", "code": "225338004", "display": "Risk assessment"}


def assessments(found: Found, scored: Scored) -> list[dict[str, Any]]:
    """A RiskAssessment for each visit, in the order of `scored`, without an id.

    Probabilities are fractions from 0 to 1. A visit of unknown risk has a RiskAssessment without prediction, and the
    reason as a note.
    """
    rows_of: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        rows_of.setdefault(found.names[row.visit], []).append(row)
    used = used_references(found, scored)
    resources = []
    for key, prediction in zip(scored.observations.keys(), scored.predictions(), strict=True):
        first = rows_of[key][0]
        resource = {
            "resourceType": "RiskAssessment",
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
        resources.append(resource)
    return resources


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
