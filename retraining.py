"""Retraining on old and new data, in one command that cron may run: search, compare, check, promote or say why not."""

from __future__ import annotations

import argparse
import fcntl
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import generate_features
from artifacts import write_atomic, write_json
from command_line import DONE, SOME_FAILED, log
from demo_cohort import make_demo_cohort
from feature_pipeline import COLUMNS, BadConfig, BadObservations, as_text, load_config
from training_data import SnapshotSettings, make_training_data, read_labels, read_observations
from versions import CONFIG, compare, fingerprint_of_files

HELD_OUT = 0.3  # of the new data's clients
FEWEST_POSITIVE = 5  # held-out visits


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
    with open(directory / ".retrain.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another retraining is at work; nothing done")
            return DONE
        fingerprint = fingerprint_of_files(arguments.observations, arguments.labels)
        if fingerprint in champion.get("retrained_with", []):
            print("the deployed model has learned from these data already; nothing to do")
            return DONE
        with tempfile.TemporaryDirectory(prefix=".retrain-", dir=directory) as folder:
            return _retrain(arguments, train, directory, champion, fingerprint, Path(folder))


def _retrain(arguments, train, directory, champion, fingerprint, folder) -> int:
    old, new = raw_data(champion["data"]), read_raw(arguments.observations, arguments.labels)
    held_out = held_out_clients(old, new)
    learned = tuple(frame[~frame["client"].map(as_text).isin(held_out)] for frame in new)
    rest = tuple(pd.concat([a, b]).drop_duplicates() for a, b in zip(old, learned, strict=True))
    everything = tuple(pd.concat([a, b]).drop_duplicates() for a, b in zip(old, new, strict=True))
    challenger = folder / "challenger"
    challenger.mkdir()
    paths = write_raw(folder, "rest", rest)
    if arguments.keep_config:
        write_json(challenger / CONFIG, recipe(champion, paths))
    else:
        search = ["--observations", paths[0], "--labels", paths[1], "--models-dir", str(challenger)]
        search += ["--seed", str(champion["seed"]), "--jobs", str(arguments.jobs), "--quiet"]
        search += search_options(champion)
        if arguments.quick:
            search.append("--quick")
        if generate_features.main(search) == 2:
            raise BadConfig("the search on old and new data could not start; see above")
    common = ["--full", "--jobs", str(arguments.jobs), "--quiet"]
    if train(["--models-dir", str(challenger), "--observations", paths[0], "--labels", paths[1], *common]) != DONE:
        raise BadConfig("the challenger could not be trained; see above")

    settings = {k: v for k, v in champion["snapshots"].items() if k != "retrospective"}
    new_labels = read_labels(new[1])
    test = make_training_data(
        read_observations(new[0][new[0]["client"].map(as_text).isin(held_out)], champion["synonyms"]),
        new_labels[new_labels["client"].isin(held_out)],
        SnapshotSettings(**settings),
    )
    comparison = compare(directory, challenger, test, "new patients that neither has learned from")
    objections = comparison.objections
    decision = "promoted" if not objections else "promoted by --force" if arguments.force else "not promoted"
    for line in comparison.lines():
        print(line)
    write_atomic(directory / "comparison.html", comparison.html(decision))
    if objections and not arguments.force:
        print("not promoted: the new model is worse; --force promotes it all the same")
        return SOME_FAILED

    # the recipe that won, on everything, beside the deployed one until it is whole
    version_data = Path(arguments.data_dir)
    paths = write_raw(version_data, f"training_{fingerprint[:12]}", everything)
    final = folder / "final"
    final.mkdir()
    config = recipe(load_config(challenger / CONFIG), paths)
    config["retrained_with"] = [*champion.get("retrained_with", []), fingerprint]
    config["risk_thresholds"] = champion["risk_thresholds"]
    write_json(final / CONFIG, config)
    if train(["--models-dir", str(final), "--observations", paths[0], "--labels", paths[1], *common]) != DONE:
        raise BadConfig("the final model could not be trained; the deployed one stays")
    check_and_adopt(final, directory)
    print(f"{decision}: model {load_config(directory / CONFIG)['model_version']}; see {directory / 'comparison.html'}")
    return DONE


def check_and_adopt(final: Path, directory: Path) -> None:
    """Runs the pipeline check on the new deployment, moves its archive folder over, switches."""
    import run_tests
    from versions import switch

    check = ["pipeline", "--config", str(final / CONFIG), "--model", str(final / "best_model.pkl"), "--quiet"]
    if run_tests.main([*check, "--sample", str(final / "sample.csv")]) != DONE:
        raise BadConfig("the new model does not pass run_tests.py pipeline; the deployed one stays")
    version = load_config(final / CONFIG)["model_version"]
    (directory / "archive").mkdir(exist_ok=True)
    shutil.move(final / "archive" / version, directory / "archive" / version)
    switch(directory, version)


def recipe(config: dict[str, Any], paths: tuple[str, str]) -> dict[str, Any]:
    """The config as the search left it, for other data: no version, no model yet."""
    keep = {k: v for k, v in config.items() if k not in ("trained_at", "trained_on", "reference_profile")}
    data = {**config["data"], "observations": paths[0], "labels": paths[1], "synthetic": config["data"]["synthetic"]}
    metrics = {k: v for k, v in config["metrics"].items() if k != "out_of_fold"}
    return {**keep, "data": data, "metrics": metrics, "model_version": None, "model_sha256": None}


def search_options(config: dict[str, Any]) -> list[str]:
    """The options that the champion's search had."""
    snapshots, levels = config["snapshots"], config["risk_thresholds"]
    options = ["--snapshot-every", str(snapshots["every_hours"]), "--horizon", str(snapshots["horizon_hours"])]
    options += ["--risk-thresholds", f"{levels['medium']},{levels['high']}"]
    options += ["--sensitivity", str(config["decision_sensitivity"])]
    return [*options, "--after-onset"] if snapshots.get("after_onset") else options


# ------------------------------------------------------------------------------------------------- raw data


def raw_data(source: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Observations and labels that the deployed model was made with. Raises `BadObservations`."""
    if source["synthetic"] and not source["observations"]:
        return tuple(as_cells(frame) for frame in make_demo_cohort())
    return read_raw(source["observations"], source["labels"])


def read_raw(observations: str, labels: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    return read_cells(observations), read_cells(labels)


def read_cells(path: str) -> pd.DataFrame:
    """A file's columns that count, every cell a text as it stands."""
    try:
        if path.endswith(".parquet"):
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadObservations(f"file {path!r} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return as_cells(frame)


def as_cells(frame: pd.DataFrame) -> pd.DataFrame:
    known = [name for name in (*COLUMNS, "sepsis", "sepsis_onset") if name in frame.columns]
    return pd.DataFrame({name: [_cell(cell) for cell in frame[name].tolist()] for name in known}, dtype=object)


def _cell(cell: Any) -> str:
    if cell is None or cell is pd.NaT or cell != cell:
        return ""
    return cell.isoformat() if isinstance(cell, pd.Timestamp) else as_text(cell)


def write_raw(folder: Path, name: str, frames: tuple[pd.DataFrame, pd.DataFrame]) -> tuple[str, str]:
    """Writes both as parquet; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    paths = tuple(str(folder / f"{name}_{kind}.parquet") for kind in ("observations", "labels"))
    for path, frame in zip(paths, frames, strict=True):
        frame.astype(str).to_parquet(path, index=False)
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
