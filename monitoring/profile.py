"""How scores, features and codes were distributed in training, and how a prediction is told in its bins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from feature_pipeline import Config, Observations


class Profile:
    """The features whose distribution is watched, with the edges of their bins, and the model's codes.

    From the config's ``reference_profile``, which training writes; a config without one gives rows without bins.
    """

    def __init__(self, config: Config):
        features = config.reference_profile.get("features", {})
        place = {name: i for i, name in enumerate(config.feature_names)}
        self.features = [name for name in features if name in place]
        self.codes: list[str] = list(config.codes)
        self._columns = np.array([place[name] for name in self.features], dtype=np.int64)
        most = max((len(features[name]["edges"]) for name in self.features), default=0)
        self._edges = np.full((len(self.features), most), np.inf)
        for row, name in zip(self._edges, self.features, strict=True):
            row[: len(features[name]["edges"])] = features[name]["edges"]

    def bins(self, features: np.ndarray) -> list[str]:
        """One text a row of ``features`` (n, n_features): the letter of each watched feature's bin."""
        if not self.features:
            return [""] * len(features)
        values = features[:, self._columns]
        letters = (values[:, :, None] >= self._edges).sum(axis=2).astype(np.uint8) + ord("a")
        letters[np.isnan(values)] = ord("-")
        return np.ascontiguousarray(letters).view(f"S{len(self.features)}").ravel().astype(str).tolist()

    def present(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> tuple[list[str], list[int]]:
        """For each snapshot which of the model's codes it has (a text of 0 and 1), and how many observations of
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


WATCHED = 20


_SAMPLE = 50_000


def visit_weights(visit: np.ndarray) -> np.ndarray:
    """A weight for each row such that every visit counts once, however often it is scored."""
    _, own, count = np.unique(visit, return_inverse=True, return_counts=True)
    return 1 / count[own]


def bin_shares(letters: np.ndarray, n_bins: int, weights: np.ndarray) -> list[float]:
    """Weighted shares of the bins, that of the empty ones last. `letters` (n,) are bytes as `Profile.bins` has them."""
    place = np.where(letters == ord("-"), n_bins, letters.astype(np.int64) - ord("a"))
    shares = np.bincount(place, weights=weights, minlength=n_bins + 1) / weights.sum()
    return [round(float(share), 6) for share in shares]


def make_profile(
    config: Config,
    features: np.ndarray,
    probability: np.ndarray,
    observations: Observations,
    visit: np.ndarray,
    as_of: np.ndarray,
) -> dict[str, Any]:
    """The config's ``reference_profile``: how scores, features and codes are distributed in training.

    `features` (n_features, n_snapshots) are not filled yet, `probability` (n_snapshots,) out-of-fold. Watched are the
    features that go with the score the most (by correlation), and every code's latest value. Bins are tenths; every
    visit counts once.
    """
    some = np.unique(np.linspace(0, len(visit) - 1, min(len(visit), _SAMPLE)).astype(int))
    features = features[:, some]
    if (fill := config.fill_value) is not None:
        features[np.isnan(features)] = fill
    score = np.log(np.clip(probability[some], 1e-9, 1 - 1e-9) / (1 - np.clip(probability[some], 1e-9, 1 - 1e-9)))
    strength = []
    for row in features:
        known = ~np.isnan(row)
        x, y = row[known], score[known]
        varies = len(x) > 10 and x.std() > 1e-12 and y.std() > 1e-12
        strength.append(abs(np.corrcoef(x, y)[0, 1]) * known.mean() if varies else 0.0)
    strongest = [int(i) for i in np.argsort(-np.array(strength), kind="stable")[:WATCHED] if strength[i] > 0]
    names = config.feature_names
    latest = [i for i, name in enumerate(names) if name.endswith("__last") and strength[i] > 0]
    chosen = sorted({*strongest, *latest})
    tenths = np.arange(0.1, 0.95, 0.1)

    def edges(values: np.ndarray) -> list[float]:
        values = values[~np.isnan(values)]
        # an edge at the smallest value would leave the first bin empty
        return [float(edge) for edge in np.unique(np.quantile(values, tenths)) if edge > values.min()]

    watched = {names[i]: {"edges": edges(features[i])} for i in chosen}
    own = Profile(replace(config, reference_profile={"features": watched}))
    weights = visit_weights(visit[some])
    letters = letters_of(own.bins(features.T), len(watched))
    for name, column in zip(own.features, letters.T, strict=True):
        watched[name]["shares"] = bin_shares(column, len(watched[name]["edges"]) + 1, weights)
    score_edges = edges(probability[some])
    score_letters = np.searchsorted(score_edges, probability[some], side="right") + ord("a")
    present, unknown = own.present(observations, visit[some], as_of[some])
    has = letters_of(present, len(own.codes)) == ord("1")
    return {
        "n_visits": len(np.unique(visit[some])),
        "features": watched,
        "score": {"edges": score_edges, "shares": bin_shares(score_letters, len(score_edges) + 1, weights)},
        "codes": {
            code: round(float((column * weights).sum() / weights.sum()), 6)
            for code, column in zip(own.codes, has.T, strict=True)
        },
        "unknown": round(float(((np.array(unknown) > 0) * weights).sum() / weights.sum()), 6),
    }


def letters_of(texts: list[str], width: int) -> np.ndarray:
    """(n, width) bytes of texts that all have `width` letters."""
    return np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).reshape(len(texts), width)
