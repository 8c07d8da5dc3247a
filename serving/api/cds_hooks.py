"""CDS Hooks: prefetched FHIR observations in, cards out."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from typing import Any, NamedTuple

from werkzeug.exceptions import BadRequest, PreconditionFailed, UnprocessableEntity

from common.fhir import Identity
from feature_pipeline import FUTURE_TOLERANCE, NOTHING_USABLE, SET_ASIDE_REASONS, UNKNOWN_REASONS, ProductionPipeline
from serving.api.feedback import OVERRIDE_REASONS
from serving.api.service import count_set_aside
from serving.fhir.reading import NOT_USED, Found, add_people, collect, has_more
from serving.scored import Scored
from serving.words import age_text

OBSERVATIONS = {
    name: f"Observation?patient={{{{context.patientId}}}}&category={category}&_sort=-date&_count=1000"
    for name, category in (("vitals", "vital-signs"), ("laboratory", "laboratory"))
}
PREFETCH = {"patient": "Patient/{{context.patientId}}", **OBSERVATIONS}
HOOKS = {  # by the id of the service; each hook's context names the patient, and an encounter if there is one
    "sepsis-risk": "patient-view",
    "sepsis-risk-encounter-start": "encounter-start",
    "sepsis-risk-order-select": "order-select",
}
SERVICES = {
    "services": [
        {
            "hook": hook,
            "id": name,
            "title": "Sepsis risk",
            "description": "Probability of sepsis in the next hours, from vital signs and laboratory values",
            "prefetch": PREFETCH,
        }
        for name, hook in HOOKS.items()
    ]
}
INDICATORS = {"LOW": "info", "MEDIUM": "warning", "HIGH": "critical", "UNKNOWN": "info"}
REASONS, MOST_NAMES = 3, 8  # of a card


def check(call: Any, service: str) -> None:
    """Raises 400 for what is no call of the hook of `service`."""
    if not isinstance(call, dict) or not all(isinstance(call.get(name), str) for name in ("hook", "hookInstance")):
        raise BadRequest("expected a CDS Hooks call with hook, hookInstance, context and prefetch")
    if call["hook"] != HOOKS[service]:
        raise BadRequest(f"this service answers the hook {HOOKS[service]}")
    context = call.get("context")
    patient = context.get("patientId") if isinstance(context, dict) else None
    if not isinstance(patient, str) or not patient.strip():
        raise BadRequest("expected context.patientId, the id of the patient that is viewed")
    encounter = context.get("encounterId")
    if encounter is not None and (not isinstance(encounter, str) or not encounter.strip()):
        raise BadRequest("context.encounterId is not the id of an encounter")
    context["patientId"], context["encounterId"] = patient.strip(), encounter and encounter.strip()


def observations_of(call: dict[str, Any], pipeline: ProductionPipeline, now: float) -> Found:
    """The observations of the patient and encounter of a checked call; of the patient's latest visit where it names no
    encounter.

    No rows where the patient has none that can be used: with issues where some were sent. Raises 412 where the prefetch
    tells of an error.
    """
    context, prefetch = call["context"], call["prefetch"]
    found = Found(count=count_set_aside)
    entries, places = [], []
    for name, given in prefetch.items():
        where = f"prefetch.{name}" if name in PREFETCH else "prefetch"
        kind = given.get("resourceType") if isinstance(given, dict) else None
        if kind == "Bundle":
            inside = given.get("entry")
            inside = inside if isinstance(inside, list) else []
            places += [f"{where}.entry[{i}]" for i in range(len(inside))]
            entries += inside
            if has_more(given):
                found.set_aside(where, "further_pages")
        elif kind == "Patient":
            entries.append({"resource": given})
            places.append(where)
        elif given is not None:  # null: there are no data
            found.set_aside(where, "source_failed" if kind == "OperationOutcome" else "malformed")
    collect(entries, pipeline, found, places)
    if not found.rows and found.set_aside_counts["source_failed"]:
        raise PreconditionFailed(f"the prefetch holds no observations ({found.first_issues()})")
    asked = of_visit(found, context["patientId"], context["encounterId"], now + FUTURE_TOLERANCE / 1e6)
    add_people(asked, pipeline)
    return asked


def of_visit(found: Found, patient: str, encounter: str | None, no_later: float) -> Found:
    """What was found of a patient's visit: the named encounter, or the one with the latest observation up to `no_later`
    (seconds since 1970). A patient whose observations name no encounter is one visit. Raises 422 where several servers
    have a patient of that id."""
    asked = replace(found, rows=[])
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
        times = [(row.moment.timestamp(), row.visit) for row in own]
        past = [known for known in times if known[0] <= no_later]
        latest = max(past or times, key=lambda known: known[0])[1]
        asked.rows = [row for row in own if row.visit == latest]
    return asked


def has_id(identity: Identity, resource_id: str) -> bool:
    """Is it the resource of that id? An identifier is a number of another kind, if it looks alike."""
    return identity.value == resource_id and not identity.place.endswith("|")


class Shown(NamedTuple):
    """A card, and whom it is about."""

    card: dict[str, Any]
    client: str
    visit: str
    level: str


def cards(found: Found, scored: Scored) -> list[Shown]:
    """A card for each visit, the highest risk first; one of unknown risk says so."""
    horizon = scored.horizon_hours
    within = f" within {horizon:g} h" if horizon is not None else ""
    reasons, _ = scored.reasons(REASONS)
    remarks = not_used(found, scored)
    if absent := scored.absent_quantities:
        remarks.insert(0, f"Nearly always measured, and not here: {listed(absent)}.")
    version = scored.pipeline.model_version
    out = []
    for key, prediction, own in zip(scored.observations.keys(), scored.predictions(), reasons, strict=True):
        p, hours = prediction["sepsis_probability"], prediction["hours_since_newest"]
        moment = f"{datetime.fromisoformat(prediction['as_of']):%Y-%m-%d %H:%M} UTC"
        age = "" if hours is None else f"The newest observation that the model uses is {age_text(hours)} old."
        level = prediction["risk_level"]
        if p is None:
            out.append((-1, Shown(unknown_card(prediction["reason_text"], [age, *remarks], version), *key, level)))
            continue
        detail = [f"Probability of sepsis{within} of {moment}: {percent(p)}. {age}"]
        if own:
            detail += ["", "Strongest reasons:", ""]
            detail += [f"- {'raises' if r['contribution'] > 0 else 'lowers'} the risk: {r['text']}" for r in own]
        summary = f"Sepsis risk {level}: {percent(p)}{within} of {moment}"
        out.append((p, Shown(card(summary, detail, remarks, INDICATORS[level], version), *key, level)))
    out.sort(key=lambda item: -item[0])
    return [shown for _, shown in out]


def no_cards(call: dict[str, Any], found: Found, version: str) -> list[Shown]:
    """Where there is nothing to score: no card for a patient without data, the card of an unknown risk where there are
    some that cannot be used."""
    if not found.issues:
        return []
    patient, encounter = call["context"]["patientId"], call["context"]["encounterId"]
    given = unknown_card(UNKNOWN_REASONS[NOTHING_USABLE], not_used(found), version)
    return [Shown(given, patient, encounter or patient, "UNKNOWN")]


def unknown_card(why: str, remarks: list[str], version: str) -> dict[str, Any]:
    """A card that says that the risk is unknown, which is no sign that it is low."""
    detail = [f"The risk of sepsis is unknown: {why}. This does not mean that it is low."]
    return card("Sepsis risk UNKNOWN: too little recent data", detail, remarks, INDICATORS["UNKNOWN"], version)


def card(summary: str, detail: list[str], remarks: list[str], indicator: str, version: str) -> dict[str, Any]:
    lines = [*detail, "", *(f"_{text}_" for text in remarks if text)]
    lines.append("Research software; no medical device. It does not replace clinical judgement.")
    return {
        "uuid": str(uuid.uuid4()),
        "summary": summary,
        "detail": "\n".join(lines),
        "indicator": indicator,
        "source": {"label": f"Sepsis risk model {version}"},
        "overrideReasons": OVERRIDE_REASONS,
    }


def not_used(found: Found, scored: Scored | None = None) -> list[str]:
    """A sentence where data were set aside, and one on quantities that the model does not use."""
    counts = [(n, NOT_USED[reason].partition(":")[0]) for reason, n in found.set_aside_counts.items()]
    if scored is not None:
        counts += [(n, SET_ASIDE_REASONS[reason]) for reason, n in scored.observations.set_aside.items()]
    told = [f"Not used: {'; '.join(f'{n} x {why}' for n, why in counts)}."] if counts else []
    if scored is not None and scored.unused_codes:
        names = list(dict.fromkeys(found.labels.get(code, code) for code in scored.unused_codes))
        told.append(f"The model does not look at: {listed(names)}.")
    return told


def listed(names: Sequence[str]) -> str:
    """The first few names, as text that holds no markup: they may be the EHR's."""
    told = [escape(re.sub(r"[\s\\`*_\[\]#|~]+", " ", name).strip()[:60]) for name in names[:MOST_NAMES]]
    return ", ".join(told) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def percent(p: float) -> str:
    """A probability for people: never 0% or 100%."""
    if p < 0.001:
        return "below 0.1%"
    if p > 0.999:
        return "above 99.9%"
    return f"{100 * p:.1f}%" if p < 0.1 else f"{math.floor(100 * p + 0.5)}%" if p < 0.99 else f"{100 * p:.1f}%"
