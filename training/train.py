"""Fits the winner, archives it as a version, deploys it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from common.artifacts import library_versions, write_atomic, write_json
from common.command_line import DONE, log
from common.metrics import describe_figures, figures, operating_points, threshold_for_sensitivity
from feature_pipeline import (
    Config,
    FeatureReproducer,
    ProductionPipeline,
    ScoreModel,
    describe_set_aside,
    names_sha256,
)
from monitoring.profile import make_profile
from training.candidates import ModelConfiguration
from training.config import configuration_of, load_data
from training.fitting import FeatureTable, cross_validate, filled, fit_calibrated
from training.model_card import model_card
from training.report import info_text, report_page
from training.snapshots import TEST, TrainingData, split_parts
from training.versions import CONFIG, switch


@dataclass(frozen=True)
class Trained:
    """A calibrated model with the out-of-fold predictions that calibrated it."""

    model: ScoreModel
    out_of_fold: np.ndarray  # calibrated probabilities of the snapshots it was trained on


def train(
    data: TrainingData,
    table: FeatureTable,
    rows: np.ndarray,
    configuration: ModelConfiguration,
    seed: int = 0,
    jobs: int = 1,
) -> Trained:
    """Fits on the snapshots `rows` of `table`, calibrated on out-of-fold predictions."""
    columns = np.arange(len(table.plain))
    [out_of_fold] = cross_validate([(configuration, columns)], table, data, rows, seed=seed, jobs=jobs)
    return Trained(*fit_calibrated(configuration, table, columns, data, rows, out_of_fold, seed))


def new_version(archive: Path) -> str:
    """A version name YYYYMMDD_HHMMSS (UTC) that the archive does not have yet; its folder is made, so that nobody
    else takes it."""
    archive.mkdir(parents=True, exist_ok=True, mode=0o750)
    while True:
        version = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
        try:
            (archive / version).mkdir(mode=0o750)
            return version
        except FileExistsError:
            time.sleep(0.2)


def deploy(
    directory: Path, config: Config, model: ScoreModel, info: str, report: str, version: str, card: str = ""
) -> None:
    """Writes the files of a version to its archive folder, all of them or none, and deploys it from there.

    Raises `BadConfig`, `BadModel` where they would not load; then nothing is changed.
    """
    buffer = io.BytesIO()
    joblib.dump(model, buffer, compress=3)
    content = buffer.getvalue()
    config = replace(
        config,
        model_version=version,
        model_sha256=hashlib.sha256(content).hexdigest(),
        golden={**config.golden, "probability": golden_probability(config, model)},
    )
    files: dict[str, bytes | str] = {
        "best_model.pkl": content,
        "feature_names.json": json.dumps(config.feature_names, indent=1) + "\n",
        "production_model_info.txt": info,
        "training_report.html": report,
        "MODEL_CARD.md": card,
        "best_model_config.json": config.text(),
    }
    archive = directory / "archive"
    archive.mkdir(parents=True, exist_ok=True, mode=0o750)
    if not (archive / version / CONFIG).exists():  # else an earlier try got this far
        _archive(archive, version, files)
    switch(directory, version)


def _archive(archive: Path, version: str, files: dict[str, bytes | str]) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=".new-", dir=archive, ignore_cleanup_errors=True) as unfinished:
            for name, text in files.items():
                write_atomic(Path(unfinished) / "version" / name, text)
            # what could not be served is not kept
            ProductionPipeline(Path(unfinished, "version", CONFIG), Path(unfinished, "version", "best_model.pkl"))
            Path(unfinished, "version").replace(archive / version)
    except BaseException:
        with contextlib.suppress(OSError):
            (archive / version).rmdir()  # the empty one that keeps the name
        raise


def golden_probability(config: Config, model: ScoreModel) -> list[float]:
    """The new model's probability of the config's golden example."""
    features = np.array(config.golden["features"], dtype=np.float64)
    return model.probability(features).tolist()


def train_best_model(arguments: argparse.Namespace, directory: Path) -> int:
    start = time.perf_counter()
    reproducer = FeatureReproducer(directory / "best_model_config.json")
    config = reproducer.config
    configuration = configuration_of(config)
    data = load_data(config, arguments.observations, arguments.labels)
    seed = config.seed if arguments.seed is None else arguments.seed
    for line in [*data.notices(), data.describe()]:
        log.info("%s", line)
    table = FeatureTable.of(data, config.feature_names, seed)
    facts: dict[str, Any] = {
        "Trained at": datetime.now(UTC).isoformat(timespec="seconds"),
        "Data": data.describe(),
        "Data fingerprint": data.fingerprint[:16],
    }
    if data.observations.set_aside:
        facts["Set aside"] = describe_set_aside(data.observations)
    if arguments.full:
        rows = np.arange(len(data.label))
        trained = train(data, table, rows, configuration, seed, arguments.jobs)
        shown, probability, basis = rows, trained.out_of_fold, "out-of-fold predictions on all data"
    else:
        part = split_parts(data, seed=config.seed)  # the search's own parts, whatever the model's seed
        rows, shown = np.flatnonzero(part != TEST), np.flatnonzero(part == TEST)
        trained = train(data, table, rows, configuration, seed, arguments.jobs)
        probability = trained.model.probability(
            filled(table.rows(shown, np.arange(len(table.plain))), config.fill_value)
        )
        basis = "predictions on the test part"
    scores = figures(data.label[shown], probability, data.group[shown], data.visit[shown], seed)
    named = {"Cross-validated" if arguments.full else "Test part": scores}
    if arguments.full and config.data["fingerprint"] == data.fingerprint and "test" in config.metrics:
        named["Test part of the search"] = config.metrics["test"]
    facts |= {f"{name}: {key}": text for name, s in named.items() for key, text in describe_figures(s).items()}
    facts["Calibration"] = f"log-odds x {trained.model.slope:.3f} {trained.model.intercept:+.3f} (Platt, out-of-fold)"
    points = operating_points(data.label[shown], probability, data.visit[shown])

    if arguments.full:
        version = new_version(directory / "archive")
        title = f"Sepsis risk model {version}"
    else:
        version, title = "", "Sepsis risk model, trained without the test part"
    report = report_page(title, data.notices(), facts, basis, data.label[shown], probability, points)
    if arguments.full:
        config = replace(
            config,
            metrics={**config.metrics, "out_of_fold": scores},
            decision_threshold=threshold_for_sensitivity(data.label, probability, config.decision_sensitivity),
            library_versions=library_versions(),
            trained_at=facts["Trained at"],
            trained_on={
                "observations": arguments.observations or config.data["observations"],
                "labels": arguments.labels or config.data["labels"],
                "synthetic": data.synthetic,
                "fingerprint": data.fingerprint,
                "description": data.describe(),
            },
            reference_profile=make_profile(config, table.plain, probability, data.observations, data.visit, data.as_of),
        )
        info = info_text(config, facts, data.notices(), version)
        trained.model.metadata |= {
            "model_version": version,
            "trained_at": facts["Trained at"],
            "feature_names_sha256": names_sha256(config.feature_names),
            "fill_value": config.fill_value,
        }
        card = model_card(config, version, facts, data.notices(), data, rows, probability, points, basis)
        deploy(directory, config, trained.model, info, report, version, card)
        print(info.rstrip())
    else:
        write_atomic(directory / "holdout_report.html", report)
        write_json(directory / "holdout_metrics.json", scores)
        for line in data.notices():
            print(line)
        for name, value in facts.items():
            print(f"{name}: {value}")
    log.info("%.0f s; files in %s", time.perf_counter() - start, directory)
    return DONE
