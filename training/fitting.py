"""How the candidates are fitted, judged and calibrated."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from common.command_line import log
from common.metrics import fit_platt, ranking_scores
from feature_pipeline import (
    BoostedTrees,
    Classifier,
    FeaturePipelineError,
    FeaturePlan,
    LinearModel,
    ScoreModel,
)
from training.candidates import ModelConfiguration
from training.snapshots import TrainingData, grouped_folds, hide_codes


def filled(features: np.ndarray, fill_value: float | None) -> np.ndarray:
    """A copy-free view where nothing is to be filled, else a copy with NaN replaced."""
    return features if fill_value is None else np.where(np.isnan(features), fill_value, features)


@dataclass(frozen=True)
class FeatureTable:
    """Every feature of every snapshot, NaN where empty, and the same with codes hidden in many visits.

    The arrays are (n_features, n_snapshots), row-major: joblib hands a column-major memory map to other processes in
    the wrong order.
    """

    plain: np.ndarray
    hidden: np.ndarray
    copied: np.ndarray  # (n_snapshots,) whose copy with codes hidden is learned from: all septic, a third of the others

    @classmethod
    def of(cls, data: TrainingData, names: Sequence[str], seed: int = 0, folder: str | Path | None = None):
        """Evaluates the features `names`; with a `folder` into files there that processes can share."""
        tables = []
        for name, observations in (("plain", data.observations), ("hidden", hide_codes(data.observations, seed))):
            shape = (len(names), len(data.label))
            if folder is None:
                table = np.empty(shape)
            else:
                table = np.lib.format.open_memmap(Path(folder) / f"{name}.npy", "w+", np.float64, shape)
            FeaturePlan(names).evaluate(observations, data.visit, data.as_of, out=table)
            tables.append(table)
        septic = np.isin(data.group, data.group[data.label == 1])
        return cls(*tables, copied=septic | (data.group % 3 == 0))

    def at(self, rows: np.ndarray) -> FeatureTable:
        """The table of some of the snapshots."""
        return FeatureTable(self.plain[:, rows], self.hidden[:, rows], self.copied[rows])

    def rows(self, rows: np.ndarray, columns: np.ndarray, hidden: bool = False) -> np.ndarray:
        """(n_rows, n_columns) of some snapshots and features."""
        return self._stack([(self.hidden if hidden else self.plain, rows)], columns)

    def with_copy(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features, their rows) of the snapshots `rows` as they are, then of those `copied`, with codes hidden."""
        again = rows[self.copied[rows]]
        features = self._stack([(self.plain, rows), (self.hidden, again)], columns)
        return features, np.concatenate([rows, again])

    @staticmethod
    def _stack(parts: Sequence[tuple[np.ndarray, np.ndarray]], columns: np.ndarray) -> np.ndarray:
        out = np.empty((len(columns), sum(len(rows) for _, rows in parts)))
        for i, column in enumerate(columns):
            start = 0
            for table, rows in parts:
                np.take(table[column], rows, out=out[i, start : start + len(rows)])
                start += len(rows)
        return out.T


_FIT = {}  # kind of model -> function(params, features, label, weight, seed) that gives one fitted member


def fits(kind: str):
    def declare(function):
        _FIT[kind] = function
        return function

    return declare


def fit_model(
    configuration: ModelConfiguration,
    table: FeatureTable,
    rows: np.ndarray,
    columns: np.ndarray,
    label: np.ndarray,
    seed: int = 0,
    weight: np.ndarray | None = None,
) -> ScoreModel:
    """Fits an uncalibrated model on the snapshots `rows`, on one core; `label` and `weight` (None: all count alike) are
    of all snapshots."""
    with threadpool_limits(1):  # scikit-learn's histogram boosting would take every core
        return _fit_members(configuration, table, rows, columns, label, seed, weight)


def _fit_members(configuration, table, rows, columns, label, seed, weight) -> ScoreModel:
    members = []
    for k, member in enumerate(configuration.members):
        params = {**configuration.params, **member}
        if params.pop("hide_codes", False):
            features, used = table.with_copy(rows, columns)
        else:
            features, used = table.rows(rows, columns), rows
        features = filled(features, configuration.fill_value)
        weights = None if weight is None else weight[used]
        params = scaled(params, int(label[used].sum()))
        members.append(_FIT[configuration.kind](params, features, label[used], weights, seed + 1000 * k))
        del features  # gigabytes: gone before the next member's are made
    return ScoreModel(members)


ENOUGH_POSITIVES = 400  # snapshots; the configurations were chosen on more
SMALLEST_LEAF = 5
# what keeps a leaf from being learned from too few: parameter -> the least that it is scaled down to
LEAF_PARAMETERS = {
    "min_data_in_leaf": SMALLEST_LEAF,
    "min_samples_leaf": SMALLEST_LEAF,
    "min_sum_hessian_in_leaf": 0.01,
    "lambda_l2": 1.0,
    "l2_regularization": 1.0,
}


def scaled(params: dict[str, Any], n_positive: int) -> dict[str, Any]:
    """The parameters for data with `n_positive` positive snapshots: leaf sizes, made for large data, would leave small
    data without a split."""
    share = min(1.0, n_positive / ENOUGH_POSITIVES)
    return {
        name: type(value)(max(value * share, LEAF_PARAMETERS[name])) if name in LEAF_PARAMETERS and share < 1 else value
        for name, value in params.items()
    }


@fits("lightgbm")
def _fit_lightgbm(params, features, label, weight, seed):
    import lightgbm

    settings = {
        "objective": "binary",
        "verbosity": -1,
        "num_threads": 1,
        "deterministic": True,
        "force_col_wise": True,
        "seed": seed,
        **params,
    }
    return BoostedTrees(lightgbm.train(settings, lightgbm.Dataset(features, label, weight=weight)))


@fits("logistic_regression")
def _fit_logistic_regression(params, features, label, weight, seed):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean = features.mean(axis=0)
    scale = features.std(axis=0)
    scale[scale < 1e-12] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is part of the regularisation
        model = LogisticRegression(random_state=seed, **params).fit(
            LinearModel.standardise(features, mean, scale), label, weight
        )
    return LinearModel(mean, scale, model.coef_[0].copy(), float(model.intercept_[0]))


@fits("extra_trees")
def _fit_extra_trees(params, features, label, weight, seed):
    from sklearn.ensemble import ExtraTreesClassifier

    # one thread sums the trees in one order
    return Classifier(ExtraTreesClassifier(random_state=seed, n_jobs=1, **params).fit(features, label, weight))


@fits("hist_gradient_boosting")
def _fit_hist_gradient_boosting(params, features, label, weight, seed):
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(random_state=seed, early_stopping=False, **params)
    never = np.isnan(features).all(axis=0)  # scikit-learn cannot bin a column without a number; it splits no constant
    return Classifier(model.fit(np.where(never, 0.0, features) if never.any() else features, label, weight))


def judge_candidate(
    configuration: ModelConfiguration,
    table: FeatureTable,
    columns: np.ndarray,
    label: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    seed: int = 0,
    hide: bool = True,
) -> dict[str, Any]:
    """Fits on the rows `train`, scores the rows `held_out`. A failure is a result too: ``{"error": ...}``.

    Gives ``roc_auc, average_precision, score``, with `hide` the ``hidden_score`` on the held-out visits with codes
    hidden, ``seconds`` and the held-out ``log_odds``.
    """
    start = time.perf_counter()
    try:
        model = fit_model(configuration, table, train, columns, label, seed)

        def score(hidden: bool) -> np.ndarray:
            return model.log_odds(filled(table.rows(held_out, columns, hidden), configuration.fill_value))

        log_odds = score(hidden=False)
        if not np.isfinite(log_odds).all():
            raise ValueError("the model gives scores that are not finite")
        scores = ranking_scores(label[held_out], log_odds)
        if hide:
            scores["hidden_score"] = ranking_scores(label[held_out], score(hidden=True))["score"]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": round(time.perf_counter() - start, 2)}
    return {**scores, "seconds": round(time.perf_counter() - start, 2), "log_odds": log_odds}


MOST_FOLDS, FEWEST_POSITIVE_IN_A_FOLD = 5, 3


def folds_for(data: TrainingData, rows: np.ndarray) -> int:
    """Number of folds of the snapshots `rows`: fewer where positive groups (clients) are few."""
    positive = len(np.unique(data.group[rows][data.label[rows] == 1]))
    return max(2, min(MOST_FOLDS, positive // FEWEST_POSITIVE_IN_A_FOLD))


def cross_validate(
    contenders: Sequence[tuple[ModelConfiguration, np.ndarray]],
    table: FeatureTable,
    data: TrainingData,
    rows: np.ndarray,
    n_folds: int | None = None,
    seed: int = 0,
    jobs: int = 1,
) -> list[np.ndarray | None]:
    """For each contender (a configuration with its columns) the out-of-fold log-odds of the snapshots `rows`.

    Groups (clients) are never on both sides; `n_folds` is by default `folds_for` the data. All folds of all contenders
    share the processes. A contender of which a fold fails gives None, and the log says why; raises
    `FeaturePipelineError` when all do.
    """
    folds = list(grouped_folds(data, rows, n_folds or folds_for(data, rows), seed))
    results = joblib.Parallel(n_jobs=jobs)(
        joblib.delayed(judge_candidate)(configuration, table, columns, data.label, train, held_out, seed, hide=False)
        for configuration, columns in contenders
        for train, held_out in folds
    )
    scores: list[np.ndarray | None] = []
    failures = []
    for k, (configuration, _) in enumerate(contenders):
        own = results[k * len(folds) : (k + 1) * len(folds)]
        if errors := [result["error"] for result in own if "error" in result]:
            failures.append(f"{configuration.name} failed in cross-validation: {errors[0]}")
            scores.append(None)
            continue
        out = np.full(len(data.label), np.nan)
        for (_, held_out), result in zip(folds, own, strict=True):
            out[held_out] = result["log_odds"]
        scores.append(out[rows])
    if len(failures) == len(contenders):
        raise FeaturePipelineError("; ".join(dict.fromkeys(failures)))
    for failure in failures:
        log.warning("%s", failure)
    return scores


def fit_calibrated(
    configuration: ModelConfiguration,
    table: FeatureTable,
    columns: np.ndarray,
    data: TrainingData,
    rows: np.ndarray,
    out_of_fold: np.ndarray,
    seed: int = 0,
) -> tuple[ScoreModel, np.ndarray]:
    """(model fitted on `rows`, calibrated on their out-of-fold log-odds; the calibrated probabilities of these)."""
    model = fit_model(configuration, table, rows, columns, data.label, seed)
    model.slope, model.intercept = fit_platt(out_of_fold, data.label[rows])
    return model, model.calibrate(out_of_fold)
