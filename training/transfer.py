"""A model of one hospital for the patients of another: the candidates, and the choice among them.

Every candidate is a weighted mean of the log-odds of parts: the parent itself, the parent with its leaf values refitted
on local patients, a model of local patients alone, and, if the parent's data are at hand, models of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.metrics import fit_platt, log_loss, resampled_scores
from feature_pipeline import BoostedTrees, ScoreModel
from training.candidates import ModelConfiguration
from training.fitting import FeatureTable, filled, fit_model
from training.snapshots import TrainingData, grouped_folds


@dataclass(frozen=True)
class Part:
    """A model that candidates are mixed from. `kind`: parent, refitted (`number`: the share of the old leaf values that
    is kept), local, both (`number`: the weight of a local snapshot; one of the parent's has 1)."""

    kind: str
    number: float = 0.0

    def __str__(self) -> str:
        told = {
            "parent": "the parent",
            "refitted": f"refitted, decay {self.number:g}",
            "local": "local alone",
            "both": f"trained on both, local weight {self.number:g}",
        }
        return told[self.kind]


PARENT, LOCAL = Part("parent"), Part("local")
DECAYS = (0.9, 0.7, 0.5)
LOCAL_SHARES = (0.3, 0.6)
LOCAL_WEIGHTS = (1.0, 4.0)


@dataclass(frozen=True)
class Candidate:
    name: str
    parts: tuple[tuple[Part, float], ...]  # with their weights, which add up to 1
    calibrated: bool = True  # on local patients

    def log_odds(self, of_part: dict[Part, np.ndarray]) -> np.ndarray:
        return np.sum([weight * of_part[part] for part, weight in self.parts], axis=0)


AS_IT_IS = Candidate("as it is", ((PARENT, 1.0),), calibrated=False)
RECALIBRATED = Candidate("recalibrated", ((PARENT, 1.0),))


def candidates(parent: ScoreModel, both: bool = False) -> list[Candidate]:
    """The candidates, the simplest first; `both` where the parent's data are at hand."""
    trees = all(isinstance(member, BoostedTrees) for member in parent.members)
    refitted = [Part("refitted", decay) for decay in DECAYS] if trees else []
    alone = [*refitted, LOCAL, *([Part("both", weight) for weight in LOCAL_WEIGHTS] if both else [])]
    mixed = [
        Candidate(f"{1 - share:g} ({base}) + {share:g} ({LOCAL})", ((base, 1 - share), (LOCAL, share)))
        for share in LOCAL_SHARES
        for base in (refitted or [PARENT])
    ]
    return [AS_IT_IS, RECALIBRATED, *(Candidate(str(part), ((part, 1.0),)) for part in alone), *mixed]


@dataclass(frozen=True)
class Source:
    """What parts are fitted from: the parent with its recipe, and local patients; `first` are the parent's own
    patients, with the same features, where they are at hand."""

    parent: ScoreModel
    configuration: ModelConfiguration
    data: TrainingData
    table: FeatureTable
    first: tuple[FeatureTable, np.ndarray] | None = None  # table, labels
    seed: int = 0

    @property
    def columns(self) -> np.ndarray:
        return np.arange(len(self.table.plain))

    def features(self, rows: np.ndarray) -> np.ndarray:
        return filled(self.table.rows(rows, self.columns), self.configuration.fill_value)

    def fit(self, part: Part, rows: np.ndarray) -> ScoreModel:
        """The part, fitted on the local snapshots `rows`; not calibrated."""
        if part.kind == "parent":
            return ScoreModel(self.parent.members, weights=self.parent.weights)
        if part.kind == "refitted":
            features, label = self.features(rows), self.data.label[rows]
            members = [refitted(member, features, label, part.number) for member in self.parent.members]
            return ScoreModel(members, weights=self.parent.weights)
        if part.kind == "local":
            return fit_model(self.configuration, self.table, rows, self.columns, self.data.label, self.seed)
        table, label = self.first
        n = len(label)
        rows, label = np.append(np.arange(n), n + rows), np.append(label, self.data.label)
        weight = np.where(np.arange(len(label)) < n, 1.0, part.number)
        return fit_model(self.configuration, self._of_both, rows, self.columns, label, self.seed, weight)

    def mixed(self, candidate: Candidate, rows: np.ndarray) -> ScoreModel:
        """The candidate, fitted on the local snapshots `rows`; not calibrated."""
        fitted = [(self.fit(part, rows), weight) for part, weight in candidate.parts]
        if len(fitted) == 1:
            return fitted[0][0]
        members = [member for model, _ in fitted for member in model.members]
        shares = [
            weight * share
            for model, weight in fitted
            for share in (model.weights or [1 / len(model.members)] * len(model.members))
        ]
        return ScoreModel(members, weights=shares)


def refitted(member: BoostedTrees, features: np.ndarray, label: np.ndarray, decay: float) -> BoostedTrees:
    """The same trees with leaf values ``decay * old + (1 - decay) * new``, the new ones learned from `label`."""
    return BoostedTrees(member.booster.refit(features, label, decay_rate=decay, num_threads=1).free_dataset())
