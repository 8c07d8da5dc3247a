"""Should the model abstain where a patient is unlike those it learned from? PhysioNet/CinC Challenge 2019, hospital A.

There are three measures of being unlike, each with the limit that 2% of the snapshots of usual patients exceed. They
are how far the farthest of the latest values lies from those of the training, how far all latest values lie together
(Mahalanobis, of normal scores), and how rare the leaves are that a snapshot falls into. Abstaining is worth it if
flagged snapshots are scored worse than others. Intruders are patients whose data were spoiled as interfaces spoil them:
other units, other codes, swapped columns.
Observations and labels are those of prepare_data.py physionet2019.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import DONE, log, make_parser, number, run
from common.labels import read_labels
from common.metrics import fit_platt, ranking_scores
from feature_pipeline import (
    BadObservations,
    Feature,
    FeaturePlan,
    ScoreModel,
    SnapshotSettings,
    concept_of,
    read_observations,
)
from training.candidates import CONFIGURATION, feature_set_names
from training.fitting import FeatureTable, fit_model
from training.snapshots import TrainingData, make_training_data

SHARE = 0.02  # of usual snapshots that are flagged
RECENT = 24.0  # hours
RANKS = np.concatenate([[0.001, 0.005, 0.01, 0.025], np.arange(0.05, 0.96, 0.05), [0.975, 0.99, 0.995, 0.999]])
VALUES = ["observation_value", "reference_range_min", "reference_range_max"]
SI = {"Glucose": 1 / 18.016, "Creatinine": 88.4, "BUN": 1 / 2.801, "Hgb": 10, "Calcium": 1 / 4.008}
SI |= {"Magnesium": 1 / 2.431, "Phosphate": 1 / 3.097, "Bilirubin_total": 17.1}


# ---------------------------------------------------------------------------------------------- intruders


def scaled(frame: pd.DataFrame, factors: Mapping[str, float]) -> pd.DataFrame:
    factor = frame["observation_type_code"].map(factors).fillna(1.0).to_numpy()
    return frame.assign(**{name: frame[name] * factor for name in VALUES})


def swapped(frame: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    code = frame["observation_type_code"].replace({one: other, other: one})
    return frame.assign(observation_type_code=code)


def value_and_range(frame: pd.DataFrame) -> pd.DataFrame:
    low = frame["reference_range_min"].fillna(frame["observation_value"])
    return frame.assign(observation_value=low, reference_range_min=frame["observation_value"])


Spoil = Callable[[pd.DataFrame], pd.DataFrame]


def intruders() -> dict[str, Spoil]:
    def units(factors: Mapping[str, float]) -> Spoil:
        return lambda frame: scaled(frame, factors)

    def swap(one: str, other: str) -> Spoil:
        return lambda frame: swapped(frame, one, other)

    found = {f"unit: {code} in SI": units({code: factor}) for code, factor in SI.items()}
    found |= {
        "unit: all of these": units(SI),
        "unit: PaCO2 in kPa": units({"PaCO2": 1 / 7.5}),
        "unit: pressures in kPa": units(dict.fromkeys(("SBP", "MAP", "DBP"), 1 / 7.5)),
        "unit: WBC ten times": units({"WBC": 10}),
        "code: urea as BUN": units({"BUN": 2.14}),
        "code: ionised calcium as Calcium": units({"Calcium": 1.15 / 8.2}),
    }
    pairs = ["HR,Resp", "SBP,DBP", "HR,SBP", "MAP,DBP", "HR,O2Sat", "Temp,Hct", "Hct,Hgb", "WBC,Hgb", "PaCO2,HCO3"]
    pairs += ["BUN,Creatinine", "Glucose,BUN", "Magnesium,Phosphate", "Lactate,Potassium", "Platelets,Glucose"]
    found |= {f"swapped: {pair.replace(',', ' and ')}": swap(*pair.split(",")) for pair in pairs}
    return found | {"swapped: values and lower limits": value_and_range}


# ----------------------------------------------------------------------------------------------- measures


class Values:
    """How the latest values of codes, none older than a day, lie among those of the training."""

    def __init__(self, codes: Sequence[str], data: TrainingData):
        names = [Feature("last", "last", code) for code in codes], [Feature("recency", "age", code) for code in codes]
        self._n, self._plan = len(codes), FeaturePlan([str(name) for part in names for name in part])
        values = self.of(data)
        self._grid = np.nanquantile(values, RANKS, axis=0)
        scores = self._normal_scores(values)
        known = ~np.isnan(scores)
        clipped = np.clip(np.where(known, scores, 0.0), -4, 4)
        together = known.T.astype(float) @ known
        covariance = np.where(together >= 200, clipped.T @ clipped / np.maximum(together, 1), 0.0)
        scale = np.sqrt(np.maximum(np.diag(covariance), 0.5))
        level, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
        self._correlation = (vectors * np.maximum(level, 0.05)) @ vectors.T

    def of(self, data: TrainingData) -> np.ndarray:
        """(n_snapshots, n_codes) NaN where there is none."""
        found = FeaturePlan(self._plan.names).evaluate(data.observations, data.visit, data.as_of)
        return np.where(found[:, self._n :] <= RECENT, found[:, : self._n], np.nan)

    def farthest(self, values: np.ndarray) -> np.ndarray:
        """The largest distance from the code's median, in units of the distance of its 0.1% or 99.9% quantile."""
        low, middle, high = self._grid[0], self._grid[len(self._grid) // 2], self._grid[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            far = (values - middle) / np.where(values < middle, low - middle, high - middle)
        return np.nanmax(np.nan_to_num(far, nan=0.0), axis=1)

    def together(self, values: np.ndarray) -> np.ndarray:
        """Mahalanobis distance of what is measured, by Fisher's approximation comparable for any number of codes."""
        scores = self._normal_scores(values)
        distance, diagonal = np.empty(len(values)), np.arange(self._n)
        for start in range(0, len(values), 2000):
            part = scores[start : start + 2000]
            known = ~np.isnan(part)
            part = np.where(known, part, 0.0)
            correlation = self._correlation * (known[:, :, None] & known[:, None, :])
            correlation[:, diagonal, diagonal] = 1.0
            solved = np.linalg.solve(correlation, part[:, :, None])[:, :, 0]
            distance[start : start + 2000] = np.sum(part * solved, axis=1)
        n = np.maximum((~np.isnan(scores)).sum(axis=1), 1)
        return np.sqrt(2 * distance) - np.sqrt(2 * n - 1)

    def _normal_scores(self, values: np.ndarray) -> np.ndarray:
        """Normal scores of the ranks in training; beyond the ends of the grid in proportion to the distance."""
        rank, scores = norm.ppf(RANKS), np.full(values.shape, np.nan)
        middle = self._grid[len(self._grid) // 2]
        for j, grid in enumerate(self._grid.T):
            x = values[:, j]
            below, above = np.interp(x, grid, rank), -np.interp(-x, -grid[::-1], -rank[::-1])
            score = np.where(np.isnan(x), np.nan, (below + above) / 2)
            for end, outside in ((0, x < grid[0]), (-1, x > grid[-1])):
                width = max(abs(grid[end] - middle[j]), 1e-9)
                score[outside] = rank[end] * np.abs(x[outside] - middle[j]) / width
            scores[:, j] = score
        return np.clip(scores, -15, 15)


class Leaves:
    """How rare the leaves of the model's trees are."""

    def __init__(self, model: ScoreModel, features: np.ndarray):
        [member] = model.members
        self._booster = member.booster
        leaves = self._leaves(features)
        self._surprise = [-np.log((np.bincount(column, minlength=256) + 0.5) / len(leaves)) for column in leaves.T]

    def _leaves(self, features: np.ndarray) -> np.ndarray:
        return self._booster.predict(features, pred_leaf=True, num_threads=1).astype(int)

    def rare(self, features: np.ndarray) -> np.ndarray:
        leaves = self._leaves(features)
        return np.mean([own[column] for own, column in zip(self._surprise, leaves.T, strict=True)], axis=0)


# ------------------------------------------------------------------------------------------------ figures


def interval(data: TrainingData, of_rows: Callable[[np.ndarray], float], n: int = 300) -> tuple[float, float]:
    """95%, resampled by patient."""
    _, own = np.unique(data.group, return_inverse=True)
    rows = np.split(np.argsort(own, kind="stable"), np.cumsum(np.bincount(own))[:-1])
    generator, found = np.random.default_rng(0), []
    for _ in range(n):
        found.append(of_rows(np.concatenate([rows[k] for k in generator.integers(0, len(rows), len(rows))])))
    known = np.array(found)[~np.isnan(found)]
    return tuple(np.percentile(known, [2.5, 97.5]).tolist()) if len(known) else (np.nan, np.nan)


def quality(data: TrainingData, probability: np.ndarray, flagged: np.ndarray) -> str:
    """Cells of a row: shares that are flagged; ROC AUC and expected over observed of what is answered, and flagged."""
    label = data.label

    def auc(rows: np.ndarray, which: bool) -> float:
        some = rows[flagged[rows] == which]
        return (
            ranking_scores(label[some], probability[some])["roc_auc"] if 0 < label[some].sum() < len(some) else np.nan
        )

    def ratio(rows: np.ndarray, which: bool) -> float:
        some = rows[flagged[rows] == which]
        return float(probability[some].sum() / label[some].sum()) if label[some].any() else np.nan

    cells, everything = [f"{flagged.mean():.1%}", f"{flagged[label == 1].mean():.1%}"], np.arange(len(label))
    for figure, digits in ((auc, 3), (ratio, 2)):
        for which in (False, True):
            low, high = interval(data, lambda rows, figure=figure, which=which: figure(rows, which))
            cells.append(f"{figure(everything, which):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
    return " | ".join(cells)


def benchmark(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    if not (arguments.observations and arguments.labels):
        raise BadObservations("name --observations and --labels, as prepare_data.py physionet2019 writes them")
    frame, labels = pd.read_parquet(arguments.observations), read_labels(arguments.labels)
    clients = np.random.default_rng(arguments.seed).permutation(frame["client"].unique())[: arguments.patients]
    # to learn from, to set the limits by, to judge
    parts = [frame[frame["client"].isin(some)] for some in np.split(clients, (len(clients) * np.array([4, 6])) // 10)]

    def snapshots(table: pd.DataFrame) -> TrainingData:
        settings = SnapshotSettings(after_onset=True)
        return make_training_data(read_observations(table).check_usable(), labels, settings)

    learned, usual, judged = map(snapshots, parts)
    codes = [code for code in learned.observations.codes if not concept_of(code).static]
    plan = FeaturePlan(feature_set_names("patterns", learned.observations.codes))
    table = FeatureTable.of(learned, plan.names, arguments.seed)
    everything, columns = np.arange(len(learned.label)), np.arange(len(plan.names))
    model = fit_model(CONFIGURATION["lightgbm_shallow"], table, everything, columns, learned.label, arguments.seed)
    values, leaves = Values(codes, learned), Leaves(model, table.plain.T)
    log.info("trained on %s, %.0f s", learned.describe(), time.perf_counter() - began)

    def measured(data: TrainingData) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(probabilities, the measures) of the snapshots."""
        features, latest = plan.evaluate(data.observations, data.visit, data.as_of), values.of(data)
        measures = {"farthest value": values.farthest(latest), "values together": values.together(latest)}
        return model.probability(features), measures | {"rare leaves": leaves.rare(features)}

    raw = model.log_odds(plan.evaluate(usual.observations, usual.visit, usual.as_of))
    model.slope, model.intercept = fit_platt(raw, usual.label)
    limit = {name: np.quantile(found, 1 - SHARE) for name, found in measured(usual)[1].items()}
    kinds, few = intruders(), parts[2][parts[2]["client"].isin(clients[-arguments.spoiled :])]
    print(f"\n| intruders (all of {arguments.spoiled:,} patients) |", " | ".join(limit), "| ROC AUC of all |")
    print("|---|" + "---|" * (len(limit) + 1))
    for name, spoil in {"none": lambda table: table, **kinds}.items():
        data = snapshots(spoil(few))
        probability, found = measured(data)
        caught = " | ".join(f"{np.mean(found[measure] > limit[measure]):.0%}" for measure in limit)
        print(f"| {name} | {caught} | {ranking_scores(data.label, probability)['roc_auc']:.3f} |", flush=True)

    generator = np.random.default_rng(arguments.seed)
    kind = dict(zip(clients, generator.integers(0, len(kinds), len(clients)), strict=True))
    of_row = parts[2]["client"].map(kind)
    mixed = snapshots(pd.concat([spoil(parts[2][of_row == k]) for k, spoil in enumerate(kinds.values())]))
    heads = ("patients", "measure", "flagged", "of the positive", "ROC AUC answered", "flagged")
    print("\n|", " | ".join((*heads, "expected/observed answered", "flagged")), "|\n|" + "---|" * 8)
    for name, data in (("usual", judged), ("each with one of the intruders", mixed)):
        probability, found = measured(data)
        for measure in limit:
            cells = quality(data, probability, found[measure] > limit[measure])
            print(f"| {name} | {measure} | {cells} |", flush=True)
    print(f"\nwhole benchmark: {time.perf_counter() - began:.0f} s")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__,
        "python benchmarks/unlike.py --observations A_observations.parquet --labels A_labels.parquet",
        *("observations", "labels", "seed"),
    )
    parser.add_argument("--patients", type=number(int, 100), help="at most so many patients, for a quick look")
    parser.add_argument(
        "--spoiled", type=number(int, 10), default=1500, help="patients who are spoiled in each way by itself"
    )
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
