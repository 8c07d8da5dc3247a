"""One model in all four patterns, HTTP, files, database and stream, with the same scores.

    python examples/production_system.py

Trains a small model on the synthetic demo cohort if there is none in --models-dir, starts the service under gunicorn,
drops a file for the batch processor, fills a database (SQLite, or --db-url), streams observations (through a pipe, or
--kafka), raises alerts, writes the monitor's report, compares the scores of the four patterns bit by bit, and stops
cleanly. Scores are for each visit's last observation, since the stays are past. Each run replaces the files of the
earlier one in --work-dir. No real patient is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import sqlalchemy as sa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.command_line import DONE, SOME_FAILED, make_parser, number, run
from feature_pipeline import BadConfig, FeaturePipelineError
from serving.db.connection import connect
from serving.db.tables import make_tables
from sources.demo_cohort import make_demo_cohort

Scores = dict[tuple[str, str], float]  # (client, visit_id) -> probability
PATIENCE = 120
MARK = ".production_system"  # stands in a folder whose files are this example's


def make_empty(folder: Path, keep: Path) -> None:
    """Makes the folder, or takes out what an earlier run left, but for `keep`. Raises `BadConfig` where it holds
    something else."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(folder.iterdir())
    if found and not (folder / MARK).exists():
        raise BadConfig(f"--work-dir {str(folder)!r} holds other files than this example's; name a new or an empty one")
    (folder / MARK).touch()
    for path in found:
        if path.name != MARK and not keep.is_relative_to(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class System:
    """Where the parts of one run lie, and the environment that they share."""

    def __init__(self, arguments: argparse.Namespace):
        self.work = Path(arguments.work_dir).resolve()
        models = Path(arguments.models_dir).resolve()
        make_empty(self.work, keep=models)
        self.models, self.config, self.model = models, models / "best_model_config.json", models / "best_model.pkl"
        self.monitor = f"sqlite:///{self.work}/predictions.db"
        self.environment = {
            **os.environ,
            "SEPSIS_INSECURE": "1",  # on loopback
            "SEPSIS_CONFIG": str(self.config),
            "SEPSIS_MODEL": str(self.model),
            "SEPSIS_MONITOR_URL": self.monitor,
            "SEPSIS_AUDIT_LOG": str(self.work / "audit.jsonl"),
            "SEPSIS_ACCESS_LOG": str(self.work / "access.jsonl"),
            # the same pseudonyms in every part; a deployment keeps its key in a secret store
            "SEPSIS_PSEUDONYM_KEY": os.environ.get("SEPSIS_PSEUDONYM_KEY") or secrets.token_urlsafe(32),
        }

    def script(self, name: str, *options: object, stdin: str | None = None) -> str:
        """Runs one of the project's scripts; gives its output. Raises `FeaturePipelineError` where it fails."""
        command = [sys.executable, str(ROOT / name), *map(str, options)]
        done = subprocess.run(command, env=self.environment, input=stdin, capture_output=True, text=True, cwd=self.work)
        if done.returncode not in (0, 1):
            raise FeaturePipelineError(f"{name} fails: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout

    @property
    def deployment(self) -> tuple[str, ...]:
        return "--config", str(self.config), "--model", str(self.model)


def train(system: System) -> str:
    if system.model.exists():
        return f"model taken from {os.path.relpath(system.models)}"
    quick = ["--feature-sets", "clinical,windows", "--models", "lightgbm_shallow", "--finalists", "1"]
    system.script("generate_features.py", "--models-dir", system.models, *quick, "--risk-thresholds", "0.05,0.2")
    system.script("train_best_model.py", "--models-dir", system.models, "--full")
    return "model trained on the demo cohort"


def new_patients(n: int) -> pd.DataFrame:
    observations, _ = make_demo_cohort(n_patients=n, seed=2024)
    dated = observations["observation_date"].dt.strftime("%Y-%m-%dT%H:%M:%S")
    usable = observations.assign(observation_date=dated, visit_id=observations["visit_id"].astype(str))
    return usable[usable["observation_value"].notna()].reset_index(drop=True)


# -------------------------------------------------------------------------------------------- the four patterns


@contextlib.contextmanager
def service(system: System) -> Iterator[int]:
    """gunicorn on a free port of loopback; gives the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", f"127.0.0.1:{port}", "api_server:app"]
    with (system.work / "gunicorn.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=system.environment, stderr=log)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as answer:
                if answer.status == 200:
                    break
            if time.monotonic() > end or process.poll() is not None:
                raise FeaturePipelineError(f"the service does not start; see {system.work / 'gunicorn.log'}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()  # workers finish what they have in hand
        process.wait(PATIENCE)


def over_http(port: int, rows: pd.DataFrame) -> Scores:
    body = rows.astype(object).where(rows.notna(), None).to_json(orient="records", double_precision=15).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict?as_of=last&explain=3", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        predictions = json.load(answer)["predictions"]
    return {(p["client"], p["visit_id"]): p["sepsis_probability"] for p in predictions}


def by_files(system: System, rows: pd.DataFrame) -> Scores:
    incoming, out = system.work / "incoming", system.work / "predictions"
    incoming.mkdir(exist_ok=True)
    rows.to_csv(incoming / "ward.csv", index=False)
    options = ["--input-dir", incoming, "--output-dir", out, "--settle-seconds", 0]
    system.script("batch_processor.py", *system.deployment, *options)
    scored = pd.read_csv(out / "predictions_ward.csv", dtype={"visit_id": str, "client": str}, float_precision=None)
    exact = pd.read_csv(out / "predictions_ward.csv", dtype=str)["sepsis_probability"].map(float)
    return dict(zip(zip(scored["client"], scored["visit_id"], strict=True), exact, strict=True))


def from_database(system: System, rows: pd.DataFrame, url: str | None) -> Scores:
    url = url or f"sqlite:///{system.work}/hospital.db"
    engine = connect(url)
    make_tables(engine)
    dated = rows.assign(observation_date=pd.to_datetime(rows["observation_date"]))
    visits = rows[["visit_id", "client"]].drop_duplicates()
    with engine.begin() as connection:
        if connection.execute(sa.text("select count(*) from visits")).scalar_one():
            raise BadConfig("the tables of --db-url hold visits; name a database without")
        for table, frame in (("visits", visits), ("patient_observations", dated)):
            target = sa.Table(table, sa.MetaData(), autoload_with=connection)
            records = frame.astype(object).where(frame.notna(), None).to_dict("records")
            connection.execute(target.insert(), records)
    system.environment["SEPSIS_DB_URL"] = str(engine.url.render_as_string(hide_password=False))
    system.script("db_predictor.py", *system.deployment, "--as-of", "last")
    with engine.connect() as connection:
        scored = sa.Table("visits", sa.MetaData(), autoload_with=connection).c
        query = sa.select(scored.client, scored.visit_id, scored.sepsis_score)
        found = {(str(c), str(v)): p for c, v, p in connection.execute(query)}
    engine.dispose()
    return {key: found[key] for key in zip(visits["client"], visits["visit_id"], strict=True)}


def from_stream(system: System, rows: pd.DataFrame, brokers: str | None) -> tuple[Scores, list[dict[str, object]]]:
    """The last score of each visit, and the alerts."""
    mixed = rows.sort_values("observation_date", kind="stable")
    lines = mixed.astype(object).where(mixed.notna(), None).to_json(orient="records", lines=True, double_precision=15)
    if brokers:
        results, alerts = through_kafka(system, lines.splitlines(), brokers, rows)
    else:
        path = system.work / "alerts.jsonl"
        options = ["--as-of", "last", "--min-observations", 1, "--alerts", path]
        shown = system.script("stream_processor.py", *system.deployment, *options, stdin=lines)
        results = [json.loads(line) for line in shown.splitlines()]
        alerts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(r["client"], r["visit_id"]): r["sepsis_probability"] for r in results}, alerts


def through_kafka(system: System, lines: list[str], brokers: str, rows: pd.DataFrame):
    """Results and alerts of a consumer on topics of their own."""
    from confluent_kafka import Consumer, Producer

    name = uuid.uuid4().hex[:8]
    topics = [f"{kind}-{name}" for kind in ("observations", "predictions", "alerts")]
    producer = Producer({"bootstrap.servers": brokers})
    for line in lines:
        row = json.loads(line)
        producer.produce(topics[0], line, f"{row['client']}|{row['visit_id']}")
    producer.flush(PATIENCE)
    command = [sys.executable, str(ROOT / "stream_processor.py"), "--kafka", brokers, "--group", name]
    command += ["--topic", topics[0], "--out", topics[1], "--alerts-topic", topics[2]]
    command += ["--as-of", "last", "--min-observations", "1"]
    with (system.work / "stream.log").open("w") as log:
        process = subprocess.Popen([*command, *system.deployment], env=system.environment, stderr=log)
    settings = {"bootstrap.servers": brokers, "group.id": f"{name}-reader", "auto.offset.reset": "earliest"}
    reader, found, end = Consumer(settings), {topic: [] for topic in topics}, time.monotonic() + PATIENCE
    reader.subscribe(topics[1:])
    counts = rows.groupby(["client", "visit_id"]).size()
    missing = set(counts.index)
    while missing and time.monotonic() < end:
        for message in reader.consume(1000, 0.2):
            if message.error() is None:
                found[message.topic()].append(json.loads(message.value()))
        last = {(r["client"], r["visit_id"]): r for r in found[topics[1]]}
        # repeated rows count once, so the number of observations is the most that may come
        missing = {key for key in counts.index if key not in last}
    process.terminate()
    process.wait(PATIENCE)
    for message in reader.consume(10_000, 3):
        if message.error() is None:
            found[message.topic()].append(json.loads(message.value()))
    reader.close()
    return found[topics[1]], found[topics[2]]


# ------------------------------------------------------------------------------------------------- the account


def production_system(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    system = System(arguments)
    print(train(system))
    rows = new_patients(arguments.patients)
    print(f"{len(rows):,} observations of {rows['visit_id'].nunique()} new synthetic visits")
    ways: dict[str, Scores] = {}
    with service(system) as port:
        ways["api"] = over_http(port, rows)
    ways["batch"] = by_files(system, rows)
    ways["database"] = from_database(system, rows, arguments.db_url)
    ways["stream"], alerts = from_stream(system, rows, arguments.kafka)
    same = all(scores == ways["api"] for scores in ways.values())
    for name, scores in ways.items():
        print(f"  {name:<9s} {len(scores)} visits, highest probability {max(scores.values()):.4f}")
    print("the four patterns give the same scores, to the last bit" if same else "THE SCORES DIFFER")
    highest = max(alerts, key=lambda alert: alert["sepsis_probability"], default=None)
    print(f"{len(alerts)} alerts" + (f", the worst: visit rose to {highest['risk_level']} risk" if highest else ""))
    page = system.work / "monitoring_report.html"
    system.script("monitor.py", "report", "--config", system.config, "--html", page)
    engine = sa.create_engine(system.monitor)
    with engine.connect() as connection:
        counted = connection.execute(sa.text("select source, count(*) from predictions group by source")).all()
    engine.dispose()
    print("prediction log: " + ", ".join(f"{n} from {source}" for source, n in sorted(counted)))
    print(f"report: {os.path.relpath(page)}")
    print(f"done in {time.perf_counter() - start:.0f} s")
    return DONE if same else SOME_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python examples/production_system.py", "models-dir")
    parser.add_argument(
        "--work-dir",
        default="data/production_system",
        help="for all files; replaces those of an earlier run",
    )
    parser.add_argument("--patients", type=number(int, 1), default=40, help="number of new synthetic patients")
    parser.add_argument(
        "--db-url", help="a database without visits instead of SQLite, such as postgresql+psycopg://..."
    )
    parser.add_argument("--kafka", metavar="BROKERS", help="stream through Kafka instead of a pipe")
    return run(production_system, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
