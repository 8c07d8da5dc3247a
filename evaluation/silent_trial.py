"""A trial in which no clinician sees the scores: the prediction log with outcomes, week by week."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from common.alerts import COOLDOWN_HOURS, Scored
from common.pseudonyms import lasting_pseudonyms
from common.trial import FIGURES, Rule, figure_of, judge, live_scores
from evaluation.comparators import number
from evaluation.scoring import Past
from feature_pipeline import BadConfig, Config
from monitoring.log import OFF, URL_VARIABLE, open_engine, predictions, url_of

WEEK = np.timedelta64(7, "D")
MONDAY = np.datetime64("1969-12-29", "us")  # before every date that the reader takes in a log


def past_of_log(
    url: str | None, version: str, labels: pd.DataFrame, cooldown_hours: float = COOLDOWN_HOURS
) -> tuple[Past, Scored]:
    """(the visits of the log that have an outcome, their scores) of one model version. Raises `BadConfig`,
    `BadObservations`."""
    pseudonyms = lasting_pseudonyms()
    columns = [predictions.c[name] for name in ("visit", "as_of", "score", "risk_level")]
    url, engine = url_of(url), None
    if url == OFF:
        raise BadConfig(f"there is no prediction log to read: {URL_VARIABLE} or --from-log says {OFF!r}")
    try:
        engine = open_engine(url)
        with engine.connect() as connection:
            query = sa.select(*columns).where(predictions.c.model_version == version)
            rows = pd.read_sql(query, connection)
    except (sa.exc.SQLAlchemyError, sqlite3.Error, pd.errors.DatabaseError, ImportError, ValueError) as error:
        # its text may quote a password
        raise BadConfig(
            f"the prediction log cannot be read ({type(error).__name__}); expected sqlite:///file.db or "
            "dialect+driver://user:password@host/name, as monitor.py takes it"
        ) from None
    finally:
        if engine is not None:
            engine.dispose()
    if not len(rows):
        raise BadConfig(f"the prediction log has no score of model {version}")
    scored, left_out = live_scores(rows, labels, pseudonyms, cooldown_hours)
    past = Past(None, scored.stays, np.empty(0), scored.visit, scored.time, [], left_out)
    return past, scored


def by_week(scored: Scored, config: Config, window_hours: float) -> list[dict[str, Any]]:
    """Figures of the visits of each week; a visit counts in the week of its first score."""
    start = scored.stays.start.astype("datetime64[us]")
    week = (start - MONDAY) // WEEK
    snapshots, rows = config.snapshots, []
    for n in np.unique(week):
        part, _ = scored.some(week == n)
        found = {
            name: number(figure_of(part, name, window_hours, snapshots.horizon_hours, snapshots.after_onset))
            for name in FIGURES
        }
        monday = str((MONDAY + n * WEEK).astype("datetime64[D]"))
        sizes = {"visits": len(part.stays.start), "septic_visits": int(part.stays.septic.sum())}
        rows.append({"week": monday, **sizes, **found})
    return rows


def trial(scored: Scored, config: Config, window_hours: float, rules: Sequence[Rule] = ()) -> dict[str, Any]:
    return {"weeks": by_week(scored, config, window_hours), "stop_rule": judge(rules, scored, config)}
