"""A portable model: its features are named by concept (``heart_rate__last``), so that no code of the hospital that
trained it matters at another one. What that costs is measured in the search."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.metrics import compared
from feature_pipeline import CONCEPT, Codes, ScoreModel, listed
from training.candidates import ModelConfiguration
from training.fitting import cross_validate
from training.snapshots import TEST, TrainingData, load_training_data
from training.trials import Evaluation, prepare_search


def cost_of_portable(
    options: Any,
    feature_set: str,
    configuration: ModelConfiguration,
    evaluation: Evaluation,
) -> dict[str, dict[str, float]]:
    """The winner's cross-validated ROC AUC and average precision, ``old`` with features of each code of the hospital,
    ``new`` with features by concept; see `metrics.compared`.

    `options` are the `SearchOptions`, `evaluation` is that of the features by concept, on the same snapshots.
    """
    data = load_training_data(
        options.observations, options.labels, options.snapshots, Codes(options.synonyms), options.synthetic
    )
    search = prepare_search(data, options.seed, options.folds, [feature_set], options.synonyms)
    rows = np.flatnonzero(search.part != TEST)
    contender = configuration, search.columns(feature_set)
    [score], _ = cross_validate([contender], search.table, data, rows, options.folds, options.seed, options.jobs)
    by_code = ScoreModel([], evaluation.model.slope, evaluation.model.intercept).calibrate(score)
    figures = compared(data.label[rows], by_code, evaluation.out_of_fold, data.group[rows], 0.05, seed=options.seed)
    return {name: figures[name] for name in ("roc_auc", "average_precision")}


def describe_portable(data: TrainingData, cost: dict[str, dict[str, float]]) -> list[str]:
    """Lines of the report."""
    nameless = [code for code in data.observations.codes if code not in CONCEPT]
    lines = ["Portable: features are named by concept. Against features of each code, cross-validated (paired 95%):"]
    lines += [
        f"  {name.replace('_', ' '):<18s} {f['old']:.4f} -> {f['new']:.4f}  difference {f['difference']:+.4f} "
        f"({f['low']:+.4f} to {f['high']:+.4f})"
        for name, f in cost.items()
    ]
    if nameless:
        lines.append(f"No feature looks at codes whose concept is not known: {listed(nameless)}; see --synonyms.")
    return lines
