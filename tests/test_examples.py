"""The examples run as they stand."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from confluent_kafka import Producer

from common.pseudonyms import Pseudonyms
from examples import production_system
from feature_pipeline import BadConfig
from serving.db.connection import connect
from serving.db.tables import make_tables

ROOT = Path(__file__).resolve().parents[1]


def run_example(name, *options, cwd=None):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def told(done):
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same scores, to the last bit" in done.stdout
    for source in ("api", "batch", "database", "stream"):
        assert f"from {source}" in done.stdout
    return done.stdout


def test_the_whole_system_runs_again_in_the_same_folder(models_dir, tmp_path):
    options = ["--models-dir", models_dir, "--work-dir", tmp_path]
    first = told(run_example("production_system.py", *options)).splitlines()
    again = told(run_example("production_system.py", *options)).splitlines()
    assert " alerts" in first[7] and first[9].startswith("report: ") and "monitoring_report.html" in first[9]
    assert first[:7] == again[:7]  # how many scores the stream gives is a matter of speed
    audit = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(audit) == 1 and audit[0]["outcome"] == "scored"


def test_the_whole_system_touches_no_other_files(tmp_path, capsys):
    (tmp_path / "predictions.db").write_text("the hospital's own")
    assert production_system.main(["--work-dir", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the hospital's own"]


def test_the_whole_system_keeps_the_models_in_its_folder(tmp_path):
    models = tmp_path / "work" / "models"
    for _ in range(2):
        production_system.make_empty(tmp_path / "work", keep=models)
        models.mkdir(exist_ok=True)
        (models / "best_model.pkl").touch()
        (tmp_path / "work" / "hospital.db").touch()
    production_system.make_empty(tmp_path / "work", keep=models)
    assert (models / "best_model.pkl").exists() and not (tmp_path / "work" / "hospital.db").exists()


def test_the_whole_system_wants_a_database_without_visits(models_dir, tmp_path):
    url = f"sqlite:///{tmp_path}/filled.db"
    engine = connect(url)
    make_tables(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("insert into visits (visit_id, client) values ('1', 'a')"))
    engine.dispose()
    system = production_system.System(argparse.Namespace(work_dir=tmp_path / "work", models_dir=models_dir))
    with pytest.raises(BadConfig, match="hold visits"):
        production_system.from_database(system, production_system.new_patients(1), url)


@pytest.mark.slow
def test_the_whole_system_trains_a_model_and_streams_through_kafka(tmp_path):
    cluster = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1})
    brokers = ",".join(f"{b.host}:{b.port}" for b in cluster.list_topics(timeout=10).brokers.values())
    options = ["--models-dir", tmp_path / "models", "--work-dir", tmp_path / "work", "--kafka", brokers]
    done = run_example("production_system.py", *options, "--patients", 20)
    assert "model trained on the demo cohort" in told(done)


CRONTAB = [
    line for line in (ROOT / "examples/deployment/crontab").read_text().splitlines() if line and line[0] not in "#"
]
SHELLS = [shell for shell in ("/bin/sh", "/bin/dash", "/bin/bash") if Path(shell).exists()]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("line", CRONTAB, ids=lambda line: line.split("python ")[1].split(".py")[0])
def test_every_cron_job_has_the_settings_of_the_service(shell, line, tmp_path):
    """With the settings' template, a program that tells its environment in Python's place, and cron's few variables."""
    settings = (ROOT / "examples/deployment/sepsis-risk.env").read_text()
    named = re.search(r"^EnvironmentFile=(.+)$", (ROOT / "examples/deployment/sepsis-risk.service").read_text(), re.M)[
        1
    ]
    home = tmp_path / "sepsis-risk"
    for folder in (home / ".venv/bin", home / "data"):
        folder.mkdir(parents=True)
    (home / ".venv/bin/python").write_text(f'#!{shell}\necho "$SEPSIS_PSEUDONYM_KEY $SEPSIS_API_KEYS" >>ran\n')
    (home / ".venv/bin/python").chmod(0o755)
    command = " ".join(line.split()[5:])
    assert named in command and "%" not in command  # cron takes it for a line's end
    command = command.replace(named, str(tmp_path / "settings.env"))

    def run():
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        return subprocess.run([shell, "-c", command], env=environment, cwd="/", capture_output=True)

    done = run()  # no settings: no job, and a message for cron to send
    assert done.returncode and done.stderr and not (home / "ran").exists()
    (tmp_path / "settings.env").write_text(settings.replace("replace-me", "'a key; with $pecial letters'"))
    done = run()
    assert (done.returncode, done.stderr) == (0, b"")
    assert (home / "ran").read_text() == "a key; with $pecial letters /etc/sepsis-risk.keys\n"


def test_the_settings_template_cannot_be_used_as_it_is():
    key = re.search(r"^SEPSIS_PSEUDONYM_KEY=(.+)$", (ROOT / "examples/deployment/sepsis-risk.env").read_text(), re.M)[1]
    with pytest.raises(BadConfig, match="SEPSIS_PSEUDONYM_KEY"):
        Pseudonyms(key)


def test_the_notebook_snippets(models_dir, tmp_path):
    shutil.copytree(models_dir, tmp_path / "models")
    (tmp_path / "data").mkdir()
    check = [sys.executable, str(ROOT / "run_tests.py"), "pipeline", "--patients", "25"]
    subprocess.run(check, cwd=tmp_path, check=True, capture_output=True)
    done = run_example("notebook_snippets.py", cwd=tmp_path)
    assert done.returncode == 0 and "four processes, the same numbers" in done.stdout, done.stderr
