"""Checks the deployed model, or runs the test suite.

`pipeline`: loads config and model, compares the feature names with ``feature_names.json``, computes features of whole,
shuffled, cut and duplicated data, scores every visit, measures the latency, writes ``data/sample_new_patients.csv``.
Without an argument: the whole test suite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from common.command_line import make_parser, number, run
from training.check import SAMPLE, check_pipeline


def run_suite(arguments: argparse.Namespace) -> int:
    import pytest

    options = ["-n", str(arguments.jobs), "--dist", "loadfile"] if arguments.jobs > 1 else []
    if arguments.fast:
        options += ["-m", "not slow"]
    return int(pytest.main(options))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python run_tests.py pipeline", "config", "model", "jobs")
    parser.add_argument("what", nargs="?", choices=("all", "pipeline"), default="all", help="the suite, or the check")
    parser.add_argument("--fast", action="store_true", help="leave out the tests that take more than a few seconds")
    parser.add_argument(
        "--patients", type=number(int, 10), default=150, help="of the demo cohort that the check scores"
    )
    parser.add_argument("--sample", default=SAMPLE, help="where the check writes new patients to score")
    return run(lambda a: (check_pipeline if a.what == "pipeline" else run_suite)(a), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
