"""A deployed model on other patients: shares that are answered and alerted, quality and calibration of the answers.

With everything, with eight codes hidden at random (three times), and with vital signs alone; at the moments of
training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import DONE, make_parser, run
from common.labels import read_labels
from common.metrics import ranking_scores
from feature_pipeline import Observations, ProductionPipeline
from sources.demo_cohort import make_demo_cohort
from training.evidence import VITAL_SIGNS
from training.snapshots import TrainingData, make_training_data

HIDDEN_CODES = 8


def line(pipeline: ProductionPipeline, data: TrainingData, observations: Observations) -> str:
    assessed = pipeline.assess(observations, data.visit, data.as_of)
    known = ~np.isnan(assessed.probability)
    label, probability = data.label[known], assessed.probability[known]

    def visits(rows: np.ndarray) -> float:
        return 100 * len(np.unique(data.visit[rows])) / data.n_visits

    answered = f"answered {100 * known.mean():5.1f}% of snapshots, {visits(known):5.1f}% of visits"
    if not 0 < label.sum() < len(label):
        return answered
    auc, ratio = ranking_scores(label, probability)["roc_auc"], probability.sum() / label.sum()
    high, medium = assessed.level == "HIGH", np.isin(assessed.level, ["HIGH", "MEDIUM"])
    return (
        f"{answered}; ROC AUC {auc:.4f}, expected/observed {ratio:.3f} ({label.sum()} positive); of 100 visits "
        f"{visits(high):.1f} ever HIGH, {visits(medium):.1f} MEDIUM or HIGH"
    )


def benchmark(arguments: argparse.Namespace) -> int:
    pipeline = ProductionPipeline(arguments.config, arguments.model)
    observations, labels = arguments.observations, arguments.labels
    if not observations:
        observations, labels = make_demo_cohort(4000, 22)
    data = make_training_data(
        pipeline.reproducer.read(observations).check_usable(), read_labels(labels), pipeline.config.snapshots
    )
    o, generator = data.observations, np.random.default_rng(arguments.seed)
    print(data.describe())
    print(f"everything                    {line(pipeline, data, o)}", flush=True)
    changing = [i for i, concept in enumerate(o.concepts) if not (concept and concept.static)]
    for _ in range(3):
        hidden = generator.choice(changing, HIDDEN_CODES, replace=False)
        rest = o.without(np.isin(o.group_code, hidden))
        print(f"{HIDDEN_CODES} codes hidden                {line(pipeline, data, rest)}", flush=True)
        print(f"  without {', '.join(o.codes[i] for i in hidden)}")
    vital = [i for i, concept in enumerate(o.concepts) if concept and concept.name in VITAL_SIGNS]
    print(f"vital signs alone             {line(pipeline, data, o.without(~np.isin(o.group_code, vital)))}")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/evidence.py", "config", "model", "observations", "labels", "seed")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
