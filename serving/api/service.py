"""The loaded model, and what a request gets from it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from common.command_line import log, read_site_codes
from feature_pipeline import (
    CONCEPTS,
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    SET_ASIDE_REASONS,
    Assessment,
    BadObservations,
    Codes,
    FeaturePipelineError,
    NotExplainable,
    Observations,
    ProductionPipeline,
    iso_times,
)
from serving.api import metrics
from serving.api.settings import Settings
from serving.api.words import code_words, reason_text, unknown_text
from serving.deployed import LOOK_SECONDS, NOW, Deployed, ServedModel, moments_of

MOST_REASONS = 20
MOST_POINTS = 100
TOGETHER = 4000  # observations that are scored together; more would keep the first of them waiting
LARGE_BYTES = 1_000_000  # a larger request has a lane of its own


class NoModel(Exception):
    """There is no usable model; the text says why."""


class Busy(Exception):
    """As many requests of a costly kind are worked on as the service takes at once; the text says which."""


class TooMuch(Exception):
    """The request asks for more than the service's limits; the text says which."""


class Service:
    """Loads the pipeline once a process, when first asked to; takes up another version that is deployed meanwhile."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._lock = threading.Lock()
        # One thread works at a time: several that compute only take the interpreter from one another.
        self._lock_of_turns = threading.Lock()
        self._busy = False
        self._waiting: deque[Waiting] = deque()
        self._lane = threading.Semaphore(1)  # of large requests
        self._deployed: Deployed | None = None
        self._problem = ""
        self._tried = -math.inf  # by the monotonic clock
        self.clock: Callable[[], float] = time.time

    def model(self) -> ServedModel:
        """The model as it is now. Raises `NoModel`."""
        if self._deployed is None:
            with self._lock:
                if self._deployed is None:
                    self._load_first()
        self._deployed.look(background=True)
        return self._deployed.current

    def pipeline(self) -> ProductionPipeline:
        """The pipeline as it is now. Raises `NoModel`."""
        return self.model().pipeline

    def _load_first(self) -> None:
        if time.monotonic() - self._tried < LOOK_SECONDS:
            raise NoModel(self._problem)
        self._tried = time.monotonic()
        try:
            site_codes = read_site_codes(self.settings.codes)
            pipeline = ProductionPipeline(self.settings.config, self.settings.model, site_codes)
        except FeaturePipelineError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.error("error: %s", error)
            raise NoModel(self._problem) from None
        settings = self.settings
        self._deployed = Deployed(
            pipeline, "api", settings.monitor_url or None, self._count_models, settings.log_required
        )
        log.info("model %s is loaded", pipeline.model_version)

    @staticmethod
    def _count_models(old: ProductionPipeline | None, new: ProductionPipeline) -> None:
        if old is not None:
            metrics.MODEL.labels(old.model_version).set(0)
        metrics.MODEL.labels(new.model_version).set(1)

    def take_turn(self, records: Callable[[], Sequence[Any]] | None = None, as_of: str = NOW, size: int = 0) -> Waiting:
        """Waits until no other thread works on a request; `leave` ends the turn. `as_of` says which moment is scored,
        as `moments_of` has it.

        Where `records`, which gives the request's observations, is known before, another thread may score the request
        meanwhile: then it is `settled` and there is no turn to leave. A request of more than `LARGE_BYTES` has a lane
        of its own: it is read beside the turns of others, and takes a turn for each piece of its scoring. Raises
        `NoModel`, and `Busy` where the lane is taken.
        """
        own = Waiting(self.model(), records, as_of, large=size > LARGE_BYTES)
        if not own.large:
            self._wait(own)
        elif not self._lane.acquire(blocking=False):
            raise Busy("the service works on another large request; ask again, or send fewer visits")
        return own

    def leave(self, own: Waiting) -> None:
        """Passes the turn on. Whoever has it should keep it until the answer is made: meanwhile others come, and are
        scored together."""
        if own.large:
            self._lane.release()
        else:
            self._pass_on()

    def _wait(self, own: Waiting) -> None:
        with self._lock_of_turns:
            if not self._busy:
                self._busy = True
                return
            self._waiting.append(own)
        own.go.acquire()

    def _pass_on(self) -> None:
        with self._lock_of_turns:
            if self._waiting:
                self._waiting.popleft().go.release()
            else:
                self._busy = False

    def scored(self, own: Waiting) -> Scored:
        """The scores of a request that has its turn. Reads, scores and logs what waits by now together with it: for a
        few visits more the features take hardly longer. Raises what reading the records raises, `BadObservations`,
        `TooMuch`."""
        if own.large:
            self._work_off_in_pieces(own)
        elif not own.settled:
            self._work_off(own)
        if own.error is not None:
            raise own.error
        return own.scored

    def _work_off(self, own: Waiting) -> None:
        """Scores a request and others of the same model that wait, up to `TOGETHER` observations."""
        batch = [own]
        try:
            rows = self._read(own)
            while rows < TOGETHER and (other := self._next_like(own)):
                batch.append(other)
                rows += self._read(other)
            readable = [waiting for waiting in batch if waiting.observations is not None]
            try:
                self._score(readable)
            except Exception as error:
                if len(readable) == 1:
                    readable[0].error = error
                else:  # the fault of one is not the others'
                    for waiting in readable:
                        try:
                            self._score([waiting])
                        except Exception as error:
                            waiting.error = error
        finally:
            for waiting in batch:
                if not waiting.settled:
                    waiting.error = RuntimeError("the worker was stopped")
            for waiting in batch[1:]:
                waiting.go.release()

    def _work_off_in_pieces(self, own: Waiting) -> None:
        """Scores a large request, up to `TOGETHER` observations a turn. A visit is never cut."""
        self._read(own)
        if own.error is not None:
            return
        first_row = own.observations.group_start[own.observations.visit_group_start]
        pieces, first, n = [], 0, own.observations.n_visits
        while first < n:
            last = int(np.searchsorted(first_row, first_row[first] + TOGETHER, side="right")) - 1
            some = np.arange(first, min(max(last, first + 1), n))
            self._wait(Waiting(own.model, None))
            try:
                pieces.append(own.model.score(own.observations, some, own.moments[some]))
            finally:
                self._pass_on()
            first = int(some[-1]) + 1
        found = replace(pieces[0], **{name: np.concatenate([getattr(p, name) for p in pieces]) for name in _ARRAYS})
        self._answer(own, found)

    def _next_like(self, own: Waiting) -> Waiting | None:
        with self._lock_of_turns:
            for waiting in self._waiting:
                if waiting.records is not None and waiting.model is own.model:
                    self._waiting.remove(waiting)
                    return waiting
        return None

    def _read(self, waiting: Waiting) -> int:
        """The number of observations that were read; 0 where an error is in the way."""
        try:
            records = waiting.records()
            if len(records) > self.settings.max_rows:
                raise TooMuch(f"{len(records):,} observations; a request may hold {self.settings.max_rows:,}")
            now = self.clock()
            observations = waiting.model.read(records, now)
            if not observations.n_visits:
                observations.check_usable()  # no row names a visit: there is nobody whose risk could be unknown
            if observations.n_visits > self.settings.max_visits:
                raise TooMuch(f"{observations.n_visits:,} visits; a request may hold {self.settings.max_visits:,}")
            waiting.moments = moments_of(observations, waiting.as_of, now)
        except Exception as error:
            if isinstance(error, BadObservations):
                count_set_aside(error.set_aside)
            waiting.error = error
            return 0
        waiting.observations = observations
        return len(observations.time)

    def _score(self, batch: Sequence[Waiting]) -> None:
        if not batch:
            return
        model, parts = batch[0].model, [waiting.observations for waiting in batch]
        observations = Observations.stacked(parts) if len(parts) > 1 else parts[0]
        moments = np.concatenate([waiting.moments for waiting in batch])
        found = model.score(observations, np.arange(observations.n_visits), moments)
        first = 0
        for waiting in batch:
            rows = slice(first, first + waiting.observations.n_visits)
            self._answer(waiting, replace(found, **{name: getattr(found, name)[rows] for name in _ARRAYS}))
            first += waiting.observations.n_visits

    def _answer(self, waiting: Waiting, found: Assessment) -> None:
        waiting.scored = Scored(
            waiting.model.pipeline, waiting.observations, waiting.moments, found, self.settings.max_visits
        )
        count_set_aside(waiting.observations.set_aside)
        if not waiting.model.log.works:
            metrics.UNLOGGED.inc(len(found.level))
        metrics.UNUSED.inc(sum(waiting.scored.unused_codes.values()))
        for level in found.level.tolist():
            metrics.PREDICTIONS.labels(level).inc()
        for reason in filter(None, found.reason.tolist()):
            metrics.UNKNOWN.labels(reason).inc()
        for p in found.probability[~np.isnan(found.probability)].tolist():
            metrics.SCORE.observe(p)


_ARRAYS = [f.name for f in fields(Assessment) if f.name != "inputs"]  # of an assessment, a row a snapshot


def count_set_aside(set_aside: dict[str, int]) -> None:
    for reason, n in set_aside.items():
        metrics.SET_ASIDE.labels(reason).inc(n)


@dataclass(eq=False)
class Waiting:
    """A request that is to be scored: what it brings, and what came of it."""

    model: ServedModel
    records: Callable[[], Sequence[Any]] | None
    as_of: str = NOW
    large: bool = False
    observations: Observations | None = None
    moments: np.ndarray | None = None
    scored: Scored | None = None
    error: Exception | None = None
    go: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.go.acquire()

    @property
    def settled(self) -> bool:
        """Has another thread scored it already? Then its own has no turn."""
        return self.scored is not None or self.error is not None


@dataclass(frozen=True)
class Scored:
    """A request's visits, in order of first appearance, and their risk."""

    pipeline: ProductionPipeline
    observations: Observations
    moments: np.ndarray  # (n_visits,) microseconds since 1970 UTC, that the risk is of
    found: Assessment
    most_snapshots: int

    @property
    def horizon_hours(self) -> float | None:
        """How far the probability looks ahead; None for a model of whole stays."""
        snapshots = self.pipeline.config.snapshots
        return None if snapshots.retrospective else snapshots.horizon_hours

    @property
    def codes(self) -> Codes:
        return self.pipeline.reproducer.codes

    @cached_property
    def unused_codes(self) -> dict[str, int]:
        """Observations of codes that the model does not use, by code."""
        return self.pipeline.unused_codes(self.observations)

    @property
    def absent_quantities(self) -> list[str]:
        """What nearly every visit had in training and none has here, in words."""
        o = self.observations
        present = {o.codes[i] for i in set(o.group_code.tolist())}
        absent = self.pipeline.absent_codes(present, int((o.first_time != NO_TIME).sum()))
        return list(dict.fromkeys(code_words(code, self.codes)[0] for code in absent))

    @cached_property
    def used_rows(self) -> np.ndarray:
        """(n_observations,) does the model look at the row, and is it of the moment or before?"""
        o = self.observations
        is_used = np.array([self.pipeline.reproducer.is_used(code) for code in o.codes], dtype=bool)
        length = np.diff(o.group_start)
        used = np.repeat(is_used[o.group_code], length)
        return used & (o.time <= np.repeat(self.moments[o.group_visit], length))

    def predictions(self) -> list[dict[str, Any]]:
        """``visit_id, client, sepsis_probability`` (None where the risk is unknown), ``risk_level``, ``reason`` and
        ``missing`` of an unknown risk, ``as_of``, ``newest_observation``, ``hours_since_newest``,
        ``num_observations``: the last three of what the model uses."""
        o, found = self.observations, self.found
        hours = (self.moments - found.newest) / MICROSECONDS_PER_HOUR
        hours[(found.newest == NO_TIME) | (self.moments == NO_TIME)] = np.nan
        row_visit = np.repeat(o.group_visit, np.diff(o.group_start))
        n_used = np.bincount(row_visit[self.used_rows], minlength=o.n_visits)
        return [
            {
                "visit_id": visit_id,
                "client": client,
                "sepsis_probability": p if p == p else None,
                "risk_level": level,
                "reason": reason,
                "reason_text": reason and unknown_text(reason, missing, age if age == age else None),
                "missing": missing,
                "as_of": moment,
                "newest_observation": newest,
                "hours_since_newest": round(age, 3) if age == age else None,
                "num_observations": n,
            }
            for visit_id, client, p, level, reason, missing, moment, newest, age, n in zip(
                o.visit_id.tolist(),
                o.client.tolist(),
                found.probability.tolist(),
                found.level.tolist(),
                found.reason.tolist(),
                found.missing(),
                iso_times(self.moments),
                iso_times(found.newest),
                hours.tolist(),
                n_used.tolist(),
                strict=True,
            )
        ]

    def reasons(self, top: int) -> tuple[list[list[dict[str, Any]]], str | None]:
        """Each visit's strongest features (``feature, value, contribution``, and both as a ``text``), and a remark
        where there are none. Raises `TooMuch`."""
        self._limit(top, "reasons")
        of_visit: list[list[dict[str, Any]]] = [[] for _ in range(self.observations.n_visits)]
        given = np.flatnonzero(~np.isnan(self.found.probability))
        if not len(given):
            return of_visit, None
        as_of: Any = None
        if not np.array_equal(self.moments, self.observations.last_time):
            keys = {"visit_id": self.observations.visit_text, "client": self.observations.client_text}
            as_of = pd.DataFrame({**keys, "as_of": iso_times(self.moments)})
        try:
            table = self.pipeline.explain(self.observations, min(top, MOST_REASONS), as_of)
        except NotExplainable as error:
            return of_visit, str(error)
        each = len(table) // len(given)
        rows = zip(table["feature"], table["value"].tolist(), table["contribution"].tolist(), strict=True)
        for i, (feature, value, contribution) in enumerate(rows):
            reason = {"feature": feature, "value": value if value == value else None, "contribution": contribution}
            of_visit[given[i // each]].append({**reason, "text": reason_text(reason, self.codes)})
        return of_visit, None

    def trajectories(self, points: int) -> list[list[dict[str, Any]]]:
        """Each visit's score at up to `points` moments: times of its observations, and the moment of the answer as the
        last. Raises `TooMuch`."""
        o, points = self.observations, min(points, MOST_POINTS)
        self._limit(points, "moments")
        visits, moments = [], []
        for visit in np.flatnonzero((o.first_time != NO_TIME) & (o.first_time <= self.moments)):
            first, last = o.group_start[o.visit_group_start[visit]], o.group_start[o.visit_group_start[visit + 1]]
            times = np.unique(np.append(o.time[first:last], self.moments[visit]))
            times = times[times <= self.moments[visit]]
            kept = times[np.unique(np.linspace(len(times) - 1, 0, points).round().astype(int))]
            visits.append(np.full(len(kept), visit))
            moments.append(kept)
        out: list[list[dict[str, Any]]] = [[] for _ in range(o.n_visits)]
        if visits:
            visit, moment = np.concatenate(visits), np.concatenate(moments)
            found = self.pipeline.assess(o, visit, moment)
            rows = zip(visit.tolist(), iso_times(moment), found.probability.tolist(), found.reason, strict=True)
            for v, time_, p, reason in rows:
                out[v].append({"as_of": time_, "sepsis_probability": p if p == p else None, "reason": reason})
        return out

    def series(self) -> list[list[dict[str, Any]]]:
        """Each visit's observations as the model reads them, by code in the order of `CONCEPTS`: ``code``, its ``name``
        and ``unit`` for people, whether the code is ``used``, ``points`` of time, value and reference range."""
        o = self.observations
        out: list[list[dict[str, Any]]] = [[] for _ in range(o.n_visits)]
        times = iso_times(o.time)
        columns = [
            [value if value == value else None for value in column.tolist()] for column in (o.value, o.low, o.high)
        ]
        bounds = zip(o.group_visit.tolist(), o.group_code.tolist(), pairwise(o.group_start.tolist()), strict=True)
        place = [n if n >= 0 else len(CONCEPTS) for n in o.concept_of_code.tolist()]
        for visit, code, (start, end) in sorted(bounds, key=lambda group: (group[0], place[group[1]], group[1])):
            name, unit = code_words(o.codes[code], self.codes)
            points = list(zip(*(column[start:end] for column in (times, *columns)), strict=True))
            used = self.pipeline.reproducer.is_used(o.codes[code])
            out[visit].append({"code": o.codes[code], "name": name, "unit": unit, "used": used, "points": points})
        return out

    def _limit(self, n: int, what: str) -> None:
        if self.observations.n_visits * n > self.most_snapshots:
            visits = f"{self.observations.n_visits:,} visits"
            raise TooMuch(f"{visits} with {n} {what} each; a request may ask for {self.most_snapshots:,} in all")

    def set_aside(self) -> dict[str, Any]:
        return described_set_aside(self.observations.set_aside, self.observations.set_aside_rows)

    def warnings(self) -> list[str]:
        """What a person should know about these scores."""
        remark = self.pipeline.missing_codes_remark(self.observations)
        return [remark] if remark else []


def described_set_aside(counts: dict[str, int], rows: dict[str, list[int]]) -> dict[str, Any]:
    """The rows that were not used, by reason, with the first few of each, counted from 0."""
    return {
        "rows": sum(counts.values()),
        "reasons": [
            {"reason": reason, "meaning": SET_ASIDE_REASONS[reason], "count": n, "first_rows": rows.get(reason, [])}
            for reason, n in counts.items()
        ],
    }
