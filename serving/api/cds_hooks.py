"""CDS Hooks: prefetched FHIR observations in, cards out."""

from __future__ import annotations

import math
import uuid
from datetime import datetime
from typing import Any

from werkzeug.exceptions import BadRequest, PreconditionFailed, UnprocessableEntity

from feature_pipeline import SET_ASIDE_REASONS, ProductionPipeline
from serving.api import fhir
from serving.api.service import Scored

PREFETCH = {
    name: f"Observation?patient={{{{context.patientId}}}}&category={category}&_sort=-date&_count=1000"
    for name, category in (("vitals", "vital-signs"), ("laboratory", "laboratory"))
}
SERVICES = {
    "services": [
        {
            "hook": "patient-view",
            "id": "sepsis-risk",
            "title": "Sepsis risk",
            "description": "Probability of sepsis in the next hours, from vital signs and laboratory values",
            "prefetch": PREFETCH,
        }
    ]
}
INDICATORS = {"LOW": "info", "MEDIUM": "warning", "HIGH": "critical", "UNKNOWN": "info"}
REASONS = 3


def observations_of(call: Any, pipeline: ProductionPipeline) -> fhir.Found:
    """The observations of the call's patient and encounter; of the patient's latest visit where it names no encounter.

    No rows where the patient has none. Raises 400 for what is no call, 412 where the prefetch lacks observations or
    tells of an error, 422 where none of them is usable.
    """
    if not isinstance(call, dict) or not all(isinstance(call.get(name), str) for name in ("hook", "hookInstance")):
        raise BadRequest("expected a CDS Hooks call with hook, hookInstance, context and prefetch")
    if call["hook"] != "patient-view":
        raise BadRequest("this service answers the hook patient-view")
    context = call.get("context")
    patient = context.get("patientId") if isinstance(context, dict) else None
    if not isinstance(patient, str) or not patient.strip():
        raise BadRequest("expected context.patientId, the id of the patient that is viewed")
    encounter = context.get("encounterId")
    if encounter is not None and (not isinstance(encounter, str) or not encounter.strip()):
        raise BadRequest("context.encounterId is not the id of an encounter")
    prefetch = call.get("prefetch")
    given = {k: v for k, v in prefetch.items() if v is not None} if isinstance(prefetch, dict) else {}
    found, n_bundles = fhir.Found(), 0
    for name, bundle in given.items():
        where = f"prefetch.{name}" if name in PREFETCH else "prefetch"
        if isinstance(bundle, dict) and bundle.get("resourceType") == "Bundle":
            n_bundles += 1
            entries = bundle.get("entry")
            fhir.collect(entries if isinstance(entries, list) else [], pipeline, found, f"{where}.entry")
            if has_more(bundle):
                found.set_aside(where, "further_pages")
        else:
            failed = isinstance(bundle, dict) and bundle.get("resourceType") == "OperationOutcome"
            found.set_aside(where, "source_failed" if failed else "malformed")
    if not n_bundles or (not found.rows and found.set_aside_counts["source_failed"]):
        raise PreconditionFailed(
            f"the prefetch holds no observations ({found.first_issues() or 'it is empty'}); "
            f"expected {', '.join(PREFETCH)}"
        )
    asked = of_visit(found, patient.strip(), encounter and encounter.strip())
    if not asked.rows and asked.issues:
        raise UnprocessableEntity(f"the prefetch has no usable Observation: {asked.first_issues()}")
    return asked


def has_more(bundle: dict[str, Any]) -> bool:
    """Are there observations that the bundle does not hold?"""
    links = bundle.get("link")
    return isinstance(links, list) and any(isinstance(link, dict) and link.get("relation") == "next" for link in links)


def of_visit(found: fhir.Found, patient: str, encounter: str | None) -> fhir.Found:
    """What was found of a patient's visit: the named encounter, or the one with the latest observation. A patient whose
    observations name no encounter is one visit. Raises 422 where several servers have a patient of that id."""
    asked = fhir.Found(issues=found.issues, set_aside_counts=found.set_aside_counts)
    own = [row for row in found.rows if has_id(row.visit[0], patient)]
    if len(own) < len(found.rows):
        asked.set_aside("prefetch", "other_patient", n=len(found.rows) - len(own))
    if len({row.visit[0] for row in own}) > 1:
        raise UnprocessableEntity("the prefetch holds observations of patients of several servers under one id")
    if encounter is not None and any(row.visit[1] for row in own):
        asked.rows = [row for row in own if row.visit[1] and has_id(row.visit[1], encounter)]
        if nowhere := sum(row.visit[1] is None for row in own):
            asked.set_aside("prefetch", "no_encounter", n=nowhere)
    elif own:
        latest = max(own, key=lambda row: row.moment).visit
        asked.rows = [row for row in own if row.visit == latest]
    return asked


def has_id(identity: fhir.Identity, resource_id: str) -> bool:
    """Is it the resource of that id? An identifier is a number of another kind, if it looks alike."""
    return identity.value == resource_id and not identity.place.endswith("|")


def cards(found: fhir.Found, scored: Scored) -> list[dict[str, Any]]:
    """A card for each visit with a score, the highest risk first."""
    horizon = scored.horizon_hours
    within = f" within {horizon:g} h" if horizon is not None else ""
    reasons, _ = scored.reasons(REASONS)
    remarks = [*scored.warnings(), *not_used(found, scored)]
    out = []
    for prediction, own in zip(scored.predictions(), reasons, strict=True):
        p = prediction["sepsis_probability"]
        if p is None:
            continue
        moment = f"{datetime.fromisoformat(prediction['as_of']):%Y-%m-%d %H:%M} UTC"
        detail = [f"Probability of sepsis{within} of {moment}, the time of the latest observation: {percent(p)}."]
        if own:
            detail += ["", "Strongest reasons:", ""]
            detail += [f"- {'raises' if r['contribution'] > 0 else 'lowers'} the risk: {told(r)}" for r in own]
        detail += ["", *(f"_{text}_" for text in remarks)]
        detail.append("Research software; no medical device. It does not replace clinical judgement.")
        card = {
            "uuid": str(uuid.uuid4()),
            "summary": f"Sepsis risk {prediction['risk_level']}: {percent(p)}{within} of {moment}",
            "detail": "\n".join(detail),
            "indicator": INDICATORS[prediction["risk_level"]],
            "source": {"label": f"Sepsis risk model {scored.pipeline.model_version}"},
        }
        out.append((p, card))
    out.sort(key=lambda item: -item[0])
    return [card for _, card in out]


def not_used(found: fhir.Found, scored: Scored) -> list[str]:
    """A sentence where data were set aside."""
    counts = [(n, fhir.NOT_USED[reason].partition(":")[0]) for reason, n in found.set_aside_counts.items()]
    counts += [(n, SET_ASIDE_REASONS[reason]) for reason, n in scored.observations.set_aside.items()]
    return [f"Not used: {'; '.join(f'{n} x {why}' for n, why in counts)}."] if counts else []


def percent(p: float) -> str:
    """A probability for people: never 0% or 100%."""
    if p < 0.001:
        return "below 0.1%"
    if p > 0.999:
        return "above 99.9%"
    return f"{100 * p:.1f}%" if p < 0.1 else f"{math.floor(100 * p + 0.5)}%" if p < 0.99 else f"{100 * p:.1f}%"


def told(reason: dict[str, Any]) -> str:
    """A feature with its value, for people."""
    value = reason["value"]
    return f"{reason['feature']} = {value:.4g}" if value is not None else f"{reason['feature']} not measured"
