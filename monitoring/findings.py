"""The rows of the prediction log, what is found in them, and how the service works."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from monitoring.log import errors, predictions
from monitoring.profile import Profile, bin_shares, letters_of, visit_weights

FEWEST_FAILED = 5  # unusable or failed predictions; below, nothing is said about them


FEWEST_PERIODS, MOST_PERIODS = 2, 4  # of history, with which the volume is compared


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
