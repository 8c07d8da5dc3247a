"""The scores that a ward calculates today, against the model on the same visits and moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from common.alerts import WINDOWS, Scored, figures_of, lead_times, per_visit, quartiles, ratios, totals
from evaluation.resampling import Clients, banded, called_at_rate, interval, ranking, ratio_interval


@dataclass(frozen=True)
class Comparator:
    """A score of the block ``clinical``: its usual cut, and its parts."""

    title: str
    cut: float
    parts: tuple[str, ...]
    source: str  # of the cut


COMPARATORS = {
    "news2": Comparator(
        "NEWS2",
        5,
        (
            *("respiration", "oxygen_saturation", "oxygen", "blood_pressure"),
            *("pulse", "consciousness", "temperature"),
        ),
        "Royal College of Physicians, London 2017: 5 is the threshold for an urgent response",
    ),
    "qsofa": Comparator(
        "qSOFA",
        2,
        ("respiration", "blood_pressure", "mentation"),
        "Singer et al., JAMA 2016;315:801, doi 10.1001/jama.2016.0287",
    ),
    "sirs": Comparator(
        "SIRS",
        2,
        ("temperature", "heart_rate", "respiration", "wbc"),
        "Bone et al., Chest 1992;101:1644, doi 10.1378/chest.101.6.1644",
    ),
    "sofa": Comparator(
        "partial SOFA",
        2,
        ("respiration", "coagulation", "liver", "cardiovascular", "nervous", "renal"),
        "Singer et al., JAMA 2016;315:801, doi 10.1001/jama.2016.0287: a rise by 2, here from 0",
    ),
    "mews": Comparator(
        "MEWS",
        5,
        ("respiration", "pulse", "blood_pressure", "temperature", "consciousness"),
        "Subbe et al., QJM 2001;94:521, doi 10.1093/qjmed/94.10.521",
    ),
}

SHOWN = ("alerts_per_100_patient_days", "visits_alerted_per_100")


@dataclass(frozen=True)
class Ranked:
    """A score at the judged moments, as histograms of all clients and of each resample.

    UNKNOWN, and a score without inputs, ranks lowest: it gives no alert.
    """

    score: np.ndarray  # (n_judged,)
    label: np.ndarray
    positive: np.ndarray  # (1 + n_resamples, n_bands)
    negative: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, score: np.ndarray, label: np.ndarray, client: np.ndarray, clients: Clients) -> Ranked:
        band, edges = banded(score)
        positive, negative = clients.histograms(band, len(edges) + 1, label, client)
        return cls(score, label, positive, negative, edges)

    def figures(self) -> dict[str, Any]:
        """ROC AUC and average precision with their intervals; None where all moments are positive, or none is."""
        if not 0 < self.label.sum() < len(self.label):
            return {"roc_auc": None, "average_precision": None}
        score = np.nan_to_num(self.score, nan=-1.0)
        exact = {
            "roc_auc": float(roc_auc_score(self.label, score)),
            "average_precision": float(average_precision_score(self.label, score)),
        }
        drawn = ranking(self.positive[1:], self.negative[1:])
        return exact | {f"{name}_95": interval(values) for name, values in drawn.items()}

    def called_from(self, cut: float) -> np.ndarray:
        """(1 + n_resamples,) the share of the moments with a score of at least `cut`."""
        from_band = int(np.searchsorted(self.edges, cut)) + 1
        every = self.positive + self.negative
        return every[:, from_band:].sum(axis=1) / every.sum(axis=1)

    def at_rate(self, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return called_at_rate(self.positive, self.negative, rate)


def paired(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """`ours`, `theirs` and their difference; index 0 is the estimate, the others are resamples."""
    difference = ours - theirs
    return {
        "model": number(ours[0]),
        "comparator": number(theirs[0]),
        "difference": number(difference[0]),
        "difference_95": interval(difference[1:]),
    }


def number(value: Any) -> float | None:
    """A float that JSON can hold."""
    return float(value) if value is not None and np.isfinite(value) else None


def event_figures(
    scored: Scored, clients: Clients, windows: Sequence[float] = WINDOWS
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the figures of alerts with their intervals and lead times, the resamples of each figure; index 0 the estimate).

    Without onset times the figures that need them are left out.
    """
    visits = per_visit(scored, windows)
    sums, drawn = totals(visits), clients.sums(visits)
    out: dict[str, Any] = {"sums": sums}
    resamples = {}
    estimates = figures_of(sums, windows)
    for name, (above, below, factor) in ratios(windows).items():
        if not scored.stays.dated and (name.endswith("h") or name.startswith("late")):
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.where(drawn[below] > 0, factor * drawn[above] / drawn[below], np.nan)
        resamples[name] = np.append(estimates[name], values)
        out[name] = number(estimates[name])
        out[f"{name}_95"] = None
        if out[name] is not None:
            columns = (visits[above], visits[below], clients.client)
            out[f"{name}_95"] = ratio_interval(values, *columns, factor, is_rate=below == "days")
    if scored.stays.dated:
        for w in windows:
            lead = lead_times(scored, w)
            out[f"lead_hours_{w:g}h"] = quartiles(lead)
            resamples[f"lead_hours_{w:g}h"] = clients.medians(lead)
    return out, resamples


def compare_events(
    ours: Scored, theirs: Scored, clients: Clients, windows: Sequence[float] = WINDOWS
) -> dict[str, Any]:
    """Two ways to alert on the same visits, each with its own levels: figures of both and paired differences."""
    a, drawn_a = event_figures(ours, clients, windows)
    b, drawn_b = event_figures(theirs, clients, windows)
    differences = {name: paired(drawn_a[name], drawn_b[name]) for name in drawn_a}
    return {"model": a, "comparator": b, "differences": differences}


def compare_with_ward_score(
    name: str,
    scored: Scored,
    score: np.ndarray,
    ours: Ranked,
    theirs: Ranked,
    clients: Clients,
    windows: Sequence[float] = WINDOWS,
) -> dict[str, Any]:
    """The model against one ward score: ranking; moments called at the score's usual cut, and by the model at the same
    share of the moments; alerts at the cut, and by the model at a threshold that gives no more alerts."""
    comparator = COMPARATORS[name]
    rate = theirs.called_from(comparator.cut)
    our_ranking, their_ranking = (ranking(r.positive, r.negative) for r in (ours, theirs))
    exact = {"model": ours.figures(), "comparator": theirs.figures()}
    out: dict[str, Any] = {
        "title": comparator.title,
        "cut": comparator.cut,
        "source": comparator.source,
        "without_input": float(np.isnan(score).mean()) if len(score) else None,
        "called_share": number(rate[0]),
        "ranking": exact,
        "differences": {key: paired(our_ranking[key], their_ranking[key]) for key in our_ranking},
    }
    for key, found in zip(
        ("sensitivity", "ppv"), zip(ours.at_rate(rate), theirs.at_rate(rate), strict=True), strict=True
    ):
        out["differences"][f"moment_{key}"] = paired(*found)
    at_cut = scored.with_high(score >= comparator.cut, score)
    threshold = scored.threshold_for(len(at_cut.alerts))
    out["equal_alerts"] = {
        "threshold": number(threshold),
        **compare_events(scored.at_threshold(threshold), at_cut, clients, windows),
    }
    return out
