"""Versions of the deployed model: the archive, switching between them, comparing two on the same patients."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from artifacts import locked, write_atomic
from command_line import log
from feature_pipeline import BadConfig, ProductionPipeline, load_config
from metrics import compared
from pages import facts_table, frame_table, listing, page, paragraph
from training_data import make_training_data, settings_of

CONFIG = "best_model_config.json"
REPORTS = ("production_model_info.txt", "training_report.html", "MODEL_CARD.md")
DEPLOYED = ("best_model.pkl", "feature_names.json", *REPORTS, CONFIG)
TOLERANCE = 0.005  # of ROC AUC and average precision: a smaller loss is none


def archive_of(directory: Path, version: str) -> Path:
    """The folder of an archived version. Raises `BadConfig`."""
    folder = directory / "archive" / version
    if not version or Path(version).name != version or not (folder / CONFIG).is_file():
        raise BadConfig(f"no version {version!r} in {directory / 'archive'}; train_best_model.py --list shows them")
    return folder


def list_versions(directory: Path) -> list[dict[str, Any]]:
    """The archived versions, the latest first; ``deployed`` marks the one that is served."""
    try:
        current = load_config(directory / CONFIG).get("model_version")
    except BadConfig:
        current = None
    found = []
    for path in sorted((directory / "archive").glob(f"*/{CONFIG}"), reverse=True):
        try:
            config = load_config(path)
        except BadConfig as error:
            log.warning("warning: %s", error)
            continue
        scores = config.get("metrics", {}).get("out_of_fold", {})
        found.append(
            {
                "version": path.parent.name,
                "deployed": path.parent.name == current,
                "trained_at": config.get("trained_at"),
                "feature_set": config["feature_set"],
                "model": config["model"]["name"],
                "roc_auc": scores.get("roc_auc"),
                "average_precision": scores.get("average_precision"),
            }
        )
    return found


def switch(directory: Path, version: str) -> None:
    """Deploys an archived version: every file whole, the config last, so that whoever loads has one version or the
    other (see `ProductionPipeline`). Raises `BadConfig`, `BadModel` where the version is not fit to be served."""
    folder = archive_of(directory, version)
    ProductionPipeline(folder / CONFIG, folder / "best_model.pkl")
    with locked(directory / ".deploy.lock"):  # two that deploy at once must not mix their files
        for name in DEPLOYED:
            if (folder / name).is_file():
                write_atomic(directory / name, (folder / name).read_bytes())


# ------------------------------------------------------------------------------------------------ comparison


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
            "sensitivity is taken where": f"each model calls {self.alert_rate:.1%} of the snapshots",
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
    alert_rate: float = 0.05,
    seed: int = 0,
) -> Comparison:
    """Scores the same snapshots with two deployments (folders of config and model), each of which reads the
    observations in its own way, as it would in service.

    `observations` are what `read_observations` takes, `labels` what `read_labels` gives; the moments are those of the
    old one's reading and settings. The figures are honest only where neither has learned from these patients: that is
    for the caller to see to. Raises `BadConfig`, `BadModel`, `BadObservations`.
    """
    champion, challenger = (ProductionPipeline(folder / CONFIG, folder / "best_model.pkl") for folder in (old, new))
    data = make_training_data(champion.reproducer.read(observations), labels, settings_of(champion.config))
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
    figures = compared(label, *(p[usable] for p in probability), group, alert_rate, seed=seed)
    versions = champion.model_version, challenger.model_version
    return Comparison(*versions, figures, len(label), int(label.sum()), basis, alert_rate)


def fingerprint_of_files(*paths: str) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()
