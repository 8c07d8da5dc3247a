"""Calibration: are the probabilities right, by hours since admission and by month?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from common.metrics import brier_score, calibration_table
from evaluation.comparators import number
from evaluation.resampling import Clients, interval
from feature_pipeline import MICROSECONDS_PER_HOUR

HOURS_SINCE_ADMISSION = (0, 6, 12, 24, 48, 96, np.inf)
FEWEST_POSITIVE = 10  # visits with positive moments; below, a figure says nothing


def logistic_fit(x: np.ndarray, label: np.ndarray, slope: bool = True) -> tuple[float, float]:
    """(intercept, slope) of the log-odds of `label` on `x`, by Newton's method; without `slope` it is held at 1.

    NaN where all labels are the same, or the two kinds do not overlap.
    """
    if not 0 < label.sum() < len(label):
        return float("nan"), float("nan")
    rate = label.mean()
    weights = np.array([np.log(rate / (1 - rate)) - (0 if slope else x.mean()), 0.0 if slope else 1.0])
    free = 2 if slope else 1

    def loss(weights: np.ndarray) -> float:
        z = weights[0] + weights[1] * x
        return float(np.sum(np.logaddexp(0, z) - label * z))

    current = loss(weights)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(weights[0] + weights[1] * x, -500, 500)))
        design = np.vstack([np.ones(len(x)), x])[:free]
        hessian = (design * (p * (1 - p))) @ design.T
        if np.linalg.cond(hessian) > 1e14:
            return float("nan"), float("nan")
        step = np.zeros(2)
        step[:free] = np.linalg.solve(hessian, design @ (label - p))
        while (new := loss(weights + step)) > current and np.abs(step).max() > 1e-12:
            step = step / 2  # plain Newton may jump past the optimum and never come back
        weights, current = weights + step, min(new, current)
        if np.abs(step).max() < 1e-9:
            return float(weights[0]), float(weights[1])
    return float("nan"), float("nan")


def log_odds(probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.log(p / (1 - p))


def calibration(label: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    """Curve in tenths, slope and intercept of logistic recalibration (1 and 0 are perfect), calibration in the large
    (the intercept with slope 1), expected over observed, Brier score; of moments that have a probability.

    Slope and intercept: Cox, Biometrika 1958;45:562; in the large: Van Calster et al., BMC Med 2019;17:230,
    doi 10.1186/s12916-019-1466-7.
    """
    known = ~np.isnan(probability)
    label, probability = label[known], probability[known]
    if not len(label):
        return {"n_moments": 0, "slope": None, "intercept": None, "in_the_large": None, "expected_over_observed": None}
    x = log_odds(probability)
    intercept, slope = logistic_fit(x, label)
    observed = float(label.sum())
    return {
        "n_moments": len(label),
        "positive": int(observed),
        "slope": number(slope),
        "intercept": number(intercept),
        "in_the_large": number(logistic_fit(x, label, slope=False)[0]),
        "expected_over_observed": float(probability.sum() / observed) if observed else None,
        "brier": brier_score(label, probability),
        "curve": calibration_table(label, probability).to_dict("records"),
    }


def expected_over_observed_95(
    label: np.ndarray, probability: np.ndarray, client: np.ndarray, clients: Clients
) -> list[float] | None:
    known = ~np.isnan(probability)
    columns = [np.bincount(client[known], values[known], minlength=clients.n) for values in (probability, label)]
    drawn = clients.weights @ np.column_stack(columns).astype(np.float32)
    return interval(np.where(drawn[:, 1] > 0, drawn[:, 0] / np.maximum(drawn[:, 1], 1e-9), np.nan))


def by_hours(label: np.ndarray, probability: np.ndarray, hours: np.ndarray, visit: np.ndarray) -> list[dict[str, Any]]:
    """ROC AUC and expected over observed by hours since admission (the visit's first observation)."""
    rows = []
    for low, high in pairwise(HOURS_SINCE_ADMISSION):
        some = (hours >= low) & (hours < high)
        name = f"{low:g} to {high:g} h" if np.isfinite(high) else f"{low:g} h and later"
        rows.append({"hours": name, **stretch(label[some], probability[some], visit[some])})
    return rows


def by_month(label: np.ndarray, probability: np.ndarray, time: np.ndarray, visit: np.ndarray) -> list[dict[str, Any]]:
    """The same by calendar month of the moment."""
    month = time.astype("datetime64[us]").astype("datetime64[M]")
    rows = []
    for name in np.unique(month):
        some = month == name
        rows.append({"month": str(name), **stretch(label[some], probability[some], visit[some])})
    return rows


def stretch(label: np.ndarray, probability: np.ndarray, visit: np.ndarray) -> dict[str, Any]:
    known = ~np.isnan(probability)
    label, probability, visit = label[known], probability[known], visit[known]
    septic = len(np.unique(visit[label == 1]))
    out: dict[str, Any] = {
        "visits": len(np.unique(visit)),
        "positive_visits": septic,
        "moments": len(label),
        "roc_auc": None,
        "expected_over_observed": None,
    }
    if septic >= FEWEST_POSITIVE and label.sum() < len(label):
        out["roc_auc"] = float(roc_auc_score(label, probability))
        out["expected_over_observed"] = float(probability.sum() / label.sum())
    return out


def hours_since(start: np.ndarray, time: np.ndarray) -> np.ndarray:
    return (time - start) / MICROSECONDS_PER_HOUR
