"""Observations and labels to labelled snapshots, groups and splits.

With onset times a visit gives a snapshot every few hours; it is positive when onset is at most `horizon` hours away.
Without them a visit gives one snapshot at its end, and the figures are retrospective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.command_line import log
from common.labels import RETROSPECTIVE, read_labels
from feature_pipeline import (
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    BadObservations,
    Codes,
    Config,
    FeaturePlan,
    Observations,
    SnapshotSettings,
    read_observations,
)
from sources.demo_cohort import DEMO_NOTICE, make_demo_cohort

FEWEST_CLIENTS = 30  # fewer clients than this cannot be split into three parts that mean something
FEWEST_POSITIVE_CLIENTS = 6
DAY = 24 * MICROSECONDS_PER_HOUR
TRAIN, VALIDATION, TEST = 0, 1, 2
PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class TrainingData:
    """Labelled snapshots, ascending by visit and time; a split keeps a `group`, the client or the visit, whole."""

    observations: Observations
    settings: SnapshotSettings
    visit: np.ndarray  # (n_snapshots,) index into the observations' visits
    as_of: np.ndarray  # (n_snapshots,) microseconds since 1970
    label: np.ndarray  # (n_snapshots,) 0 or 1
    onset: np.ndarray  # (n_snapshots,) microseconds, NO_TIME for visits without sepsis or without a known onset
    group: np.ndarray  # (n_snapshots,) 0, 1, 2, ...
    grouped_by: str  # "client" or "visit"
    synthetic: bool
    remarks: dict[str, int] = field(default_factory=dict)  # what was left out, counted

    @property
    def n_visits(self) -> int:
        return len(np.unique(self.visit))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the observations in use, the snapshots and their labels."""
        digest = hashlib.sha256(repr((self.settings, self.observations.codes, self.grouped_by)).encode())
        for array in (
            *(getattr(self.observations, name) for name in ("group_visit", "group_code", "group_start", "time")),
            *(getattr(self.observations, name) for name in ("value", "low", "high")),
            *(self.visit, self.as_of, self.label, self.group),
        ):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def notices(self) -> list[str]:
        """What stands in the first lines of every report on these data."""
        lines = []
        if self.synthetic:
            lines.append(f"Data: {DEMO_NOTICE}.")
        if self.settings.retrospective:
            lines.append(RETROSPECTIVE)
        if self.grouped_by == "visit":
            lines.append(
                "Too few clients to keep each on one side of a split: visits are split, and figures may be flattered "
                "by clients that stand on both sides."
            )
        onset = dict(zip(self.visit.tolist(), self.onset.tolist(), strict=True))
        midnight = [time % DAY == 0 for time in onset.values() if time != NO_TIME]
        if len(midnight) >= FEWEST_POSITIVE_CLIENTS and np.mean(midnight) > 0.5:
            lines.append(
                f"{np.mean(midnight):.0%} of the onsets are at midnight, as of dates without a time of day: "
                "the hours before onset are then labelled wrongly. Give the times of the onsets."
            )
        return lines

    def describe(self) -> str:
        positive_visits = len(np.unique(self.visit[self.label == 1]))
        return (
            f"{len(self.observations.value):,} observations of {len(self.observations.codes)} codes, {self.n_visits:,} "
            f"visits ({positive_visits:,} positive), {len(self.label):,} snapshots ({self.label.mean():.2%} positive)"
        )

    def at(self, rows: np.ndarray) -> TrainingData:
        """Some of the snapshots."""
        some = {name: getattr(self, name)[rows] for name in ("visit", "as_of", "label", "onset", "group")}
        return replace(self, **some)

    def evaluate(self, names: list[str]) -> np.ndarray:
        """(n_snapshots, n_features) float64 with NaN where empty."""
        return FeaturePlan(names).evaluate(self.observations, self.visit, self.as_of)


def in_order_of_names(observations: Observations) -> Observations:
    """The same visits, sorted by client and visit_id."""
    keys = observations.keys()
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    groups = np.argsort(rank[observations.group_visit], kind="stable")
    length = np.diff(observations.group_start)[groups]
    start = np.cumsum(length) - length
    rows = np.arange(len(observations.value)) + np.repeat(observations.group_start[groups] - start, length)
    return replace(
        observations,
        **{name: getattr(observations, name)[order] for name in ("visit_id", "client", "visit_text", "client_text")},
        group_visit=rank[observations.group_visit[groups]],
        group_code=observations.group_code[groups],
        group_start=np.append(start, len(rows)),
        **{name: getattr(observations, name)[rows] for name in ("time", "value", "low", "high")},
    )


def hide_codes(observations: Observations, seed: int = 0, visits: float = 0.7, codes: float = 0.25) -> Observations:
    """The visits as another hospital might have measured them: in a share `visits` of them each code of the visit is
    hidden with probability `codes`, wholly. For training and validation that shall bear missing codes."""
    generator = np.random.default_rng([seed, 1])
    chosen = generator.random(observations.n_visits) < visits
    hidden = generator.random(len(observations.group_code)) < codes
    return observations.without(chosen[observations.group_visit] & hidden)


def load_training_data(
    observations: str | Path | pd.DataFrame | None = None,
    labels: str | Path | pd.DataFrame | None = None,
    settings: SnapshotSettings | None = None,
    codes: Codes | None = None,
    synthetic: bool = False,
) -> TrainingData:
    """Reads observations and labels, or makes the demo cohort where neither is named. Raises `BadObservations`.

    `codes` says what codes mean and how they are named. `synthetic` says that those named are not real patients', as
    the demo cohort's never are.
    """
    settings = settings or SnapshotSettings()
    if (observations is None) != (labels is None):
        raise BadObservations("observations and labels go together: name both, or neither for the demo cohort")
    if observations is None:
        synthetic = True
        observations, labels = make_demo_cohort()
    return make_training_data(
        read_observations(observations, codes).check_usable(), read_labels(labels), settings, synthetic=synthetic
    )


def make_training_data(
    observations: Observations, labels: pd.DataFrame, settings: SnapshotSettings, synthetic: bool = False
) -> TrainingData:
    """Joins observations with `labels` (as `read_labels` gives them) and makes the snapshots.

    The result does not depend on the order of rows: visits are put in the order of client and visit_id.
    """
    observations = in_order_of_names(observations)
    place = {key: i for i, key in enumerate(observations.keys())}
    keys = list(zip(labels["client"], labels["visit_id"], strict=True))
    remarks: dict[str, int] = {}

    def leave_out(reason: str, number: int) -> None:
        if number:
            remarks[reason] = remarks.get(reason, 0) + int(number)

    row_of_key = dict(zip(keys, range(len(keys)), strict=True))
    leave_out("labels that repeat a visit (the last one counts)", len(keys) - len(row_of_key))
    rows = np.array([row for key, row in row_of_key.items() if key in place], dtype=np.int64)
    leave_out("labels without observations", len(row_of_key) - len(rows))
    leave_out("visits without a label", observations.n_visits - len(rows))
    visit = np.array([place[keys[row]] for row in rows], dtype=np.int64)
    sepsis = labels["sepsis"].to_numpy()[rows]
    onset = labels["sepsis_onset"].to_numpy()[rows]
    bad_onset = labels["bad_onset"].to_numpy()[rows]
    retrospective = bool((onset == NO_TIME).all()) and not bad_onset.any()
    keep = sepsis >= 0
    leave_out("labels that are neither 0 nor 1", (~keep).sum())
    has_rows = observations.last_time[visit] != NO_TIME
    leave_out("labelled visits with nothing usable", (keep & ~has_rows).sum())
    keep &= has_rows
    if not retrospective:
        undated = keep & (sepsis == 1) & (onset == NO_TIME)
        leave_out("septic visits without an onset", (undated & ~bad_onset).sum())
        leave_out("septic visits whose onset is not a date", (undated & bad_onset).sum())
        keep &= ~undated
    order = np.argsort(visit[keep], kind="stable")
    visit, sepsis, onset = visit[keep][order], sepsis[keep][order], onset[keep][order]

    first, last = observations.first_time[visit], observations.last_time[visit]
    if retrospective:
        as_of, label, row = last, sepsis, np.arange(len(visit))
    else:
        row, as_of, label = _snapshots(first, last, np.where(sepsis == 1, onset, NO_TIME), settings)
        without = len(visit) - len(np.unique(row))
        leave_out("septic visits with onset before their first observation", without)
    if not 0 < label.sum() < len(label):
        raise BadObservations(
            f"{len(label)} labelled snapshots, {int(label.sum())} of them positive: both kinds are needed; "
            f"left out: {remarks or 'nothing'}"
        )
    visit, onset = visit[row], np.where(sepsis == 1, onset, NO_TIME)[row]
    group, grouped_by = _groups(observations, visit, label)
    return TrainingData(
        observations=observations,
        settings=replace(settings, retrospective=retrospective),
        visit=visit,
        as_of=as_of,
        label=label.astype(np.int8),
        onset=onset,
        group=group,
        grouped_by=grouped_by,
        synthetic=synthetic,
        remarks=remarks,
    )


def _snapshots(first, last, onset, settings):
    """(row of the visit, as_of, label) of the snapshots of visits; `onset` is NO_TIME for those without sepsis."""
    every = round(settings.every_hours * MICROSECONDS_PER_HOUR)
    horizon = round(settings.horizon_hours * MICROSECONDS_PER_HOUR)
    septic = onset != NO_TIME
    end = last if settings.after_onset else np.where(septic, np.minimum(last, onset), last)
    number = np.maximum((end - first) // every + 1, 0)
    row = np.repeat(np.arange(len(first)), number)
    step = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
    as_of = first[row] + step * every
    label = septic[row] & (as_of >= onset[row] - horizon * septic[row])
    return row, as_of, label.astype(np.int8)


def _groups(observations: Observations, visit: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, str]:
    client = pd.factorize(observations.client_text[visit])[0]
    n_clients = client.max() + 1
    if n_clients >= FEWEST_CLIENTS and len(np.unique(client[label == 1])) >= FEWEST_POSITIVE_CLIENTS:
        return client, "client"
    return pd.factorize(visit)[0], "visit"


def split_parts(data: TrainingData, test: float = 0.2, validation: float = 0.2, seed: int = 0) -> np.ndarray:
    """TRAIN, VALIDATION or TEST for each snapshot; a group stands in one part only.

    Groups with a positive snapshot and groups without are shuffled and dealt out apart, so that each part has its
    share of both.
    """
    part_of_group = np.full(data.group.max() + 1, TRAIN)
    for members in _shuffled_strata(data, np.arange(len(data.label)), seed):
        n_test, n_validation = round(len(members) * test), round(len(members) * validation)
        part_of_group[members[:n_test]] = TEST
        part_of_group[members[n_test : n_test + n_validation]] = VALIDATION
    return part_of_group[data.group]


def grouped_folds(
    data: TrainingData, rows: np.ndarray, n_folds: int = 5, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(training rows, held-out rows) of each fold of `rows`; a group is held out in one fold only."""
    fold_of_group = np.full(data.group.max() + 1, -1)
    for members in _shuffled_strata(data, rows, seed):
        fold_of_group[members] = np.arange(len(members)) % n_folds
    fold = fold_of_group[data.group[rows]]
    for k in range(n_folds):
        yield rows[fold != k], rows[fold == k]


def _shuffled_strata(data: TrainingData, rows: np.ndarray, seed: int) -> list[np.ndarray]:
    groups = np.unique(data.group[rows])
    positive = np.unique(data.group[rows][data.label[rows] == 1])
    generator = np.random.default_rng(seed)
    return [generator.permutation(positive), generator.permutation(np.setdiff1d(groups, positive))]


def training_clients(source: dict[str, Any]) -> set[str]:
    """The clients of data that a model was trained on. Raises `BadObservations` where their labels are gone."""
    demo = source["synthetic"] and not source["labels"]
    if not (demo or source["labels"]):
        raise BadObservations("its training data are not here")
    return set(read_labels(make_demo_cohort()[1] if demo else source["labels"])["client"])


def learned_clients(config: Config) -> set[str]:
    """The clients that a deployed model, or one that it was adapted from, was trained on, where the labels of the
    training are still there."""
    clients: set[str] = set()
    for source in (config.training_source, *config.adapted.get("trained_before", [])):
        try:
            clients |= training_clients(source)
        except BadObservations as error:
            log.warning("warning: not all patients that model %s has seen are known: %s", config.model_version, error)
    return clients
