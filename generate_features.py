"""Searches for the best features and model: 10 feature sets x 8 model configurations.

Candidates are ranked by ROC AUC + average precision on validation data; the best few are compared once more by
grouped cross-validation; the winner alone meets the test part. Writes ``best_model_config.json``,
``optimization_log.json`` and ``optimization_summary.txt``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from common.command_line import make_parser, number, run
from feature_pipeline import MOST_HOURS
from training.candidates import CONFIGURATION, FEATURE_SETS
from training.search import QUICK_MODELS, QUICK_SETS, search_features


def thresholds(text: str) -> tuple[float, float]:
    """`0.4,0.7` as a pair."""
    medium, high = (float(part) for part in text.split(","))
    if not 0 < medium < high < 1:
        raise ValueError
    return medium, high


def choice_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated names that must be among the known ones."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return tuple(dict.fromkeys(names))

    return read


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__,
        "python generate_features.py --observations observations.parquet --labels labels.parquet --horizon 6",
        *("observations", "labels", "models-dir", "seed", "jobs"),
    )
    parser.add_argument(
        "--snapshot-every",
        type=number(float, 0.01, MOST_HOURS),
        default=6.0,
        metavar="HOURS",
        help="between snapshots of a visit",
    )
    parser.add_argument(
        "--horizon",
        type=number(float, 0, MOST_HOURS),
        default=6.0,
        metavar="HOURS",
        help="positive this long before onset",
    )
    parser.add_argument("--after-onset", action="store_true", help="keep snapshots after onset, as positives")
    parser.add_argument("--synthetic", action="store_true", help="no real patients: every report shall say so")
    parser.add_argument("--synonyms", metavar="FILE", help="CSV code,concept: what the hospital's own codes mean")
    parser.add_argument(
        "--risk-thresholds",
        type=thresholds,
        default=(0.4, 0.7),
        metavar="MEDIUM,HIGH",
        help="probabilities at which risk is called medium and high",
    )
    parser.add_argument(
        "--sensitivity", type=number(float, 0.01, 1), default=0.8, help="that the decision threshold shall reach"
    )
    parser.add_argument(
        "--rank-by",
        choices=("score", "hidden_score"),
        default="score",
        help="which candidates are finalists: by ROC AUC + average precision on the validation part as it is, or with "
        "codes hidden in many visits, for a model that shall travel to other hospitals",
    )
    parser.add_argument("--finalists", type=number(int, 1), default=3, help="candidates that are cross-validated")
    parser.add_argument("--folds", type=number(int, 2), default=5, help="of the cross-validation")
    parser.add_argument(
        "--quick", action="store_true", help=f"first look: {len(QUICK_SETS) * len(QUICK_MODELS)} candidates"
    )
    parser.add_argument("--feature-sets", type=choice_of(tuple(FEATURE_SETS)), metavar="A,B", help="only these")
    parser.add_argument("--models", type=choice_of(tuple(CONFIGURATION)), metavar="A,B", help="only these")
    parser.add_argument("--resume", action="store_true", help="keep what the log says was finished on the same data")
    parser.add_argument("--backend", choices=("local", "dask"), default="local", help="where candidates run")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of the Dask cluster, such as tcp://10.0.0.1:8786")
    return run(search_features, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
