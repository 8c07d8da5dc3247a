"""Checks of a deployed model on synthetic visits in its own codes."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts import write_atomic
from feature_pipeline import (
    RANGE_COLUMNS,
    REQUIRED_COLUMNS,
    BadModel,
    Config,
    MissingCodesWarning,
    ProductionPipeline,
    UnknownRiskWarning,
    concept_of,
)
from training.versions import NAMES


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED'}: {self.name}: {self.text}"


def own_visits(config: Config, n: int, seed: int = 1) -> pd.DataFrame:
    """Observations of `n` synthetic visits in the codes of the config's golden example, which has all that the model
    uses: two days each. Every visit has its own level and trend of each code, between the first and the last tenth of
    the training data where the reference profile knows them, else between the example's values."""
    golden = pd.DataFrame(config.golden["observations"]).groupby("observation_type_code")
    limits = {code: (values.min(), values.max()) for code, values in golden["observation_value"]}
    for code in limits:
        edges = [
            x for x in config.reference_profile.get("edges", {}).get(f"{code}__last", []) if x != config.fill_value
        ]
        limits[code] = (edges[0], edges[-1]) if edges else limits[code]
    ranges, generator = golden[list(RANGE_COLUMNS)].first(), np.random.default_rng(seed)
    start, codes, rows = np.datetime64("2024-01-01T00:00:00", "m"), np.array(list(limits)), []
    for visit in range(n):
        for code in codes[generator.random(len(codes)) < 0.9].tolist():
            concept, (low, high) = concept_of(code, config.synonyms), limits[code]
            level, trend = generator.uniform(), generator.normal()
            number = 1 if concept and concept.static else generator.integers(6, 13)
            for minute in generator.integers(0, 48 * 60, number).tolist():
                share = np.clip(level + trend * (minute / 2880 - 0.5) + 0.05 * generator.normal(), 0, 1)
                moment = str(start + np.timedelta64(minute + 60 * visit, "m"))
                value = round(low + share * max(high - low, 0.1), 2)
                rows.append((f"v{visit}", f"c{visit}", moment, code, value, *ranges.loc[code]))
    return pd.DataFrame(rows, columns=[*REQUIRED_COLUMNS, *RANGE_COLUMNS])


def check_names(pipeline: ProductionPipeline, directory: Path) -> str:
    path = directory / NAMES
    names = json.loads(path.read_text())
    if names != pipeline.feature_names:
        raise AssertionError(f"{path} and the config differ; run train_best_model.py --full")
    return f"{len(names)} features, named and ordered as in {NAMES}"


def check_features(pipeline: ProductionPipeline, observations: pd.DataFrame) -> str:
    """Whatever the order, the company or the copies of rows: identical features, to the last bit."""
    transform = pipeline.reproducer.transform
    whole = transform(observations)
    keys = whole["visit_id"].to_numpy()

    def in_parts(parts: list[np.ndarray]) -> pd.DataFrame:
        return pd.concat([transform(observations[observations["visit_id"].isin(part)]) for part in parts])

    ways = {
        "shuffled": transform(observations.sample(frac=1, random_state=1)),
        "duplicated": transform(pd.concat([observations, observations.iloc[::7]])),
        **{f"in {n} parts": in_parts(np.array_split(keys, n)) for n in (2, 7)},
        "visit by visit": in_parts([*keys[:5, None], keys[5:]]),
    }
    for name, other in ways.items():
        other = other.set_index(["client", "visit_id"]).loc[whole.set_index(["client", "visit_id"]).index]
        if not np.array_equal(whole.iloc[:, 2:].to_numpy(), other.to_numpy(), equal_nan=True):
            raise AssertionError(f"features differ when the rows come {name}")
    return f"identical features of {len(keys)} visits whole, {', '.join(ways)}"


def check_predictions(pipeline: ProductionPipeline, observations: pd.DataFrame) -> str:
    """Every visit is answered; with a number nearly every one that has what the minimum of evidence asks about."""
    scores, config = pipeline.predict(observations, details=True), pipeline.config
    n_visits, known = len(observations[["client", "visit_id"]].drop_duplicates()), scores["reason"].isna()
    inputs = set(config.minimum_evidence.inputs) if config.minimum_evidence else set()
    concepts = {code: concept_of(code, config.synonyms) for code in observations["observation_type_code"].unique()}
    names = observations["observation_type_code"].map(lambda code: concepts[code].name if concepts[code] else code)
    has_inputs = scores["visit_id"].map(names.groupby(observations["visit_id"]).agg(lambda own: inputs <= {*own}))
    if len(scores) != n_visits or known[has_inputs].sum() < 0.9 * has_inputs.sum():
        raise AssertionError(f"{n_visits} visits, {known.sum()} with a number")
    if not scores.loc[known, "sepsis_probability"].between(0, 1).all():
        raise AssertionError("a probability is empty or lies outside 0 to 1")
    return f"{len(scores)} visits scored: " + ", ".join(
        f"{n} {level}" for level, n in scores["risk_level"].value_counts().items()
    )


def check_latency(pipeline: ProductionPipeline, observations: pd.DataFrame, repeats: int = 200) -> str:
    one = observations[observations["visit_id"] == observations["visit_id"].iloc[0]].head(40).reset_index(drop=True)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        pipeline.predict(one)
        seconds.append(time.perf_counter() - start)
    median, p99 = statistics.median(seconds), sorted(seconds)[int(0.99 * repeats)]
    return f"one visit of {len(one)} observations: median {median * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms"


def check(config: Path, model: Path, n_visits: int = 150, sample: Path | None = None) -> list[Check]:
    """Loads the deployment and checks it; with `sample` writes some of the synthetic visits there.

    Raises `BadConfig`, `BadModel` where it cannot be loaded.
    """
    pipeline = ProductionPipeline(config, model)
    if hashlib.sha256(model.read_bytes()).hexdigest() != pipeline.config.model_sha256:
        # loading fell back to the archive, as it may while versions are switched; here nothing is being switched
        raise BadModel(f"model file '{model}' is not the config's: its SHA-256 differs; deploy both together")
    observations = own_visits(pipeline.config, n_visits)
    checks: dict[str, Callable[[], str]] = {
        "loading": lambda: f"model {pipeline.model_version}, golden example reproduced",
        "feature names": lambda: check_names(pipeline, config.parent),
        "features": lambda: check_features(pipeline, observations),
        "predictions": lambda: check_predictions(pipeline, observations),
        "latency": lambda: check_latency(pipeline, observations),
    }
    results = []
    for name, of in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnknownRiskWarning)
                warnings.simplefilter("ignore", MissingCodesWarning)
                results.append(Check(name, True, of()))
        except (AssertionError, OSError, ValueError) as error:
            results.append(Check(name, False, str(error)))
    if sample is not None:
        write_atomic(
            sample, observations[observations["visit_id"].isin([f"v{i}" for i in range(20)])].to_csv(index=False)
        )
    return results
