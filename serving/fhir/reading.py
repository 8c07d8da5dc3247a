"""FHIR R4 Observations and Patients as rows in the model's terms.

Resources are checked by fhir.resources (its R4B models, which are R4 for the resources used here). LOINC codes are
mapped to the model's own codes of the same concept, values in another unit are converted, and what cannot be told for
sure is set aside and reported, never guessed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from typing import Any

from fhir.resources.R4B.observation import Observation
from pydantic import ValidationError

from common.fhir import NOT_USED as PART_NOT_USED
from common.fhir import Identity, NotUsed, Reading, readings
from feature_pipeline import ProductionPipeline, iso_times, to_micros, to_unit

AGE, SEX = "30525-0", "46098-0"  # LOINC
SEXES = {"male": 1, "female": 0}  # as a table of observations has them
MOST_ISSUES = 50
DEEPEST = 60  # levels of a resource; R4's own have some 20
# why something of a bundle is not used; the keys are the metrics' reasons
NOT_USED = {
    **PART_NOT_USED,
    "malformed": "no resource",
    "source_failed": "the source reports an error",
    "bad_unit": "its unit cannot be converted",
    "superseded": "a newer version of it is in the Bundle",
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
    reference: str  # to the Observation; empty where there is none


@dataclass
class Found:
    """What a bundle holds: rows to score, and what was not used."""

    rows: list[Row] = field(default_factory=list)
    issues: list[dict[str, Any]] = field(default_factory=list)
    set_aside_counts: Counter[str] = field(default_factory=Counter)
    patients: dict[Identity, dict[str, Any]] = field(default_factory=dict)  # Patient resources
    same: dict[Identity, Identity] = field(default_factory=dict)  # other names of a resource of the Bundle
    labels: dict[str, str] = field(default_factory=dict)  # the sender's words for a code
    count: Callable[[dict[str, int]], Any] = lambda counts: None  # is told what is set aside, for metrics

    def set_aside(self, where: str, reason: str, more: str = "", n: int = 1) -> None:
        """Notes that what stands at `where`, `n` observations, is not used, for a reason of `NOT_USED`."""
        why = f"{NOT_USED[reason]}{more}"
        issue = {"severity": "warning", "code": "not-supported", "diagnostics": why, "expression": [where]}
        if len(self.issues) < MOST_ISSUES:  # the rest is counted
            self.issues.append(issue)
        self.set_aside_counts[reason] += n
        self.count({reason: n})

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


def has_more(bundle: dict[str, Any]) -> bool:
    """Are there observations that the bundle does not hold?"""
    links = bundle.get("link")
    return isinstance(links, list) and any(isinstance(link, dict) and link.get("relation") == "next" for link in links)


@dataclass(frozen=True)
class Entry:
    """A resource of a Bundle and where it stands."""

    resource: dict[str, Any]
    url: str  # its full URL, without a version
    where: str

    @property
    def base(self) -> str:
        """The server that it is on, as far as its URL tells."""
        match = re.fullmatch(r"(https?://[^\s?#|]+/)[A-Z][A-Za-z]+/[^/]+", self.url)
        return match[1] if match else ""

    @property
    def identity(self) -> Identity | None:
        """What a reference to it names."""
        kind, number = self.resource.get("resourceType"), self.resource.get("id")
        if match := re.fullmatch(r"(urn:(?:uuid|oid)):([^\s|]+)", self.url):
            return Identity(match[1], match[2])
        if self.base:
            return Identity(f"{self.base}{kind}", self.url.rpartition("/")[2])
        return Identity(str(kind), number) if isinstance(number, str) and number else None

    def replaces(self, other: Entry) -> bool:
        """Is it a later version of the same resource, or the same version further back in the Bundle?"""
        (updated, number), (other_updated, other_number) = self.version, other.version
        if updated and other_updated and updated != other_updated:
            return updated > other_updated
        return number >= other_number

    @property
    def version(self) -> tuple[str, int]:
        """When it was made, empty where that is not told, and its number, 0 where it has none."""
        meta = self.resource.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        try:
            updated = iso_times([to_micros(meta["lastUpdated"])])[0]
        except Exception:
            updated = ""
        number = str(meta.get("versionId", ""))
        return updated or "", int(number) if re.fullmatch("[0-9]{1,18}", number) else 0


class TooDeep(ValueError):
    """A resource that is nested deeper than any of R4; the text says where."""


def collect(entries: list[Any], pipeline: ProductionPipeline, found: Found, places: Sequence[str] = ()) -> None:
    """Adds the Observations and Patients among `entries` to `found`, of each resource the newest version. `places` say
    where the entries stand; in the Bundle itself if not given. Raises `TooDeep`."""
    newest: dict[Any, Entry] = {}
    for i, given in enumerate(entries):
        where = places[i] if places else f"Bundle.entry[{i}]"
        resource = given.get("resource") if isinstance(given, dict) else None
        if not isinstance(resource, dict):
            found.set_aside(where, "malformed")
            continue
        if is_deeper(resource, DEEPEST):
            raise TooDeep(f"{where} is nested more than {DEEPEST} deep")
        if failed(resource):
            found.set_aside(where, "source_failed")
            continue
        url = given.get("fullUrl")
        entry = Entry(resource, url.partition("/_history/")[0] if isinstance(url, str) else "", where)
        key = (resource.get("resourceType"), entry.identity) if entry.identity else where
        if (other := newest.get(key)) is not None:
            older, entry = (other, entry) if entry.replaces(other) else (entry, other)
            if older.resource != entry.resource and resource.get("resourceType") == "Observation":
                found.set_aside(older.where, "superseded")
        newest[key] = entry
    kinds = {entry.url: entry.resource.get("resourceType") for entry in newest.values() if entry.url}
    for entry in newest.values():
        _know(entry, found)
    for entry in newest.values():
        if entry.resource.get("resourceType") != "Observation":
            continue
        try:
            Observation.model_validate(entry.resource)
        except (ValidationError, ValueError, TypeError, ArithmeticError) as error:
            found.set_aside(entry.where, "bad_resource", f": {_first_problem(error)}")
        else:
            _add(entry, pipeline, found, kinds)


def is_deeper(value: Any, most: int) -> bool:
    """Is a JSON value nested more than `most` deep? What checks it recursively would not come to an end."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _know(entry: Entry, found: Found) -> None:
    """Notes a Patient's or an Encounter's names, and what a Patient says of a person."""
    resource, identity, number = entry.resource, entry.identity, entry.resource.get("id")
    kind = resource.get("resourceType")
    if kind not in ("Patient", "Encounter") or identity is None:
        return
    if identity.place.startswith("urn:") and isinstance(number, str) and number:
        found.same[Identity(kind, number)] = identity  # a relative reference to an entry whose URL is a urn
    if kind == "Patient" and not (resource.get("implicitRules") or resource.get("modifierExtension")):
        found.patients[identity] = resource


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


def _add(entry: Entry, pipeline: ProductionPipeline, found: Found, kinds: dict[str, Any]) -> None:
    resource = entry.resource
    reference = entry.url or (f"Observation/{resource['id']}" if resource.get("id") else "")
    for part in readings(resource, entry.base, kinds):
        where = f"{entry.where}{part.where}"
        if isinstance(part, NotUsed):
            found.set_aside(where, part.reason)
        elif (record := _record(part, pipeline)) is None:
            found.set_aside(where, "bad_unit")
        else:
            # a time without a zone is taken as UTC, as everywhere
            moment = part.time if part.time.tzinfo else part.time.replace(tzinfo=UTC)
            patient, encounter = (found.same.get(name, name) for name in (part.patient, part.encounter))
            row = Row((patient, encounter), moment, record, resource["subject"], resource.get("encounter"), reference)
            found.rows.append(row)
            if part.label:
                found.labels.setdefault(record["observation_type_code"], part.label)


def _record(part: Reading, pipeline: ProductionPipeline) -> dict[str, Any] | None:
    """The observation's code, and its value and range in the unit of the code's concept; None where that cannot be."""
    reproducer = pipeline.reproducer
    code = next((code for code in part.codes if reproducer.is_used(reproducer.codes.own_code(code))), part.codes[0])
    concept, coded_in = reproducer.codes.meaning(code)
    bounds = {"reference_range_min": part.low, "reference_range_max": part.high}
    if concept is None or (part.unit is None and coded_in == concept.unit):
        plain = {name: bound[0] if bound and bound[1] == part.unit else None for name, bound in bounds.items()}
        return {"observation_type_code": code, "observation_value": part.value, **plain}
    if part.is_ucum and part.unit and not concept.has_ucum(part.unit):
        return None
    value = to_unit(concept, part.value, part.unit or coded_in)
    if value is None:
        return None
    own = {name: bound and to_unit(concept, bound[0], bound[1] or coded_in) for name, bound in bounds.items()}
    return {"observation_type_code": code, "observation_value": value, "unit": concept.unit, **own}


def add_people(found: Found, pipeline: ProductionPipeline) -> None:
    """Adds age and sex from the Patient resources to visits without such observations, if the model uses them. They
    count from the visit's first observation on."""
    codes = pipeline.reproducer.codes
    wanted = [code for code in (AGE, SEX) if pipeline.reproducer.is_used(codes.own_code(code))]
    by_visit: dict[Visit, list[Row]] = {}
    for row in found.rows:
        by_visit.setdefault(row.visit, []).append(row)
    for visit, rows in by_visit.items():
        patient = found.patients.get(visit[0], {})
        first = min(rows, key=lambda row: row.moment)
        told = {codes.own_code(row.record["observation_type_code"]) for row in rows}
        for code in wanted:
            value = age_at(patient.get("birthDate"), first.moment) if code == AGE else SEXES.get(patient.get("gender"))
            if value is not None and codes.own_code(code) not in told:
                record = {"observation_type_code": code, "observation_value": value}
                reference = f"{patient['resourceType']}/{patient['id']}" if patient.get("id") else ""
                found.rows.append(Row(visit, first.moment, record, first.subject, first.encounter, reference))


def age_at(born: Any, moment: datetime) -> int | None:
    """Full years; of a date without day or month its middle is taken.

    >>> age_at("1950-07-02", datetime(2024, 7, 1)), age_at("1950", datetime(2024, 7, 1)), age_at("?", datetime.now())
    (73, 74, None)
    """
    if not isinstance(born, str) or not re.fullmatch(r"\d{4}(-\d\d){0,2}", born, re.ASCII):
        return None
    try:
        birth = date.fromisoformat(born + ("-07-01", "-15", "")[born.count("-")])
    except ValueError:
        return None
    age = moment.year - birth.year - ((moment.month, moment.day) < (birth.month, birth.day))
    return age if 0 <= age <= 130 else None
