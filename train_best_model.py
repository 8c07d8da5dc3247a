"""Retrains the best candidate of the search.

Without flags: on the training part, with figures of the untouched test part; nothing is deployed. With --full: on
everything, no holdout; writes ``best_model.pkl``, ``feature_names.json``, ``production_model_info.txt``, a report and
an archived version. Probabilities are calibrated on out-of-fold predictions either way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.command_line import DONE, log, make_parser, run
from training.comparison import compare_and_promote
from training.retraining import retrain
from training.train import train_best_model
from training.versions import list_versions, switch

# ------------------------------------------------------------------------------------------------ the script


def work(arguments: argparse.Namespace) -> int:
    """Does what the options ask for: the versions' part, retraining, or training."""
    directory = Path(arguments.models_dir)
    if arguments.list:
        versions = list_versions(directory)
        for v in versions:
            scores = f"{v['roc_auc']:.4f}  {v['average_precision']:.4f}" if v["roc_auc"] is not None else ""
            print(f"{'*' if v['deployed'] else ' '} {v['version']}  {scores}  {v['feature_set']} with {v['model']}")
        log.info(
            "%d versions in %s; * is deployed; ROC AUC and average precision out-of-fold", len(versions), directory
        )
        return DONE
    if arguments.rollback is not None:
        switch(directory, arguments.rollback)
        print(f"deployed: model {arguments.rollback}")
        return DONE
    if arguments.compare is not None or arguments.promote is not None:
        return compare_and_promote(arguments, directory)
    if arguments.retrain:
        return retrain(arguments, main)
    return train_best_model(arguments, directory)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__, "python train_best_model.py --full", "observations", "labels", "models-dir", "seed", "jobs"
    )
    parser.set_defaults(seed=None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", help="train on all data and deploy to the models directory")
    what.add_argument("--list", action="store_true", help="show the archived versions")
    what.add_argument("--rollback", metavar="VERSION", help="deploy an archived version")
    what.add_argument("--compare", metavar="VERSION", help="an archived version with the deployed one, on new patients")
    what.add_argument("--promote", metavar="VERSION", help="compare, and deploy the version where it is not worse")
    what.add_argument(
        "--retrain",
        action="store_true",
        help="search on old and new data, compare on new patients, deploy if not worse; safe to run from cron",
    )
    parser.add_argument("--force", action="store_true", help="promote a worse model all the same")
    parser.add_argument("--keep-config", action="store_true", help="retrain the deployed recipe, without a search")
    parser.add_argument("--quick", action="store_true", help="retrain with the quick search")
    parser.add_argument("--data-dir", default="data/training", help="where --retrain keeps what it trained on")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
