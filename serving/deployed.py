"""The model that is deployed now: its next version, its scores and the log of its predictions, for every pattern."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from common.command_line import log
from feature_pipeline import (
    Assessment,
    BadObservations,
    FeaturePipelineError,
    Observations,
    ProductionPipeline,
    to_micros,
)
from monitoring.log import PredictionLog
from serving.shadow import Shadows

LOOK_SECONDS = 5.0  # between looks for a new version
NOW, LAST = "now", "last"
Stage = Callable[[str], AbstractContextManager[Any]]


class Unlogged(FeaturePipelineError):
    """A prediction could not be logged, and the pattern must not give it unlogged."""

    code = "unlogged"


class ServedModel:
    """One version of the model and the log of its predictions. Work that begins with a version ends with it.

    `source` is the pattern that scores (api, batch, database, stream), `monitor` the URL of the prediction log (None:
    the environment's). The log is closed when the last user of this version has gone. With `log_required` no result is
    returned that could not be logged. `directory` is where versions are archived, if it is not beside the config.
    `stage` is entered for the stages of the work by their names: features, model, logging.
    """

    def __init__(
        self,
        pipeline: ProductionPipeline,
        source: str,
        monitor: str | None,
        log_required: bool = False,
        directory: Path | None = None,
        stage: Stage = lambda name: nullcontext(),
    ):
        self.pipeline, self.log_required, self._stage = pipeline, log_required, stage
        pipeline.stage = stage
        self.log = PredictionLog.open(monitor, pipeline, source, required=log_required)
        weakref.finalize(self, self.log.close).atexit = False
        self._shadows = Shadows(pipeline, source, monitor, directory)
        weakref.finalize(self, self._shadows.stop).atexit = False

    def read(self, source: Any, now: float | None = None) -> Observations:
        """Observations as the model reads them; rows later than `now` (seconds since 1970) are set aside. Raises
        `BadObservations`, which the log counts."""
        try:
            return self.pipeline.reproducer.read(source, None if now is None else int(now * 1e6))
        except BadObservations:
            self.log.record_error("unusable")
            raise

    def score(
        self, observations: Observations, visit: np.ndarray, as_of: np.ndarray, record: bool = True
    ) -> Assessment:
        """Assesses `visit` at the moments `as_of`. The result is logged before it is returned, unless `record` is
        False."""
        began = time.perf_counter()
        found = self.pipeline.assess(observations, visit, as_of)
        if record:
            logged = self.record(observations, visit, as_of, found, time.perf_counter() - began)
            if self.log_required and not logged:
                raise Unlogged("predictions cannot be logged, and must not be returned unlogged")
        return found

    def record(
        self, observations: Observations, visit: np.ndarray, as_of: np.ndarray, found: Assessment, seconds: float
    ) -> bool:
        """Logs what `score` found, and has the challenger in the shadow score the same; says whether it was logged."""
        with self._stage("logging"):
            logged = self.log.record(observations, visit, as_of, found, seconds)
        self._shadows.score(observations, visit, as_of)
        return logged


class Deployed:
    """The model of a pattern, version after version: `current` is the one for work that begins now.

    `before_use` is called with the old pipeline (None at first) and the new one; it raises a `FeaturePipelineError`
    where the pattern must keep the old one.
    """

    def __init__(
        self,
        pipeline: ProductionPipeline,
        source: str,
        monitor: str | None,
        before_use: Callable[[ProductionPipeline | None, ProductionPipeline], Any] = lambda old, new: None,
        log_required: bool = False,
        stage: Stage = lambda name: nullcontext(),
    ):
        self._before_use, self._serving = before_use, (source, monitor, log_required, None, stage)
        self._renewing = threading.Lock()
        self._looked, self._problem = time.monotonic(), ""
        before_use(None, pipeline)
        self.current = ServedModel(pipeline, *self._serving)

    @property
    def pipeline(self) -> ProductionPipeline:
        return self.current.pipeline

    def renew(self) -> bool:
        """Takes up the version that was deployed since; says whether there was one. If that version cannot be used, the
        old one stays in use, and the reason is logged once."""
        with self._renewing:
            old, self._looked = self.pipeline, time.monotonic()
            try:
                successor = old.successor()
                if successor is None:
                    return False
                self._before_use(old, successor)
            except FeaturePipelineError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    log.error("error: %s; model %s stays in use", error, old.model_version)
                return False
            self.current, self._problem = ServedModel(successor, *self._serving), ""
        log.info("model %s is loaded", successor.model_version)
        return True

    def look(self, background: bool = False) -> bool:
        """`renew`, if the last look is `LOOK_SECONDS` ago; `background` loads in a thread, and nobody waits."""
        if time.monotonic() - self._looked < LOOK_SECONDS or self._renewing.locked():
            return False
        self._looked = time.monotonic()
        if not self.pipeline.outdated():
            return False
        if not background:
            return self.renew()
        threading.Thread(target=self.renew, daemon=True).start()
        return False


def moments_of(observations: Observations, as_of: str = LAST, now: float | None = None) -> np.ndarray:
    """The moment that each visit is scored for, in microseconds: ``last`` is its own last observation, ``now`` the time
    `now` (seconds since 1970; the clock's where None), else `as_of` is a time. Raises `BadObservations`."""
    if as_of == LAST:
        return observations.last_time
    if as_of != NOW:
        return np.full(observations.n_visits, to_micros(as_of), dtype=np.int64)
    moment = int((time.time() if now is None else now) * 1e6)
    # what a clock ahead of ours has sent was kept, up to the tolerance, and counts
    return np.maximum(observations.last_time, moment)
