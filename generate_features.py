"""Searches for the best features and model among all feature sets and model configurations.

Candidates are ranked by ROC AUC + average precision on validation data. The best few are compared again by grouped
cross-validation, and only the winner is scored on the test part. Writes ``best_model_config.json``,
``optimization_log.json`` and ``optimization_summary.txt``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from common.command_line import DONE, SOME_FAILED, make_parser, number, read_synonyms, run
from feature_pipeline import MOST_HOURS, SnapshotSettings
from training.candidates import CONFIGURATION, FEATURE_SETS
from training.search import QUICK_MODELS, QUICK_SETS, RANKINGS, SearchOptions, search
from training.thresholds import Rule, add_threshold_options, rule_of

GO_ON = "; run the same command with --resume to continue"


def choice_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated names that must be among the known ones."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return tuple(dict.fromkeys(names))

    return read


def work(arguments: argparse.Namespace) -> int:
    given = {f.name: getattr(arguments, f.name) for f in fields(SearchOptions) if hasattr(arguments, f.name)}
    given["feature_sets"] = arguments.feature_sets or (QUICK_SETS if arguments.quick else tuple(FEATURE_SETS))
    given["models"] = arguments.models or (QUICK_MODELS if arguments.quick else tuple(CONFIGURATION))
    given["snapshots"] = SnapshotSettings(arguments.snapshot_every, arguments.horizon, arguments.after_onset)
    given |= {"synonyms": read_synonyms(arguments.synonyms), "rule": rule_of(arguments) or Rule()}
    result = search(SearchOptions(**given), Path(arguments.models_dir))
    print(result.summary.split("\nAll ")[0].rstrip())
    return SOME_FAILED if result.n_failed else DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__,
        "python generate_features.py --observations observations.parquet --labels labels.parquet --horizon 6",
        *("observations", "labels", "models-dir", "seed", "jobs"),
    )
    default = SearchOptions()
    hours = {"type": number(float, 0.01, MOST_HOURS), "metavar": "HOURS", "default": default.snapshots.every_hours}
    parser.add_argument("--snapshot-every", **hours, help="time between snapshots of a visit")
    hours |= {"type": number(float, 0, MOST_HOURS), "default": default.snapshots.horizon_hours}
    parser.add_argument("--horizon", **hours, help="a snapshot is positive if onset is at most this far away")
    parser.add_argument("--after-onset", action="store_true", help="keep snapshots after onset, as positives")
    parser.add_argument("--synthetic", action="store_true", help="the patients are synthetic; every report says so")
    parser.add_argument("--synonyms", metavar="FILE", help="CSV file code,concept: the meaning of your own codes")
    parser.add_argument(
        "--portable",
        action="store_true",
        help="name features by concept, for a model that is used in other hospitals; report what that costs",
    )
    add_threshold_options(parser)
    parser.add_argument(
        "--sensitivity",
        type=number(float, 0.01, 1),
        help="choose the decision threshold of sepsis_prediction for this sensitivity; by default it is that of HIGH",
    )
    parser.add_argument(
        "--rank-by",
        choices=RANKINGS,
        default=default.rank_by,
        help="rank candidates by ROC AUC + average precision on the validation part as it is, or with codes hidden in "
        "many visits, for a model that is used in other hospitals",
    )
    parser.add_argument(
        "--finalists", type=number(int, 1), default=default.finalists, help="number of candidates to cross-validate"
    )
    parser.add_argument(
        "--folds", type=number(int, 2), help="number of cross-validation folds (default: 5, fewer if positives are few)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"for a first look: only {len(QUICK_SETS) * len(QUICK_MODELS)} candidates"
    )
    parser.add_argument("--feature-sets", type=choice_of(tuple(FEATURE_SETS)), metavar="A,B", help="try only these")
    parser.add_argument("--models", type=choice_of(tuple(CONFIGURATION)), metavar="A,B", help="try only these")
    parser.add_argument("--resume", action="store_true", help="continue a search: keep its finished candidates")
    parser.add_argument(
        "--backend", choices=("local", "dask"), default=default.backend, help="where candidates are fitted"
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="address of the Dask cluster, such as tcp://10.0.0.1:8786"
    )
    parser.set_defaults(go_on=GO_ON)
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
