"""Adapts a model of one hospital to the patients of another: the candidates, and the choice among them.

Every candidate is a weighted mean of the log-odds of parts: the parent itself, the parent with its leaf values refitted
on local patients, a model of local patients alone, and, if the parent's data are at hand, models of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import joblib
import numpy as np

from common.metrics import fit_platt, log_losses, ranking_scores
from feature_pipeline import BoostedTrees, ScoreModel
from training.candidates import ModelConfiguration
from training.fitting import FeatureTable, fit_model
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
DECAYS = (0.7, 0.5)  # 0.9 hardly moves, 0.3 forgets too much
LOCAL_SHARES = (0.3, 0.6)
LOCAL_WEIGHTS = (1.0, 4.0)
FOLDS = 5


@dataclass(frozen=True)
class Candidate:
    name: str
    parts: tuple[tuple[Part, float], ...]  # with their weights, which add up to 1
    calibrated: bool = True  # on local patients

    @property
    def new_trees(self) -> bool:
        """Is a part learned anew, and not only its leaf values?"""
        return any(part.kind in ("local", "both") for part, _ in self.parts)


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

    @cached_property
    def columns(self) -> np.ndarray:
        return np.arange(len(self.table.plain))

    @cached_property
    def of_both(self) -> tuple[FeatureTable, np.ndarray]:
        """(table, labels) of the parent's snapshots, then of the local ones."""
        table, label = self.first
        plain, hidden = (np.hstack([getattr(t, name) for t in (table, self.table)]) for name in ("plain", "hidden"))
        copied = np.append(table.copied, self.table.copied)
        return FeatureTable(plain, hidden, copied), np.append(label, self.data.label)

    def features(self, rows: np.ndarray) -> np.ndarray:
        return self.table.rows(rows, self.columns, fill_value=self.configuration.fill_value)

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
        table, label = self.of_both
        n = len(label) - len(self.data.label)
        weight = np.where(np.arange(len(label)) < n, 1.0, part.number)
        rows = np.append(np.arange(n), n + rows)
        return fit_model(self.configuration, table, rows, self.columns, label, self.seed, weight)

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

    def out_of_fold(self, parts: Iterable[Part], rows: np.ndarray, n_folds: int = FOLDS, jobs: int = 1) -> OutOfFold:
        """The log-odds of the local snapshots `rows` by each part, of models that did not learn from their group."""
        parts = list(parts)
        folds = list(grouped_folds(self.data, rows, n_folds, self.seed))
        found = joblib.Parallel(n_jobs=jobs)(
            joblib.delayed(self._of_held_out)(part, train, held_out) for part in parts for train, held_out in folds
        )
        fold, scores = np.full(len(self.data.label), -1), {}
        for k, (_, held_out) in enumerate(folds):
            fold[held_out] = k
        for i, part in enumerate(parts):
            score = np.full(len(self.data.label), np.nan)
            for (_, held_out), values in zip(folds, found[i * n_folds :], strict=False):
                score[held_out] = values
            scores[part] = score[rows]
        return OutOfFold(scores, self.data.label[rows], self.data.group[rows], fold[rows])

    def _of_held_out(self, part: Part, train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        return self.fit(part, train).log_odds(self.features(held_out))


def refitted(member: BoostedTrees, features: np.ndarray, label: np.ndarray, decay: float) -> BoostedTrees:
    """The same trees with leaf values ``decay * old + (1 - decay) * new``, the new ones learned from `label`."""
    return BoostedTrees(member.booster.refit(features, label, decay_rate=decay, num_threads=1).free_dataset())


@dataclass(frozen=True)
class OutOfFold:
    """Cross-validated log-odds of local snapshots, by part."""

    of_part: dict[Part, np.ndarray]
    label: np.ndarray
    group: np.ndarray
    fold: np.ndarray

    def log_odds(self, candidate: Candidate) -> np.ndarray:
        return np.sum([weight * self.of_part[part] for part, weight in candidate.parts], axis=0)

    def calibrated(self, log_odds: np.ndarray) -> np.ndarray:
        """Probabilities, calibrated on the other folds."""
        probability = np.empty(len(log_odds))
        for k in np.unique(self.fold):
            own = self.fold == k
            slope, intercept = fit_platt(log_odds[~own], self.label[~own])
            probability[own] = ScoreModel([], slope, intercept).calibrate(log_odds[own])
        return probability


NOISE = 1.64  # standard errors: beyond them, one candidate is better than another with 95% confidence


@dataclass(frozen=True)
class Trial:
    """A candidate in cross-validation."""

    candidate: Candidate
    roc_auc: float
    average_precision: float
    losses: np.ndarray  # log loss of each snapshot

    @property
    def log_loss(self) -> float:
        return float(self.losses.mean())


def choose(parent: ScoreModel, known: Sequence[Candidate], of: OutOfFold) -> tuple[Candidate, list[Trial]]:
    """The best candidate with the parent's trees, or the best of all if that is better beyond noise; and all trials.

    Candidates are judged by the log loss of their probabilities, calibrated on other local patients. It separates
    candidates with fewer patients than ROC AUC and average precision do.
    """
    trials = []
    for candidate in known:
        score = of.log_odds(candidate)
        probability = of.calibrated(score) if candidate.calibrated else parent.calibrate(score)
        ranked = ranking_scores(of.label, score)
        figures = ranked["roc_auc"], ranked["average_precision"]
        trials.append(Trial(candidate, *figures, log_losses(of.label, probability)))
    best = min(trials, key=lambda t: t.log_loss)
    simple = [trial for trial in trials if not trial.candidate.new_trees]
    if simple:
        best_simple = min(simple, key=lambda t: t.log_loss)
        gain = best_simple.losses - best.losses
        of_client = np.bincount(np.unique(of.group, return_inverse=True)[1], gain)
        if gain.sum() <= NOISE * of_client.std() * np.sqrt(len(of_client)):
            best = best_simple
    return best.candidate, trials


@dataclass(frozen=True)
class Fitted:
    """The choice, fitted on all local snapshots of its source, with their calibrated out-of-fold probabilities."""

    candidate: Candidate
    trials: list[Trial]
    model: ScoreModel
    probability: np.ndarray


def fit_best(source: Source, known: Sequence[Candidate], jobs: int = 1) -> Fitted:
    """Chooses among `known` by cross-validation on the local patients of `source`, fits and calibrates the choice."""
    rows = np.arange(len(source.data.label))
    parts = dict.fromkeys(part for candidate in known for part, _ in candidate.parts)
    out_of_fold = source.out_of_fold(parts, rows, jobs=jobs)
    candidate, trials = choose(source.parent, known, out_of_fold)
    model, log_odds = source.mixed(candidate, rows), out_of_fold.log_odds(candidate)
    if candidate.calibrated:
        model.slope, model.intercept = fit_platt(log_odds, out_of_fold.label)
    else:
        model.slope, model.intercept = source.parent.slope, source.parent.intercept
    return Fitted(candidate, trials, model, model.calibrate(log_odds))
