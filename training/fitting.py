"""How the candidates are fitted, judged and calibrated."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
    Observations,
    ScoreModel,
)
from training.candidates import ModelConfiguration
from training.snapshots import TrainingData, grouped_folds, hide_codes


def in_processes(jobs: int, **how: Any) -> joblib.Parallel:
    """What runs calls of `joblib.delayed` in as many processes."""
    # loky renews a worker that has grown; nothing is lost by it
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    return joblib.Parallel(n_jobs=jobs, **how)


def filled(features: np.ndarray, fill_value: float | None) -> np.ndarray:
    """A copy-free view where nothing is to be filled, else a copy with NaN replaced."""
    return features if fill_value is None else np.where(np.isnan(features), fill_value, features)


@dataclass(frozen=True)
class FeatureTable:
    """Every feature of every snapshot, NaN where empty, and the same with codes hidden in many visits.

    The arrays are (n_features, n_snapshots), row-major: joblib hands a column-major memory map to other processes in
    the wrong order. `of` makes them as files, which processes share, in a folder of their own in the system's temporary
    one (`TMPDIR`); it goes with the table.
    """

    plain: np.ndarray
    hidden: np.ndarray | None  # where it is asked for
    copied: np.ndarray  # (n_snapshots,) whose copy with codes hidden is learned from: all septic, a third of the others

    @classmethod
    def of(cls, data: TrainingData, names: Sequence[str], seed: int = 0, hidden: bool = True) -> FeatureTable:
        """Evaluates the features `names`."""
        folder = Path(tempfile.mkdtemp(prefix="sepsis-features-"))

        def evaluated(name: str, observations: Observations) -> np.ndarray:
            shape = (len(names), len(data.label))
            table = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float64, shape)
            FeaturePlan(names).evaluate(observations, data.visit, data.as_of, out=table)
            return table

        septic = np.isin(data.group, data.group[data.label == 1])
        try:
            table = cls(
                evaluated("plain", data.observations),
                evaluated("hidden", hide_codes(data.observations, seed)) if hidden else None,
                copied=septic | (data.group % 3 == 0),
            )
        except BaseException:
            shutil.rmtree(folder)
            raise
        weakref.finalize(table, shutil.rmtree, folder, ignore_errors=True)
        return table

    def at(self, rows: np.ndarray) -> FeatureTable:
        """The table of some of the snapshots."""
        hidden = None if self.hidden is None else self.hidden[:, rows]
        return FeatureTable(self.plain[:, rows], hidden, self.copied[rows])

    def rows(
        self, rows: np.ndarray, columns: np.ndarray, hidden: bool = False, fill_value: float | None = None
    ) -> np.ndarray:
        """(n_rows, n_columns) of some snapshots and features; `fill_value` in place of NaN."""
        parts = (rows[:0], rows) if hidden else (rows, rows[:0])
        return self.stacked(*parts, columns, fill_value)

    def stacked(
        self, rows: np.ndarray, hidden_rows: np.ndarray, columns: np.ndarray, fill_value: float | None = None
    ) -> np.ndarray:
        """The features of `rows` as they are, then of `hidden_rows` with codes hidden."""
        out = np.empty((len(columns), len(rows) + len(hidden_rows)))
        for values, column in zip(out, columns, strict=True):
            np.take(self.plain[column], rows, out=values[: len(rows)])
            if len(hidden_rows):
                np.take(self.hidden[column], hidden_rows, out=values[len(rows) :])
            if fill_value is not None:
                values[np.isnan(values)] = fill_value
        return out.T


class Sample:
    """What members learn from: some snapshots and features, with `hide_codes` also copies with codes hidden."""

    def __init__(self, fits: Fits, hide_codes: bool, fill_value: float | None):
        again = fits.rows[fits.table.copied[fits.rows]] if hide_codes else fits.rows[:0]
        rows = np.append(fits.rows, again)
        # gigabytes: made when they are asked for, and not kept
        self.features = lambda: fits.table.stacked(fits.rows, again, fits.columns, fill_value)
        self.label = fits.label[rows]
        self.weight = None if fits.weight is None else fits.weight[rows]
        self._bins: dict[tuple[Any, ...], Any] = {}

    def bins(self, settings: dict[str, Any]) -> Any:
        """LightGBM's Dataset. `lightgbm.train` refuses one that was made with other settings of bins."""
        import lightgbm

        key = settings.get("max_bin"), settings.get("min_data_in_leaf")
        if key not in self._bins:
            made = lightgbm.Dataset(self.features(), self.label, weight=self.weight, params=settings)
            self._bins[key] = made.construct()
        return self._bins[key]


_FIT: dict[str, Any] = {}  # kind of model -> function(params, sample, seed) that gives one fitted member


def fits(kind: str):
    def declare(function):
        _FIT[kind] = function
        return function

    return declare


@dataclass
class Fits:
    """Fits uncalibrated models on the snapshots `rows`, each on one core; `label` and `weight` (None: all count alike)
    are of all snapshots. What models have in common is made once: LightGBM's bins, members that are alike."""

    table: FeatureTable
    rows: np.ndarray
    columns: np.ndarray
    label: np.ndarray
    seed: int = 0
    weight: np.ndarray | None = None
    _samples: dict[tuple[bool, float | None], Sample] = field(default_factory=dict, init=False)
    _members: dict[str, Any] = field(default_factory=dict, init=False)

    def model(self, configuration: ModelConfiguration) -> ScoreModel:
        with threadpool_limits(1):  # scikit-learn's histogram boosting would take every core
            return ScoreModel([self._member(configuration, k) for k in range(len(configuration.members))])

    def _member(self, configuration: ModelConfiguration, k: int) -> Any:
        params = {**configuration.params, **configuration.members[k]}
        of = params.pop("hide_codes", False), configuration.fill_value
        if of not in self._samples:
            self._samples[of] = Sample(self, *of)
        sample = self._samples[of]
        params, seed = scaled(params, int(sample.label.sum())), self.seed + 1000 * k
        key = repr((configuration.kind, sorted(params.items()), of, seed))
        if key not in self._members:
            self._members[key] = _FIT[configuration.kind](params, sample, seed)
        return self._members[key]


def fit_model(
    configuration: ModelConfiguration,
    table: FeatureTable,
    rows: np.ndarray,
    columns: np.ndarray,
    label: np.ndarray,
    seed: int = 0,
    weight: np.ndarray | None = None,
) -> ScoreModel:
    """One model of `Fits`. Raises `FeaturePipelineError` where it cannot be fitted."""
    try:
        return Fits(table, rows, columns, label, seed, weight).model(configuration)
    except Exception as error:
        raise FeaturePipelineError(f"{configuration.name} failed: {type(error).__name__}: {error}") from error


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
def _fit_lightgbm(params, sample, seed):
    import lightgbm

    settings = {
        "objective": "binary",
        "verbosity": -1,
        "num_threads": 1,
        "deterministic": True,
        "force_col_wise": True,
        "seed": seed,
        "data_random_seed": 0,  # the rows that bins are chosen by: the same for all members
        **params,
    }
    return BoostedTrees(lightgbm.train(settings, sample.bins(settings)))


@fits("logistic_regression")
def _fit_logistic_regression(params, sample, seed):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features = sample.features()
    mean, scale = np.empty((2, features.shape[1]))
    standard = np.empty(features.shape)  # row-major, as scikit-learn wants it; without copies of everything
    for start in range(0, len(mean), 64):
        some = slice(start, start + 64)
        mean[some], scale[some] = features[:, some].mean(axis=0), features[:, some].std(axis=0)
        scale[some][scale[some] < 1e-12] = 1.0
        standard[:, some] = LinearModel.standardise(features[:, some], mean[some], scale[some])
    del features
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is part of the regularisation
        model = LogisticRegression(random_state=seed, **params).fit(standard, sample.label, sample.weight)
    return LinearModel(mean, scale, model.coef_[0].copy(), float(model.intercept_[0]))


@fits("extra_trees")
def _fit_extra_trees(params, sample, seed):
    from sklearn.ensemble import ExtraTreesClassifier

    model = ExtraTreesClassifier(random_state=seed, n_jobs=1, **params)  # one thread sums the trees in one order
    return Classifier(model.fit(sample.features(), sample.label, sample.weight))


@fits("hist_gradient_boosting")
def _fit_hist_gradient_boosting(params, sample, seed):
    from sklearn.ensemble import HistGradientBoostingClassifier

    features = sample.features()
    features[:, np.isnan(features).all(axis=0)] = 0.0  # scikit-learn cannot bin a column without a number
    model = HistGradientBoostingClassifier(random_state=seed, early_stopping=False, **params)
    return Classifier(model.fit(features, sample.label, sample.weight))


def judge_candidates(
    configurations: Sequence[ModelConfiguration],
    table: FeatureTable,
    columns: np.ndarray,
    label: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    seed: int = 0,
    hide: bool = True,
) -> list[dict[str, Any]]:
    """Fits each on the rows `train`, scores the rows `held_out`. A failure is a result too: ``{"error": ...}``.

    Gives ``roc_auc, average_precision, score``, with `hide` the ``hidden_score`` on the held-out visits with codes
    hidden, ``seconds`` and the held-out ``log_odds``.
    """
    fits = Fits(table, train, columns, label, seed)
    features = lru_cache(2)(lambda hidden, fill_value: table.rows(held_out, columns, hidden, fill_value))

    def judged(configuration: ModelConfiguration) -> dict[str, Any]:
        model = fits.model(configuration)

        def score(hidden: bool) -> np.ndarray:
            return model.log_odds(features(hidden, configuration.fill_value))

        log_odds = score(hidden=False)
        if not np.isfinite(log_odds).all():
            raise ValueError("the model gives scores that are not finite")
        scores: dict[str, Any] = ranking_scores(label[held_out], log_odds)
        if hide:
            scores["hidden_score"] = ranking_scores(label[held_out], score(hidden=True))["score"]
        return {**scores, "log_odds": log_odds}

    results = []
    for configuration in configurations:
        start = time.perf_counter()
        try:
            result = judged(configuration)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        results.append({**result, "seconds": round(time.perf_counter() - start, 2)})
    return results


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
    also: Sequence[Any] = (),
) -> tuple[list[np.ndarray | None], list[Any]]:
    """(for each contender, a configuration with its columns, the out-of-fold log-odds of the snapshots `rows`; what the
    calls `also`, made by `joblib.delayed`, give).

    Groups (clients) are never on both sides; `n_folds` is by default `folds_for` the data. All folds of all contenders
    share the processes, and `also` comes first, as it may take longer. A contender of which a fold fails gives None,
    and the log says why; raises `FeaturePipelineError` when all do.
    """
    folds = list(grouped_folds(data, rows, n_folds or folds_for(data, rows), seed))
    judged = [
        joblib.delayed(judge_candidates)([configuration], table, columns, data.label, train, held_out, seed, hide=False)
        for configuration, columns in contenders
        for train, held_out in folds
    ]
    results = in_processes(jobs)([*also, *judged])
    others, results = results[: len(also)], [result for [result] in results[len(also) :]]
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
    return scores, others


def calibrated(model: ScoreModel, out_of_fold: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Calibrates the model on out-of-fold log-odds; gives their calibrated probabilities."""
    model.slope, model.intercept = fit_platt(out_of_fold, label)
    return model.calibrate(out_of_fold)
