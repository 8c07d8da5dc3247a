"""How good scores are: ranking, calibration, operating points, with intervals resampled by client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score


def ranking_scores(label: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """ROC AUC, average precision, and their sum, by which candidates are ranked."""
    auc = float(roc_auc_score(label, score))
    precision = float(average_precision_score(label, score))
    return {"roc_auc": auc, "average_precision": precision, "score": auc + precision}


def resampled_scores(
    label: np.ndarray, score: np.ndarray, group: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """(n_resamples, 2) ROC AUC and average precision, whole groups (clients) resampled; NaN where a resample lacks one
    of the labels. The same groups and seed give the same resamples: differences of two scores are paired.

    Every resample weights the rows sorted once, instead of sorting anew; what it adds up are equal scores with a
    positive row.
    """
    _, group = np.unique(group, return_inverse=True)
    order = np.argsort(-score, kind="stable")
    own, score = group[order], score[order]
    positive = np.flatnonzero(label[order])
    tie = np.unique(np.searchsorted(-score, -score[positive]))  # where the equal scores begin
    end_of_tie = np.searchsorted(-score, -score[tie], side="right")
    last_positive = np.searchsorted(positive, end_of_tie)
    generator = np.random.default_rng(seed)
    n_groups = group.max() + 1
    scores = np.full((n_resamples, 2), np.nan)
    for k in range(n_resamples):
        weight = np.bincount(generator.integers(0, n_groups, n_groups), minlength=n_groups)[own]
        total = np.append(0, np.cumsum(weight))
        true = np.append(0, np.cumsum(weight[positive]))[last_positive]
        more, false = np.diff(true, prepend=0), total[end_of_tie] - true
        positives = true[-1] if len(true) else 0
        negatives = total[-1] - positives
        if positives == 0 or negatives == 0:
            continue
        false_before = total[tie] - (true - more)
        auc = np.sum(more * (2 * negatives - false - false_before)) / (2 * positives * negatives)
        precision = np.sum(more * true / np.maximum(total[end_of_tie], 1)) / positives
        scores[k] = auc, precision
    return scores


def bootstrap_intervals(
    label: np.ndarray, score: np.ndarray, group: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of ROC AUC and average precision, see `resampled_scores`."""
    scores = resampled_scores(label, score, group, n_resamples, seed)
    scores = scores[~np.isnan(scores[:, 0])]
    if not len(scores):
        return {"roc_auc": (float("nan"),) * 2, "average_precision": (float("nan"),) * 2}
    low, high = np.percentile(scores, [2.5, 97.5], axis=0)
    return {
        "roc_auc": (float(low[0]), float(high[0])),
        "average_precision": (float(low[1]), float(high[1])),
    }


def compared(
    label: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
    group: np.ndarray,
    alert_rate: float,
    n_resamples: int = 500,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Two models' probabilities of the same rows: ``old, new, difference, low, high`` of ROC AUC, average precision,
    Brier score, and of the sensitivity where each calls the share `alert_rate` of the rows.

    The 95% interval of the difference is paired: both are measured on the same resamples of whole groups (clients).
    """

    def measured(y: np.ndarray, p: np.ndarray) -> np.ndarray:
        scores, sensitivity = ranking_scores(y, p), sensitivity_at_alert_rate(y, p, alert_rate)
        return np.array([scores["roc_auc"], scores["average_precision"], brier_score(y, p), sensitivity])

    _, own = np.unique(group, return_inverse=True)
    rows_of = np.split(np.argsort(own, kind="stable"), np.cumsum(np.bincount(own))[:-1])
    generator, differences = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        rows = np.concatenate([rows_of[g] for g in generator.integers(0, len(rows_of), len(rows_of))])
        if 0 < label[rows].sum() < len(rows):
            differences.append(measured(label[rows], new[rows]) - measured(label[rows], old[rows]))
    low, high = np.percentile(np.array(differences), [2.5, 97.5], axis=0)
    before, after = measured(label, old), measured(label, new)
    names = ("roc_auc", "average_precision", "brier", "sensitivity")
    return {
        name: {"old": a, "new": b, "difference": b - a, "low": lower, "high": upper}
        for name, a, b, lower, upper in zip(
            names, before.tolist(), after.tolist(), low.tolist(), high.tolist(), strict=True
        )
    }


def sensitivity_at_alert_rate(label: np.ndarray, probability: np.ndarray, alert_rate: float) -> float:
    """Share of the positive rows among the share `alert_rate` of all rows with the highest probability. Of equal
    ones at its edge as many count as fit, each with the share that is positive."""
    called = alert_rate * len(label)
    edge = np.sort(probability)[::-1][max(int(np.ceil(called)), 1) - 1]
    above, equal = probability > edge, probability == edge
    taken = (called - above.sum()) / equal.sum()
    return float((label[above].sum() + taken * label[equal].sum()) / label.sum())


def brier_score(label: np.ndarray, probability: np.ndarray) -> float:
    """Mean squared difference of probability and outcome (Brier, Mon Weather Rev 1950;78:1)."""
    return float(np.mean((probability - label) ** 2))


def log_losses(label: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Of each row, natural logarithm."""
    return -np.log(np.clip(np.where(label == 1, probability, 1 - probability), 1e-15, None))


def fit_platt(log_odds: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) that make ``slope * log_odds + intercept`` calibrated log-odds.

    Maximum likelihood by Newton's method, with Platt's smoothed targets (Platt, Advances in Large Margin
    Classifiers, 1999); a slope that is not positive would turn the ranking round and is refused: (1, shift) then.
    """
    positives = label.sum()
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (len(label) - positives + 2))
    rate = target.mean()
    scale = np.abs(log_odds).max() or 1.0
    design = np.column_stack([log_odds / scale, np.ones(len(label))])
    weights = np.array([0.0, np.log(rate / (1 - rate))])

    def loss(weights: np.ndarray) -> float:
        z = design @ weights
        return float(np.sum(np.logaddexp(0, z) - target * z))

    current = loss(weights)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (p - target))
        while (new := loss(weights - step)) > current and np.abs(step).max() > 1e-12:
            step = step / 2  # plain Newton may jump past the minimum and never come back
        weights, current = weights - step, min(new, current)
        if np.abs(step).max() < 1e-10:
            break
    slope = weights[0] / scale
    if not (slope > 0 and np.isfinite(weights).all()):
        return 1.0, float(np.log(rate / (1 - rate)) - log_odds.mean())
    return float(slope), float(weights[1])


def calibration_table(label: np.ndarray, probability: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Snapshots in `bins` bands of equal size by probability: ``n, mean_probability, observed_rate``."""
    order = np.argsort(probability, kind="stable")
    rows = [
        {"n": len(part), "mean_probability": probability[part].mean(), "observed_rate": label[part].mean()}
        for part in np.array_split(order, bins)
        if len(part)
    ]
    return pd.DataFrame(rows)


def figures(
    label: np.ndarray, probability: np.ndarray, group: np.ndarray, visit: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """The figures of a report: ranking scores with intervals resampled by `group`, Brier score, sizes."""
    intervals = bootstrap_intervals(label, probability, group, seed=seed)
    return {
        **ranking_scores(label, probability),
        **{f"{name}_95": list(interval) for name, interval in intervals.items()},
        "brier": brier_score(label, probability),
        "positive_rate": float(label.mean()),
        "n_snapshots": len(label),
        "n_visits": len(np.unique(visit)),
        "n_positive_snapshots": int(label.sum()),
        "n_positive_visits": len(np.unique(visit[label == 1])),
    }


FEWEST_POSITIVE_VISITS = 20


def describe_size(scores: dict[str, Any]) -> str:
    """Visits and snapshots of `figures`, counted apart; a warning where positive visits are few."""
    positive = scores["n_positive_visits"]
    few = f": too few for firm figures (under {FEWEST_POSITIVE_VISITS})" if positive < FEWEST_POSITIVE_VISITS else ""
    return (
        f"{scores['n_visits']:,} visits, {positive:,} of them positive{few}; {scores['n_snapshots']:,} snapshots, "
        f"{scores['n_positive_snapshots']:,} of them positive"
    )


def describe_figures(scores: dict[str, Any]) -> dict[str, str]:
    """`figures` as texts for a person."""
    return {
        "ROC AUC": "{:.4f} ({:.4f} to {:.4f})".format(scores["roc_auc"], *scores["roc_auc_95"]),
        "average precision": "{:.4f} ({:.4f} to {:.4f}); share of positives {:.4f}".format(
            scores["average_precision"], *scores["average_precision_95"], scores["positive_rate"]
        ),
        "Brier score": f"{scores['brier']:.5f}",
        "size": describe_size(scores),
    }


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold means: rates over snapshots, and alerts over whole visits."""

    threshold: float
    sensitivity: float
    specificity: float
    ppv: float
    visits_alerted_per_100: float
    septic_visits_alerted: float


def operating_point(label: np.ndarray, probability: np.ndarray, visit: np.ndarray, threshold: float) -> OperatingPoint:
    """The operating point of calling every snapshot at or above `threshold`; NaN where nothing is called."""
    called = probability >= threshold
    true = int((called & (label == 1)).sum())
    _, own = np.unique(visit, return_inverse=True)
    alerted, septic = np.zeros(own.max() + 1, bool), np.zeros(own.max() + 1, bool)
    np.logical_or.at(alerted, own, called)
    np.logical_or.at(septic, own, label == 1)
    return OperatingPoint(
        threshold=float(threshold),
        sensitivity=true / max(int(label.sum()), 1),
        specificity=float(1 - called[label == 0].mean()),
        ppv=true / called.sum() if called.any() else float("nan"),
        visits_alerted_per_100=float(100 * alerted.mean()),
        septic_visits_alerted=float(alerted[septic].mean()),
    )


def threshold_for_sensitivity(label: np.ndarray, probability: np.ndarray, sensitivity: float) -> float:
    """The highest threshold at which at least `sensitivity` of the positive snapshots are called."""
    positive = np.sort(probability[label == 1])[::-1]
    called = int(np.ceil(sensitivity * len(positive) - 1e-9))  # 0.55 of 100 is 55, not 55.00000000000001
    return float(positive[max(called, 1) - 1])


SENSITIVITIES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def operating_points(label: np.ndarray, probability: np.ndarray, visit: np.ndarray) -> list[OperatingPoint]:
    """The operating points that reach the usual sensitivities."""
    thresholds = [threshold_for_sensitivity(label, probability, s) for s in SENSITIVITIES]
    return [operating_point(label, probability, visit, t) for t in thresholds]
