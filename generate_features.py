"""Searches for the best features and model: 10 feature sets x 8 model configurations.

Candidates are ranked by ROC AUC + average precision on validation data; the best few are compared once more by
grouped cross-validation; the winner alone meets the test part. Writes ``best_model_config.json``,
``optimization_log.json`` and ``optimization_summary.txt``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from artifacts import library_versions, write_atomic, write_json
from candidates import (
    CONFIGURATION,
    FEATURE_SETS,
    MODEL_CONFIGURATIONS,
    FeatureTable,
    ModelConfiguration,
    cross_validate,
    feature_set_names,
    filled,
    fit_calibrated,
    judge_candidate,
)
from command_line import DONE, SOME_FAILED, log, make_parser, number, progress, read_synonyms, run
from feature_pipeline import (
    DEFAULT_WINDOWS,
    SCHEMA_VERSION,
    BadConfig,
    FeaturePipelineError,
    FeaturePlan,
    Observations,
    ScoreModel,
    concept_of,
    describe_set_aside,
    read_observations,
    resolve_snapshots,
)
from metrics import (
    describe_figures,
    figures,
    operating_points,
    ranking_scores,
    threshold_for_sensitivity,
)
from training_data import (
    MOST_HOURS,
    PARTS,
    TEST,
    TRAIN,
    VALIDATION,
    SnapshotSettings,
    TrainingData,
    load_training_data,
    split_parts,
)

RAREST_CODE = 0.01  # codes that fewer training visits have give no features
QUICK_SETS = ("latest", "summary_trend", "clinical")
QUICK_MODELS = ("lightgbm_randomised", "lightgbm_shallow", "logistic_regression")
GO_ON = "; run the same command with --resume to go on"


@dataclass(frozen=True)
class Search:
    """Everything the candidates share: the data, every feature once, and who stands in which part."""

    data: TrainingData
    part: np.ndarray  # (n_snapshots,) TRAIN, VALIDATION or TEST
    codes: list[str]
    synonyms: dict[str, str]
    names: list[str]
    table: FeatureTable
    informative: np.ndarray  # (n_features,) does the feature vary on the training part?
    seed: int
    folds: int

    def columns(self, feature_set: str) -> np.ndarray:
        """Columns of a feature set, in its own order, without those that never vary."""
        place = {name: i for i, name in enumerate(self.names)}
        names = feature_set_names(feature_set, self.codes, DEFAULT_WINDOWS, self.synonyms)
        return np.array([place[name] for name in names if self.informative[place[name]]], dtype=np.int64)

    def fingerprint(self, feature_set: str, configuration: ModelConfiguration) -> str:
        """Two candidates with the same fingerprint give the same result."""
        columns = [self.names[i] for i in self.columns(feature_set)]
        made_of = [self.data.fingerprint, columns, asdict(configuration), self.seed, self.synonyms, library_versions()]
        text = json.dumps(made_of, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_search(
    data: TrainingData,
    folder: Path,
    seed: int = 0,
    folds: int = 5,
    feature_sets: Sequence[str] = tuple(FEATURE_SETS),
    synonyms: dict[str, str] | None = None,
) -> Search:
    """Splits the data and computes every feature of every set once, into files in `folder` that processes share."""
    synonyms = synonyms or {}
    part = split_parts(data, seed=seed)
    for k, name in enumerate(PARTS):
        rows = part == k
        if not 0 < data.label[rows].sum() < rows.sum():
            raise BadConfig(f"the {name} part lacks septic or other visits: too few visits to search on")
    prevalence = code_prevalence(data.observations, np.unique(data.visit[part == TRAIN]))
    codes = [code for code, share in prevalence.items() if share >= RAREST_CODE]
    names = list(
        dict.fromkeys(n for fs in feature_sets for n in feature_set_names(fs, codes, DEFAULT_WINDOWS, synonyms))
    )
    table = FeatureTable.of(data, names, seed, folder)
    train = part == TRAIN
    informative = np.array([_varies(column[train]) for column in table.plain])
    return Search(data, part, codes, synonyms, names, table, informative, seed, folds)


def _varies(column: np.ndarray) -> bool:
    known = column[~np.isnan(column)]
    return len(known) > 0 and (len(known) < len(column) or known.min() < known.max())


def code_prevalence(observations: Observations, visits: np.ndarray) -> dict[str, float]:
    """Share of `visits` that have each code at all."""
    has_code = np.isin(observations.group_visit, visits)
    count = np.bincount(observations.group_code[has_code], minlength=len(observations.codes))
    return {code: n / len(visits) for code, n in zip(observations.codes, count.tolist(), strict=True)}


# ------------------------------------------------------------------------------------------------ candidates


def run_candidates(
    search: Search,
    candidates: Sequence[tuple[str, ModelConfiguration]],
    log_path: Path,
    jobs: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Judges every candidate on the validation part; the log on disk grows with each that finishes."""
    entries = _finished(log_path, search, candidates) if resume else []
    done = {(entry["feature_set"], entry["model"]) for entry in entries}
    todo = [c for c in candidates if (c[0], c[1].name) not in done]
    # the slowest kinds and the largest sets first: the last processes then end together
    todo.sort(key=lambda c: (c[1].kind == "extra_trees", len(search.columns(c[0]))), reverse=True)
    if done:
        log.info("resumed: %d of %d candidates were finished before", len(done), len(candidates))
    train, held_out = (np.flatnonzero(search.part == number) for number in (TRAIN, VALIDATION))
    fingerprints = {(fs, c.name): search.fingerprint(fs, c) for fs, c in todo}
    # a task carries what it needs and no more: other processes get the observations neither sent nor kept
    tasks = (
        joblib.delayed(_candidate)(
            feature_set,
            configuration,
            search.table,
            search.columns(feature_set),
            search.data.label,
            train,
            held_out,
            search.seed,
        )
        for feature_set, configuration in todo
    )
    # loky renews a worker that has grown; nothing is lost by it
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    results = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks)
    with progress(results, len(candidates), quiet, initial=len(done), unit="candidate") as bar:
        for entry in bar:
            entry["fingerprint"] = fingerprints[entry["feature_set"], entry["model"]]
            entries.append(entry)
            write_json(log_path, entries)
            if "error" in entry:
                log.warning("%s with %s failed: %s", entry["model"], entry["feature_set"], entry["error"])
            best = max((e["score"] for e in entries if "score" in e), default=float("nan"))
            bar.set_postfix_str(f"best {best:.4f}")
            if bar.disable:
                shown = f"{entry['score']:.4f}" if "score" in entry else "failed"
                log.info(
                    "%2d/%d  %-16s %-28s %s  (best %.4f, %.1f s)",
                    *(len(entries), len(candidates), entry["feature_set"], entry["model"], shown, best),
                    entry["seconds"],
                )
    return entries


def _candidate(feature_set, configuration, table, columns, label, train, held_out, seed) -> dict[str, Any]:
    result = judge_candidate(configuration, table, columns, label, train, held_out, seed)
    result.pop("log_odds", None)
    return {"feature_set": feature_set, "model": configuration.name, "n_features": len(columns), **result}


def _finished(log_path: Path, search: Search, candidates) -> list[dict[str, Any]]:
    """Entries of an earlier log that this search would compute again just so."""
    try:
        entries = json.loads(log_path.read_text())
    except (OSError, ValueError):
        return []
    wanted = {(fs, c.name): search.fingerprint(fs, c) for fs, c in candidates}
    return [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and "score" in entry
        and wanted.get((entry.get("feature_set"), entry.get("model")), "") == entry.get("fingerprint")
    ]


# ---------------------------------------------------------------------------------------------------- winner


@dataclass
class Evaluation:
    """The winner on the test part, and what was learned on the rest about its probabilities."""

    model: ScoreModel
    metrics: dict[str, Any]
    points: list[Any]
    decision_threshold: float
    test_probability: np.ndarray


def evaluate_winner(
    search: Search, feature_set: str, configuration: ModelConfiguration, out_of_fold: np.ndarray, sensitivity: float
) -> Evaluation:
    """Fits the winner on training and validation parts, calibrates it on their out-of-fold scores, tests it once."""
    data, columns = search.data, search.columns(feature_set)
    rows, test = np.flatnonzero(search.part != TEST), np.flatnonzero(search.part == TEST)
    model, own = fit_calibrated(configuration, search.table, columns, data, rows, out_of_fold, search.seed)
    probability = model.probability(filled(search.table.rows(test, columns), configuration.fill_value))
    return Evaluation(
        model=model,
        metrics={
            "cross_validation": ranking_scores(data.label[rows], out_of_fold),
            "test": figures(data.label[test], probability, data.group[test], data.visit[test], search.seed),
        },
        points=operating_points(data.label[rows], own, data.visit[rows]),
        decision_threshold=threshold_for_sensitivity(data.label[rows], own, sensitivity),
        test_probability=probability,
    )


def loss_without_codes(
    search: Search, feature_set: str, configuration: ModelConfiguration, model: ScoreModel, most_visits: int = 1000
) -> dict[str, float]:
    """How much ROC AUC the model loses where a hospital does not measure a code at all, on test visits.

    The features are computed anew without the code.
    """
    data, columns = search.data, search.columns(feature_set)
    test = np.flatnonzero(search.part == TEST)
    septic = np.unique(data.visit[test][data.label[test] == 1])
    others = np.setdiff1d(np.unique(data.visit[test]), septic)
    visits = np.concatenate([septic[: most_visits // 2], others[: most_visits - min(len(septic), most_visits // 2)]])
    rows = test[np.isin(data.visit[test], visits)]
    plan = FeaturePlan([search.names[i] for i in columns])

    def auc(observations: Observations) -> float:
        features = plan.evaluate(observations, data.visit[rows], data.as_of[rows])
        score = model.log_odds(filled(features, configuration.fill_value))
        return ranking_scores(data.label[rows], score)["roc_auc"]

    whole = auc(data.observations)
    return {code: round(whole - auc(data.observations.without_code(code)), 4) for code in plan.codes}


# Hours before the golden example's end: in each window something, and of each code another mix of it.
GOLDEN_HOURS = (29.0, 17.0, 9.0, 4.0, 1.0)


def golden_example(
    names: list[str], synonyms: dict[str, str], fill_value: float | None, codes: Sequence[str] = ()
) -> dict[str, Any]:
    """Synthetic observations of one visit and their features; the probability is added when a model is trained.

    Every code of the features, and of `codes` besides (clinical scores may take from them), is measured several times
    with values of its own: hardly a feature is empty, and none can stand in for another. Of many codes the last one is
    measured once, long before, so that something is empty.
    """
    records: list[dict[str, Any]] = []
    end = np.datetime64("2024-01-03T12:00:00", "m")
    codes = sorted({*FeaturePlan(names).codes, *codes}) or ["HR"]  # HR: a model may have no code of its own
    for i, code in enumerate(codes):
        concept = concept_of(code, synonyms)
        low, high = (concept.low, concept.high) if concept and np.isfinite(concept.high) else (0.0, 4.0)
        once = len(codes) > 10 and i == len(codes) - 1
        for k, hours in enumerate(GOLDEN_HOURS[:1] if once else GOLDEN_HOURS[i % 2 :: 1 + i % 3 // 2]):
            share = ((len(records) + 1) * 0.6180339887) % 1.0  # spreads evenly, and repeats nothing
            records.append(
                {
                    "visit_id": "golden",
                    "client": "golden",
                    "observation_date": str(end - np.timedelta64(int(60 * hours) + (7 * i + 11 * k) % 50, "m")),
                    "observation_type_code": code,
                    "observation_value": round(low + (high - low) * (0.2 + 0.6 * share), 2),
                    "reference_range_min": round(low + (high - low) * 0.3, 2),
                    "reference_range_max": round(low + (high - low) * 0.5, 2),
                }
            )
    observations = read_observations(records, synonyms)
    visit, moments, _ = resolve_snapshots(observations)
    features = filled(FeaturePlan(names).evaluate(observations, visit, moments), fill_value)
    return {
        "observations": records,
        "features": [[None if np.isnan(v) else float(v) for v in row] for row in features],
        "probability": None,
    }


# ----------------------------------------------------------------------------------------------------- files


def make_config(
    search: Search,
    feature_set: str,
    configuration: ModelConfiguration,
    evaluation: Evaluation,
    loss: dict[str, float],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """All that ``best_model_config.json`` holds, before a model is trained on everything."""
    data, names = search.data, [search.names[i] for i in search.columns(feature_set)]
    prevalence = code_prevalence(data.observations, np.unique(data.visit))
    used = set(FeaturePlan(names).codes)
    medium, high = arguments.risk_thresholds
    return {
        "schema_version": SCHEMA_VERSION,
        "model_version": None,
        "model_sha256": None,
        "feature_set": feature_set,
        "blocks": list(FEATURE_SETS[feature_set]),
        "windows": list(DEFAULT_WINDOWS),
        "codes": search.codes,
        "synonyms": search.synonyms,
        "fill_value": configuration.fill_value,
        "model": asdict(configuration),
        "snapshots": {**asdict(data.settings), "retrospective": data.retrospective},
        "metrics": evaluation.metrics,
        "risk_thresholds": {"medium": medium, "high": high},
        "decision_threshold": evaluation.decision_threshold,
        "decision_sensitivity": arguments.sensitivity,
        "rank_by": arguments.rank_by,
        "code_prevalence": {code: round(share, 4) for code, share in prevalence.items() if code in used},
        "loss_without_code": loss,
        "data": {
            "observations": arguments.observations,
            "labels": arguments.labels,
            "synthetic": data.synthetic,
            "fingerprint": data.fingerprint,
            "description": data.describe(),
            "grouped_by": data.grouped_by,
        },
        "library_versions": library_versions(),
        "seed": search.seed,
        "golden": golden_example(names, search.synonyms, configuration.fill_value, search.codes),
        "feature_names": names,
    }


def summary_text(
    search: Search,
    entries: list[dict[str, Any]],
    finalists: list[tuple[str, str, float]],
    evaluation: Evaluation,
    config: dict[str, Any],
    seconds: float,
) -> str:
    """``optimization_summary.txt``, for a person."""
    test, data = evaluation.metrics["test"], search.data
    lines = [*data.notices(), f"{data.describe()}."]
    lines += [f"Left out: {n:,} {what}." for what, n in data.remarks.items()]
    if data.observations.set_aside:
        lines.append(f"Set aside: {describe_set_aside(data.observations)}.")
    horizon = f"onset within {data.settings.horizon_hours:g} h" + (" or past" if data.settings.after_onset else "")
    lines += [
        f"Positive means: {'septic at all' if data.retrospective else horizon}. Split by {data.grouped_by}: "
        + ", ".join(f"{name} {int((search.part == k).sum()):,} snapshots" for k, name in enumerate(PARTS))
        + ".",
        "",
        f"Winner: {config['feature_set']} with {config['model']['name']}, {len(config['feature_names'])} features",
        "Test part, used once, with 95% intervals resampled by " + data.grouped_by + ":",
        *(f"  {name:<18s} {value}" for name, value in describe_figures(test).items()),
        "",
        "Grouped cross-validation of the best, on training and validation parts (ROC AUC + average precision):",
        *(f"  {score:.4f}  {fs} with {model}" for fs, model, score in finalists),
        "",
        "Operating points, from out-of-fold predictions (rates over snapshots; alerts over whole visits):",
        "  threshold  sensitivity  specificity    PPV  visits alerted  septic visits",
        "                                              per 100         alerted",
        *(
            f"  {p.threshold:9.4f}  {p.sensitivity:11.3f}  {p.specificity:11.3f}  {p.ppv:5.3f}"
            f"  {p.visits_alerted_per_100:14.1f}  {p.septic_visits_alerted:13.3f}"
            for p in evaluation.points
        ),
        f"  decision_threshold in the config: {evaluation.decision_threshold:.4f}",
        *_risk_level_remark(config, evaluation),
    ]
    if config["loss_without_code"]:
        worst = sorted(config["loss_without_code"].items(), key=lambda item: -item[1])[:10]
        lines += [
            "",
            "ROC AUC lost where a code is never measured: " + ", ".join(f"{code} {loss:.3f}" for code, loss in worst),
        ]
    ranked = sorted(entries, key=lambda e: -e.get("score", -1))
    lines += [
        "",
        f"All {len(entries)} candidates by validation ROC AUC + average precision ({seconds:.0f} s in all):",
        "  rank   score  ROC AUC  av. prec.  codes hidden  features  seconds  feature set        model",
        *(
            f"  {i:4d}  {e['score']:.4f}   {e['roc_auc']:.4f}     {e['average_precision']:.4f}"
            f"        {e['hidden_score']:.4f}  {e['n_features']:8d}"
            f"  {e['seconds']:7.1f}  {e['feature_set']:<17s}  {e['model']}"
            if "score" in e
            else f"  {i:4d}  failed  {e['feature_set']} with {e['model']}: {e['error']}"
            for i, e in enumerate(ranked, 1)
        ),
    ]
    return "\n".join(lines) + "\n"


def _risk_level_remark(config: dict[str, Any], evaluation: Evaluation) -> list[str]:
    levels, highest = config["risk_thresholds"], float(evaluation.test_probability.max())
    if (share := float((evaluation.test_probability >= levels["medium"]).mean())) >= 0.001:
        return []
    return [
        f"  NOTE: only {share:.3%} of the test snapshots reach risk level medium ({levels['medium']:g}; the highest "
        f"probability is {highest:.3f}). Choose --risk-thresholds from the table above."
    ]


# ------------------------------------------------------------------------------------------------ the script


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
    write_json(directory / "best_model_config.json", config)
    print(text.split("\nAll ")[0].rstrip())
    log.info(
        "written: %s",
        ", ".join(
            str(directory / n) for n in ("best_model_config.json", "optimization_log.json", "optimization_summary.txt")
        ),
    )
    return SOME_FAILED if len(good) < len(entries) or len(finalists) < len(best) else DONE


def thresholds(text: str) -> tuple[float, float]:
    """`0.4,0.7` as a pair."""
    medium, high = (float(part) for part in text.split(","))
    if not 0 < medium < high < 1:
        raise ValueError
    return medium, high


def choice_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated names that must be among the known ones."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return tuple(dict.fromkeys(names))

    return read


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__,
        "python generate_features.py --observations observations.parquet --labels labels.parquet --horizon 6",
        *("observations", "labels", "models-dir", "seed", "jobs"),
    )
    parser.add_argument(
        "--snapshot-every",
        type=number(float, 0.01, MOST_HOURS),
        default=6.0,
        metavar="HOURS",
        help="between snapshots of a visit",
    )
    parser.add_argument(
        "--horizon",
        type=number(float, 0, MOST_HOURS),
        default=6.0,
        metavar="HOURS",
        help="positive this long before onset",
    )
    parser.add_argument("--after-onset", action="store_true", help="keep snapshots after onset, as positives")
    parser.add_argument("--synthetic", action="store_true", help="no real patients: every report shall say so")
    parser.add_argument("--synonyms", metavar="FILE", help="CSV code,concept: what the hospital's own codes mean")
    parser.add_argument(
        "--risk-thresholds",
        type=thresholds,
        default=(0.4, 0.7),
        metavar="MEDIUM,HIGH",
        help="probabilities at which risk is called medium and high",
    )
    parser.add_argument(
        "--sensitivity", type=number(float, 0.01, 1), default=0.8, help="that the decision threshold shall reach"
    )
    parser.add_argument(
        "--rank-by",
        choices=("score", "hidden_score"),
        default="score",
        help="which candidates are finalists: by ROC AUC + average precision on the validation part as it is, or with "
        "codes hidden in many visits, for a model that shall travel to other hospitals",
    )
    parser.add_argument("--finalists", type=number(int, 1), default=3, help="candidates that are cross-validated")
    parser.add_argument("--folds", type=number(int, 2), default=5, help="of the cross-validation")
    parser.add_argument(
        "--quick", action="store_true", help=f"first look: {len(QUICK_SETS) * len(QUICK_MODELS)} candidates"
    )
    parser.add_argument("--feature-sets", type=choice_of(tuple(FEATURE_SETS)), metavar="A,B", help="only these")
    parser.add_argument("--models", type=choice_of(tuple(CONFIGURATION)), metavar="A,B", help="only these")
    parser.add_argument("--resume", action="store_true", help="keep what the log says was finished on the same data")
    parser.add_argument("--backend", choices=("local", "dask"), default="local", help="where candidates run")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of the Dask cluster, such as tcp://10.0.0.1:8786")
    return run(search_features, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
