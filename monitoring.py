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
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
from scipy.stats import chi2, norm

from artifacts import write_atomic, write_tables
from command_line import DONE, SOME_FAILED, log, make_parser, number, post_json, run, table_path
from feature_pipeline import BadConfig, BadObservations, load_config
from metrics import calibration_table, figures
from pages import frame_table, heading, image, listing, page, paragraph
from prediction_log import Profile, bin_shares, errors, letters_of, open_engine, predictions, url_of, visit_weights
from pseudonyms import KEY_VARIABLE, Pseudonyms

MODERATE, STRONG = 0.1, 0.25  # PSI
SIGNIFICANCE = 0.01  # over all that is looked at together
CODE_CHANGE = 0.1  # share of visits that have a code
FEWEST_VISITS = 30  # below, nothing is said about drift
FEWEST_POSITIVE = 20  # expected and observed together; below, nothing is said about calibration


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
    def n_visits(self) -> int:
        return self.frame["visit"].nunique()

    def distribution(self, config_profile: dict[str, Any]) -> dict[str, Any]:
        """In the form of the config's ``reference_profile``: shares of the bins, every visit counting once."""
        frame = self.frame[self.frame["score"].notna()]
        weights = visit_weights(frame["visit"].to_numpy())
        out: dict[str, Any] = {"n_visits": self.n_visits, "features": {}, "codes": {}}
        if not len(frame):
            return out
        usable = frame["bins"].str.len().eq(len(self.profile.features)).to_numpy()
        letters = letters_of(frame["bins"][usable].tolist(), len(self.profile.features))
        for name, column in zip(self.profile.features, letters.T, strict=True):
            n_bins = len(config_profile["features"][name]["edges"]) + 1
            out["features"][name] = bin_shares(column, n_bins, weights[usable])
        edges = config_profile["score"]["edges"]
        scores = np.searchsorted(edges, frame["score"].to_numpy(), side="right") + ord("a")
        out["score"] = bin_shares(scores, len(edges) + 1, weights)
        has = letters_of(frame["codes"].tolist(), len(self.profile.codes)) == ord("1")
        for code, column in zip(self.profile.codes, has.T, strict=True):
            out["codes"][code] = float((column * weights).sum() / weights.sum())
        out["unknown"] = float(((frame["unknown"].to_numpy() > 0) * weights).sum() / weights.sum())
        return out


def read_rows(engine: sa.Engine, since: datetime | None, until: datetime, version: str | None) -> pd.DataFrame:
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


def look_at_service(
    findings: Findings, rows: pd.DataFrame, failed: int, earlier: int, days: int, most_seconds: float
) -> None:
    """Volume, latency, errors. `earlier` is the number of predictions in the four periods before this one."""
    p95 = float(rows["seconds"].quantile(0.95)) if len(rows) else float("nan")
    rate = failed / max(len(rows) + failed, 1)
    findings.service = {
        "predictions": f"{len(rows):,} of {rows['visit'].nunique():,} visits in {days} days",
        "empty scores": f"{rows['score'].isna().mean():.2%}" if len(rows) else "",
        "risk levels": ", ".join(f"{n:,} {level}" for level, n in rows["risk_level"].value_counts().items()),
        "sources": ", ".join(f"{n:,} {source}" for source, n in rows["source"].value_counts().items()),
        "latency": f"median {rows['seconds'].median() * 1e3:.1f} ms, p95 {p95 * 1e3:.1f} ms" if len(rows) else "",
        "errors": f"{failed:,} ({rate:.2%})",
    }
    if not len(rows):
        findings.alerts.append(f"no prediction in {days} days")
    usual = earlier / 4
    if usual >= 20 and abs(len(rows) - usual) > max(0.5 * usual, 5 * np.sqrt(usual)):
        findings.alerts.append(f"volume: {len(rows):,} predictions, usually {usual:,.0f} in {days} days")
    if p95 > most_seconds:
        findings.alerts.append(f"latency: p95 is {p95:.2f} s, allowed {most_seconds:g} s")
    if failed >= 5 and rate > 0.05:
        findings.alerts.append(f"errors: {rate:.1%} of what was asked could not be scored")
    if not len(rows):
        return
    by_day = rows.assign(day=rows["time"].dt.floor("D")).groupby("day")
    findings.daily = by_day.agg(
        predictions=("score", "size"), mean_score=("score", "mean"), p95_seconds=("seconds", lambda s: s.quantile(0.95))
    ).reset_index()


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


def look_at_quality(findings: Findings, rows: pd.DataFrame, labels: pd.DataFrame, config: dict[str, Any]) -> None:
    """Quality by week, where outcomes are known: rows of the log joined to `labels` (``visit, sepsis, onset``).

    A prediction is right about sepsis where onset is within the horizon after it; predictions after onset are left out
    unless the model was trained with them. Raises nothing: what cannot be judged is remarked.
    """
    joined = rows[rows["score"].notna() & rows["as_of"].notna()].merge(labels, on="visit", how="inner")
    if not len(joined):
        findings.remarks.append("no prediction of the log has an outcome in the labels; is the pseudonym key the same?")
        return
    snapshots = config["snapshots"]
    if snapshots.get("retrospective"):
        joined["label"] = joined["sepsis"]
    else:
        ahead = (joined["onset"] - joined["as_of"]) / pd.Timedelta(hours=1)
        joined["label"] = ((joined["sepsis"] == 1) & (ahead <= snapshots["horizon_hours"])).astype(int)
        if not snapshots.get("after_onset"):
            joined = joined[~((joined["sepsis"] == 1) & (ahead < 0))]
    told = config.get("metrics", {}).get("out_of_fold") or config.get("metrics", {}).get("test") or {}
    table = []
    for week, part in joined.groupby(joined["time"].dt.to_period("W-SUN").dt.start_time):
        label, score = part["label"].to_numpy(), part["score"].to_numpy()
        row = {
            "week": week.date().isoformat(),
            "predictions": len(part),
            "positives": int(label.sum()),
            "alert_rate": float((score >= config["decision_threshold"]).mean()),
            "expected_over_observed": float(score.sum() / max(label.sum(), 0.5)),
        }
        if label.sum() + score.sum() >= FEWEST_POSITIVE and not 0.5 <= row["expected_over_observed"] <= 2:
            findings.alerts.append(
                f"calibration in the week of {row['week']}: {score.sum():.0f} positives expected, {label.sum()} seen"
            )
        if 0 < label.sum() < len(label):
            found = figures(label, score, part["visit"].to_numpy(), part["visit"].to_numpy())
            row |= {
                "roc_auc": found["roc_auc"],
                "roc_auc_from": found["roc_auc_95"][0],
                "roc_auc_to": found["roc_auc_95"][1],
                "average_precision": found["average_precision"],
                "brier": found["brier"],
            }
            if told and found["roc_auc_95"][1] < told["roc_auc"] - 0.02:
                findings.alerts.append(
                    f"quality in the week of {row['week']}: ROC AUC {found['roc_auc']:.3f} "
                    f"({found['roc_auc_95'][0]:.3f} to {found['roc_auc_95'][1]:.3f}), {told['roc_auc']:.3f} in training"
                )
        table.append(row)
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
    """Everything there is to say about the `days` before `until` (UTC, naive) for the config's model version."""
    findings, version = Findings(), config.get("model_version")
    since = until - timedelta(days=days)
    rows = read_rows(engine, since, until, version)
    with engine.connect() as connection:
        period = (predictions.c.time > since - timedelta(days=4 * days)) & (predictions.c.time <= since)
        earlier = connection.execute(sa.select(sa.func.count()).select_from(predictions).where(period)).scalar_one()
        failed = connection.execute(
            sa.select(sa.func.coalesce(sa.func.sum(errors.c.n), 0)).where(
                (errors.c.time > since) & (errors.c.time <= until)
            )
        ).scalar_one()
    look_at_service(findings, rows, int(failed), earlier, days, most_seconds)
    reference = config.get("reference_profile")
    if not reference:
        findings.remarks.append("the config has no reference profile; train again to watch drift")
    elif len(rows):
        profile = Profile(config)
        current = Rows(rows, profile).distribution(reference)
        if baseline_days:
            with engine.connect() as connection:
                first = connection.execute(
                    sa.select(sa.func.min(predictions.c.time)).where(predictions.c.model_version == version)
                ).scalar_one()
            first_days = read_rows(engine, None, first + timedelta(days=baseline_days), version)
            expected = Rows(first_days, profile).distribution(reference)
        else:
            features = {name: watched["shares"] for name, watched in reference["features"].items()}
            expected = {**reference, "features": features, "score": reference["score"]["shares"]}
        look_for_drift(findings, expected, current)
        findings.score = (reference["score"]["edges"], expected["score"], current["score"])
        promised = expected_quality(rows["score"].to_numpy())
        findings.service["estimate without outcomes"] = (
            f"ROC AUC {promised['expected_roc_auc']:.3f}, share of positives {promised['expected_share']:.2%} "
            "(from the scores alone, right only while they are calibrated)"
        )
    if labels is not None:
        look_at_quality(findings, read_rows(engine, None, until, version), labels, config)
    return findings


def read_outcomes(path: str) -> pd.DataFrame:
    """Labels as ``visit`` (pseudonym), ``sepsis``, ``onset``. Raises `BadObservations`, `BadConfig`."""
    pseudonyms = Pseudonyms.from_environment()
    if not pseudonyms.lasting:
        raise BadConfig(f"{KEY_VARIABLE} is not set: outcomes cannot be joined to the log, which holds pseudonyms")
    from training_data import read_labels

    table = read_labels(path)
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
    left, right = figure.subplots(1, 2)
    if len(findings.daily):
        left.bar(findings.daily["day"].dt.strftime("%m-%d"), findings.daily["predictions"])
    left.set(title="Predictions a day", ylabel="predictions")
    left.tick_params(axis="x", rotation=60)
    if findings.score:
        edges, expected, actual = findings.score
        place = np.arange(len(expected) - 1)
        right.bar(place - 0.2, expected[:-1], 0.4, label="reference")
        right.bar(place + 0.2, actual[:-1], 0.4, label="now")
        right.set_xticks(place, [f"< {edge:.3g}" for edge in edges] + [f">= {edges[-1]:.3g}" if edges else "all"])
        right.tick_params(axis="x", rotation=60)
        right.legend()
    right.set(title="Scores", ylabel="share of visits")
    parts.append(image(figure, "Predictions a day; distribution of the scores"))
    if len(findings.quality):
        parts += [heading("Quality by week, with outcomes"), frame_table(findings.quality)]
        parts.append(image(quality_figure(findings), "ROC AUC by week; calibration"))
    if len(findings.drift):
        parts += [heading("Drift"), frame_table(findings.drift)]
        parts += [heading("Codes, share of visits"), frame_table(findings.codes)]
    title = f"Monitoring of model {config.get('model_version')}"
    notices = ["The model was trained on synthetic patients."] if config["data"]["synthetic"] else []
    return page(title, notices, *parts, alerts=findings.alerts)


def quality_figure(findings: Findings) -> Any:
    """ROC AUC by week with its interval, and calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "roc_auc" in findings.quality:
        known = findings.quality.dropna(subset=["roc_auc"])
        below, above = known["roc_auc"] - known["roc_auc_from"], known["roc_auc_to"] - known["roc_auc"]
        left.errorbar(known["week"], known["roc_auc"], [below.clip(0), above.clip(0)], fmt="o-", capsize=3)
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
    """ISO 8601 as a naive UTC time."""
    time = datetime.fromisoformat(text)
    return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time


def work(arguments: argparse.Namespace) -> int:
    engine = open_engine(url_of(arguments.monitor))
    try:
        return COMMANDS[arguments.command](engine, arguments)
    finally:
        engine.dispose()


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
        "report": "write a page",
        "check": "print alerts, status 1 if there is any",
        "export": "the log's rows",
        "prune": "delete old rows",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--monitor", metavar="URL", help="database of the log; or SEPSIS_MONITOR_URL")
        command.add_argument("--until", type=moment, metavar="TIME", help="end of the period, ISO 8601 UTC; now")
        if name in ("report", "check"):
            command.add_argument("--config", default="models/best_model_config.json", help="of the deployed model")
            command.add_argument("--labels", metavar="FILE", help="outcomes, for the quality by week")
            command.add_argument(
                "--baseline-days", type=number(int, 0), default=0, help="compare with the log's first days instead"
            )
            command.add_argument(
                "--max-seconds", type=number(float, 0), default=1.0, help="alert where the p95 latency is longer"
            )
        if name == "prune":
            command.add_argument(
                "--older-than", type=number(int, 0), required=True, metavar="DAYS", help="what is deleted"
            )
        else:
            command.add_argument("--days", type=number(int, 1), default=7, help="length of the period")
        if name == "report":
            command.add_argument("--html", default="data/monitoring_report.html", metavar="FILE", help="the page")
        if name == "check":
            command.add_argument("--webhook", metavar="URL", help="POST the alerts there as JSON")
        if name == "export":
            command.add_argument(
                "--out", type=table_path, metavar="FILE", help=".csv, .csv.gz or .parquet (default: stdout)"
            )
            command.add_argument(
                "--pseudonymize", action="store_true", help="for handing on: other hashes, times shifted by visit"
            )
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
