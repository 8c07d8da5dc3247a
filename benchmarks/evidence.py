"""How a model does with less evidence: which hours it answers, and how good the answers are.

Holds out three tenths of the patients, searches and trains on the others, and assesses every hour of the held-out
patients (from the first observation to onset or the end) as a live pattern would: with all their codes, with eight
codes hidden at random in each visit, and with the vital signs alone. Reports the share of visits and hours that get a
probability, ROC AUC, average precision and expected over observed positives of these, and the visits of 100 that ever
reach HIGH and MEDIUM at the default thresholds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import generate_features
import train_best_model
from common.command_line import DONE, log, make_parser, run
from common.labels import read_labels
from common.metrics import describe_figures, figures
from feature_pipeline import BadConfig, Observations, ProductionPipeline
from training.raw_data import held_out_clients, read_raw, write_raw
from training.snapshots import TrainingData, make_training_data

VITALS = ("heart_rate", "respiratory_rate", "systolic_bp", "mean_bp", "diastolic_bp", "temperature", "spo2")
HIDDEN = 8


def without_some_codes(observations: Observations, seed: int) -> Observations:
    """The same visits, each without `HIDDEN` codes of its own choice; static codes stay."""
    generator = np.random.default_rng(seed)
    changing = np.array([not (c and c.static) for c in observations.concepts])
    rank = generator.random((observations.n_visits, len(observations.codes)))
    rank[:, ~changing] = np.inf
    hidden = rank.argsort(axis=1).argsort(axis=1) < HIDDEN
    return observations.without(hidden[observations.group_visit, observations.group_code])


def vital_signs_alone(observations: Observations) -> Observations:
    other = np.array([not (c and (c.static or c.name in VITALS)) for c in observations.concepts])
    return observations.without(other[observations.group_code])


def described(pipeline: ProductionPipeline, data: TrainingData, observations: Observations, seed: int) -> list[str]:
    found = pipeline.assess(observations, data.visit, data.as_of)
    answered = ~np.isnan(found.probability)
    label, probability = data.label[answered], found.probability[answered]
    n_visits = len(np.unique(data.visit))
    scores = figures(label, probability, data.group[answered], data.visit[answered], seed)
    lines = [
        f"{answered.mean():.1%} of {len(answered):,} hours and {len(np.unique(data.visit[answered])) / n_visits:.1%} "
        f"of {n_visits:,} visits answered; UNKNOWN: "
        + (", ".join(f"{r} {np.mean(found.reason == r):.1%}" for r in sorted({*found.reason[~answered]})) or "none"),
    ]
    lines += [f"{name}: {text}" for name, text in describe_figures(scores).items()]
    lines.append(f"expected over observed {probability.sum() / label.sum():.3f} ({int(label.sum()):,} positive hours)")
    for level in ("high", "medium"):
        reached = np.unique(data.visit[answered & (found.probability >= pipeline.config.risk_thresholds[level])])
        lines.append(f"{100 * len(reached) / n_visits:.1f} of 100 visits ever reach {level.upper()}")
    return lines


def work(arguments: argparse.Namespace) -> int:
    if not (arguments.observations and arguments.labels):
        raise BadConfig("name --observations and --labels, with onsets")
    frames = read_raw(arguments.observations, arguments.labels)
    nobody = tuple(frame.iloc[:0] for frame in frames)
    held_out = held_out_clients(nobody, frames)
    parts = [tuple(f[f["client"].isin(held_out) == held] for f in frames) for held in (False, True)]
    with tempfile.TemporaryDirectory(prefix="sepsis-evidence-") as scratch:
        folder = Path(arguments.models_dir or scratch)
        rest = write_raw(Path(scratch), "rest", parts[0])
        named = ["--observations", rest[0], "--labels", rest[1], "--models-dir", str(folder), "--quiet"]
        candidate = ["--feature-sets", arguments.feature_set, "--models", arguments.candidate, "--finalists", "1"]
        jobs = ["--jobs", str(arguments.jobs)]
        if generate_features.main([*named, *candidate, *jobs]) or train_best_model.main(["--full", *named, *jobs]):
            raise BadConfig("the model could not be trained; see above")
        pipeline = ProductionPipeline(folder / "best_model_config.json", folder / "best_model.pkl")
        held_paths = write_raw(Path(scratch), "held_out", parts[1])
        observations = pipeline.reproducer.read(held_paths[0]).check_usable()
        hourly = replace(pipeline.config.snapshots, every_hours=1.0)
        data = make_training_data(observations, read_labels(held_paths[1]), hourly)
    log.info("%s", data.describe())
    print(f"minimum of evidence: {pipeline.config.minimum_evidence}")
    whole = data.observations
    situations = {
        "as they are": whole,
        f"{HIDDEN} codes hidden at random": without_some_codes(whole, arguments.seed),
        "vital signs alone": vital_signs_alone(whole),
    }
    for name, seen in situations.items():
        print(f"{name}:")
        for line in described(pipeline, data, seen, arguments.seed):
            print(f"  {line}")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__,
        "python benchmarks/evidence.py --observations A_observations.parquet --labels A_labels.parquet",
        *("observations", "labels", "models-dir", "seed", "jobs"),
    )
    parser.set_defaults(models_dir=None)
    parser.add_argument("--feature-set", default="patterns", help="the one feature set of the search")
    parser.add_argument("--candidate", default="lightgbm_regularised", help="the one model configuration of the search")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
