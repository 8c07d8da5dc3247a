"""CDS Hooks: prefetched FHIR observations in, cards out."""

from __future__ import annotations

import math
import uuid
from typing import Any

from werkzeug.exceptions import BadRequest, PreconditionFailed

from api import fhir
from api.service import Scored
from feature_pipeline import ProductionPipeline

PREFETCH = {
    "vitals": "Observation?patient={{context.patientId}}&category=vital-signs&_count=1000",
    "laboratory": "Observation?patient={{context.patientId}}&category=laboratory&_count=1000",
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
INDICATORS = {"low": "info", "medium": "warning", "high": "critical", "unknown": "info"}
REASONS = 3


def observations_of(call: Any, pipeline: ProductionPipeline) -> fhir.Found:
    """The observations in a call's prefetch. Raises 400 for what is no call, 412 where the prefetch lacks them."""
    if not isinstance(call, dict) or not all(isinstance(call.get(name), str) for name in ("hook", "hookInstance")):
        raise BadRequest("expected a CDS Hooks call with hook, hookInstance, context and prefetch")
    if call["hook"] != "patient-view":
        raise BadRequest("this service answers the hook patient-view")
    prefetch = call.get("prefetch")
    bundles = [b for b in prefetch.values() if isinstance(b, dict)] if isinstance(prefetch, dict) else []
    if not bundles:
        raise PreconditionFailed(f"the prefetch holds no observations; expected {', '.join(PREFETCH)}")
    found = fhir.Found()
    for bundle in bundles:
        if bundle.get("resourceType") == "Bundle" and isinstance(bundle.get("entry"), list):
            fhir.collect(bundle["entry"], pipeline, found)
    return found


def cards(scored: Scored) -> list[dict[str, Any]]:
    """A card for each visit with a score, the highest risk first."""
    horizon = scored.horizon_hours
    within = f" within {horizon:g} h" if horizon is not None else ""
    reasons, _ = scored.reasons(REASONS)
    out = []
    for prediction, own in zip(scored.predictions(), reasons, strict=True):
        p = prediction["sepsis_probability"]
        if p is None:
            continue
        detail = [f"Probability of sepsis{within} as of {prediction['as_of']}: {percent(p)}."]
        if own:
            detail += ["", "Strongest reasons:", ""]
            detail += [f"- {'raises' if r['contribution'] > 0 else 'lowers'} the risk: {told(r)}" for r in own]
        detail += ["", *(f"_{text}_" for text in scored.warnings())]
        detail.append("Research software; no medical device. It does not replace clinical judgement.")
        card = {
            "uuid": str(uuid.uuid4()),
            "summary": f"Sepsis risk {prediction['risk_level']}: {percent(p)}{within}",
            "detail": "\n".join(detail),
            "indicator": INDICATORS[prediction["risk_level"]],
            "source": {"label": f"Sepsis risk model {scored.pipeline.model_version}"},
        }
        out.append((p, card))
    out.sort(key=lambda item: -item[0])
    return [card for _, card in out]


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
