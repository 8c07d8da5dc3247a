"""Decision curves: what acting on a score is worth, at each exchange rate of missed and needless responses.

Net benefit at the threshold probability t is (true positives - false positives x t / (1 - t)) / n: a needless response
costs t / (1 - t) of what a timely one is worth (Vickers and Elkin, Med Decis Making 2006;26:565,
doi 10.1177/0272989X06295361). It is computed over moments. UNKNOWN means no response.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def net_benefit(true: float, false: float, n: float, threshold: float) -> float:
    """Net benefit for each moment.

    >>> round(net_benefit(true=30, false=70, n=1000, threshold=0.1), 5)  # 0.03 - 0.07 / 9
    0.02222
    """
    return (true - false * threshold / (1 - threshold)) / n


def thresholds_for(probability: np.ndarray, prevalence: float) -> np.ndarray:
    """Threshold probabilities from a tenth of the prevalence to where 1 of 1,000 moments lies above."""
    known = probability[~np.isnan(probability)]
    top = np.quantile(known, 0.999) if len(known) else 0.0
    low = max(prevalence / 10, 1e-4)
    return np.geomspace(low, min(max(top, 4 * low), 0.95), 40)


def decision_curve(
    label: np.ndarray,
    probability: np.ndarray,
    tests: Mapping[str, np.ndarray],
    thresholds: np.ndarray | None = None,
) -> dict[str, list[float]]:
    """Net benefit at each threshold: of the model, of acting always (`all`) and never (`none`), and of each of the
    yes-or-no `tests` (n,) bool, such as NEWS2 of 5 or more, whose answer does not depend on the threshold."""
    n, positives = len(label), float(label.sum())
    if thresholds is None:
        thresholds = thresholds_for(probability, positives / n)
    order = np.sort(probability[~np.isnan(probability)])
    positive = np.sort(probability[(label == 1) & ~np.isnan(probability)])
    true = len(positive) - np.searchsorted(positive, thresholds)
    called = len(order) - np.searchsorted(order, thresholds)
    out = {
        "threshold": thresholds.tolist(),
        "model": [
            net_benefit(t, c - t, n, at)
            for t, c, at in zip(true.tolist(), called.tolist(), thresholds.tolist(), strict=True)
        ],
        "all": [net_benefit(positives, n - positives, n, t) for t in thresholds.tolist()],
        "none": [0.0] * len(thresholds),
    }
    for name, positive_test in tests.items():
        hits, alarms = float(label[positive_test].sum()), float(positive_test.sum())
        out[name] = [net_benefit(hits, alarms - hits, n, t) for t in thresholds.tolist()]
    return out


def best_ranges(curve: Mapping[str, list[float]], tolerance: float = 1e-12) -> list[tuple[float, float]]:
    """The ranges of thresholds in which the model is worth more than everything else in the curve."""
    others = np.max([values for name, values in curve.items() if name not in ("threshold", "model")], axis=0)
    best = np.array(curve["model"]) > others + tolerance
    edges = np.flatnonzero(np.diff(np.concatenate([[False], best, [False]]).astype(int)))
    return [(curve["threshold"][a], curve["threshold"][b - 1]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
