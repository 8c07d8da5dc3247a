"""What all scripts share at the shell: options, logs, exit status."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from feature_pipeline import (
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    BadConfig,
    FeaturePipelineError,
    SiteCodes,
    as_text,
    check_synonyms,
    listed,
)

CODES_VARIABLE = "SEPSIS_CODES"  # names the file of --codes
DONE, SOME_FAILED, COULD_NOT_START = 0, 1, 2
INTERRUPTED, TERMINATED = 130, 143  # as shells have it: 128 + SIGINT, 128 + SIGTERM
log = logging.getLogger("sepsis")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the example."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "", []) else super()._get_help_string(action)


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """A type of option values: numbers from `low` to `high`."""

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            bounds = f"from {low} to {high}" if high < float("inf") else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return value

    read.__name__ = kind.__name__  # argparse shows it if the text is not a number
    return read


TABLES = (".csv", ".csv.gz", ".parquet")


def table_path(text: str) -> Path:
    """The value of an option that names a table; the suffix says the format."""
    if not text.endswith(TABLES):
        raise argparse.ArgumentTypeError(f"{text!r}: the name must end in {', '.join(TABLES)}")
    return Path(text)


def make_parser(description: str, example: str, *options: str) -> argparse.ArgumentParser:
    """A parser with the named shared options (without dashes) and those that every script has."""
    parser = argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=Formatter
    )
    shared: dict[str, dict[str, Any]] = {
        "observations": {"help": ".csv, .csv.gz or .parquet; the demo cohort if not given"},
        "labels": {"help": "visit_id, client, sepsis[, sepsis_onset]; .csv, .csv.gz or .parquet"},
        "models-dir": {"default": "models", "help": "folder with config, model and reports"},
        "config": {"default": DEFAULT_CONFIG, "help": "config of the deployed model"},
        "model": {"default": DEFAULT_MODEL, "help": "file of the deployed model"},
        "seed": {"type": number(int, 0), "default": 0, "help": "seed of splits, models and resampling"},
        "codes": {
            "metavar": "FILE",
            "help": f"CSV file code,concept[,unit]: the meaning of this site's codes; or {CODES_VARIABLE}",
        },
        "jobs": {"type": number(int, 1), "default": available_cores(), "help": "number of processes"},
    }
    for name in options:
        parser.add_argument(f"--{name}", **{"help": " ", **shared[name]})
    add_log_options(parser)
    return parser


def add_log_options(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """The options of every script. Commands pass ``default=argparse.SUPPRESS``, so that the options may come
    before the command or after it."""
    parser.add_argument("--quiet", action="store_true", help="log only warnings and errors", **settings)
    about = "format of the log on stderr (default: text)" if settings else "format of the log on stderr"
    parser.add_argument("--log-format", choices=("text", "json"), help=about, **{"default": "text", **settings})
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error", **settings)


def add_command(
    commands: Any, name: str, about: str, example: str, work: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """The parser of one command of a script; `run_command` calls its `work`."""
    command = commands.add_parser(
        name,
        help=about.partition("\n")[0],
        description=about,
        epilog=f"example:\n  {example}",
        formatter_class=Formatter,
    )
    command.set_defaults(work=work)
    add_log_options(command, default=argparse.SUPPRESS)
    return command


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """`run` with the work of the command that was chosen."""
    return run(lambda arguments: arguments.work(arguments), parser, argv)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, message."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, "level": record.levelname.lower(), "message": record.getMessage()})


def spare_the_loaded() -> None:
    """Excludes everything that is loaded by now from garbage collection, for a process that answers requests.

    A full collection over the objects of all libraries takes a tenth of a second, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()


def start_logging(arguments: argparse.Namespace) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if arguments.log_format == "json" else logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.WARNING if arguments.quiet else logging.INFO)
    log.propagate = False
    warnings.showwarning = lambda message, *_, **__: log.warning("warning: %s", message)


@contextlib.contextmanager
def nothing_for_others() -> Iterator[None]:
    """Within this context, files and folders are made for the owner and the group only, by whatever library: 0640 and
    0750 with the usual umask. A stricter umask stays."""
    before = os.umask(0o077)  # the only way to read it is to set it
    os.umask(before | 0o007)
    try:
        yield
    finally:
        os.umask(before)


class Terminated(KeyboardInterrupt):
    """SIGTERM. It ends work as Ctrl-C does: worker processes end, and temporary files are deleted."""


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within this context, SIGTERM raises `Terminated`, in this process only. A handler that was set before stays."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() == own:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked child ends as usual
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(work: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parses the options, runs `work`, and turns the project's errors into one line and an exit status."""
    arguments = parser.parse_args(argv)
    start_logging(arguments)
    try:
        with nothing_for_others(), ended_by_sigterm():
            return work(arguments)
    except (FeaturePipelineError, OSError) as error:
        if arguments.debug:
            raise
        log.error("error: %s", error)
        return COULD_NOT_START
    except BrokenProcessPool:
        if arguments.debug:
            raise
        go_on = getattr(arguments, "go_on", "")
        log.error(
            "error: the system ended a worker process, probably because memory was full: try fewer --jobs%s", go_on
        )
        return COULD_NOT_START
    except KeyboardInterrupt as stop:
        log.error("interrupted; finished work is kept%s", getattr(arguments, "go_on", ""))
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def run_every(seconds: float, work: Callable[[], Any], stop: threading.Event) -> None:
    """Runs `work` every so many seconds until `stop`, also after an error."""
    while not stop.is_set():
        try:
            work()
        except (FeaturePipelineError, OSError) as error:
            log.error("error: %s; next try in %g s", error, seconds)
        stop.wait(seconds)


def progress(items: Iterable[Any], total: int, quiet: bool, **settings: Any) -> tqdm:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(items, total=total, disable=quiet or not sys.stderr.isatty(), file=sys.stderr, **settings)


def read_synonyms(path: str | None) -> dict[str, str]:
    """What codes mean in training: the columns ``code,concept`` of a CSV file as a mapping; rows without a concept are
    left out. Raises `BadConfig`."""
    if path is None:
        return {}
    table = _read_codes(path, "synonyms")
    synonyms = dict(zip(table["code"], table["concept"], strict=True))
    check_synonyms(synonyms, f"synonyms {path!r}")
    return synonyms


def read_site_codes(path: str | None) -> SiteCodes:
    """A site's map of codes: the columns ``code,concept`` and, optional, ``unit`` of the CSV file at `path`, else at
    the path in the environment variable SEPSIS_CODES; nothing where neither is given. Raises `BadConfig`."""
    path = path or os.environ.get(CODES_VARIABLE)
    if not path:
        return {}
    table = _read_codes(path, "codes")
    unit = table["unit"] if "unit" in table else [""] * len(table)
    return {code: (concept, u) for code, concept, u in zip(table["code"], table["concept"], unit, strict=True)}


def _read_codes(path: str, what: str) -> Any:
    """The rows of a CSV file that name a concept, as a frame of texts."""
    import pandas as pd

    try:
        table = pd.read_csv(Path(path), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadConfig(f"{what} {path!r} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if missing := {"code", "concept"} - set(table.columns):
        raise BadConfig(f"{what} {path!r}: missing column {listed(sorted(missing))}; expected code,concept")
    table = table.map(as_text)
    table = table[(table["code"] != "") & (table["concept"] != "")]
    if twice := sorted(table["code"][table["code"].duplicated()].unique()):
        raise BadConfig(f"{what} {path!r}: these codes stand twice: {listed(twice)}")
    return table


def post_json(url: str, payload: Any, timeout: float = 10.0) -> None:
    """POSTs JSON to a webhook, at most twice. Raises `OSError` with one line that does not show the URL."""
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, json.dumps(payload).encode(), {"Content-Type": "application/json"})
    for last in (False, True):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                answer.read()
                return
        except urllib.error.HTTPError as error:
            if last or error.code < 500:
                raise OSError(f"the webhook answered {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            if last:
                raise OSError(f"the webhook cannot be reached ({type(error).__name__})") from None
