"""The importer gives the reference conversion of real files, and bears broken ones."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import prepare_data
from sources import physionet2019 as importer

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("SEPSIS_SHARED_DATA", ROOT.parent / "shared" / "data"))
REFERENCE = SHARED_DATA / "physionet2019"


def psv(hours, labels, **columns):
    """The text of a challenge file; columns not named are not measured."""
    columns = {"Age": 70.5, "Gender": 1, "HospAdmTime": -3.25} | columns
    lines = ["|".join(importer.PSV_COLUMNS)]
    for row, (hour, label) in enumerate(zip(hours, labels, strict=True)):
        fields = columns | {"ICULOS": hour, "SepsisLabel": label}
        values = [fields.get(name, "NaN") for name in importer.PSV_COLUMNS]
        lines.append("|".join(str(value[row] if isinstance(value, list) else value) for value in values))
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Two patients: one without sepsis, one with the label from the first hour on."""
    path = tmp_path / "training_setB"
    path.mkdir()
    (path / "p100001.psv").write_text(psv([1, 2, 3], [0, 0, 0], HR=[80, "NaN", 91.5], Lactate=["NaN", 2, 1]))
    (path / "p100002.psv").write_text(psv([4, 5], [1, 1], HR=[120, 118], Unit1=0, Unit2=1))
    return path


def run(folder, *options, observations="o.csv", labels="l.csv"):
    out = folder.parent
    outputs = ["--observations", str(out / observations), "--labels", str(out / labels)]
    return prepare_data.main(["physionet2019", str(folder), *options, *outputs])


def test_real_sample_equals_the_reference_conversion(tmp_path):
    if not (REFERENCE / "psv_sample").is_dir():
        pytest.skip("the shared PhysioNet 2019 data are not on this machine (SEPSIS_SHARED_DATA names their folder)")
    paths = {name: tmp_path / f"{name}.parquet" for name in ("observations", "labels")}
    status = prepare_data.main(
        [
            "physionet2019",
            *(str(REFERENCE / "psv_sample"), "--client-prefix", "A", "--quiet"),
            *("--observations", str(paths["observations"]), "--labels", str(paths["labels"])),
        ]
    )
    assert status == 0
    for name, path in paths.items():
        written = pd.read_parquet(path)
        expected = pd.read_parquet(
            REFERENCE / f"hospital_A_{name}.parquet", filters=[("visit_id", "in", list(range(1, 61)))]
        )
        assert len(expected) > 0
        pd.testing.assert_frame_equal(written, expected, check_exact=True)


def test_long_format_of_a_small_file(folder):
    patients, failures = importer.read_folders([folder])
    observations, _ = importer.to_frames(patients)
    assert failures == []
    first = observations[observations["visit_id"] == 100001]
    assert list(first["client"].unique()) == ["B100001"]
    first = first.assign(hour=first["observation_date"].dt.hour)
    rows = first[["hour", "observation_type_code", "observation_value"]].itertuples(index=False, name=None)
    assert list(rows) == [
        (1, "HR", 80.0),
        (1, "Age", 70.5),
        (1, "Gender", 1.0),
        (1, "HospAdmTime", -3.25),
        (2, "Lactate", 2.0),
        (3, "HR", 91.5),
        (3, "Lactate", 1.0),
    ]
    ranges = first.groupby("observation_type_code")[["reference_range_min", "reference_range_max"]].first()
    assert tuple(ranges.loc["Lactate"]) == (0.5, 2.0)
    assert np.isnan(ranges.loc["Age"]).all()


def test_onset_is_six_hours_after_the_label_turns(folder):
    (folder / "p100003.psv").write_text(psv([1, 2, 3], [0, 0, 1], HR=75))
    patients, _ = importer.read_folders([folder])
    _, labels = importer.to_frames(patients)
    assert labels["sepsis"].tolist() == [0, 1, 1]
    assert labels["sepsis_onset"].isna().tolist() == [True, False, False]
    assert labels["sepsis_onset"].tolist()[1:] == [
        pd.Timestamp("2019-01-01 10:00"),
        pd.Timestamp("2019-01-01 09:00"),
    ]
    assert labels["first_hour"].tolist() == [1, 4, 1]
    assert labels["last_hour"].tolist() == [3, 5, 3]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p100009.psv", "a|b\n1|2\n", "header"),
        ("p100009.psv", "", "header"),
        ("p100009.psv", psv([1, 2], [0, 0], HR=[80, "fast"]), "line 3, column HR: not a number"),
        ("p100009.psv", psv([1], [0], HR="inf"), "infinite"),
        ("p100009.psv", psv([1], [0]) + "80|90\n", "line 3 has 2 fields"),
        ("p100009.psv", psv([], []), "no rows"),
        ("p100009.psv", psv([2, 1], [0, 0]), "ICULOS"),
        ("p100009.psv", psv([1, 1e15], [0, 1]), "ICULOS"),
        ("p100009.psv", psv([1, 1e300], [0, 1]), "ICULOS"),
        ("p100009.psv", psv([1], ["NaN"]), "SepsisLabel"),
        ("patient9.psv", psv([1], [0]), "file name"),
    ],
)
def test_broken_file_is_named_and_the_others_go_on(folder, capsys, name, text, reason):
    (folder / name).write_text(text)
    assert run(folder, "--quiet") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and reason in line
    assert "fast" not in line
    assert pd.read_csv(folder.parent / "l.csv")["visit_id"].tolist() == [100001, 100002]


def test_nothing_usable_writes_nothing(folder, capsys):
    for path in folder.iterdir():
        path.write_text("broken")
    assert run(folder) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["training_setB"]


def test_failed_write_leaves_the_old_files(folder, monkeypatch):
    (folder.parent / "o.csv").write_text("old")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full_disk)
    assert run(folder, labels="l.parquet") == 2
    assert {path.name for path in folder.parent.iterdir()} == {"training_setB", "o.csv"}
    assert (folder.parent / "o.csv").read_text() == "old"


def test_every_format_holds_the_same(folder):
    texts = {"visit_id": int, "client": str, "observation_type_code": str}
    assert run(folder, "--quiet", observations="o.parquet") == 0
    assert run(folder, "--quiet", observations="o.csv.gz") == 0
    expected = pd.read_parquet(folder.parent / "o.parquet")
    with gzip.open(folder.parent / "o.csv.gz", "rt") as stream:
        read = pd.read_csv(stream, dtype=texts, parse_dates=["observation_date"])
    pd.testing.assert_frame_equal(read, expected)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("training_setA", "A"), ("training_setB", "B"), ("icu", "icu-"), ("setting", "setting-")],
)
def test_prefix_comes_from_the_folder(name, prefix):
    assert importer.default_prefix(Path(name)) == prefix


def test_two_folders_keep_their_patients_apart(folder, tmp_path, capsys):
    second = tmp_path / "training_setA"
    second.mkdir()
    (second / "p100001.psv").write_text(psv([1], [0], HR=70))
    assert run(folder, str(second), "--quiet") == 0
    clients = pd.read_csv(tmp_path / "l.csv")["client"].tolist()
    assert clients == ["B100001", "B100002", "A100001"]
    assert run(folder, str(second), "--client-prefix", "X", "--quiet") == 1
    assert "same client" in capsys.readouterr().err


def test_wrong_arguments_are_told_before_reading(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(folder, observations="o.xlsx")
    assert "must end in .csv" in capsys.readouterr().err
    assert run(folder, observations="l.csv") == 2
    assert run(folder / "missing") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_runs_from_the_shell_with_messages_on_stderr_only(folder):
    command = [sys.executable, str(ROOT / "prepare_data.py"), "physionet2019", str(folder)]
    command += [
        "--observations",
        str(folder.parent / "o.parquet"),
        "--labels",
        str(folder.parent / "l.parquet"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "2 patients (1 septic), 14 observations; 0 inputs failed\n"
