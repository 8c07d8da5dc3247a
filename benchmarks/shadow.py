"""What a challenger in the shadow costs: scores a second and their latency, without one and with one, in turns.

One process scores a visit again and again through `serving.deployed.ServedModel` with a prediction log (SQLite). The
challenger is a copy of the deployed model. One raises at every score, the files of one are deleted while it runs, one
takes ten times as long.

    python benchmarks/shadow.py --models-dir models
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.command_line import DONE, make_parser, number, run
from common.shadow import write_shadow
from feature_pipeline import ProductionPipeline, load_config
from serving.deployed import ServedModel
from training.versions import CONFIG, MODEL, archive_version

ROWS = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())[:40]
COPY = "challenger"


def raising(assess: Any) -> Any:
    def fail(*job: Any) -> None:
        raise ValueError("on purpose")

    return fail


def ten_times(assess: Any) -> Any:
    return lambda *job: [assess(*job) for _ in range(10)][-1]


def same(assess: Any) -> Any:
    return assess


CASES = {"none": None, "works": same, "raises": raising, "deleted": same, "takes ten times as long": ten_times}


def measured(models: Path, folder: Path, name: str, seconds: float) -> tuple[list[float], float, float]:
    """(latencies, processor time, share of the scores that the challenger gave too, or tried to)."""
    change, archived = CASES[name], models / "archive" / COPY
    write_shadow(models, COPY if change else None)
    served = ServedModel(ProductionPipeline(models / CONFIG, models / MODEL), "api", f"sqlite:///{folder}/log.db")
    shadow = served._shadows._current
    if shadow is not None:
        shadow.pipeline.assess = change(shadow.pipeline.assess)
    if name == "deleted":
        archived.rename(folder / COPY)
        write_shadow(models, COPY)  # so that it is looked for again
    observations = served.read(ROWS)
    visit, moments = np.arange(observations.n_visits), observations.last_time
    latencies, end, spent = [], time.perf_counter() + seconds, time.process_time()
    while (began := time.perf_counter()) < end:
        served.score(observations, visit, moments)
        latencies.append(time.perf_counter() - began)
    spent = time.process_time() - spent
    waiting = shadow._waiting.qsize() if shadow else 0
    scored = 1 - (shadow.left_out / len(visit) + waiting) / len(latencies) if shadow else 0.0
    if name == "deleted":
        (folder / COPY).rename(archived)
    served._shadows.stop()
    served.log.close()
    return latencies, spent, scored


def benchmark(arguments: argparse.Namespace) -> int:
    rates: dict[str, list[float]] = {name: [] for name in CASES}
    latencies: dict[str, list[float]] = {name: [] for name in CASES}
    spent: dict[str, list[float]] = {name: [] for name in CASES}  # processor time of a score
    shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="sepsis-benchmark-") as scratch:
        models = Path(scratch, "models")
        models.mkdir()
        for name in (CONFIG, MODEL):
            shutil.copy(Path(arguments.models_dir, name), models / name)
        config = replace(load_config(models / CONFIG), model_version=COPY)
        archive_version(models, COPY, {MODEL: (models / MODEL).read_bytes(), CONFIG: config.text()})
        for _ in range(arguments.rounds):
            for name in CASES:
                times, processor, shares[name] = measured(models, Path(scratch), name, arguments.seconds)
                spent[name].append(processor / len(times))
                rates[name].append(len(times) / sum(times))
                latencies[name] += times
    heads = ("challenger", "scores/s", "ratio", "median", "p99", "processor time a score", "scored in the shadow")
    print("|", " | ".join(heads), "|\n|" + "---|" * len(heads))
    for name in CASES:
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["none"], strict=True))
        median, p99 = np.percentile(latencies[name], [50, 99]) * 1e3
        rate, processor = statistics.median(rates[name]), statistics.median(spent[name]) * 1e3
        cells = f"{rate:,.0f} | {ratio:.2f} | {median:.2f} ms | {p99:.2f} ms | {processor:.2f} ms"
        print(f"| {name} | {cells} | {shares[name]:.0%} |")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/shadow.py --models-dir models", "models-dir")
    parser.add_argument(
        "--rounds", type=number(int, 1), default=3, help="rounds, in each of which every case is measured"
    )
    parser.add_argument("--seconds", type=number(float, 0.1), default=8.0, help="duration of one measurement")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
