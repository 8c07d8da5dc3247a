"""Speed of the features and of a single score, beside a plain pandas version that computes the same numbers.

Whole visits: one snapshot each, the full feature set. Single visit: 40 observations through ProductionPipeline.predict.
The rival is what a first draft would be: `groupby(...).apply` with a Python function a group for the statistics,
timed on a part of the visits (it is too slow for all) and compared value by value.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import DONE, make_parser, run
from feature_pipeline import (
    BLOCKS,
    FeaturePlan,
    ProductionPipeline,
    block_features,
    read_observations,
    resolve_snapshots,
)
from sources.demo_cohort import make_demo_cohort

STATISTICS = ("last", "min", "max", "mean", "std", "count", "change", "delta", "range", "age")


def plain_statistics(rows: pd.DataFrame) -> pd.Series:
    """One code of one visit, as a notebook would have it."""
    value = rows.sort_values("observation_date", kind="stable")["observation_value"]
    return pd.Series(
        {
            "last": value.iloc[-1],
            "min": value.min(),
            "max": value.max(),
            "mean": value.mean(),
            "std": value.std(ddof=0),
            "count": float(len(value)),
            "change": value.iloc[-1] - value.iloc[0],
            "delta": value.iloc[-1] - value.iloc[-2] if len(value) > 1 else np.nan,
            "range": value.max() - value.min(),
            "age": (rows["as_of"].iloc[0] - rows["observation_date"].max()) / pd.Timedelta(hours=1),
        }
    )


def plain_features(frame: pd.DataFrame, windows: Sequence[int] = (6, 12, 24)) -> pd.DataFrame:
    """The statistics of each code over the visit and over the windows: a fraction of the full feature set."""
    frame = frame.assign(as_of=frame.groupby("visit_id")["observation_date"].transform("max"))
    parts = []
    for window in (None, *windows):
        part = frame
        if window:
            part = frame[frame["observation_date"] > frame["as_of"] - pd.Timedelta(hours=window)]
        table = part.groupby(["visit_id", "observation_type_code"]).apply(plain_statistics).unstack()
        table.columns = [f"{code}__{name}" + (f"__{window}h" if window else "") for name, code in table.columns]
        parts.append(table)
    return pd.concat(parts, axis=1)


def clean(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows that both sides read alike: no dirt, no other unit, no two values at one time."""
    known = read_observations(frame)
    visit = np.repeat(known.group_visit, np.diff(known.group_start))
    code = np.repeat(known.group_code, np.diff(known.group_start))
    table = pd.DataFrame(
        {
            "visit_id": known.visit_id[visit],
            "client": known.client[visit],
            "observation_date": known.time.astype("datetime64[us]"),
            "observation_type_code": np.array(known.codes, dtype=object)[code],
            "observation_value": known.value,
            "reference_range_min": known.low,
            "reference_range_max": known.high,
        }
    )
    return table.drop_duplicates(["visit_id", "observation_type_code", "observation_date"], keep="last")


def whole_visits(frame: pd.DataFrame, n_plain: int) -> None:
    start = time.perf_counter()
    observations = read_observations(frame)
    read = time.perf_counter() - start
    names = [name for block in BLOCKS for name in block_features(block, observations.codes)]
    visit, moments, _ = resolve_snapshots(observations)
    start = time.perf_counter()
    plan = FeaturePlan(names)
    features = plan.evaluate(observations, visit, moments)
    evaluated = time.perf_counter() - start
    n = len(observations.value)
    print(f"{n:,} observations of {observations.n_visits:,} visits, {len(names):,} features each")
    print(f"reading and validating the frame  {read:7.2f} s  {n / read:12,.0f} observations/s")
    print(f"features                          {evaluated:7.2f} s  {n / evaluated:12,.0f} observations/s")
    print(
        f"both                              {read + evaluated:7.2f} s  {n / (read + evaluated):12,.0f} observations/s"
    )

    few = frame[frame["visit_id"].isin(pd.unique(frame["visit_id"])[:n_plain])]
    start = time.perf_counter()
    plain = plain_features(few)
    seconds = time.perf_counter() - start
    rate = len(few) / seconds
    print(
        f"pandas groupby-and-apply          {seconds:7.2f} s  {rate:12,.0f} observations/s, {plain.shape[1]} features"
    )
    print(f"ratio: {n / (read + evaluated) / rate:,.0f} times as many observations a second, reading included")
    shared = [name for name in plain.columns if name in set(names)]
    ours = pd.DataFrame(features, columns=names, index=observations.visit_id).loc[plain.index, shared].to_numpy()
    theirs = plain[shared].to_numpy(dtype=float)
    counts = np.array(["__count" in name for name in shared])
    theirs[:, counts] = np.nan_to_num(theirs[:, counts])
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-6)
    print(f"same numbers in {len(shared)} features that both have")


def single_visit(pipeline: ProductionPipeline, repeats: int) -> None:
    frame, _ = make_demo_cohort(n_patients=60, seed=3)
    frame = clean(frame)
    visit = frame["visit_id"].value_counts()[lambda n: n >= 40].index[0]
    one = frame[frame["visit_id"] == visit].head(40).reset_index(drop=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, plain = (
            median_ms(f, n)
            for f, n in ((lambda: pipeline.predict(one), repeats), (lambda: plain_features(one), max(repeats // 50, 5)))
        )
    print(f"one visit of 40 observations, {len(pipeline.feature_names)} features, {pipeline.config.model['name']}")
    print(f"ProductionPipeline.predict        {ours:7.2f} ms median")
    print(f"pandas groupby-and-apply          {plain:7.2f} ms median, features alone, without a model")
    print(f"ratio: {plain / ours:,.0f} times as fast")


def median_ms(work, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def benchmark(arguments: argparse.Namespace) -> int:
    if arguments.observations:
        frame = clean(pd.read_parquet(arguments.observations))
    else:
        frame = clean(make_demo_cohort(n_patients=arguments.patients, seed=5)[0])
    whole_visits(frame, arguments.plain_visits)
    if Path(arguments.config).exists():
        single_visit(ProductionPipeline(arguments.config, arguments.model), arguments.repeats)
    else:
        print(f"single visit: skipped, no model at {arguments.config}; run the search and train_best_model.py --full")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/features.py", "observations", "config", "model")
    parser.add_argument(
        "--patients", type=int, default=6000, help="of the demo cohort, where no observations are named"
    )
    parser.add_argument("--plain-visits", type=int, default=200, help="that the rival computes")
    parser.add_argument("--repeats", type=int, default=1000, help="of the single score")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
