"""Live scores joined to outcomes, and a stop rule that was written down before the start.

`stop_rule.toml` names one figure, one bound and a number of septic visits for each rule::

    [[stop]]
    figure = "ppv"          # one of `FIGURES`
    at_least = 0.02         # or at_most
    septic_visits = 50      # over the latest visits, as many as hold so many septic ones
    window_hours = 48       # of ppv and sensitivity; 48 if not given

A rule is judged once there are so many septic visits with an outcome; before that, the rule has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.alerts import COOLDOWN_HOURS, WINDOWS, Scored, Stays, figures_of, judged_moments, per_visit, totals
from common.artifacts import read_toml
from common.metrics import ranking_scores
from common.pseudonyms import Pseudonyms
from feature_pipeline import NO_TIME, BadConfig, BadObservations, Config, listed

FIGURES = {
    "ppv": "PPV of an alert",
    "sensitivity": "share of septic visits alerted before onset",
    "alerts_per_100_patient_days": "alerts per 100 patient-days",
    "roc_auc": "ROC AUC",
    "expected_over_observed": "expected over observed",
    "unknown_share": "share of UNKNOWN scores",
}


def live_scores(
    rows: pd.DataFrame, labels: pd.DataFrame, pseudonyms: Pseudonyms, cooldown_hours: float = COOLDOWN_HOURS
) -> tuple[Scored, dict[str, int]]:
    """(the scores of one model version in the prediction log, what was left out).

    `rows` are of the table `predictions`; `labels` those of `read_labels`. Only visits with an outcome are judged. A
    visit is followed from its first to its last score. Raises `BadObservations` if no visit has an outcome.
    """
    left_out: dict[str, int] = {}
    table = labels[labels["sepsis"] >= 0].drop_duplicates(["client", "visit_id"], keep="last")
    septic, onset = table["sepsis"].to_numpy() == 1, table["sepsis_onset"].to_numpy()
    if (onset[septic] != NO_TIME).any():
        undated = septic & (onset == NO_TIME)
        if undated.any():
            left_out["septic visits without a date of onset"] = int(undated.sum())
        table, septic, onset = table[~undated], septic[~undated], onset[~undated]
    names = [pseudonyms.visit(c, v) for c, v in zip(table["client"], table["visit_id"], strict=True)]
    place = {name: i for i, name in enumerate(names)}
    own = np.array([place.get(name, -1) for name in rows["visit"]], dtype=np.int64)
    known = (own >= 0) & rows["as_of"].notna().to_numpy()
    if (n := int(rows["visit"][own < 0].nunique())) > 0:
        left_out["visits of the log without an outcome"] = n
    if (n := int(((own >= 0) & ~known).sum())) > 0:
        left_out["scores of the log without a moment"] = n
    if not known.any():
        raise BadObservations("no score of the log has an outcome in the labels; is the pseudonym key the same?")
    time = rows["as_of"].to_numpy().astype("datetime64[us]").astype(np.int64)[known]
    seen, visit = np.unique(own[known], return_inverse=True)
    start, end = np.full(len(seen), np.iinfo(np.int64).max), np.full(len(seen), NO_TIME)
    np.minimum.at(start, visit, time)
    np.maximum.at(end, visit, time)
    client = pd.factorize(table["client"].to_numpy()[seen])[0]
    stays = Stays(client, start, end, septic[seen], np.where(septic, onset, NO_TIME)[seen])
    probability = rows["score"].to_numpy(dtype=np.float64)[known]
    high = (rows["risk_level"] == "HIGH").to_numpy()[known]
    return Scored.of(stays, visit, time, probability, high, cooldown_hours), left_out


@dataclass(frozen=True)
class Rule:
    figure: str
    at_least: float | None
    at_most: float | None
    septic_visits: int
    window_hours: float

    def text(self) -> str:
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return f"{FIGURES[self.figure]} {bound} over {self.septic_visits} septic visits"


def read_stop_rule(path: str | Path) -> list[Rule]:
    """The rules of a file. Raises `BadConfig`, which names the file and the rule."""
    where = f"stop rule {str(path)!r}"
    content = read_toml(path, "stop rule")
    rules = content.get("stop")
    if set(content) != {"stop"} or not isinstance(rules, list) or not rules:
        raise BadConfig(f"{where}: expected one or more [[stop]] with figure, at_least or at_most, septic_visits")
    return [_rule(f"{where}, rule {i}", rule) for i, rule in enumerate(rules, 1)]


def _rule(where: str, rule: Any) -> Rule:
    allowed = ("figure", "at_least", "at_most", "septic_visits", "window_hours")
    if not isinstance(rule, dict) or (unknown := sorted(set(rule) - set(allowed))):
        raise BadConfig(f"{where}: unknown {listed(unknown) if isinstance(rule, dict) else 'form'}; known: {allowed}")
    if rule.get("figure") not in FIGURES:
        raise BadConfig(f"{where}: figure must be one of {', '.join(FIGURES)}")
    bounds = [rule.get(name) for name in ("at_least", "at_most")]
    if sum(bound is not None for bound in bounds) != 1 or not all(b is None or _is_number(b) for b in bounds):
        raise BadConfig(f"{where}: expected one number, at_least or at_most")
    visits, window = rule.get("septic_visits"), rule.get("window_hours", WINDOWS[-1])
    if not isinstance(visits, int) or isinstance(visits, bool) or visits < 1:
        raise BadConfig(f"{where}: septic_visits must be a whole number from 1")
    if not _is_number(window) or window <= 0:
        raise BadConfig(f"{where}: window_hours must be a number above 0")
    return Rule(rule["figure"], *bounds, visits, float(window))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def figure_of(scored: Scored, name: str, window_hours: float, horizon_hours: float, after_onset: bool) -> float:
    """One of `FIGURES`; NaN where the scores do not tell it."""
    if name in ("roc_auc", "expected_over_observed"):
        judged = judged_moments(scored, horizon_hours, after_onset)
        p = scored.probability[judged.rows]
        label, p = judged.label[~np.isnan(p)], p[~np.isnan(p)]
        if not 0 < label.sum() < len(label):
            return float("nan")
        return ranking_scores(label, p)["roc_auc"] if name == "roc_auc" else float(p.sum() / label.sum())
    found = figures_of(totals(per_visit(scored, (window_hours,))), (window_hours,))
    if name in ("ppv", "sensitivity"):
        return found[f"{name}_{window_hours:g}h" if scored.stays.dated else f"visit_{name}"]
    return found[name]


def judge(rules: Sequence[Rule], scored: Scored, config: Config) -> list[dict[str, Any]]:
    """For each rule its ``state`` ("holds", "stop" or "not judged"), the value and a line of text."""
    snapshots, stays = config.snapshots, scored.stays
    newest_first = np.argsort(-stays.start, kind="stable")
    septic_so_far = np.cumsum(stays.septic[newest_first])
    out = []
    for rule in rules:
        row = {"figure": rule.figure, "rule": rule.text(), "value": None, "septic_visits": int(stays.septic.sum())}
        if row["septic_visits"] < rule.septic_visits:
            text = f"not judged: {rule.text()}; so far {row['septic_visits']}"
            out.append(row | {"state": "not judged", "text": text})
            continue
        member = np.zeros(len(stays.start), dtype=bool)
        member[newest_first[: np.searchsorted(septic_so_far, rule.septic_visits) + 1]] = True
        part, _ = scored.some(member)
        value = figure_of(part, rule.figure, rule.window_hours, snapshots.horizon_hours, snapshots.after_onset)
        if np.isnan(value):
            out.append(row | {"state": "not judged", "text": f"not judged: {rule.text()}; these visits do not tell it"})
            continue
        broken = value < rule.at_least if rule.at_least is not None else value > rule.at_most
        state = "stop" if broken else "holds"
        text = f"{'STOP' if broken else 'holds'}: {rule.text()}; it is {value:.4g}"
        out.append(row | {"value": float(value), "state": state, "text": text})
    return out
