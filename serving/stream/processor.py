"""Open visits, their observations, and their scores in micro-batches."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.command_line import log
from feature_pipeline import (
    CONTEXT,
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    MICROSECONDS_PER_HOUR,
    SET_ASIDE_REASONS,
    BadObservations,
    Concept,
    FeaturePipelineError,
    Observations,
    ProductionPipeline,
    as_text,
    concept_of,
    iso_times,
)
from monitoring.log import OFF, PredictionLog

Key = tuple[str, str]  # client, visit_id as texts
ROW = np.dtype([("code", "i4"), ("time", "i8"), ("value", "f8"), ("low", "f8"), ("high", "f8")])
REASONS = {
    **SET_ASIDE_REASONS,
    "future": "observation_date is too far in the future",
    "visit_full": "the visit has more observations than --max-observations; it is no longer scored",
    "visit_dropped": "the visit was dropped before (idle, or too many were open); it is not scored from a part",
}
REMEMBERED = 1_000_000  # dropped visits, some 150 bytes each
FORGETTABLE = 10_000  # codes that no open visit has
WAITING = 1000  # observations that are validated together at the latest
LOOK_SECONDS = 5.0  # between looks whether another model is deployed


@dataclass
class Visit:
    """One open visit. `rows` are its validated observations, in pieces without copies; `origin` is the feed's own."""

    client: Any  # as given
    visit_id: Any
    rows: list[np.ndarray] = field(default_factory=list)
    changed: bool = False  # since its last score
    full: bool = False
    folded: float | None = None  # observations older than so many hours may be no longer here
    seen: float = 0.0  # by the processor's clock
    level: str | None = None  # of the last score
    origin: Any = None

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.rows))


class StreamProcessor:
    """Keeps open visits and scores those that changed; loads config and model when it is made.

    Observations may come in any order, several times, and late: the score of a visit is the one that the batch gives on
    the same rows, to the last bit. `min_observations`: a visit with fewer different ones is not scored.

    Bounds: `max_visits` (beyond it the visit that was silent the longest is scored and dropped) and `max_observations`
    of a visit. Old observations are folded away where no feature of the model can see them; where the model looks at
    the whole visit nothing can be, and a visit beyond the limit is reported and no longer scored: a score of a part
    would be a wrong number. For the same reason the last million dropped visits are remembered, and what comes of them
    later is set aside.
    """

    def __init__(
        self,
        config_path: str | Path = DEFAULT_CONFIG,
        model_path: str | Path = DEFAULT_MODEL,
        min_observations: int = 5,
        *,
        max_visits: int = 100_000,
        max_observations: int = 50_000,
        idle_hours: float = 48.0,
        future_hours: float = 24.0,
        clock: Callable[[], float] = time.time,
        prediction_log: str = OFF,
    ):
        self._monitor = prediction_log
        self._use(ProductionPipeline(config_path, model_path))
        self._looked, self._problem = time.monotonic(), ""
        self.min_observations = min_observations
        self.max_visits, self.max_observations = max_visits, max_observations
        self.idle_hours, self.future_hours, self.clock = idle_hours, future_hours, clock
        self.visits: OrderedDict[Key, Visit] = OrderedDict()  # the longest silent first
        self.set_aside: Counter[str] = Counter()
        self.dropped = 0  # visits dropped because there were too many
        self._waiting: list[tuple[Mapping[str, Any], Any]] = []
        self._late_results: list[dict[str, Any]] = []  # last scores of visits that were dropped
        self._dropped: OrderedDict[bytes, None] = OrderedDict()  # marks of dropped visits, the oldest first
        self._newly_dropped: deque[Key] = deque(maxlen=REMEMBERED)
        self.codes: list[str] = []  # in order of arrival; rows hold places in it
        self._concepts: list[Concept | None] = []
        self._place: dict[str, int] = {}
        self._codes_at_most = FORGETTABLE  # before those that are in use are looked for

    def _use(self, pipeline: ProductionPipeline) -> None:
        self.pipeline = pipeline
        self._fold_hours = _fold_hours(pipeline)
        self._log = PredictionLog.open(self._monitor, pipeline, "stream")

    def renew(self) -> None:
        """Takes up the model that was deployed since. Where that cannot be, the old one goes on, and the log says why.

        `predict_due` does it every few seconds.
        """
        self._looked = time.monotonic()
        try:
            successor = self.pipeline.successor()
        except FeaturePipelineError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.error("error: %s; the stream goes on with model %s", error, self.pipeline.model_version)
            return
        if successor is None:
            return
        if successor.config.synonyms != self.pipeline.config.synonyms:
            # units were converted by what the codes meant when they came
            if self._problem != successor.model_version:
                self._problem = successor.model_version
                log.error("error: model %s gives codes other meanings; restart the stream", successor.model_version)
            return
        self._use(successor)
        for visit in self.visits.values():
            self._check_folded(visit)
        log.info("model %s is loaded", successor.model_version)

    def restore(self, key: Key, full: bool = False, folded: float | None = None, level: str | None = None) -> None:
        """Says of an open visit what an earlier process knew: that it had given it up, or folded it, and the risk level
        of the last score that it gave."""
        visit = self.visits.get(key)
        if visit is None:
            return
        visit.level = level or visit.level
        if folded is not None:
            visit.folded = min(folded, visit.folded or folded)
        if full:
            self._give_up(visit)
        self._check_folded(visit)

    def _check_folded(self, visit: Visit) -> None:
        """Gives up a visit that would be scored from a part of what the model looks at."""
        if visit.folded is not None and (self._fold_hours is None or self._fold_hours > visit.folded):
            self._give_up(visit)

    def _give_up(self, visit: Visit) -> None:
        if visit.full:
            return
        visit.full, visit.changed = True, False
        self._count({"visit_full": visit.n_rows})
        visit.rows = [visit.rows[0][:1]]

    # ------------------------------------------------------------------------------------------ observations

    def add_observation(self, observation: Mapping[str, Any], origin: Any = None) -> None:
        """Takes one observation (the seven fields). What cannot be used is counted in `set_aside` and reported once it
        is looked at: with the next thousand, or before the next score. `origin` is kept with the visit (the first one).
        """
        self._waiting.append((observation, origin))
        if len(self._waiting) >= WAITING:
            self.settle()

    def add_observations(self, observations: Sequence[Mapping[str, Any]]) -> None:
        """Takes several observations."""
        for observation in observations:
            self.add_observation(observation)

    def settle(self) -> None:
        """Validates the observations that wait and gives them to their visits."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        records = [record for record, _ in waiting]
        try:
            read = self.pipeline.reproducer.read(records)
        except BadObservations as error:
            # nothing usable; where a column is missing the rows are all of no expected form
            self._count(error.set_aside or {"malformed": len(records)})
            return
        self._count(read.set_aside)
        origins: dict[Key, Any] = {}
        for record, origin in waiting:
            if origin is not None and isinstance(record, Mapping):
                origins.setdefault((as_text(record.get("client")), as_text(record.get("visit_id"))), origin)
        self._take(read, origins)

    def _count(self, reasons: Mapping[str, int]) -> None:
        for reason, n in reasons.items():
            self.set_aside[reason] += n
            log.warning("set aside: %d observations: %s", n, REASONS[reason])

    def _take(self, read: Observations, origins: Mapping[Key, Any]) -> None:
        for code in read.codes:
            if code not in self._place:
                self._place[code] = len(self.codes)
                self.codes.append(code)
                self._concepts.append(concept_of(code, self.pipeline.config.synonyms))
        own = np.array([self._place[code] for code in read.codes], dtype=np.int32)
        rows = np.empty(len(read.time), dtype=ROW)
        rows["code"] = np.repeat(own[read.group_code], np.diff(read.group_start))
        for name in ("time", "value", "low", "high"):
            rows[name] = getattr(read, name)
        now = self.clock()
        latest = int((now + self.future_hours * 3600) * 1e6)
        bounds = read.group_start[read.visit_group_start].tolist()
        future = bool((rows["time"] > latest).any())
        for i, key in enumerate(read.keys()):
            own_rows = rows[bounds[i] : bounds[i + 1]]
            if future:
                late = own_rows["time"] > latest
                if late.any():
                    self._count({"future": int(late.sum())})
                    own_rows = own_rows[~late]
            if not len(own_rows):
                continue  # a visit begins with its first usable observation
            visit = self.visits.get(key)
            if visit is None:
                if self.was_dropped(key):
                    self._dropped.move_to_end(mark_of(key))
                    self._count({"visit_dropped": len(own_rows)})
                    continue
                self._make_room()
                visit = self.visits[key] = Visit(read.client[i], read.visit_id[i], origin=origins.get(key))
            else:
                self.visits.move_to_end(key)
            visit.seen = now
            if visit.full:
                self._count({"visit_full": len(own_rows)})
                continue
            visit.rows.append(own_rows.copy())
            visit.changed = True
            if visit.n_rows > self.max_observations:
                self._shrink(visit)
        if len(self.codes) > self._codes_at_most:
            self._forget_codes()

    def _forget_codes(self) -> None:
        """Drops the codes that no open visit has: interfaces may send any text as a code, without end."""
        used = np.zeros(len(self.codes), dtype=bool)
        for visit in self.visits.values():
            for rows in visit.rows:
                used[rows["code"]] = True
        kept = np.flatnonzero(used)
        new = np.zeros(len(used), dtype=np.int32)
        new[kept] = np.arange(len(kept))
        for visit in self.visits.values():
            for rows in visit.rows:
                rows["code"] = new[rows["code"]]
        self.codes = [self.codes[i] for i in kept]
        self._concepts = [self._concepts[i] for i in kept]
        self._place = {code: i for i, code in enumerate(self.codes)}
        self._codes_at_most = 2 * len(kept) + FORGETTABLE

    def _make_room(self) -> None:
        while len(self.visits) >= self.max_visits:
            key = next(iter(self.visits))
            self.dropped += 1
            log.warning("more than %d open visits: the one that was silent the longest is dropped", self.max_visits)
            self._close([key])

    def _distinct(self, visit: Visit) -> np.ndarray:
        """All different rows of a visit."""
        if len(visit.rows) > 1:
            together = np.concatenate(visit.rows)
            # bytes compare NaN with NaN as equal; -0.0 was made 0.0 by the reader
            _, first = np.unique(together.view(f"V{ROW.itemsize}"), return_index=True)
            visit.rows = [together[np.sort(first)]]
        return visit.rows[0]

    def _shrink(self, visit: Visit) -> None:
        rows = self._distinct(visit)
        if self._fold_hours is not None:
            rows = self._folded(rows)
            visit.rows = [rows]
            visit.folded = min(self._fold_hours, visit.folded or self._fold_hours)
        if len(rows) > self.max_observations:
            self._give_up(visit)

    def _folded(self, rows: np.ndarray) -> np.ndarray:
        """Without the rows older than any window, but for the latest of each code."""
        horizon = rows["time"].max() - int(self._fold_hours * MICROSECONDS_PER_HOUR)
        order = np.lexsort((rows["high"], rows["low"], rows["value"], rows["time"], rows["code"]))
        rows = rows[order]
        last = np.append(rows["code"][1:] != rows["code"][:-1], True)
        return rows[(rows["time"] > horizon) | last]

    # ----------------------------------------------------------------------------------------------- scores

    def _key(self, visit_id: Any, client: Any) -> Key | None:
        """The open visit that is meant. Raises `ValueError` where two clients have visits of this number."""
        number = as_text(visit_id)
        if client is not None:
            key = (as_text(client), number)
            return key if key in self.visits else None
        found = [key for key in self.visits if key[1] == number]
        if len(found) > 1:
            raise ValueError("several clients have a visit of this number: say which client")
        return found[0] if found else None

    def should_predict(self, visit_id: Any, client: Any = None) -> bool:
        """Is the visit open, has it enough observations, and changed since its last score?"""
        self.settle()
        key = self._key(visit_id, client)
        return key is not None and self._due(self.visits[key])

    def _due(self, visit: Visit) -> bool:
        if not visit.changed:
            return False
        # within a piece no row stands twice; several pieces are only compared where it decides
        least = self.min_observations
        return max(map(len, visit.rows)) >= least or (visit.n_rows >= least and len(self._distinct(visit)) >= least)

    def predict_visit(self, visit_id: Any, client: Any = None) -> dict[str, Any]:
        """The score of one open visit: ``visit_id, client, sepsis_probability, risk_level, num_observations,
        timestamp`` (of its last observation, UTC), ``model_version``. Raises `KeyError` where no such visit is open or
        it is too full to be scored."""
        self.settle()
        key = self._key(visit_id, client)
        if key is None or self.visits[key].full:
            raise KeyError("no such visit is open, or it has more observations than can be kept")
        return self._score([key])[0]

    def predict_due(self, where: Callable[[Visit], bool] = lambda visit: True) -> list[dict[str, Any]]:
        """The scores of all visits that changed since their last one, in one vectorised call; and the last scores of
        visits that were dropped meanwhile. `where` may leave visits for later."""
        self.settle()
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self.renew()
        due = [key for key, visit in self.visits.items() if visit.changed and self._due(visit) and where(visit)]
        results = self._late_results + self._score(due)
        self._late_results = []
        return results

    def relearn(self, where: Callable[[Visit], bool]) -> None:
        """Scores visits whose scores were given before, by an earlier process: only to know from which level a rise
        counts. Nothing is given or recorded again."""
        self.settle()
        self._score([key for key, visit in self.visits.items() if self._due(visit) and where(visit)], record=False)

    def _score(self, keys: Sequence[Key], record: bool = True) -> list[dict[str, Any]]:
        if not keys:
            return []
        start = time.perf_counter()
        observations = self._observations(keys)
        visit, moments = np.arange(len(keys)), observations.last_time
        found = self.pipeline.assess(observations, visit, moments)
        probability, levels = found.probability, found.level.tolist()
        lengths = observations.group_start[observations.visit_group_start]
        if record:
            self._log.record(observations, visit, moments, found, time.perf_counter() - start)
        results = []
        for i, (key, p, time_) in enumerate(zip(keys, probability.tolist(), iso_times(moments), strict=True)):
            visit_ = self.visits[key]
            visit_.changed = False
            results.append(
                {
                    "visit_id": visit_.visit_id,
                    "client": visit_.client,
                    "sepsis_probability": p,
                    "risk_level": levels[i],
                    "num_observations": int(lengths[i + 1] - lengths[i]),
                    "timestamp": time_,
                    "model_version": self.pipeline.model_version,
                    "previous_level": visit_.level,
                }
            )
            visit_.level = levels[i]
        return results

    def _observations(self, keys: Sequence[Key]) -> Observations:
        visits = [self.visits[key] for key in keys]
        for visit in visits:
            if len(visit.rows) > 1:
                visit.rows = [np.concatenate(visit.rows)]
        rows = np.concatenate([visit.rows[0] for visit in visits])
        used = np.flatnonzero(np.bincount(rows["code"]))
        order = sorted(used.tolist(), key=self.codes.__getitem__)
        rank = np.empty(len(self.codes), dtype=np.int64)
        rank[order] = np.arange(len(order))
        observations = Observations.of_rows(
            [(visit.client, visit.visit_id) for visit in visits],
            [self.codes[i] for i in order],
            [self._concepts[i] for i in order],
            np.repeat(np.arange(len(visits)), [len(visit.rows[0]) for visit in visits]),
            rank[rows["code"]],
            {name: np.ascontiguousarray(rows[name]) for name in ("time", "value", "low", "high")},
        )
        # kept in canonical order from now on, each row once: the next sort has little to do
        kept = np.empty(len(observations.time), dtype=ROW)
        kept["code"] = np.repeat(np.array(order)[observations.group_code], np.diff(observations.group_start))
        for name in ("time", "value", "low", "high"):
            kept[name] = getattr(observations, name)
        bounds = observations.group_start[observations.visit_group_start].tolist()
        for visit, (start, end) in zip(visits, pairwise(bounds), strict=True):
            visit.rows = [kept[start:end].copy()]
        return observations

    # --------------------------------------------------------------------------------------------- the end

    def clear_buffer(self, visit_id: Any, client: Any = None) -> None:
        """Forgets a visit: whatever comes of it later begins anew."""
        self.settle()
        key = self._key(visit_id, client)
        if key is not None:
            del self.visits[key]
        elif client is not None:
            self._dropped.pop(mark_of((as_text(client), as_text(visit_id))), None)

    def close_idle(self) -> list[dict[str, Any]]:
        """Drops the visits without an observation for `idle_hours`; gives their last scores where one was due."""
        self.settle()
        horizon = self.clock() - self.idle_hours * 3600
        idle = []
        for key, visit in self.visits.items():
            if visit.seen > horizon:
                break
            idle.append(key)
        self._close(idle)
        results, self._late_results = self._late_results, []
        return results

    def _close(self, keys: Sequence[Key]) -> None:
        self._late_results += self._score([key for key in keys if self._due(self.visits[key])])
        for key in keys:
            del self.visits[key]
        self._newly_dropped += keys
        self.remember_dropped(map(mark_of, keys))

    def remember_dropped(self, marks: Iterable[bytes]) -> None:
        """Remembers dropped visits by their marks; beyond `REMEMBERED` of them the oldest are forgotten."""
        for mark in marks:
            self._dropped[mark] = None
        while len(self._dropped) > REMEMBERED:
            self._dropped.popitem(last=False)

    def was_dropped(self, key: Key) -> bool:
        """Is it a visit that was dropped, so that what comes of it now would be a part?"""
        return bool(self._dropped) and mark_of(key) in self._dropped

    def dropped_marks(self) -> Sequence[bytes]:
        """All that is remembered of dropped visits, the oldest first."""
        return list(self._dropped)

    def newly_dropped(self) -> list[Key]:
        """The visits that were dropped since it was asked last."""
        keys = list(self._newly_dropped)
        self._newly_dropped.clear()
        return keys

    def forget(self, keys: Sequence[Key]) -> None:
        """Drops visits without a word: another process has taken them over."""
        for key in keys:
            self.visits.pop(key, None)


def mark_of(key: Key) -> bytes:
    """8 bytes by which a visit is told from a million others."""
    return hashlib.blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _fold_hours(pipeline: ProductionPipeline) -> float | None:
    """How far back the model looks, but for the latest value of each code; None where it looks at the whole visit.

    The clinical scores look at the last 24 h and at static codes.
    """
    plan = pipeline.reproducer.plan
    if set(plan.columns.get(None, {})) - {"last"}:
        return None
    if set(plan.context) - {name for name in CONTEXT if name == "hour_of_day" or name.endswith("h")}:
        return None
    return float(max([24, *(window for window in plan.columns if window is not None)]))
