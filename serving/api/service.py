"""The loaded model, and what a request gets from it."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from common.command_line import log, read_site_codes
from feature_pipeline import (
    Assessment,
    BadObservations,
    FeaturePipelineError,
    Observations,
    ProductionPipeline,
)
from serving.api import metrics
from serving.api.settings import Settings
from serving.api.stages import Stages
from serving.deployed import LOOK_SECONDS, NOW, Deployed, ServedModel, moments_of
from serving.scored import Scored, TooMuch

GATHER_SECONDS = 0.002  # that a request waits for as many others as were scored together before it
TOGETHER = 4000  # observations that are scored together; more would keep the first of them waiting
LARGE_BYTES = 1_000_000  # a larger request has a lane of its own


class NoModel(Exception):
    """There is no usable model; the text says why."""


class Busy(Exception):
    """As many requests of a costly kind are worked on as the service takes at once; the text says which."""


class Service:
    """Loads the pipeline once a process, when first asked to; takes up another version that is deployed meanwhile."""

    def __init__(self, settings: Settings, stages: Stages):
        self.settings, self._stage = settings, stages
        self._lock = threading.Lock()
        # One thread works at a time: several that compute only take the interpreter from one another.
        self._lock_of_turns = threading.Lock()
        self._enough = threading.Condition(self._lock_of_turns)
        self._busy, self._usual = False, 1  # requests that were scored together last
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
            pipeline, "api", settings.monitor_url or None, self._count_models, settings.log_required, self._stage
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
        else:
            # a full collection goes through all that was parsed, and all threads wait for it
            gc.disable()
        return own

    def leave(self, own: Waiting) -> None:
        """Passes the turn on. Whoever has it should keep it until the answer is made: meanwhile others come, and are
        scored together."""
        if own.large:
            gc.enable()
            self._lane.release()
        else:
            self._pass_on()

    def _wait(self, own: Waiting) -> None:
        with self._stage("queue"):
            with self._lock_of_turns:
                if not self._busy:
                    self._busy = True
                    return
                self._waiting.append(own)
                if len(self._waiting) + 1 == self._usual:
                    self._enough.notify()
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
        """Scores a request and others of the same model that wait, up to `TOGETHER` observations.

        Where requests come one by one it waits for none: clients that are answered together ask together again.
        """
        with self._enough:
            if len(self._waiting) + 1 < self._usual:
                self._enough.wait(GATHER_SECONDS)
        batch = [own]
        try:
            rows = self._read(own)
            while rows < TOGETHER and (other := self._next_like(own)):
                batch.append(other)
                rows += self._read(other)
            self._usual = len(batch)
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
                pieces.append(_scored(own.model, own.observations, some, own.moments[some]))
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
        with self._stage("reading"):
            return self._read_records(waiting)

    def _read_records(self, waiting: Waiting) -> int:
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
        found = _scored(model, observations, np.arange(observations.n_visits), moments)
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
        if n := sum(waiting.scored.unused_codes.values()):
            metrics.UNUSED.inc(n)


def _scored(model: ServedModel, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> Assessment:
    """`ServedModel.score`, counted."""
    found = model.score(observations, visit, as_of)
    if lost := model.log.newly_lost():
        metrics.UNLOGGED.inc(lost)
    for level, n in Counter(found.level.tolist()).items():
        metrics.PREDICTIONS.labels(level).inc(n)
    for reason, n in Counter(filter(None, found.reason.tolist())).items():
        metrics.UNKNOWN.labels(reason).inc(n)
    for p in found.probability[~np.isnan(found.probability)].tolist():
        metrics.SCORE.observe(p)
    return found


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
