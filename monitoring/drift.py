"""Drift: are the features, scores and codes of a period distributed as in training?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm

from monitoring.findings import Findings

MODERATE, STRONG = 0.1, 0.25  # PSI


SIGNIFICANCE = 0.01  # over all that is looked at together


CODE_CHANGE = 0.1  # share of visits that have a code


FEWEST_VISITS = 30  # below, nothing is said about drift


def psi(expected: np.ndarray, actual: np.ndarray) -> float:
    """Population stability index of two lists of shares, the sum of (a - e) ln(a / e); none may be 0, see `smoothed`.

    >>> round(psi(np.array([0.5, 0.5]), np.array([0.6, 0.4])), 4)
    0.0405
    """
    return float(np.sum((actual - expected) * np.log(actual / expected)))


def smoothed(shares: np.ndarray, n: float) -> np.ndarray:
    """Shares of `n` visits as if half a visit more had come to each bin (Jeffreys): one that is empty by chance is no
    drift.

    >>> smoothed(np.array([0.0, 1.0]), 9).tolist()
    [0.05, 0.95]
    """
    return (shares * n + 0.5) / (n + 0.5 * len(shares))


def psi_limit(n: float, m: float, bins: int, tests: int, significance: float = SIGNIFICANCE) -> float:
    """The PSI that samples of `n` and `m` exceed by chance with probability `significance` in any of `tests`."""
    return float((1 / n + 1 / m) * chi2.ppf(1 - significance / tests, max(bins - 1, 1)))


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon distance to the base 2: 0 for equal shares, 1 for shares without overlap."""
    middle = (p + q) / 2

    def divergence(a: np.ndarray) -> float:
        some = a > 0
        return float(np.sum(a[some] * np.log2(a[some] / middle[some])))

    return float(np.sqrt(max((divergence(p) + divergence(q)) / 2, 0.0)))


def share_differs(p: float, q: float, n: float, m: float, tests: int) -> bool:
    """Do two shares of `n` and `m` visits differ by `CODE_CHANGE` or more, and beyond chance (z test)?"""
    pooled = (p * n + q * m) / (n + m)
    error = np.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / n + 1 / m))
    return abs(p - q) >= CODE_CHANGE and abs(p - q) / error > norm.ppf(1 - SIGNIFICANCE / tests / 2)


def look_for_drift(findings: Findings, reference: dict[str, Any], current: dict[str, Any]) -> None:
    """Compares two distributions; adds tables and alerts. `reference` has each feature's shares as a plain list."""
    n, m = reference["n_visits"], current["n_visits"]
    if min(n, m) < FEWEST_VISITS:
        findings.remarks.append(
            f"drift is not judged: {m} visits now, {n} in the reference; {FEWEST_VISITS} are needed"
        )
        return
    both = {name: (shares, current["features"][name]) for name, shares in reference["features"].items()}
    both = {"score": (reference["score"], current["score"]), **both}
    tests = len(both) + len(reference["codes"]) + 1
    rows = []
    for name, (expected, actual) in both.items():
        e, a = np.array(expected), np.array(actual)
        some = (e > 0) | (a > 0)
        index = psi(smoothed(e[some], n), smoothed(a[some], m))
        limit = psi_limit(n, m, int(some.sum()), tests)
        drifted = index > max(MODERATE, limit)
        rows.append(
            {
                "what": name,
                "psi": index,
                "psi_by_chance": limit,
                "jensen_shannon": jensen_shannon(e, a),
                "empty_before": e[-1],
                "empty_now": a[-1],
                "verdict": ("strong drift" if index > STRONG else "drift") if drifted else "",
            }
        )
        if drifted:
            what = "the score" if name == "score" else f"feature {name}"
            findings.alerts.append(f"drift of {what}: PSI {index:.3f}, by chance up to {limit:.3f}")
    findings.drift = pd.DataFrame(rows).sort_values("psi", ascending=False)
    rows = []
    for code, before in reference["codes"].items():
        now = current["codes"].get(code, 0.0)
        differs = share_differs(before, now, n, m, tests)
        rows.append(
            {"code": code, "visits_with_it_before": before, "now": now, "verdict": "changed" if differs else ""}
        )
        if differs:
            findings.alerts.append(f"code {code}: {now:.0%} of the visits have it, {before:.0%} before")
    findings.codes = pd.DataFrame(rows)
    before, now = reference["unknown"], current["unknown"]
    if share_differs(before, now, n, m, tests) and now > before:
        findings.alerts.append(f"{now:.0%} of the visits have codes that the model does not know, {before:.0%} before")
