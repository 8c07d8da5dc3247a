"""Trains the best candidate of the search.

Without options, it is trained on the training part and measured on the test part; nothing is deployed. With --full, it
is trained on all data and deployed: this writes ``best_model.pkl``, ``feature_names.json``,
``production_model_info.txt``, a report and an archived version. In both cases, probabilities are calibrated on
out-of-fold predictions. The other options manage versions, thresholds, and models of other hospitals.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.command_line import DONE, SOME_FAILED, log, make_parser, read_site_codes, run
from feature_pipeline import BadConfig
from training.adapt import AdaptOptions, adapt
from training.comparison import compare_and_promote
from training.learning_curve import learning_curve
from training.package import export_package, import_package
from training.retraining import RetrainOptions, retrain
from training.thresholds import add_threshold_options, describe_thresholds, rule_of, set_thresholds
from training.train import train_full, train_holdout
from training.versions import list_versions, set_shadow, switch

ONLY_WITH = {
    "force": ("promote", "retrain", "adapt"),
    "keep_config": ("retrain",),
    "quick": ("retrain",),
    "learning_curve": ("adapt",),
    "reason": ("set_thresholds", "adapt"),
}


def work(arguments: argparse.Namespace) -> int:
    """Does what the options ask for."""
    directory, start = Path(arguments.models_dir), time.perf_counter()
    data = arguments.observations, arguments.labels
    if rule := rule_of(arguments):
        if not (arguments.set_thresholds or arguments.adapt):
            raise BadConfig("thresholds of the deployed model are changed with --set-thresholds, or with --adapt")
    elif arguments.set_thresholds:
        raise BadConfig("--set-thresholds needs --alert-budget, --alerts-per-100-patient-days or --risk-thresholds")
    for option, modes in ONLY_WITH.items():
        if getattr(arguments, option) and not any(getattr(arguments, mode) for mode in modes):
            names = [f"--{name.replace('_', '-')}" for name in (option, *modes)]
            raise BadConfig(f"{names[0]} has an effect only with {' or '.join(names[1:])}")
    if arguments.list:
        versions = list_versions(directory)
        for config, deployed in versions:
            scores = config.metrics["out_of_fold"]
            print(
                f"{'*' if deployed else ' '} {config.model_version}  {scores['roc_auc']:.4f}  "
                f"{scores['average_precision']:.4f}  {config.feature_set} with {config.model['name']}; "
                f"{describe_thresholds(config)}"
            )
        log.info(
            "%d versions in %s; * marks the deployed one; figures: ROC AUC and average precision, out-of-fold",
            len(versions),
            directory,
        )
    elif arguments.rollback is not None:
        switch(directory, arguments.rollback)
        print(f"deployed: model {arguments.rollback}")
    elif arguments.set_thresholds:
        version, line = set_thresholds(directory, rule, arguments.reason)
        print(f"deployed: model {version}\n{line}")
    elif arguments.compare is not None or arguments.promote is not None:
        promote = arguments.promote is not None
        version = arguments.promote if promote else arguments.compare
        lines, done = compare_and_promote(directory, version, *data, promote=promote, force=arguments.force)
        print(*lines, sep="\n")
        return DONE if done else SOME_FAILED
    elif arguments.retrain:
        options = RetrainOptions(
            *data, Path(arguments.data_dir), arguments.keep_config, arguments.quick, arguments.force, arguments.jobs
        )
        lines, done = retrain(directory, options)
        print(*lines, sep="\n")
        return DONE if done else SOME_FAILED
    elif arguments.shadow is not None:
        version = None if arguments.shadow == "off" else arguments.shadow
        set_shadow(directory, version)
        print(f"in the shadow: model {version}" if version else "no model runs in the shadow")
    elif arguments.export is not None:
        package = export_package(directory, arguments.export)
        print(f"written: {arguments.export}, model {package.version}, SHA-256 {package.sha256}")
    elif arguments.import_ is not None:
        package, checks = import_package(directory, arguments.import_)
        print(package.card, *checks, sep="\n")
        print(f"imported: model {package.version}, SHA-256 of the package {package.sha256}")
        log.info("not deployed yet: --rollback %s deploys it, --promote compares it first", package.version)
    elif arguments.adapt:
        site_codes = read_site_codes(arguments.codes)
        rest = arguments.force, arguments.seed, arguments.jobs
        options = AdaptOptions(*data, rule, arguments.reason, site_codes, *rest)
        lines, done = (
            (learning_curve(directory, options), True) if arguments.learning_curve else adapt(directory, options)
        )
        print(*lines, sep="\n")
        return DONE if done else SOME_FAILED
    else:
        train = train_full if arguments.full else train_holdout
        print(train(directory, *data, seed=arguments.seed, jobs=arguments.jobs).rstrip())
        log.info("%.0f s; files in %s", time.perf_counter() - start, directory)
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__, "python train_best_model.py --full", "observations", "labels", "models-dir", "codes", "seed", "jobs"
    )
    parser.set_defaults(seed=None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", help="train on all data and deploy to the models directory")
    what.add_argument("--list", action="store_true", help="show the archived versions")
    what.add_argument("--rollback", metavar="VERSION", help="deploy an archived version")
    what.add_argument(
        "--compare", metavar="VERSION", help="compare an archived version with the deployed one on new patients"
    )
    what.add_argument("--promote", metavar="VERSION", help="compare, and deploy the version if it is not worse")
    what.add_argument(
        "--retrain",
        action="store_true",
        help="search on old and new data, compare on new patients, deploy if not worse; safe to run from cron",
    )
    what.add_argument(
        "--adapt",
        action="store_true",
        help="adapt the deployed model to patients of this hospital, compare on others of them, deploy if not worse",
    )
    what.add_argument(
        "--shadow",
        metavar="VERSION",
        help="all services also score with this archived version; its scores are logged, not shown; 'off' ends it",
    )
    what.add_argument(
        "--export", type=Path, metavar="PACKAGE.zip", help="write the deployed version as one file for other hospitals"
    )
    what.add_argument(
        "--import",
        dest="import_",
        type=Path,
        metavar="PACKAGE.zip",
        help="check a package, show its card and archive it as a version; only from a sender you trust",
    )
    what.add_argument(
        "--set-thresholds",
        action="store_true",
        help="deploy the same model as a new version with the thresholds of one of the next three options",
    )
    add_threshold_options(parser)
    parser.add_argument(
        "--learning-curve",
        action="store_true",
        help="with --adapt: report the gain with 100, 250, 500, ... patients; deploy nothing",
    )
    parser.add_argument("--force", action="store_true", help="deploy even if the result is worse")
    parser.add_argument("--keep-config", action="store_true", help="with --retrain: no search, the deployed recipe")
    parser.add_argument("--quick", action="store_true", help="with --retrain: use the quick search")
    parser.add_argument("--data-dir", default="data/training", help="where --retrain keeps its training data")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
