"""Adapts the deployed model to the patients of this hospital: chooses, compares with the parent, deploys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.artifacts import locked, write_atomic
from common.command_line import log
from common.labels import read_labels
from feature_pipeline import (
    BadConfig,
    BadObservations,
    Config,
    Observations,
    ProductionPipeline,
    SiteCodes,
    describe_set_aside,
)
from training.comparison import REFUSED, compare
from training.config import configuration_of
from training.fitting import FeatureTable
from training.retraining import check_and_adopt, working_folder
from training.snapshots import TEST, TrainingData, learned_clients, load_training_data, make_training_data, split_parts
from training.thresholds import Rule, with_thresholds
from training.train import Material, version_files
from training.transfer import Fitted, Source, Trial, candidates, fit_best
from training.versions import CONFIG, MODEL, deploy, new_version

HELD_OUT = 0.3  # of the local clients
FEWEST_SEPTIC = 20  # local patients, or visits where clients are too few


@dataclass(frozen=True)
class AdaptOptions:
    observations: str | None  # of the local patients
    labels: str | None
    rule: Rule | None = None  # of the risk thresholds; None: the parent's, on local patients
    reason: str = ""
    site_codes: SiteCodes | None = None
    force: bool = False  # deploy a worse model too
    seed: int | None = None
    jobs: int = 1


@dataclass(frozen=True)
class Local:
    """The deployed model and the patients of this hospital."""

    pipeline: ProductionPipeline
    labels: pd.DataFrame
    source: Source
    learned: np.ndarray  # the snapshots that candidates learn from
    held_out: np.ndarray  # those that the choice is compared with its parent on

    @property
    def config(self) -> Config:
        return self.pipeline.config


def read_local(directory: Path, options: AdaptOptions) -> Local:
    """Reads the deployed model and the local patients, in the model's codes. Raises `BadConfig`, `BadObservations` if
    nothing can be learned from them."""
    if not (options.observations and options.labels):
        raise BadConfig("--adapt needs the patients of this hospital: --observations and --labels")
    pipeline = ProductionPipeline(directory / CONFIG, directory / MODEL, options.site_codes)
    config, labels = pipeline.config, read_labels(options.labels)
    if seen := learned_clients(config) & set(labels["client"]):
        raise BadConfig(
            f"{len(seen)} of the clients in --labels are clients that model {config.model_version} was trained on; "
            "adapt with others, or use --retrain. If they only share their numbers, give them a prefix"
        )
    observations = pipeline.reproducer.read(options.observations).check_usable()
    check_codes(pipeline, observations)
    data = make_training_data(observations, labels, replace(config.snapshots, retrospective=False))
    n_septic = len(np.unique(data.group[data.label == 1]))
    if n_septic < FEWEST_SEPTIC:
        raise BadConfig(
            f"{n_septic} septic {data.grouped_by}s can be used; adapting needs at least {FEWEST_SEPTIC}: collect more"
        )
    for line in [*data.notices(), data.describe()]:
        log.info("%s", line)
    if data.settings.retrospective != config.snapshots.retrospective:
        raise BadConfig(
            "one of the model and the local labels has times of onset, the other has none: give such labels"
        )
    seed = config.seed if options.seed is None else options.seed
    table = FeatureTable.of(data, config.feature_names, seed)
    first = first_patients(config, seed)
    source = Source(pipeline.model, configuration_of(config), data, table, first, seed)
    part = split_parts(data, test=HELD_OUT, validation=0.0, seed=seed)
    return Local(pipeline, labels, source, np.flatnonzero(part != TEST), np.flatnonzero(part == TEST))


def check_codes(pipeline: ProductionPipeline, observations: Observations) -> None:
    """Raises `BadConfig` if the model uses no code of the observations but static ones; warns of those it misses."""
    reproducer = pipeline.reproducer
    present = [code for code in observations.codes if reproducer.is_used(code)]
    meanings = (reproducer.codes.meaning(code)[0] for code in present)
    if all(concept is not None and concept.static for concept in meanings):
        raise BadConfig(
            f"model {pipeline.model_version} uses none of the codes in --observations; say what they mean with --codes"
        )
    if unused := pipeline.unused_codes(observations):
        log.info("%d codes of the observations are not used by the model", len(unused))
    if remark := pipeline.missing_codes_remark(observations):
        log.warning("warning: %s", remark)


def first_patients(config: Config, seed: int) -> tuple[FeatureTable, np.ndarray] | None:
    """Features and labels of the patients that the model was trained on, if they are here."""
    source = config.training_source
    if not config.adapted and (source["labels"] or source["synthetic"]):
        try:
            data = load_training_data(
                source["observations"], source["labels"], config.snapshots, config.training_codes, source["synthetic"]
            )
            if data.fingerprint == source["fingerprint"]:
                return FeatureTable.of(data, config.feature_names, seed), data.label
        except BadObservations:
            pass
    log.info(
        "the data that model %s was trained on are not here: no candidate is trained on both", config.model_version
    )
    return None


def fit_local(local: Local, rows: np.ndarray, known: list[Any], jobs: int) -> tuple[Source, Fitted]:
    """The best of the candidates `known` on the local snapshots `rows`."""
    whole = local.source
    source = replace(whole, data=whole.data.at(rows), table=whole.table.at(rows))
    return source, fit_best(source, known, jobs)


def adapt(directory: Path, options: AdaptOptions) -> tuple[list[str], bool]:
    """Adapts the deployed model to local patients and deploys the result if it is not worse on others of them.

    A share of the local clients is held out. The candidate is chosen by cross-validation on the rest, fitted on it, and
    compared with the parent on those held out. If it is not worse (or with `force`), it is fitted on all local patients
    and deployed as a new version. Gives lines for a person, and False where it was not promoted.
    """
    local = read_local(directory, options)
    with locked(directory / ".retrain.lock", wait=False) as alone:
        if not alone:
            raise BadConfig("another retraining or adaptation is at work; try again when it has ended")
        with working_folder(directory / ".adapt") as folder:
            return _adapt(directory, options, local, folder)


def _adapt(directory: Path, options: AdaptOptions, local: Local, folder: Path) -> tuple[list[str], bool]:
    known = candidates(local.pipeline.model, both=local.source.first is not None)
    source, challenger = fit_local(local, local.learned, known, options.jobs)
    lines = [*trial_lines(challenger.trials), f"chosen: {challenger.candidate.name}"]
    for line in lines:
        log.info("%s", line)
    version = new_version(folder / "challenger" / "archive")
    deploy(folder / "challenger", version, adapted_files(local, options, source, challenger, version))
    comparison = compare(
        directory,
        folder / "challenger",
        local.source.data.observations,
        local.labels[labels_of(local.labels, local.source.data, local.held_out)],
        "local patients that neither has learned from",
    )
    lines = [*lines, *comparison.lines()]
    decision = comparison.decision(options.force)
    if comparison.objections and not options.force:
        write_atomic(directory / "comparison.html", comparison.html(decision))
        return [*lines, REFUSED], False
    everyone = np.arange(len(local.source.data.label))
    source, final = fit_local(local, everyone, [challenger.candidate], options.jobs)
    version = new_version(folder / "final" / "archive")
    files = adapted_files(local, options, source, final, version, challenger.trials, comparison.figures)
    deploy(folder / "final", version, files)
    check_and_adopt(folder / "final", directory)
    text = f"{decision} as model {version}: {final.candidate.name}, with the patients held out too"
    write_atomic(directory / "comparison.html", comparison.html(text))
    return [*lines, f"{decision}: model {version}; see {directory / 'comparison.html'}"], True


def labels_of(labels: pd.DataFrame, data: TrainingData, rows: np.ndarray) -> np.ndarray:
    """(n_labels,) does the label belong to a visit of the snapshots `rows`?"""
    keys = data.observations.keys()
    wanted = {keys[visit] for visit in np.unique(data.visit[rows])}
    return np.array([key in wanted for key in zip(labels["client"], labels["visit_id"], strict=True)])


def trial_lines(trials: list[Trial]) -> list[str]:
    width = max(len(t.candidate.name) for t in trials)
    lines = [f"{'cross-validated on local patients':<{width + 2}}  log loss  ROC AUC  average precision"]
    return lines + [
        f"  {t.candidate.name:<{width}}  {t.log_loss:.5f}   {t.roc_auc:.4f}   {t.average_precision:.4f}" for t in trials
    ]


def adapted_files(
    local: Local,
    options: AdaptOptions,
    source: Source,
    fitted: Fitted,
    version: str,
    trials: list[Trial] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> dict[str, bytes | str]:
    """The files of the adapted version; `trials` are those of the choice, `figures` those of the comparison with the
    parent."""
    parent, data, trials = local.config, source.data, trials or fitted.trials
    observations = local.source.data.observations
    facts = {
        "Trained at": datetime.now(UTC).isoformat(timespec="seconds"),
        "Adapted from": f"model {parent.model_version}"
        + (", trained on synthetic patients" if parent.training_source["synthetic"] else ""),
        "Adaptation": f"{fitted.candidate.name}; chosen from {len(trials)} candidates by cross-validation",
        "Data": data.describe(),
        "Data fingerprint": data.fingerprint[:16],
        "Calibration": f"log-odds x {fitted.model.slope:.3f} {fitted.model.intercept:+.3f} "
        + ("(Platt, out-of-fold, local)" if fitted.candidate.calibrated else "(the parent's)"),
    }
    if observations.set_aside:
        facts["Set aside"] = describe_set_aside(observations)
    for name, f in (figures or {}).items():
        told = f"{f['old']:.4f} -> {f['new']:.4f} (difference 95% {f['low']:+.4f} to {f['high']:+.4f})"
        facts[f"Held out, parent -> adapted: {name.replace('_', ' ')}"] = told
    config = replace(
        parent,
        metrics={"held_out": figures} if figures else {},
        retrained_with=[],
        adapted={
            "parent": parent.model_version,
            "parent_sha256": parent.model_sha256,
            "candidate": fitted.candidate.name,
            "parts": [{**asdict(part), "weight": weight} for part, weight in fitted.candidate.parts],
            "trained_before": [*parent.adapted.get("trained_before", []), parent.training_source],
        },
    )
    if options.rule is not None:
        config = with_thresholds(config, options.rule, config.thresholds["curves"], options.reason)
    material = Material(config, source.configuration, data, source.table, source.seed, options.jobs, facts)
    return version_files(
        material, config, fitted.model, fitted.probability, version, (options.observations, options.labels)
    )
