"""What the search tries: ten feature sets, eight model configurations; how one is fitted and judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from feature_pipeline import (
    DEFAULT_WINDOWS,
    block_features,
    parse_feature,
)

# name -> feature blocks; "windows:mean,count" takes these statistics of a block alone. `portable` leaves out what tells
# a hospital's habits of measuring rather than the patient's state.
FEATURE_SETS: dict[str, tuple[str, ...]] = {
    "latest": ("last",),
    "summary": ("last", "summary"),
    "summary_trend": ("last", "summary", "trend"),
    "reference": ("last", "summary", "reference"),
    "variability": ("last", "summary", "trend", "variability"),
    "windows": ("last", "windows", "context"),
    "clinical": ("last", "trend", "clinical", "context"),
    "portable": ("last", "trend", "reference", "variability", "deviation", "windows:min,max,mean", "clinical"),
    "patterns": ("last", "recency", "summary", "trend", "deviation", "windows:mean,count", "clinical", "context"),
    "full": (
        *("last", "summary", "trend", "recency", "reference", "variability", "deviation"),
        *("windows:mean,count", "clinical", "context"),
    ),
}


@dataclass(frozen=True)
class ModelConfiguration:
    """One of the models the search tries. `fill_value` replaces missing features; None leaves them to the model."""

    name: str
    kind: str  # lightgbm, logistic_regression, extra_trees, hist_gradient_boosting
    params: Mapping[str, Any] = field(default_factory=dict)
    fill_value: float | None = None
    # Further parameters of each member; the members' log-odds are averaged. With "hide_codes" a member also learns from
    # a copy of the visits with codes hidden.
    members: Sequence[Mapping[str, Any]] = ({},)


_LEAVES = {
    "min_data_in_leaf": 100,
    "min_sum_hessian_in_leaf": 1.0,  # no leaf may grow surer than its few positives allow
}
_REGULARISED = {
    "learning_rate": 0.04,
    "num_leaves": 24,
    **_LEAVES,
    "lambda_l2": 50.0,
    "feature_fraction": 0.12,
    "max_bin": 63,
    "num_iterations": 250,
}
# Splits at random thresholds, on a fresh sample with most of the positives and few of the others: noisier trees that
# average better, and quicker ones.
_RANDOMISED = {
    "extra_trees": True,
    "learning_rate": 0.1,
    "num_leaves": 24,
    **_LEAVES,
    "lambda_l2": 50.0,
    "feature_fraction": 0.1,
    "max_bin": 63,
    "pos_bagging_fraction": 0.6,
    "neg_bagging_fraction": 0.2,
    "bagging_freq": 10,
    "num_iterations": 200,
}
# Trees of three levels, many of them: each adds little, and little is learned by heart.
_SHALLOW = {
    **_RANDOMISED,
    "extra_trees": False,
    "learning_rate": 0.07,
    "num_leaves": 8,
    "max_depth": 3,
    "lambda_l2": 20.0,
    "num_iterations": 420,
}
_SHALLOW_RANDOMISED = {**_SHALLOW, "extra_trees": True, "learning_rate": 0.12, "num_iterations": 500}
MODEL_CONFIGURATIONS: tuple[ModelConfiguration, ...] = (
    ModelConfiguration("lightgbm_shallow", "lightgbm", _SHALLOW),
    ModelConfiguration("lightgbm_regularised", "lightgbm", _REGULARISED),
    ModelConfiguration("lightgbm_regularised_filled", "lightgbm", _REGULARISED, fill_value=0.0),
    ModelConfiguration("lightgbm_randomised", "lightgbm", _RANDOMISED),
    ModelConfiguration(
        "lightgbm_ensemble",
        "lightgbm",
        members=(_SHALLOW, {**_SHALLOW_RANDOMISED, "hide_codes": True}, _RANDOMISED),
    ),
    ModelConfiguration("logistic_regression", "logistic_regression", {"C": 0.002, "max_iter": 200}, fill_value=0.0),
    ModelConfiguration(
        "extra_trees",
        "extra_trees",
        {
            "n_estimators": 60,
            "min_samples_leaf": 10,
            "max_features": "sqrt",
            "bootstrap": True,
            "max_samples": 0.25,
        },
        fill_value=0.0,
    ),
    ModelConfiguration(
        "hist_gradient_boosting",
        "hist_gradient_boosting",
        {
            "learning_rate": 0.12,
            "max_iter": 45,
            "max_leaf_nodes": 15,
            "min_samples_leaf": 100,
            "l2_regularization": 20.0,
            "max_features": 0.1,
            "max_bins": 63,
        },
    ),
)
CONFIGURATION = {configuration.name: configuration for configuration in MODEL_CONFIGURATIONS}


def feature_set_names(
    feature_set: str,
    codes: Iterable[str],
    windows: Iterable[int] = DEFAULT_WINDOWS,
    synonyms: Mapping[str, str] | None = None,
) -> list[str]:
    """The feature names of a set on these codes, in the order of its blocks."""
    codes = list(codes)
    return [name for part in FEATURE_SETS[feature_set] for name in part_names(part, codes, windows, synonyms)]


def part_names(
    part: str,
    codes: Iterable[str],
    windows: Iterable[int] = DEFAULT_WINDOWS,
    synonyms: Mapping[str, str] | None = None,
) -> list[str]:
    """The feature names of one entry of a feature set: a block, or some statistics of it."""
    block, _, statistics = part.partition(":")
    names = block_features(block, codes, windows, synonyms)
    wanted = set(statistics.split(","))
    return [name for name in names if parse_feature(name).name in wanted] if statistics else names
