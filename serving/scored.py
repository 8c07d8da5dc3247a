"""A request's visits and their risk: what each answer says about them, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from feature_pipeline import (
    CONCEPTS,
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    SET_ASIDE_REASONS,
    Assessment,
    Codes,
    NotExplainable,
    Observations,
    ProductionPipeline,
    iso_times,
)
from serving.words import code_words, reason_text, unknown_text

MOST_REASONS = 20
MOST_POINTS = 100


class TooMuch(Exception):
    """The request asks for more than the service's limits; the text says which."""


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
