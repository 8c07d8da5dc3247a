"""Scores pending visits of a database: several predictors on several hosts share the work, none doubles or loses any.

Tables (another hospital's names can be mapped, see `read_mapping`):

==========================  ==========================================================================================
``patient_observations``    ``visit_id, client, observation_date, observation_type_code, observation_value,
                            reference_range_min, reference_range_max, unit``; filled by the hospital
``visits``                  ``visit_id, client, sepsis_score, risk_level, scored_at``; the hospital adds visits, this
                            script fills the other three. A visit without ``sepsis_score`` is pending. A visit without
                            enough evidence gets the level UNKNOWN and no score: it is pending again when new
                            observations come, or another model, or its ``risk_level`` is emptied
``sepsis_predictions``      ``visit_id, client, sepsis_score, risk_level, model_version, scored_at, observations,
                            newest_observation, reason, as_of, hours_since_newest``: every result, with the number of
                            observation rows that it was made from and the date of the newest row as the database
                            writes it. A later result by the same model from as many rows replaces the earlier one
==========================  ==========================================================================================

A batch of visits is one transaction: claim (``FOR UPDATE SKIP LOCKED`` where the database has it), read, score,
insert, update, commit. A predictor killed at any moment leaves nothing half-done: its transaction is undone by the
database, and its visits are pending again. All times are UTC.

    predictor = DatabasePredictor(db_url, "models/best_model_config.json", "models/best_model.pkl")
    result = predictor.process_pending_visits()
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence

from common.command_line import (
    COULD_NOT_START,
    DONE,
    SOME_FAILED,
    log,
    make_parser,
    number,
    progress,
    read_site_codes,
    run,
)
from feature_pipeline import SET_ASIDE_REASONS, BadConfig
from monitoring.log import url_of
from serving.db.connection import DEFAULT_URL, URL_VARIABLE, BatchUndone, connect, safe_url
from serving.db.predictor import BATCH_SIZE, MOST_VISITS, NOW, DatabasePredictor, RunResult
from serving.db.tables import make_tables, read_mapping

# ---------------------------------------------------------------------------------------------- the script


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "Scores the pending visits of a database, or the encounters in progress of a FHIR server.",
        f"python db_predictor.py --init-db\n  {URL_VARIABLE}=postgresql+psycopg://scorer:...@db.ward.example/sepsis "
        "python db_predictor.py --watch 60",
        "config",
        "model",
        "codes",
    )
    parser.add_argument("--db-url", help=f"URL of the database; if not given, {URL_VARIABLE}, otherwise {DEFAULT_URL}")
    parser.add_argument("--tables", metavar="FILE", help="JSON file with other names of tables and columns")
    parser.add_argument("--fhir", metavar="FILE", help="TOML file of a FHIR server whose encounters are scored")
    parser.add_argument("--init-db", action="store_true", help="make the tables, or bring them up to date, and exit")
    parser.add_argument(
        "--batch-size", type=number(int, 1, MOST_VISITS), default=BATCH_SIZE, help="number of visits in a transaction"
    )
    parser.add_argument(
        "--rescore", action="store_true", help="also score visits with new observations since their score"
    )
    parser.add_argument(
        "--watch",
        type=number(float, 1),
        metavar="SECONDS",
        help="repeat at this interval, until stopped",
    )
    parser.add_argument(
        "--as-of",
        metavar="MOMENT",
        default=NOW,
        help="moment to score: 'now', 'last' (each visit's last observation), or an ISO 8601 time",
    )
    parser.add_argument("--dry-run", action="store_true", help="compute the scores, but write nothing")
    parser.add_argument("--monitor", metavar="URL", help="URL of the prediction log, or 'off'; or SEPSIS_MONITOR_URL")
    return parser


def _work_on_fhir(arguments: argparse.Namespace) -> int:
    names = ("db_url", "tables", "init_db", "rescore")
    if unused := [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]:
        raise BadConfig(f"--fhir goes without {', '.join(unused)}: they are for a database")
    try:
        from serving.fhir_feed.feed import FhirFeed
        from serving.fhir_feed.server import FhirError, ServerSettings
    except ModuleNotFoundError as error:
        raise BadConfig(f"--fhir needs {error.name}; pip install -r requirements-fhir.txt") from None
    feed = FhirFeed(
        ServerSettings.read(arguments.fhir),
        arguments.config,
        arguments.model,
        codes=read_site_codes(arguments.codes),
        as_of=arguments.as_of,
        monitor=url_of(arguments.monitor),
    )
    told = (lambda result: None) if arguments.quiet else (lambda result: print(result, flush=True))
    try:
        if arguments.watch is not None:
            feed.watch(arguments.watch, threading.Event(), told)
            return DONE
        result = feed.run(arguments.dry_run)
        told(result)
        return SOME_FAILED if result.failed else DONE
    except FhirError as error:
        log.error("error: %s; the next run does the rest", error)
        return SOME_FAILED
    finally:
        feed.close()


def _work(arguments: argparse.Namespace) -> int:
    if arguments.dry_run and arguments.watch is not None:
        log.error("error: --dry-run and --watch do not go together")
        return COULD_NOT_START
    if arguments.fhir:
        return _work_on_fhir(arguments)
    url = arguments.db_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    mapping = read_mapping(arguments.tables)
    if arguments.init_db:
        engine = connect(url)
        make_tables(engine, mapping)
        print(f"tables are ready in {safe_url(engine.url)}")
        engine.dispose()
        return DONE
    predictor = DatabasePredictor(
        url,
        arguments.config,
        arguments.model,
        tables=mapping,
        batch_size=arguments.batch_size,
        as_of=arguments.as_of,
        codes=read_site_codes(arguments.codes),
        monitor=url_of(arguments.monitor),
    )

    def told(result: RunResult) -> None:
        if not arguments.quiet:
            print(result, flush=True)
        if result.set_aside:
            log.info(
                "set aside: %s", "; ".join(f"{n:,} rows: {SET_ASIDE_REASONS[r]}" for r, n in result.set_aside.items())
            )

    try:
        if arguments.watch is not None:
            predictor.watch(arguments.watch, threading.Event(), arguments.rescore, told)
            return DONE
        with progress([], predictor.count_pending(), arguments.quiet, unit=" visits") as bar:
            result = predictor.process_pending_visits(arguments.rescore, arguments.dry_run, bar.update)
        told(result)
        return DONE
    except BatchUndone as error:
        log.error("error: %s", error)
        return SOME_FAILED
    finally:
        predictor.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    parser.set_defaults(go_on="; the next run does the rest")
    return run(_work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
