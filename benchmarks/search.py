"""The search and the training of the winner beside their floor: the bare fits, each for itself, over the same cores.

python benchmarks/search.py search --observations A_observations.parquet --labels A_labels.parquet
python benchmarks/search.py full --observations A_observations.parquet --labels A_labels.parquet --models-dir models
python benchmarks/search.py search                    # the demo cohort
python benchmarks/search.py growth                    # demo cohorts of 1, 4 and 16 times the clients

The floor is the sum of the seconds of every LightGBM and scikit-learn fit that the work needs, on features that are
ready, divided by `--jobs`; as many run at once. Memory is that of all processes together, a page that several have
mapped counted once (proportional set size).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import psutil
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import DONE, make_parser, run
from feature_pipeline import Codes, SnapshotSettings, load_config
from sources.demo_cohort import make_demo_cohort
from training.candidates import CONFIGURATION, FEATURE_SETS, MODEL_CONFIGURATIONS, ModelConfiguration
from training.config import configuration_of, load_data
from training.fitting import _FIT, FeatureTable, folds_for, scaled
from training.search import QUICK_MODELS, QUICK_SETS, SearchOptions, search
from training.snapshots import TEST, TRAIN, grouped_folds, load_training_data
from training.train import train_full
from training.trials import prepare_search

EVERY = 0.5  # seconds between two looks at the memory

Fit = tuple[ModelConfiguration, np.ndarray, np.ndarray]  # rows, columns


@contextmanager
def watched(what: str) -> Iterator[list[float]]:
    """The seconds of the work inside, and the most memory that this process and its children hold."""
    own, peak, done, seconds = psutil.Process(), [0.0], threading.Event(), []

    def watch() -> None:
        while not done.wait(EVERY):
            held = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it has ended
            peak[0] = max(peak[0], held / 1e9)

    thread, start = threading.Thread(target=watch, daemon=True), time.perf_counter()
    thread.start()
    try:
        yield seconds
    finally:
        seconds.append(time.perf_counter() - start)
        done.set()
        thread.join()
        print(f"{what}: {seconds[0]:.1f} s, {peak[0]:.2f} GB at the peak", flush=True)


def bare(configuration: ModelConfiguration, rows: np.ndarray, columns: np.ndarray, table, label, seed) -> float:
    """Seconds of the library's own work; to make its input is not counted."""
    import lightgbm

    seconds = 0.0
    for k, member in enumerate(configuration.members):
        params = {**configuration.params, **member}
        again = rows[table.copied[rows]] if params.pop("hide_codes", False) else rows[:0]
        own, features = label[np.append(rows, again)], table.stacked(rows, again, columns, configuration.fill_value)
        sample = SimpleNamespace(features=lambda features=features: features, label=own, weight=None)
        sample.bins = lambda settings, features=features, own=own: lightgbm.Dataset(features, own, params=settings)
        with threadpool_limits(1):
            start = time.perf_counter()
            _FIT[configuration.kind](scaled(params, int(own.sum())), sample, seed + 1000 * k)
            seconds += time.perf_counter() - start
    return seconds


def beside(what: str, seconds: float, fits: Sequence[Fit], table: FeatureTable, label, seed: int, jobs: int) -> None:
    """Measures the floor and prints the ratio."""
    each = joblib.Parallel(n_jobs=jobs)(joblib.delayed(bare)(*fit, table, label, seed) for fit in fits)
    floor = sum(each) / jobs
    print(f"{len(fits)} bare fits: {sum(each):.1f} s, {floor:.1f} s on {jobs} cores; {what}: {seconds / floor:.3f}")


def of_search(arguments: argparse.Namespace) -> int:
    """All candidates, finalists, the winner"""
    given = {name: getattr(arguments, name) for name in ("observations", "labels", "seed", "jobs")}
    options = SearchOptions(**given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with watched("search") as seconds:
            search(options, folder)
        entries = json.loads((folder / "optimization_log.json").read_text())
        data = load_training_data(options.observations, options.labels, SnapshotSettings(), Codes({}))
        known = prepare_search(data, options.seed, None, tuple(FEATURE_SETS))
        train, rows = (np.flatnonzero(known.part == TRAIN), np.flatnonzero(known.part != TEST))
        best = sorted(entries, key=lambda entry: -entry["score"])[: options.finalists]
        finalists = [(CONFIGURATION[entry["model"]], known.columns(entry["feature_set"])) for entry in best]
        config = load_config(folder / "best_model_config.json")
        winner = configuration_of(config), known.columns(config.feature_set)
        folds = grouped_folds(data, rows, folds_for(data, rows), options.seed)
        fits = [(c, train, known.columns(feature_set)) for feature_set in FEATURE_SETS for c in MODEL_CONFIGURATIONS]
        fits += [(c, some, columns) for some, _ in folds for c, columns in finalists]
        fits += [(winner[0], some, winner[1]) for some in (rows, train)]
        beside("search", seconds[0], fits, known.table, data.label, options.seed, options.jobs)
    return DONE


def of_full(arguments: argparse.Namespace) -> int:
    """The winner's cross-validation and its fit on all data, with reports and deployment"""
    directory = Path(arguments.models_dir)
    config = load_config(directory / "best_model_config.json")
    with watched("--full") as seconds:
        train_full(directory, arguments.observations, arguments.labels, jobs=arguments.jobs)
    data, configuration = load_data(config, arguments.observations, arguments.labels), configuration_of(config)
    table, rows = FeatureTable.of(data, config.feature_names, config.seed), np.arange(len(data.label))
    columns = np.arange(len(config.feature_names))
    parts = [rows, *(some for some, _ in grouped_folds(data, rows, folds_for(data, rows), config.seed))]
    fits = [(configuration, some, columns) for some in parts]
    beside("--full", seconds[0], fits, table, data.label, config.seed, arguments.jobs)
    return DONE


def of_growth(arguments: argparse.Namespace) -> int:
    """A small search on demo cohorts of 1, 4 and 16 times the clients"""
    for times in (1, 4, 16):
        observations, labels = make_demo_cohort(1000 * times, arguments.seed)
        with tempfile.TemporaryDirectory() as name:
            files = str(Path(name, "observations.parquet")), str(Path(name, "labels.parquet"))
            observations.to_parquet(files[0])
            labels.to_parquet(files[1])
            options = SearchOptions(
                *files, feature_sets=QUICK_SETS, models=QUICK_MODELS, seed=arguments.seed, jobs=arguments.jobs
            )
            with watched(f"{len(observations):,} observations") as seconds:
                search(options, Path(name))
            print(f"  {len(observations) / seconds[0]:,.0f} observations/s", flush=True)
    return DONE


WORKS: dict[str, Callable[[argparse.Namespace], int]] = {"search": of_search, "full": of_full, "growth": of_growth}


def main(argv: Sequence[str] | None = None) -> int:
    options = "observations", "labels", "models-dir", "seed", "jobs"
    parser = make_parser(__doc__, "python benchmarks/search.py search", *options)
    parser.add_argument("work", choices=WORKS, help="what is measured")
    return run(lambda arguments: WORKS[arguments.work](arguments), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
