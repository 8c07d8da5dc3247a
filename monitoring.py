"""Watches a deployed model through the log of its predictions: drift, missing codes, volume, latency, errors, quality.

``report`` writes a page, ``check`` prints a line for each alert and ends with status 1 if there is any (for cron),
``export`` gives the log's rows, ``prune`` deletes old ones.

Drift compares the last days with the reference profile that training wrote into the config, or with the log's own first
days (--baseline-days), which is the better reference where visits are scored at other moments than in training. Every
visit counts once, however often it was scored. The population stability index (PSI) has the usual limits 0.1 and 0.25,
but without any drift it is about (1/n + 1/m) times a chi-square variable with (bins - 1) degrees of freedom, n and m
being the numbers of visits (Yurdakul and Naranjo, J Risk Model Valid 2020;14(4):89): an alert needs both the size and
the significance, at 1% over all features together. No drift library was taken: those that are kept up bring a data
platform with them, for what are forty lines here.

Drift is that of the deployed version; volume, latency and errors are those of all versions together, since a promotion
changes neither how many visits there are nor how they come.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import sqlalchemy as sa
from scipy.stats import chi2, norm

from artifacts import write_atomic, write_tables
from command_line import DONE, SOME_FAILED, add_log_options, log, make_parser, number, post_json, run, table_path
from feature_pipeline import DEFAULT_CONFIG, BadConfig, BadObservations, load_config, training_source
from metrics import calibration_table, figures
from pages import frame_table, heading, image, listing, page, paragraph
from prediction_log import (
    DEFAULT_URL,
    OFF,
    URL_VARIABLE,
    Profile,
    bin_shares,
    errors,
    letters_of,
    open_engine,
    predictions,
    url_of,
    visit_weights,
)
from pseudonyms import KEY_VARIABLE, Pseudonyms

MODERATE, STRONG = 0.1, 0.25  # PSI
SIGNIFICANCE = 0.01  # over all that is looked at together
CODE_CHANGE = 0.1  # share of visits that have a code
FEWEST_VISITS = 30  # below, nothing is said about drift
FEWEST_SEPTIC = 10  # septic visits; below, nothing is said about quality
FEWEST_FAILED = 5  # unusable or failed predictions; below, nothing is said about them
FEWEST_PERIODS, MOST_PERIODS = 2, 4  # of history, with which the volume is compared
MOST_DAYS = 36_500


# ------------------------------------------------------------------------------------------------ statistics


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


# ---------------------------------------------------------------------------------------------------- the log


@dataclass(frozen=True)
class Rows:
    """Predictions of one model version in a period."""

    frame: pd.DataFrame  # as the table `predictions`
    profile: Profile

    @property
    def usable(self) -> np.ndarray:
        """(n,) whether a row has a score, and the bins of this profile."""
        bins = self.frame["bins"].str.len().eq(len(self.profile.features))
        return (self.frame["score"].notna() & bins).to_numpy()

    def distribution(self, config_profile: dict[str, Any]) -> dict[str, Any]:
        """In the form of the config's ``reference_profile``: shares of the bins, every visit counting once. At least
        one row must be `usable`."""
        frame = self.frame[self.usable]
        weights = visit_weights(frame["visit"].to_numpy())
        out: dict[str, Any] = {"n_visits": frame["visit"].nunique(), "features": {}, "codes": {}}
        letters = letters_of(frame["bins"].tolist(), len(self.profile.features))
        for name, column in zip(self.profile.features, letters.T, strict=True):
            n_bins = len(config_profile["features"][name]["edges"]) + 1
            out["features"][name] = bin_shares(column, n_bins, weights)
        edges = config_profile["score"]["edges"]
        scores = np.searchsorted(edges, frame["score"].to_numpy(), side="right") + ord("a")
        out["score"] = bin_shares(scores, len(edges) + 1, weights)
        has = letters_of(frame["codes"].tolist(), len(self.profile.codes)) == ord("1")
        for code, column in zip(self.profile.codes, has.T, strict=True):
            out["codes"][code] = float((column * weights).sum() / weights.sum())
        out["unknown"] = float(((frame["unknown"].to_numpy() > 0) * weights).sum() / weights.sum())
        return out


def read_rows(engine: sa.Engine, since: datetime | None, until: datetime, version: str | None = None) -> pd.DataFrame:
    """The log's predictions with ``since < time <= until``, of one model version or of all."""
    query = sa.select(predictions).where(predictions.c.time <= until).order_by(predictions.c.id)
    if since is not None:
        query = query.where(predictions.c.time > since)
    if version is not None:
        query = query.where(predictions.c.model_version == version)
    with engine.connect() as connection:
        return pd.read_sql(query, connection)


# ------------------------------------------------------------------------------------------------- findings


@dataclass
class Findings:
    """What a look at the log gave: tables for a person, and alerts, one line each."""

    alerts: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    drift: pd.DataFrame = field(default_factory=pd.DataFrame)
    codes: pd.DataFrame = field(default_factory=pd.DataFrame)
    service: dict[str, Any] = field(default_factory=dict)
    score: tuple[list[float], list[float], list[float]] | None = None  # edges, expected, actual shares
    quality: pd.DataFrame = field(default_factory=pd.DataFrame)
    calibration: pd.DataFrame = field(default_factory=pd.DataFrame)
    daily: pd.DataFrame = field(default_factory=pd.DataFrame)


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


def read_counts(engine: sa.Engine, since: datetime, until: datetime, days: int) -> tuple[int, list[tuple[int, int]]]:
    """What failed in ``since < time <= until``, and (predictions, visits) of each of the periods of `days` before,
    at most `MOST_PERIODS`, that the log covers wholly. All model versions."""
    failed = sa.select(sa.func.coalesce(sa.func.sum(errors.c.n), 0))
    counts = sa.select(sa.func.count(), sa.func.count(predictions.c.visit.distinct()))
    with engine.connect() as connection:
        n = connection.scalar(failed.where((errors.c.time > since) & (errors.c.time <= until)))
        first = connection.scalar(sa.select(sa.func.min(predictions.c.time)))
        covered = (since - first) // timedelta(days=days) if first else 0
        earlier = []
        for k in range(min(covered, MOST_PERIODS)):
            end = since - timedelta(days=k * days)
            period = (predictions.c.time > end - timedelta(days=days)) & (predictions.c.time <= end)
            earlier.append(tuple(connection.execute(counts.where(period)).one()))
    return int(n), earlier


def look_at_service(
    findings: Findings, rows: pd.DataFrame, failed: int, earlier: list[tuple[int, int]], days: int, most_seconds: float
) -> None:
    """Volume, latency, errors of all model versions; `failed` and `earlier` as `read_counts` gives them."""
    p95 = float(rows["seconds"].quantile(0.95)) if len(rows) else float("nan")
    rate = failed / max(len(rows) + failed, 1)

    def counted(name: str) -> str:
        return ", ".join(f"{n:,} {value}" for value, n in rows[name].value_counts().items())

    findings.service = {
        "predictions": f"{len(rows):,} of {rows['visit'].nunique():,} visits in {days} days",
        "empty scores": f"{rows['score'].isna().mean():.2%}" if len(rows) else "",
        "risk levels": counted("risk_level"),
        "sources": counted("source"),
        "model versions": counted("model_version"),
        "latency": f"median {rows['seconds'].median() * 1e3:.1f} ms, p95 {p95 * 1e3:.1f} ms" if len(rows) else "",
        "errors": f"{failed:,} ({rate:.2%})",
    }
    if not len(rows):
        findings.alerts.append(f"no prediction in {days} days")
    elif len(earlier) >= FEWEST_PERIODS:
        usual, visits = np.median(np.array(earlier), axis=0)
        # visits come by chance, each with several predictions
        by_chance = 5 * np.sqrt(usual * (usual / max(visits, 1)) * (1 + 1 / len(earlier)))
        if usual >= 20 and abs(len(rows) - usual) > max(0.5 * usual, by_chance):
            findings.alerts.append(f"volume: {len(rows):,} predictions, usually {usual:,.0f} in {days} days")
    if len(rows) >= FEWEST_FAILED and rows["score"].isna().all():
        findings.alerts.append(f"no usable score in {len(rows):,} predictions")
    if p95 > most_seconds:
        findings.alerts.append(f"latency: p95 is {p95:.2f} s, allowed {most_seconds:g} s")
    if failed >= FEWEST_FAILED and rate > 0.05:
        findings.alerts.append(f"errors: {rate:.1%} of what was asked could not be scored")
    if len(rows):
        by_day = rows.groupby(rows["time"].dt.floor("D").rename("day"))
        findings.daily = by_day["seconds"].agg(predictions="size", p95_seconds=lambda x: x.quantile(0.95)).reset_index()


def expected_quality(score: np.ndarray) -> dict[str, float]:
    """What ROC AUC and share of positives calibrated scores promise of themselves: each row counts as positive by its
    own probability. An estimate that holds only as long as the calibration does."""
    p = np.sort(score[~np.isnan(score)])
    if len(p) < 2:
        return {"expected_roc_auc": float("nan"), "expected_share": float("nan")}
    negatives_below = np.cumsum(1 - p) - (1 - p) / 2
    return {
        "expected_roc_auc": float(np.sum(p * negatives_below) / (p.sum() * (1 - p).sum())),
        "expected_share": float(p.mean()),
    }


def quality_of(part: pd.DataFrame, threshold: float) -> dict[str, Any]:
    """Sizes and figures of predictions with ``label``; ``_from`` and ``_to`` bound 95%, whole visits resampled."""
    label, score, visit = (part[name].to_numpy() for name in ("label", "score", "visit"))
    _, own = np.unique(visit, return_inverse=True)
    sums = np.column_stack([np.bincount(own, x) for x in (np.ones(len(own)), score >= threshold, score, label)])
    n, generator = len(sums), np.random.default_rng(0)
    drawn = np.array([sums.sum(axis=0), *(sums[generator.integers(0, n, n)].sum(axis=0) for _ in range(1000))])
    row = {"visits": n, "septic_visits": int((sums[:, 3] > 0).sum())}
    row |= {"predictions": len(part), "positives": int(label.sum())}

    def put(name: str, value: float, interval: Sequence[float]) -> None:
        row.update({name: value, f"{name}_from": interval[0], f"{name}_to": interval[1]})

    for name, values in {
        "alert_rate": drawn[:, 1] / drawn[:, 0],
        "expected_over_observed": drawn[:, 2] / np.maximum(drawn[:, 3], 0.5),
    }.items():
        put(name, float(values[0]), np.percentile(values[1:], [2.5, 97.5]).tolist())
    if 0 < label.sum() < len(label):
        found = figures(label, score, visit, visit)
        put("roc_auc", found["roc_auc"], found["roc_auc_95"])
        put("average_precision", found["average_precision"], found["average_precision_95"])
        row["brier"] = found["brier"]
    return row


def look_at_quality(
    findings: Findings,
    rows: pd.DataFrame,
    labels: pd.DataFrame,
    config: dict[str, Any],
    since: datetime | None = None,
) -> None:
    """Quality by week, where outcomes are known: rows of the log joined to `labels` (``visit, sepsis, onset``).

    A prediction is right about sepsis where onset is within the horizon after it. As in training, septic visits without
    onset are left out, and predictions after onset unless the model was trained with them. The table has all weeks;
    alerts are only about those that reach beyond `since`, and about all predictions since then together, which judges
    also a ward with few septic visits a week. Raises nothing: what cannot be judged is remarked.
    """
    snapshots = config["snapshots"]
    retrospective = snapshots.get("retrospective")
    undated = (labels["sepsis"] == 1) & labels["onset"].isna()
    if undated.any() and not retrospective:
        findings.remarks.append(f"{undated.sum():,} septic visits of the labels have no onset and are left out")
        labels = labels[~undated]
    joined = rows[rows["score"].notna() & rows["as_of"].notna()].merge(labels, on="visit", how="inner")
    if not len(joined):
        findings.remarks.append("no prediction of the log has an outcome in the labels; is the pseudonym key the same?")
        return
    if retrospective:
        joined["label"] = joined["sepsis"]
    else:
        ahead = (joined["onset"] - joined["as_of"]) / pd.Timedelta(hours=1)
        joined["label"] = ((joined["sepsis"] == 1) & (ahead <= snapshots["horizon_hours"])).astype(int)
        if not snapshots.get("after_onset"):
            joined = joined[~((joined["sepsis"] == 1) & (ahead < 0))]
    since = since or datetime.min
    monday = joined["time"].dt.to_period("W-SUN").dt.start_time
    parts = [
        (f"{week:%Y-%m-%d}", f"in the week of {week:%Y-%m-%d}", week + timedelta(days=7) > since, part)
        for week, part in joined.groupby(monday)
    ]
    if sum(looked_at for _, _, looked_at, _ in parts) > 1:
        parts.append(("whole period", "in the whole period", True, joined[joined["time"] > since]))
    told = config.get("metrics", {}).get("out_of_fold") or config.get("metrics", {}).get("test")
    table = []
    for week, when, looked_at, part in parts:
        row = {"week": week, **quality_of(part, config["decision_threshold"])}
        table.append(row)
        if not looked_at:
            continue
        if row["septic_visits"] < FEWEST_SEPTIC:
            findings.remarks.append(
                f"quality {when} is not judged: {row['septic_visits']} septic visits; {FEWEST_SEPTIC} are needed"
            )
        elif told and "roc_auc" in row and row["roc_auc_to"] < min(told["roc_auc"] - 0.02, told["roc_auc_95"][0]):
            findings.alerts.append(
                f"quality {when}: ROC AUC {row['roc_auc']:.3f} ({row['roc_auc_from']:.3f} to {row['roc_auc_to']:.3f}), "
                f"{told['roc_auc']:.3f} in training"
            )
        # where the scores are calibrated, at least as many visits are septic as the visits' mean scores sum to
        promised = part.groupby("visit")["score"].mean().sum()
        low, high = row["expected_over_observed_from"], row["expected_over_observed_to"]
        if row["septic_visits"] + promised >= FEWEST_SEPTIC and (low > 2 or high < 0.5):
            findings.alerts.append(
                f"calibration {when}: {part['score'].sum():.0f} positives expected, {row['positives']} seen"
            )
    findings.quality = pd.DataFrame(table)
    findings.calibration = calibration_table(joined["label"].to_numpy(), joined["score"].to_numpy())


# --------------------------------------------------------------------------------------------------- a look


def look(
    engine: sa.Engine,
    config: dict[str, Any],
    until: datetime,
    days: int = 7,
    baseline_days: int = 0,
    labels: pd.DataFrame | None = None,
    most_seconds: float = 1.0,
) -> Findings:
    """Everything there is to say about the `days` before `until` (UTC, naive): the service as a whole, and drift and
    quality of the config's model version."""
    findings, version = Findings(), config.get("model_version") or "unversioned"
    since = until - timedelta(days=days)
    everything = read_rows(engine, since, until)
    look_at_service(findings, everything, *read_counts(engine, since, until, days), days, most_seconds)
    rows = everything[everything["model_version"] == version]
    reference = config.get("reference_profile")
    if not reference:
        findings.remarks.append("the config has no reference profile; train again to watch drift")
    elif not Rows(rows, profile := Profile(config)).usable.any():
        findings.remarks.append(f"drift is not judged: model {version} has no usable score in {days} days")
    else:
        current = Rows(rows, profile).distribution(reference)
        if baseline_days:
            with engine.connect() as connection:
                first = connection.scalar(
                    sa.select(sa.func.min(predictions.c.time)).where(predictions.c.model_version == version)
                )
            first_days = Rows(read_rows(engine, None, first + timedelta(days=baseline_days), version), profile)
            expected = first_days.distribution(reference) if first_days.usable.any() else {"n_visits": 0}
        else:
            features = {name: watched["shares"] for name, watched in reference["features"].items()}
            expected = {**reference, "features": features, "score": reference["score"]["shares"]}
        look_for_drift(findings, expected, current)
        if "score" in expected:
            findings.score = (reference["score"]["edges"], expected["score"], current["score"])
        promised = expected_quality(rows["score"].to_numpy())
        findings.service["estimate without outcomes"] = (
            f"ROC AUC {promised['expected_roc_auc']:.3f}, share of positives {promised['expected_share']:.2%} "
            "(from the scores alone, right only while they are calibrated)"
        )
    if labels is not None:
        look_at_quality(findings, read_rows(engine, None, until, version), labels, config, since)
    return findings


def read_outcomes(path: str) -> pd.DataFrame:
    """Labels as ``visit`` (pseudonym), ``sepsis``, ``onset``. Raises `BadObservations`, `BadConfig`."""
    pseudonyms = Pseudonyms.from_environment()
    if not pseudonyms.lasting:
        raise BadConfig(f"{KEY_VARIABLE} is not set: outcomes cannot be joined to the log, which holds pseudonyms")
    from training_data import read_labels

    table = read_labels(path).drop_duplicates(["client", "visit_id"], keep="last")  # as in training
    table = table[table["sepsis"] >= 0]
    if not len(table):
        raise BadObservations(f"labels {path!r} hold no outcome")
    visits = [pseudonyms.visit(c, v) for c, v in zip(table["client"], table["visit_id"], strict=True)]
    onset = pd.to_datetime(table["sepsis_onset"].where(table["sepsis_onset"] > 0), unit="us").astype("datetime64[us]")
    return pd.DataFrame({"visit": visits, "sepsis": table["sepsis"].to_numpy(), "onset": onset.to_numpy()})


def report_html(findings: Findings, config: dict[str, Any], until: datetime, days: int) -> str:
    """The page."""
    from matplotlib.figure import Figure

    parts = [paragraph(f"The {days} days to {until:%Y-%m-%d %H:%M} UTC.")]
    if not findings.alerts:
        parts.append(paragraph("Nothing to alert about."))
    if findings.remarks:
        parts.append(listing(findings.remarks))
    parts += [heading("Service"), frame_table(pd.DataFrame(findings.service.items(), columns=["what", "now"]))]
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    if len(findings.daily):
        left.bar(findings.daily["day"], findings.daily["predictions"])
        middle.plot(findings.daily["day"], findings.daily["p95_seconds"] * 1e3, "o-")
    left.set(title="Predictions a day", ylabel="predictions")
    middle.set(title="Latency", ylabel="p95 of the day, ms", ylim=(0, None))
    left.tick_params(axis="x", rotation=60)
    middle.tick_params(axis="x", rotation=60)
    if findings.score:
        edges, expected, actual = findings.score
        place = np.arange(len(expected) - 1)
        right.bar(place - 0.2, expected[:-1], 0.4, label="reference")
        right.bar(place + 0.2, actual[:-1], 0.4, label="now")
        right.set_xticks(place, [f"< {edge:.3g}" for edge in edges] + [f">= {edges[-1]:.3g}" if edges else "all"])
        right.tick_params(axis="x", rotation=60)
        right.legend()
    right.set(title="Scores", ylabel="share of visits")
    parts.append(image(figure, "Predictions and latency by day; distribution of the scores"))
    if len(findings.quality):
        parts += [heading("Quality by week, with outcomes"), frame_table(with_intervals(findings.quality))]
        parts.append(image(quality_figure(findings), "ROC AUC by week; calibration"))
    if len(findings.drift):
        parts += [heading("Drift"), frame_table(findings.drift)]
        parts += [heading("Codes, share of visits"), frame_table(findings.codes)]
    title = f"Monitoring of model {config.get('model_version')}"
    notices = ["The model was trained on synthetic patients."] if training_source(config)["synthetic"] else []
    return page(title, notices, *parts, alerts=findings.alerts)


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """For a person: each figure in one cell with its interval."""
    out = table.copy()
    for name in [name.removesuffix("_to") for name in table if name.endswith("_to")]:
        ends = zip(table[name], out.pop(f"{name}_from"), out.pop(f"{name}_to"), strict=True)
        out[name] = ["" if pd.isna(x) else f"{x:.3f} ({low:.3f}\N{EN DASH}{high:.3f})" for x, low, high in ends]
    return out


def quality_figure(findings: Findings) -> Any:
    """ROC AUC by week with its interval, and calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "roc_auc" in findings.quality:
        known = findings.quality.dropna(subset=["roc_auc"])
        below, above = known["roc_auc"] - known["roc_auc_from"], known["roc_auc_to"] - known["roc_auc"]
        left.errorbar(known["week"], known["roc_auc"], [below.clip(0), above.clip(0)], fmt="o", capsize=3)
    left.set(title="ROC AUC by week", ylabel="ROC AUC, 95% interval")
    left.tick_params(axis="x", rotation=60)
    table = findings.calibration
    top = 1.1 * max(table["mean_probability"].max(), table["observed_rate"].max(), 1e-6)
    right.plot([0, top], [0, top], "--", color="grey")
    right.plot(table["mean_probability"], table["observed_rate"], "o-")
    right.set(title="Calibration", xlabel="mean predicted probability", ylabel="observed share")
    return figure


# ------------------------------------------------------------------------------------------------ the script


def moment(text: str) -> datetime:
    """ISO 8601 as a naive UTC time, far enough from the calendar's ends to count days from."""
    time = datetime.fromisoformat(text)
    if not 1970 <= time.year <= 9000:
        raise argparse.ArgumentTypeError(f"{text} is not in the years 1970 to 9000")
    return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time


def web_address(text: str) -> str:
    """An http URL; the error does not quote it, since such a URL often holds a secret."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # asking for it checks it
    except ValueError:
        good = False
    if not good or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError("expected http://host/... or https://host/...")
    return text


def work(arguments: argparse.Namespace) -> int:
    url = url_of(arguments.monitor)
    if url == OFF:
        raise BadConfig(f"there is no prediction log to read: {URL_VARIABLE} or --monitor says {OFF!r}")
    try:
        address = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # which may quote the password
        raise BadConfig(
            "the URL of the prediction log cannot be read; expected sqlite:///file.db or "
            "dialect+driver://user:password@host:port/name with special characters of the password as %40 and the like"
        ) from None
    engine = None
    try:
        engine = open_engine(address)
        return COMMANDS[arguments.command](engine, arguments)
    except (sa.exc.SQLAlchemyError, sqlite3.Error, pd.errors.DatabaseError, ImportError) as error:
        raise BadConfig(_in_words(error, address)) from None
    finally:
        if engine is not None:
            engine.dispose()


def _in_words(error: Exception, address: sa.URL) -> str:
    """What a database's error means, in one line that quotes neither password nor data."""
    what = f"the prediction log ({address.drivername})"
    if isinstance(error, ImportError | sa.exc.NoSuchModuleError):
        return f"{what} has no driver here; see requirements-database.txt"
    if isinstance(error, pd.errors.DatabaseError):
        error = error.__cause__ or error
    original = getattr(error, "orig", None) or error
    if address.get_backend_name() == "sqlite":
        return f"{what} cannot be used: {address.database}: {original}"
    return (
        f"{what} cannot be used: {type(original).__name__}; is the server there, are name, password and rights right?"
    )


def _findings(engine: sa.Engine, arguments: argparse.Namespace) -> tuple[Findings, dict[str, Any], datetime]:
    config = load_config(arguments.config)
    until = arguments.until or datetime.now(UTC).replace(tzinfo=None)
    labels = read_outcomes(arguments.labels) if arguments.labels else None
    options = (arguments.days, arguments.baseline_days, labels, arguments.max_seconds)
    return look(engine, config, until, *options), config, until


def report(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    findings, config, until = _findings(engine, arguments)
    write_atomic(arguments.html, report_html(findings, config, until, arguments.days))
    for line in findings.alerts:
        print(line)
    log.info("written: %s", arguments.html)
    return DONE


def check(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    findings, config, until = _findings(engine, arguments)
    for line in findings.alerts:
        print(line)
    for line in findings.remarks:
        log.info("%s", line)
    if findings.alerts and arguments.webhook:
        told = {"model_version": config.get("model_version"), "until": until.isoformat(), "alerts": findings.alerts}
        try:
            post_json(arguments.webhook, told)
        except OSError as error:
            log.error("error: %s", error)
    return SOME_FAILED if findings.alerts else DONE


def export(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    until = arguments.until or datetime.now(UTC).replace(tzinfo=None)
    rows = read_rows(engine, until - timedelta(days=arguments.days), until, None)
    if arguments.pseudonymize:
        rows = detached(rows, Pseudonyms.from_environment())
    if arguments.out:
        write_tables({arguments.out: rows})
    else:
        rows.to_csv(sys.stdout, index=False)
    log.info("%d rows", len(rows))
    return DONE


def detached(rows: pd.DataFrame, pseudonyms: Pseudonyms) -> pd.DataFrame:
    """Rows that cannot be joined to the log or to a calendar: visits under other hashes, in their order, all times of a
    visit shifted by the same number of days. (The log does not know clients, so the shift is by visit.)"""
    days = [pseudonyms.shift_days(visit) for visit in rows["visit"]]
    shift = pd.to_timedelta(pd.Series(days, index=rows.index, dtype="int64"), unit="D")
    out = rows.assign(visit=[f"v{pseudonyms.visit('export', visit)}" for visit in rows["visit"]])
    return out.assign(time=rows["time"] - shift, as_of=rows["as_of"] - shift).sort_values("visit").drop(columns="id")


def prune(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    horizon = (arguments.until or datetime.now(UTC).replace(tzinfo=None)) - timedelta(days=arguments.older_than)
    with engine.begin() as connection:
        gone = [connection.execute(t.delete().where(t.c.time <= horizon)).rowcount for t in (predictions, errors)]
    print(json.dumps({"predictions_deleted": gone[0], "errors_deleted": gone[1]}))
    return DONE


COMMANDS = {"report": report, "check": check, "export": export, "prune": prune}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python monitoring.py check --days 1")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "report": ("write a page", "--labels outcomes.csv --html report.html"),
        "check": ("print alerts, status 1 if there is any", "--days 1 --webhook https://hooks.example.org/sepsis"),
        "export": ("the log's rows", "--days 30 --out rows.parquet"),
        "prune": ("delete old rows", "--older-than 365"),
    }
    for name, (text, example) in helps.items():
        end = f"example:\n  python monitoring.py {name} {example}"
        style = parser.formatter_class
        command = commands.add_parser(name, help=text, description=text, epilog=end, formatter_class=style)
        option = command.add_argument
        option("--monitor", metavar="URL", help=f"database of the log; else {URL_VARIABLE}, else {DEFAULT_URL}")
        option("--until", type=moment, metavar="TIME", help="end of the period, ISO 8601 UTC; now if not given")
        if name in ("report", "check"):
            option("--config", default=DEFAULT_CONFIG, help="config of the deployed model")
            option("--labels", metavar="FILE", help="outcomes, for the quality by week")
            about = "compare with so many first days of the log; 0: with training"
            option("--baseline-days", type=number(int, 0, MOST_DAYS), default=0, metavar="DAYS", help=about)
            about = "alert where the p95 latency is longer"
            option("--max-seconds", type=number(float, 0), default=1.0, metavar="SECONDS", help=about)
        if name == "prune":
            option("--older-than", type=number(int, 0, MOST_DAYS), required=True, metavar="DAYS", help="is deleted")
        else:
            option("--days", type=number(int, 1, MOST_DAYS), default=7, help="length of the period")
        if name == "report":
            option("--html", default="data/monitoring_report.html", metavar="FILE", help="the page")
        if name == "check":
            option("--webhook", type=web_address, metavar="URL", help="POST the alerts there as JSON")
        if name == "export":
            option("--out", type=table_path, metavar="FILE", help=".csv, .csv.gz or .parquet; stdout if not given")
            option("--pseudonymize", action="store_true", help="for handing on: other hashes, times shifted by visit")
        add_log_options(command, default=argparse.SUPPRESS)
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
