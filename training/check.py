"""Checks of the deployed model."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts import write_atomic
from common.command_line import DONE, SOME_FAILED, log
from feature_pipeline import BadModel, ProductionPipeline, SetAsideWarning
from sources.demo_cohort import DEMO_NOTICE, make_demo_cohort

SAMPLE = "data/sample_new_patients.csv"


def check_names(pipeline: ProductionPipeline, directory: Path) -> str:
    path = directory / "feature_names.json"
    names = json.loads(path.read_text())
    if names != pipeline.feature_names:
        raise AssertionError(f"{path} and the config differ; run train_best_model.py --full")
    return f"{len(names)} features, named and ordered as in feature_names.json"


def check_features(pipeline: ProductionPipeline, observations: pd.DataFrame) -> str:
    """Whatever the order, the company or the copies of rows: identical features, to the last bit."""
    transform = pipeline.reproducer.transform
    whole = transform(observations)
    ways = {
        "shuffled": transform(observations.sample(frac=1, random_state=1)),
        "duplicated": transform(pd.concat([observations, observations.iloc[::7]])),
    }
    keys = whole["visit_id"].to_numpy()
    for n_parts in (2, 7):
        parts = [transform(observations[observations["visit_id"].isin(part)]) for part in np.array_split(keys, n_parts)]
        ways[f"in {n_parts} parts"] = pd.concat(parts)
    for visit in keys[:5]:
        _assert_same(
            whole[whole["visit_id"] == visit],
            transform(observations[observations["visit_id"] == visit]),
            "visit by visit",
        )
    for name, other in ways.items():
        _assert_same(whole, other, name)
    return f"identical features of {len(keys)} visits whole, alone, {', '.join(ways)}"


def _assert_same(whole: pd.DataFrame, other: pd.DataFrame, how: str) -> None:
    other = other.set_index(["client", "visit_id"]).loc[whole.set_index(["client", "visit_id"]).index]
    if not np.array_equal(whole.iloc[:, 2:].to_numpy(), other.to_numpy(), equal_nan=True):
        raise AssertionError(f"features differ when the rows come {how}")


def check_predictions(pipeline: ProductionPipeline, observations: pd.DataFrame) -> str:
    scores = pipeline.predict(observations)
    expected = observations[["client", "visit_id"]].drop_duplicates()
    if len(scores) != len(expected) or scores["sepsis_probability"].isna().any():
        raise AssertionError(f"{len(expected)} visits, {scores['sepsis_probability'].notna().sum()} predictions")
    if not scores["sepsis_probability"].between(0, 1).all():
        raise AssertionError("a probability lies outside 0 to 1")
    levels = pd.Series(pipeline.risk_level(scores["sepsis_probability"])).value_counts()
    return f"{len(scores)} visits scored: " + ", ".join(f"{n} {level}" for level, n in levels.items())


def check_latency(pipeline: ProductionPipeline, observations: pd.DataFrame, repeats: int = 200) -> str:
    one = observations[observations["visit_id"] == observations["visit_id"].iloc[0]].head(40).reset_index(drop=True)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        pipeline.predict(one)
        seconds.append(time.perf_counter() - start)
    median, p99 = statistics.median(seconds), sorted(seconds)[int(0.99 * repeats)]
    return f"one visit of {len(one)} observations: median {median * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms"


def check_pipeline(arguments: argparse.Namespace) -> int:
    pipeline = ProductionPipeline(arguments.config, arguments.model)
    if hashlib.sha256(Path(arguments.model).read_bytes()).hexdigest() != pipeline.config.model_sha256:
        # loading fell back to the archive, as it may while versions are switched; here nothing is being switched
        raise BadModel(f"model file {arguments.model!r} is not the config's: its SHA-256 differs; deploy both together")
    print(f"loaded: model {pipeline.model_version}, golden example reproduced")
    observations, _ = make_demo_cohort(n_patients=arguments.patients, seed=1)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("feature names", lambda: check_names(pipeline, Path(arguments.config).parent)),
        ("features", lambda: check_features(pipeline, observations)),
        ("predictions", lambda: check_predictions(pipeline, observations)),
        ("latency", lambda: check_latency(pipeline, observations)),
    ]
    failed = 0
    for name, check in checks:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SetAsideWarning)  # the demo cohort has dirt on purpose
                print(f"ok: {name}: {check()}")
        except (AssertionError, OSError, ValueError) as error:
            failed += 1
            print(f"FAILED: {name}: {error}")
    new = observations[observations["visit_id"].isin(observations["visit_id"].unique()[:20])]
    write_atomic(arguments.sample, new.to_csv(index=False))
    log.info("written: %s, %d visits, %s", arguments.sample, new["visit_id"].nunique(), DEMO_NOTICE)
    return SOME_FAILED if failed else DONE
