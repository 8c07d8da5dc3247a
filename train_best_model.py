"""Retrains the best candidate of the search.

Without flags: on the training part, with figures of the untouched test part; nothing is deployed. With --full: on
everything, no holdout; writes ``best_model.pkl``, ``feature_names.json``, ``production_model_info.txt``, a report and
an archived version. Probabilities are calibrated on out-of-fold predictions either way.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from artifacts import library_versions, write_atomic, write_json
from candidates import FeatureTable, ModelConfiguration, cross_validate, filled, fit_calibrated
from command_line import DONE, SOME_FAILED, log, make_parser, run
from feature_pipeline import (
    BadConfig,
    BadObservations,
    FeatureReproducer,
    ProductionPipeline,
    ScoreModel,
    describe_set_aside,
    listed,
    load_config,
    names_sha256,
)
from metrics import describe_figures, figures, operating_points, threshold_for_sensitivity
from model_card import model_card
from prediction_log import make_profile
from retraining import retrain, training_clients
from training_data import TEST, TrainingData, load_training_data, read_labels, settings_of, split_parts
from training_report import report_page
from versions import CONFIG, archive_of, compare, list_versions, switch


@dataclass(frozen=True)
class Trained:
    """A calibrated model with the out-of-fold predictions that calibrated it."""

    model: ScoreModel
    out_of_fold: np.ndarray  # calibrated probabilities of the snapshots it was trained on


def configuration_of(config: dict[str, Any]) -> ModelConfiguration:
    """The model configuration that a config names, with its own parameters."""
    try:
        return ModelConfiguration(**config["model"])
    except TypeError as error:
        raise BadConfig(f"config: 'model' is not a model configuration ({error}); search again") from error


def load_data(config: dict[str, Any], observations: str | None, labels: str | None) -> TrainingData:
    """The data that the config was made with, or those named instead."""
    if lacking := [key for key in ("seed", "metrics", "decision_sensitivity") if config.get(key) is None]:
        raise BadConfig(f"config: {listed(lacking)} missing; search again")
    source = config.get("data")
    if not (isinstance(source, dict) and {"observations", "labels", "synthetic", "fingerprint"} <= set(source)):
        raise BadConfig("config: 'data' does not name the data of the search; search again")
    if observations is None and labels is None:
        observations, labels = source["observations"], source["labels"]
    of_training = config.get("trained_on", {})
    synthetic = any(s.get("synthetic") and s.get("observations") == observations for s in (source, of_training))
    data = load_training_data(observations, labels, settings_of(config), config["synonyms"], synthetic)
    if data.fingerprint != source["fingerprint"] and of_training.get("observations") != observations:
        log.warning("warning: these are not the data of the search; the config's test figure is of other data")
    return data


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


# ---------------------------------------------------------------------------------------------------- deploy


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
    directory: Path, config: dict[str, Any], model: ScoreModel, info: str, report: str, version: str, card: str = ""
) -> None:
    """Writes the files of a version to its archive folder, all of them or none, and deploys it from there.

    Raises `BadConfig`, `BadModel` where they would not load; then nothing is changed.
    """
    buffer = io.BytesIO()
    joblib.dump(model, buffer, compress=3)
    content = buffer.getvalue()
    config["model_version"] = version
    config["model_sha256"] = hashlib.sha256(content).hexdigest()
    config["golden"]["probability"] = golden_probability(config, model)
    files: dict[str, bytes | str] = {
        "best_model.pkl": content,
        "feature_names.json": json.dumps(config["feature_names"], indent=1) + "\n",
        "production_model_info.txt": info,
        "training_report.html": report,
        "MODEL_CARD.md": card,
        "best_model_config.json": json.dumps(config, indent=1, allow_nan=False) + "\n",
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


def golden_probability(config: dict[str, Any], model: ScoreModel) -> list[float]:
    """The new model's probability of the config's golden example."""
    features = np.array(config["golden"]["features"], dtype=np.float64)
    return model.probability(features).tolist()


def info_text(config: dict[str, Any], facts: dict[str, Any], notices: list[str], version: str) -> str:
    """``production_model_info.txt``, for a person."""
    thresholds = config["risk_thresholds"]
    lines = [
        *notices,
        f"Model {version}: {config['feature_set']} with {config['model']['name']}, "
        f"{len(config['feature_names'])} features",
        "",
        *(f"{name}: {value}" for name, value in facts.items()),
        f"Risk levels: medium from {thresholds['medium']:g}, high from {thresholds['high']:g}; "
        f"decision threshold {config['decision_threshold']:.4g}",
        "Libraries: " + ", ".join(f"{name} {v}" for name, v in config["library_versions"].items()),
        "",
        "Use: from feature_pipeline import ProductionPipeline",
        "     ProductionPipeline('models/best_model_config.json', 'models/best_model.pkl').predict(observations)",
        "A deployment is feature_pipeline.py, best_model_config.json, best_model.pkl and feature_names.json.",
        "",
        "Do not use it on patients before it was validated on local data: it is research software, no medical device.",
        "Do not edit these files: the config names the model's SHA-256, and a changed model is refused.",
    ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ the script


def work(arguments: argparse.Namespace) -> int:
    """Does what the options ask for: the versions' part, retraining, or training."""
    directory = Path(arguments.models_dir)
    if arguments.list:
        versions = list_versions(directory)
        for v in versions:
            scores = f"{v['roc_auc']:.4f}  {v['average_precision']:.4f}" if v["roc_auc"] is not None else ""
            print(f"{'*' if v['deployed'] else ' '} {v['version']}  {scores}  {v['feature_set']} with {v['model']}")
        log.info(
            "%d versions in %s; * is deployed; ROC AUC and average precision out-of-fold", len(versions), directory
        )
        return DONE
    if arguments.rollback is not None:
        switch(directory, arguments.rollback)
        print(f"deployed: model {arguments.rollback}")
        return DONE
    if arguments.compare is not None or arguments.promote is not None:
        return compare_and_promote(arguments, directory)
    if arguments.retrain:
        return retrain(arguments, main)
    return train_best_model(arguments, directory)


def compare_and_promote(arguments: argparse.Namespace, directory: Path) -> int:
    """The deployed version and an archived one on labelled patients that neither has learned from.

    Those are the patients of --observations and --labels. Clients whom one of the two was trained on would flatter it
    and are left out. --promote deploys the archived version where it is not worse, or with --force.
    """
    version = arguments.compare if arguments.promote is None else arguments.promote
    folder = archive_of(directory, version)
    if not (arguments.observations and arguments.labels):
        raise BadConfig("--compare and --promote need --observations and --labels of patients that neither has seen")
    config, labels = load_config(directory / CONFIG), read_labels(arguments.labels)
    for trained in (config, load_config(folder / CONFIG)):
        labels = labels[~labels["client"].isin(learned_clients(trained))]
        if labels.empty:
            raise BadConfig(f"model {trained['model_version']} was trained on these patients; compare on others")
    comparison = compare(directory, folder, arguments.observations, labels, "patients of --observations")
    for line in comparison.lines():
        print(line)
    refused = bool(comparison.objections) and not arguments.force
    decision = "compared" if arguments.promote is None else comparison.decision(arguments.force)
    write_atomic(directory / "comparison.html", comparison.html(decision))
    if arguments.promote is None:
        return DONE
    if refused:
        print("not promoted: the new model is worse; --force promotes it all the same")
        return SOME_FAILED
    switch(directory, version)
    print(f"{decision}: model {version}")
    return DONE


def learned_clients(config: dict[str, Any]) -> set[str]:
    """The clients that a deployed model was trained on, where the labels of its training are still there."""
    try:
        return training_clients(config)
    except BadObservations as error:
        log.warning("warning: which patients model %s has seen cannot be told: %s", config["model_version"], error)
        return set()


def train_best_model(arguments: argparse.Namespace, directory: Path) -> int:
    start = time.perf_counter()
    reproducer = FeatureReproducer(directory / "best_model_config.json")
    config = reproducer.config
    configuration = configuration_of(config)
    data = load_data(config, arguments.observations, arguments.labels)
    seed = config["seed"] if arguments.seed is None else arguments.seed
    for line in [*data.notices(), data.describe()]:
        log.info("%s", line)
    table = FeatureTable.of(data, config["feature_names"], seed)
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
        part = split_parts(data, seed=config["seed"])  # the search's own parts, whatever the model's seed
        rows, shown = np.flatnonzero(part != TEST), np.flatnonzero(part == TEST)
        trained = train(data, table, rows, configuration, seed, arguments.jobs)
        probability = trained.model.probability(
            filled(table.rows(shown, np.arange(len(table.plain))), config["fill_value"])
        )
        basis = "predictions on the test part"
    scores = figures(data.label[shown], probability, data.group[shown], data.visit[shown], seed)
    named = {"Cross-validated" if arguments.full else "Test part": scores}
    if arguments.full and config["data"]["fingerprint"] == data.fingerprint and "test" in config["metrics"]:
        named["Test part of the search"] = config["metrics"]["test"]
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
        config["metrics"]["out_of_fold"] = scores
        config["decision_threshold"] = threshold_for_sensitivity(
            data.label, probability, config["decision_sensitivity"]
        )
        config["library_versions"] = library_versions()
        config["trained_at"] = facts["Trained at"]
        config["trained_on"] = {
            "observations": arguments.observations or config["data"]["observations"],
            "labels": arguments.labels or config["data"]["labels"],
            "synthetic": data.synthetic,
            "fingerprint": data.fingerprint,
            "description": data.describe(),
        }
        config["reference_profile"] = make_profile(
            config, table.plain, probability, data.observations, data.visit, data.as_of
        )
        info = info_text(config, facts, data.notices(), version)
        trained.model.metadata |= {
            "model_version": version,
            "trained_at": facts["Trained at"],
            "feature_names_sha256": names_sha256(config["feature_names"]),
            "fill_value": config["fill_value"],
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__, "python train_best_model.py --full", "observations", "labels", "models-dir", "seed", "jobs"
    )
    parser.set_defaults(seed=None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", help="train on all data and deploy to the models directory")
    what.add_argument("--list", action="store_true", help="show the archived versions")
    what.add_argument("--rollback", metavar="VERSION", help="deploy an archived version")
    what.add_argument("--compare", metavar="VERSION", help="an archived version with the deployed one, on new patients")
    what.add_argument("--promote", metavar="VERSION", help="compare, and deploy the version where it is not worse")
    what.add_argument(
        "--retrain",
        action="store_true",
        help="search on old and new data, compare on new patients, deploy if not worse; safe to run from cron",
    )
    parser.add_argument("--force", action="store_true", help="promote a worse model all the same")
    parser.add_argument("--keep-config", action="store_true", help="retrain the deployed recipe, without a search")
    parser.add_argument("--quick", action="store_true", help="retrain with the quick search")
    parser.add_argument("--data-dir", default="data/training", help="where --retrain keeps what it trained on")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
