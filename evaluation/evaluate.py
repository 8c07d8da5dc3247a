"""All figures of an evaluation, as one record that JSON can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.alerts import COOLDOWN_HOURS, GRACE_HOURS, WINDOWS, Judged, Scored, per_visit
from evaluation.alerts import at_alert_rates, before_antibiotics, beyond_chance, hours_of_day, left_out, random_alerts
from evaluation.calibration import by_hours, by_month, calibration, expected_over_observed_95, hours_since
from evaluation.comparators import (
    COMPARATORS,
    Ranked,
    compare_events,
    compare_with_ward_score,
    event_figures,
    number,
    paired,
)
from evaluation.net_benefit import best_ranges, decision_curve
from evaluation.resampling import Clients, ranking
from evaluation.scoring import Past, judged_of
from evaluation.subgroups import FEWEST_SEPTIC as FEWEST_SEPTIC_OF_GROUP
from evaluation.subgroups import FEWEST_VISITS, Groups, differences, group_table, members
from feature_pipeline import Config

FEWEST_SEPTIC = 20  # visits; below, the page says that its figures are uncertain


@dataclass(frozen=True)
class Settings:
    """What the ward decides: how long an alert is silent, how far ahead it counts, how many beds there are."""

    cooldown_hours: float = COOLDOWN_HOURS
    window_hours: float = WINDOWS[-1]
    beds: int = 20
    alerts_a_day: float | None = None
    seed: int = 0

    @property
    def windows(self) -> tuple[float, ...]:
        return tuple(sorted({*WINDOWS[:-1], self.window_hours}))


def evaluate(
    past: Past,
    scored: Scored,
    config: Config,
    settings: Settings,
    ward: tuple[dict[str, np.ndarray], dict[str, dict[str, float]]] | None = None,
    groups: Groups | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Figures of `scored`; `ward` are those of `ward_scores_of`, None for a live log, which has no observations."""
    stays, windows = scored.stays, settings.windows
    clients = Clients(stays.client, seed=settings.seed)
    judged = judged_of(scored, config)
    visit, label = scored.visit[judged.rows], judged.label
    client, p = stays.client[visit], scored.probability[judged.rows]
    tell("alerts")
    figures, _ = event_figures(scored, clients, windows)
    ours = Ranked.of(p, label, client, clients)
    record: dict[str, Any] = {
        "model": model_facts(config),
        "settings": asdict(settings) | {"windows": list(windows), "grace_hours": GRACE_HOURS},
        "data": data_facts(past.remarks, scored, judged),
        "cannot_be_said": cannot_be_said(scored, judged, past),
        "alerts": {
            "deployed": figures,
            "random": (chance := random_alerts(scored, windows, settings.seed)),
            "beyond_chance": {
                name: beyond_chance(figures.get(name), chance.get(f"{name}_range"))
                for name in (f"ppv_{settings.window_hours:g}h", f"sensitivity_{settings.window_hours:g}h")
                if name in figures
            },
            "hours_of_day": hours_of_day(scored),
            "left_out": left_out(scored),
        },
        "ranking": ours.figures() | {"curves": curves_of(ours)},
    }
    if past.first_antibiotic is not None:
        record["alerts"]["before_antibiotics"] = before_antibiotics(
            scored, past.first_antibiotic, settings.window_hours
        )
    tell("thresholds")
    record["thresholds"] = thresholds_section(scored, settings, config)
    scores, lacking = ward or ({}, {})
    silent = [name for name, score in scores.items() if np.isnan(score).all()]
    if silent:
        titles = ", ".join(COMPARATORS[name].title for name in silent)
        record["cannot_be_said"].append(f"No visit has an observation that these scores need: {titles}.")
    scores = {name: score for name, score in scores.items() if name not in silent}
    if scores:
        record["ward_scores"] = {}
        for name, score in scores.items():
            tell(COMPARATORS[name].title)
            theirs = Ranked.of(score[judged.rows], label, client, clients)
            record["ward_scores"][name] = {
                **compare_with_ward_score(name, scored, score, ours, theirs, clients, windows),
                "inputs_missing": lacking[name],
                "curves": curves_of(theirs),
            }
    tell("net benefit, calibration, groups")
    if 0 < label.sum() < len(label):
        tests = {
            name: np.nan_to_num(score[judged.rows], nan=-1.0) >= COMPARATORS[name].cut for name, score in scores.items()
        }
        curve = decision_curve(label, p, tests)
        record["net_benefit"] = {"curve": curve, "model_best_between": best_ranges(curve)}
    record["calibration"] = calibration(label, p) | {
        "expected_over_observed_95": expected_over_observed_95(label, p, client, clients),
        "by_month": by_month(label, p, scored.time[judged.rows], visit),
    }
    if not judged.retrospective:
        hours = hours_since(stays.start[visit], scored.time[judged.rows])
        record["calibration"]["by_hours"] = by_hours(label, p, hours, visit)
    if groups:
        record["groups"] = groups_section(scored, judged, groups, clients, settings)
    return record


def model_facts(config: Config) -> dict[str, Any]:
    return {
        "version": config.model_version or "unversioned",
        "feature_set": config.feature_set,
        "kind": config.model["name"],
        "features": len(config.feature_names),
        "trained_at": config.trained_at,
        "risk_thresholds": dict(config.risk_thresholds),
        "horizon_hours": config.snapshots.horizon_hours,
    }


def data_facts(remarks: Mapping[str, int], scored: Scored, judged: Judged) -> dict[str, Any]:
    visits = per_visit(scored, ())
    seen = visits["visits"] > 0
    return {
        "visits": int(seen.sum()),
        "clients": len(np.unique(scored.stays.client[seen])),
        "septic_visits": int((scored.stays.septic & seen).sum()),
        "patient_days": float(visits["days"].sum()),
        "moments": len(scored.visit),
        "unknown_moments": int(np.isnan(scored.probability).sum()),
        "judged_moments": len(judged.label),
        "positive_moments": int(judged.label.sum()),
        "left_out": dict(remarks),
    }


def cannot_be_said(scored: Scored, judged: Judged, past: Past) -> list[str]:
    """What these data do not tell, in whole sentences."""
    lines = []
    if judged.retrospective:
        lines.append(
            "The labels have no onset times. How early an alert comes, whether it comes within the window, and the "
            "figures by hours since admission are not known. An alert counts as right if its visit was septic at any "
            "time, and each visit is ranked once, by its last score: these figures are retrospective and flattering."
        )
    if not scored.stays.septic.any():
        lines.append("No visit was septic. Sensitivity, lead time, ROC AUC and calibration are not known.")
    elif (n := int(scored.stays.septic.sum())) < FEWEST_SEPTIC:
        lines.append(f"Only {n} visits were septic: each figure about sepsis has a wide interval.")
    if not len(scored.alerts):
        lines.append("No score reached the HIGH threshold. PPV is not known; see the thresholds below.")
    if past.first_antibiotic is None:
        lines.append(
            "The labels have no column antibiotic_time: whether alerts come before treatment starts is not known."
        )
    return lines


def curves_of(ranked: Ranked) -> dict[str, list[float]] | None:
    """Points of the ROC and precision-recall curves, thresholds descending."""
    true = np.cumsum(ranked.positive[0][::-1])
    false = np.cumsum(ranked.negative[0][::-1])
    if not true[-1] or not false[-1]:
        return None
    keep = true + false > 0
    return {
        "sensitivity": (true / true[-1])[keep].tolist(),
        "false_positive_rate": (false / false[-1])[keep].tolist(),
        "ppv": (true / np.maximum(true + false, 1))[keep].tolist(),
    }


def thresholds_section(scored: Scored, settings: Settings, config: Config) -> dict[str, Any]:
    """The table over alert budgets, and the answer to "the ward can answer N alerts a day"."""
    out: dict[str, Any] = {"table": at_alert_rates(scored, beds=settings.beds, window=settings.window_hours)}
    if settings.alerts_a_day is not None:
        rate = 100 * settings.alerts_a_day / settings.beds
        rows = at_alert_rates(scored, [rate], settings.beds, settings.window_hours)
        out["answer"] = rows[0] if rows else None
        if rows:
            high = significant(rows[0]["threshold"])
            medium = min(float(config.risk_thresholds["medium"]), high / 2)
            out["command"] = (
                f"python train_best_model.py --set-thresholds --risk-thresholds {significant(medium)},{high} "
                f'--reason "{settings.alerts_a_day:g} alerts a day, {settings.beds} beds"'
            )
    return out


def significant(value: float) -> float:
    """Rounded up to four digits, so that no more alerts follow than the table says."""
    if value <= 0:
        return value
    unit = 10.0 ** (np.floor(np.log10(value)) - 3)
    return float(f"{np.ceil(value / unit - 1e-9) * unit:.6g}")


def group_sums(scored: Scored, judged: Judged, settings: Settings) -> dict[str, np.ndarray]:
    """Sums of each visit under the names of `subgroups.MEASURES`."""
    w = settings.window_hours
    visits = per_visit(scored, (w,))
    n, row = len(scored.stays.start), scored.visit[judged.rows]
    p = scored.probability[judged.rows]
    known = ~np.isnan(p)
    out = {name: visits[name] for name in ("visits", "septic", "days", "alerts")}
    names = (f"true_{w:g}h", "judged", f"caught_{w:g}h", "at_risk")
    if judged.retrospective:
        names = ("septic_alerted", "alerted", "septic_alerted", "septic")
    out |= dict(zip(("true", "judged", "caught", "at_risk"), (visits[name] for name in names), strict=True))
    out["expected"] = np.bincount(row[known], p[known], minlength=n)
    out["observed"] = np.bincount(row[known], judged.label[known].astype(float), minlength=n)
    return out


def groups_section(
    scored: Scored, judged: Judged, groups: Groups, clients: Clients, settings: Settings
) -> dict[str, Any]:
    sums = group_sums(scored, judged, settings)
    found, table = differences(sums, groups, clients), group_table(sums, groups, clients)
    visit, p = scored.visit[judged.rows], scored.probability[judged.rows]
    for row, (_, _, member) in zip(table, members(groups), strict=True):
        if row.get("septic", 0) >= FEWEST_SEPTIC_OF_GROUP:
            some = member[visit]
            row["calibration"] = {k: v for k, v in calibration(judged.label[some], p[some]).items() if k != "curve"}
    return {
        "table": table,
        "differences": found,
        "beyond_chance": [row for row in found if row["exceeds_chance"]],
        "comparisons": len(found),
        "held_back_below": FEWEST_VISITS,
    }


def compare_versions(old: Scored, new: Scored, config: Config, settings: Settings) -> dict[str, Any]:
    """Two versions on the same moments: ranking, alerts at the thresholds of each, alerts at equal rate."""
    clients = Clients(old.stays.client, seed=settings.seed)
    judged = judged_of(old, config)
    client = old.stays.client[old.visit[judged.rows]]
    a, b = (Ranked.of(s.probability[judged.rows], judged.label, client, clients) for s in (new, old))
    rankings = [ranking(r.positive, r.negative) for r in (a, b)]
    threshold = new.threshold_for(len(old.alerts))
    return {
        "ranking": {"new": a.figures(), "old": b.figures()},
        "ranking_differences": {name: paired(rankings[0][name], rankings[1][name]) for name in rankings[0]},
        "own_thresholds": compare_events(new, old, clients, settings.windows),
        "equal_alerts": {
            "threshold": number(threshold),
            **compare_events(new.at_threshold(threshold), old, clients, settings.windows),
        },
    }


def side_by_side(scored: Scored, config: Config, groups: Groups, column: str, settings: Settings) -> dict[str, Any]:
    """Figures of the alerts, ranking and calibration of each value of a column of the groups; None for a small one."""
    out: dict[str, Any] = {}
    for _, name, member in members({column: groups[column]}):
        if int(member.sum()) < FEWEST_VISITS:
            out[name] = None
            continue
        part, _ = scored.some(member)
        judged, clients = judged_of(part, config), Clients(part.stays.client, seed=settings.seed)
        p = part.probability[judged.rows]
        client = part.stays.client[part.visit[judged.rows]]
        out[name] = {
            "data": data_facts({}, part, judged),
            "alerts": event_figures(part, clients, settings.windows)[0],
            "ranking": Ranked.of(p, judged.label, client, clients).figures(),
            "calibration": {k: v for k, v in calibration(judged.label, p).items() if k != "curve"},
        }
    return out
