"""The search: every feature set with every model configuration, to ``best_model_config.json``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import numpy as np

from common.artifacts import write_atomic
from common.command_line import log
from common.metrics import FEWEST_POSITIVE_VISITS, describe_size, ranking_scores
from feature_pipeline import BadConfig, Codes, Config, FeaturePipelineError, SnapshotSettings
from training.candidates import CONFIGURATION, FEATURE_SETS, MODEL_CONFIGURATIONS
from training.config import make_config
from training.evidence import measure_evidence
from training.fitting import cross_validate, fit_model, in_processes
from training.portable import cost_of_portable
from training.report import summary_text
from training.snapshots import TEST, TRAIN, load_training_data
from training.thresholds import Rule
from training.trials import Search, evaluate_winner, loss_without_codes, prepare_search, run_candidates
from training.versions import CONFIG

QUICK_SETS = ("latest", "summary_trend", "clinical")
QUICK_MODELS = ("lightgbm_randomised", "lightgbm_shallow", "logistic_regression")
RANKINGS = ("score", "hidden_score")
LOG, SUMMARY = "optimization_log.json", "optimization_summary.txt"


@dataclass(frozen=True)
class SearchOptions:
    """What is searched, on which data; the script's defaults are these."""

    observations: str | None = None  # the demo cohort where not given
    labels: str | None = None
    synthetic: bool = False
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
    synonyms: dict[str, str] = field(default_factory=dict)
    portable: bool = False  # features by concept
    feature_sets: tuple[str, ...] = tuple(FEATURE_SETS)
    models: tuple[str, ...] = tuple(CONFIGURATION)
    rank_by: str = RANKINGS[0]
    finalists: int = 3
    folds: int | None = None  # by the number of positives
    rule: Rule = field(default_factory=Rule)
    reason: str = ""
    sensitivity: float | None = None  # of the decision threshold; the HIGH threshold where not given
    seed: int = 0
    jobs: int = 1
    resume: bool = False
    backend: str = "local"
    scheduler: str | None = None


@dataclass(frozen=True)
class SearchResult:
    config: Config
    summary: str
    n_failed: int  # candidates and finalists


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


def search(options: SearchOptions, directory: Path) -> SearchResult:
    """Ranks the candidates on the validation part, cross-validates the best, tests the winner once.

    Writes config, log and summary to `directory`. Raises `FeaturePipelineError` where there is no winner.
    """
    start = time.perf_counter()
    if options.scheduler is not None and options.backend != "dask":
        raise BadConfig("--scheduler goes with --backend dask")
    codes = Codes.by_concept(options.synonyms) if options.portable else Codes(options.synonyms)
    data = load_training_data(options.observations, options.labels, options.snapshots, codes, options.synthetic)
    for line in [*data.notices(), data.describe()]:
        log.info("%s", line)
    candidates = [(fs, c) for fs in options.feature_sets for c in MODEL_CONFIGURATIONS if c.name in options.models]
    directory.mkdir(parents=True, exist_ok=True)
    search = prepare_search(data, options.seed, options.folds, options.feature_sets, options.synonyms, options.portable)
    log.info("%d features of %d snapshots, %.1f s", *search.table.plain.shape, time.perf_counter() - start)
    with backend(options.backend, options.scheduler, search):
        entries = run_candidates(search, candidates, directory / LOG, options.jobs, options.resume)
        good = sorted((e for e in entries if "score" in e), key=lambda e: -e[options.rank_by])
        if not good:
            raise FeaturePipelineError(f"all {len(entries)} candidates failed; see {directory / LOG}")
        rows = np.flatnonzero(search.part != TEST)
        best = good[: options.finalists]
        contenders = [(CONFIGURATION[entry["model"]], search.columns(entry["feature_set"])) for entry in best]
        log.info("cross-validating the best %d", len(best))
        scores, _ = cross_validate(contenders, search.table, data, rows, search.folds, search.seed, options.jobs)
    finalists = []
    for entry, out_of_fold in zip(best, scores, strict=True):
        if out_of_fold is None:
            log.warning("no finalist: %s with %s", entry["feature_set"], entry["model"])
            continue
        score = ranking_scores(data.label[rows], out_of_fold)["score"]
        log.info("cross-validated: %.4f  %s with %s", score, entry["feature_set"], entry["model"])
        finalists.append((score, entry["feature_set"], entry["model"], out_of_fold))
    finalists.sort(key=lambda f: -f[0])
    _, feature_set, model, out_of_fold = finalists[0]
    configuration, train = CONFIGURATION[model], np.flatnonzero(search.part == TRAIN)
    winner, of_train = in_processes(options.jobs)(
        joblib.delayed(fit_model)(
            configuration, search.table, some, search.columns(feature_set), data.label, search.seed
        )
        for some in (rows, train)
    )
    evaluation = evaluate_winner(search, feature_set, configuration, winner, out_of_fold)
    of_train.slope, of_train.intercept = winner.slope, winner.intercept
    if evaluation.metrics["test"]["n_positive_visits"] < FEWEST_POSITIVE_VISITS:
        log.warning("warning: test part: %s", describe_size(evaluation.metrics["test"]))
    evaluation.metrics["validation"] = {key: good[0][key] for key in ("roc_auc", "average_precision", "score")}
    loss = loss_without_codes(search, feature_set, configuration, evaluation.model, options.jobs)
    minimum, evaluation.metrics["evidence"] = measure_evidence(search, feature_set, configuration, of_train)
    if options.portable:
        log.info("what features by concept cost")
        evaluation.metrics["portable"] = cost_of_portable(options, feature_set, configuration, evaluation)
    config = make_config(search, feature_set, configuration, evaluation, loss, minimum, options)
    ranking = [(fs, name, score) for score, fs, name, _ in finalists]
    text = summary_text(search, entries, ranking, evaluation, config, time.perf_counter() - start)
    write_atomic(directory / SUMMARY, text)
    write_atomic(directory / CONFIG, config.text())
    log.info("written: %s", ", ".join(str(directory / name) for name in (CONFIG, LOG, SUMMARY)))
    return SearchResult(config, text, len(entries) - len(good) + len(best) - len(finalists))
