"""How long `monitor.py report` takes over a large prediction log of random rows, and how much memory."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import monitor
from common.command_line import DONE, make_parser, number, run
from feature_pipeline import load_config
from monitoring.log import open_engine, predictions
from monitoring.profile import Profile

DAYS, AT_ONCE, VISITS = 7, 100_000, 60_000
UNTIL = datetime(2026, 11, 28)


def fill(url: str, rows: int, config_path: str) -> None:
    """A log of one stream over `DAYS`."""
    config, engine, generator = load_config(config_path), open_engine(url), np.random.default_rng(0)
    profile = Profile(config)
    names = ["time", "source", "model_version", "visit", "as_of", "newest", "score", "risk_level", "bins", "codes"]
    names += ["unknown", "seconds", "shadow", "n"]
    insert = f"INSERT INTO {predictions.name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    for start in range(0, rows, AT_ONCE):
        n = min(AT_ONCE, rows - start)
        seconds = (start + np.arange(n)) * (DAYS * 86_400 / rows)
        times = [str(UNTIL - timedelta(days=DAYS, seconds=-s)).ljust(26, "0")[:26] for s in seconds.tolist()]
        times = [f"{t[:19]}.{t[20:]}" for t in times]  # as SQLAlchemy writes them
        letters = np.column_stack([generator.integers(0, k, n) for k in profile.n_bins]).astype(np.uint8) + ord("a")
        codes = generator.integers(0, 2, (n, len(profile.codes))).astype(np.uint8) + ord("0")
        bins, codes = ([bytes(row).decode() for row in table] for table in (letters, codes))
        visits = [f"{visit:016x}" for visit in (generator.integers(0, VISITS, n) * 2_654_435_761).tolist()]
        scores = generator.beta(1, 20, n).round(6).tolist()
        made = [
            (t, "stream", config.model_version, visit, t, t, p, "HIGH" if p > 0.2 else "LOW", b, c, 0, 0.002, 0, 1)
            for t, visit, p, b, c in zip(times, visits, scores, bins, codes, strict=True)
        ]
        with engine.begin() as connection:
            connection.exec_driver_sql(insert, made)
    engine.dispose()


def work(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or f"{folder}/log.db"
        if not Path(log).exists():
            fill(f"sqlite:///{log}", arguments.rows, arguments.config)
            print(f"{arguments.rows:,} rows, {Path(log).stat().st_size / 1e6:,.0f} MB; now run it again with --log")
            if arguments.log:  # what filling took must not count
                return DONE
        start, cpu = time.perf_counter(), time.process_time()
        options = ["--monitor", f"sqlite:///{log}", "--config", arguments.config, "--until", UNTIL.isoformat()]
        monitor.main(["report", *options, "--html", f"{folder}/report.html", "--quiet"])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"report: {seconds:.1f} s ({cpu:.1f} s of computing), {memory:,.0f} MB at most")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/log_report.py --log /tmp/log.db", "config")
    parser.add_argument("--rows", type=number(int, 1), default=5_000_000, help="of the log")
    parser.add_argument("--log", metavar="FILE", help="SQLite file of the log; it is made where it does not exist")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
