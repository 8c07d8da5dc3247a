"""Compares two versions on the same patients, and decides which may be promoted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.artifacts import write_atomic
from common.labels import read_labels
from common.metrics import compared
from common.pages import facts_table, frame_table, listing, page, paragraph
from feature_pipeline import (
    BadConfig,
    ProductionPipeline,
    load_config,
)
from training.snapshots import learned_clients, make_training_data
from training.versions import CONFIG, archive_of, switch


def compare_and_promote(
    directory: Path, version: str, observations: str | None, labels: str | None, promote: bool, force: bool
) -> tuple[list[str], bool]:
    """The deployed version and an archived one on labelled patients that neither has learned from.

    Clients whom one of the two was trained on would flatter it and are left out. With `promote` the archived version
    is deployed if it is not worse, or with `force`. Gives lines for a person, and False where it was not promoted.
    """
    folder = archive_of(directory, version)
    if not (observations and labels):
        raise BadConfig("--compare and --promote need --observations and --labels of patients that neither has seen")
    config, known = load_config(directory / CONFIG), read_labels(labels)
    for trained in (config, load_config(folder / CONFIG)):
        known = known[~known["client"].isin(learned_clients(trained))]
        if known.empty:
            raise BadConfig(f"model {trained.model_version} was trained on these patients; compare on others")
    comparison = compare(directory, folder, observations, known, "patients of --observations")
    decision = comparison.decision(force) if promote else "compared"
    write_atomic(directory / "comparison.html", comparison.html(decision))
    if not promote:
        return comparison.lines(), True
    if comparison.objections and not force:
        return [*comparison.lines(), REFUSED], False
    switch(directory, version)
    return [*comparison.lines(), f"{decision}: model {version}"], True


REFUSED = "not promoted: the new model is worse; --force promotes it all the same"


TOLERANCE = 0.005  # of ROC AUC and average precision: a smaller loss is none


@dataclass(frozen=True)
class Comparison:
    """Two versions on the same held-out patients."""

    old_version: str
    new_version: str
    figures: dict[str, dict[str, float]]  # see metrics.compared
    n_snapshots: int
    n_positive: int
    basis: str
    alert_rate: float

    @property
    def objections(self) -> list[str]:
        """Why the new version is worse; empty where it is not.

        Worse means: a loss of ROC AUC or average precision beyond `TOLERANCE`, or in any figure one beyond chance.
        """
        worse = {name: f["high"] < 0 for name, f in self.figures.items()}
        worse["brier"] = self.figures["brier"]["low"] > 0  # the lower the better
        for name in ("roc_auc", "average_precision"):
            worse[name] |= self.figures[name]["difference"] < -TOLERANCE
        return [
            f"{name.replace('_', ' ')} {f['new']:.4f} against {f['old']:.4f} "
            f"(difference {f['difference']:+.4f}, 95% {f['low']:+.4f} to {f['high']:+.4f})"
            for name, f in self.figures.items()
            if worse[name]
        ]

    def decision(self, force: bool) -> str:
        """Whether the new version is to be deployed."""
        return "promoted" if not self.objections else "promoted by --force" if force else "not promoted"

    def lines(self) -> list[str]:
        return [
            f"{self.new_version} against {self.old_version}, {self.basis}: {self.n_snapshots:,} snapshots, "
            f"{self.n_positive:,} positive",
            *(
                f"  {name.replace('_', ' '):<18s} {f['old']:.4f} -> {f['new']:.4f}  difference {f['difference']:+.4f} "
                f"(95% {f['low']:+.4f} to {f['high']:+.4f})"
                for name, f in self.figures.items()
            ),
            *(f"  worse: {text}" for text in self.objections),
        ]

    def html(self, decision: str) -> str:
        table = pd.DataFrame([{"figure": name.replace("_", " "), **f} for name, f in self.figures.items()])
        facts = {
            "old": self.old_version,
            "new": self.new_version,
            "patients": self.basis,
            "snapshots": f"{self.n_snapshots:,}, {self.n_positive:,} positive",
            "sensitivity is taken where": f"each model alerts on {self.alert_rate:.1%} of the snapshots",
            "decision": decision,
        }
        explained = "Differences are new minus old; intervals are paired, 95%, resampled by client."
        worse = [paragraph("The new model is worse:"), listing(self.objections)] if self.objections else []
        return page("Champion and challenger", [], facts_table(facts), *worse, frame_table(table), paragraph(explained))


def compare(
    old: Path,
    new: Path,
    observations: Any,
    labels: pd.DataFrame,
    basis: str,
    seed: int = 0,
) -> Comparison:
    """Scores the same snapshots with two deployments (folders of config and model), each of which reads the
    observations in its own way, as it would in service.

    `observations` are what `read_observations` takes, `labels` what `read_labels` gives. The moments are those of the
    old one's reading and settings; sensitivity is compared at the share of snapshots that the old one calls HIGH. The
    figures are honest only if neither has learned from these patients, which the caller has to ensure. Raises
    `BadConfig`, `BadModel`, `BadObservations`.
    """
    champion, challenger = (ProductionPipeline(folder / CONFIG, folder / "best_model.pkl") for folder in (old, new))
    data = make_training_data(champion.reproducer.read(observations).check_usable(), labels, champion.config.snapshots)
    read = challenger.reproducer.read(observations)
    keys, place = data.observations.keys(), {key: i for i, key in enumerate(read.keys())}
    visit = np.array([place[key] for key in keys], dtype=np.int64)[data.visit]
    probability = [
        champion.score(data.observations, data.visit, data.as_of),
        challenger.score(read, visit, data.as_of),
    ]
    usable = ~np.isnan(probability[0]) & ~np.isnan(probability[1])
    label, group = data.label[usable], data.group[usable]
    if not 0 < label.sum() < len(label):
        raise BadConfig("the held-out patients are all septic or all not: nothing can be compared; give more data")
    high = (probability[0][usable] >= champion.config.risk_thresholds["high"]).mean()
    alert_rate = max(float(high), 1 / len(label))
    figures = compared(label, *(p[usable] for p in probability), group, alert_rate, seed=seed)
    versions = champion.model_version, challenger.model_version
    return Comparison(*versions, figures, len(label), int(label.sum()), basis, alert_rate)
