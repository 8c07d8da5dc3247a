"""95% intervals by resampling whole clients, of many figures at once.

A figure is a ratio of sums over visits, or follows from how many positive and negative moments lie in each band of a
score. Both add up over clients, so one matrix product gives all resamples, and every figure of a resample comes from
the same clients: differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

RESAMPLES = 500
BANDS = 200  # of a continuous score; the point estimates use the scores themselves


class Clients:
    """Resamples of clients: how often each client was drawn."""

    def __init__(self, client: np.ndarray, n_resamples: int = RESAMPLES, seed: int = 0):
        self.client = client
        self.n = int(client.max()) + 1
        generator = np.random.default_rng(seed)
        self.weights = np.empty((n_resamples, self.n), dtype=np.float32)
        for row in self.weights:
            row[:] = np.bincount(generator.integers(0, self.n, self.n), minlength=self.n)

    def sums(self, per_visit: Mapping[str, np.ndarray], some: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """(n_resamples,) of each column: its sum over the visits `some` (all if None) of each resample."""
        client = self.client if some is None else self.client[some]
        columns = np.column_stack(
            [np.bincount(client, v if some is None else v[some], minlength=self.n) for v in per_visit.values()]
        )
        return dict(zip(per_visit, (self.weights @ columns.astype(np.float32)).T.astype(np.float64), strict=True))

    def histograms(self, band: np.ndarray, n_bands: int, label: np.ndarray, client: np.ndarray):
        """(positives, negatives), each (1 + n_resamples, n_bands): the moments of each band, first of all clients."""
        out = []
        for wanted in (1, 0):
            some = label == wanted
            table = np.bincount(client[some] * n_bands + band[some], minlength=self.n * n_bands)
            table = table.reshape(self.n, n_bands).astype(np.float32)
            drawn = np.vstack([self.weights[i : i + 100] @ table for i in range(0, len(self.weights), 100)])
            out.append(np.vstack([table.sum(axis=0, dtype=np.float64), drawn]))
        return out

    def medians(self, values: np.ndarray) -> np.ndarray:
        """(1 + n_resamples,) the median of the visits that have a value (n_visits, NaN where none): of all visits, and
        of each resample; NaN where no visit has one."""
        rows = np.flatnonzero(~np.isnan(values))
        if not len(rows):
            return np.full(1 + len(self.weights), np.nan)
        rows = rows[np.argsort(values[rows], kind="stable")]
        weight = np.cumsum(self.weights[:, self.client[rows]], axis=1)
        place = np.argmax(weight >= weight[:, -1:] / 2, axis=1)
        return np.append(np.median(values[rows]), np.where(weight[:, -1] > 0, values[rows][place], np.nan))


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95% of the resamples that have a value; None where fewer than half have."""
    known = values[np.isfinite(values)]
    return np.percentile(known, [2.5, 97.5]).tolist() if len(known) and 2 * len(known) >= len(values) else None


def ratio_interval(
    values: np.ndarray, above: np.ndarray, below: np.ndarray, client: np.ndarray, factor: float, is_rate: bool
) -> list[float] | None:
    """The interval of the ratio ``factor * above / below`` of some visits, from its resamples `values`.

    All resamples of "none of 5" are none: where nothing, or all, was counted, the bounds are those of the exact
    interval of as many clients (Clopper and Pearson, Biometrika 1934;26:404), or for a rate over time of the Poisson.
    """
    counted, of = float(above.sum()), float(below.sum())
    if counted > 0 and (is_rate or counted < of):
        return interval(values)
    edge = 0.025 ** (1 / len(np.unique(client[below > 0]))) if of > 0 else 0.0
    if counted > 0:
        return [factor * edge, factor]
    return [0.0, factor * (-np.log(0.025) / of if is_rate else 1 - edge)] if of > 0 else None


def banded(score: np.ndarray, bands: int = BANDS) -> tuple[np.ndarray, np.ndarray]:
    """(band of each score, 0 for NaN, edges): each value its own band where there are few, else bands of equal size.

    Band `i` (from 1) starts at ``edges[i - 1]``.
    """
    known = score[~np.isnan(score)]
    edges = np.unique(known)
    if len(edges) > bands:
        edges = np.unique(np.quantile(known, np.linspace(0, 1, bands + 1)[:-1], method="lower"))
    band = np.searchsorted(edges, score, side="right")
    band[np.isnan(score)] = 0
    return band, edges


def ranking(positive: np.ndarray, negative: np.ndarray) -> dict[str, np.ndarray]:
    """ROC AUC and average precision of histograms (n, n_bands), bands ascending by score; NaN where one kind lacks."""
    true, false = np.cumsum(positive[:, ::-1], axis=1), np.cumsum(negative[:, ::-1], axis=1)
    p, n = true[:, -1], false[:, -1]
    below = np.concatenate([np.zeros((len(true), 1)), true[:, :-1]], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = np.sum(negative[:, ::-1] * (true + below), axis=1) / (2 * p * n)
        precision = np.sum(positive[:, ::-1] * true / np.maximum(true + false, 1e-9), axis=1) / p
    return {"roc_auc": auc, "average_precision": np.where((p > 0) & (n > 0), precision, np.nan)}


def called_at_rate(positive: np.ndarray, negative: np.ndarray, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sensitivity, PPV) where the share `rate` (n,) of the moments with the highest scores is called. Of the band at
    the edge as many moments count as fit, in its own mixture."""
    every = positive + negative
    called = np.cumsum(every[:, ::-1], axis=1)
    true = np.cumsum(positive[:, ::-1], axis=1)
    wanted = rate * called[:, -1]
    edge = np.argmax(called >= wanted[:, None] - 1e-9, axis=1)
    rows = np.arange(len(edge))
    before = called[rows, edge] - every[:, ::-1][rows, edge]
    share = (wanted - before) / np.maximum(every[:, ::-1][rows, edge], 1e-9)
    found = true[rows, edge] - (1 - share) * positive[:, ::-1][rows, edge]
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / true[:, -1], np.where(wanted > 0, found / wanted, np.nan)
