"""How scores, features and codes are distributed, in training and in service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from feature_pipeline import Config, Observations

WATCHED = 20  # features that go with the score the most; the latest value of every code is watched too
DURING, AT_END = "during the stay", "at the last observation"  # the two kinds of moments
MOST_SNAPSHOTS = 50_000  # of a reference


class Profile:
    """The features whose distribution is watched, with the edges of their bins, and the model's codes.

    They come from the config's ``reference_profile``, which training writes. Without one, predictions are logged
    without bins.
    """

    def __init__(self, config: Config):
        edges = config.reference_profile.get("edges", {})
        place = {name: i for i, name in enumerate(config.feature_names)}
        self.features = [name for name in edges if name in place]
        self.codes: list[str] = list(config.codes)
        self.n_bins = [len(edges[name]) + 1 for name in self.features]
        self.score_edges: list[float] = config.reference_profile.get("score_edges", [])
        self._columns = np.array([place[name] for name in self.features], dtype=np.int64)
        self._edges = np.full((len(self.features), max(self.n_bins, default=1) - 1), np.inf)
        for row, name in zip(self._edges, self.features, strict=True):
            row[: len(edges[name])] = edges[name]

    def bins(self, features: np.ndarray) -> list[str]:
        """For each row of `features` (n, n_features) a text: the letter of each watched feature's bin, - if empty."""
        if not self.features:
            return [""] * len(features)
        values = features[:, self._columns]
        letters = (values[:, :, None] >= self._edges).sum(axis=2).astype(np.uint8) + ord("a")
        letters[np.isnan(values)] = ord("-")
        return np.ascontiguousarray(letters).view(f"S{len(self.features)}").ravel().astype(str).tolist()

    def present(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> tuple[list[str], list[int]]:
        """For each snapshot which of the model's codes it has (a text of 0 and 1), and the number of observations of
        other codes."""
        place = {code: i for i, code in enumerate(self.codes)}
        column = np.array([place.get(code, -1) for code in observations.codes], dtype=np.int64)
        first_group = observations.visit_group_start[visit]
        n_groups = observations.visit_group_start[visit + 1] - first_group
        snapshot = np.repeat(np.arange(len(visit)), n_groups)
        group = np.arange(n_groups.sum()) + np.repeat(first_group - (np.cumsum(n_groups) - n_groups), n_groups)
        known = observations.time[observations.group_start[group]] <= as_of[snapshot]
        snapshot, group = snapshot[known], group[known]
        own = column[observations.group_code[group]]
        has = np.full((len(visit), max(len(self.codes), 1)), ord("0"), dtype=np.uint8)
        has[snapshot[own >= 0], own[own >= 0]] = ord("1")
        foreign = group[own < 0]
        length = observations.group_start[foreign + 1] - observations.group_start[foreign]
        unknown = np.bincount(snapshot[own < 0], weights=length, minlength=len(visit)).astype(int)
        return has.view(f"S{has.shape[1]}").ravel().astype(str).tolist(), unknown.tolist()

    def distribution(self, rows: Mapping[str, Sequence[Any]], weights: np.ndarray) -> dict[str, Any]:
        """Weighted shares of scores and features by bin (the last share is that of empty ones), of snapshots with each
        code, and of snapshots with codes that the model does not use.

        `rows` has ``visit``, ``score``, ``bins``, ``codes`` and ``unknown`` of at least one snapshot. Snapshots of one
        visit are alike, so that they count as fewer than they are: ``n_visits`` is Kish's effective sample size of
        clusters (Kish, Survey Sampling, Wiley 1965), the number of visits where all have the same weight.
        """

        def shares(place: np.ndarray, n: int) -> list[float]:
            return (np.bincount(place, weights=weights, minlength=n) / weights.sum()).round(6).tolist()

        letters = letters_of(rows["bins"], len(self.features))
        places = {
            name: np.where(column == ord("-"), n, column.astype(np.int64) - ord("a"))
            for name, column, n in zip(self.features, letters.T, self.n_bins, strict=True)
        }
        has = letters_of(rows["codes"], len(self.codes)) == ord("1")
        of_visit = np.bincount(np.unique(rows["visit"], return_inverse=True)[1], weights=weights)
        return {
            "n_visits": round(float(of_visit.sum() ** 2 / (of_visit**2).sum()), 1),
            "score": shares(np.searchsorted(self.score_edges, rows["score"], side="right"), len(self.score_edges) + 2),
            "features": {name: shares(places[name], n + 1) for name, n in zip(self.features, self.n_bins, strict=True)},
            "codes": {code: shares(column.astype(int), 2)[1] for code, column in zip(self.codes, has.T, strict=True)},
            "unknown": shares((np.asarray(rows["unknown"]) > 0).astype(int), 2)[1],
        }


def letters_of(texts: Sequence[str], width: int) -> np.ndarray:
    """(n, width) bytes of texts that all have `width` letters."""
    return np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).reshape(len(texts), width)


class Scored(NamedTuple):
    """Snapshots of one kind of moments, with scores by models that did not learn from their visits."""

    features: np.ndarray  # (n_features, n_snapshots), not filled
    probability: np.ndarray  # (n_snapshots,)
    visit: np.ndarray  # (n_snapshots,)
    as_of: np.ndarray  # (n_snapshots,)


def make_profile(config: Config, observations: Observations, during: Scored, at_end: Scored) -> dict[str, Any]:
    """The config's ``reference_profile``: how scores, features and codes are distributed in training.

    There is one distribution for each kind of moments: snapshots during the stay, and each visit at its last
    observation. Watched are the features that go with the score the most (by correlation), and every code's latest
    value. Bins are tenths of the snapshots during the stay.
    """
    if (fill := config.fill_value) is not None:
        for scored in (during, at_end):
            scored.features[np.isnan(scored.features)] = fill
    clipped = np.clip(during.probability, 1e-9, 1 - 1e-9)
    score = np.log(clipped / (1 - clipped))
    strength = []
    for row in during.features:
        known = ~np.isnan(row)
        x, y = row[known], score[known]
        varies = len(x) > 10 and x.std() > 1e-12 and y.std() > 1e-12
        strength.append(abs(np.corrcoef(x, y)[0, 1]) * known.mean() if varies else 0.0)
    strongest = [int(i) for i in np.argsort(-np.array(strength), kind="stable")[:WATCHED] if strength[i] > 0]
    names = config.feature_names
    latest = [i for i, name in enumerate(names) if name.endswith("__last") and strength[i] > 0]
    tenths = np.arange(0.1, 0.95, 0.1)

    def edges(values: np.ndarray) -> list[float]:
        values = values[~np.isnan(values)]
        # an edge at the smallest value would leave the first bin empty
        return [float(edge) for edge in np.unique(np.quantile(values, tenths)) if edge > values.min()]

    watched = {names[i]: edges(during.features[i]) for i in sorted({*strongest, *latest})}
    reference: dict[str, Any] = {"edges": watched, "score_edges": edges(during.probability)}
    own = Profile(replace(config, reference_profile=reference))
    for moments, (features, probability, visit, as_of) in ((DURING, during), (AT_END, at_end)):
        codes, unknown = own.present(observations, visit, as_of)
        rows = {"visit": visit, "score": probability, "bins": own.bins(features.T), "codes": codes, "unknown": unknown}
        reference[moments] = own.distribution(rows, np.ones(len(visit)))
    return reference
