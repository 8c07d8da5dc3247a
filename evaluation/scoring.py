"""Scores past visits as in service: by the model, and by the scores that a ward uses today."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from common.alerts import COOLDOWN_HOURS, Judged, Scored, Stays, judged_moments
from common.command_line import log
from common.labels import read_cells
from evaluation.comparators import COMPARATORS
from feature_pipeline import (
    CSV_AS_TEXT,
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    UNKNOWN_REASONS,
    BadConfig,
    BadObservations,
    Config,
    FeaturePlan,
    Observations,
    ProductionPipeline,
    as_text,
    listed,
    parse_times,
)
from training.snapshots import in_order_of_names, learned_clients

AT_OBSERVATIONS = "observation"
MOMENTS_AT_ONCE = 20_000  # bounds the memory of features; the numbers do not depend on it


@dataclass(frozen=True)
class Past:
    """Labelled visits with their observations, and the moments at which they are scored."""

    observations: Observations
    stays: Stays
    place: np.ndarray  # (n_visits,) of each stay, the observations' visit
    visit: np.ndarray  # (n_moments,) index into the stays, ascending
    time: np.ndarray  # (n_moments,)
    keys: list[tuple[str, str]]  # (n_visits,) client and visit number
    remarks: dict[str, int] = field(default_factory=dict)  # what was left out, counted
    first_antibiotic: np.ndarray | None = None  # (n_visits,) NO_TIME where none


def past_of(observations: Observations, labels: pd.DataFrame, score_every: float | str) -> Past:
    """The labelled visits that have observations, in the order of client and visit number.

    `labels` are those of `read_labels`; `score_every` is hours, from the visit's first observation on, or
    `AT_OBSERVATIONS` for the time of each observation. If some septic visits have an onset, those without one are left
    out. Raises `BadObservations` if no visit is left.
    """
    observations = in_order_of_names(observations)
    remarks: dict[str, int] = {}

    def note(reason: str, number: int) -> None:
        if number:
            remarks[reason] = int(number)

    table = labels.drop_duplicates(["client", "visit_id"], keep="last")
    note("labels that repeat a visit (the last one counts)", len(labels) - len(table))
    place = {key: i for i, key in enumerate(observations.keys())}
    keys = list(zip(table["client"], table["visit_id"], strict=True))
    own = np.array([place.get(key, -1) for key in keys], dtype=np.int64)
    note("labels without observations", (own < 0).sum())
    note("visits without a label", len(place) - (own >= 0).sum())
    sepsis, onset = table["sepsis"].to_numpy(), table["sepsis_onset"].to_numpy()
    note("labels that are neither 0 nor 1", ((own >= 0) & (sepsis < 0)).sum())
    keep = (own >= 0) & (sepsis >= 0)
    empty = keep & (observations.first_time[own] == NO_TIME)
    note("labelled visits with nothing usable", empty.sum())
    keep &= ~empty
    septic = sepsis == 1
    if (onset[keep & septic] != NO_TIME).any():
        undated = keep & septic & (onset == NO_TIME)
        note("septic visits without a date of onset", undated.sum())
        keep &= ~undated
    if not keep.any():
        raise BadObservations(f"no labelled visit can be scored; left out: {remarks or 'nothing'}")
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(own[rows])]
    own, septic, onset = own[rows], septic[rows], np.where(septic, onset, NO_TIME)[rows]
    stays = Stays(
        client=pd.factorize(observations.client_text[own])[0],
        start=observations.first_time[own],
        end=observations.last_time[own],
        septic=septic,
        onset=onset,
    )
    visit, time = _moments(observations, own, stays, score_every)
    return Past(observations, stays, own, visit, time, [keys[row] for row in rows], remarks)


def _moments(observations: Observations, own: np.ndarray, stays: Stays, score_every: float | str):
    """(visit, time) of the moments of service."""
    if score_every == AT_OBSERVATIONS:
        visit_of_group = np.full(observations.n_visits, -1)
        visit_of_group[own] = np.arange(len(own))
        visit = np.repeat(visit_of_group[observations.group_visit], np.diff(observations.group_start))
        pairs = np.unique(np.column_stack([visit, observations.time])[visit >= 0], axis=0)
        return pairs[:, 0], pairs[:, 1]
    step = round(float(score_every) * MICROSECONDS_PER_HOUR)
    number = (stays.end - stays.start) // step + 1
    visit = np.repeat(np.arange(len(own)), number)
    nth = np.arange(len(visit)) - np.repeat(np.cumsum(number) - number, number)
    return visit, stays.start[visit] + nth * step


def with_antibiotics(past: Past, path: str) -> Past:
    """With the column ``antibiotic_time`` of the labels file, if it has one."""
    table = read_cells(path, f"labels {path!r}")
    if "antibiotic_time" not in table.columns:
        return past
    times, empty = parse_times(table["antibiotic_time"])
    if unread := int(((times == NO_TIME) & ~empty).sum()):
        past = replace(past, remarks=past.remarks | {"antibiotic times that are no date": unread})
    keys = zip(table["client"].map(as_text), table["visit_id"].map(as_text), strict=True)
    known = dict(zip(keys, times.tolist(), strict=True))
    return replace(past, first_antibiotic=np.array([known.get(key, NO_TIME) for key in past.keys], dtype=np.int64))


HAS_ZONE = re.compile(r":\d\d.*?(Z|[+-]\d\d(:?\d\d)?)$", re.IGNORECASE)
FEW = 20  # observations of a code, of which the times prove nothing


def doubts_about_times(past: Past, observations: str, labels: str) -> list[str]:
    """What speaks against the times of the files: each of these makes alerts too early or too late, and no figure shows
    it. In whole sentences."""
    lines = []
    onset = read_cells(labels, f"labels {labels!r}").get("sepsis_onset", pd.Series(dtype=str))
    zoned = [_has_zone(cells) for cells in (first_cells(observations, "observation_date"), onset)]
    if (past.stays.onset != NO_TIME).any() and zoned[0] != zoned[1]:
        which = ("onsets", "observations") if zoned[1] else ("observations", "onsets")
        lines.append(
            f"The {which[0]} have an offset from UTC and the {which[1]} have none. Unless the latter are in UTC, the "
            "two are hours apart, and no figure about alerts holds."
        )
    at = past.stays.onset[past.stays.onset != NO_TIME]
    if len(at) > 1 and (_at_midnight(at).mean() > 0.5):
        lines.append(
            "Most onsets are at midnight: if only their dates are known, an alert of the same day counts as late."
        )
    code = np.repeat(past.observations.group_code, np.diff(past.observations.group_start))
    known = np.bincount(code, minlength=len(past.observations.codes))
    midnight = np.bincount(code[_at_midnight(past.observations.time)], minlength=len(known))
    found = [past.observations.codes[i] for i in np.flatnonzero((known >= FEW) & (2 * midnight > known))]
    if found:
        lines.append(
            f"Most times of {listed(found)} are midnight: if only their dates are known, the model saw them hours "
            "before the ward did, and its figures flatter it."
        )
    return lines


def _at_midnight(time: np.ndarray) -> np.ndarray:
    return time % (24 * MICROSECONDS_PER_HOUR) == 0


def first_cells(path: str, column: str) -> pd.Series:
    """The first cells of a column of a file that the reader has read."""
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        return next(pq.ParquetFile(path).iter_batches(1000, columns=[column])).to_pandas()[column]
    table = pd.read_csv(path, **CSV_AS_TEXT | {"on_bad_lines": "skip"}, nrows=1000)
    return table.iloc[1:, [as_text(name) for name in table.iloc[0]].index(column)]


def _has_zone(cells: pd.Series) -> bool:
    if cells.dtype.kind == "M":
        return isinstance(cells.dtype, pd.DatetimeTZDtype)
    return any(HAS_ZONE.search(cell) for cell in cells.dropna().astype(str))


def parts_of(visit: np.ndarray) -> Iterator[slice]:
    """Runs of moments, about `MOMENTS_AT_ONCE` each."""
    for start in range(0, len(visit), MOMENTS_AT_ONCE):
        yield slice(start, min(start + MOMENTS_AT_ONCE, len(visit)))


def unseen(labels: pd.DataFrame, *configs: Config) -> pd.DataFrame:
    """The labels of clients that none of these models learned from. Raises `BadConfig` if there is none."""
    for config in configs:
        own = labels["client"].isin(learned_clients(config))
        if own.all() and len(labels):
            raise BadConfig(
                f"model {config.model_version} was trained on all of these patients; evaluate it on others, or the "
                "figures flatter it"
            )
        if own.any():
            log.info("%d labelled visits are left out: model %s learned from them", own.sum(), config.model_version)
        labels = labels[~own]
    return labels


def scores_of(
    pipeline: ProductionPipeline,
    past: Past,
    cooldown_hours: float = COOLDOWN_HOURS,
    tell: Callable[[int], object] = lambda _: None,
) -> tuple[Scored, dict[str, int]]:
    """(the model's answers at all moments, with its own rules of evidence and its own thresholds; how many are UNKNOWN,
    by reason).

    `past` must be what this pipeline reads: another pipeline may map codes otherwise.
    """
    probability, high = np.full(len(past.visit), np.nan), np.zeros(len(past.visit), dtype=bool)
    reasons: dict[str, int] = {}
    for part in parts_of(past.visit):
        found = pipeline.assess(past.observations, past.place[past.visit[part]], past.time[part])
        probability[part], high[part] = found.probability, found.level == "HIGH"
        for reason, text in UNKNOWN_REASONS.items():
            reasons[text] = reasons.get(text, 0) + int(np.count_nonzero(found.reason == reason))
        tell(part.stop)
    scored = Scored.of(past.stays, past.visit, past.time, probability, high, cooldown_hours)
    return scored, {text: n for text, n in reasons.items() if n}


def ward_scores_of(past: Past) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """(each comparator's score at all moments, NaN where it has no input; the share of the moments at which each of
    its inputs was missing)."""
    names = [f"clinical__{name}" for name in _score_and_parts()]
    plan = FeaturePlan(names)
    scores = {name: np.full(len(past.visit), np.nan) for name in COMPARATORS}
    missing = np.zeros(len(names))
    for part in parts_of(past.visit):
        found = plan.evaluate(past.observations, past.place[past.visit[part]], past.time[part])
        for name, values in scores.items():
            values[part] = found[:, names.index(f"clinical__{name}")]
        missing += np.isnan(found).sum(axis=0)
    share = dict(zip(names, (missing / max(len(past.visit), 1)).tolist(), strict=True))
    lacking = {
        name: {part: share[f"clinical__{name}_{part}"] for part in comparator.parts}
        for name, comparator in COMPARATORS.items()
    }
    return scores, lacking


def _score_and_parts() -> list[str]:
    return [text for name, c in COMPARATORS.items() for text in (name, *(f"{name}_{part}" for part in c.parts))]


def judged_of(scored: Scored, config: Config) -> Judged:
    """The judged moments, by the horizon that the model was trained for."""
    return judged_moments(scored, config.snapshots.horizon_hours, config.snapshots.after_onset)
