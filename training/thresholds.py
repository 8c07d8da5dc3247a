"""Risk thresholds: from the alerts that a ward can answer, or as given; set at the search, or later without training.

An alert is a visit that reaches HIGH. Only the scores of a visit before onset or its end count, by models that were not
trained on the visit.
"""

from __future__ import annotations

import argparse
import getpass
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from feature_pipeline import NO_TIME, BadConfig, Config, load_config
from training.snapshots import DAY, TrainingData
from training.versions import CONFIG, MODEL, NAMES, REPORTS, archive_of, deploy, new_version

STEP = 0.5  # of the budgets in the curves
BUDGETS = ("alert_budget", "alerts_per_100_patient_days")
FIXED = "risk_thresholds"


@dataclass(frozen=True)
class Rule:
    """How thresholds are chosen: `kind` is one of BUDGETS, or FIXED, where `high` and `medium` are probabilities."""

    kind: str = "alert_budget"
    high: float = 10.0
    medium: float = 30.0

    @classmethod
    def of(cls, config: Config) -> Rule:
        """The rule by which the config's thresholds were chosen."""
        return cls(**{key: config.thresholds[key] for key in ("kind", "high", "medium")})

    def __str__(self) -> str:
        what = {
            "alert_budget": f"HIGH is reached by {self.high:g} of 100 visits, MEDIUM by {self.medium:g}",
            "alerts_per_100_patient_days": f"{self.high:g} alerts in 100 patient-days, MEDIUM {self.medium:g}",
            FIXED: "as given",
        }
        return what[self.kind]


def budget(text: str) -> tuple[float, float]:
    """`10,30` as a pair: HIGH is rarer than MEDIUM."""
    high, medium = (float(part) for part in text.split(","))
    if not STEP <= high < medium <= 100:
        raise argparse.ArgumentTypeError(f"{text}: expected HIGH,MEDIUM with {STEP} <= HIGH < MEDIUM <= 100")
    return high, medium


def probabilities(text: str) -> tuple[float, float]:
    """`0.4,0.7` as a pair."""
    medium, high = (float(part) for part in text.split(","))
    if not 0 < medium < high < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected MEDIUM,HIGH with 0 < MEDIUM < HIGH < 1")
    return high, medium


def add_threshold_options(parser: argparse.ArgumentParser) -> None:
    default = Rule()
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--alert-budget",
        type=budget,
        metavar="HIGH,MEDIUM",
        help=f"visits of 100 that ever reach each level ({default.high:g},{default.medium:g} if no option is given)",
    )
    one.add_argument(
        "--alerts-per-100-patient-days",
        type=budget,
        metavar="HIGH,MEDIUM",
        help="alerts of each level; a visit that reaches the level several times in a day counts once that day",
    )
    one.add_argument(
        "--risk-thresholds", type=probabilities, metavar="MEDIUM,HIGH", help="fixed probabilities, such as 0.4,0.7"
    )
    parser.add_argument("--reason", default="", metavar="TEXT", help="why these thresholds; kept in the config")


def rule_of(arguments: argparse.Namespace) -> Rule | None:
    """The rule that was asked for at the shell."""
    for kind in (*BUDGETS, FIXED):
        if (pair := getattr(arguments, kind)) is not None:
            return Rule(kind, *pair)
    return None


def alert_curves(
    data: TrainingData, rows: np.ndarray, probability: np.ndarray, known: np.ndarray | None = None
) -> dict[str, list[float]]:
    """For each kind of budget the lowest threshold that keeps within it: for 0.5, 1, 1.5, ... 100.

    `probability` is of the snapshots `rows`, made without learning from their visits; `known` says which of them have
    the evidence for a score.
    """
    visit, as_of, onset = data.visit[rows], data.as_of[rows], data.onset[rows]
    elapsed = as_of - data.observations.first_time[visit]
    counts = (onset == NO_TIME) | (as_of <= onset)
    n_visits = len(np.unique(visit))
    last = np.zeros(data.observations.n_visits, dtype=np.int64)
    np.maximum.at(last, visit[counts], elapsed[counts])
    if known is not None:
        counts &= known
    probability, visit, day = probability[counts], visit[counts], elapsed[counts] // DAY
    totals = {"alert_budget": n_visits, "alerts_per_100_patient_days": last.sum() / DAY}
    keys = {"alert_budget": visit, "alerts_per_100_patient_days": visit * (day.max(initial=0) + 1) + day}
    budgets = np.arange(STEP, 100 + STEP / 2, STEP)
    curves = {}
    for kind in BUDGETS:
        _, own = np.unique(keys[kind], return_inverse=True)
        highest = np.zeros(own.max(initial=-1) + 1)
        np.maximum.at(highest, own, probability)
        # the next to alert, were the budget larger, stays just below the threshold
        next_one = np.append(np.sort(highest)[::-1], 0.0)
        place = np.minimum((budgets * totals[kind] / 100 + 1e-9).astype(int), len(highest))
        curves[kind] = np.nextafter(next_one[place], 1.0).tolist()
    return curves


def with_thresholds(
    config: Config, rule: Rule, curves: dict[str, list[float]], reason: str | None = None, set_now: bool = True
) -> Config:
    """The config with thresholds by `rule`; with `set_now` also who set the rule, when and why.

    The decision threshold is HIGH's unless it was chosen for a sensitivity.
    """
    if rule.kind == FIXED:
        high, medium = rule.high, rule.medium
    else:
        high, medium = (curves[rule.kind][int(b / STEP + 1e-9) - 1] for b in (rule.high, rule.medium))
        high = min(max(high, np.nextafter(medium, 1.0)), 1 - 1e-12)  # of a constant score both are the same
        medium = float(max(min(medium, np.nextafter(high, 0.0)), 1e-12))
    thresholds = {**config.thresholds, "kind": rule.kind, "high": rule.high, "medium": rule.medium, "curves": curves}
    if set_now:
        thresholds |= {"by": user(), "at": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason or ""}
    return replace(
        config,
        risk_thresholds={"medium": medium, "high": float(high)},
        decision_threshold=float(high) if config.decision_sensitivity is None else config.decision_threshold,
        thresholds=thresholds,
    )


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return "unknown"


def describe_thresholds(config: Config) -> str:
    """The line of the reports on the levels."""
    levels, how = config.risk_thresholds, config.thresholds
    reason = f": {how['reason']}" if how["reason"] else ""
    return (
        f"Risk levels: MEDIUM from {levels['medium']:.4g}, HIGH (alert) from {levels['high']:.4g} "
        f"({Rule.of(config)}; set by {how['by']}, {how['at']}{reason}); "
        f"decision threshold {config.decision_threshold:.4g}"
    )


def set_thresholds(directory: Path, rule: Rule, reason: str) -> tuple[str, str]:
    """Deploys the model that is deployed as a new version with other thresholds. Gives the version, and the
    thresholds in words.

    Raises `BadConfig` where no version is deployed.
    """
    old = load_config(directory / CONFIG)
    if old.model_version is None:
        raise BadConfig(f"no model is deployed in {directory}; run train_best_model.py --full first")
    folder = archive_of(directory, old.model_version)
    version = new_version(directory / "archive")
    config = replace(with_thresholds(old, rule, old.thresholds["curves"], reason), model_version=version)
    files: dict[str, Any] = {name: (folder / name).read_bytes() for name in (MODEL, NAMES)}
    for name in REPORTS:
        text = (folder / name).read_text().replace(describe_thresholds(old), describe_thresholds(config))
        files[name] = text.replace(old.model_version, version)
    deploy(directory, version, {**files, CONFIG: config.text()})
    return version, describe_thresholds(config)
