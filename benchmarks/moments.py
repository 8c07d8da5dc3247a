"""Calibration by the moments of training and of service: at which moments should training take its snapshots?

A model is trained for each kind of moments and scored at each kind on other patients: expected over observed positives,
ROC AUC, average precision. Kinds: the grid of training; now (a random time between two points of the grid); the last
observation before now, judged for now, as a file of present stays is scored; each arrival of an observation; the last
observation before the grid, judged for its own time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import DONE, make_parser, number, run
from common.metrics import ranking_scores
from feature_pipeline import MICROSECONDS_PER_HOUR, NO_TIME, SnapshotSettings
from sources.demo_cohort import make_demo_cohort
from training.candidates import CONFIGURATION, FEATURE_SETS, feature_set_names
from training.fitting import FeatureTable, calibrated, cross_validate, filled, fit_model
from training.snapshots import TrainingData, load_training_data


def neighbour(data: TrainingData, moment: np.ndarray, after: bool) -> np.ndarray:
    """(n_snapshots,) time of the visit's first observation at `moment` or after it, or of its last one before or then;
    NO_TIME for none."""
    o = data.observations
    visit_of_row = np.repeat(o.group_visit, np.diff(o.group_start))
    order = np.lexsort((o.time, visit_of_row))
    start = np.searchsorted(visit_of_row[order], np.arange(o.n_visits + 1))
    out = np.full(len(moment), NO_TIME)
    for visit in np.unique(data.visit):
        times, rows = o.time[order][start[visit] : start[visit + 1]], np.flatnonzero(data.visit == visit)
        place = np.searchsorted(times, moment[rows], "left" if after else "right") - (not after)
        there = (place >= 0) & (place < len(times))
        out[rows[there]] = times[place[there]]
    return out


def at(data: TrainingData, as_of: np.ndarray, judged: np.ndarray) -> TrainingData:
    """The snapshots at `as_of` with the labels of the moments `judged`; none after onset or the visit's end."""
    horizon = round(data.settings.horizon_hours * MICROSECONDS_PER_HOUR)
    septic = data.onset != NO_TIME
    kept = (as_of != NO_TIME) & (judged <= np.where(septic, data.onset, data.observations.last_time[data.visit]))
    kept &= np.append(True, (np.diff(as_of) != 0) | (np.diff(data.visit) != 0))
    label = (septic & (judged >= data.onset - horizon * septic)).astype(np.int8)
    some = {name: getattr(data, name)[kept] for name in ("visit", "onset", "group")}
    return replace(data, as_of=as_of[kept], label=label[kept], **some)


def kinds_of(data: TrainingData, seed: int) -> dict[str, TrainingData]:
    every = round(data.settings.every_hours * MICROSECONDS_PER_HOUR)
    now = data.as_of + np.random.default_rng(seed).integers(0, every, len(data.as_of))
    arrival, latest = neighbour(data, now, after=True), neighbour(data, data.as_of, after=False)
    return {
        "grid": data,
        "now": at(data, now, now),
        "last before now": at(data, neighbour(data, now, after=False), now),
        "arrival": at(data, arrival, arrival),
        "last before grid": at(data, latest, latest),
    }


def benchmark(arguments: argparse.Namespace) -> int:
    settings = SnapshotSettings(arguments.snapshot_every, 6.0)
    if arguments.observations:
        whole = load_training_data(arguments.observations, arguments.labels, settings)
        first = np.random.default_rng(arguments.seed).random(whole.group.max() + 1) < arguments.share
        parts = []
        for rows in (first[whole.group], ~first[whole.group]):
            some = {n: getattr(whole, n)[rows] for n in ("visit", "as_of", "label", "onset", "group")}
            parts.append(replace(whole, **some))
    else:
        parts = [load_training_data(*make_demo_cohort(n, seed), settings) for n, seed in ((2000, 21), (4000, 22))]
    trained, tested = (kinds_of(data, arguments.seed) for data in parts)
    configuration = CONFIGURATION[arguments.model]
    names = feature_set_names(arguments.feature_set, parts[0].observations.codes)
    tables = {kind: (data, data.evaluate(names)) for kind, data in tested.items()}
    columns = np.arange(len(names))
    for kind, data in trained.items():
        table, rows = FeatureTable.of(data, names), np.arange(len(data.label))
        [out_of_fold], _ = cross_validate([(configuration, columns)], table, data, rows)
        model = fit_model(configuration, table, rows, columns, data.label)
        calibrated(model, out_of_fold, data.label)
        for other, (test, features) in tables.items():
            p = model.probability(filled(features, configuration.fill_value))
            scores = ranking_scores(test.label, p)
            print(
                f"trained at {kind:<16s} scored at {other:<16s} expected/observed {p.sum() / test.label.sum():.3f}  "
                f"ROC AUC {scores['roc_auc']:.4f}  av. prec. {scores['average_precision']:.4f}  "
                f"({test.label.sum()} positive snapshots)",
                flush=True,
            )
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/moments.py", "observations", "labels", "seed")
    parser.add_argument(
        "--snapshot-every", type=number(float, 0.1), default=6.0, help="hours between points of the grid"
    )
    parser.add_argument("--share", type=number(float, 0.1, 0.9), default=0.4, help="share of the clients to train on")
    parser.add_argument("--feature-set", choices=tuple(FEATURE_SETS), default="clinical", help="feature set")
    parser.add_argument(
        "--model-configuration", dest="model", choices=tuple(CONFIGURATION), default="lightgbm_shallow", help="model"
    )
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
