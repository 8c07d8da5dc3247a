"""Monitors a deployed model through the log of its predictions: drift, missing codes, volume, latency, errors, quality.

``report`` writes a page. ``check`` prints one line for each warning and exits with status 1 if there is one, for cron.
``export`` writes the rows of the log. ``prune`` deletes old rows.

Drift compares the last days with training, or with the first days of the log (--baseline-days). A warning is given only
for changes that are both large and statistically significant. Drift and quality are judged for the deployed version;
volume, latency and errors for all versions together, because a promotion changes none of them.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import sqlalchemy as sa

from common.artifacts import write_atomic, write_tables
from common.command_line import DONE, SOME_FAILED, add_log_options, log, make_parser, number, post_json, run, table_path
from common.labels import read_labels
from common.pseudonyms import Pseudonyms, lasting_pseudonyms
from common.trial import judge, live_scores, read_stop_rule
from feature_pipeline import DEFAULT_CONFIG, BadConfig, BadObservations, Config, load_config
from monitoring.findings import Findings, read_rows
from monitoring.log import DEFAULT_URL, OFF, URL_VARIABLE, cards, errors, open_engine, predictions, url_of
from monitoring.look import look
from monitoring.quality import read_outcomes
from monitoring.report import report_html

MOST_DAYS = 36_500
PRUNED_AT_ONCE, PRUNE_PAUSE = 10_000, 0.02  # rows; seconds between


def moment(text: str) -> datetime:
    """ISO 8601 as a naive UTC time, far enough from the calendar's ends to count days from."""
    found = datetime.fromisoformat(text)
    if not 1970 <= found.year <= 9000:
        raise argparse.ArgumentTypeError(f"{text} is not in the years 1970 to 9000")
    return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found


def web_address(text: str) -> str:
    """An http URL; the error does not quote it, since such a URL often holds a secret."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # asking for it checks it
    except ValueError:
        good = False
    if not good or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError("expected http://host/... or https://host/...")
    return text


def work(arguments: argparse.Namespace) -> int:
    url = url_of(arguments.monitor)
    if url == OFF:
        raise BadConfig(f"there is no prediction log to read: --monitor or {URL_VARIABLE} is {OFF!r}")
    try:
        address = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # which may quote the password
        raise BadConfig(
            "the URL of the prediction log cannot be read; expected sqlite:///file.db or "
            "dialect+driver://user:password@host:port/name with special characters of the password as %40 and the like"
        ) from None
    if address.get_backend_name() == "sqlite" and not Path(address.database or "").is_file():
        raise BadConfig(f"there is no prediction log to read: no file {address.database!r}; see --monitor")
    engine = None
    try:
        engine = open_engine(address)
        return COMMANDS[arguments.command](engine, arguments)
    except (sa.exc.SQLAlchemyError, sqlite3.Error, pd.errors.DatabaseError, ImportError) as error:
        raise BadConfig(_in_words(error, address)) from None
    finally:
        if engine is not None:
            engine.dispose()


def _in_words(error: Exception, address: sa.URL) -> str:
    """What a database's error means, in one line that quotes neither password nor data."""
    what = f"the prediction log ({address.drivername})"
    if isinstance(error, ImportError | sa.exc.NoSuchModuleError):
        return f"{what} needs a driver that is not installed; see requirements-database.txt"
    if isinstance(error, pd.errors.DatabaseError):
        error = error.__cause__ or error
    original = getattr(error, "orig", None) or error
    if address.get_backend_name() == "sqlite":
        return f"{what} cannot be used: {address.database}: {original}"
    return (
        f"{what} cannot be used: {type(original).__name__}; check that the server runs, and name, password and rights"
    )


def _findings(engine: sa.Engine, arguments: argparse.Namespace) -> tuple[Findings, dict[str, Any], datetime]:
    config = load_config(arguments.config)
    until = arguments.until or datetime.now(UTC).replace(tzinfo=None)
    labels = read_outcomes(arguments.labels) if arguments.labels else None
    options = (arguments.days, arguments.baseline_days, labels, arguments.max_seconds)
    findings = look(engine, config, until, *options)
    if arguments.stop_rule:
        look_at_stop_rule(findings, engine, arguments, config, until)
    return findings, config, until


def look_at_stop_rule(findings: Findings, engine: sa.Engine, arguments: Any, config: Config, until: datetime):
    """A warning for each figure beyond its bound; a remark for each rule that holds or cannot be judged yet."""
    if not arguments.labels:
        raise BadConfig("--stop-rule needs the outcomes of the visits: --labels")
    rules = read_stop_rule(arguments.stop_rule)
    rows = read_rows(engine, None, until, config.model_version or "unversioned")
    try:
        scored, _ = live_scores(rows, read_labels(arguments.labels), lasting_pseudonyms())
    except BadObservations as error:
        findings.remarks.append(f"the stop rule is not judged: {error}")
        return
    for row in judge(rules, scored, config):
        kind = findings.warnings if row["state"] == "stop" else findings.remarks
        kind.append(f"stop rule: {row['text']}")


def report(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    findings, config, until = _findings(engine, arguments)
    write_atomic(arguments.html, report_html(findings, config, until, arguments.days))
    for line in findings.warnings:
        print(line)
    log.info("written: %s", arguments.html)
    return DONE


def check(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    findings, config, until = _findings(engine, arguments)
    for line in findings.warnings:
        print(line)
    for line in findings.remarks:
        log.info("%s", line)
    if findings.warnings and arguments.webhook:
        told = {"model_version": config.model_version, "until": until.isoformat(), "warnings": findings.warnings}
        try:
            post_json(arguments.webhook, told)
        except OSError as error:
            log.error("error: %s", error)
    return SOME_FAILED if findings.warnings else DONE


def export(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    until = arguments.until or datetime.now(UTC).replace(tzinfo=None)
    rows = read_rows(engine, until - timedelta(days=arguments.days), until, None)
    if arguments.pseudonymize:
        rows = detached(rows, Pseudonyms.from_environment())
    if arguments.out:
        write_tables({arguments.out: rows})
    else:
        rows.to_csv(sys.stdout, index=False)
    log.info("%d rows", len(rows))
    return DONE


def detached(rows: pd.DataFrame, pseudonyms: Pseudonyms) -> pd.DataFrame:
    """Rows that cannot be joined to the log or to a calendar: other hashes of visits, and times shifted by a number of
    days for each visit. (The log does not hold clients.)"""
    days = [pseudonyms.shift_days(visit) for visit in rows["visit"]]
    shift = pd.to_timedelta(pd.Series(days, index=rows.index, dtype="int64"), unit="D")
    out = rows.assign(visit=[f"v{pseudonyms.visit('export', visit)}" for visit in rows["visit"]])
    times = {name: rows[name] - shift for name in ("time", "as_of", "newest")}
    return out.assign(**times).sort_values("visit").drop(columns="id")


def _delete(engine: sa.Engine, table: sa.Table, old: sa.ColumnElement[bool]) -> int:
    """Deletes rows in steps, so that nobody who writes to the log waits long; returns their number."""
    gone = 0
    while True:
        some = sa.select(table.c.id).where(old).order_by(table.c.id).limit(PRUNED_AT_ONCE).subquery()
        with engine.begin() as connection:
            last = connection.scalar(sa.select(sa.func.max(some.c.id)))
            if last is None:
                return gone
            gone += connection.execute(table.delete().where(old, table.c.id <= last)).rowcount
        time.sleep(PRUNE_PAUSE)  # SQLite's lock goes to whoever asks first


def prune(engine: sa.Engine, arguments: argparse.Namespace) -> int:
    horizon = (arguments.until or datetime.now(UTC).replace(tzinfo=None)) - timedelta(days=arguments.older_than)
    gone = {table.name: _delete(engine, table, table.c.time <= horizon) for table in (predictions, errors, cards)}
    told = {"predictions_deleted": gone["predictions"], "errors_deleted": gone["prediction_errors"]}
    print(json.dumps({**told, "cards_deleted": gone["cards"]}))
    return DONE


COMMANDS = {"report": report, "check": check, "export": export, "prune": prune}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python monitor.py check --days 1")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "report": ("write a page", "--labels outcomes.csv --html report.html"),
        "check": (
            "print warnings; exit status 1 if there is one",
            "--days 1 --webhook https://hooks.example.org/sepsis",
        ),
        "export": ("write the rows of the log", "--days 30 --out rows.parquet"),
        "prune": ("delete old rows", "--older-than 365"),
    }
    for name, (text, example) in helps.items():
        end = f"example:\n  python monitor.py {name} {example}"
        style = parser.formatter_class
        command = commands.add_parser(name, help=text, description=text, epilog=end, formatter_class=style)
        option = command.add_argument
        option(
            "--monitor",
            metavar="URL",
            help=f"URL of the log; if not given, {URL_VARIABLE}, else {DEFAULT_URL}",
        )
        option("--until", type=moment, metavar="TIME", help="end of the period, ISO 8601 UTC; now if not given")
        if name in ("report", "check"):
            option("--config", default=DEFAULT_CONFIG, help="config of the deployed model")
            option(
                "--labels",
                metavar="FILE",
                help="outcomes (visit_id, client, sepsis[, sepsis_onset]), for the quality by week",
            )
            about = "stop_rule.toml: bounds at which the trial stops; needs --labels"
            option("--stop-rule", metavar="FILE", help=about)
            about = "compare with the first DAYS days of the log; 0: with training"
            option("--baseline-days", type=number(int, 0, MOST_DAYS), default=0, metavar="DAYS", help=about)
            about = "warn if the p95 latency is longer"
            option("--max-seconds", type=number(float, 0), default=1.0, metavar="SECONDS", help=about)
        if name == "prune":
            about = "delete rows that are older"
            option("--older-than", type=number(int, 0, MOST_DAYS), required=True, metavar="DAYS", help=about)
        else:
            option("--days", type=number(int, 1, MOST_DAYS), default=7, help="length of the period, in days")
        if name == "report":
            option("--html", default="data/monitoring_report.html", metavar="FILE", help="where the page is written")
        if name == "check":
            option("--webhook", type=web_address, metavar="URL", help="POST the warnings there as JSON")
        if name == "export":
            option("--out", type=table_path, metavar="FILE", help=".csv, .csv.gz or .parquet; stdout if not given")
            option(
                "--pseudonymize",
                action="store_true",
                help="for other people: new hashes, times shifted by visit",
            )
        add_log_options(command, default=argparse.SUPPRESS)
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
