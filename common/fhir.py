"""A FHIR R4 Observation as the service and the import of files read it: from plain JSON, one part at a time.

The parts are the Observation itself and its components. Codes and units stay those that were sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

LOINC = "http://loinc.org"
UCUM = "http://unitsofmeasure.org"
NOT_A_RESULT = {"entered-in-error", "cancelled", "registered", "unknown"}
# why a part is not used
NOT_USED = {
    "bad_resource": "not a valid R4 Observation",
    "no_result": "its status says that it is no result",
    "not_understood": "it has a modifierExtension or implicitRules, which may change what it means",
    "other_focus": "it is about another one than its subject (focus)",
    "no_subject": "no subject that says which Patient: Patient/ID, its URL, urn:uuid or an identifier",
    "no_encounter": "its encounter does not say which: Encounter/ID, its URL, urn:uuid or an identifier",
    "no_date": "no effective time of day",
    "no_value": "no valueQuantity",
    "bad_value": "its value is no JSON number",
    "no_code": "no code",
}


class Identity(NamedTuple):
    """What a reference names: `value` alone is not unique, the same number may come from another server or system."""

    place: str  # server and type, ``http://a.org/fhir/Patient``; or an identifier's system with | behind it
    value: str


@dataclass(frozen=True)
class Reading:
    """One part with a number."""

    where: str  # within the Observation: empty, or .component[0]
    patient: Identity
    encounter: Identity | None
    time: datetime  # as sent, with or without a zone
    codes: tuple[str, ...]  # LOINC codes first; the text where there is no coding
    value: float
    unit: str | None
    low: tuple[float, str | None] | None  # the normal range's bounds, with their units
    high: tuple[float, str | None] | None
    label: str = ""  # the sender's words for what was measured
    is_ucum: bool = False  # the unit is a code of UCUM


class NotUsed(NamedTuple):
    """One part that is not used."""

    where: str
    reason: str  # of `NOT_USED`
    code: str


def readings(
    resource: Mapping[str, Any], base: str = "", kinds: Mapping[str, Any] | None = None
) -> Iterator[Reading | NotUsed]:
    """The parts of an Observation that have a number, and why others are not used.

    `base` is the server that a relative reference is on, `kinds` says what type a full URL of the same Bundle stands
    for. A comparator is left out: ``<0.5`` counts as its number, as everywhere.
    """
    try:
        yield from _readings(resource, base, kinds or {})
    except (AttributeError, KeyError, TypeError, ValueError):  # something is no object or list where it should be one
        yield NotUsed("", "bad_resource", "")


def _readings(resource: Mapping[str, Any], base: str, kinds: Mapping[str, Any]) -> Iterator[Reading | NotUsed]:
    first_code = _codes(resource)[:1]
    code = first_code[0] if first_code else ""
    if resource.get("status") in NOT_A_RESULT:
        yield NotUsed("", "no_result", code)
        return
    if resource.get("implicitRules") or resource.get("modifierExtension"):
        yield NotUsed("", "not_understood", code)
        return
    if resource.get("focus"):
        yield NotUsed("", "other_focus", code)
        return
    patient = identity(resource.get("subject"), "Patient", base, kinds)
    if patient is None:
        yield NotUsed("", "no_subject", code)
        return
    encounter = identity(resource.get("encounter"), "Encounter", base, kinds)
    if encounter is None and resource.get("encounter") is not None:
        yield NotUsed("", "no_encounter", code)
        return
    time = effective_time(resource)
    if time is None:
        yield NotUsed("", "no_date", code)
        return
    components = resource.get("component") or []
    for place, part in enumerate([resource, *components]):
        where = f".component[{place - 1}]" if place else ""
        quantity = part.get("valueQuantity")
        codes = _codes(part)
        if place and part.get("modifierExtension"):
            yield NotUsed(where, "not_understood", codes[0] if codes else "")
            continue
        number = quantity.get("value") if quantity is not None else part.get("valueInteger")
        if number is None:
            if place or not components:  # a panel has no value of its own
                yield NotUsed(where, "no_value", codes[0] if codes else "")
        elif isinstance(number, bool) or not isinstance(number, int | float):
            yield NotUsed(where, "bad_value", codes[0] if codes else "")
        elif not codes:
            yield NotUsed(where, "no_code", "")
        else:
            unit = _unit(quantity) if quantity is not None else None
            low, high = _normal_range(part, unit)
            is_ucum = bool(quantity and quantity.get("code") and quantity.get("system") == UCUM)
            value = _float(number)
            yield Reading(where, patient, encounter, time, codes, value, unit, low, high, _label(part), is_ucum)


def effective_time(resource: Mapping[str, Any]) -> datetime | None:
    """When an Observation was true: its instant, or the end of its period; None where no time of day is known."""
    period = resource.get("effectivePeriod") or {}
    text = resource.get("effectiveDateTime") or resource.get("effectiveInstant")
    text = text or period.get("end") or period.get("start")
    try:
        return datetime.fromisoformat(text) if text and "T" in text else None
    except ValueError:
        return None


def _codes(part: Mapping[str, Any]) -> tuple[str, ...]:
    concept = part.get("code") or {}
    codings = [coding for coding in concept.get("coding") or [] if (coding.get("code") or "").strip()]
    codings.sort(key=lambda coding: coding.get("system") != LOINC)
    text = (concept.get("text") or "").strip()
    return tuple(map(_code, codings)) or ((text,) if text else ())


def _label(part: Mapping[str, Any]) -> str:
    concept = part.get("code") or {}
    texts = (concept.get("text"), *(coding.get("display") for coding in concept.get("coding") or []))
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def _code(coding: Mapping[str, Any]) -> str:
    """The code, with its system in front where it looks like LOINC's and the system is another one."""
    code, system = coding["code"].strip(), coding.get("system")
    alike = system not in (None, "", LOINC) and re.fullmatch(r"\d{1,7}-\d", code, re.ASCII)
    return f"{system}|{code}" if alike else code


def identity(reference: Any, kind: str, base: str, kinds: Mapping[str, Any]) -> Identity | None:
    """What a reference to a resource of `kind` names, one without a server being on `base`; None where that cannot be
    told: a contained resource (``#p``) has a name inside its Observation only."""
    if reference is None or (reference.get("type") and reference["type"].rpartition("/")[2] != kind):
        return None
    text = (reference.get("reference") or "").strip()
    if text and not text.startswith("#"):
        text = text.partition("/_history/")[0]
        if match := re.fullmatch(rf"(https?://[^\s?#|]+/)?{kind}/([^\s/?#|]+)", text):
            return Identity(f"{match[1] or base}{kind}", match[2])
        if match := re.fullmatch(r"(urn:(?:uuid|oid)):([^\s|]+)", text):
            return Identity(match[1], match[2]) if kinds.get(text, kind) == kind else None
        return None
    identifier = reference.get("identifier") or {}
    value = (identifier.get("value") or "").strip()
    return Identity(f"{identifier.get('system') or ''}|", value) if value else None


def _float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of hundreds of digits; the reader sets it aside as infinite
        return float("inf")


def _unit(quantity: Mapping[str, Any]) -> str | None:
    code, unit = quantity.get("code"), quantity.get("unit")
    return code if code and quantity.get("system") == UCUM else unit or code


def _normal_range(part: Mapping[str, Any], unit: str | None) -> tuple[Any, Any]:
    """The bounds for healthy people. A range that says so comes first; one without a type is such by the standard, one
    for a treatment's aim is none."""
    ranges = [
        ({c.get("code") for c in ((r.get("type") or {}).get("coding") or [])}, r)
        for r in part.get("referenceRange") or []
    ]
    chosen = [r for own, r in ranges if "normal" in own] + [r for own, r in ranges if not own]
    bounds = [chosen[0].get(side) if chosen else None for side in ("low", "high")]
    return tuple(
        (_float(bound["value"]), _unit(bound) or unit) if bound and bound.get("value") is not None else None
        for bound in bounds
    )


def next_page(bundle: Mapping[str, Any]) -> str | None:
    """The address of the next page of a search's Bundle, if there is one."""
    links = bundle.get("link")
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict) and link.get("relation") == "next" and isinstance(link.get("url"), str):
            return link["url"]
    return None
