"""Retraining on old and new data, in one command that cron may run: search, compare, check, promote or say why not."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import generate_features
from artifacts import locked, write_atomic, write_json, write_tables
from command_line import DONE, SOME_FAILED, log
from demo_cohort import make_demo_cohort
from feature_pipeline import COLUMNS, BadConfig, as_text, load_config, read_table, training_source
from training_data import read_cells, read_labels
from versions import CONFIG, compare, fingerprint_of_files, switch

HELD_OUT = 0.3  # of the new data's clients
FEWEST_POSITIVE = 5  # held-out visits
SEARCH_REPORTS = ("optimization_log.json", "optimization_summary.txt")


def retrain(arguments: argparse.Namespace, train: Any) -> int:
    """Retrains on the data of the deployed model and the new data of `arguments`; `train(argv)` is
    ``train_best_model.main``.

    A share of the new data's clients, those that the deployed model cannot have seen, is held out. A challenger is
    searched (or, with --keep-config, fitted anew) on all the rest and compared with the deployed model on them. Where
    it is not worse (or with --force), the same recipe is trained on everything and deployed. Gives the exit status.
    """
    if not (arguments.observations and arguments.labels):
        raise BadConfig("--retrain needs the new data: --observations and --labels")
    directory = Path(arguments.models_dir)
    champion = load_config(directory / CONFIG)
    with locked(directory / ".retrain.lock", wait=False) as alone:
        if not alone:
            log.warning("another retraining is at work; nothing done")
            return DONE
        fingerprint = fingerprint_of_files(arguments.observations, arguments.labels)
        if fingerprint in champion.get("retrained_with", []):
            print("the deployed model has learned from these data already; nothing to do")
            return DONE
        own = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]
        with (
            working_folder(directory / ".retrain") as folder,
            working_folder(Path(arguments.data_dir) / f".retrain-{own}") as rows,
        ):
            return _retrain(arguments, train, directory, champion, fingerprint, folder, rows)


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """A folder that is removed at the end, or, where its process was killed, by the next that comes here."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, mode=0o750)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _retrain(arguments, train, directory, champion, fingerprint, folder, rows) -> int:
    source = training_source(champion)
    old, new = raw_data(source), read_raw(arguments.observations, arguments.labels)
    held_out = held_out_clients(old, new)
    learned = tuple(frame[~frame["client"].map(as_text).isin(held_out)] for frame in new)
    rest = tuple(pd.concat([a, b]).drop_duplicates() for a, b in zip(old, learned, strict=True))
    everything = tuple(pd.concat([a, b]).drop_duplicates() for a, b in zip(old, new, strict=True))
    challenger = folder / "challenger"
    challenger.mkdir()
    searched = write_raw(rows, f"searched_{fingerprint[:12]}", rest)
    named = ["--observations", searched[0], "--labels", searched[1]]
    if arguments.keep_config:
        write_json(challenger / CONFIG, recipe(champion, searched, source["synthetic"]))
    else:
        search = [*named, "--models-dir", str(challenger), "--seed", str(champion["seed"])]
        search += ["--jobs", str(arguments.jobs), "--quiet", *search_options(champion, rows)]
        if source["synthetic"]:
            search.append("--synthetic")
        if arguments.quick:
            search.append("--quick")
        if generate_features.main(search) == 2:
            raise BadConfig("the search on old and new data could not start; see above")
    common = ["--full", "--jobs", str(arguments.jobs), "--quiet"]
    if train(["--models-dir", str(challenger), *named, *common]) != DONE:
        raise BadConfig("the challenger could not be trained; see above")

    observations, labels = (frame[frame["client"].map(as_text).isin(held_out)] for frame in new)
    basis = "new patients that neither has learned from"
    comparison = compare(directory, challenger, observations, read_labels(labels), basis)
    decision = comparison.decision(arguments.force)
    for line in comparison.lines():
        print(line)
    if comparison.objections and not arguments.force:
        write_atomic(directory / "comparison.html", comparison.html(decision))
        print("not promoted: the new model is worse; --force promotes it all the same")
        return SOME_FAILED

    # the recipe that won, on everything, beside the deployed one until it is whole
    final, kept = folder / "final", Path(arguments.data_dir)
    final.mkdir()
    paths = write_raw(kept, f"training_{fingerprint[:12]}", everything)
    config = recipe(load_config(challenger / CONFIG), paths, source["synthetic"])
    if not arguments.keep_config:  # the figures of the search are of these files: they stay beside it
        searched = tuple(str(Path(path).replace(kept / Path(path).name)) for path in searched)
        config["data"] |= {"observations": searched[0], "labels": searched[1]}
    config["retrained_with"] = [*champion.get("retrained_with", []), fingerprint]
    config["risk_thresholds"] = champion["risk_thresholds"]
    write_json(final / CONFIG, config)
    if train(["--models-dir", str(final), "--observations", paths[0], "--labels", paths[1], *common]) != DONE:
        raise BadConfig("the final model could not be trained; the deployed one stays")
    version = check_and_adopt(final, directory)
    for name in SEARCH_REPORTS:
        if (challenger / name).is_file():
            write_atomic(directory / name, (challenger / name).read_bytes())
    text = f"{decision} as model {version}: the new recipe, trained on these patients too"
    write_atomic(directory / "comparison.html", comparison.html(text))
    print(f"{decision}: model {version}; see {directory / 'comparison.html'}")
    return DONE


def check_and_adopt(final: Path, directory: Path) -> str:
    """Runs the pipeline check on the new deployment, moves its archive folder over, switches. Gives the version."""
    import run_tests

    check = ["pipeline", "--config", str(final / CONFIG), "--model", str(final / "best_model.pkl"), "--quiet"]
    if run_tests.main([*check, "--sample", str(final / "sample.csv")]) != DONE:
        raise BadConfig("the new model does not pass run_tests.py pipeline; the deployed one stays")
    version = load_config(final / CONFIG)["model_version"]
    (directory / "archive").mkdir(exist_ok=True)
    (final / "archive" / version).rename(directory / "archive" / version)
    switch(directory, version)
    return version


def recipe(config: dict[str, Any], paths: tuple[str, str], synthetic: bool) -> dict[str, Any]:
    """The config as the search left it, to be trained on other data: no version, no model yet."""
    keep = {k: v for k, v in config.items() if k not in ("trained_at", "reference_profile")}
    metrics = {k: v for k, v in config["metrics"].items() if k != "out_of_fold"}
    trained_on = {"observations": paths[0], "labels": paths[1], "synthetic": synthetic}
    return {**keep, "metrics": metrics, "trained_on": trained_on, "model_version": None, "model_sha256": None}


def search_options(config: dict[str, Any], folder: Path) -> list[str]:
    """The options that the champion's search had; a file that they need is written to `folder`."""
    snapshots, levels = config["snapshots"], config["risk_thresholds"]
    options = ["--snapshot-every", str(snapshots["every_hours"]), "--horizon", str(snapshots["horizon_hours"])]
    options += ["--risk-thresholds", f"{levels['medium']},{levels['high']}"]
    options += ["--sensitivity", str(config["decision_sensitivity"]), "--rank-by", config.get("rank_by", "score")]
    if config["synonyms"]:
        table = pd.DataFrame(config["synonyms"].items(), columns=["code", "concept"])
        write_tables({folder / "synonyms.csv": table})
        options += ["--synonyms", str(folder / "synonyms.csv")]
    return [*options, "--after-onset"] if snapshots.get("after_onset") else options


# ------------------------------------------------------------------------------------------------- raw data


def raw_data(source: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Observations and labels that the deployed model was trained on. Raises `BadObservations`."""
    if source["synthetic"] and not source["observations"]:
        return tuple(as_cells(frame) for frame in make_demo_cohort())
    return read_raw(source["observations"], source["labels"])


def training_clients(config: dict[str, Any]) -> set[str]:
    """The clients that a deployed model was trained on. Raises `BadObservations` where their labels are gone."""
    source = training_source(config)
    demo = source["synthetic"] and not source["labels"]
    return set(read_labels(make_demo_cohort()[1] if demo else source["labels"])["client"])


def read_raw(observations: str, labels: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The columns that count, every cell a text as it stands. Raises `BadObservations`."""
    frame, malformed = read_table(Path(observations))
    if malformed:
        log.warning("warning: %s: %d lines with too many fields are left out", observations, malformed)
    return as_cells(frame), as_cells(read_cells(labels, f"labels {labels!r}"))


def as_cells(frame: pd.DataFrame) -> pd.DataFrame:
    known = [name for name in (*COLUMNS, "sepsis", "sepsis_onset") if name in frame.columns]
    return pd.DataFrame({name: [_cell(cell) for cell in frame[name].tolist()] for name in known}, dtype=object)


def _cell(cell: Any) -> str:
    if cell is None or cell is pd.NaT or cell != cell:
        return ""
    return cell.isoformat() if isinstance(cell, pd.Timestamp) else as_text(cell)


def write_raw(folder: Path, name: str, frames: tuple[pd.DataFrame, pd.DataFrame]) -> tuple[str, str]:
    """Writes both as parquet; gives their paths."""
    paths = tuple(str(folder / f"{name}_{kind}.parquet") for kind in ("observations", "labels"))
    write_tables({Path(path): frame.astype(str) for path, frame in zip(paths, frames, strict=True)})
    return paths


def held_out_clients(old: tuple[pd.DataFrame, ...], new: tuple[pd.DataFrame, ...]) -> set[str]:
    """Some of the clients that only the new data have, septic and other ones alike."""
    labels = read_labels(new[1])
    seen = set(old[1]["client"].map(as_text))
    septic = labels.groupby("client")["sepsis"].max()
    septic = septic[[client not in seen for client in septic.index]]
    generator, chosen = np.random.default_rng(0), set()
    for outcome in (0, 1):
        clients = np.sort(septic[septic == outcome].index.to_numpy(dtype=object).astype(str))
        chosen |= set(generator.permutation(clients)[: int(np.ceil(HELD_OUT * len(clients)))].tolist())
    n_positive = int(septic[[c for c in septic.index if c in chosen]].eq(1).sum())
    if n_positive < FEWEST_POSITIVE:
        raise BadConfig(
            f"the new data have {n_positive} septic patients to hold out that the deployed model has not seen; "
            f"{FEWEST_POSITIVE} are needed to compare: collect more and try again"
        )
    return chosen
