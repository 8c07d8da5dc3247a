"""Retraining on old and new data, in one command that cron may run: search, compare, check, promote or say why not."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from common.artifacts import locked, write_atomic
from common.command_line import log
from common.labels import read_labels
from feature_pipeline import BadConfig, Config, as_text, load_config
from training.check import check
from training.comparison import REFUSED, compare
from training.config import recipe
from training.raw_data import held_out_clients, raw_data, read_raw, write_raw
from training.search import LOG, QUICK_MODELS, QUICK_SETS, SUMMARY, SearchOptions, search
from training.thresholds import Rule
from training.train import train_full
from training.versions import CONFIG, MODEL, fingerprint_of_files, switch


@dataclass(frozen=True)
class RetrainOptions:
    observations: str | None  # the new data
    labels: str | None
    data_dir: Path  # where the training data are kept
    keep_config: bool = False  # no search
    quick: bool = False  # the quick search
    force: bool = False  # deploy a worse model too
    jobs: int = 1


def retrain(directory: Path, options: RetrainOptions) -> tuple[list[str], bool]:
    """Retrains on the data of the deployed model and the new data.

    A share of the new data's clients, those that the deployed model cannot have seen, is held out. A challenger is
    searched (or, with `keep_config`, fitted anew) on all the rest and compared with the deployed model on them. If
    it is not worse (or with `force`), the same recipe is trained on everything and deployed. Gives lines for a person,
    and False where the challenger was not promoted.
    """
    if not (options.observations and options.labels):
        raise BadConfig("--retrain needs the new data: --observations and --labels")
    champion = load_config(directory / CONFIG)
    with locked(directory / ".retrain.lock", wait=False) as alone:
        if not alone:
            log.warning("another retraining is at work; nothing done")
            return [], True
        fingerprint = fingerprint_of_files(options.observations, options.labels)
        if fingerprint in champion.retrained_with:
            return ["the deployed model has learned from these data already; nothing to do"], True
        own = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]
        with (
            working_folder(directory / ".retrain") as folder,
            working_folder(options.data_dir / f".retrain-{own}") as rows,
        ):
            return _retrain(options, directory, champion, fingerprint, folder, rows)


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """A folder that is removed at the end, or, where its process was killed, by the next that comes here."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, mode=0o750)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _retrain(options, directory, champion, fingerprint, folder, rows) -> tuple[list[str], bool]:
    source = champion.training_source
    old, new = raw_data(source), read_raw(options.observations, options.labels)
    held_out = held_out_clients(old, new)
    learned = tuple(frame[~frame["client"].map(as_text).isin(held_out)] for frame in new)
    rest = tuple(pd.concat([a, b]).drop_duplicates() for a, b in zip(old, learned, strict=True))
    everything = tuple(pd.concat([a, b]).drop_duplicates() for a, b in zip(old, new, strict=True))
    challenger = folder / "challenger"
    challenger.mkdir()
    searched = write_raw(rows, f"searched_{fingerprint[:12]}", rest)
    if options.keep_config:
        write_atomic(challenger / CONFIG, recipe(champion, searched, source["synthetic"]).text())
    else:
        search(search_options(champion, searched, options), challenger)
    train_full(challenger, *searched, jobs=options.jobs)

    observations, labels = (frame[frame["client"].map(as_text).isin(held_out)] for frame in new)
    basis = "new patients that neither has learned from"
    comparison = compare(directory, challenger, observations, read_labels(labels), basis)
    decision = comparison.decision(options.force)
    if comparison.objections and not options.force:
        write_atomic(directory / "comparison.html", comparison.html(decision))
        return [*comparison.lines(), REFUSED], False

    # the recipe that won, on everything, beside the deployed one until it is whole
    final = folder / "final"
    final.mkdir()
    paths = write_raw(options.data_dir, f"training_{fingerprint[:12]}", everything)
    config = recipe(load_config(challenger / CONFIG), paths, source["synthetic"])
    if not options.keep_config:  # the figures of the search are of these files: they stay beside it
        kept = [str(Path(path).replace(options.data_dir / Path(path).name)) for path in searched]
        config = replace(config, data={**config.data, "observations": kept[0], "labels": kept[1]})
    learned_from = [*champion.retrained_with, fingerprint]
    config = replace(config, retrained_with=learned_from, thresholds=champion.thresholds)
    write_atomic(final / CONFIG, config.text())
    train_full(final, *paths, jobs=options.jobs)
    version = check_and_adopt(final, directory)
    for name in (LOG, SUMMARY):
        if (challenger / name).is_file():
            write_atomic(directory / name, (challenger / name).read_bytes())
    text = f"{decision} as model {version}: the new recipe, trained on these patients too"
    write_atomic(directory / "comparison.html", comparison.html(text))
    return [*comparison.lines(), f"{decision}: model {version}; see {directory / 'comparison.html'}"], True


def check_and_adopt(final: Path, directory: Path) -> str:
    """Checks the new deployment, moves its archive folder over, switches. Gives the version."""
    if failed := [str(c) for c in check(final / CONFIG, final / MODEL) if not c.passed]:
        raise BadConfig(f"the new model fails its checks ({'; '.join(failed)}); the deployed one stays")
    version = load_config(final / CONFIG).model_version
    (directory / "archive").mkdir(exist_ok=True)
    (final / "archive" / version).rename(directory / "archive" / version)
    switch(directory, version)
    return version


def search_options(champion: Config, data: tuple[str, str], options: RetrainOptions) -> SearchOptions:
    """The search that gave the deployed model, on other data."""
    found = SearchOptions(
        *data,
        synthetic=champion.training_source["synthetic"],
        snapshots=replace(champion.snapshots, retrospective=False),
        synonyms=champion.synonyms,
        portable=champion.portable,
        rank_by=champion.rank_by,
        rule=Rule.of(champion),
        sensitivity=champion.decision_sensitivity,
        seed=champion.seed,
        jobs=options.jobs,
    )
    return replace(found, feature_sets=QUICK_SETS, models=QUICK_MODELS) if options.quick else found
