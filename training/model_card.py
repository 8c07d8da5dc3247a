"""``models/MODEL_CARD.md``: what a trained model is for, what it learned from, how good it is and for whom.

The form follows Mitchell et al., Model Cards for Model Reporting, FAT* 2019, doi 10.1145/3287560.3287596.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from common.metrics import OperatingPoint, calibration_table, figures
from common.model_record import OUT_OF_SCOPE, intended_use, limits_of
from feature_pipeline import Config, FeaturePlan
from training.evidence import describe_evidence
from training.snapshots import TrainingData
from training.thresholds import describe_thresholds

AGE_BANDS = (0, 45, 65, 80, 131)
FEWEST_POSITIVE = 10  # visits; below, a group's figures say nothing


def groups_of(data: TrainingData) -> Iterator[tuple[str, str, np.ndarray]]:
    """(attribute, group, (n_snapshots,) bool) for age, sex and unit, where the observations have them."""
    for name in ("age", "sex", "unit_medical", "unit_surgical"):
        observed = zip(data.observations.codes, data.observations.concepts, strict=True)
        codes = [code for code, concept in observed if concept and concept.name == name]
        if not codes:
            continue
        columns = FeaturePlan([f"{code}__last" for code in codes]).evaluate(data.observations, data.visit, data.as_of)
        value = columns[:, 0]
        for other in columns.T[1:]:
            value = np.where(np.isnan(value), other, value)
        if name == "age":
            for low, high in pairwise(AGE_BANDS):
                shown = f"{low} to {high - 1}" if high < AGE_BANDS[-1] else f"{low} and older"
                yield "age", shown, (value >= low) & (value < high)
        else:
            for level in np.unique(value[~np.isnan(value)])[:6]:
                yield name.replace("_", " "), f"code {level:g}", value == level
        yield name.replace("_", " "), "not known", np.isnan(value)


def subgroup_rows(data: TrainingData, rows: np.ndarray, probability: np.ndarray, seed: int = 0) -> list[str]:
    """Lines of a Markdown table: figures of each group among the snapshots `rows` with their `probability`."""
    lines = ["| group | visits | positive | snapshots | positive | ROC AUC | average precision | expected / observed |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for attribute, group, member in groups_of(data):
        some = member[rows]
        label, p = data.label[rows][some], probability[some]
        visit, client = data.visit[rows][some], data.group[rows][some]
        if not some.any():
            continue
        positive = len(np.unique(visit[label == 1]))
        head = f"| {attribute}: {group} | {len(np.unique(visit)):,} | {positive:,} | {len(label):,} | {label.sum():,} |"
        if positive < FEWEST_POSITIVE or label.all():
            lines.append(f"{head} too few | | |")
            continue
        f = figures(label, p, client, visit, seed)
        auc, precision = (
            "{:.3f} ({:.3f} to {:.3f})".format(f[name], *f[f"{name}_95"]) for name in ("roc_auc", "average_precision")
        )
        lines.append(f"{head} {auc} | {precision} | {p.sum() / label.sum():.2f} |")
    return lines if len(lines) > 2 else ["The observations hold no age, sex or unit."]


def model_card(
    config: Config,
    version: str,
    facts: dict[str, Any],
    notices: Sequence[str],
    data: TrainingData,
    rows: np.ndarray,
    probability: np.ndarray,
    points: Sequence[OperatingPoint],
    basis: str,
) -> str:
    """The card, as Markdown. `probability` are predictions for the snapshots `rows` that the model did not learn from;
    `basis` says which."""
    calibration = calibration_table(data.label[rows], probability)
    lines = [
        f"# Model card: sepsis risk {version}",
        "",
        *(f"**{line}**\n" for line in notices),
        "## Intended use",
        "",
        f"{intended_use(config)} {OUT_OF_SCOPE}",
        "",
        "## Model and data",
        "",
        f"- {config.feature_set} with {config.model['name']}, {len(config.feature_names)} features of "
        f"{len(config.codes)} codes",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- split by {data.grouped_by}; snapshots every {config.snapshots.every_hours:g} h",
        f"- {describe_thresholds(config)}",
        "",
        "## Evidence",
        "",
        *(f"  {line}" if line.startswith("  ") else f"{line}\n" for line in describe_evidence(config)),
        "",
        f"## By group ({basis}; 95% intervals resampled by {data.grouped_by})",
        "",
        *subgroup_rows(data, rows, probability, config.seed),
        "",
        "## Calibration",
        "",
        "| snapshots | mean predicted | observed |",
        "|---|---|---|",
        *(f"| {r.n:,} | {r.mean_probability:.4f} | {r.observed_rate:.4f} |" for r in calibration.itertuples()),
        "",
        "## Operating points",
        "",
        "| threshold | sensitivity | specificity | PPV | visits alerted per 100 | septic visits alerted |",
        "|---|---|---|---|---|---|",
        *(
            f"| {p.threshold:.4f} | {p.sensitivity:.3f} | {p.specificity:.3f} | {p.ppv:.3f} | "
            f"{p.visits_alerted_per_100:.1f} | {p.septic_visits_alerted:.3f} |"
            for p in points
        ),
        "",
        "## Limits",
        "",
        *(f"- {line}" for line in limits_of(config)),
    ]
    return "\n".join(lines) + "\n"
