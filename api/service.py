"""The loaded model, and what a request gets from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from api import metrics
from api.settings import Settings
from command_line import log
from feature_pipeline import (
    SET_ASIDE_REASONS,
    BadObservations,
    FeaturePipelineError,
    NotExplainable,
    Observations,
    ProductionPipeline,
    iso_times,
    resolve_snapshots,
)
from prediction_log import PredictionLog

MOST_REASONS = 20
MOST_POINTS = 100


class NoModel(Exception):
    """There is no usable model; the text says why."""


class TooMuch(Exception):
    """The request asks for more than the service's limits; the text says which."""


class Service:
    """Loads the pipeline once a process, when first asked to."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # threads that compute at once only take the interpreter from one another
        self._pipeline: ProductionPipeline | None = None
        self._prediction_log: PredictionLog | None = None
        self._problem, self._tried = "not loaded yet", None

    def pipeline(self) -> ProductionPipeline:
        """The pipeline. Raises `NoModel`; a failed load is tried again when the files have changed."""
        if self._pipeline is None:
            with self._lock:
                if self._pipeline is None:
                    self._load()
        return self._pipeline

    def _load(self) -> None:
        stamp = [_modified(path) for path in (self.settings.config, self.settings.model)]
        if stamp == self._tried:
            raise NoModel(self._problem)
        try:
            pipeline = ProductionPipeline(self.settings.config, self.settings.model)
        except FeaturePipelineError as error:
            self._problem, self._tried = str(error), stamp
            log.error("error: %s", error)
            raise NoModel(self._problem) from None
        metrics.MODEL.labels(pipeline.model_version).set(1)
        self._prediction_log = PredictionLog.open(self.settings.monitor_url or None, pipeline, "api")
        self._pipeline = pipeline
        log.info("model %s is loaded", pipeline.model_version)

    def score(self, source: Sequence[Any]) -> Scored:
        """Reads, scores and logs observations. Raises `BadObservations`, `NoModel`, `TooMuch`."""
        pipeline = self.pipeline()
        with self._turn:
            return self._score(pipeline, source)

    def _score(self, pipeline: ProductionPipeline, source: Sequence[Any]) -> Scored:
        start = time.perf_counter()
        if len(source) > self.settings.max_rows:
            raise TooMuch(f"{len(source):,} observations; a request may hold {self.settings.max_rows:,}")
        try:
            observations = pipeline.reproducer.read(source)
        except BadObservations as error:
            count_set_aside(error.set_aside)
            self._prediction_log.record_error("unusable")
            raise
        if observations.n_visits > self.settings.max_visits:
            raise TooMuch(f"{observations.n_visits:,} visits; a request may hold {self.settings.max_visits:,}")
        visit, moments, _ = resolve_snapshots(observations)
        probability, features = pipeline.evaluate(observations, visit, moments)
        levels = pipeline.risk_level(probability).tolist()
        for level in levels:
            metrics.PREDICTIONS.labels(level).inc()
        for p in probability.tolist():
            if p == p:
                metrics.SCORE.observe(p)
        count_set_aside(observations.set_aside)
        seconds = time.perf_counter() - start
        self._prediction_log.record(observations, visit, moments, probability, features, seconds)
        return Scored(pipeline, observations, moments, probability, levels, self.settings.max_visits)


def _modified(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


def count_set_aside(set_aside: dict[str, int]) -> None:
    for reason, n in set_aside.items():
        metrics.SET_ASIDE.labels(reason).inc(n)


@dataclass(frozen=True)
class Scored:
    """A request's visits, in order of first appearance, and their scores."""

    pipeline: ProductionPipeline
    observations: Observations
    moments: np.ndarray  # (n_visits,) microseconds since 1970 UTC, of the last observation
    probability: np.ndarray  # (n_visits,)
    levels: list[str]
    most_snapshots: int

    @property
    def horizon_hours(self) -> float | None:
        """How far the probability looks ahead; None for a model of whole stays."""
        snapshots = self.pipeline.config["snapshots"]
        return None if snapshots.get("retrospective") else snapshots.get("horizon_hours")

    def predictions(self) -> list[dict[str, Any]]:
        """``visit_id, client, sepsis_probability`` (None where nothing was usable), ``risk_level``, ``as_of``."""
        o = self.observations
        return [
            {
                "visit_id": visit_id,
                "client": client,
                "sepsis_probability": p if p == p else None,
                "risk_level": level,
                "as_of": moment,
            }
            for visit_id, client, p, level, moment in zip(
                o.visit_id.tolist(),
                o.client.tolist(),
                self.probability.tolist(),
                self.levels,
                iso_times(self.moments),
                strict=True,
            )
        ]

    def reasons(self, top: int) -> tuple[list[list[dict[str, Any]]], str | None]:
        """Each visit's strongest features (``feature, value, contribution``), and a remark where there are none."""
        of_visit: list[list[dict[str, Any]]] = [[] for _ in self.levels]
        try:
            table = self.pipeline.explain(self.observations, min(top, MOST_REASONS))
        except NotExplainable as error:
            return of_visit, str(error)
        usable = np.flatnonzero(~np.isnan(self.probability))
        each = len(table) // max(len(usable), 1)
        rows = zip(table["feature"], table["value"].tolist(), table["contribution"].tolist(), strict=True)
        for i, (feature, value, contribution) in enumerate(rows):
            value = value if value == value else None
            of_visit[usable[i // each]].append({"feature": feature, "value": value, "contribution": contribution})
        return of_visit, None

    def trajectories(self, points: int) -> list[list[dict[str, Any]]]:
        """Each visit's score at up to `points` of its own times, the last among them. Raises `TooMuch`."""
        o, points = self.observations, min(points, MOST_POINTS)
        if o.n_visits * points > self.most_snapshots:
            raise TooMuch(
                f"{o.n_visits:,} visits at {points} moments; a request may ask {self.most_snapshots:,} scores"
            )
        visits, moments = [], []
        for visit in np.flatnonzero(~np.isnan(self.probability)):
            first, last = o.group_start[o.visit_group_start[visit]], o.group_start[o.visit_group_start[visit + 1]]
            times = np.unique(o.time[first:last])
            kept = times[np.unique(np.linspace(len(times) - 1, 0, points).round().astype(int))]
            visits.append(np.full(len(kept), visit))
            moments.append(kept)
        out: list[list[dict[str, Any]]] = [[] for _ in self.levels]
        if visits:
            visit, moment = np.concatenate(visits), np.concatenate(moments)
            scores = self.pipeline.score(o, visit, moment).tolist()
            for v, time_, p in zip(visit.tolist(), iso_times(moment), scores, strict=True):
                out[v].append({"as_of": time_, "sepsis_probability": p})
        return out

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
