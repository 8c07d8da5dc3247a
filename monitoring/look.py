"""Everything that a report or a check computes from one period of the prediction log."""

from __future__ import annotations

from datetime import datetime, timedelta

import pandas as pd
import sqlalchemy as sa

from feature_pipeline import Config
from monitoring.drift import FEWEST_VISITS, look_for_drift
from monitoring.findings import (
    Findings,
    distributions,
    look_at_answers,
    look_at_service,
    read_challengers,
    read_counts,
    read_rows,
    read_scores,
)
from monitoring.log import predictions
from monitoring.profile import Profile
from monitoring.quality import expected_quality, look_at_challengers, look_at_quality


def look(
    engine: sa.Engine,
    config: Config,
    until: datetime,
    days: int = 7,
    baseline_days: int = 0,
    labels: pd.DataFrame | None = None,
    most_seconds: float = 1.0,
) -> Findings:
    """Looks at the `days` before `until` (UTC, naive): the service as a whole, drift and quality of the config's model
    version."""
    findings, version = Findings(), config.model_version or "unversioned"
    since = until - timedelta(days=days)
    profile = Profile(config)
    scores = read_scores(engine, since, until, n_bins=len(profile.features))
    look_at_service(findings, scores, *read_counts(engine, since, until, days), days, most_seconds)
    look_at_answers(findings, engine, since, until)
    reference = config.reference_profile
    if not reference:
        findings.remarks.append("the config has no reference profile; train again to watch drift")
    elif not (current := distributions(engine, since, until, version, scores, profile)):
        findings.remarks.append(f"drift is not judged: model {version} has no score in {days} days")
    else:
        if baseline_days:
            own = predictions.c.model_version == version
            with engine.connect() as connection:
                first = connection.scalar(sa.select(sa.func.min(predictions.c.time)).where(own))
            end = first + timedelta(days=baseline_days)
            earlier = read_scores(engine, None, end, version, len(profile.features))
            reference = distributions(engine, None, end, version, earlier, profile)
        most = max(current, key=lambda moments: current[moments]["n_visits"])
        for moments, now in current.items():
            before = reference.get(moments, {"n_visits": 0})
            if moments == most or now["n_visits"] >= FEWEST_VISITS:
                look_for_drift(findings, before, now, moments)
            if moments == most and "score" in before:
                findings.score = (profile.score_edges, before["score"], now["score"])
        promised = expected_quality(scores.score[scores.is_kind("model_version", version)])
        findings.service["estimate without outcomes"] = (
            f"ROC AUC {promised['expected_roc_auc']:.3f}, share of positives {promised['expected_share']:.2%} "
            "(from the scores alone; right only if they are calibrated)"
        )
    if labels is not None:
        rows = read_rows(engine, None, until, version, ("visit", "time", "as_of", "score", "risk_level", "shadow"))
        look_at_quality(findings, rows, labels, config, since)
        shown = rows[~rows["shadow"].astype(bool)]
        look_at_challengers(findings, shown, read_challengers(engine, since, until), labels, config)
    return findings
