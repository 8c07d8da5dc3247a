"""The hourly job over files: same bits as `predict`, nothing lost or doubled, whatever happens."""

import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batch_processor
from batch_processor import main, score_partition, watch
from common.artifacts import locked
from common.pseudonyms import Pseudonyms
from feature_pipeline import COLUMNS, BadObservations, FeaturePipelineError, ProductionPipeline
from serving.batch import directory, scoring
from serving.batch.backends import Processes, Threads
from serving.batch.directory import LOCK, BadDirectories, BatchProcessor
from serving.batch.manifest import MANIFEST, Manifest
from serving.batch.reading import Chunks

ROOT = Path(batch_processor.__file__).parent
COLUMNS_OUT = ["visit_id", "client", "sepsis_probability", "risk_level", "reason", "as_of", "hours_since_newest"]
COLUMNS_OUT += ["processed_at", "model_version"]


@pytest.fixture(scope="session")
def rows(cohort):
    """About 4,000 observations of whole visits, texts as in a file."""
    observations = cohort[0]
    visits = observations["visit_id"].unique()[:24]
    some = observations[observations["visit_id"].isin(visits)].reset_index(drop=True)
    return some.assign(visit_id=some["visit_id"].astype(str), client=some["client"].astype(str))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with data/incoming."""
    (tmp_path / "data/incoming").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


@pytest.fixture
def processor(config_path, model_path):
    return BatchProcessor(config_path, model_path, settle_seconds=0)


def put(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)
    return path


def predictions(path: Path) -> pd.DataFrame:
    """A predictions file with every bit of its scores."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pandas()
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    score = [float(cell) if cell else np.nan for cell in table["sepsis_probability"]]
    return table.assign(sepsis_probability=score)


def assert_same_scores(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert found["visit_id"].tolist() == expected["visit_id"].astype(str).tolist()
    assert found["client"].tolist() == expected["client"].astype(str).tolist()
    np.testing.assert_array_equal(found["sepsis_probability"], expected["sepsis_probability"])


def predict(pipeline, source) -> pd.DataFrame:
    """What the notebook's call gives, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline.predict(source)


def without_time(path: Path) -> bytes:
    return predictions(path).drop(columns="processed_at").to_csv(index=False).encode()


def options(config_path, model_path) -> list[str]:
    return ["--config", str(config_path), "--model", str(model_path), "--settle-seconds", "0", "--jobs", "1"]


# --------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", ["ward.csv", "ward.csv.gz", "ward.parquet", "WARD.CSV"])
@pytest.mark.parametrize("chunk_rows", [100_000, 700])
def test_scores_are_those_of_predict_to_the_last_bit(place, rows, pipeline, config_path, model_path, name, chunk_rows):
    scattered = rows.sample(frac=1, random_state=3)
    put(scattered, place / "incoming" / name)
    processor = BatchProcessor(config_path, model_path, settle_seconds=0, chunk_rows=chunk_rows)
    result = processor.process_directory("data/incoming", "data/predictions")
    assert result.ok and [file.file for file in result.scored] == [name]
    found = predictions(place / "predictions" / f"predictions_{name}")
    expected = predict(pipeline, scattered)
    assert list(found.columns) == COLUMNS_OUT
    assert_same_scores(found, expected)
    assert found["risk_level"].tolist() == pipeline.risk_level(expected["sepsis_probability"]).tolist()
    assert set(found["model_version"]) == {pipeline.model_version}
    moment = pd.to_datetime(found["processed_at"], format="ISO8601", utc=True)
    assert moment.nunique() == 1 and abs(moment[0] - pd.Timestamp.now("UTC")) < pd.Timedelta(minutes=5)
    assert found["processed_at"][0].endswith("+00:00")


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_chunks_change_neither_scores_nor_counts_of_a_dirty_file(
    place, pipeline, config_path, model_path, chunk_rows, suffix
):
    cells = [
        ("007", "a", "2024-01-01T00:00", "HR", "80", "60", "100"),
        ("7", "a", "2024-01-01T01:00", "HR", "90", "", ""),
        ("", "a", "2024-01-01T01:00", "HR", "90", "", ""),
        ("8", "b", "2024-01-01T01:00", "HR", "high", "", ""),
        ("007", "a", "2024-01-01T02:00", "NA", "<140", "135", "145"),
        ("007", "a", "2024-01-01T00:00", "HR", "80", "60", "100"),
        ("9", "b", "not a date", "HR", "70", "", ""),
        ("7", " a ", "2024-01-01T03:00", "Temp", "370", "", ""),
        ("9", "b", "2024-01-01T05:00+02:00", "Temp", "100.4", "97", "99"),
        ("7", "b", "2024-01-01T05:00", "SBP", "1e2", "", ""),
        ("7", "b", "2024-01-01T05:00", "Temp", "98.6", "", ""),
    ]
    cells = [(*cell, "[degF]" if cell[3:5] == ("Temp", "98.6") else "") for cell in cells]
    frame = pd.DataFrame(cells, columns=COLUMNS)
    path = put(frame, place / "incoming" / f"dirt.{suffix}")
    result = BatchProcessor(config_path, model_path, settle_seconds=0, chunk_rows=chunk_rows).process_directory()
    whole = pipeline.reproducer.read(path)
    assert_same_scores(predictions(place / "predictions" / f"predictions_dirt.{suffix}"), predict(pipeline, whole))
    assert result.scored[0].set_aside == dict(sorted(whole.set_aside.items()))
    assert result.scored[0].observations == len(cells)
    # visit 8 of client b has nothing usable
    assert result.scored[0].risk_levels["UNKNOWN"] == predict(pipeline, whole)["sepsis_probability"].isna().sum() > 0


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_a_risk_that_cannot_be_told_has_its_reason(place, careful_files, evidence_cases, suffix, caplog, monkeypatch):
    monkeypatch.setattr(directory.log, "propagate", True)
    caplog.set_level("INFO", "sepsis")
    rows, moment = evidence_cases
    put(rows, place / f"incoming/ward.{suffix}")
    processor = BatchProcessor(*careful_files, settle_seconds=0, as_of="now", clock=moment.timestamp)
    run = processor.process_directory()
    [result] = run.scored
    assert str(run).endswith("codes that the model does not use: '8302-2' (2 rows)")
    found = predictions(place / f"predictions/predictions_ward.{suffix}").set_index("visit_id")
    level = {visit: found["risk_level"][visit] for visit in found.index}
    assert {visit for visit in level if level[visit] == "UNKNOWN"} == {"heights", "stale", "words"}
    reasons = {visit: found["reason"][visit] for visit in ("heights", "stale", "words")}
    assert reasons == {"heights": "insufficient_evidence", "stale": "stale", "words": "nothing_usable"}
    assert found["sepsis_probability"].isna().sum() == 3
    assert found["sepsis_probability"]["known"] == found["sepsis_probability"]["ahead"]  # from what is not ahead
    assert [float(found["hours_since_newest"][visit]) for visit in ("known", "stale", "ahead")] == [1.0, 40.0, 1.0]
    assert set(found["as_of"]) == {"2024-05-01T12:00:00Z"}
    assert result.set_aside == {"future": 1, "no_value": 1} and result.unused_codes == {"8302-2": 2}
    assert "codes that the model does not use: '8302-2' (2 rows)" in caplog.text


def test_files_of_past_stays_are_scored_for_their_last_observation_or_a_time(place, careful_files, evidence_cases):
    rows, _ = evidence_cases
    put(rows, place / "incoming/ward.csv")
    found = {}
    for as_of in ("last", "2024-05-01T13:00:00", "now"):
        processor = BatchProcessor(*careful_files, settle_seconds=0, as_of=as_of)
        assert len(processor.process_directory().scored) == 1  # another moment is another result
        assert not processor.process_directory().scored
        found[as_of] = predictions(place / "predictions/predictions_ward.csv").set_index("visit_id")
    assert found["last"]["reason"]["stale"] == "" and found["last"]["as_of"]["stale"] == "2024-04-29T20:00:00Z"
    assert found["last"]["as_of"]["ahead"] == "2024-05-03T12:00:00Z"
    assert found["2024-05-01T13:00:00"]["hours_since_newest"]["known"] == "2.0"
    assert set(found["now"]["risk_level"]) == {"UNKNOWN"}  # of years ago
    with pytest.raises(BadObservations, match="as_of 'yesterday' is not"):
        BatchProcessor(*careful_files, as_of="yesterday")


def test_a_site_map_of_codes_makes_foreign_codes_count(place, careful_files, site_codes, site_cases):
    put(site_cases, place / "incoming/ward.csv")
    without = BatchProcessor(*careful_files, settle_seconds=0).process_directory().scored[0]
    assert without.unused_codes == {"x-breaths": 1, "x-pulse": 1, "x-temp": 1}
    assert main([*options(*careful_files), "--codes", str(site_codes)]) == 0  # takes the file again
    found = predictions(place / "predictions/predictions_ward.csv").set_index("visit_id")["sepsis_probability"]
    assert found["own"] == found["theirs"]


def test_a_site_map_that_contradicts_the_training_is_refused(place, careful_files, tmp_path, capsys):
    (tmp_path / "codes.csv").write_text("code,concept\nHR,temperature\n")
    assert main([*options(*careful_files), "--codes", str(tmp_path / "codes.csv")]) == 2
    assert "'HR' means temperature here, but the model was trained with it as heart_rate" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["   \n", "\n \t\n\n", "\ufeff \n"])
@pytest.mark.parametrize("chunk_rows", [1, 100_000])
def test_blank_lines_before_the_header_are_none(place, rows, pipeline, processor, start, chunk_rows):
    path = place / "incoming/ward.csv"
    path.write_text(start + rows.head(300).to_csv(index=False))
    processor.chunk_rows = chunk_rows
    assert processor.process_directory().ok
    assert_same_scores(predictions(place / "predictions/predictions_ward.csv"), predict(pipeline, path))


@pytest.mark.parametrize("quoting", [0, 1])
@pytest.mark.parametrize("chunk_rows", [50, 100_000])
def test_bytes_that_are_no_utf_8_make_no_visit(place, rows, pipeline, processor, quoting, chunk_rows):
    path = place / "incoming/ward.csv"
    some = rows.head(300).copy()
    some.loc[:20, "client"] = "Müller"
    some.loc[21:40, "client"] = "Möller"
    path.write_bytes(some.to_csv(index=False, quoting=quoting).encode("latin-1"))
    processor.chunk_rows = chunk_rows
    result = processor.process_directory()
    found = predictions(place / "predictions/predictions_ward.csv")
    assert_same_scores(found, predict(pipeline, path))
    assert result.scored[0].set_aside["not_utf8"] == 41 and found["client"].str.isascii().all()


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
@pytest.mark.parametrize("odd", ['"{}"', "{}\r", '"{},{}"'])
def test_what_only_pandas_can_parse_may_begin_anywhere(place, rows, pipeline, processor, suffix, odd):
    lines = rows.to_csv(index=False).splitlines()
    lines[3000] = lines[3000].replace("1", odd.format(*"11"), 1)  # a cell in quotes, or another end of a line
    path = place / f"incoming/ward.{suffix}"
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if suffix == "csv.gz" else content)
    processor.chunk_rows = 500
    [scored] = processor.process_directory().scored
    whole = pipeline.reproducer.read(path)
    assert_same_scores(predictions(place / f"predictions/predictions_ward.{suffix}"), predict(pipeline, whole))
    assert scored.set_aside == dict(sorted(whole.set_aside.items()))


def test_lines_with_too_many_fields_are_counted_in_every_chunk(place, rows, processor):
    lines = rows.head(20).to_csv(index=False).splitlines()
    lines[3:3] = lines[15:15] = ["1,a,2024-01-01,HR,80,,,surplus"]
    (place / "incoming/long.csv").write_text("\n".join(lines))
    processor.chunk_rows = 5
    assert processor.process_directory().scored[0].set_aside["malformed"] == 2


def test_a_file_far_longer_than_a_chunk_has_many_parts(place, rows, config_path, model_path, monkeypatch):
    put(rows, place / "incoming/long.parquet")
    made = []
    original = scoring.Parts.__init__

    def spy(self, directory, n_parts):
        made.append(n_parts)
        original(self, directory, n_parts)

    monkeypatch.setattr(scoring.Parts, "__init__", spy)
    processor = BatchProcessor(config_path, model_path, settle_seconds=0, chunk_rows=len(rows) // 10)
    assert processor.process_directory().ok
    assert made[0] >= 20
    assert not list((place / "predictions").glob("tmp*"))  # the parts leave nothing behind


# ---------------------------------------------------------------------------------- what is done, what is not


def test_a_finished_file_is_scored_again_only_when_it_or_the_model_changed(
    place, rows, processor, config_path, model_path, tmp_path
):
    path = put(rows, place / "incoming/ward.csv")
    assert len(processor.process_directory().scored) == 1
    output = place / "predictions/predictions_ward.csv"
    first = output.stat().st_mtime_ns
    again = processor.process_directory()
    assert again.unchanged == ["ward.csv"] and not again.scored and output.stat().st_mtime_ns == first

    put(rows.head(500), path)
    assert len(processor.process_directory().scored) == 1
    output.unlink()  # somebody fetched it
    assert processor.process_directory().unchanged == ["ward.csv"]
    assert not output.exists()
    os.utime(path, (1, 1))
    assert len(processor.process_directory().scored) == 1

    config = json.loads(config_path.read_text())
    config["risk_thresholds"] = {"medium": 0.3, "high": 0.6}
    other = tmp_path / "config.json"
    other.write_text(json.dumps(config))
    assert len(BatchProcessor(other, model_path, settle_seconds=0).process_directory().scored) == 1


def test_a_notebook_scores_a_file_that_was_just_written(place, rows, config_path, model_path):
    put(rows.head(300), place / "incoming/ward.csv")
    assert len(BatchProcessor(config_path, model_path).process_directory().scored) == 1


def test_a_replacement_of_the_same_size_and_time_is_seen(place, rows, processor):
    path = put(rows.head(300), place / "incoming/ward.csv")
    assert len(processor.process_directory().scored) == 1
    before = path.stat()
    other = place / "other.csv"
    other.write_text(path.read_text().replace(rows["client"][0], rows["client"][0][::-1]))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert len(processor.process_directory().scored) == 1


@pytest.mark.parametrize("same", ["output_dir", "failed_dir"])
def test_nothing_is_written_among_the_input(place, rows, processor, same):
    put(rows.head(200), place / "incoming/ward.csv")
    (place / "link").symlink_to(place / "incoming")
    with pytest.raises(BadDirectories, match="both"):
        processor.process_directory("data/incoming", **{"output_dir": "data/predictions", same: "data/link"})
    assert [path.name for path in (place / "incoming").iterdir()] == ["ward.csv"]


def test_two_input_directories_do_not_share_an_output_directory(place, rows, config_path, model_path, capsys):
    (place / "ward2").mkdir()
    put(rows.head(200), place / "incoming/day.csv")
    put(rows.tail(200), place / "ward2/day.csv")
    assert main(options(config_path, model_path)) == 0
    output = place / "predictions/predictions_day.csv"
    first = output.read_bytes()
    assert main([*options(config_path, model_path), "--input-dir", "data/ward2"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and "an --output-dir of its own" in err and output.read_bytes() == first
    assert main(options(config_path, model_path)) == 0
    (place / "incoming").rename(place / "moved")  # the same files at another place are no other ones
    assert main([*options(config_path, model_path), "--input-dir", "data/moved"]) == 0
    assert output.read_bytes() == first


def test_a_file_that_is_still_written_is_left_for_the_next_run(place, rows, config_path, model_path):
    path = put(rows, place / "incoming/ward.csv")
    moment = [path.stat().st_mtime + 9.0]
    processor = BatchProcessor(config_path, model_path, settle_seconds=10, clock=lambda: moment[0])
    result = processor.process_directory()
    assert result.still_written == ["ward.csv"] and result.ok and not list((place / "predictions").glob("pred*"))
    assert "1 still being written" in str(result)
    moment[0] -= 86400  # the file is dated ahead
    assert processor.process_directory().still_written == ["ward.csv"]
    moment[0] += 86402
    assert len(processor.process_directory().scored) == 1


@pytest.mark.parametrize("addition", ["1,a,2024-01-01T00:00,HR,80,,\n", '"'])
@pytest.mark.parametrize("chunk_rows", [100_000, 100])
def test_a_file_that_grows_while_it_is_read_is_left_for_the_next_run_and_not_logged(
    place, rows, config_path, model_path, monkeypatch, addition, chunk_rows
):
    path = put(rows.head(300), place / "incoming/ward.csv")
    size, original = path.stat().st_size, scoring.read_chunk

    def slow(*arguments):
        if path.stat().st_size == size:
            with open(path, "a") as file:
                file.write(addition)
        if addition == '"':
            raise BadObservations("half a file")
        return original(*arguments)

    processor = BatchProcessor(config_path, model_path, chunk_rows=chunk_rows, monitor=f"sqlite:///{place}/log.db")
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "read_chunk", slow)
        result = processor.process_directory()
    assert result.still_written == ["ward.csv"] and not result.failed and path.exists()
    with contextlib.closing(sqlite3.connect(place / "log.db")) as log:
        assert log.execute("SELECT count(*) FROM predictions").fetchone() == (0,)
    if addition != '"':
        [scored] = processor.process_directory().scored
        with contextlib.closing(sqlite3.connect(place / "log.db")) as log:
            assert log.execute("SELECT count(*) FROM predictions").fetchone() == (scored.visits,)


def test_a_file_that_is_cut_off_while_it_is_read_ends_nothing(place, rows, processor, monkeypatch):
    cut = put(rows, place / "incoming/a.csv")
    os.utime(cut, (1, 1))
    put(rows.head(200), place / "incoming/b.csv")

    class Overwritten(io.BufferedReader):
        def read(self, size=-1):
            block = super().read(size)
            if cut.stat().st_size > 100 and self.raw.name == cut.relative_to(place.parent):
                os.truncate(cut, 100)
            return block

    def overwriting(path, mode):
        return Overwritten(io.FileIO(path)) if mode == "rb" else open(path, mode)

    monkeypatch.setattr(scoring, "open", overwriting, raising=False)
    result = processor.process_directory()
    assert result.still_written == ["a.csv"] and [file.file for file in result.scored] == ["b.csv"]


def test_what_is_no_file_of_ours_is_left_alone(place, rows, processor):
    for name in ("notes.txt", ".hidden.csv", "ward.csv.part"):
        (place / "incoming" / name).write_text("x")
    (place / "incoming/folder.csv").mkdir()
    os.mkfifo(place / "incoming/pipe.csv")
    result = processor.process_directory()
    assert result.ok and not result.scored
    assert not (place / "failed").exists()


def test_leftovers_of_a_killed_run_are_removed(place, processor):
    (place / "predictions").mkdir()
    (place / "predictions/.predictions_ward.csv.x1y2").write_text("half")
    processor.process_directory()
    assert not list((place / "predictions").glob(".predictions_*"))


def test_models_for_the_processes_lie_where_the_next_run_finds_them(place, rows, processor, monkeypatch):
    (place / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place / "tmp"))
    put(rows.head(200), place / "incoming/ward.csv")
    assert processor.process_directory().ok
    backend = Processes(processor.deployment(), 2, place / "predictions")
    left = list((place / "predictions").glob(".model.*"))
    assert left and not list((place / "tmp").iterdir())
    processor.process_directory()  # the run of `backend` has been killed
    assert not any(path.exists() for path in left)
    backend.close()


def test_a_torn_manifest_costs_one_file_only(place, rows, processor):
    for name in ("a.csv", "b.csv"):
        put(rows.head(200), place / "incoming" / name)
    processor.process_directory()
    manifest = place / "predictions" / MANIFEST
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-20])
    result = processor.process_directory()
    assert result.unchanged == ["a.csv"] and [file.file for file in result.scored] == ["b.csv"]
    assert set(Manifest(manifest).entries) == {"a.csv", "b.csv"}
    assert processor.process_directory().unchanged == ["a.csv", "b.csv"]


def test_the_manifest_forgets_files_that_are_gone(tmp_path):
    path = tmp_path / "manifest.jsonl"
    manifest = Manifest(path)
    for number in range(300):
        manifest.add({"file": f"{number % 3}.csv", "number": number})
    manifest.keep({"0.csv", "2.csv"})
    assert len(path.read_text().splitlines()) == 2
    assert Manifest(path).entries["2.csv"]["number"] == 299


def test_two_runs_never_overlap(place, rows, config_path, model_path, capsys):
    put(rows.head(100), place / "incoming/ward.csv")
    (place / "predictions").mkdir()
    with locked(place / "predictions" / LOCK, wait=False) as alone:
        assert alone
        assert main(options(config_path, model_path)) == 0
        assert "another run is at work" in capsys.readouterr().out
    assert main(options(config_path, model_path)) == 0
    assert "1 files scored" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- bad input


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[middle + 40 :]


BAD_FILES = {
    "empty.csv": lambda rows: b"",
    "empty.parquet": lambda rows: b"",
    "blank.csv": lambda rows: b"\n\n\n",
    "header.csv": lambda rows: ",".join(COLUMNS).encode(),
    "headerless.csv": lambda rows: rows.to_csv(index=False, header=False).encode(),
    "columns.csv": lambda rows: rows.rename(columns={"client": "patient"}).to_csv(index=False).encode(),
    "semicolon.csv": lambda rows: rows.to_csv(index=False, sep=";").encode(),
    "twice.csv": lambda rows: rows.assign(x=1).rename(columns={"x": "client"}).to_csv(index=False).encode(),
    "nothing.csv": lambda rows: rows.assign(observation_value="?").to_csv(index=False).encode(),
    "half.csv.gz": lambda rows: _half(gzip.compress(rows.to_csv(index=False).encode())),
    "damaged.csv.gz": lambda rows: _damaged(gzip.compress(rows.to_csv(index=False).encode())),
    "plain.csv.gz": lambda rows: rows.to_csv(index=False).encode(),
    "half.parquet": lambda rows: _half(rows.to_parquet()),
    "noise.parquet": lambda rows: b"PAR1" + bytes(range(256)),
    "columns.parquet": lambda rows: rows.drop(columns="observation_date").to_parquet(),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_moved_with_its_reason_and_stops_no_other(place, rows, config_path, model_path, capsys, name):
    put(rows.head(400), place / "incoming/good.csv")
    content = BAD_FILES[name](rows)
    (place / "incoming" / name).write_bytes(content)
    assert main(options(config_path, model_path)) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "1 files scored" in out and "1 failed" in out
    told = [line for line in err.splitlines() if name in line]
    assert len(told) == 1 and told[0].startswith("failed: ") and "Traceback" not in err
    assert (place / "failed" / name).read_bytes() == content
    assert not (place / "incoming" / name).exists()
    reason = (place / "failed" / f"{name}.reason.txt").read_text()
    assert name in reason and reason.count("\n") == 2
    for secret in (rows["client"][0], rows["visit_id"][0]):
        assert secret not in reason + err + out
    assert (place / "predictions/predictions_good.csv").exists()
    assert main(options(config_path, model_path)) == 0  # told once, not every hour


NESTED = {
    "lists": pa.array([None, [1.0]] * 200),
    "maps": pa.array([[("k", 1)]] * 400, pa.map_(pa.string(), pa.int64())),
    "records": pa.array([{"value": 80.0}] * 400),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("chunk_rows", [100_000, 70])
def test_a_parquet_file_of_lists_is_a_bad_file(place, rows, processor, kind, chunk_rows):
    processor.chunk_rows = chunk_rows
    put(rows.head(400), place / "incoming/good.parquet")
    table = pa.Table.from_pandas(rows.head(400), preserve_index=False)
    column = table.schema.get_field_index("observation_value")
    pq.write_table(table.set_column(column, "observation_value", NESTED[kind]), place / "incoming/bad.parquet")
    os.utime(place / "incoming/bad.parquet", (1, 1))
    result = processor.process_directory()
    assert [file.file for file in result.scored] == ["good.parquet"]
    assert "column 'observation_value' holds lists or records" in result.failed["bad.parquet"]


def test_a_surprise_in_one_file_stops_no_other(place, rows, processor, caplog, monkeypatch):
    monkeypatch.setattr(directory.log, "propagate", True)
    for name in ("a.csv", "b.csv", "c.csv"):
        put(rows.head(200 if name == "b.csv" else 300), place / "incoming" / name)
    original = scoring.scores_of

    def surprised(model, moment, observations, number):
        if len(observations.visit_of_row) == 200:
            raise RuntimeError(f"visit {observations.visit_id[0]}")
        return original(model, moment, observations, number)

    monkeypatch.setattr(scoring, "scores_of", surprised)
    result = processor.process_directory()
    assert {file.file for file in result.scored} == {"a.csv", "c.csv"} and not result.ok
    assert list(result.kept) == ["b.csv"] and (place / "incoming/b.csv").exists()
    assert "unexpected RuntimeError" in caplog.text and "visit " + rows["visit_id"][0] not in caplog.text


def test_bad_files_of_one_name_are_all_kept(place, processor):
    for content in ("a", "b", "c"):
        (place / "incoming/ward.csv.gz").write_text(content)
        assert list(processor.process_directory().failed) == ["ward.csv.gz"]
    assert [(place / "failed" / f"ward{n}.csv.gz").read_text() for n in ("", ".2", ".3")] == ["a", "b", "c"]


def test_a_failed_directory_that_cannot_be_made_loses_nothing(place, processor):
    (place / "incoming/bad.csv").write_text("x")
    (place / "failed").write_text("a file is in the way")
    result = processor.process_directory()
    assert not result.ok and list(result.kept) == ["bad.csv"] and (place / "incoming/bad.csv").exists()


@pytest.mark.parametrize("what", ["input", "output", "config"])
def test_what_stops_the_start_is_one_line_and_status_2(place, config_path, model_path, capsys, what):
    (place / "file").write_text("")
    extra = {
        "input": ["--input-dir", "nowhere"],
        "output": ["--output-dir", "data/file/predictions"],
        "config": ["--config", "nowhere.json"],
    }[what]
    assert main(options(config_path, model_path) + extra) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_directory_without_permission(place, config_path, model_path, capsys):
    (place / "predictions").mkdir(mode=0o555)
    assert main(options(config_path, model_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def _in_process(arguments: list[str], cwd: Path, limit: int | None = None) -> subprocess.CompletedProcess:
    def quota():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, str(ROOT / "batch_processor.py"), *arguments],
        cwd=cwd,
        preexec_fn=quota,  # no threads run yet
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_quota_keeps_the_file_for_the_next_run(place, rows, config_path, model_path):
    put(rows, place / "incoming/ward.csv")
    arguments = options(config_path, model_path)
    full = _in_process(arguments, place.parent, limit=500)
    assert full.returncode == 1 and "not scored, kept for the next run" in full.stderr
    assert full.stderr.count("\n") == 1
    assert (place / "incoming/ward.csv").exists() and not list((place / "predictions").glob("*predictions_*"))
    assert main(arguments) == 0
    assert len(predictions(place / "predictions/predictions_ward.csv")) == rows["visit_id"].nunique()


def test_a_full_disk_keeps_the_file_for_the_next_run(place, rows, config_path, model_path, capsys):
    output = place / "predictions"
    output.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(output)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        (output / "filler").write_bytes(bytes(56 * 1024))
        many = pd.concat([rows.assign(visit_id=rows["visit_id"] + f"-{i}") for i in range(9)])
        put(many, place / "incoming/ward.csv")
        assert main(options(config_path, model_path)) == 1
        assert "No space left on device" in capsys.readouterr().err
        assert main([*options(config_path, model_path), "--chunk-rows", "5000"]) == 1  # no room for the parts either
        (output / "filler").unlink()
        assert main(options(config_path, model_path)) == 0
        assert len(predictions(output / "predictions_ward.csv")) == many["visit_id"].nunique()
    finally:
        subprocess.run(["umount", str(output)], check=True)


# -------------------------------------------------------------------------------------- several processes


def test_processes_and_parts_give_the_same_files(place, rows, pipeline, config_path, model_path, monkeypatch):
    monkeypatch.setattr(directory, "WORTH_A_POOL", 0)
    monkeypatch.setattr(directory, "LARGE_BYTES", 100_000)
    put(rows, place / "incoming/large.csv")  # cut here, its parts are scored in the pool
    for number in range(3):
        put(rows.iloc[number::3], place / f"incoming/small{number}.csv.gz")
    (place / "incoming/bad.csv").write_text("x")
    processor = BatchProcessor(config_path, model_path, settle_seconds=0, jobs=2, chunk_rows=900)
    result = processor.process_directory()
    assert len(result.scored) == 4 and list(result.failed) == ["bad.csv"]
    assert_same_scores(predictions(place / "predictions/predictions_large.csv"), predict(pipeline, rows))
    for number in range(3):
        found = predictions(place / f"predictions/predictions_small{number}.csv.gz")
        assert_same_scores(found, predict(pipeline, rows.iloc[number::3]))


@pytest.mark.parametrize("scattered", [False, True])
def test_the_number_of_threads_changes_no_byte(place, rows, config_path, model_path, monkeypatch, scattered):
    monkeypatch.setattr(directory, "LARGE_FOR_THREADS", 0)  # cut, and spread over the threads
    put(rows.sample(frac=1, random_state=1) if scattered else rows, place / "incoming/ward.csv")
    written = []
    for threads, chunk_rows in ((1, 100_000), (1, 900), (2, 900), (5, 400)):
        monkeypatch.setattr(Threads, "slots", threads)
        processor = BatchProcessor(config_path, model_path, chunk_rows=chunk_rows, clock=lambda: 1.7e9)
        assert processor.process_directory(output_dir=place / f"{threads} {chunk_rows}").ok
        written.append((place / f"{threads} {chunk_rows}/predictions_ward.csv").read_bytes())
    assert len(set(written)) == 1


def test_two_processors_of_one_model_have_logs_of_their_own(place, rows, config_path, model_path):
    put(rows, place / "incoming/ward.csv")
    for name in ("a", "b"):
        log = place / f"{name}.db"
        processor = BatchProcessor(config_path, model_path, settle_seconds=0, monitor=f"sqlite:///{log}")
        processor.process_directory(output_dir=place / name)
        with contextlib.closing(sqlite3.connect(log)) as connection:
            assert connection.execute("SELECT count(*) FROM predictions").fetchone() == (rows["visit_id"].nunique(),)


def test_a_worker_that_dies_costs_no_file(place, rows, config_path, model_path, monkeypatch):
    monkeypatch.setattr(directory, "WORTH_A_POOL", 0)
    for number in range(6):
        put(rows, place / f"incoming/{number}.csv")
    processor = BatchProcessor(config_path, model_path, settle_seconds=0, jobs=2)
    results = []
    thread = threading.Thread(target=lambda: results.append(processor.process_directory()))
    thread.start()
    killed = False
    while thread.is_alive():
        workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(_command(p))]
        if workers and not killed:
            workers[0].kill()
            killed = True
        time.sleep(0.02)
    thread.join()
    assert killed and results[0].ok and len(results[0].scored) == 6


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_dask_workers_read_score_and_write_by_themselves(tmp_path, rows, pipeline, models_dir):
    """Scheduler, workers and client are processes of their own; the scheduler has no module of this project."""
    pytest.importorskip("distributed", reason="distributed is not installed")
    scattered = rows.sample(frac=1, random_state=1)
    (tmp_path / "observations").mkdir()
    for number in range(3):
        put(scattered.iloc[number::3], tmp_path / f"observations/{number}.parquet")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    own = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-P", "-m", "dask"]
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    scheduler = [*dask, "scheduler", *local, "--port", str(port)]
    worker = [*dask, "worker", address, *local, "--nthreads", "2", "--nworkers", "2", "--local-directory", tmp_path]
    bare = {"PATH": os.environ["PATH"]}
    processes = [subprocess.Popen(scheduler, **own, env=bare)]
    processes.append(subprocess.Popen(worker, **own, env={**bare, "PYTHONPATH": str(ROOT)}))
    try:
        client = [sys.executable, "examples/dask_cluster.py", address, f"{tmp_path}/observations/*.parquet"]
        client += [f"{tmp_path}/scores", str(models_dir)]
        done = subprocess.run(client, cwd=ROOT, env={**bare, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
    found = pd.read_parquet(tmp_path / "scores").sort_values("visit_id")
    assert list(found.columns) == COLUMNS_OUT
    assert_same_scores(found, predict(pipeline, rows).sort_values("visit_id"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("spark", []), ("ray", ["3"])])
def test_spark_and_ray_score_whole_visits(tmp_path, rows, pipeline, models_dir, name, more):
    """In local mode, where executors are processes of their own."""
    pytest.importorskip("pyspark" if name == "spark" else "ray", reason=f"{name} is not installed")
    if name == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    (tmp_path / "observations").mkdir()
    scattered = rows.sample(frac=1, random_state=1)
    for number in range(3):
        put(scattered.iloc[number::3], tmp_path / f"observations/{number}.parquet")
    call = [sys.executable, f"examples/{name}_cluster.py", f"{tmp_path}/observations", f"{tmp_path}/scores"]
    here = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    here |= {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable, "RAY_DEDUP_LOGS": "0"}
    done = subprocess.run([*call, str(models_dir), *more], cwd=ROOT, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = pd.read_parquet(tmp_path / "scores").sort_values("visit_id")
    assert set(found.columns) == set(COLUMNS_OUT)
    assert_same_scores(found, predict(pipeline, rows).sort_values("visit_id"))


def test_what_could_not_be_logged_is_counted(place, rows, config_path, model_path):
    put(rows, place / "incoming/ward.csv")
    result = BatchProcessor(config_path, model_path, monitor="sqlite:////proc/nowhere/x.db").process_directory()
    [scored] = result.scored
    assert result.ok and result.unlogged == scored.visits
    assert f"{scored.visits} rows of the prediction log not written" in str(result)


def test_a_partition_gives_what_a_file_gives(place, rows, config_path, model_path, processor, monkeypatch):
    put(rows, place / "incoming/ward.parquet")
    processor.process_directory()
    expected = predictions(place / "predictions/predictions_ward.parquet").drop(columns="processed_at")
    files = config_path, model_path
    texts = rows.astype(str).replace({"nan": "", "None": "", "NaT": ""})
    for frame in (rows, texts, rows.set_index(np.arange(len(rows)) % 7)):
        found = score_partition(frame, *files)
        pd.testing.assert_frame_equal(found.drop(columns="processed_at"), expected)
    empty = score_partition(rows.head(0), *files)
    assert list(empty.columns) == COLUMNS_OUT and not len(empty)
    assert empty.dtypes.astype(str).tolist() == found.dtypes.astype(str).tolist()
    monkeypatch.delenv("SEPSIS_PSEUDONYM_KEY", raising=False)
    with pytest.raises(FeaturePipelineError, match="SEPSIS_PSEUDONYM_KEY"):
        score_partition(rows, *files, monitor=f"sqlite:///{place}/log.db")
    monkeypatch.setenv("SEPSIS_PSEUDONYM_KEY", "0" * 64)
    score_partition(rows, *files, monitor=f"sqlite:///{place}/log.db")
    with contextlib.closing(sqlite3.connect(place / "log.db")) as log:
        assert log.execute("SELECT count(*) FROM predictions").fetchone() == (len(expected),)


# ------------------------------------------------------------------------------------------ killed anywhere


def _make_inputs(folder: Path, rows: pd.DataFrame) -> None:
    folder.mkdir(parents=True)
    for number in range(6):
        put(rows.iloc[number::6], folder / f"ward{number}.csv")
    put(rows.sample(frac=1, random_state=5), folder / "long.csv")
    put(rows, folder / "all.csv.gz")
    put(rows, folder / "all.parquet")
    (folder / "bad.csv").write_text("x\n")
    (folder / "half.csv.gz").write_bytes(_half(gzip.compress(rows.to_csv(index=False).encode())))


@pytest.mark.slow
def test_fifty_kills_change_no_byte(tmp_path, rows, config_path, model_path, monkeypatch):
    """Real processes, killed with -9 at random moments of their work until each round is finished."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fork = multiprocessing.get_context("forkserver")  # a child starts in a tenth of a second, work is what is killed
    fork.set_forkserver_preload(["pandas", "lightgbm", "pyarrow.parquet", "tqdm", "joblib", "batch_processor"])

    def start(folder: Path, extra: list[str]) -> multiprocessing.Process:
        directories = [f"--{name}-dir={folder / name}" for name in ("input", "output", "failed")]
        arguments = [*options(config_path, model_path), "--quiet", "--chunk-rows", "1000", *directories, *extra]
        process = fork.Process(target=_quiet_main, args=(arguments,))
        process.start()
        return process

    _make_inputs(tmp_path / "input", rows)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(tmp_path / "input", undisturbed / "input")
    process = start(undisturbed, [])
    process.join(60)
    assert process.exitcode == 1  # two bad files
    expected = {p.name: without_time(p) for p in (undisturbed / "output").glob("predictions_*")}
    assert len(expected) == 9
    shutil.copytree(tmp_path / "input", tmp_path / "clock/input")
    started = time.monotonic()
    start(tmp_path / "clock", []).join(60)
    usual = time.monotonic() - started

    rng = random.Random(11)
    kills = rounds = hits = 0
    while kills < 50:
        rounds += 1
        folder = tmp_path / f"round{rounds}"
        shutil.copytree(tmp_path / "input", folder / "input")
        while True:
            process = start(folder, [])
            process.join(usual * rng.uniform(0.2, 0.9))
            if process.exitcode is None and kills < 50:
                process.kill()
                process.join()
                kills += 1
                finished = len(list((folder / "output").glob("predictions_*")))
                hits += 0 < finished < len(expected)
                assert {p.name: without_time(p) for p in (folder / "output").glob("predictions_*")}.items() <= (
                    expected.items()
                )
                continue
            process.join(60)
            assert process.exitcode in (0, 1)
            break
        assert {p.name: without_time(p) for p in (folder / "output").glob("predictions_*")} == expected
        assert {p.name for p in (folder / "output").iterdir()} == {*expected, MANIFEST, ".lock"}
        bad = {"bad.csv", "half.csv.gz"}
        assert {p.name for p in (folder / "failed").iterdir()} == bad | {f"{name}.reason.txt" for name in bad}
        assert set(Manifest(folder / "output" / MANIFEST).entries) == {
            name.removeprefix("predictions_") for name in expected
        }
    assert hits >= 10, "the kills must come in the middle of the work"


def _quiet_main(arguments: list[str]) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    sys.exit(main(arguments))


@pytest.mark.slow
def test_workers_of_a_killed_run_end_by_themselves(place, rows, config_path, model_path):
    many = pd.concat([rows.assign(visit_id=rows["visit_id"] + f"-{i}") for i in range(45)])
    for number in range(3):
        put(many, place / f"incoming/{number}.csv")
    arguments = [*options(config_path, model_path), "--jobs", "2"]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "batch_processor.py"), *arguments], cwd=place.parent, stderr=subprocess.DEVNULL
    )
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not workers and time.monotonic() < deadline and run.poll() is None:
        workers = [p for p in psutil.Process(run.pid).children() if "spawn_main" in " ".join(_command(p))]
        time.sleep(0.05)
    time.sleep(1)
    run.kill()
    run.wait()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert main(options(config_path, model_path)) == 0


# ------------------------------------------------------------------------------------------------ the script


def test_the_crontab_line_works_as_it_stands(tmp_path, rows, models_dir, capsys):
    home = tmp_path / "sepsis-risk"
    (home / "data/incoming").mkdir(parents=True)
    for part in (*ROOT.glob("*.py"), *(ROOT / room for room in ("common", "monitoring", "serving"))):
        (home / part.name).symlink_to(part)
    (home / "models").symlink_to(models_dir)
    (home / ".venv").symlink_to(sys.prefix)
    path = put(rows, home / "data/incoming/ward.csv")
    os.utime(path, (time.time() - 60, time.time() - 60))
    with pytest.raises(SystemExit):
        main(["--help"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("5 * * * *"))
    (tmp_path / "settings.env").write_text("SEPSIS_PSEUDONYM_KEY=the-key-of-this-hospital\n")
    command = line.strip().split(" ", 5)[5].replace("/etc/sepsis-risk.env", str(tmp_path / "settings.env"))
    assert "%" not in command  # cron takes it for a line's end
    run = subprocess.run(
        ["/bin/sh", "-c", command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, cwd="/", capture_output=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert (home / "data/batch.log").read_text() == ""  # nothing to tell, no mail
    scored = predictions(home / "data/predictions/predictions_ward.csv")
    assert len(scored) == rows["visit_id"].nunique()
    names = Pseudonyms("the-key-of-this-hospital")  # so that every run's rows can be joined to outcomes
    with contextlib.closing(sqlite3.connect(home / "data/predictions.db")) as log:
        logged = {visit for (visit,) in log.execute("select visit from predictions")}
    assert logged == {names.visit(*key) for key in zip(scored["client"], scored["visit_id"], strict=True)}


def test_a_lost_code_is_told(place, rows, processor, caplog, monkeypatch):
    monkeypatch.setattr(directory.log, "propagate", True)
    put(rows[rows["observation_type_code"] != "HR"], place / "incoming/ward.csv")
    processor.process_directory()
    assert "ward.csv: nearly every visit had these codes in training, none has them here: 'HR'" in caplog.text


@pytest.fixture
def deployed(models_dir, tmp_path):
    """A models directory of the test's own: `deployed(version, medium)` replaces its config."""
    directory = tmp_path / "models"
    shutil.copytree(models_dir, directory)
    config = json.loads((directory / "best_model_config.json").read_text())

    def deploy(version: str, medium: float) -> Path:
        config["model_version"], config["risk_thresholds"] = version, {"medium": medium, "high": 0.999}
        temporary = directory / "new.json"
        temporary.write_text(json.dumps(config))
        return temporary.replace(directory / "best_model_config.json")

    deploy("one", 0.5)
    return deploy


def test_watch_takes_new_files_and_a_new_model(place, rows, deployed, tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(directory.log, "error", lambda text, *values: told.append(text % values))
    config = tmp_path / "models/best_model_config.json"
    processor = BatchProcessor(config, config.with_name("best_model.pkl"), settle_seconds=0)
    stop = threading.Event()
    seen = []

    def once():
        result = processor.process_directory()
        seen.append([file.file for file in result.scored])
        if len(seen) == 1:
            put(rows.head(300), place / "incoming/a.csv")
            config.write_text("{")  # nothing to load: what was there goes on
        elif len(seen) == 3:
            deployed("two", 0.3)
        elif len(seen) == 4:
            stop.set()
        return result

    watch(processor, 0.01, once, stop)
    assert seen == [[], ["a.csv"], [], ["a.csv"]]
    assert len(told) == 1 and "cannot be read as JSON" in told[0] and told[0].endswith("; model one stays in use")
    assert processor.pipeline.model_version == "two"


def test_a_deployment_in_the_middle_of_another_mixes_nothing(place, rows, deployed, tmp_path, monkeypatch):
    put(rows.head(300), place / "incoming/ward.csv")
    config = tmp_path / "models/best_model_config.json"
    processor = BatchProcessor(config, config.with_name("best_model.pkl"), settle_seconds=0)
    deployed("two", 0.9)
    original, made = ProductionPipeline.__init__, []

    def overtaken(self, *arguments):
        original(self, *arguments)
        made.append(self.model_version)
        if made == ["two"]:
            deployed("three", 1e-9)

    monkeypatch.setattr(ProductionPipeline, "__init__", overtaken)
    stop, runs = threading.Event(), []

    def once():
        result = processor.process_directory()
        found = predictions(place / "predictions/predictions_ward.csv")
        runs.append((set(found["model_version"]), set(found["risk_level"])))
        if len(runs) == 2:
            stop.set()
        return result

    watch(processor, 0.01, once, stop)
    assert runs == [({"two"}, {"LOW"}), ({"three"}, {"MEDIUM"})]


@pytest.mark.filterwarnings("ignore::feature_pipeline.UnfinishedSwitchWarning")
def test_a_deployment_that_was_cut_short_is_served_from_the_archive(place, rows, deployed, tmp_path):
    """The model file is a step ahead of the config."""
    put(rows.head(300), place / "incoming/ward.csv")
    models = tmp_path / "models"
    config = json.loads((models / "best_model_config.json").read_text())
    model = (models / "best_model.pkl").read_bytes()
    for version, content in (("one", model), ("next", model + b"-")):
        folder = models / "archive" / version
        folder.mkdir(parents=True)
        (folder / "best_model.pkl").write_bytes(content)
        own = {"model_version": version, "model_sha256": hashlib.sha256(content).hexdigest()}
        (folder / "best_model_config.json").write_text(json.dumps(config | own))
    (models / "best_model.pkl").write_bytes(model + b"-")
    files = models / "best_model_config.json", models / "best_model.pkl"
    assert BatchProcessor(*files, settle_seconds=0).process_directory().ok
    found = predictions(place / "predictions/predictions_ward.csv")
    assert set(found["model_version"]) == {"one"}
    assert_same_scores(found, predict(ProductionPipeline(*files), place / "incoming/ward.csv"))


def test_options_that_make_no_sense(config_path, model_path, place, capsys):
    for extra in (["--chunk-rows", "0"], ["--watch", "-5"], ["--watch", "0"], ["--settle-seconds", "-1"]):
        with pytest.raises(SystemExit) as ended:
            main(options(config_path, model_path) + extra)
        assert ended.value.code == 2 and f"argument {extra[0]}: {extra[1]} is not a number" in capsys.readouterr().err


def test_chunks_report_how_far_they_are(tmp_path, rows):
    path = put(pd.concat([rows] * 20), tmp_path / "long.csv")
    with open(path, "rb") as file:
        chunks = Chunks(file, path.name, path.stat().st_size, 10_000)
        positions = [chunk.position for chunk in chunks]
    assert positions == sorted(positions) and positions[-1] == path.stat().st_size and positions[0] < positions[-1]
