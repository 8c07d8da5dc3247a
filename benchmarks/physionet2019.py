"""The project's features and models on the PhysioNet/CinC Challenge 2019: a prediction for every hour of every patient.

Five-fold cross-validation grouped by patient; each prediction sees only what was known at that hour. Reports hourly
ROC AUC and average precision, patient-level ROC AUC and average precision, and the challenge's normalized utility
(Reyna et al., Crit Care Med 2020;48:210-217, doi 10.1097/CCM.0000000000004145). The threshold of each fold is chosen on
patients of other folds.

Observations and labels are those of prepare_data.py physionet2019: labels with sepsis_onset, first_hour and last_hour.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import DONE, log, make_parser, run
from common.labels import read_labels
from common.metrics import bootstrap_intervals, ranking_scores
from feature_pipeline import (
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    BadObservations,
    SnapshotSettings,
    listed,
    read_observations,
    to_micros,
)
from sources.physionet2019 import ADMISSION
from training.candidates import CONFIGURATION, FEATURE_SETS, part_names
from training.fitting import FeatureTable, judge_candidates
from training.snapshots import TrainingData, grouped_folds, in_order_of_names

EARLIEST, OPTIMAL, LATEST = -12, -6, 3  # hours from onset
FALSE_ALARM, MISS = -0.05, -2.0


def utilities(hours_from_onset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(utility of calling, utility of not calling) at each hour; `hours_from_onset` is NaN for patients without sepsis.

    Calling: -0.05 earlier than 12 h before onset, then rising from 0 to 1 at 6 h before it, falling to 0 at 3 h after
    it, 0 later. Not calling: 0 until 6 h before onset, falling to -2 at 3 h after it, 0 later. Without sepsis: -0.05
    and 0.
    """
    h = hours_from_onset
    rising = (h - EARLIEST) / (OPTIMAL - EARLIEST)
    falling = (LATEST - h) / (LATEST - OPTIMAL)
    call = np.where(h < EARLIEST, FALSE_ALARM, np.where(h <= OPTIMAL, rising, np.where(h <= LATEST, falling, 0.0)))
    silent = np.where((h > OPTIMAL) & (h <= LATEST), MISS * (h - OPTIMAL) / (LATEST - OPTIMAL), 0.0)
    without = np.isnan(h)
    return np.where(without, FALSE_ALARM, call), np.where(without, 0.0, silent)


def normalized_utility(hours_from_onset: np.ndarray, called: np.ndarray) -> float:
    """Sum over all hours, scaled so that never calling is 0 and the best possible calls are 1."""
    call, silent = utilities(hours_from_onset)
    none, best = silent.sum(), np.maximum(call, silent).sum()
    return float((np.where(called, call, silent).sum() - none) / (best - none))


def best_threshold(hours_from_onset: np.ndarray, score: np.ndarray) -> float:
    """The score from which calling gives the highest utility."""
    call, silent = utilities(hours_from_onset)
    order = np.argsort(-score, kind="stable")
    gain = np.cumsum((call - silent)[order])
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    gain[~last_of_tie] = -np.inf
    return float(score[order][gain.argmax()])


def hourly_data(observations: str, labels: str) -> tuple[TrainingData, np.ndarray]:
    """(a snapshot for every scored hour, hours from onset or NaN). Positive: onset at most 6 h away, or past."""
    table = pd.read_parquet(labels) if labels.endswith(".parquet") else pd.read_csv(labels, dtype={"client": str})
    texts = read_labels(table)
    if missing := [name for name in ("first_hour", "last_hour") if name not in table.columns]:
        raise BadObservations(f"labels: missing column {listed(missing)}; prepare_data.py physionet2019 writes them")
    known = in_order_of_names(read_observations(observations))
    place = {key: i for i, key in enumerate(known.keys())}
    visit_of_row = np.array([place.get(key, -1) for key in zip(texts["client"], texts["visit_id"], strict=True)])
    if (visit_of_row < 0).any():
        raise BadObservations(
            f"{(visit_of_row < 0).sum()} labels have no observations; the benchmark scores every hour"
        )
    order = np.argsort(visit_of_row)
    first, last = (table[name].to_numpy()[order] for name in ("first_hour", "last_hour"))
    onset_of_row, visit_of_row = texts["sepsis_onset"].to_numpy()[order], visit_of_row[order]
    number = last - first + 1
    row = np.repeat(np.arange(len(table)), number)
    hour = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number) + first[row]
    as_of = to_micros(ADMISSION) + hour * MICROSECONDS_PER_HOUR
    onset = onset_of_row[row]
    from_onset = np.where(onset == NO_TIME, np.nan, (as_of - onset) / MICROSECONDS_PER_HOUR)
    with np.errstate(invalid="ignore"):
        label = (from_onset >= OPTIMAL).astype(np.int8)
    data = TrainingData(
        observations=known,
        settings=SnapshotSettings(1, 6, after_onset=True),
        visit=visit_of_row[row],
        as_of=as_of,
        label=label,
        onset=onset,
        group=pd.factorize(known.client_text[visit_of_row[row]])[0],
        grouped_by="client",
        synthetic=False,
    )
    return data, from_onset


def patient_level(data: TrainingData, from_onset: np.ndarray, score: np.ndarray, seed: int = 0) -> dict[str, float]:
    """ROC AUC and average precision of each patient's highest score.

    Septic patients: over the hours before onset. The others: over their first hours, as many as a septic patient drawn
    at random had before onset (among those with a record not longer than their own).
    """
    visits, start, number = np.unique(data.visit, return_index=True, return_counts=True)
    septic = ~np.isnan(from_onset[start])
    before = np.array([(from_onset[s : s + n] < 0).sum() for s, n in zip(start, number, strict=True)])
    lengths = np.sort(before[septic & (before > 0)])
    generator = np.random.default_rng(seed)
    comparable = np.searchsorted(lengths, number, side="right")
    drawn = lengths[(generator.random(len(visits)) * np.maximum(comparable, 1)).astype(int)]
    kept = np.where(septic, before, np.where(comparable > 0, drawn, number))
    use = kept > 0
    highest = [score[s : s + n].max() for s, n in zip(start[use], kept[use], strict=True)]
    return ranking_scores(septic[use].astype(int), np.array(highest))


def fitted_scores(
    data: TrainingData, table: FeatureTable, columns: np.ndarray, model: str, splits: list, seed: int, jobs: int
) -> np.ndarray:
    """Log-odds of the held-out snapshots of each (training rows, held-out rows); NaN elsewhere."""
    results = joblib.Parallel(n_jobs=jobs)(
        joblib.delayed(judge_candidates)([CONFIGURATION[model]], table, columns, data.label, fit, held_out, seed)
        for fit, held_out in splits
    )
    score = np.full(len(data.label), np.nan)
    for (_, held_out), [result] in zip(splits, results, strict=True):
        if "error" in result:
            raise RuntimeError(result["error"])
        score[held_out] = result["log_odds"]
    return score


def inner_splits(folds: list) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each fold: its training rows without the next fold's patients, and these patients' rows."""
    following = [folds[(k + 1) % len(folds)][1] for k in range(len(folds))]
    return [(np.setdiff1d(fit, rest), rest) for (fit, _), rest in zip(folds, following, strict=True)]


def report(
    data: TrainingData, from_onset: np.ndarray, score: np.ndarray, folds: list, inner: np.ndarray | None = None
) -> dict[str, Any]:
    """All figures of cross-validated scores.

    The threshold of a fold is the best one on the next fold's patients, by the `inner` scores: of a model that saw
    neither of the two folds. Without `inner` it is the best one on the cross-validated scores of all other folds.
    """
    scored = ~np.isnan(score)
    called = np.zeros(len(score), dtype=bool)
    for k, (_, held_out) in enumerate(folds):
        if inner is None:
            others = scored.copy()
            others[held_out] = False
            chosen_on, basis = np.flatnonzero(others), score
        else:
            chosen_on, basis = folds[(k + 1) % len(folds)][1], inner
        called[held_out] = score[held_out] >= best_threshold(from_onset[chosen_on], basis[chosen_on])
    subset = TrainingData(
        **{**vars(data), **{k: getattr(data, k)[scored] for k in ("visit", "as_of", "label", "onset", "group")}}
    )
    return {
        "normalized_utility": normalized_utility(from_onset[scored], called[scored]),
        "hourly": ranking_scores(data.label[scored], score[scored]),
        "hourly_95": bootstrap_intervals(data.label[scored], score[scored], data.group[scored], 200),
        "patient": patient_level(subset, from_onset[scored], score[scored]),
        "by_hours": by_hours(subset, from_onset[scored], score[scored], called[scored]),
        "called": float(called[scored].mean()),
        "n_snapshots": int(scored.sum()),
        "n_patients": len(np.unique(data.visit[scored])),
    }


def by_hours(
    data: TrainingData, from_onset: np.ndarray, score: np.ndarray, called: np.ndarray
) -> list[dict[str, float]]:
    """The figures by hours since the visit's first observation: where the utility is earned."""
    hours = (data.as_of - data.observations.first_time[data.visit]) / MICROSECONDS_PER_HOUR
    call, silent = utilities(from_onset)
    scale = (np.maximum(call, silent) - silent).sum()
    rows = []
    for low, high in ((0, 6), (6, 12), (12, 24), (24, 48), (48, 96), (96, np.inf)):
        band = (hours >= low) & (hours < high)
        if band.any() and 0 < data.label[band].sum() < band.sum():
            rows.append(
                {
                    "from_hour": low,
                    "n": int(band.sum()),
                    "positive_rate": float(data.label[band].mean()),
                    "roc_auc": ranking_scores(data.label[band], score[band])["roc_auc"],
                    "utility_earned": float(((call - silent)[band & called]).sum() / scale),
                    "utility_attainable": float((np.maximum(call, silent) - silent)[band].sum() / scale),
                }
            )
    return rows


def line(name: str, figures: dict[str, Any], seconds: float) -> str:
    return (
        f"{name:<40s} utility {figures['normalized_utility']:.4f}  hourly ROC AUC {figures['hourly']['roc_auc']:.4f}  "
        f"av. prec. {figures['hourly']['average_precision']:.4f}  patient ROC AUC {figures['patient']['roc_auc']:.4f}  "
        f"av. prec. {figures['patient']['average_precision']:.4f}  ({seconds:.0f} s)"
    )


def benchmark(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    if not (arguments.observations and arguments.labels):
        raise BadObservations("name --observations and --labels, as prepare_data.py physionet2019 writes them")
    data, from_onset = hourly_data(arguments.observations, arguments.labels)
    log.info("%s; read in %.1f s", data.describe(), time.perf_counter() - began)
    blocks = FEATURE_SETS[arguments.feature_set]
    codes = list(data.observations.codes)
    names_of_block = {block: part_names(block, codes) for block in blocks}
    names = [name for block in blocks for name in names_of_block[block]]
    start = time.perf_counter()
    table = FeatureTable.of(data, names, arguments.seed)
    log.info(
        "%d features of %s hourly snapshots, twice (as they are, and with codes hidden), in %.1f s",
        *(len(names), f"{len(data.label):,}", time.perf_counter() - start),
    )
    folds = list(grouped_folds(data, np.arange(len(data.label)), arguments.folds, arguments.seed))
    results: dict[str, Any] = {}

    def measure(name: str, columns: np.ndarray, only: int | None = None, nested: bool = False) -> None:
        start = time.perf_counter()
        some = folds[:only]
        fit = partial(fitted_scores, data, table, columns, arguments.model, seed=arguments.seed, jobs=arguments.jobs)
        score = fit(splits=some)
        inner = fit(splits=inner_splits(folds)) if nested else None
        results[name] = report(data, from_onset, score, some, inner)
        print(line(name, results[name], time.perf_counter() - start), flush=True)

    whole = np.arange(len(names))
    if not arguments.only_ablation:
        measure(f"{arguments.feature_set} with {arguments.model}", whole, nested=arguments.inner_thresholds)
        print(
            pd.DataFrame(results[f"{arguments.feature_set} with {arguments.model}"]["by_hours"]).to_string(index=False)
        )
    if arguments.ablation_folds:
        measure(f"all blocks, {arguments.ablation_folds} folds", whole, arguments.ablation_folds)
        for block in blocks:
            without = np.flatnonzero([name not in set(names_of_block[block]) for name in names])
            if len(without):
                measure(f"without {block}", without, arguments.ablation_folds)
    print(f"whole benchmark: {time.perf_counter() - began:.0f} s")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__,
        "python benchmarks/physionet2019.py --observations A_observations.parquet --labels A_labels.parquet",
        *("observations", "labels", "seed", "jobs"),
    )
    parser.add_argument("--feature-set", choices=tuple(FEATURE_SETS), default="patterns", help="of the search")
    parser.add_argument(
        "--model-configuration",
        dest="model",
        choices=tuple(CONFIGURATION),
        help="of the search",
        default="lightgbm_ensemble",
    )
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation")
    parser.add_argument(
        "--inner-thresholds",
        action="store_true",
        help="choose each threshold by a model that saw neither the fold nor the patients it is chosen on "
        "(twice the time); else on the cross-validated scores of the other folds",
    )
    parser.add_argument(
        "--ablation-folds", type=int, default=0, help="also leave out each block, on so many folds, two or more"
    )
    parser.add_argument("--only-ablation", action="store_true", help="without the main figures")
    parser.add_argument("--json", help="also write the figures to this file")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
