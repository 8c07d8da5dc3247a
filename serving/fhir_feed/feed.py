"""Scores the encounters in progress of a FHIR server, and keeps one RiskAssessment of each up to date.

A run lists the encounters in progress and the Observations that are new since the last run. Of each encounter with news
it reads all Observations again: what was corrected or deleted is right at once. It then creates the encounter's
RiskAssessment, or updates it with a version check. What a fault has left undone is pending for the next run.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.artifacts import locked
from common.command_line import log, run_every
from common.fhir import identity
from common.web import Answer
from feature_pipeline import (
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    RISK_LEVELS,
    BadConfig,
    BadObservations,
    ProductionPipeline,
    SiteCodes,
)
from monitoring.log import OFF
from serving.deployed import NOW, Deployed, moments_of
from serving.fhir.assessment import assessments
from serving.fhir.reading import NOT_USED, Found, add_people, collect
from serving.fhir_feed.server import FhirError, FhirServer, ServerSettings
from serving.fhir_feed.state import State, Written
from serving.scored import Scored

SYSTEM = "urn:sepsis-risk:encounter"  # of the identifier by which an encounter's RiskAssessment is found again
AT_ONCE = 20  # encounters that are read by one search
PAGE = "500"
MOST_CHECKS = 3  # of a version, before the others who write are left alone


@dataclass
class FeedResult:
    """What a run did."""

    model_version: str
    in_progress: int = 0
    risk_levels: Counter[str] = field(default_factory=Counter)
    created: int = 0
    updated: int = 0
    withdrawn: int = 0
    failed: int = 0
    without_observations: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    dry_run: bool = False

    def __str__(self) -> str:
        levels = ", ".join(f"{self.risk_levels[level]:,} {level}" for level in RISK_LEVELS)
        text = (
            f"{'would assess' if self.dry_run else 'assessed'} {self.risk_levels.total():,} of {self.in_progress:,} "
            f"encounters in progress ({levels}) with model {self.model_version} in {self.seconds:.1f} s; "
            f"RiskAssessments: {self.created:,} created, {self.updated:,} updated"
        )
        if self.withdrawn:
            text += f", {self.withdrawn:,} withdrawn"
        if self.failed:
            text += f", {self.failed:,} refused by the server"
        if self.without_observations:
            text += f"; {self.without_observations:,} encounters have no usable observation"
        if self.set_aside:
            text += f"; not used: {', '.join(f'{n:,} x {NOT_USED[why]}' for why, n in sorted(self.set_aside.items()))}"
        return text


class ToWrite(NamedTuple):
    """A RiskAssessment, its level, and when (seconds since 1970) it is too old to say anything."""

    resource: dict[str, Any]
    level: str
    stale_at: float | None


class FhirFeed:
    """Scores what a FHIR server has, with one config and model. `as_of` is the moment that is scored, as `moments_of`
    has it; `monitor` the URL of the prediction log. Raises `BadConfig`, `BadModel`."""

    def __init__(
        self,
        settings: ServerSettings,
        config_path: str | Path,
        model_path: str | Path,
        *,
        codes: SiteCodes | None = None,
        as_of: str = NOW,
        monitor: str = OFF,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Any] = time.sleep,
    ):
        self.settings, self.as_of, self.clock = settings, as_of, clock
        self.server = FhirServer(settings, sleep, clock)
        self.deployed = Deployed(ProductionPipeline(config_path, model_path, codes), "fhir", monitor)
        self.state = State(settings.state, self.server.base)

    def close(self) -> None:
        self.state.close()

    def watch(
        self, seconds: float, stop: threading.Event, told: Callable[[FeedResult], Any] = lambda result: None
    ) -> None:
        """Runs every so many seconds until `stop`, also after a fault."""
        run_every(seconds, lambda: told(self.run()), stop)

    def run(self, dry_run: bool = False) -> FeedResult:
        """One run. Raises `FhirError`: the rest stays pending. Raises `BadConfig` where another process runs on the
        same state file."""
        with locked(f"{self.settings.state}.lock", wait=False) as ours:
            if not ours:
                raise BadConfig(f"another process works with the state file {self.settings.state!r}")
            self.deployed.look()
            began = time.perf_counter()
            result = FeedResult(self.deployed.pipeline.model_version, dry_run=dry_run)
            try:
                patients, pending = self._look(dry_run)
                result.in_progress = len(patients)
                rest = iter(sorted(pending))
                while some := list(islice(rest, AT_ONCE)):
                    self._assess({encounter: patients[encounter] for encounter in some}, result)
            finally:
                result.seconds = time.perf_counter() - began
            return result

    # ------------------------------------------------------------------------------------------------- reading

    def _look(self, dry_run: bool) -> tuple[dict[str, str | None], set[str]]:
        """(encounter to patient of all in progress, encounters to score). What was found is noted before it is
        scored."""
        patients: dict[str, str | None] = {}
        run = None
        parameters = {"status": "in-progress", "_count": PAGE}
        for entry in self.server.search("Encounter", parameters, self.settings.encounters):
            run = self.server.date if run is None else run
            resource = entry["resource"]
            if isinstance(number := resource.get("id"), str) and resource.get("status") == "in-progress":
                patients[number] = self._local(resource.get("subject"), "Patient")
        run = self.clock() if run is None else run
        next_since = run - self.settings.overlap_seconds
        since = datetime.fromtimestamp(next_since if self.state.since is None else self.state.since, UTC)
        changed, versions = set(), {}
        parameters = {"_lastUpdated": f"ge{since.isoformat(timespec='milliseconds')}", "_count": PAGE}
        for entry in self.server.search("Observation", parameters):
            resource = entry["resource"]
            number, version = str(resource.get("id")), version_of(resource)
            if self.state.is_new(number, version):
                versions[number] = version
                changed.add(self._local(resource.get("encounter"), "Encounter"))
        if dry_run:
            known = set(self.state.pending()) | (changed - {None})
            return patients, set(patients) if self.state.since is None else known & set(patients)
        self.state.note(next_since, run, versions, set(patients), changed - {None})
        return patients, set(self.state.pending())

    def _local(self, reference: Any, kind: str) -> str | None:
        """The id that a reference names on this server."""
        try:
            named = identity(reference, kind, "", {})
        except (AttributeError, TypeError):
            return None
        return named.value if named and named.place in (kind, f"{self.server.base}/{kind}") else None

    def _entries(self, encounters: dict[str, str | None]) -> Iterator[dict[str, Any]]:
        # with its type: the parameter takes other resources too, and some servers then know no bare id
        named = ",".join(f"Encounter/{encounter}" for encounter in encounters)
        yield from self.server.search("Observation", {"encounter": named, "_count": PAGE})
        if people := sorted({patient for patient in encounters.values() if patient}):
            yield from self.server.search("Patient", {"_id": ",".join(people), "_count": PAGE})

    def _found(self, encounters: dict[str, str | None], pipeline: ProductionPipeline) -> Found:
        """The rows of these encounters, each of its own patient."""
        found = Found()
        collect(list(self._entries(encounters)), pipeline, found)
        rows = [
            row
            for row in found.rows
            if row.visit[1]
            and row.visit[1].value in encounters
            and encounters[row.visit[1].value] in (None, row.visit[0].value)
        ]
        if len(rows) < len(found.rows):
            found.set_aside("Bundle", "other_patient", n=len(found.rows) - len(rows))
        found.rows = rows
        add_people(found, pipeline)
        return found

    # ------------------------------------------------------------------------------------------------- scoring

    def _assess(self, encounters: dict[str, str | None], result: FeedResult) -> None:
        model = self.deployed.current
        found = self._found(encounters, model.pipeline)
        result.set_aside.update(found.set_aside_counts)
        now = self.clock()
        scored_of: dict[str, ToWrite] = {}
        if found.rows:
            try:
                observations = model.read(found.records, now)
                moments = moments_of(observations, self.as_of, now)
            except BadObservations as error:
                result.set_aside.update({"no_value": sum(error.set_aside.values())})
            else:
                risk = model.score(observations, np.arange(observations.n_visits), moments, not result.dry_run)
                scored = Scored(model.pipeline, observations, moments, risk, 0)
                names = {name: visit[1].value for visit, name in found.names.items()}
                minimum = model.pipeline.config.minimum_evidence
                rows = zip(observations.keys(), assessments(found, scored), risk.level, risk.newest, strict=True)
                for key, resource, level, newest in rows:
                    fresh = minimum and level != "UNKNOWN" and newest != NO_TIME
                    end = (newest / MICROSECONDS_PER_HOUR + minimum.newest_hours) * 3600 if fresh else None
                    scored_of[names[key]] = ToWrite(resource, str(level), end)
        for encounter in encounters:
            try:
                self._settle(encounter, scored_of.get(encounter), result)
            except FhirError as error:
                if error.status is None:
                    raise
                result.failed += 1
                log.error("error: %s; the encounter is assessed again when it has news", error)
                self.state.settle([encounter])

    def _settle(self, encounter: str, scored: ToWrite | None, result: FeedResult) -> None:
        """Writes what was found of one encounter, and counts it."""
        if scored is None:
            result.without_observations += 1
            if not result.dry_run:
                known = self.state.written(encounter)
                result.withdrawn += known is not None and self._withdraw(known)
                self.state.done(encounter, known)
            return
        resource, level, stale_at = scored
        if not result.dry_run:
            resource["identifier"] = [{"system": SYSTEM, "value": encounter}]
            written, is_new = self._write(encounter, resource)
            self.state.done(encounter, written, stale_at)
            result.created += is_new
            result.updated += not is_new
        result.risk_levels[level] += 1

    # ------------------------------------------------------------------------------------------------- writing

    def _write(self, encounter: str, resource: dict[str, Any]) -> tuple[Written, bool]:
        """The RiskAssessment as it is on the server then, and whether it was created."""
        known = self.state.written(encounter) or self._find(encounter)
        for _ in range(MOST_CHECKS):
            if known is None:
                # a run that was cut off may have created it meanwhile
                condition = {"If-None-Exist": f"identifier={SYSTEM}|{encounter}"}
                answer = self.server.call("POST", "RiskAssessment", resource, condition, (200, 201))
                known = written_of(answer) or self._find(encounter)
                if known is None:
                    raise FhirError("the FHIR server does not say what it has created")
                if answer.status == 201:
                    return known, True
            answer = self._put(known, resource)
            if answer.status in (200, 201):
                return written_of(answer) or Written(known.id, ""), False
            known = self._current(known) if answer.status in (409, 412) else None
        raise FhirError("others change a RiskAssessment of this service without end", 412)

    def _put(self, known: Written, resource: dict[str, Any]) -> Answer:
        check = {"If-Match": f'W/"{known.version}"'} if known.version else {}
        expected = (200, 201, 404, 409, 410, 412)
        return self.server.call("PUT", f"RiskAssessment/{known.id}", {**resource, "id": known.id}, check, expected)

    def _current(self, known: Written) -> Written | None:
        answer = self.server.call("GET", f"RiskAssessment/{known.id}", expected=(200, 404, 410))
        return written_of(answer) or Written(known.id, "") if answer.status == 200 else None

    def _find(self, encounter: str) -> Written | None:
        """The RiskAssessment that an earlier run has written for the encounter."""
        for entry in self.server.search("RiskAssessment", {"identifier": f"{SYSTEM}|{encounter}"}):
            resource = entry["resource"]
            own = {(i.get("system"), i.get("value")) for i in _dicts(resource.get("identifier"))}
            if (SYSTEM, encounter) in own and isinstance(resource.get("id"), str):
                return Written(resource["id"], version_of(resource))
        return None

    def _withdraw(self, known: Written) -> bool:
        """Marks a RiskAssessment whose Observations are gone as entered in error; says whether it was there."""
        for _ in range(MOST_CHECKS):
            answer = self.server.call("GET", f"RiskAssessment/{known.id}", expected=(200, 404, 410))
            if answer.status != 200 or not isinstance(answer.body, dict):
                return False
            if answer.body.get("status") == "entered-in-error":
                return False
            current = written_of(answer) or known
            if self._put(current, {**answer.body, "status": "entered-in-error"}).status in (200, 201):
                return True
        raise FhirError("others change a RiskAssessment of this service without end", 412)


def version_of(resource: dict[str, Any]) -> str:
    """What the server calls this version of a resource; empty where it does not say."""
    meta = resource.get("meta")
    return str(meta.get("versionId") or "") if isinstance(meta, dict) else ""


def written_of(answer: Answer) -> Written | None:
    """Id and version of the resource that an answer is about: in its body, or in Location and ETag."""
    body = answer.body if isinstance(answer.body, dict) and answer.body.get("resourceType") == "RiskAssessment" else {}
    _, _, after = (answer.headers.get("Location") or "").partition("RiskAssessment/")
    number, _, version = after.partition("/_history/")
    etag = (answer.headers.get("ETag") or "").removeprefix("W/").strip('"')
    number = body.get("id") or number
    return Written(str(number), version_of(body) or etag or version) if number else None


def _dicts(value: Any) -> Sequence[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
