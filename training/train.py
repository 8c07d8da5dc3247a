"""Fits the winner of the search, archives it as a version, deploys it."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from common.artifacts import library_versions, write_atomic, write_json
from common.command_line import log
from common.metrics import describe_figures, figures, operating_points, threshold_for_sensitivity
from feature_pipeline import (
    MICROSECONDS_PER_HOUR,
    Config,
    FeaturePlan,
    ScoreModel,
    describe_set_aside,
    load_config,
    names_sha256,
)
from monitoring.profile import MOST_SNAPSHOTS, Scored, make_profile
from training.candidates import ModelConfiguration
from training.config import configuration_of, load_data
from training.evidence import enough
from training.fitting import FeatureTable, calibrated, cross_validate, filled, fit_model
from training.model_card import model_card
from training.report import info_text, report_page
from training.snapshots import TEST, TrainingData, split_parts
from training.thresholds import Rule, alert_curves, with_thresholds
from training.versions import CARD, CONFIG, INFO, MODEL, NAMES, REPORT, deploy, new_version

GOLDEN_RATIO = 0.6180339887


@dataclass(frozen=True)
class Material:
    """What a model is trained with."""

    config: Config
    configuration: ModelConfiguration
    data: TrainingData
    table: FeatureTable
    seed: int
    jobs: int
    facts: dict[str, Any]  # for the reports

    def fit(self, rows: np.ndarray) -> tuple[ScoreModel, np.ndarray]:
        """(model fitted on the snapshots `rows`, calibrated out-of-fold; the out-of-fold probabilities of these)."""
        columns = np.arange(len(self.table.plain))
        whole = joblib.delayed(fit_model)(self.configuration, self.table, rows, columns, self.data.label, self.seed)
        [out_of_fold], [model] = cross_validate(
            [(self.configuration, columns)], self.table, self.data, rows, seed=self.seed, jobs=self.jobs, also=[whole]
        )
        probability = calibrated(model, out_of_fold, self.data.label[rows])
        self.facts["Calibration"] = f"log-odds x {model.slope:.3f} {model.intercept:+.3f} (Platt, out-of-fold)"
        return model, probability

    def figures(self, rows: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
        data = self.data
        return figures(data.label[rows], probability, data.group[rows], data.visit[rows], self.seed)

    def add_figures(self, name: str, scores: dict[str, Any]) -> None:
        self.facts.update({f"{name}: {key}": text for key, text in describe_figures(scores).items()})


def prepare(
    directory: Path, observations: str | None, labels: str | None, seed: int | None = None, jobs: int = 1
) -> Material:
    """Reads the config of `directory` and the data that it names, or those named here."""
    config = load_config(directory / CONFIG)
    configuration = configuration_of(config)
    data = load_data(config, observations, labels)
    seed = config.seed if seed is None else seed
    for line in [*data.notices(), data.describe()]:
        log.info("%s", line)
    hidden = any(member.get("hide_codes") for member in configuration.members)
    table = FeatureTable.of(data, config.feature_names, seed, hidden=hidden)
    facts: dict[str, Any] = {
        "Trained at": datetime.now(UTC).isoformat(timespec="seconds"),
        "Data": data.describe(),
        "Data fingerprint": data.fingerprint[:16],
    }
    if data.observations.set_aside:
        facts["Set aside"] = describe_set_aside(data.observations)
    return Material(config, configuration, data, table, seed, jobs, facts)


def train_holdout(directory: Path, observations: str | None = None, labels: str | None = None, **settings: Any) -> str:
    """Trains without the test part and reports its figures there; deploys nothing. Gives a text for a person."""
    material = prepare(directory, observations, labels, **settings)
    data, config = material.data, material.config
    part = split_parts(data, seed=config.seed)  # the search's own parts, whatever the model's seed
    model, _ = material.fit(np.flatnonzero(part != TEST))
    rows = np.flatnonzero(part == TEST)
    columns = np.arange(len(material.table.plain))
    probability = model.probability(material.table.rows(rows, columns, fill_value=config.fill_value))
    scores = material.figures(rows, probability)
    material.add_figures("Test part", scores)
    points = operating_points(data.label[rows], probability, data.visit[rows])
    title, basis = "Sepsis risk model, trained without the test part", "predictions on the test part"
    page = report_page(title, data.notices(), material.facts, basis, data.label[rows], probability, points)
    write_atomic(directory / "holdout_report.html", page)
    write_json(directory / "holdout_metrics.json", scores)
    return "\n".join([*data.notices(), *(f"{name}: {value}" for name, value in material.facts.items())])


def train_full(directory: Path, observations: str | None = None, labels: str | None = None, **settings: Any) -> str:
    """Trains on all data and deploys the model as a new version. Gives its ``production_model_info.txt``."""
    material = prepare(directory, observations, labels, **settings)
    config = material.config
    model, probability = material.fit(np.arange(len(material.data.label)))
    version = new_version(directory / "archive")
    trained_on = observations or config.data["observations"], labels or config.data["labels"]
    files = version_files(material, config, model, probability, version, trained_on)
    deploy(directory, version, files)
    return files[INFO]


def scored_moments(material: Material, model: ScoreModel, probability: np.ndarray) -> tuple[Scored, Scored]:
    """Visits of the data at the moments of service: during the stay, at any time between two points of the grid, and at
    their last observation. `probability` are the out-of-fold scores of the snapshots.

    The model has learned from these visits. Its scores are therefore taken down to where out-of-fold scores are, by the
    quantiles of both kinds of scores of the snapshots.
    """
    data, names = material.data, material.config.feature_names
    visits, last = np.unique(data.visit), data.observations.last_time
    n_kept = max(1, min(len(visits), len(visits) * MOST_SNAPSHOTS // len(data.visit)))
    visits = visits[np.linspace(0, len(visits) - 1, n_kept).astype(int)]

    def learned(rows: np.ndarray) -> np.ndarray:
        return model.probability(filled(rows, material.config.fill_value))

    quantiles = np.sort(learned(material.table.plain.T)), np.sort(probability)

    def scored(visit: np.ndarray, as_of: np.ndarray) -> Scored:
        features = FeaturePlan(names).evaluate(data.observations, visit, as_of)
        return Scored(features.T, np.interp(learned(features), *quantiles), visit, as_of)

    at_end = scored(visits, last[visits])
    if data.settings.retrospective:
        return at_end, at_end
    phase = (np.arange(len(data.as_of)) * GOLDEN_RATIO) % 1.0  # evenly spread, the same every time
    as_of = data.as_of + (phase * data.settings.every_hours * MICROSECONDS_PER_HOUR).astype(np.int64)
    rows = np.isin(data.visit, visits) & (as_of <= last[data.visit])
    return scored(data.visit[rows], as_of[rows]), at_end


def version_files(
    material: Material,
    config: Config,
    model: ScoreModel,
    probability: np.ndarray,
    version: str,
    trained_on: tuple[str | None, str | None],
) -> dict[str, bytes | str]:
    """The files of a version with `model`: its config, model file and reports. Thresholds follow from `probability`,
    out-of-fold of all snapshots of the material's data, by the rule of `config`. `trained_on` are the paths of these
    data."""
    data, facts = material.data, material.facts
    rows = np.arange(len(data.label))
    scores = material.figures(rows, probability)
    material.add_figures("Cross-validated", scores)
    if config.data["fingerprint"] == data.fingerprint and "test" in config.metrics:
        material.add_figures("Test part of the search", config.metrics["test"])
    points, basis = operating_points(data.label, probability, data.visit), "out-of-fold predictions on all data"
    if config.decision_sensitivity is not None:
        threshold = threshold_for_sensitivity(data.label, probability, config.decision_sensitivity)
        config = replace(config, decision_threshold=threshold)
    minimum = config.minimum_evidence
    known = None if minimum is None else enough(minimum, data, config.feature_names)
    config = with_thresholds(config, Rule.of(config), alert_curves(data, rows, probability, known), set_now=False)
    model.metadata |= {
        "model_version": version,
        "trained_at": facts["Trained at"],
        "feature_names_sha256": names_sha256(config.feature_names),
        "fill_value": config.fill_value,
    }
    buffer = io.BytesIO()
    joblib.dump(model, buffer, compress=3)
    golden = model.probability(np.array(config.golden["features"], dtype=np.float64)).tolist()
    config = replace(
        config,
        metrics={**config.metrics, "out_of_fold": scores},
        library_versions=library_versions(),
        trained_at=facts["Trained at"],
        trained_on={
            "observations": trained_on[0],
            "labels": trained_on[1],
            "synthetic": data.synthetic,
            "fingerprint": data.fingerprint,
            "description": data.describe(),
        },
        reference_profile=make_profile(config, data.observations, *scored_moments(material, model, probability)),
        model_version=version,
        model_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        golden={**config.golden, "probability": golden},
    )
    title = f"Sepsis risk model {version}"
    return {
        MODEL: buffer.getvalue(),
        NAMES: json.dumps(config.feature_names, indent=1) + "\n",
        INFO: info_text(config, facts, data.notices(), version),
        REPORT: report_page(title, data.notices(), facts, basis, data.label, probability, points),
        CARD: model_card(config, version, facts, data.notices(), data, rows, probability, points, basis),
        CONFIG: config.text(),
    }
