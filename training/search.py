"""The search: ten feature sets by eight model configurations, to ``best_model_config.json``."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import joblib
import numpy as np

from common.artifacts import write_atomic
from common.command_line import DONE, SOME_FAILED, log, read_synonyms
from common.metrics import ranking_scores
from feature_pipeline import (
    BadConfig,
    FeaturePipelineError,
    SnapshotSettings,
)
from training.candidates import CONFIGURATION, FEATURE_SETS, MODEL_CONFIGURATIONS
from training.config import make_config
from training.fitting import cross_validate
from training.report import summary_text
from training.snapshots import TEST, load_training_data
from training.trials import Search, evaluate_winner, loss_without_codes, prepare_search, run_candidates

QUICK_SETS = ("latest", "summary_trend", "clinical")


QUICK_MODELS = ("lightgbm_randomised", "lightgbm_shallow", "logistic_regression")


GO_ON = "; run the same command with --resume to go on"


@contextlib.contextmanager
def backend(name: str, scheduler: str | None, search: Search) -> Iterator[None]:
    """Runs joblib's work in local processes, or on the Dask cluster of `scheduler`. Raises `BadConfig`."""
    if name == "local":
        yield
        return
    try:
        from distributed import Client

        client = Client(scheduler)
    except ImportError as error:
        raise BadConfig(f"--backend dask needs the packages of requirements-dask.txt ({error})") from None
    except (OSError, ValueError) as error:
        raise BadConfig(f"--scheduler {scheduler!r} cannot be reached: {' '.join(str(error).split())[:200]}") from None
    with client, joblib.parallel_config(backend="dask", scatter=[search.table]):
        yield


def search_features(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    arguments.go_on = GO_ON
    if arguments.scheduler is not None and arguments.backend != "dask":
        raise BadConfig("--scheduler goes with --backend dask")
    synonyms = read_synonyms(arguments.synonyms)
    settings = SnapshotSettings(arguments.snapshot_every, arguments.horizon, arguments.after_onset)
    data = load_training_data(arguments.observations, arguments.labels, settings, synonyms, arguments.synthetic)
    for line in [*data.notices(), data.describe()]:
        log.info("%s", line)
    sets, models = (QUICK_SETS, QUICK_MODELS) if arguments.quick else (tuple(FEATURE_SETS), tuple(CONFIGURATION))
    sets, models = arguments.feature_sets or sets, arguments.models or models
    candidates = [(fs, c) for fs in sets for c in MODEL_CONFIGURATIONS if c.name in models]
    directory = Path(arguments.models_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sepsis-search-") as scratch:
        search = prepare_search(data, Path(scratch), arguments.seed, arguments.folds, sets, synonyms)
        log.info("%d features of %d snapshots, %.1f s", *search.table.plain.shape, time.perf_counter() - start)
        log_path = directory / "optimization_log.json"
        with backend(arguments.backend, arguments.scheduler, search):
            entries = run_candidates(search, candidates, log_path, arguments.jobs, arguments.resume, arguments.quiet)
            good = sorted((e for e in entries if "score" in e), key=lambda e: -e[arguments.rank_by])
            if not good:
                raise FeaturePipelineError(f"all {len(entries)} candidates failed; see {log_path}")
            rows = np.flatnonzero(search.part != TEST)
            best = good[: arguments.finalists]
            contenders = [(CONFIGURATION[entry["model"]], search.columns(entry["feature_set"])) for entry in best]
            log.info("cross-validating the best %d", len(best))
            scores = cross_validate(contenders, search.table, data, rows, search.folds, search.seed, arguments.jobs)
        finalists = []
        for entry, out_of_fold in zip(best, scores, strict=True):
            fs, model = entry["feature_set"], entry["model"]
            if out_of_fold is None:
                log.warning("no finalist: %s with %s", fs, model)
                continue
            score = ranking_scores(data.label[rows], out_of_fold)["score"]
            log.info("cross-validated: %.4f  %s with %s", score, fs, model)
            finalists.append((score, fs, model, out_of_fold))
        finalists.sort(key=lambda f: -f[0])
        _, feature_set, model, out_of_fold = finalists[0]
        configuration = CONFIGURATION[model]
        evaluation = evaluate_winner(search, feature_set, configuration, out_of_fold, arguments.sensitivity)
        evaluation.metrics["validation"] = {key: good[0][key] for key in ("roc_auc", "average_precision", "score")}
        loss = loss_without_codes(search, feature_set, configuration, evaluation.model)
        config = make_config(search, feature_set, configuration, evaluation, loss, arguments)
    ranking = [(fs, name, score) for score, fs, name, _ in finalists]
    text = summary_text(search, entries, ranking, evaluation, config, time.perf_counter() - start)
    write_atomic(directory / "optimization_summary.txt", text)
    write_atomic(directory / "best_model_config.json", config.text())
    print(text.split("\nAll ")[0].rstrip())
    log.info(
        "written: %s",
        ", ".join(
            str(directory / n) for n in ("best_model_config.json", "optimization_log.json", "optimization_summary.txt")
        ),
    )
    return SOME_FAILED if len(good) < len(entries) or len(finalists) < len(best) else DONE
