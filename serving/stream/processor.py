"""Open visits, their observations, and their scores in micro-batches."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.command_line import log
from feature_pipeline import (
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    MICROSECONDS_PER_HOUR,
    SET_ASIDE_REASONS,
    BadConfig,
    BadObservations,
    Concept,
    Observations,
    ProductionPipeline,
    SiteCodes,
    as_text,
    to_micros,
)
from monitoring.log import OFF
from serving.deployed import LAST, NOW, Deployed, moments_of
from serving.stream.clock import OwnTime
from serving.stream.results import columns_of
from serving.stream.visits import RAW, REMEMBERED, ROW, Key, Visit, joined, mark_of

REASONS = {
    **SET_ASIDE_REASONS,
    "visit_full": "the visit has more observations than --max-observations; it is no longer scored",
    "visit_dropped": "the visit was dropped before (idle, or too many were open); it is not scored from a part",
}
FORGETTABLE = 10_000  # codes that no open visit has
PIECES = 8  # of a visit's rows, before they are put in order for the next time
WAITING = 10_000  # observations that are validated together at the latest
CLOSED_AT_ONCE = 500  # idle visits, so that others are not kept waiting


class StreamProcessor:
    """Keeps open visits and scores those that changed; loads config and model when it is made.

    Observations may come in any order, several times, and late: the score of a visit is the one that the batch gives on
    the same rows at the same moment, to the last bit. `as_of` is that moment: ``now``, ``last`` (the last observation
    of each visit, for feeds that are replayed), or a time. `min_observations`: a visit with fewer different ones is not
    scored. `codes` is the site's map of codes. `clock` returns the system's time in seconds since 1970, `steady` a time
    that is never set: by it visits are idle.

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
        as_of: str = NOW,
        codes: SiteCodes | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        prediction_log: str = OFF,
    ):
        if as_of not in (NOW, LAST):
            to_micros(as_of)  # raises `BadObservations`
        self.deployed = Deployed(
            ProductionPipeline(config_path, model_path, codes), "stream", prediction_log, _check_meaning
        )
        self.min_observations = min_observations
        self.max_visits, self.max_observations = max_visits, max_observations
        self.idle_hours, self.as_of, self.time = idle_hours, as_of, OwnTime(clock, steady)
        self.visits: OrderedDict[Key, Visit] = OrderedDict()  # the longest silent first
        self.set_aside: Counter[str] = Counter()
        self.unused_codes: Counter[str] = Counter()  # observations by code, of the first codes that came
        self.dropped = 0  # visits dropped because there were too many
        self._waiting: list[tuple[Mapping[str, Any], Any]] = []
        self._late_results: list[dict[str, Any]] = []  # last scores of visits that were dropped
        self._dropped: OrderedDict[bytes, None] = OrderedDict()  # marks of dropped visits, the oldest first
        self._newly_dropped: deque[Key] = deque(maxlen=REMEMBERED)
        self.codes: list[str] = []  # rows hold places in it
        self._concepts: list[Concept | None] = []
        self._place: dict[str, int] = {}
        self._free: list[int] = []  # places of codes that no open visit has any more
        self._codes_at_most = FORGETTABLE  # before those that are in use are looked for
        self.journaled = False  # are `changed` and `closed` taken by a journal?
        self.changed: dict[Key, Visit] = {}  # visits that are not kept as they are
        self.closed: list[Visit] = []  # visits that were dropped and are still kept
        self.put_by: dict[Any, dict[Key, Visit]] = {}  # a name -> visits that may be taken back

    @property
    def pipeline(self) -> ProductionPipeline:
        return self.deployed.pipeline

    @property
    def look_back(self) -> float | None:
        """How many hours back the model looks, but for the latest value of each code; None: the whole visit."""
        return self.pipeline.reproducer.plan.look_back

    def renew(self) -> None:
        """Takes up the model that was deployed since. If it cannot be used the old one stays in use, and the log says
        why. `predict_due` does it every few seconds."""
        if self.deployed.renew():
            self._check_all_folded()

    def _check_all_folded(self) -> None:
        for visit in self.visits.values():
            self._check_folded(visit)

    def adopt(self, visits: Iterable[tuple[int, Mapping[str, Any], np.ndarray]], codes: Mapping[int, str]) -> None:
        """Opens the visits that a journal has kept: number, content, rows. Their scores were given."""
        places = range(max(codes, default=-1) + 1)
        self.codes = [codes.get(place, "") for place in places]
        self._concepts = [self.pipeline.reproducer.codes.meaning(code)[0] for code in self.codes]
        self._place = {code: place for place, code in codes.items()}
        self._free = [place for place in places if place not in codes]
        for number, content, rows in visits:
            visit = Visit(**content, rows=[rows.view(RAW)], number=number, pieces=1, n_rows_kept=len(rows))
            visit.seen, visit.origin = self.time.steady(), visit.origin and tuple(visit.origin)
            visit.kept = visit.content()
            if len(rows):
                self._note_freshness(visit, int(rows["time"].max()))
            self.visits[as_text(visit.client), as_text(visit.visit_id)] = visit
            self._check_folded(visit)

    def _note(self, visit: Visit) -> None:
        """Says that the visit is not kept as it is."""
        if self.journaled:
            self.changed[as_text(visit.client), as_text(visit.visit_id)] = visit

    def _check_folded(self, visit: Visit) -> None:
        """Gives up a visit that would be scored from a part of what the model looks at."""
        if visit.folded is not None and (self.look_back is None or self.look_back > visit.folded):
            self._give_up(visit)

    def _note_freshness(self, visit: Visit, newest: int) -> None:
        """Says when a visit with a score will be stale if nothing new comes; `newest` in microseconds since 1970."""
        minimum = self.pipeline.config.minimum_evidence
        stays = self.as_of != NOW or minimum is None or visit.level in (None, "UNKNOWN") or visit.full
        visit.fresh_until = np.inf if stays else newest / 1e6 + minimum.newest_hours * 3600

    def _give_up(self, visit: Visit) -> None:
        if visit.full:
            return
        visit.full, visit.changed, visit.rewrite, visit.fresh_until = True, False, True, np.inf
        self._count({"visit_full": visit.n_rows})
        self.deployed.current.log.record_error("visit_full")
        visit.rows, visit.fresh = [visit.rows[0][:1].copy()], []
        self._note(visit)

    # ------------------------------------------------------------------------------------------ observations

    def add_observation(self, observation: Mapping[str, Any], origin: Any = None) -> None:
        """Takes one observation (the seven fields). What cannot be used is counted in `set_aside` and reported once it
        is looked at: with the next ten thousand, or before the next score. `origin` is kept with the visit (the first).
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
        rows = [(record, origin) for record, origin in waiting if isinstance(record, Mapping)]
        if len(rows) < len(waiting):
            self._count({"malformed": len(waiting) - len(rows)})
        if not rows:
            return
        try:
            read = self.deployed.current.read([record for record, _ in rows], self.time.latest())
        except BadObservations:  # a column is in none of the records
            self._count({"malformed": len(rows)})
            return
        self._count(read.set_aside)
        if len(read.time):
            self.time.judge(read.time.max() / 1e6)
        for code, n in self.pipeline.unused_codes(read).items():
            if code in self.unused_codes or len(self.unused_codes) < FORGETTABLE:
                self.unused_codes[code] += n
        self._take(read, [rows[row][1] for row in read.first_row.tolist()])

    def _count(self, reasons: Mapping[str, int]) -> None:
        for reason, n in reasons.items():
            self.set_aside[reason] += n
            log.warning("set aside: %d observations: %s", n, REASONS[reason])

    def _name_place(self, code: str) -> int:
        """Where `code` is among the codes; it gets a place if it has none."""
        if code not in self._place:
            concept = self.pipeline.reproducer.codes.meaning(code)[0]
            if self._free:
                place = self._free.pop()
                self.codes[place], self._concepts[place] = code, concept
            else:
                place = len(self.codes)
                self.codes.append(code)
                self._concepts.append(concept)
            self._place[code] = place
        return self._place[code]

    def _take(self, read: Observations, origins: Sequence[Any]) -> None:
        own = np.array([self._name_place(code) for code in read.codes], dtype=np.int32)
        raw = np.empty(len(read.time), dtype=RAW)
        rows = raw.view(ROW)
        rows["code"] = np.repeat(own[read.group_code], np.diff(read.group_start))
        for name in ("time", "value", "low", "high"):
            rows[name] = getattr(read, name)
        now = self.time.steady()
        bounds = read.group_start[read.visit_group_start].tolist()
        for i, key in enumerate(read.keys()):
            n_rows = bounds[i + 1] - bounds[i]
            if not n_rows:
                continue  # a visit begins with its first usable observation
            visit = self.visits.get(key)
            if visit is None:
                if self.was_dropped(key):
                    self._dropped.move_to_end(mark_of(key))
                    self._count({"visit_dropped": n_rows})
                    continue
                self._make_room()
                visit = self.visits[key] = Visit(read.client[i], read.visit_id[i], origin=origins[i])
            else:
                self.visits.move_to_end(key)
            visit.seen = now
            if visit.full:
                self._count({"visit_full": n_rows})
                continue
            visit.rows.append(raw[bounds[i] : bounds[i + 1]].copy())
            visit.changed = True
            if self.journaled:
                visit.fresh.append(visit.rows[-1])
            self._note(visit)
            if visit.n_rows > self.max_observations:
                self._shrink(visit)
        if len(self._place) > self._codes_at_most:
            self._forget_codes()

    def _forget_codes(self) -> None:
        """Drops the codes that no open visit has: interfaces may send any text as a code, without end."""
        used = np.zeros(len(self.codes), dtype=bool)
        for visits in (self.visits, *self.put_by.values()):
            for visit in visits.values():
                used[joined(visit.rows)["code"]] = True
        for code, place in list(self._place.items()):
            if not used[place]:
                del self._place[code]
                self._free.append(place)
        self._codes_at_most = 2 * len(self._place) + FORGETTABLE

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
            _, first = np.unique(together, return_index=True)
            visit.rows = [together[np.sort(first)]]
        return visit.rows[0]

    def _shrink(self, visit: Visit) -> None:
        rows = self._distinct(visit)
        if self.look_back is not None:
            rows = self._folded(rows.view(ROW)).view(RAW)
            visit.rows, visit.rewrite = [rows], True
            visit.folded = min(self.look_back, self.look_back if visit.folded is None else visit.folded)
        if len(rows) > self.max_observations:
            self._give_up(visit)

    def _folded(self, rows: np.ndarray) -> np.ndarray:
        """Without the rows older than any window, but for the latest of each code."""
        horizon = rows["time"].max() - int(self.look_back * MICROSECONDS_PER_HOUR)
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
        """The score of one open visit: ``visit_id, client, sepsis_probability`` (None where the risk is UNKNOWN),
        ``risk_level, reason`` and ``missing`` inputs of UNKNOWN, ``num_observations`` that the model uses,
        ``unused_codes`` with their numbers of observations, ``timestamp`` of its last observation, ``as_of`` (both
        UTC), ``hours_since_newest`` from the newest one that the model uses, ``model_version``. Raises `KeyError` where
        no such visit is open or it has too many observations to be scored."""
        self.settle()
        key = self._key(visit_id, client)
        if key is None or self.visits[key].full:
            raise KeyError("no such visit is open, or it has more observations than can be kept")
        return self._score([key])[0]

    def predict_due(self, where: Callable[[Visit], bool] = lambda visit: True) -> list[dict[str, Any]]:
        """The scores of all visits that changed or became stale since their last one, in one vectorised call; and the
        last scores of visits that were dropped meanwhile. `where` may leave visits for later."""
        self.settle()
        if self.deployed.look():
            self._check_all_folded()
        now = self.time.now()
        due = [
            key
            for key, visit in self.visits.items()
            if (visit.fresh_until < now or (visit.changed and self._due(visit))) and where(visit)
        ]
        results = self._late_results + self._score(due)
        self._late_results = []
        return results

    def relearn(self, where: Callable[[Visit], bool]) -> None:
        """Scores visits again, only to know from which level a rise counts: nothing is given or recorded."""
        self.settle()
        self._score([key for key, visit in self.visits.items() if self._due(visit) and where(visit)], record=False)

    def _score(self, keys: Sequence[Key], record: bool = True) -> list[dict[str, Any]]:
        if not keys:
            return []
        observations = self._observations(keys)
        moments = moments_of(observations, self.as_of, self.time.now())
        model = self.deployed.current
        assessed = model.score(observations, np.arange(len(keys)), moments, record)
        columns = columns_of(assessed, model.pipeline, observations, moments)
        results = []
        for key, newest, *row in zip(keys, assessed.newest.tolist(), *columns.values(), strict=True):
            visit = self.visits[key]
            visit.changed = False
            about = {"visit_id": visit.visit_id, "client": visit.client}
            result = about | dict(zip(columns, row, strict=True)) | {"model_version": model.pipeline.model_version}
            results.append({**result, "previous_level": visit.level})
            if visit.level != result["risk_level"]:
                visit.level = result["risk_level"]
                self._note(visit)
            self._note_freshness(visit, newest)
        return results

    def _observations(self, keys: Sequence[Key]) -> Observations:
        visits = [self.visits[key] for key in keys]
        rows = joined([piece for visit in visits for piece in visit.rows])
        used = np.flatnonzero(np.bincount(rows["code"]))
        order = sorted(used.tolist(), key=self.codes.__getitem__)
        rank = np.empty(len(self.codes), dtype=np.int64)
        rank[order] = np.arange(len(order))
        observations = Observations.of_rows(
            [(visit.client, visit.visit_id) for visit in visits],
            [self.codes[i] for i in order],
            [self._concepts[i] for i in order],
            np.repeat(np.arange(len(visits)), [visit.n_rows for visit in visits]),
            rank[rows["code"]],
            {name: np.ascontiguousarray(rows[name]) for name in ("time", "value", "low", "high")},
        )
        self._keep_in_order(visits, observations, np.array(order))
        return observations

    def _keep_in_order(self, visits: Sequence[Visit], observations: Observations, places: np.ndarray) -> None:
        """Keeps visits of many pieces in canonical order, each row once: their next sort has little to do."""
        many = [i for i, visit in enumerate(visits) if len(visit.rows) > PIECES]
        if not many:
            return
        bounds = observations.group_start[observations.visit_group_start].tolist()
        codes = np.repeat(places[observations.group_code], np.diff(observations.group_start))
        for i in many:
            own = slice(bounds[i], bounds[i + 1])
            kept = np.empty(bounds[i + 1] - bounds[i], dtype=ROW)
            kept["code"] = codes[own]
            for name in ("time", "value", "low", "high"):
                kept[name] = getattr(observations, name)[own]
            visits[i].rows = [kept.view(RAW)]

    # --------------------------------------------------------------------------------------------- the end

    def clear_buffer(self, visit_id: Any, client: Any = None) -> None:
        """Forgets a visit: whatever comes of it later begins anew."""
        self.settle()
        key = self._key(visit_id, client)
        if key is not None:
            self._end(key)
        elif client is not None:
            self._dropped.pop(mark_of((as_text(client), as_text(visit_id))), None)

    def close_idle(self) -> list[dict[str, Any]]:
        """Drops the visits without an observation for `idle_hours`; gives their last scores where one was due."""
        self.settle()
        horizon = self.time.steady() - self.idle_hours * 3600
        idle = []
        for key, visit in self.visits.items():
            if visit.seen > horizon or len(idle) == CLOSED_AT_ONCE:
                break
            idle.append(key)
        self._close(idle)
        results, self._late_results = self._late_results, []
        return results

    def _close(self, keys: Sequence[Key]) -> None:
        self._late_results += self._score([key for key in keys if self._due(self.visits[key])])
        for key in keys:
            self._end(key)
        self._newly_dropped += keys
        self.remember_dropped(map(mark_of, keys))

    def _end(self, key: Key) -> None:
        visit = self.visits.pop(key)
        if self.journaled:
            self.changed.pop(key, None)
            self.closed.append(visit)

    def remember_dropped(self, marks: Iterable[bytes]) -> None:
        """Remembers dropped visits by their marks; beyond `REMEMBERED` of them the oldest are forgotten."""
        for mark in marks:
            self._dropped[mark] = None
        while len(self._dropped) > REMEMBERED:
            self._dropped.popitem(last=False)

    def was_dropped(self, key: Key) -> bool:
        """Is it a visit that was dropped, so that what comes of it now would be a part?"""
        return bool(self._dropped) and mark_of(key) in self._dropped

    def newly_dropped(self) -> list[Key]:
        """The visits that were dropped since it was asked last."""
        keys = list(self._newly_dropped)
        self._newly_dropped.clear()
        return keys

    def forget(self, keys: Sequence[Key]) -> None:
        """Drops visits without a word."""
        for key in keys:
            if key in self.visits:
                self._end(key)

    def put_away(self, name: Any, where: Callable[[Visit], bool]) -> None:
        """Takes visits out of the open ones: another process has taken them over, and may give them back."""
        keys = [key for key, visit in self.visits.items() if where(visit)]
        self.put_by[name] = {key: self.visits.pop(key) for key in keys}

    def take_back(self, name: Any) -> None:
        """Opens visits that were put away again, but for those that were dropped since."""
        for key, visit in self.put_by.pop(name, {}).items():
            visit.seen, self.visits[key] = self.time.steady(), visit
            if self.was_dropped(key):
                self._end(key)
            else:
                self._check_folded(visit)

    def let_go(self, name: Any) -> None:
        """Drops visits that were put away."""
        for key, visit in self.put_by.pop(name, {}).items():
            if self.journaled:
                self.changed.pop(key, None)
                self.closed.append(visit)


def _check_meaning(old: ProductionPipeline | None, new: ProductionPipeline) -> None:
    """Observations were read by what the old model's codes mean. Raises `BadConfig` where the new one's mean others."""
    if old is not None and old.reproducer.codes.meaning_sha256 != new.reproducer.codes.meaning_sha256:
        raise BadConfig(f"model {new.model_version} gives codes other meanings; restart the stream")
