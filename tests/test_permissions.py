"""What the scripts make is not for other accounts of the machine, though the usual umask would let them read it."""

import json
import os
from pathlib import Path

import pytest

import batch_processor
import db_predictor
import generate_features
import stream_processor
from common.command_line import nothing_for_others

FOR_OTHERS, FOR_ALL_BUT_OWNER = 0o007, 0o077


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def open_to_others(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if mode(path) & FOR_OTHERS]


@pytest.fixture
def home(tmp_path, monkeypatch, config_path, model_path):
    """An empty folder to run in, and the options that name the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEPSIS_MONITOR_URL", "sqlite:///new/log/predictions.db")
    return tmp_path, ["--config", str(config_path), "--model", str(model_path), "--quiet"]


def test_files_and_folders_of_the_batch_processor(cohort, home, usual_umask):
    folder, model = home
    incoming = folder / "incoming"
    incoming.mkdir()
    cohort[0].head(500).to_csv(incoming / "ward.csv", index=False)
    (incoming / "bad.csv").write_text("no,columns\n1,2\n")
    theirs = set(open_to_others(folder))
    options = ["--input-dir", str(incoming), "--output-dir", "new/predictions", "--settle-seconds", "0"]
    assert batch_processor.main([*options, *model]) == 1
    # what the hospital laid there keeps its permissions when it is moved
    assert set(open_to_others(folder)) <= theirs | {"failed/bad.csv"}
    assert mode(folder / "new") == mode(folder / "new/predictions") == 0o750
    assert mode(folder / "new/predictions/predictions_ward.csv") == 0o640


def test_the_default_database(home, usual_umask):
    folder, _ = home
    assert db_predictor.main(["--init-db", "--quiet", "--db-url", "sqlite:///data/sepsis.db"]) == 0
    assert mode(folder / "data/sepsis.db") == 0o640 and not open_to_others(folder)


def test_alerts_and_state_of_the_stream(cohort, home, usual_umask, monkeypatch, capsys):
    folder, model = home
    rows = cohort[0].dropna(subset="observation_value").drop(columns=["reference_range_min", "reference_range_max"])
    lines = rows.head(3000).to_json(orient="records", lines=True, date_format="iso")
    (folder / "feed.jsonl").write_text(lines)
    (folder / "feed.jsonl").chmod(0o600)
    with (folder / "feed.jsonl").open() as feed:
        monkeypatch.setattr("sys.stdin", feed)
        files = ["--alerts", "new/alerts.jsonl", "--state", "new/state.db"]
        assert stream_processor.main([*files, "--as-of", "last", *model]) == 0
    assert json.loads((folder / "new/alerts.jsonl").read_text().splitlines()[0])["client"]
    assert {path.name for path in (folder / "new").glob("state.db*")} == {"state.db", "state.db.lock"}
    assert mode(folder / "new/state.db") == 0o600
    assert not open_to_others(folder)


def test_a_new_models_folder(cohort_files, home, usual_umask):
    folder, _ = home
    observations, labels = map(str, cohort_files)
    options = ["--observations", observations, "--labels", labels, "--models-dir", "new/models", "--jobs", "1"]
    recipe = ["--feature-sets", "clinical", "--models", "logistic_regression", "--finalists", "1", "--quiet"]
    assert generate_features.main([*options, *recipe]) == 0
    assert mode(folder / "new/models") == 0o750 and not open_to_others(folder)


def test_a_stricter_umask_stands_and_the_caller_s_comes_back(tmp_path):
    before = os.umask(0o077)
    try:
        with nothing_for_others():
            (tmp_path / "file").touch()
        assert not mode(tmp_path / "file") & FOR_ALL_BUT_OWNER
        with pytest.raises(OSError), nothing_for_others():
            raise OSError
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
