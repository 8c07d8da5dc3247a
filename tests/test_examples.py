"""The examples run as they stand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka import Producer

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


def test_the_whole_system(models_dir, tmp_path):
    done = run_example("production_system.py", "--models-dir", models_dir, "--work-dir", tmp_path)
    assert "alerts" in told(done) and "monitoring_report.html" in done.stdout
    audit = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(audit) == 1 and audit[0]["outcome"] == "scored"
    again = run_example("production_system.py", "--models-dir", models_dir, "--work-dir", tmp_path / "other")
    assert told(again).splitlines()[2:6] == done.stdout.splitlines()[2:6]


@pytest.mark.slow
def test_the_whole_system_trains_a_model_and_streams_through_kafka(tmp_path):
    cluster = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1})
    brokers = ",".join(f"{b.host}:{b.port}" for b in cluster.list_topics(timeout=10).brokers.values())
    options = ["--models-dir", tmp_path / "models", "--work-dir", tmp_path / "work", "--kafka", brokers]
    done = run_example("production_system.py", *options, "--patients", 20)
    assert "model trained on the demo cohort" in told(done)


def test_the_notebook_snippets(models_dir, tmp_path):
    shutil.copytree(models_dir, tmp_path / "models")
    (tmp_path / "data").mkdir()
    check = [sys.executable, str(ROOT / "run_tests.py"), "pipeline", "--patients", "25"]
    subprocess.run(check, cwd=tmp_path, check=True, capture_output=True)
    done = run_example("notebook_snippets.py", cwd=tmp_path)
    assert done.returncode == 0 and "four processes, the same numbers" in done.stdout, done.stderr
