"""Fits and scores every candidate on the same features, and measures the winner once on the test part."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from common.artifacts import library_versions, write_json
from common.command_line import log, progress
from common.metrics import figures, operating_points, ranking_scores
from feature_pipeline import (
    CONCEPT,
    DEFAULT_WINDOWS,
    BadConfig,
    FeaturePlan,
    Observations,
    ScoreModel,
)
from training.candidates import FEATURE_SETS, ModelConfiguration, feature_set_names
from training.fitting import FeatureTable, calibrated, filled, in_processes, judge_candidates
from training.snapshots import PARTS, TEST, TRAIN, VALIDATION, TrainingData, split_parts

RAREST_CODE = 0.01  # codes that fewer training visits have give no features


@dataclass(frozen=True)
class Search:
    """Everything the candidates share: the data, every feature once, and who stands in which part."""

    data: TrainingData
    part: np.ndarray  # (n_snapshots,) TRAIN, VALIDATION or TEST
    codes: list[str]
    synonyms: dict[str, str]
    portable: bool  # the codes are names of concepts
    names: list[str]
    table: FeatureTable
    informative: np.ndarray  # (n_features,) does the feature vary on the training part?
    seed: int
    folds: int | None

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
    seed: int = 0,
    folds: int | None = None,
    feature_sets: Sequence[str] = tuple(FEATURE_SETS),
    synonyms: dict[str, str] | None = None,
    portable: bool = False,
) -> Search:
    """Splits the data and computes every feature of every set once."""
    synonyms = synonyms or {}
    part = split_parts(data, seed=seed)
    for k, name in enumerate(PARTS):
        rows = part == k
        if not 0 < data.label[rows].sum() < rows.sum():
            raise BadConfig(f"the {name} part lacks septic or other visits: too few visits to search on")
    prevalence = code_prevalence(data.observations, np.unique(data.visit[part == TRAIN]))
    codes = [code for code, share in prevalence.items() if share >= RAREST_CODE and (code in CONCEPT or not portable)]
    if portable and not codes:
        raise BadConfig("no code of the observations has a known concept: say what they mean with --synonyms")
    names = list(
        dict.fromkeys(n for fs in feature_sets for n in feature_set_names(fs, codes, DEFAULT_WINDOWS, synonyms))
    )
    table = FeatureTable.of(data, names, seed)
    train = part == TRAIN
    informative = np.array([_varies(column[train]) for column in table.plain])
    return Search(data, part, codes, synonyms, portable, names, table, informative, seed, folds)


def _varies(column: np.ndarray) -> bool:
    known = column[~np.isnan(column)]
    return len(known) > 0 and (len(known) < len(column) or known.min() < known.max())


def code_prevalence(observations: Observations, visits: np.ndarray) -> dict[str, float]:
    """Share of `visits` that have each code at all."""
    has_code = np.isin(observations.group_visit, visits)
    count = np.bincount(observations.group_code[has_code], minlength=len(observations.codes))
    return {code: n / len(visits) for code, n in zip(observations.codes, count.tolist(), strict=True)}


def run_candidates(
    search: Search,
    candidates: Sequence[tuple[str, ModelConfiguration]],
    log_path: Path,
    jobs: int = 1,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Judges every candidate on the validation part; the log on disk grows with each that finishes."""
    entries = _finished(log_path, search, candidates) if resume else []
    done = {(entry["feature_set"], entry["model"]) for entry in entries}
    todo = [c for c in candidates if (c[0], c[1].name) not in done]
    # those that have much in common go together, the largest first: the last processes then end together
    together: dict[tuple[str, str], list[ModelConfiguration]] = {}
    todo.sort(key=lambda c: (-len(search.columns(c[0])), c[1].fill_value is not None))
    for feature_set, configuration in todo:
        together.setdefault((feature_set, configuration.kind), []).append(configuration)
    if done:
        log.info("resumed: %d of %d candidates were finished before", len(done), len(candidates))
    train, held_out = (np.flatnonzero(search.part == number) for number in (TRAIN, VALIDATION))
    fingerprints = {(fs, c.name): search.fingerprint(fs, c) for fs, c in todo}
    # a task carries what it needs and no more: other processes get the observations neither sent nor kept
    tasks = (
        joblib.delayed(_candidates)(
            feature_set,
            configurations,
            search.table,
            search.columns(feature_set),
            search.data.label,
            train,
            held_out,
            search.seed,
        )
        for (feature_set, _), configurations in together.items()
    )
    results = in_processes(jobs, return_as="generator_unordered")(tasks)
    shown, quiet = chain.from_iterable(results), not log.isEnabledFor(logging.INFO)
    with closing(results), progress(shown, len(candidates), quiet, initial=len(done), unit="candidate") as bar:
        for entry in bar:
            entry["fingerprint"] = fingerprints[entry["feature_set"], entry["model"]]
            entries.append(entry)
            write_json(log_path, entries)
            if "error" in entry:
                log.warning("%s with %s failed: %s", entry["model"], entry["feature_set"], entry["error"])
            best = max((e["score"] for e in entries if "score" in e), default=float("nan"))
            bar.set_postfix_str(f"best {best:.4f}")
            if bar.disable:
                score = f"{entry['score']:.4f}" if "score" in entry else "failed"
                log.info(
                    "%2d/%d  %-16s %-28s %s  (best %.4f, %.1f s)",
                    *(len(entries), len(candidates), entry["feature_set"], entry["model"], score, best),
                    entry["seconds"],
                )
    return entries


def _candidates(feature_set, configurations, table, columns, label, train, held_out, seed) -> list[dict[str, Any]]:
    results = judge_candidates(configurations, table, columns, label, train, held_out, seed)
    for result in results:
        result.pop("log_odds", None)
    return [
        {"feature_set": feature_set, "model": configuration.name, "n_features": len(columns), **result}
        for configuration, result in zip(configurations, results, strict=True)
    ]


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


@dataclass
class Evaluation:
    """The winner on the test part, and what was learned on the rest about its probabilities."""

    model: ScoreModel
    metrics: dict[str, Any]
    points: list[Any]
    rows: np.ndarray  # snapshots of the training and validation parts
    out_of_fold: np.ndarray  # their calibrated probabilities
    test_probability: np.ndarray


def evaluate_winner(
    search: Search,
    feature_set: str,
    configuration: ModelConfiguration,
    model: ScoreModel,
    out_of_fold: np.ndarray,
) -> Evaluation:
    """Calibrates the winner, fitted on training and validation parts, on their out-of-fold scores; tests it once."""
    data, columns = search.data, search.columns(feature_set)
    rows, test = np.flatnonzero(search.part != TEST), np.flatnonzero(search.part == TEST)
    own = calibrated(model, out_of_fold, data.label[rows])
    probability = model.probability(search.table.rows(test, columns, fill_value=configuration.fill_value))
    return Evaluation(
        model=model,
        metrics={
            "cross_validation": ranking_scores(data.label[rows], out_of_fold),
            "test": figures(data.label[test], probability, data.group[test], data.visit[test], search.seed),
        },
        points=operating_points(data.label[rows], own, data.visit[rows]),
        rows=rows,
        out_of_fold=own,
        test_probability=probability,
    )


def loss_without_codes(
    search: Search,
    feature_set: str,
    configuration: ModelConfiguration,
    model: ScoreModel,
    jobs: int = 1,
    most_visits: int = 1000,
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
    known = data.observations.without(~np.isin(data.observations.group_visit, visits))
    of_rows = data.visit[rows], data.as_of[rows], data.label[rows]
    whole, *without = in_processes(jobs)(
        joblib.delayed(_auc)(plan, observations, *of_rows, model, configuration.fill_value)
        for observations in [known, *map(known.without_code, plan.codes)]
    )
    return {code: round(whole - auc, 4) for code, auc in zip(plan.codes, without, strict=True)}


def _auc(plan, observations, visit, as_of, label, model, fill_value) -> float:
    score = model.log_odds(filled(plan.evaluate(observations, visit, as_of), fill_value))
    return ranking_scores(label, score)["roc_auc"]
