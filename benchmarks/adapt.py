"""A model of one hospital, adapted to another: PhysioNet/CinC Challenge 2019, hospital A cut in two by ICU.

The model of the medical ICU is scored on patients of the surgical ICU (and the other way round), as it is and adapted
with more and more of them. Gains are of patients that no model learned from, with paired 95% intervals, resampled by
patient.
Observations and labels are those of prepare_data.py physionet2019.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import DONE, log, make_parser, number, run
from common.labels import read_labels
from common.metrics import compared
from feature_pipeline import BadObservations, FeaturePlan, SnapshotSettings, read_observations
from training.candidates import CONFIGURATION, feature_set_names
from training.fitting import FeatureTable, fit_model
from training.snapshots import TrainingData, make_training_data
from training.transfer import Source, candidates, fit_best

MEDICAL = "Unit1__last"  # 1: medical ICU, 0: surgical ICU, empty: not known


def by_unit(observations: str, labels: str, patients: int | None) -> tuple[TrainingData, np.ndarray]:
    """(snapshots of patients whose unit is known, whether it is the medical one); of each unit at most `patients`."""
    data = make_training_data(read_observations(observations), read_labels(labels), SnapshotSettings(after_onset=True))
    unit = FeaturePlan([MEDICAL]).evaluate(data.observations, data.visit, data.as_of)[:, 0]
    kept = np.zeros(len(unit), dtype=bool)
    for level in (0.0, 1.0):
        groups = np.unique(data.group[unit == level])
        kept |= (unit == level) & np.isin(data.group, groups[:patients])
    return data.at(np.flatnonzero(kept)), unit[kept] == 1


def rows(source: Source, others: np.ndarray, sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """The parent of `source` on patients of the other unit, whose snapshots are `others`, as it is and adapted.

    Half of the patients are held out; for sizes beyond the other half, all that are left.
    """
    data, table = source.data, source.table
    order = np.random.default_rng(seed).permutation(np.unique(data.group[others]))
    known, found = candidates(source.parent), []
    for size in sizes:
        if size >= len(order):
            continue
        start = time.perf_counter()
        learned = others[np.isin(data.group[others], order[:size])]
        held_out = others[np.isin(data.group[others], order[max(size, len(order) // 2) :])]
        own = Source(source.parent, source.configuration, data.at(learned), table.at(learned), seed=seed)
        fitted = fit_best(own, known)
        features = source.features(held_out)
        before, after = source.parent.probability(features), fitted.model.probability(features)
        figures = compared(data.label[held_out], before, after, data.group[held_out], 0.05, seed=seed)
        row = {
            "patients": size,
            "positive_snapshots": int(data.label[learned].sum()),
            "held_out_patients": len(np.unique(data.group[held_out])),
            "candidate": fitted.candidate.name,
            **{name: figures[name] for name in ("roc_auc", "average_precision", "brier")},
            "seconds": round(time.perf_counter() - start, 1),
        }
        found.append(row)
        print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    gains = " | ".join(
        f"{f['old']:.3f} | {f['new']:.3f} | {f['difference']:+.3f} ({f['low']:+.3f} to {f['high']:+.3f})"
        for f in (row["roc_auc"], row["average_precision"])
    )
    return (
        f"| {row['patients']:,} ({row['positive_snapshots']:,}) | {gains} | {row['candidate']} | {row['seconds']:.0f} |"
    )


def benchmark(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    if not (arguments.observations and arguments.labels):
        raise BadObservations("name --observations and --labels, as prepare_data.py physionet2019 writes them")
    data, medical = by_unit(arguments.observations, arguments.labels, arguments.patients)
    names = feature_set_names("patterns", data.observations.codes)
    table = FeatureTable.of(data, names, arguments.seed)
    log.info("%s; %d features, %.0f s", data.describe(), len(names), time.perf_counter() - began)
    configuration, columns, results = CONFIGURATION[arguments.model], np.arange(len(names)), {}
    for first, other, own in (("medical", "surgical", medical), ("surgical", "medical", ~medical)):
        start = time.perf_counter()
        parent = fit_model(configuration, table, np.flatnonzero(own), columns, data.label, arguments.seed)
        print(f"\nmodel of the {first} ICU ({time.perf_counter() - start:.0f} s) on patients of the {other} ICU\n")
        heads = ("patients (positive snapshots)", *("ROC AUC as it is", "adapted", "gain"))
        print("|", " | ".join((*heads, "average precision as it is", "adapted", "gain", "chosen", "seconds")), "|")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        source = Source(parent, configuration, data, table, seed=arguments.seed)
        results[f"{first} to {other}"] = rows(source, np.flatnonzero(~own), arguments.sizes, arguments.seed)
    print(f"\nwhole benchmark: {time.perf_counter() - began:.0f} s")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return DONE


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__,
        "python benchmarks/adapt.py --observations A_observations.parquet --labels A_labels.parquet",
        *("observations", "labels", "seed"),
    )
    parser.add_argument("--sizes", type=sizes, default="100,250,500,1000,2000,4000", metavar="N,N", help="of patients")
    parser.add_argument(
        "--patients", type=number(int, 1), help="at most so many patients of each ICU, for a quick look"
    )
    parser.add_argument(
        "--model-configuration",
        dest="model",
        choices=tuple(CONFIGURATION),
        default="lightgbm_ensemble",
        help="model configuration of the parent",
    )
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
