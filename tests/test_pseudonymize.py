"""Pseudonyms and shifted dates: nothing of a name or a date is left, features and labels are the same."""

import gzip
import tempfile
import zlib

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings

import prepare_data
from common.pseudonyms import Pseudonyms, pseudonymized
from feature_pipeline import BadConfig, BadObservations, SnapshotSettings, read_observations, resolve_snapshots
from tests.strategies import observations
from tests.test_import_physionet2019 import psv
from training.snapshots import load_training_data

KEY = "a key of more than sixteen letters"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("SEPSIS_PSEUDONYM_KEY", KEY)


def test_features_labels_and_scores_stay_the_same(cohort, cohort_files, pipeline, tmp_path, key):
    assert (
        prepare_data.main(["pseudonymize", *map(str, cohort_files), "--out-dir", str(tmp_path / "out"), "--quiet"]) == 0
    )
    settings = SnapshotSettings()
    before = load_training_data(*map(str, cohort_files), settings)
    after = load_training_data(*(str(tmp_path / "out" / path.name) for path in cohort_files), settings)
    # visits are taken in the order of their names, so the order is another one
    names = Pseudonyms(KEY)
    new_name = [
        f"v{names.visit(client, visit)}"
        for client, visit in zip(before.observations.client_text, before.observations.visit_text, strict=True)
    ]
    one = np.lexsort([before.as_of, np.array(new_name, dtype=str)[before.visit]])
    other = np.lexsort([after.as_of, after.observations.visit_text.astype(str)[after.visit]])
    assert np.array_equal(before.label[one], after.label[other])
    plain = pipeline.evaluate(before.observations, before.visit[one], before.as_of[one])
    hidden = pipeline.evaluate(after.observations, after.visit[other], after.as_of[other])
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(plain, hidden, strict=True))
    shift = (before.as_of[one] - after.as_of[other]) / 86_400_000_000
    assert (shift >= 1).all() and (shift <= 3652).all() and np.array_equal(shift, np.round(shift))
    by_client = pd.Series(shift).groupby(before.observations.client_text[before.visit[one]]).nunique()
    assert (by_client == 1).all() and len(np.unique(shift)) > 100
    text = (tmp_path / "out" / cohort_files[1].name).read_text()
    assert not any(client in text for client in cohort[1]["client"].astype(str))


@st.composite
def dirty_rows(draw):
    """Rows as hospitals' files have them: names of several kinds or none, dates with zones or none at all."""
    row = draw(observations(("HR", "Temp", "WBC", "Creatinine")))
    row["visit_id"] = draw(st.sampled_from(("7", 7, 7.0, " 7", "8", "nan", "NA", "", " ", "\t", None, np.nan, pd.NA)))
    row["client"] = draw(st.sampled_from(("a", "007", 7, "None", "", "  ", None, np.nan, pd.NaT)))
    written = draw(
        st.sampled_from(("%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%d %H:%M:%S.%f+02:00", "%d/%m/%Y %H:%M", "", "1772360000"))
    )
    row["observation_date"] = row["observation_date"].strftime(written)
    row["observation_value"] = draw(st.sampled_from((row["observation_value"], "<0.5", "", "none", "1e99", "370")))
    return row


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(dirty_rows(), min_size=1, max_size=25), as_file=st.booleans())
def test_what_the_reader_makes_of_it_stays_the_same(rows, as_file, pipeline):
    original, names = pd.DataFrame(rows), Pseudonyms(KEY)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEPSIS_PSEUDONYM_KEY", KEY)
        hidden = pseudonymized(original, names)
        if as_file:
            original.to_csv(f"{folder}/rows.csv", index=False)
            assert (
                prepare_data.main(["pseudonymize", f"{folder}/rows.csv", "--out-dir", f"{folder}/out", "--quiet"]) == 0
            )
            original, hidden = f"{folder}/rows.csv", f"{folder}/out/rows.csv"
        try:
            before = read_observations(original)
        except BadObservations as refused:
            with pytest.raises(BadObservations) as also_refused:
                read_observations(hidden)
            assert also_refused.value.set_aside == refused.set_aside
            return
        after = read_observations(hidden)
    assert (after.set_aside, after.remarks) == (before.set_aside, before.remarks)
    named = before.keys()
    assert after.keys() == [(f"c{names.client(c)}", f"v{names.visit(c, v)}") for c, v in named]
    results = [pipeline.evaluate(read, *resolve_snapshots(read)[:2]) for read in (before, after)]
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(*results, strict=True))


def test_lines_with_too_many_fields_are_left_out_and_counted(tmp_path, key, capsys):
    line = "2026-03-01 10:00,HR,80"
    text = f"visit_id,client,observation_date,observation_type_code,observation_value\n1,a,{line},surname\n1,a,{line}\n"
    (tmp_path / "rows.csv").write_text(text)
    assert prepare_data.main(["pseudonymize", str(tmp_path / "rows.csv"), "--out-dir", str(tmp_path / "out")]) == 0
    assert "1 lines with too many fields" in capsys.readouterr().err
    assert "surname" not in (tmp_path / "out/rows.csv").read_text()
    assert read_observations(tmp_path / "out/rows.csv").value.tolist() == [80]


@pytest.mark.parametrize("damage", ["cut", "overwritten", "not gzip"])
def test_a_damaged_file_is_told_in_one_line(damage, cohort, tmp_path, key, capsys):
    whole = gzip.compress(cohort[0].head(300).to_csv(index=False).encode())
    middle = len(whole) // 2
    content = {"cut": whole[:middle], "not gzip": b"visit_id,client\n"}
    content["overwritten"] = whole[:middle] + b"\xff" * 40 + whole[middle + 40 :]
    with pytest.raises((EOFError, zlib.error, gzip.BadGzipFile)):
        gzip.decompress(content[damage])
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(content[damage])
    assert prepare_data.main(["pseudonymize", str(path), "--out-dir", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"{str(path)!r} cannot be read" in told[0] and not (tmp_path / "out").exists()


def test_what_is_not_asked_for_is_left_out(key):
    frame = pd.DataFrame(
        {
            "visit_id": ["1", 1.0, "1"],
            "client": ["a", "a", "b"],
            "observation_date": ["2026-03-01T12:00:00+02:00", "2026-03-01 10:00", "yesterday of Mr X"],
            "observation_type_code": ["NA"] * 3,
            "observation_value": ["<0.5", "", "3"],
            "surname": ["x", "y", "z"],
        }
    )
    out = pseudonymized(frame, Pseudonyms(KEY))
    assert "surname" not in out and out["observation_value"].tolist() == ["<0.5", "", "3"]
    assert out["visit_id"][0] == out["visit_id"][1] != out["visit_id"][2]
    assert out["observation_date"][0] == out["observation_date"][1] and out["observation_date"][2] == "unreadable"
    assert pseudonymized(frame, Pseudonyms(KEY + "x"))["client"][0] != out["client"][0]
    with pytest.raises(BadConfig, match="client"):
        pseudonymized(frame.drop(columns="client"), Pseudonyms(KEY))
    with pytest.raises(BadConfig, match="occurs twice"):
        pseudonymized(pd.concat([frame, frame[["client"]]], axis=1), Pseudonyms(KEY))


def test_the_date_of_a_row_without_a_client_is_left_out(key):
    """It cannot be shifted as the client's other dates are."""
    row = {"visit_id": "1", "client": " ", "observation_date": "2026-03-01", "sepsis_onset": "none of Mr X"}
    assert (
        pseudonymized(pd.DataFrame([row]), Pseudonyms(KEY)).isna()[["observation_date", "sepsis_onset"]].all(axis=None)
    )


@pytest.mark.parametrize(("value", "said"), [(None, "is not set"), ("short", "shorter than")])
def test_without_a_good_key_nothing_is_written(value, said, cohort_files, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SEPSIS_PSEUDONYM_KEY", raising=False)
    if value:
        monkeypatch.setenv("SEPSIS_PSEUDONYM_KEY", value)
    assert prepare_data.main(["pseudonymize", str(cohort_files[1]), "--out-dir", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_original_is_overwritten(cohort_files, key, capsys):
    before = cohort_files[1].read_bytes()
    assert prepare_data.main(["pseudonymize", str(cohort_files[1]), "--out-dir", str(cohort_files[1].parent)]) == 2
    assert "overwritten" in capsys.readouterr().err and cohort_files[1].read_bytes() == before


def test_the_importer_pseudonymizes(tmp_path, key):
    (tmp_path / "training_setA").mkdir()
    (tmp_path / "training_setA" / "p000001.psv").write_text(psv([1, 2, 3], [0, 0, 1], HR=[80, 81, 91.5]))
    frames = {}
    for option in ("", "--pseudonymize"):
        outputs = [tmp_path / f"{kind}{option}.parquet" for kind in ("observations", "labels")]
        names = ["--observations", str(outputs[0]), "--labels", str(outputs[1])]
        arguments = [str(tmp_path / "training_setA"), *names, "--quiet", *([option] if option else [])]
        assert prepare_data.main(["physionet2019", *arguments]) == 0
        frames[option] = [pd.read_parquet(path) for path in outputs]
    plain, hidden = frames.values()
    for before, after in zip(plain, hidden, strict=True):
        assert list(before.columns) == list(after.columns)
        assert not set(before["client"]) & set(after["client"])
        assert not set(before["visit_id"].astype(str)) & set(after["visit_id"])
    days = {
        *(plain[0]["observation_date"] - hidden[0]["observation_date"]),
        *(plain[1]["sepsis_onset"] - hidden[1]["sepsis_onset"]),
    }
    assert len(days) == 1 and hidden[0]["observation_value"].equals(plain[0]["observation_value"])
