"""Retraining on old and new data, in one command that cron may run: search, compare, check, promote or say why not."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import generate_features
from common.artifacts import locked, write_atomic, write_tables
from common.command_line import DONE, SOME_FAILED, log
from common.labels import read_labels
from feature_pipeline import BadConfig, Config, as_text, load_config
from training.comparison import compare
from training.config import recipe
from training.raw_data import held_out_clients, raw_data, read_raw, write_raw
from training.versions import CONFIG, fingerprint_of_files, switch

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
        if fingerprint in champion.retrained_with:
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
    source = champion.training_source
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
        write_atomic(challenger / CONFIG, recipe(champion, searched, source["synthetic"]).text())
    else:
        search = [*named, "--models-dir", str(challenger), "--seed", str(champion.seed)]
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
        config = replace(config, data={**config.data, "observations": searched[0], "labels": searched[1]})
    learned_from = [*champion.retrained_with, fingerprint]
    config = replace(config, retrained_with=learned_from, risk_thresholds=champion.risk_thresholds)
    write_atomic(final / CONFIG, config.text())
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
    version = load_config(final / CONFIG).model_version
    (directory / "archive").mkdir(exist_ok=True)
    (final / "archive" / version).rename(directory / "archive" / version)
    switch(directory, version)
    return version


def search_options(config: Config, folder: Path) -> list[str]:
    """The options that the champion's search had; a file that they need is written to `folder`."""
    snapshots, levels = config.snapshots, config.risk_thresholds
    options = ["--snapshot-every", str(snapshots.every_hours), "--horizon", str(snapshots.horizon_hours)]
    options += ["--risk-thresholds", f"{levels['medium']},{levels['high']}"]
    options += ["--sensitivity", str(config.decision_sensitivity), "--rank-by", config.rank_by]
    if config.synonyms:
        table = pd.DataFrame(config.synonyms.items(), columns=["code", "concept"])
        write_tables({folder / "synonyms.csv": table})
        options += ["--synonyms", str(folder / "synonyms.csv")]
    return [*options, "--after-onset"] if snapshots.after_onset else options
