"""Alerts as events: when an alert starts, whether onset follows, and the figures of many visits.

The functions need arrays only, so that past stays, live logs and random scores are judged by the same rules:

- An alert starts at a score of risk level HIGH, unless an alert of the same visit started less than `cooldown` hours
  before. A visit that stays HIGH alerts again after the silence. By this rule, a higher threshold never causes more
  alerts: the starts are the smallest number of silences that cover all HIGH scores.
- An alert is true where onset follows within `window` hours, or was at most `GRACE_HOURS` before. An alert later than
  that is late: the ward has to answer it, but it is neither true nor false. Every other alert is false.
- UNKNOWN is not an alert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from feature_pipeline import MICROSECONDS_PER_HOUR, NO_TIME

GRACE_HOURS = 3.0
COOLDOWN_HOURS = 6.0  # as stream_processor.py has it
WINDOWS = (12.0, 24.0, 48.0)
HOURS_PER_DAY = 24


@dataclass(frozen=True)
class Stays:
    """Visits that are judged. `onset` is NO_TIME for a visit without sepsis, and for a septic one without a date."""

    client: np.ndarray  # (n_visits,) 0, 1, 2, ...: whole clients are resampled
    start: np.ndarray  # (n_visits,) microseconds since 1970
    end: np.ndarray  # (n_visits,)
    septic: np.ndarray  # (n_visits,) bool
    onset: np.ndarray  # (n_visits,) microseconds since 1970
    has_onsets: bool | None = None  # of the labels that these visits are part of; None: as the visits show

    @property
    def dated(self) -> bool:
        """Do the labels have onset times? Without septic visits none is missing."""
        if self.has_onsets is not None:
            return self.has_onsets
        return bool((self.onset[self.septic] != NO_TIME).any() or not self.septic.any())

    def some(self, member: np.ndarray) -> Stays:
        """The visits `member` (n_visits,) bool."""
        _, client = np.unique(self.client[member], return_inverse=True)
        columns = (self.start, self.end, self.septic, self.onset)
        return Stays(client, *(column[member] for column in columns), has_onsets=self.dated)

    @property
    def days(self) -> np.ndarray:
        return (self.end - self.start) / (HOURS_PER_DAY * MICROSECONDS_PER_HOUR)


@dataclass(frozen=True)
class Scored:
    """Scored moments of visits, ascending by visit and time. `probability` is NaN where the answer was UNKNOWN."""

    stays: Stays
    visit: np.ndarray  # (n_moments,) index into the stays
    time: np.ndarray  # (n_moments,) microseconds since 1970
    probability: np.ndarray  # (n_moments,)
    high: np.ndarray  # (n_moments,) bool: risk level HIGH
    cooldown_hours: float = COOLDOWN_HOURS
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        stays: Stays,
        visit: np.ndarray,
        time: np.ndarray,
        probability: np.ndarray,
        high: np.ndarray,
        cooldown_hours: float = COOLDOWN_HOURS,
    ) -> Scored:
        """From moments in any order; of several scores of one moment the highest counts."""
        order = np.lexsort((-np.nan_to_num(probability, nan=-np.inf), time, visit))
        first = np.append(True, (np.diff(visit[order]) != 0) | (np.diff(time[order]) != 0))[: len(order)]
        order = order[first]
        return cls(stays, visit[order], time[order], probability[order], high[order], cooldown_hours)

    def some(self, member: np.ndarray) -> tuple[Scored, np.ndarray]:
        """(the scores of the visits `member` (n_visits,) bool, (n_moments,) bool which those are)."""
        rows, place = member[self.visit], np.cumsum(member) - 1
        columns = (self.time[rows], self.probability[rows], self.high[rows])
        return Scored(self.stays.some(member), place[self.visit[rows]], *columns, self.cooldown_hours), rows

    @cached_property
    def lead(self) -> np.ndarray:
        """(n_moments,) hours until onset, negative after it, NaN for visits without a dated onset."""
        onset = self.stays.onset[self.visit]
        return np.where(onset == NO_TIME, np.nan, (onset - self.time) / MICROSECONDS_PER_HOUR)

    @cached_property
    def _place(self) -> np.ndarray:
        """(n_moments,) the moments on one line, visit after visit, each further than any silence from the next."""
        if not len(self.visit):
            return np.empty(0, dtype=np.int64)
        starts = np.flatnonzero(np.append(True, np.diff(self.visit) != 0))
        length = np.diff(np.append(starts, len(self.visit)))
        since = self.time - np.repeat(self.time[starts], length)
        span = since[np.append(starts[1:], len(self.visit)) - 1] + self._silence + 1
        return since + np.repeat(np.cumsum(span) - span, length)

    @property
    def _silence(self) -> int:
        return round(self.cooldown_hours * MICROSECONDS_PER_HOUR)

    def starts(self, high: np.ndarray) -> np.ndarray:
        """(n_alerts,) rows where alerts start if the rows `high` are of level HIGH."""
        rows = np.flatnonzero(high)
        place = self._place[rows]
        following = np.maximum(np.searchsorted(place, place + self._silence), np.arange(1, len(rows) + 1)).tolist()
        chain, i = [], 0
        while i < len(rows):
            chain.append(i)
            i = following[i]
        return rows[chain]

    @cached_property
    def alerts(self) -> np.ndarray:
        return self.starts(self.high)

    @cached_property
    def rises(self) -> np.ndarray:
        """(n_rises,) the alerts of a service that alerts only where the level before was lower."""
        same = np.append(False, np.diff(self.visit) == 0)[: len(self.visit)]
        return self.starts(self.high & ~(same & np.append(False, self.high[:-1])[: len(self.high)]))

    def at_threshold(self, threshold: float) -> Scored:
        """The same scores with HIGH from `threshold` on."""
        return self.with_high(self.probability >= threshold)

    def with_high(self, high: np.ndarray, probability: np.ndarray | None = None) -> Scored:
        """The same moments with other levels."""
        other = replace(
            self, high=high, probability=self.probability if probability is None else probability, _cache={}
        )
        for name in ("lead", "_place"):  # they do not depend on the levels
            other.__dict__[name] = getattr(self, name)
        return other

    def threshold_for(self, most_alerts: int) -> float:
        """The lowest of the scores that gives at most so many alerts as a threshold; infinite where none does."""
        levels = self._levels
        low, high = 0, len(levels)  # at levels[high] there are few enough
        while low < high:
            middle = (low + high) // 2
            if len(self.starts(self.probability >= levels[middle])) <= most_alerts:
                high = middle
            else:
                low = middle + 1
        return float(levels[low]) if low < len(levels) else float("inf")

    @property
    def _levels(self) -> np.ndarray:
        if "levels" not in self._cache:
            self._cache["levels"] = np.unique(self.probability[~np.isnan(self.probability)])
        return self._cache["levels"]


# What a figure is: sum of one column over sum of another, times a factor. Sums add up over visits, so that whole
# clients can be resampled.
Ratio = tuple[str, str, float]


def ratios(windows: Sequence[float] = WINDOWS) -> dict[str, Ratio]:
    """The figures of `per_visit`, by name."""
    out: dict[str, Ratio] = {
        "alerts_per_100_patient_days": ("alerts", "days", 100.0),
        "rises_per_100_patient_days": ("rises", "days", 100.0),
        "visits_alerted_per_100": ("alerted", "visits", 100.0),
        "high_share": ("high", "moments", 1.0),
        "unknown_share": ("unknown", "moments", 1.0),
        "visit_ppv": ("septic_alerted", "alerted", 1.0),
        "visit_sensitivity": ("septic_alerted", "septic", 1.0),
        "late_alerts_per_100_patient_days": ("late", "days", 100.0),
    }
    for w in windows:
        out[f"false_alerts_per_100_patient_days_{w:g}h"] = (f"false_{w:g}h", "days", 100.0)
        out[f"ppv_{w:g}h"] = (f"true_{w:g}h", "judged", 1.0)
        out[f"sensitivity_{w:g}h"] = (f"caught_{w:g}h", "at_risk", 1.0)
    return out


def per_visit(scored: Scored, windows: Sequence[float] = WINDOWS) -> dict[str, np.ndarray]:
    """Sums of each visit, by name: what the figures of `ratios` are made of.

    `at_risk` are septic visits that were scored before onset; `caught` those of them with an alert within the window
    before onset. A septic visit whose onset lies before its first score can no longer be caught.
    """
    stays, n = scored.stays, len(scored.stays.start)

    def count(rows: np.ndarray) -> np.ndarray:
        return np.bincount(scored.visit[rows], minlength=n).astype(np.float64)

    alerts, lead = scored.alerts, scored.lead[scored.alerts]
    late = lead < -GRACE_HOURS
    known = count(~np.isnan(scored.probability))
    moments = np.bincount(scored.visit, minlength=n).astype(np.float64)
    number = count(alerts)
    out = {
        "visits": (moments > 0).astype(np.float64),
        "days": np.where(moments > 0, stays.days, 0.0),
        "moments": moments,
        "unknown": moments - known,
        "high": count(scored.high),
        "alerts": number,
        "rises": count(scored.rises),
        "alerted": (number > 0).astype(np.float64),
        "septic": (stays.septic & (moments > 0)).astype(np.float64),
        "septic_alerted": (stays.septic & (number > 0)).astype(np.float64),
        "late": count(alerts[late]),
        "judged": count(alerts[~late]),
        "at_risk": (count(scored.lead > 0) > 0).astype(np.float64),
    }
    for w in windows:
        true = ~late & (lead <= w)
        out[f"true_{w:g}h"] = count(alerts[true])
        out[f"false_{w:g}h"] = out["judged"] - out[f"true_{w:g}h"]
        out[f"caught_{w:g}h"] = (count(alerts[(lead > 0) & (lead <= w)]) > 0).astype(np.float64)
    return out


def figures_of(sums: Mapping[str, float], windows: Sequence[float] = WINDOWS) -> dict[str, float]:
    """The figures of totals; NaN where there is nothing to divide by."""
    return {
        name: factor * sums[above] / sums[below] if sums[below] else float("nan")
        for name, (above, below, factor) in ratios(windows).items()
    }


def totals(visits: Mapping[str, np.ndarray], some: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """The sums of `per_visit` over some visits."""
    return {name: float(values[some].sum()) for name, values in visits.items()}


def lead_times(scored: Scored, window: float) -> np.ndarray:
    """(n_visits,) hours from the first alert within `window` hours before onset to onset; NaN where there is none.

    The window matters: the first alert ever of a long stay lies days before onset whatever the scores are.
    """
    out = np.full(len(scored.stays.start), np.nan)
    rows = scored.alerts[::-1]  # assignment below: the first alert of a visit wins
    lead = scored.lead[rows]
    caught = (lead > 0) & (lead <= window)
    out[scored.visit[rows[caught]]] = lead[caught]
    return out


def quartiles(values: np.ndarray) -> list[float] | None:
    """Median, lower and upper quartile of the values that are there; None for none."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [50, 25, 75]).tolist() if len(values) else None


@dataclass(frozen=True)
class Judged:
    """Moments with a yes-or-no answer: what ranking, calibration and net benefit are worked out on.

    Positive: onset is at most `horizon_hours` away. As in training, moments after onset count only where the model was
    trained with them. Labels without onsets judge each visit once, at its last moment, by whether it was septic.
    """

    rows: np.ndarray  # (n_judged,) of the moments
    label: np.ndarray  # (n_judged,) 0 or 1
    horizon_hours: float
    retrospective: bool


def judged_moments(scored: Scored, horizon_hours: float, after_onset: bool) -> Judged:
    """The moments of `scored` that are judged."""
    stays = scored.stays
    if not stays.dated:
        rows = np.flatnonzero(np.append(np.diff(scored.visit) != 0, True)[: len(scored.visit)])
        return Judged(rows, stays.septic[scored.visit[rows]].astype(np.int8), horizon_hours, True)
    lead = scored.lead
    rows = np.flatnonzero(np.isnan(lead) | (lead >= 0) | after_onset)
    return Judged(rows, (lead[rows] <= horizon_hours).astype(np.int8), horizon_hours, False)
