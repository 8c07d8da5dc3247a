"""How scores, features and codes are distributed, in training and in service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from feature_pipeline import Config, Observations

WATCHED = 20  # features that go with the score the most; the latest value of every code is watched too
DURING, AT_END = "during the stay", "at the last observation"  # the two kinds of moments
MOST_SNAPSHOTS = 50_000  # of a reference
Texts = Sequence[str] | pa.StringArray


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

    def shares(self) -> Shares:
        """Nothing yet, to which snapshots are added."""
        return Shares(self)


class Shares:
    """Weighted counts of snapshots, which come in parts."""

    def __init__(self, profile: Profile):
        self._profile, self._total = profile, 0.0
        self._score = np.zeros(len(profile.score_edges) + 2)
        self._features = [np.zeros(n + 1) for n in profile.n_bins]
        self._codes, self._unknown = np.zeros(len(profile.codes)), 0.0

    def add(
        self,
        score: np.ndarray,
        bins: Texts,
        codes: Texts,
        unknown: Sequence[int] | np.ndarray,
        weights: np.ndarray,
    ) -> None:
        """Adds snapshots: their scores, the texts of `Profile.bins` and `Profile.present`, their weights."""
        profile = self._profile
        self._total += weights.sum()
        place = np.searchsorted(profile.score_edges, score, side="right")
        self._score += np.bincount(place, weights, len(self._score))
        letters = letters_of(bins, len(profile.features))
        for counts, column in zip(self._features, letters.T, strict=True):
            n = len(counts) - 1
            counts += np.bincount(np.where(column == ord("-"), n, column.astype(np.int64) - ord("a")), weights, n + 1)
        self._codes += weights @ (letters_of(codes, len(profile.codes)) == ord("1"))
        self._unknown += weights[np.asarray(unknown) > 0].sum()

    def distribution(self, n_visits: float) -> dict[str, Any]:
        """Weighted shares of scores and features by bin (the last share is that of empty ones), of snapshots with each
        code, and of snapshots with codes that the model does not use; ``n_visits`` is the `effective_size`."""

        def shares(counts: np.ndarray | float) -> Any:
            return np.round(counts / self._total, 6).tolist()

        profile = self._profile
        return {
            "n_visits": n_visits,
            "score": shares(self._score),
            "features": dict(zip(profile.features, map(shares, self._features), strict=True)),
            "codes": dict(zip(profile.codes, shares(self._codes), strict=True)),
            "unknown": shares(self._unknown),
        }


def effective_size(of_visit: np.ndarray) -> float:
    """Snapshots of one visit are alike, so that they count as fewer than they are: Kish's effective sample size of
    clusters (Kish, Survey Sampling, Wiley 1965) of the weights of visits, the number of visits where all have the same.

    >>> effective_size(np.array([30.0, 10.0]))
    1.6
    """
    return round(float(of_visit.sum() ** 2 / (of_visit**2).sum()), 1)


def letters_of(texts: Texts, width: int) -> np.ndarray:
    """(n, width) bytes of texts that all have `width` letters; of a slice of an Arrow array too."""
    if isinstance(texts, pa.Array):
        _, ends, letters = texts.buffers()
        start, end = np.frombuffer(ends, np.int32)[[texts.offset, texts.offset + len(texts)]].tolist()
        written = letters[start:end]
    else:
        written = "".join(texts).encode("ascii")
    return np.frombuffer(written, dtype=np.uint8).reshape(len(texts), width)


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
        shares, of_visit = own.shares(), np.unique(visit, return_counts=True)[1]
        shares.add(probability, own.bins(features.T), codes, unknown, np.ones(len(visit)))
        reference[moments] = shares.distribution(effective_size(of_visit))
    return reference
