"""Drift: are the features, scores and codes of a period distributed as in training?

A drift test is a function of two distributions that returns a row for each thing that it compares: how far it moved,
whether that is large, and the probability of as much by chance. It is added to `DRIFT_TESTS`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon
from scipy.special import chdtrc, ndtr

from monitoring.findings import Findings

MODERATE = 0.1  # PSI
SIGNIFICANCE = 0.01  # over everything that is compared together
CODE_CHANGE = 0.1  # share of snapshots that have a code
FEWEST_VISITS = 30  # below, drift is not judged

Distribution = dict[str, Any]  # as `Profile.distribution` returns it


def psi(expected: np.ndarray, actual: np.ndarray) -> float:
    """Population stability index of two lists of shares, the sum of (a - e) ln(a / e). No share may be 0: `smoothed`.

    >>> round(psi(np.array([0.5, 0.5]), np.array([0.6, 0.4])), 4)
    0.0405
    """
    return float(np.sum((actual - expected) * np.log(actual / expected)))


def smoothed(shares: np.ndarray, n: float) -> np.ndarray:
    """Shares of `n` visits with half a visit more in each bin (Jeffreys): a bin that is empty by chance is no drift.

    >>> smoothed(np.array([0.0, 1.0]), 9).tolist()
    [0.05, 0.95]
    """
    return (shares * n + 0.5) / (n + 0.5 * len(shares))


def psi_by_chance(index: float, n: float, m: float, bins: int) -> float:
    """The probability that two samples of `n` and `m` visits from one distribution have a larger PSI.

    Without drift the PSI is about (1/n + 1/m) times a chi-square variable with (bins - 1) degrees of freedom
    (Yurdakul and Naranjo, J Risk Model Valid 2020;14(4):89).
    """
    return float(chdtrc(max(bins - 1, 1), index / (1 / n + 1 / m)))


def share_by_chance(p: float, q: float, n: float, m: float) -> float:
    """The probability that shares of `n` and `m` visits differ by more than `p` and `q` do (z test)."""
    pooled = (p * n + q * m) / (n + m)
    error = np.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / n + 1 / m))
    return float(2 * ndtr(-abs(p - q) / error))


def scores_and_features(before: Distribution, now: Distribution) -> pd.DataFrame:
    n, m, rows = before["n_visits"], now["n_visits"], []
    for name in ("score", *before["features"]):
        pair = [part["score"] if name == "score" else part["features"][name] for part in (before, now)]
        expected, actual = map(np.array, pair)
        some = (expected > 0) | (actual > 0)
        index = psi(smoothed(expected[some], n), smoothed(actual[some], m))
        row = {"what": "the score" if name == "score" else f"feature {name}", "psi": index}
        row |= {"jensen_shannon": float(jensenshannon(expected, actual, 2)), "large": index > MODERATE}
        row |= {"empty_before": expected[-1], "empty_now": actual[-1]}
        rows.append({**row, "by_chance": psi_by_chance(index, n, m, int(some.sum()))})
    return pd.DataFrame(rows).sort_values("psi", ascending=False)


def codes(before: Distribution, now: Distribution) -> pd.DataFrame:
    rows = []
    for code, p in before["codes"].items():
        q = now["codes"].get(code, 0.0)
        rows.append({"what": f"code {code}", "before": p, "now": q, "large": abs(p - q) >= CODE_CHANGE})
        rows[-1]["by_chance"] = share_by_chance(p, q, before["n_visits"], now["n_visits"])
    return pd.DataFrame(rows)


def unused_codes(before: Distribution, now: Distribution) -> pd.DataFrame:
    p, q = before["unknown"], now["unknown"]
    chance = share_by_chance(p, q, before["n_visits"], now["n_visits"])
    row = {"what": "codes that the model does not use", "before": p, "now": q, "large": q - p >= CODE_CHANGE}
    return pd.DataFrame([{**row, "by_chance": chance}])


DRIFT_TESTS: dict[str, Callable[[Distribution, Distribution], pd.DataFrame]] = {  # by the heading of the table
    "Drift of score and features": scores_and_features,
    "Share of snapshots with each code": codes,
    "Share of snapshots with unused codes": unused_codes,
}


def look_for_drift(findings: Findings, before: Distribution, now: Distribution, moments: str) -> None:
    """Compares two distributions of the same kind of `moments`; adds tables, and a warning for each change that is both
    large and statistically significant."""
    if min(before["n_visits"], now["n_visits"]) < FEWEST_VISITS:
        findings.remarks.append(
            f"drift {moments} is not judged: {now['n_visits']:.0f} visits now, {before['n_visits']:.0f} in the "
            f"reference; {FEWEST_VISITS} are needed"
        )
        return
    tables = {title: test(before, now) for title, test in DRIFT_TESTS.items()}
    limit = SIGNIFICANCE / sum(map(len, tables.values()))  # Bonferroni
    for title, table in tables.items():
        drifted = table.pop("large") & (table["by_chance"] < limit)
        for row in table[drifted].to_dict("records"):
            extent = f"PSI {row['psi']:.3f}" if "psi" in row else f"from {row['before']:.0%} to {row['now']:.0%}"
            findings.warnings.append(f"drift of {row['what']} {moments}: {extent}")
        findings.drift[f"{title}, {moments}"] = table.assign(verdict=np.where(drifted, "drift", ""))
