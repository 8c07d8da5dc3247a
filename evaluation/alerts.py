"""The alerts of a ward: how many, how many are right, how early, and how many of them random scores also find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.alerts import (
    GRACE_HOURS,
    HOURS_PER_DAY,
    WINDOWS,
    Scored,
    figures_of,
    lead_times,
    per_visit,
    quartiles,
    totals,
)
from evaluation.comparators import number
from feature_pipeline import MICROSECONDS_PER_HOUR, NO_TIME

RANDOM_DRAWS = 20
BUDGETS = (1, 2, 3, 5, 7.5, 10, 15, 20, 30, 40, 60, 100, 200, 300)  # alerts per 100 patient-days


def random_alerts(scored: Scored, windows: Sequence[float] = WINDOWS, seed: int = 0) -> dict[str, Any]:
    """The figures of random scores that give as many alerts as `scored`: mean of `RANDOM_DRAWS` draws, and their range.

    A moment with a score gets a random one in its place; UNKNOWN stays UNKNOWN. Whatever figure random scores reach as
    well tells nothing about the model.
    """
    generator = np.random.default_rng(seed)
    wanted, drawn = len(scored.alerts), []
    for _ in range(RANDOM_DRAWS if wanted else 0):
        chance = generator.random(len(scored.visit))
        chance[np.isnan(scored.probability)] = np.nan
        high = np.zeros(len(chance), dtype=bool)
        low, top = 0.0, 1.0
        for _ in range(20):  # the share of moments that gives this many alerts
            middle = (low + top) / 2
            trial = chance < middle
            if len(scored.starts(trial)) <= wanted:
                low, high = middle, trial
            else:
                top = middle
        other = scored.with_high(high, chance)
        figures = figures_of(totals(per_visit(other, windows)), windows)
        for w in windows if scored.stays.dated else ():
            figures[f"lead_hours_{w:g}h"] = (quartiles(lead_times(other, w)) or [float("nan")])[0]
        drawn.append(figures)
    out: dict[str, Any] = {}
    for name in drawn[0] if drawn else ():
        if not scored.stays.dated and (name.endswith("h") or name.startswith("late")):
            continue
        values = np.array([figures[name] for figures in drawn])
        values = values[np.isfinite(values)]
        out[name] = number(values.mean()) if len(values) else None
        out[f"{name}_range"] = [float(values.min()), float(values.max())] if len(values) else None
    return out


def beyond_chance(value: float | None, spread: list[float] | None) -> bool | None:
    """Is a figure of the model better than that of each random draw? None where there is nothing to compare."""
    return None if value is None or spread is None else value > spread[1]


def hours_of_day(scored: Scored) -> list[int]:
    """(24,) alerts by the hour of the day in which they start, in the time of the data."""
    hour = scored.time[scored.alerts] % (HOURS_PER_DAY * MICROSECONDS_PER_HOUR) // MICROSECONDS_PER_HOUR
    return np.bincount(hour, minlength=HOURS_PER_DAY).tolist()


def before_antibiotics(scored: Scored, first_antibiotic: np.ndarray, window: float) -> dict[str, Any]:
    """Of the septic visits that got an antibiotic: how many had an alert in the `window` hours before it, and how
    early. An alert after it tells the ward what it knows. Which antibiotic it is, the labels decide."""
    septic = scored.stays.septic & (first_antibiotic != NO_TIME)
    rows = scored.alerts[::-1]
    ahead = (first_antibiotic[scored.visit[rows]] - scored.time[rows]) / MICROSECONDS_PER_HOUR
    some = septic[scored.visit[rows]] & (ahead > 0) & (ahead <= window)
    lead = np.full(len(septic), np.nan)
    lead[scored.visit[rows[some]]] = ahead[some]
    return {
        "septic_visits_with_antibiotic": int(septic.sum()),
        "alerted_before": int((~np.isnan(lead)).sum()),
        "lead_hours": quartiles(lead),
        "window_hours": window,
    }


def at_alert_rates(
    scored: Scored, rates: Sequence[float] = BUDGETS, beds: int = 20, window: float = WINDOWS[-1]
) -> list[dict[str, Any]]:
    """One row an alert budget (alerts per 100 patient-days): the lowest threshold that keeps to it, and what it gives.

    A budget that is never used up shows the lowest score as its threshold. Thresholds that are the same stand once.
    """
    days = float(totals(per_visit(scored.with_high(np.zeros(len(scored.visit), dtype=bool)), ()))["days"])
    rows: list[dict[str, Any]] = []
    for rate in rates:
        threshold = scored.threshold_for(int(rate * days / 100))
        if not np.isfinite(threshold) or (rows and rows[-1]["threshold"] == threshold):
            continue
        other = scored.at_threshold(threshold)
        figures = figures_of(totals(per_visit(other, (window,))), (window,))
        row = {
            "budget": float(rate),
            "threshold": threshold,
            "alerts_per_100_patient_days": number(figures["alerts_per_100_patient_days"]),
            "alerts_a_day": number(figures["alerts_per_100_patient_days"] * beds / 100),
            "visits_alerted_per_100": number(figures["visits_alerted_per_100"]),
        }
        if scored.stays.dated:
            lead = quartiles(lead_times(other, window))
            row |= {"ppv": number(figures[f"ppv_{window:g}h"])}
            row |= {"sensitivity": number(figures[f"sensitivity_{window:g}h"])}
            row |= {"lead_hours": lead[0] if lead else None}
        else:
            row |= {"ppv": number(figures["visit_ppv"]), "sensitivity": number(figures["visit_sensitivity"])}
        rows.append(row)
    return rows


def left_out(scored: Scored) -> dict[str, int]:
    """Septic visits that no score could announce, and what was UNKNOWN."""
    visits = per_visit(scored, ())
    known = visits["moments"] - visits["unknown"] > 0
    out = {
        "visits that were UNKNOWN at each moment": int(
            (visits["visits"] > 0).sum() - (known & (visits["visits"] > 0)).sum()
        )
    }
    if scored.stays.dated:
        early = scored.stays.septic & (visits["visits"] > 0) & (visits["at_risk"] == 0)
        out["septic visits with onset at or before their first score"] = int(early.sum())
        unrecorded = scored.stays.septic & (visits["visits"] > 0) & (scored.stays.onset > scored.stays.end)
        out["septic visits with onset after the end of their record"] = int(unrecorded.sum())
        out[f"alerts later than {GRACE_HOURS:g} h after onset"] = int(visits["late"].sum())
    return {name: n for name, n in out.items() if n}
