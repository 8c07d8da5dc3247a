"""The demo cohort is the same everywhere, looks like a hospital's data, and can be learned from."""

import hashlib

import numpy as np
import pandas as pd
import pytest

import prepare_data
from sources.demo_cohort import CODES, DEMO_NOTICE, make_demo_cohort

OBSERVATION_COLUMNS = [
    "visit_id",
    "client",
    "observation_date",
    "observation_type_code",
    "observation_value",
    "reference_range_min",
    "reference_range_max",
]


@pytest.fixture(scope="module")
def cohort():
    return make_demo_cohort()


@pytest.fixture(scope="module")
def observations(cohort):
    return cohort[0]


@pytest.fixture(scope="module")
def visits(cohort):
    """Labels with the first and last observation of each visit."""
    observations, labels = cohort
    span = observations.groupby("visit_id")["observation_date"].agg(["min", "max"])
    return labels.set_index("visit_id").join(span)


def digest(*frames):
    """Over the content in thousandths and minutes, not over any library's way of storing it."""
    content = hashlib.sha256()
    for frame in frames:
        for name, column in frame.items():
            if pd.api.types.is_datetime64_any_dtype(column):
                numbers = column.to_numpy("datetime64[m]").astype("<i8")
            elif pd.api.types.is_numeric_dtype(column):
                numbers = np.nan_to_num(np.round(column.to_numpy(float) * 1000), nan=-1).astype("<i8")
            else:
                numbers = np.frombuffer("\n".join(column).encode(), dtype=np.uint8)
            content.update(name.encode() + numbers.tobytes())
    return content.hexdigest()[:16]


def value_of(observations, code):
    return observations.loc[observations["observation_type_code"] == code, "observation_value"].dropna()


def test_same_content_on_every_machine(cohort):
    # A new digest means a new cohort: every figure that was published for the old one is then out of date.
    assert digest(*cohort) == "3ca80017b7e86585"


def test_same_arguments_same_frames_other_seed_other_frames():
    first, again, other = make_demo_cohort(40, 1), make_demo_cohort(40, 1), make_demo_cohort(40, 2)
    for one, two in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one, two)
    assert not first[0].equals(other[0])


def test_the_script_writes_the_same_frames_of_another_site_or_nothing(tmp_path):
    observations, labels = make_demo_cohort(30, 4)
    one, two = tmp_path / "observations.parquet", tmp_path / "labels.csv"
    assert (
        prepare_data.main(
            ["demo", *f"--patients 30 --seed 4 --client-prefix B- --observations {one} --labels {two}".split()]
        )
        == 0
    )
    observations["client"] = "B-" + observations["client"]
    pd.testing.assert_frame_equal(pd.read_parquet(one), observations)
    assert list(pd.read_csv(two)["sepsis"]) == list(labels["sepsis"])
    with pytest.raises(SystemExit):
        prepare_data.main(["demo", "--observations", str(tmp_path / "a.xlsx"), "--labels", str(tmp_path / "b.csv")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.csv", "observations.parquet"]


def test_notice_says_that_nobody_is_real(observations):
    assert "synthetic" in DEMO_NOTICE
    assert observations["client"].str.fullmatch(r"demo-\d{5}").all()


def test_columns_and_types(cohort):
    observations, labels = cohort
    assert list(observations) == OBSERVATION_COLUMNS
    assert list(labels) == ["visit_id", "client", "sepsis", "sepsis_onset"]
    for frame, column in ((observations, "observation_date"), (labels, "sepsis_onset")):
        assert frame[column].dtype == "datetime64[us]"
    for column in ("observation_value", "reference_range_min", "reference_range_max"):
        assert observations[column].dtype == float
    assert set(observations["observation_type_code"]) == set(CODES)
    assert "NA" in set(observations["observation_type_code"])
    assert observations["observation_date"].dt.year.eq(2024).all()


def test_every_visit_has_a_label_and_one_client(cohort):
    observations, labels = cohort
    assert labels["visit_id"].is_unique
    assert labels["client"].nunique() == 1000
    assert labels["client"].value_counts().max() == 2
    pairs = observations[["visit_id", "client"]].drop_duplicates()
    assert set(pairs.itertuples(index=False, name=None)) == set(
        labels[["visit_id", "client"]].itertuples(index=False, name=None)
    )


def test_visits_of_a_patient_do_not_overlap(visits):
    ordered = visits.sort_values(["client", "min"])
    previous_end = ordered.groupby("client")["max"].shift()
    assert (ordered["min"] > previous_end)[previous_end.notna()].all()


def test_size_and_length_of_visits(observations, visits):
    assert 150 <= len(observations) / len(visits) <= 250
    hours = (visits["max"] - visits["min"]) / pd.Timedelta(hours=1)
    assert hours.between(12, 240).all()


def test_onset_lies_inside_the_stay(visits):
    septic = visits[visits["sepsis"] == 1]
    assert 0.15 <= len(septic) / len(visits) <= 0.25
    assert visits["sepsis_onset"].notna().eq(visits["sepsis"] == 1).all()
    assert (septic["sepsis_onset"] - septic["min"] >= pd.Timedelta(hours=4)).all()
    assert (septic["max"] > septic["sepsis_onset"]).all()


def test_length_of_stay_does_not_tell_sepsis():
    observations, labels = make_demo_cohort(3000, 5)
    span = observations.groupby("visit_id")["observation_date"].agg(["min", "max"])
    rank = (span["max"] - span["min"]).rank()
    septic = labels.set_index("visit_id")["sepsis"].reindex(rank.index) == 1
    n, m = septic.sum(), (~septic).sum()
    roc_auc = (rank[septic].sum() - n * (n + 1) / 2) / (n * m)
    assert abs(roc_auc - 0.5) < 0.05


def test_dirt_of_a_real_feed_is_there_but_little(observations):
    values = observations["observation_value"]
    assert 0 < values.isna().mean() < 0.01
    assert 0 < observations.duplicated().mean() < 0.01
    assert 0 < (value_of(observations, "HR") > 300).mean() < 0.01
    backwards = observations.groupby("visit_id")["observation_date"].diff() < pd.Timedelta(0)
    assert 0 < backwards.mean() < 0.02


def test_units_have_habits_of_their_own(observations):
    assert value_of(observations, "Temp").between(91, 108).any()  # deg F
    assert value_of(observations, "Temp").between(33, 42).any()  # deg C
    by_visit = observations.groupby("visit_id")["observation_type_code"].agg(set)
    assert 0.1 < by_visit.map(lambda codes: "TEMP" in codes).mean() < 0.3
    assert not by_visit.map(lambda codes: {"Temp", "TEMP"} <= codes).any()
    assert 0.2 < by_visit.map(lambda codes: "Lactate" in codes).mean() < 0.7
    ranges = observations[observations["observation_type_code"] == "Creatinine"]
    assert ranges.groupby("reference_range_min").ngroups == 2
    night = observations["observation_date"].dt.hour.isin([0, 1, 2, 3, 4]).mean()
    assert night < 0.8 * 5 / 24


def test_static_codes_stand_once_at_the_start(observations, visits):
    static = observations[observations["observation_type_code"].isin(["Age", "Gender"])].drop_duplicates()
    assert static.groupby("visit_id").size().eq(2).all()
    assert (static["observation_date"].to_numpy() == visits.loc[static["visit_id"], "min"].to_numpy()).all()
    assert value_of(observations, "Age").between(18, 95).all()


def test_pressures_belong_together(observations):
    rounds = observations[observations["observation_type_code"].isin(["SBP", "DBP", "MAP"])].pivot_table(
        index=["visit_id", "observation_date"], columns="observation_type_code", values="observation_value"
    )
    rounds = rounds.dropna()
    assert (rounds["DBP"] < rounds["MAP"]).all() and (rounds["MAP"] < rounds["SBP"]).all()


@pytest.mark.parametrize(("code", "direction"), [("HR", 1), ("Resp", 1), ("SBP", -1), ("MAP", -1)])
def test_physiology_drifts_before_onset_in_many_but_not_all(observations, visits, code, direction):
    rows = observations[observations["observation_type_code"] == code].join(
        visits[["sepsis_onset", "min"]], on="visit_id"
    )
    rows = rows[rows["observation_value"] < 300]
    before = (rows["sepsis_onset"] - rows["observation_date"]) / pd.Timedelta(hours=1)
    value = rows["observation_value"] * direction
    late = value[(before > 0) & (before <= 4)].groupby(rows["visit_id"]).mean()
    early = value[before > 24].groupby(rows["visit_id"]).mean()
    change = (late - early).dropna()
    assert len(change) > 20
    assert change.mean() > 0.3 * value[rows["sepsis_onset"].isna()].std()
    assert (change < 0.1 * value.std()).mean() > 0.05


def test_small_cohorts_work_and_none_is_an_error():
    observations, labels = make_demo_cohort(1, 0)
    assert labels["client"].nunique() == 1 and len(observations) > 20
    with pytest.raises(ValueError, match="n_patients"):
        make_demo_cohort(0)
