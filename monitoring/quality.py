"""Quality: how good were the scores, once outcomes are known?"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd

from common.labels import read_labels
from common.metrics import calibration_table, compared, figures
from common.pseudonyms import KEY_VARIABLE, Pseudonyms
from feature_pipeline import BadConfig, BadObservations, Config
from monitoring.findings import Findings

FEWEST_SEPTIC = 10  # septic visits; below, quality is not judged


def expected_quality(score: np.ndarray) -> dict[str, float]:
    """The ROC AUC and the share of positives that the scores imply if they are calibrated: each row counts as positive
    with its own probability."""
    p = np.sort(score[~np.isnan(score)])
    if len(p) < 2:
        return {"expected_roc_auc": float("nan"), "expected_share": float("nan")}
    negatives_below = np.cumsum(1 - p) - (1 - p) / 2
    return {
        "expected_roc_auc": float(np.sum(p * negatives_below) / (p.sum() * (1 - p).sum())),
        "expected_share": float(p.mean()),
    }


def quality_of(part: pd.DataFrame) -> dict[str, Any]:
    """Sizes and figures of predictions with ``label``. ``_from`` and ``_to`` are 95% intervals, resampled by visit."""
    label, score, visit = (part[name].to_numpy() for name in ("label", "score", "visit"))
    _, own = np.unique(visit, return_inverse=True)
    alert = part["risk_level"].eq("HIGH").to_numpy()
    sums = np.column_stack([np.bincount(own, x) for x in (alert, score, label)])
    sums = np.column_stack([np.ones(len(sums)), sums[:, 0] > 0, sums[:, 1:]])
    n, generator = len(sums), np.random.default_rng(0)
    drawn = np.array([sums.sum(axis=0), *(sums[generator.integers(0, n, n)].sum(axis=0) for _ in range(1000))])
    row = {"visits": n, "septic_visits": int((sums[:, 3] > 0).sum())}
    row |= {"predictions": len(part), "positives": int(label.sum())}

    def put(name: str, value: float, interval: Sequence[float]) -> None:
        row.update({name: value, f"{name}_from": interval[0], f"{name}_to": interval[1]})

    for name, values in {
        "visits_alerted": drawn[:, 1] / drawn[:, 0],
        "expected_over_observed": drawn[:, 2] / np.maximum(drawn[:, 3], 0.5),
    }.items():
        put(name, float(values[0]), np.percentile(values[1:], [2.5, 97.5]).tolist())
    if 0 < label.sum() < len(label):
        found = figures(label, score, visit, visit)
        put("roc_auc", found["roc_auc"], found["roc_auc_95"])
        put("average_precision", found["average_precision"], found["average_precision_95"])
        row["brier"] = found["brier"]
    return row


def with_outcomes(rows: pd.DataFrame, labels: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The scores of the log that have an outcome, with ``label``.

    A prediction is positive if onset is within the horizon after it. As in training, septic visits without an onset are
    left out, and so are predictions after onset, unless the model was trained with them.
    """
    snapshots = config.snapshots
    if not snapshots.retrospective:
        labels = labels[(labels["sepsis"] == 0) | labels["onset"].notna()]
    joined = rows[rows["score"].notna() & rows["as_of"].notna()].merge(labels, on="visit", how="inner")
    if snapshots.retrospective:
        return joined.assign(label=joined["sepsis"])
    ahead = (joined["onset"] - joined["as_of"]) / pd.Timedelta(hours=1)
    joined["label"] = ((joined["sepsis"] == 1) & (ahead <= snapshots.horizon_hours)).astype(int)
    return joined if snapshots.after_onset else joined[~((joined["sepsis"] == 1) & (ahead < 0))]


def look_at_quality(
    findings: Findings,
    rows: pd.DataFrame,
    labels: pd.DataFrame,
    config: Config,
    since: datetime | None = None,
) -> None:
    """Quality by week, where outcomes are known: rows of the log joined to `labels` (``visit, sepsis, onset``).

    The table has all weeks. Warnings are given for the weeks that end after `since`, and for all predictions since then
    together, so that a ward with few septic visits a week is judged too. What cannot be judged becomes a remark.
    """
    undated = (labels["sepsis"] == 1) & labels["onset"].isna()
    if undated.any() and not config.snapshots.retrospective:
        findings.remarks.append(f"{undated.sum():,} septic visits of the labels have no onset and are left out")
    joined = with_outcomes(rows, labels, config)
    if not len(joined):
        findings.remarks.append("no prediction of the log has an outcome in the labels; is the pseudonym key the same?")
        return
    since = since or datetime.min
    monday = joined["time"].dt.to_period("W-SUN").dt.start_time
    parts = [
        (f"{week:%Y-%m-%d}", f"in the week of {week:%Y-%m-%d}", week + timedelta(days=7) > since, part)
        for week, part in joined.groupby(monday)
    ]
    if sum(looked_at for _, _, looked_at, _ in parts) > 1:
        parts.append(("whole period", "in the whole period", True, joined[joined["time"] > since]))
    trained = config.metrics.get("out_of_fold") or config.metrics.get("test")
    table = []
    for week, when, looked_at, part in parts:
        row = {"week": week, **quality_of(part)}
        table.append(row)
        if not looked_at:
            continue
        if row["septic_visits"] < FEWEST_SEPTIC:
            findings.remarks.append(
                f"quality {when} is not judged: {row['septic_visits']} septic visits; {FEWEST_SEPTIC} are needed"
            )
        elif (
            trained
            and "roc_auc" in row
            and row["roc_auc_to"] < min(trained["roc_auc"] - 0.02, trained["roc_auc_95"][0])
        ):
            findings.warnings.append(
                f"quality {when}: ROC AUC {row['roc_auc']:.3f} ({row['roc_auc_from']:.3f} to {row['roc_auc_to']:.3f}), "
                f"{trained['roc_auc']:.3f} in training"
            )
        # if the scores are calibrated, at least as many visits are septic as the mean scores of the visits sum to
        promised = part.groupby("visit")["score"].mean().sum()
        low, high = row["expected_over_observed_from"], row["expected_over_observed_to"]
        if row["septic_visits"] + promised >= FEWEST_SEPTIC and (low > 2 or high < 0.5):
            findings.warnings.append(
                f"calibration {when}: {part['score'].sum():.0f} positives expected, {row['positives']} seen"
            )
    findings.quality = pd.DataFrame(table)
    findings.calibration = calibration_table(joined["label"].to_numpy(), joined["score"].to_numpy())


def look_at_challengers(
    findings: Findings, shown: pd.DataFrame, challengers: pd.DataFrame, labels: pd.DataFrame, config: Config
) -> None:
    """Each challenger in the shadow against the version that was shown, on the same visits at the same moments; rows of
    the log with outcomes as for `look_at_quality`."""
    both = ["visit", "as_of"]
    shown = with_outcomes(shown, labels, config).drop_duplicates(both, keep="last")
    for version, rows in challengers.groupby("model_version"):
        other = rows[rows["score"].notna()].drop_duplicates(both, keep="last")[[*both, "score"]]
        pairs = shown.merge(other, on=both, suffixes=("", "_other"))
        septic = pairs.loc[pairs["label"] == 1, "visit"].nunique()
        if septic < FEWEST_SEPTIC:
            findings.remarks.append(
                f"challenger {version} is not compared: {septic} septic visits that both scored; "
                f"{FEWEST_SEPTIC} are needed"
            )
            continue
        label, old, new, visit = (pairs[name].to_numpy() for name in ("label", "score", "score_other", "visit"))
        alert_rate = max(float(pairs["risk_level"].eq("HIGH").mean()), 1 / len(pairs))
        found = compared(label, old, new, visit, alert_rate)
        table = [{"figure": name.replace("_", " "), **figure} for name, figure in found.items()]
        title = f"Challenger {version} (new) against the model that was shown (old)"
        findings.challengers[f"{title}, {len(pairs):,} scores of {pairs['visit'].nunique():,} visits"] = pd.DataFrame(
            table
        )
        auc = found["roc_auc"]
        findings.remarks.append(
            f"challenger {version}: ROC AUC {auc['new']:.3f}, shown {auc['old']:.3f} (difference "
            f"{auc['difference']:+.3f}, 95% {auc['low']:+.3f} to {auc['high']:+.3f})"
        )


def read_outcomes(path: str) -> pd.DataFrame:
    """Labels as ``visit`` (pseudonym), ``sepsis``, ``onset``. Raises `BadObservations`, `BadConfig`."""
    pseudonyms = Pseudonyms.from_environment()
    if not pseudonyms.lasting:
        raise BadConfig(f"{KEY_VARIABLE} is not set: outcomes cannot be joined to the log, which holds pseudonyms")
    table = read_labels(path).drop_duplicates(["client", "visit_id"], keep="last")  # as in training
    table = table[table["sepsis"] >= 0]
    if not len(table):
        raise BadObservations(f"labels {path!r}: no row has an outcome; expected sepsis 0 or 1")
    visits = [pseudonyms.visit(c, v) for c, v in zip(table["client"], table["visit_id"], strict=True)]
    onset = pd.to_datetime(table["sepsis_onset"].where(table["sepsis_onset"] > 0), unit="us").astype("datetime64[us]")
    return pd.DataFrame({"visit": visits, "sepsis": table["sepsis"].to_numpy(), "onset": onset.to_numpy()})
