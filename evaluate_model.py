"""Is the model good enough here? Scores past visits as in service, and shows which alerts a ward would get.

Writes ``evaluation.html``, a page for the people who decide, and ``evaluation.json`` with every number: how many
alerts, and how many of them are right, compared with chance and with the scores that wards use (NEWS2 and others);
thresholds for the number of alerts that the ward can answer; net benefit; calibration; groups. Patients that the model
was trained on are left out. --from-log evaluates a silent trial instead: the scores in the prediction log, which nobody
saw.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.alerts import COOLDOWN_HOURS, WINDOWS, Scored
from common.artifacts import write_atomic, write_json
from common.command_line import DONE, log, make_parser, number, progress, run
from common.labels import read_labels
from common.trial import read_stop_rule
from evaluation.evaluate import Settings, compare_versions, evaluate, side_by_side
from evaluation.exports.papers import read_answers, write_papers
from evaluation.exports.seismometer import write_seismometer
from evaluation.report import report_page
from evaluation.scoring import (
    AT_OBSERVATIONS,
    Past,
    doubts_about_times,
    past_of,
    scores_of,
    unseen,
    ward_scores_of,
    with_antibiotics,
)
from evaluation.silent_trial import past_of_log, trial
from evaluation.subgroups import named_groups, observed_groups
from feature_pipeline import BadConfig, Config, ProductionPipeline, describe_set_aside, listed, load_config

CONFIG, MODEL = "best_model_config.json", "best_model.pkl"
DEMO = "The data are the synthetic demo cohort (no real patients): its figures say nothing about real patients."
EXPORTS = ("seismometer", "papers")


def every(text: str) -> float | str:
    """``1h``, a number of hours, or ``observation``."""
    if text == AT_OBSERVATIONS:
        return text
    return number(float, 1 / 60, 24 * 365)(text.removesuffix("h"))


every.__name__ = "hours"


def folder_of(directory: Path, version: str | None) -> Path:
    """Where config and model lie: the deployed ones, or those of an archived version. Raises `BadConfig`."""
    if version is None:
        return directory
    folder = directory / "archive" / version
    if Path(version).name != version or not (folder / CONFIG).is_file():
        raise BadConfig(f"no version {version!r} in {directory / 'archive'}; train_best_model.py --list shows them")
    return folder


def score(folder: Path, past: Past, arguments: argparse.Namespace) -> tuple[Scored, dict[str, int]]:
    pipeline = ProductionPipeline(folder / CONFIG, folder / MODEL)
    with progress(None, len(past.visit), arguments.quiet, unit=" scores", unit_scale=True) as bar:
        return scores_of(pipeline, past, arguments.cooldown, lambda done: bar.update(done - bar.n))


def work(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    if not arguments.labels or (arguments.observations is None) == (arguments.from_log is None):
        raise BadConfig(
            "name --labels, and either --observations of patients that the model has not learned from, or --from-log"
        )
    if arguments.from_log is not None and (arguments.compare or arguments.groups or arguments.by or arguments.export):
        raise BadConfig("--from-log has no observations: it goes without --compare, --groups, --by and --export")
    if arguments.stop_rule and arguments.from_log is None:
        raise BadConfig("--stop-rule judges a silent trial: give --from-log too")
    if arguments.answers and "papers" not in arguments.export:
        raise BadConfig("--answers fills in papers: give --export papers too")
    directory, out = Path(arguments.models_dir), Path(arguments.out)
    folder = folder_of(directory, arguments.version)
    config, labels = load_config(folder / CONFIG), read_labels(arguments.labels)
    settings = Settings(arguments.cooldown, arguments.window, arguments.beds, arguments.alerts_a_day, arguments.seed)
    notices = [DEMO] if arguments.synthetic else []
    answers = read_answers(arguments.answers)
    if arguments.from_log is not None:
        record = from_log(arguments, config, labels, settings)
        past, scored, groups = None, None, {}
    else:
        record, past, scored, groups = from_observations(arguments, folder, config, labels, settings)
    out.mkdir(parents=True, exist_ok=True, mode=0o750)
    write_json(out / "evaluation.json", record)
    write_atomic(out / "evaluation.html", report_page(record, notices))
    if "papers" in arguments.export:
        opened = write_papers(out, config, record, answers)
        for name, (n_open, n_items) in opened.items():
            print(f"{name}: {n_items - n_open} of {n_items} items answered, {n_open} left to a person")
    if "seismometer" in arguments.export:
        write_seismometer(out / "seismometer", past, scored, config, groups, settings.window_hours)
    print(f"{out / 'evaluation.html'}")
    log.info("%.0f s", time.perf_counter() - start)
    return DONE


def from_log(arguments: argparse.Namespace, config: Config, labels: pd.DataFrame, settings: Settings) -> dict[str, Any]:
    rules = read_stop_rule(arguments.stop_rule) if arguments.stop_rule else []
    version = config.model_version or "unversioned"
    past, scored = past_of_log(arguments.from_log or None, version, labels, arguments.cooldown)
    record = evaluate(past, scored, config, settings)
    record["silent_trial"] = trial(scored, config, settings.window_hours, rules)
    for row in record["silent_trial"]["stop_rule"]:
        print(row["text"])
    return record


def from_observations(
    arguments: argparse.Namespace, folder: Path, config: Config, labels: pd.DataFrame, settings: Settings
) -> tuple[dict[str, Any], Past, Scored, dict[str, np.ndarray]]:
    other = folder_of(Path(arguments.models_dir), arguments.compare) if arguments.compare else None
    labels = unseen(labels, config, *([load_config(other / CONFIG)] if other else []))
    pipeline = ProductionPipeline(folder / CONFIG, folder / MODEL)
    observations = pipeline.reproducer.read(arguments.observations)
    if text := describe_set_aside(observations):
        log.info("%s", text)
    past = with_antibiotics(past_of(observations, labels, arguments.score_every), arguments.labels)
    if "seismometer" in arguments.export and not past.stays.dated:
        raise BadConfig(
            "--export seismometer needs onset times: without an event every visit would count as not septic"
        )
    log.info("%d visits, %d moments", len(past.stays.start), len(past.visit))
    scored, reasons = score(folder, past, arguments)
    groups = observed_groups(past.observations, past.place)
    if arguments.groups:
        groups |= named_groups(arguments.groups, past.keys)
    if arguments.by and arguments.by not in groups:
        raise BadConfig(f"--by {arguments.by!r}: no such group; known: {listed(groups, 12)}")
    record = evaluate(
        past, scored, config, settings, ward_scores_of(past), groups, lambda text: log.info("figures: %s", text)
    )
    record["data"] |= {"unknown_reasons": reasons, "unused_codes": pipeline.unused_codes(observations)}
    if remark := pipeline.missing_codes_remark(observations):
        record["cannot_be_said"].insert(0, f"Codes: {remark}.")
    record["cannot_be_said"] += doubts_about_times(past, arguments.observations, arguments.labels)
    if other:
        new = ProductionPipeline(other / CONFIG, other / MODEL)
        theirs = past_of(new.reproducer.read(arguments.observations), labels, arguments.score_every)
        # each reads in its own way; the moments are those of the deployed one
        place = {key: i for i, key in enumerate(theirs.observations.keys())}
        own = np.array([place[key] for key in past.keys], dtype=np.int64)
        same = Past(theirs.observations, past.stays, own, past.visit, past.time, past.keys)
        found = compare_versions(scored, score(other, same, arguments)[0], config, settings)
        versions = {"old_version": config.model_version or "unversioned", "new_version": arguments.compare}
        record["comparison"] = versions | found
    if arguments.by:
        parts = side_by_side(scored, config, groups, arguments.by, settings)
        record["side_by_side"] = {"column": arguments.by, "parts": parts}
    return record, past, scored, groups


def main(argv: Sequence[str] | None = None) -> int:
    example = "python evaluate_model.py --observations past.parquet --labels past_labels.parquet --out data/evaluation"
    parser = make_parser(__doc__, example, "labels", "models-dir", "seed")
    option = parser.add_argument
    option("--observations", help="past visits: .csv, .csv.gz or .parquet")
    option("--out", default="data/evaluation", metavar="DIR", help="folder for the page, the numbers and the exports")
    option("--version", help="evaluate this archived version instead of the deployed one")
    option(
        "--score-every",
        type=every,
        default="1h",
        metavar="HOURS",
        help="time between the scores of a visit, or 'observation': a score at each new one",
    )
    option(
        "--cooldown",
        type=number(float, 0, 10_000),
        default=COOLDOWN_HOURS,
        metavar="HOURS",
        help="time without a new alert of the same visit",
    )
    about = "an alert is right if onset follows within this time"
    option("--window", type=number(float, 0.1, 10_000), default=WINDOWS[-1], metavar="HOURS", help=about)
    option("--beds", type=number(int, 1, 100_000), default=20, help="number of beds of the ward, for its alerts a day")
    about = "how many alerts a day the ward can answer: shows the threshold for it"
    option("--alerts-a-day", type=number(float, 0.001, 1_000_000), metavar="N", help=about)
    option(
        "--groups",
        metavar="FILE",
        help="visit_id, client and any columns (ward, site, ethnicity): figures of each group",
    )
    option("--by", metavar="COLUMN", help="a column of --groups, or age, sex, unit: its values side by side")
    option(
        "--compare",
        metavar="VERSION",
        help="an archived version beside the deployed one, scored at the same times",
    )
    option(
        "--from-log",
        metavar="URL",
        nargs="?",
        const="",
        help="evaluate the scores in the prediction log (URL; SEPSIS_MONITOR_URL or the default log if not given)",
    )
    option("--stop-rule", metavar="FILE", help="with --from-log: stop_rule.toml, the bounds at which the trial stops")
    about = f"{' and/or '.join(EXPORTS)}: a folder for seismometer; source attributes, model card and TRIPOD+AI"
    option("--export", choices=EXPORTS, nargs="+", default=[], metavar="WHAT", help=about)
    option("--answers", metavar="FILE", help="with --export papers: TOML file with the items that people filled in")
    option("--synthetic", action="store_true", help="the patients are synthetic; the page says so")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
