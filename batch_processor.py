"""Scores every file of a directory: made for an hourly cron job that never loses or doubles a visit.

``data/incoming/ward.csv`` becomes ``data/predictions/predictions_ward.csv`` (likewise ``.csv.gz`` and ``.parquet``,
each in its own format) with the columns ``visit_id, client, sepsis_probability, risk_level, reason`` (of UNKNOWN),
``as_of, hours_since_newest, processed_at, model_version``: one row a visit, in order of first appearance. Times are
UTC. A file that cannot be used goes to ``data/failed/`` with its reason beside it.

What a run has finished stands in ``manifest.jsonl`` of the output directory, a line a file, written after the
predictions are in place. A run killed at any moment leaves whole files and whole lines only; the next run does the
rest. A long file is read in chunks by two threads, and its validated rows are cut by visit into parts on disk: memory
stays bounded, and a visit's rows may lie anywhere in the file.

    result = BatchProcessor("models/best_model_config.json", "models/best_model.pkl").process_directory()
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Sequence

from common.command_line import (
    DONE,
    SOME_FAILED,
    available_cores,
    make_parser,
    number,
    read_site_codes,
    run,
    run_every,
)
from monitoring.log import url_of
from serving.batch.directory import (
    CHUNK_ROWS,
    INPUT_DIR,
    LAST,
    NOW,
    OUTPUT_DIR,
    SETTLE_SECONDS,
    BatchProcessor,
    BatchResult,
)
from serving.batch.partition import score_partition

__all__ = ["BatchProcessor", "main", "score_partition"]

CRONTAB = """5 * * * * set -a && . /etc/sepsis-risk.env && cd "$HOME/sepsis-risk" && \
.venv/bin/python batch_processor.py --quiet >>data/batch.log 2>&1"""


# ---------------------------------------------------------------------------------------------- the script


def watch(processor: BatchProcessor, seconds: float, once: Callable[[], BatchResult], stop: threading.Event) -> None:
    """Runs `once` every so many seconds until `stop`; a new config or model is taken up between runs."""

    def work() -> None:
        processor.deployed.renew()
        report(once(), quiet=processor.quiet)

    run_every(seconds, work, stop)


def report(result: BatchResult, quiet: bool) -> int:
    if not quiet:
        print(result, flush=True)
    return DONE if result.ok else SOME_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "Scores every new .csv, .csv.gz and .parquet file of a directory.",
        f"python batch_processor.py --jobs 2\n\ncrontab, every hour:\n  {CRONTAB}",
        "config",
        "model",
        "codes",
        "jobs",
    )
    parser.set_defaults(jobs=max(1, available_cores() // 2))  # a process reads with threads of its own
    parser.add_argument("--input-dir", default=INPUT_DIR, help="where the files arrive")
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="where predictions and manifest go")
    parser.add_argument(
        "--failed-dir",
        help="where unusable files are moved (default: 'failed' beside the input)",
    )
    parser.add_argument(
        "--settle-seconds",
        type=number(float, 0),
        default=SETTLE_SECONDS,
        help="a file that changed less than this many seconds ago is left for the next run",
    )
    parser.add_argument(
        "--chunk-rows", type=number(int, 1), default=CHUNK_ROWS, help="number of rows that a process holds in memory"
    )
    parser.add_argument(
        "--watch", type=number(float, 1), metavar="SECONDS", help="repeat at this interval, until stopped"
    )
    parser.add_argument(
        "--as-of",
        metavar="MOMENT",
        help="moment to score: 'last' (each visit's last observation), 'now', or an ISO 8601 time; if not given, "
        "'last', or 'now' with --watch",
    )
    parser.add_argument("--monitor", metavar="URL", help="URL of the prediction log, or 'off'; or SEPSIS_MONITOR_URL")
    return parser


def _work(arguments: argparse.Namespace) -> int:
    processor = BatchProcessor(
        arguments.config,
        arguments.model,
        jobs=arguments.jobs,
        chunk_rows=arguments.chunk_rows,
        settle_seconds=arguments.settle_seconds,
        quiet=arguments.quiet,
        as_of=arguments.as_of or (LAST if arguments.watch is None else NOW),
        codes=read_site_codes(arguments.codes),
        monitor=url_of(arguments.monitor),
    )

    def once() -> BatchResult:
        return processor.process_directory(arguments.input_dir, arguments.output_dir, arguments.failed_dir)

    if arguments.watch is None:
        return report(once(), arguments.quiet)
    watch(processor, arguments.watch, once, threading.Event())
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    parser.set_defaults(go_on="; the next run does the rest")
    return run(_work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
