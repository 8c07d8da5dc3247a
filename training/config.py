"""``best_model_config.json``: written by the search, read by training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from common.artifacts import library_versions
from common.command_line import log
from common.metrics import threshold_for_sensitivity
from feature_pipeline import (
    DEFAULT_WINDOWS,
    SCHEMA_VERSION,
    BadConfig,
    Config,
    FeaturePlan,
    MinimumEvidence,
    concept_of,
    read_observations,
    resolve_snapshots,
)
from training.candidates import FEATURE_SETS, ModelConfiguration
from training.evidence import enough
from training.fitting import filled
from training.snapshots import TrainingData, load_training_data
from training.thresholds import alert_curves, with_thresholds
from training.trials import Evaluation, Search, code_prevalence


def configuration_of(config: Config) -> ModelConfiguration:
    """The model configuration that a config names, with its own parameters."""
    try:
        return ModelConfiguration(**config.model)
    except TypeError as error:
        raise BadConfig(f"config: 'model' is not a model configuration ({error}); search again") from error


def load_data(config: Config, observations: str | None, labels: str | None) -> TrainingData:
    """The data that the config was made with, or those named instead."""
    source = config.data
    if observations is None and labels is None:
        observations, labels = source["observations"], source["labels"]
        if observations is None and not source["synthetic"]:
            raise BadConfig("the data that the model was searched with are not here: name --observations and --labels")
    of_training = config.trained_on
    synthetic = any(s.get("synthetic") and s.get("observations") == observations for s in (source, of_training))
    data = load_training_data(observations, labels, config.snapshots, config.training_codes, synthetic)
    if data.fingerprint != source["fingerprint"] and of_training.get("observations") != observations:
        log.warning("warning: these are not the data of the search; the config's test figure is of other data")
    return data


# Hours before the golden example's end: in each window something, and of each code another mix of it.
GOLDEN_HOURS = (29.0, 17.0, 9.0, 4.0, 1.0)


def golden_example(
    names: list[str], synonyms: dict[str, str], fill_value: float | None, codes: Sequence[str] = ()
) -> dict[str, Any]:
    """Synthetic observations of one visit and their features; the probability is added when a model is trained.

    Every code of the features, and of `codes` besides (clinical scores may take from them), is measured several times
    with values of its own: hardly a feature is empty, and none can stand in for another. Of many codes the last one is
    measured once, long before, so that something is empty.
    """
    records: list[dict[str, Any]] = []
    end = np.datetime64("2024-01-03T12:00:00", "m")
    codes = sorted({*FeaturePlan(names).codes, *codes}) or ["HR"]  # HR: a model may have no code of its own
    for i, code in enumerate(codes):
        concept = concept_of(code, synonyms)
        low, high = (concept.low, concept.high) if concept and np.isfinite(concept.high) else (0.0, 4.0)
        once = len(codes) > 10 and i == len(codes) - 1
        for k, hours in enumerate(GOLDEN_HOURS[:1] if once else GOLDEN_HOURS[i % 2 :: 1 + i % 3 // 2]):
            share = ((len(records) + 1) * 0.6180339887) % 1.0  # spreads evenly, and repeats nothing
            records.append(
                {
                    "visit_id": "golden",
                    "client": "golden",
                    "observation_date": str(end - np.timedelta64(int(60 * hours) + (7 * i + 11 * k) % 50, "m")),
                    "observation_type_code": code,
                    "observation_value": round(low + (high - low) * (0.2 + 0.6 * share), 2),
                    "reference_range_min": round(low + (high - low) * 0.3, 2),
                    "reference_range_max": round(low + (high - low) * 0.5, 2),
                }
            )
    observations = read_observations(records, synonyms).check_usable()
    visit, moments, _ = resolve_snapshots(observations)
    features = filled(FeaturePlan(names).evaluate(observations, visit, moments), fill_value)
    return {
        "observations": records,
        "features": [[None if np.isnan(v) else float(v) for v in row] for row in features],
        "probability": None,
    }


def make_config(
    search: Search,
    feature_set: str,
    configuration: ModelConfiguration,
    evaluation: Evaluation,
    loss: dict[str, float],
    minimum: MinimumEvidence,
    options: Any,
) -> Config:
    """All that ``best_model_config.json`` holds, before training; `options` are `SearchOptions`."""
    data, names = search.data, [search.names[i] for i in search.columns(feature_set)]
    prevalence = code_prevalence(data.observations, np.unique(data.visit))
    used = set(FeaturePlan(names).codes)
    if options.sensitivity is None:
        decision = 0.5  # until the thresholds are chosen
    else:
        decision = threshold_for_sensitivity(data.label[evaluation.rows], evaluation.out_of_fold, options.sensitivity)
    config = Config(
        schema_version=SCHEMA_VERSION,
        feature_set=feature_set,
        blocks=list(FEATURE_SETS[feature_set]),
        windows=list(DEFAULT_WINDOWS),
        codes=search.codes,
        feature_names=names,
        synonyms=search.synonyms,
        portable=search.portable,
        fill_value=configuration.fill_value,
        model=asdict(configuration),
        snapshots=data.settings,
        metrics=evaluation.metrics,
        risk_thresholds={"medium": 0.4, "high": 0.7},
        decision_threshold=decision,
        decision_sensitivity=options.sensitivity,
        rank_by=options.rank_by,
        code_prevalence={code: round(share, 4) for code, share in prevalence.items() if code in used},
        loss_without_code=loss,
        minimum_evidence=minimum,
        # what other codes of the training's hospital meant, is nothing to another hospital
        observed_codes=search.codes if search.portable else list(data.observations.codes),
        data={
            "observations": options.observations,
            "labels": options.labels,
            "synthetic": data.synthetic,
            "fingerprint": data.fingerprint,
            "description": data.describe(),
            "grouped_by": data.grouped_by,
        },
        library_versions=library_versions(),
        seed=search.seed,
        golden=golden_example(names, search.synonyms, configuration.fill_value, search.codes),
    )
    known = enough(minimum, data, names)[evaluation.rows]
    curves = alert_curves(data, evaluation.rows, evaluation.out_of_fold, known)
    return with_thresholds(config, options.rule, curves, options.reason)


def recipe(config: Config, paths: tuple[str, str], synthetic: bool) -> Config:
    """The config as the search left it, to be trained on other data: no version, no model yet."""
    return replace(
        config,
        metrics={name: figures for name, figures in config.metrics.items() if name != "out_of_fold"},
        trained_on={"observations": paths[0], "labels": paths[1], "synthetic": synthetic},
        trained_at=None,
        adapted={},
        reference_profile={},
        model_version=None,
        model_sha256=None,
    )
