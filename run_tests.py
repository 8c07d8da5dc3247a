"""Checks the deployed model, or runs the test suite.

`pipeline` loads config and model, compares the feature names with ``feature_names.json``, computes the features of
synthetic visits (whole, shuffled, duplicated, in parts), scores them, measures the latency, and writes
``data/sample_new_patients.csv``. Without an argument, the whole test suite runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.command_line import DONE, SOME_FAILED, log, make_parser, number, run
from training.check import check


def run_suite(arguments: argparse.Namespace) -> int:
    import pytest

    options = ["-n", str(arguments.jobs), "--dist", "worksteal"] if arguments.jobs > 1 else []
    if arguments.fast:
        options += ["-m", "not slow"]
    return int(pytest.main(options))


def run_check(arguments: argparse.Namespace) -> int:
    results = check(Path(arguments.config), Path(arguments.model), arguments.patients, Path(arguments.sample))
    print(*results, sep="\n")
    log.info("written: %s, synthetic visits (no real patients)", arguments.sample)
    return DONE if all(result.passed for result in results) else SOME_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python run_tests.py pipeline", "config", "model", "jobs")
    parser.add_argument(
        "what",
        nargs="?",
        choices=("all", "pipeline"),
        default="all",
        help="tests, or the check of the model",
    )
    parser.add_argument("--fast", action="store_true", help="leave out tests that take more than a few seconds")
    parser.add_argument(
        "--patients", type=number(int, 10), default=150, help="number of synthetic visits that the check scores"
    )
    parser.add_argument(
        "--sample", default="data/sample_new_patients.csv", help="where to write synthetic visits to score"
    )
    return run(lambda a: (run_check if a.what == "pipeline" else run_suite)(a), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
