"""The minimum of evidence: how well a model performs with fewer or older measurements, on the validation part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.metrics import ranking_scores
from feature_pipeline import (
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    Config,
    Feature,
    FeaturePlan,
    MinimumEvidence,
    Observations,
    ScoreModel,
    clinical_inputs,
)
from training.candidates import ModelConfiguration
from training.fitting import filled
from training.snapshots import VALIDATION, TrainingData
from training.trials import Search

VITAL_SIGNS = ("heart_rate", "respiratory_rate", "spo2", "temperature", "systolic_bp", "mean_bp", "diastolic_bp")
FEWEST_VITAL_SIGNS = 3  # with fewer in the data the most frequent inputs take their place
MOST_INPUTS = 8
COMMON = 0.5  # share of the snapshots that have an input of the minimum
WITHIN_HOURS = 24.0
STALE_HOURS = (2.0, 4.0, 6.0, 8.0, 12.0, 18.0, 24.0)
ORDINARY = 0.99
# A score is carried by evidence that keeps this share of what the ROC AUC is above chance, and whose expected over
# observed is within this factor of that with all evidence.
KEPT, OFF = 0.8, 1.5
MOST_SNAPSHOTS, SEPTIC_SHARE = 2000, 0.25


@dataclass(frozen=True)
class Inputs:
    """What the model looks at, but for static quantities: names of concepts, or codes without one."""

    names: list[str]
    of_code: np.ndarray  # (n_codes of the observations,) place in `names`, -1 for static and unused codes

    @classmethod
    def of(cls, observations: Observations, feature_names: Sequence[str]) -> Inputs:
        plan = FeaturePlan(feature_names)
        clinical = frozenset().union(*(clinical_inputs(name) for name in plan.clinical))
        names: dict[str, int] = {}
        places = []
        for code, concept in zip(observations.codes, observations.concepts, strict=True):
            used = code in set(plan.codes) or (concept is not None and concept.name in clinical)
            name = concept.name if concept else code
            static = concept is not None and concept.static
            places.append(names.setdefault(name, len(names)) if used and not static else -1)
        return cls(list(names), np.array(places))

    def ages(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> np.ndarray:
        """(n_snapshots, n_inputs) hours since each input was measured; infinite for never."""
        codes = np.flatnonzero(self.of_code >= 0)
        plan = FeaturePlan([str(Feature("recency", "age", observations.codes[i])) for i in codes])
        ages = plan.evaluate(observations, visit, as_of)
        out = np.full((len(visit), len(self.names)), np.inf)
        for column, code in zip(ages.T, codes, strict=True):
            place = self.of_code[code]
            out[:, place] = np.fmin(out[:, place], column)
        return out


def enough(minimum: MinimumEvidence, data: TrainingData, feature_names: Sequence[str]) -> np.ndarray:
    """(n_snapshots,) does each have the minimum of evidence?"""
    inputs = Inputs.of(data.observations, feature_names)
    ages = inputs.ages(data.observations, data.visit, data.as_of)
    known = ages[:, [inputs.names.index(name) for name in minimum.inputs if name in inputs.names]]
    recent = known.min(axis=1, initial=np.inf) <= minimum.newest_hours
    has_inputs = ((known < minimum.within_hours) & recent[:, None]).sum(axis=1) >= minimum.at_least
    return has_inputs & (ages.min(axis=1, initial=np.inf) <= minimum.newest_hours)


def alone(data: TrainingData, rows: np.ndarray, hours: float = 0.0) -> Observations:
    """Each of the snapshots `rows` as a visit of its own, with what had been observed `hours` before its moment."""
    o = data.observations
    begin, end = (o.group_start[o.visit_group_start[data.visit[rows] + k]] for k in (0, 1))
    number = end - begin
    snapshot = np.repeat(np.arange(len(rows)), number)
    row = np.arange(len(snapshot)) + np.repeat(begin - np.cumsum(number) + number, number)
    before = data.as_of[rows] - round(hours * MICROSECONDS_PER_HOUR)
    kept = o.time[row] <= before[snapshot]
    snapshot, row = snapshot[kept], row[kept]
    code = np.repeat(o.group_code, np.diff(o.group_start))[row]
    columns = {name: getattr(o, name)[row] for name in ("time", "value", "low", "high")}
    return Observations.of_rows([(i, i) for i in range(len(rows))], o.codes, o.concepts, snapshot, code, columns)


def measure_evidence(
    search: Search, feature_set: str, configuration: ModelConfiguration, model: ScoreModel
) -> tuple[MinimumEvidence, list[dict[str, Any]]]:
    """(the minimum of evidence, how `model` does with less), which is fitted on the training part only.

    Measured on snapshots of the validation part: with all inputs of the minimum (the vital signs) hidden but for
    0, 1, 2, ... of them at random, with everything else known and hidden; and with nothing new for some hours. The
    minimum asks for half of its inputs or more.
    """
    data, columns = search.data, search.columns(feature_set)
    names = [search.names[i] for i in columns]
    generator = np.random.default_rng([search.seed, 3])
    rows, weights = [], []
    for label, share in ((1, SEPTIC_SHARE), (0, 1 - SEPTIC_SHARE)):
        some = np.flatnonzero((search.part == VALIDATION) & (data.label == label))
        drawn = generator.permutation(some)[: int(MOST_SNAPSHOTS * share)]
        rows.append(drawn)
        weights.append(np.full(len(drawn), len(some) / len(drawn)))
    rows, weights = np.concatenate(rows), np.concatenate(weights)
    label, as_of, visit = data.label[rows], data.as_of[rows], np.arange(len(rows))
    plan, whole = FeaturePlan(names), alone(data, rows)
    inputs = Inputs.of(whole, names)
    common = (inputs.ages(whole, visit, as_of) < WITHIN_HOURS).mean(axis=0)
    chosen = [n for n in VITAL_SIGNS if n in inputs.names and common[inputs.names.index(n)] >= COMMON]
    if len(chosen) < FEWEST_VITAL_SIGNS:
        chosen = [inputs.names[i] for i in np.argsort(-common, kind="stable")[:MOST_INPUTS] if common[i] >= COMMON]
    place = np.full(len(inputs.names) + 1, -1)
    place[[inputs.names.index(name) for name in chosen]] = np.arange(len(chosen))
    measured: list[dict[str, Any]] = []

    def add(observations: Observations, **what: Any) -> None:
        usable = observations.first_time != NO_TIME
        if not 0 < label[usable].sum() < usable.sum():
            return
        features = plan.evaluate(observations, visit[usable], as_of[usable])
        probability = model.probability(filled(features, configuration.fill_value))
        expected, observed = (float((weights[usable] * v).sum()) for v in (probability, label[usable]))
        auc = ranking_scores(label[usable], probability)["roc_auc"]
        measured.append({**what, "roc_auc": round(auc, 4), "expected_over_observed": round(expected / observed, 3)})

    def vital_signs(k: int, others: bool) -> str:
        return f"{k} of {len(chosen)} inputs, {'all' if others else 'no'} others"

    def carries(row: dict[str, Any]) -> bool:
        ratio = row["expected_over_observed"] / measured[0]["expected_over_observed"]
        return row["roc_auc"] - 0.5 >= KEPT * (measured[0]["roc_auc"] - 0.5) and 1 / OFF <= ratio <= OFF

    add(whole, evidence="all")
    rank = generator.random((len(rows), len(chosen))).argsort(axis=1)
    input_of_group = inputs.of_code[whole.group_code]  # -1, the last of `place`, for what is never hidden
    place_of_group = place[input_of_group]
    hidden_rank = np.where(place_of_group >= 0, rank[whole.group_visit, place_of_group], -1)
    for others in (True, False):
        other = (input_of_group >= 0) & (place_of_group < 0) & (not others)
        for k in range(len(chosen), -1, -1):
            add(whole.without(other | (hidden_rank >= k)), evidence=vital_signs(k, others))
    for hours in STALE_HOURS:
        add(alone(data, rows, hours), evidence=f"nothing new for {hours:g} h")
    by_name = {row["evidence"]: row for row in measured}
    at_least = len(chosen)
    while at_least > (len(chosen) + 1) // 2 and carries(by_name[vital_signs(at_least - 1, True)]):
        at_least -= 1
    # never stricter than nearly all of the snapshots that the model has learned from
    age = inputs.ages(whole, visit, as_of)[:, [inputs.names.index(name) for name in chosen]].min(axis=1, initial=np.inf)
    newest = float(np.ceil(np.quantile(age[np.isfinite(age)], ORDINARY))) if np.isfinite(age).any() else STALE_HOURS[0]
    for hours in STALE_HOURS:
        row = by_name.get(f"nothing new for {hours:g} h")
        if row is None or not carries(row):
            break
        newest = max(newest, hours)
    newest = max(newest, STALE_HOURS[0])
    return MinimumEvidence(chosen, at_least, WITHIN_HOURS, min(newest, WITHIN_HOURS) if chosen else newest), measured


def describe_evidence(config: Config) -> list[str]:
    """Lines of the reports."""
    minimum = config.minimum_evidence
    if minimum is None:
        return []
    lines = [
        f"Minimum of evidence: {minimum.at_least} of {', '.join(minimum.inputs) or 'nothing'} within "
        f"{minimum.within_hours:g} h, the newest of them at most {minimum.newest_hours:g} h old.",
        "With less evidence, on the validation part (ROC AUC, expected over observed):",
    ]
    rows = config.metrics.get("evidence", [])
    return lines + [f"  {r['evidence']:<36s} {r['roc_auc']:.3f}  {r['expected_over_observed']:.2f}" for r in rows]
