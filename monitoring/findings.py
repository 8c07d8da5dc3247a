"""The rows of the prediction log, what is found in them, and how the service performs."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from monitoring.log import cards, errors, predictions
from monitoring.profile import AT_END, DURING, Profile

FEWEST_FAILED = 5  # failed or UNKNOWN predictions; below, they are not judged
FEWEST_PERIODS, MOST_PERIODS = 2, 4  # of history, with which the volume is compared
MOST_UNKNOWN = 0.5  # share of predictions


def distributions(frame: pd.DataFrame, profile: Profile) -> dict[str, dict[str, Any]]:
    """Of predictions of one model version (rows of the table `predictions`) the distribution for each kind of moments.

    A visit that was scored once, for the time of its newest observation, was scored at its end; others were scored
    during the stay. There every visit-hour with a score counts once: however often a visit is scored, and however long
    the period, these are shares of patient-hours, as the snapshots of training are.
    """
    usable = frame["score"].notna() & frame["bins"].str.len().eq(len(profile.features))
    frame = frame[usable].drop_duplicates(["visit", "as_of"])
    once = frame.groupby("visit")["as_of"].transform("size").eq(1) & frame["as_of"].eq(frame["newest"])
    weights = 1 / frame.groupby(["visit", frame["as_of"].dt.floor("h")])["as_of"].transform("size")
    parts = {DURING: frame[~once], AT_END: frame[once]}
    return {
        moments: profile.distribution({name: part[name].tolist() for name in part}, weights[part.index].to_numpy())
        for moments, part in parts.items()
        if len(part)
    }


def read_rows(engine: sa.Engine, since: datetime | None, until: datetime, version: str | None = None) -> pd.DataFrame:
    """The log's predictions with ``since < time <= until``: all of one model version, or those that were shown."""
    query = sa.select(predictions).where(predictions.c.time <= until).order_by(predictions.c.id)
    if since is not None:
        query = query.where(predictions.c.time > since)
    shown = predictions.c.shadow.is_(False)
    query = query.where(shown if version is None else predictions.c.model_version == version)
    with engine.connect() as connection:
        rows = pd.read_sql(query, connection)
    return rows.astype(dict.fromkeys(("time", "as_of", "newest"), "datetime64[us]"))  # also where there are none


def read_challengers(engine: sa.Engine, since: datetime, until: datetime) -> pd.DataFrame:
    """The predictions in the shadow of all versions that ran there with ``since < time <= until``, and before."""
    shadow = sa.select(predictions).where(predictions.c.shadow.is_(True), predictions.c.time <= until)
    recent = sa.select(predictions.c.model_version).where(predictions.c.shadow.is_(True), predictions.c.time > since)
    with engine.connect() as connection:
        rows = pd.read_sql(shadow.where(predictions.c.model_version.in_(recent)), connection)
    return rows.astype(dict.fromkeys(("time", "as_of", "newest"), "datetime64[us]"))


@dataclass
class Findings:
    """What was found in the log: tables for a person, and warnings, one line each.

    (They are not called alerts: an alert is a HIGH risk of a patient.)
    """

    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    drift: dict[str, pd.DataFrame] = field(default_factory=dict)  # by heading
    service: dict[str, Any] = field(default_factory=dict)
    score: tuple[list[float], list[float], list[float]] | None = None  # edges, expected, actual shares
    quality: pd.DataFrame = field(default_factory=pd.DataFrame)
    calibration: pd.DataFrame = field(default_factory=pd.DataFrame)
    challengers: dict[str, pd.DataFrame] = field(default_factory=dict)  # in the shadow, by heading
    daily: pd.DataFrame = field(default_factory=pd.DataFrame)
    answers: pd.DataFrame = field(default_factory=pd.DataFrame)


def read_counts(engine: sa.Engine, since: datetime, until: datetime, days: int) -> tuple[int, list[tuple[int, int]]]:
    """What failed in ``since < time <= until``, and (predictions, visits) of each of the periods of `days` before,
    at most `MOST_PERIODS`, that the log covers wholly. All model versions."""
    failed = sa.select(sa.func.coalesce(sa.func.sum(errors.c.n), 0))
    counts = sa.select(sa.func.count(), sa.func.count(predictions.c.visit.distinct()))
    counts = counts.where(predictions.c.shadow.is_(False))
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


def look_at_answers(findings: Findings, engine: sa.Engine, since: datetime, until: datetime) -> None:
    """How clinicians answered the cards that were given in ``since < time <= until``: of each risk level the number of
    cards, of answers, and of reasons of those that were overridden. All model versions."""
    query = sa.select(cards.c.risk_level, cards.c.outcome, cards.c.reason)
    with engine.connect() as connection:
        rows = pd.read_sql(query.where(cards.c.time > since, cards.c.time <= until), connection)
    table = []
    for level in [name for name in ("HIGH", "MEDIUM", "LOW", "UNKNOWN") if name in set(rows["risk_level"])]:
        own = rows[rows["risk_level"] == level]
        overridden = own[own["outcome"] == "overridden"]
        reasons = overridden["reason"].fillna("none given").value_counts()
        table.append(
            {
                "risk_level": level,
                "cards": len(own),
                "accepted": int((own["outcome"] == "accepted").sum()),
                "overridden": len(overridden),
                "not_answered": int(own["outcome"].isna().sum()),
                "reasons": ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()),
            }
        )
    findings.answers = pd.DataFrame(table)


def look_at_service(
    findings: Findings, rows: pd.DataFrame, failed: int, earlier: list[tuple[int, int]], days: int, most_seconds: float
) -> None:
    """Volume, latency, errors of all model versions; `failed` and `earlier` as `read_counts` gives them."""
    p95 = float(rows["seconds"].quantile(0.95)) if len(rows) else float("nan")
    rate = failed / max(len(rows) + failed, 1)
    unknown, visits = rows["score"].isna(), rows["visit"].nunique()
    alerted = rows.loc[rows["risk_level"].eq("HIGH"), "visit"].nunique()

    def counted(name: str) -> str:
        return ", ".join(f"{n:,} {value}" for value, n in rows[name].value_counts().items())

    findings.service = {
        "predictions": f"{len(rows):,} of {visits:,} visits in {days} days",
        "risk levels": counted("risk_level"),
        "reasons of UNKNOWN": counted("reason"),
        "visits alerted (HIGH)": f"{alerted:,} ({alerted / max(visits, 1):.1%})",
        "sources": counted("source"),
        "model versions": counted("model_version"),
        "latency": f"median {rows['seconds'].median() * 1e3:.1f} ms, p95 {p95 * 1e3:.1f} ms" if len(rows) else "",
        "errors": f"{failed:,} ({rate:.2%})",
    }
    if not len(rows):
        findings.warnings.append(f"no prediction in {days} days")
    elif len(earlier) >= FEWEST_PERIODS:
        usual, usual_visits = np.median(np.array(earlier), axis=0)
        # visits come by chance, each with several predictions
        by_chance = 5 * np.sqrt(usual * (usual / max(usual_visits, 1)) * (1 + 1 / len(earlier)))
        if usual >= 20 and abs(len(rows) - usual) > max(0.5 * usual, by_chance):
            findings.warnings.append(f"volume: {len(rows):,} predictions, usually {usual:,.0f} in {days} days")
    if unknown.sum() >= FEWEST_FAILED and unknown.mean() > MOST_UNKNOWN:
        why = f": {reasons}" if (reasons := counted("reason")) else ""
        findings.warnings.append(f"the risk is UNKNOWN in {unknown.sum():,} of {len(rows):,} predictions{why}")
    if p95 > most_seconds:
        findings.warnings.append(f"latency: p95 is {p95:.2f} s, allowed {most_seconds:g} s")
    if failed >= FEWEST_FAILED and rate > 0.05:
        findings.warnings.append(f"errors: {rate:.1%} of the requests, files and visits could not be scored")
    if len(rows):
        by_day = rows.groupby(rows["time"].dt.floor("D").rename("day"))
        findings.daily = by_day["seconds"].agg(predictions="size", p95_seconds=lambda x: x.quantile(0.95)).reset_index()
