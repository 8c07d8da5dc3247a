"""Observations and labels to snapshots, labels, groups and splits; small examples worked by hand."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings

from common.labels import read_labels
from feature_pipeline import BLOCKS, NO_TIME, BadObservations, SnapshotSettings, block_features, read_observations
from sources.demo_cohort import make_demo_cohort
from training import snapshots as training_data
from training.snapshots import (
    PARTS,
    TEST,
    grouped_folds,
    in_order_of_names,
    load_training_data,
    make_training_data,
    split_parts,
)

START = pd.Timestamp("2024-01-01")


def at(hours: float) -> pd.Timestamp:
    return START + pd.Timedelta(hours=hours)


def observed(visit, hours, client="a", value=80.0) -> list[dict]:
    """Heart rates of one visit at these hours."""
    return [
        {
            "visit_id": visit,
            "client": client,
            "observation_date": at(hour),
            "observation_type_code": "HR",
            "observation_value": value + hour,
        }
        for hour in hours
    ]


def labelled(visit, sepsis, onset=None, client="a") -> dict:
    return {
        "visit_id": visit,
        "client": client,
        "sepsis": sepsis,
        "sepsis_onset": pd.NaT if onset is None else at(onset),
    }


OTHER = observed("other", [0])  # so that both kinds of snapshot are always there
SEPTIC = observed("septic", [0])
BOTH = [labelled("other", 0), labelled("septic", 1, onset=0)]


def made(rows, labels, **snapshot_settings):
    labels = pd.DataFrame(labels)
    return make_training_data(read_observations(rows), read_labels(labels), SnapshotSettings(**snapshot_settings))


def snapshots(data, visit) -> dict[float, int]:
    """Hour since START and label of the snapshots of one visit."""
    rows = data.observations.visit_text[data.visit] == visit
    hours = (data.as_of[rows].astype("datetime64[us]") - START.to_datetime64()) / np.timedelta64(1, "h")
    return dict(zip(hours.tolist(), data.label[rows].tolist(), strict=True))


def of_one_visit(hours, onset, **snapshot_settings):
    """(snapshots of a visit observed at these hours, the data)."""
    rows = [*OTHER, *SEPTIC, *observed("v", hours)]
    data = made(rows, [*BOTH, labelled("v", int(onset is not None), onset)], **snapshot_settings)
    return snapshots(data, "v"), data


# ------------------------------------------------------------------------------------------------ snapshots


@pytest.mark.parametrize(
    ("hours", "expected"),
    [
        ([0, 13], [0, 6, 12]),
        ([0, 12], [0, 6, 12]),  # the end of the visit is inside
        ([0, 11.99], [0, 6]),
        ([2.5, 3, 15], [2.5, 8.5, 14.5]),  # counted from the visit's own first observation
        ([15, 2.5, 3], [2.5, 8.5, 14.5]),  # in whatever order they came
        ([5], [5]),
    ],
)
def test_snapshots_every_six_hours_from_first_to_last_observation(hours, expected):
    assert of_one_visit(hours, onset=None)[0] == dict.fromkeys(expected, 0)


@pytest.mark.parametrize(
    ("onset", "expected"),
    [
        (12, {0: 0, 6: 1, 12: 1}),  # six hours before onset, and at onset itself
        (12.01, {0: 0, 6: 0, 12: 1}),
        (13, {0: 0, 6: 0, 12: 1}),
        (3, {0: 1}),
        (0, {0: 1}),
        (23, {0: 0, 6: 0, 12: 0, 18: 1}),
        (25, {0: 0, 6: 0, 12: 0, 18: 0}),  # onset after the last observation: the visit's end is too early
        (24, {0: 0, 6: 0, 12: 0, 18: 1}),
    ],
)
def test_snapshots_end_at_onset_and_the_horizon_is_inclusive(onset, expected):
    assert of_one_visit(range(21), onset)[0] == expected


def test_snapshots_after_onset_are_positive_where_wanted():
    assert of_one_visit(range(21), 7, after_onset=True)[0] == {0: 0, 6: 1, 12: 1, 18: 1}
    assert of_one_visit(range(21), -3, after_onset=True)[0] == {0: 1, 6: 1, 12: 1, 18: 1}


def test_settings_of_snapshots():
    shown, data = of_one_visit([0, 5], 4, every_hours=2, horizon_hours=3)
    assert shown == {0: 0, 2: 1, 4: 1} and data.settings == SnapshotSettings(2, 3, False)
    assert of_one_visit([0, 0.5], None, every_hours=0.1)[0] == dict.fromkeys([0, 0.1, 0.2, 0.3, 0.4, 0.5], 0)


def test_onset_before_the_first_observation_gives_no_snapshot_and_is_counted():
    shown, data = of_one_visit([1, 2], 0.5)
    assert shown == {}
    assert data.remarks == {"septic visits with onset before their first observation": 1}
    assert data.n_visits == 2


def test_onset_of_a_visit_without_sepsis_counts_for_nothing():
    rows = [*OTHER, *SEPTIC, *observed("v", [0, 12])]
    data = made(rows, [*BOTH, labelled("v", 0, onset=6)])
    assert snapshots(data, "v") == {0: 0, 6: 0, 12: 0}


def test_without_onsets_one_snapshot_at_the_end_and_a_notice():
    rows = [*observed("x", [0, 7, 20]), *observed("y", [3, 4])]
    labels = pd.DataFrame([labelled("x", 1), labelled("y", 0)])
    for table in (labels, labels.drop(columns="sepsis_onset")):
        data = make_training_data(read_observations(rows), read_labels(table), SnapshotSettings())
        assert data.settings.retrospective
        assert snapshots(data, "x") == {20: 1} and snapshots(data, "y") == {4: 0}
        assert data.notices()[0].startswith("RETROSPECTIVE: the labels have no onset times")


def test_notices_name_what_is_synthetic():
    data = of_one_visit([0], None)[1]
    assert not any("synthetic" in line or "RETROSPECTIVE" in line for line in data.notices())
    looking_back = replace(data, synthetic=True, settings=replace(data.settings, retrospective=True)).notices()
    assert "synthetic" in looking_back[0] and "RETROSPECTIVE" in looking_back[1]


@pytest.mark.parametrize(("midnights", "named"), [(4, True), (3, False)])
def test_onsets_that_are_dates_without_a_time_are_named(midnights, named):
    onsets = [24 if k < midnights else 27 for k in range(6)]
    rows = [row for k in range(6) for row in observed(f"v{k}", [0, 12, 30])]
    data = made([*rows, *OTHER], [BOTH[0], *(labelled(f"v{k}", 1, onset) for k, onset in enumerate(onsets))])
    assert any("67% of the onsets are at midnight" in line for line in data.notices()) == named


@settings(max_examples=60, deadline=None)
@given(
    hours=st.lists(st.floats(0, 100).map(lambda h: round(h, 2)), min_size=1, max_size=6),
    onset=st.none() | st.floats(-10, 120).map(lambda h: round(h, 2)),
    every=st.sampled_from((0.5, 1, 6, 24)),
    horizon=st.sampled_from((0, 4, 6)),
    after_onset=st.booleans(),
)
def test_snapshots_agree_with_a_plain_loop(hours, onset, every, horizon, after_onset):
    moment, expected = min(hours), {}
    end = max(hours) if onset is None or after_onset else min(max(hours), onset)
    while round(moment, 6) <= end:
        expected[round(moment, 6)] = int(onset is not None and round(moment, 6) >= round(onset - horizon, 6))
        moment += every
    shown, data = of_one_visit(hours, onset, every_hours=every, horizon_hours=horizon, after_onset=after_onset)
    assert {round(hour, 6): label for hour, label in shown.items()} == expected
    assert (data.as_of <= data.observations.last_time[data.visit]).all()


# --------------------------------------------------------------------------------------------------- labels


def written(table, kind, tmp_path):
    """The table as a frame or as a file of this kind."""
    path = tmp_path / f"labels.{kind}"
    if kind == "frame":
        return table
    table.to_parquet(path, index=False) if kind == "parquet" else table.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("kind", ["frame", "csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("sepsis", [[0, 1], [False, True], ["no", "Yes"], [" 0", "1 "], [0.0, 1.0]])
def test_labels_mean_the_same_in_every_kind_of_file(kind, sepsis, tmp_path):
    table = pd.DataFrame({"visit_id": [1, 2], "client": ["007", "b"], "sepsis": sepsis})
    table["sepsis_onset"] = pd.Series([None, "2024-01-01T02:00:00+02:00"], dtype="str")
    labels = read_labels(written(table, kind, tmp_path))
    assert labels["visit_id"].tolist() == ["1", "2"] and labels["client"].tolist() == ["007", "b"]
    assert labels["sepsis"].tolist() == [0, 1]
    assert labels["sepsis_onset"].tolist() == [NO_TIME, START.value // 1000]


@pytest.mark.parametrize("kind", ["frame", "csv", "parquet"])
def test_a_missing_label_does_not_spoil_the_others(kind, tmp_path):
    table = pd.DataFrame({"visit_id": [1, 2, 3], "client": "a", "sepsis": [0, 1, np.nan]})  # floats, then
    assert read_labels(written(table, kind, tmp_path))["sepsis"].tolist() == [0, 1, -1]


@pytest.mark.parametrize("column", ["visit_id", "client", "sepsis"])
def test_a_missing_column_of_the_labels_is_named(column, tmp_path):
    table = pd.DataFrame(BOTH).drop(columns=column)
    for source in (table, written(table, "csv", tmp_path)):
        with pytest.raises(BadObservations, match=f"missing column '{column}' among 3; expected visit_id"):
            read_labels(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "does not exist"),
        ("none.parquet", None, "does not exist"),
        ("empty.csv", b"", "cannot be read"),
        ("half.parquet", b"PAR1 and no more", "cannot be read"),
        ("plain.csv.gz", b"visit_id,client,sepsis\n", "cannot be read"),
        ("broken.csv.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + 40 * b"\xff", "cannot be read"),
        ("latin.csv", "visit_id,client,sepsis\n1,M\xfcller,0\n".encode("latin-1"), "cannot be read"),
    ],
    ids=lambda part: part if isinstance(part, str) and "." in part else "",
)
def test_labels_that_cannot_be_read(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadObservations, match=message):
        read_labels(tmp_path / name)


@pytest.mark.parametrize("row", ["1,a,1,2024-01-01,", "1,Doe, J,1,2024-01-01"])
def test_a_row_longer_than_the_header_shifts_no_column(row, tmp_path):
    (tmp_path / "l.csv").write_text(f"visit_id,client,sepsis,sepsis_onset\n{row}\n")
    with pytest.raises(BadObservations, match="a row has more fields than the header") as caught:
        read_labels(tmp_path / "l.csv")
    assert "Doe" not in str(caught.value)


def test_labels_of_another_kind_are_refused_without_their_content():
    with pytest.raises(BadObservations, match="must be a file or a frame, not list") as caught:
        load_training_data(pd.DataFrame([*OTHER, *SEPTIC]), BOTH)
    assert "septic" not in str(caught.value)


def test_a_column_of_labels_that_stands_twice_is_refused():
    table = pd.DataFrame(BOTH)
    with pytest.raises(BadObservations, match="a column occurs twice"):
        read_labels(pd.concat([table, table[["client"]]], axis=1))


def test_onsets_that_are_no_dates_are_told_from_onsets_that_are_absent():
    """Day first is no ISO 8601; without an error all visits would be scored at their end."""
    labels = pd.DataFrame(BOTH).astype({"sepsis_onset": object})
    unreadable = labels.assign(sepsis_onset=["", "02/01/2024 20:27"])
    with pytest.raises(BadObservations, match=r"none of the 1 values .* is a date; expected ISO 8601, such as") as e:
        read_labels(unreadable)
    assert "02/01" not in str(e.value)
    not_septic = labels.assign(sepsis_onset=["none", at(0)])
    assert made([*OTHER, *SEPTIC], not_septic).remarks == {}
    rows = [*OTHER, *SEPTIC, *observed("absent", [0]), *observed("unreadable", [0])]
    more = pd.concat([labels, pd.DataFrame([labelled("absent", 1), labelled("unreadable", 1)])])
    more["sepsis_onset"] = [pd.NaT, at(0), None, "13/01/2024"]
    data = made(rows, more)
    assert data.remarks == {"septic visits without an onset": 1, "septic visits whose onset is not a date": 1}
    assert not data.settings.retrospective


def test_an_onset_that_is_no_date_makes_nothing_retrospective():
    labels = pd.DataFrame([*BOTH, labelled("elsewhere", 1, onset=0)]).astype({"sepsis_onset": object})
    labels.loc[1, "sepsis_onset"] = "soon"
    with pytest.raises(BadObservations, match="septic visits whose onset is not a date': 1"):
        made([*OTHER, *SEPTIC], labels)


def test_columns_are_named_where_one_may_be_meant_for_the_onset():
    table = pd.DataFrame(BOTH).rename(columns={"sepsis_onset": "sepsis_time"})
    with pytest.warns(UserWarning, match="no column sepsis_onset; not used: 'sepsis_time'"):
        read_labels(table)
    read_labels(pd.DataFrame(BOTH).assign(ward="x"))  # no warning


def test_what_is_left_out_is_counted():
    rows = [*OTHER, *SEPTIC, *observed("unlabelled", [0]), *observed("odd", [0]), *observed("undated", [0])]
    rows += [{**row, "observation_value": "?"} for row in observed("unusable", [0])]
    labels = [
        *BOTH,
        labelled("absent", 1, onset=3),
        labelled("odd", "maybe"),
        labelled("odd", 2),  # the last label of a visit counts
        labelled("undated", 1),
        labelled("unusable", 1, onset=3),
    ]
    data = made(rows, labels)
    assert data.remarks == {
        "labels that repeat a visit (the last one counts)": 1,
        "labels without observations": 1,
        "visits without a label": 1,
        "labels that are neither 0 nor 1": 1,
        "labelled visits with nothing usable": 1,
        "septic visits without an onset": 1,
    }
    assert data.n_visits == 2


def test_the_last_label_of_a_visit_counts():
    data = made([*OTHER, *SEPTIC, *observed("v", [0])], [*BOTH, labelled("v", 0), labelled("v", 1, onset=1)])
    assert snapshots(data, "v") == {0: 1}


def test_only_one_kind_of_snapshot_is_an_error_that_counts():
    with pytest.raises(BadObservations, match="1 labelled snapshots, 0 of them positive: both kinds are needed"):
        made(OTHER, [BOTH[0]])
    with pytest.raises(BadObservations, match="'labels without observations': 1"):
        made(SEPTIC, [*BOTH])


def test_labels_without_any_row_are_an_error(tmp_path):
    (tmp_path / "labels.csv").write_text("visit_id,client,sepsis,sepsis_onset\n")
    for labels in (tmp_path / "labels.csv", pd.DataFrame(columns=["visit_id", "client", "sepsis"])):
        with pytest.raises(BadObservations, match="both kinds are needed"):
            load_training_data(pd.DataFrame(OTHER), labels)


def test_observations_and_labels_go_together():
    with pytest.raises(BadObservations, match="go together"):
        load_training_data(pd.DataFrame(OTHER), None)
    with pytest.raises(BadObservations, match="go together"):
        load_training_data(None, pd.DataFrame(BOTH))


def test_clients_and_visits_are_texts():
    """Clients 7 and "007" are two; visit 5 of one is not visit 5 of the other; 5, 5.0 and "5" are one visit."""
    rows = [*observed(5, [0], client=7), *observed("5", [0, 12], client="007"), *observed(5.0, [6], client=7)]
    data = made(rows, [labelled("5", 0, client="7"), labelled(5, 1, onset=12, client="007")])
    by_client = {
        client: data.label[data.observations.client_text[data.visit] == client].tolist() for client in ("7", "007")
    }
    assert by_client == {"7": [0, 0], "007": [0, 1, 1]}
    assert data.remarks == {}


def test_the_demo_cohort_where_nothing_is_named(monkeypatch):
    monkeypatch.setattr(training_data, "make_demo_cohort", lambda: make_demo_cohort(n_patients=40, seed=3))
    data = load_training_data()
    assert data.synthetic and not data.settings.retrospective and 0 < data.label.sum() < len(data.label)
    assert data.n_visits == len(make_demo_cohort(n_patients=40, seed=3)[1])


# --------------------------------------------------------------------------------------------------- splits


def cohort_of(visits_of_client, septic_clients):
    """Data of one visit or more for each client; the clients named are septic in their first visit."""
    rows, labels = [], []
    for client, n_visits in enumerate(visits_of_client):
        for number in range(n_visits):
            visit = f"{number}"  # many clients use the same number
            sepsis = number == 0 and client in septic_clients
            rows += observed(visit, [0, 6], client=f"c{client}")
            labels.append(labelled(visit, int(sepsis), onset=8 if sepsis else None, client=f"c{client}"))
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    return made([rows[i] for i in order], labels)


clients = st.integers(30, 50).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 3), min_size=n, max_size=n), st.sets(st.integers(0, n - 1), min_size=6, max_size=n // 2)
    )
)


def assert_no_client_on_both_sides(data, one, other):
    """By the clients of the observations, not by the groups that the splits use."""
    client = data.observations.client_text[data.visit]
    both = set(client[one]) & set(client[other])
    assert not both, f"{len(both)} clients stand on both sides"


def assert_parts_keep_clients_whole(data, seed=0):
    part = split_parts(data, seed=seed)
    for number in range(len(PARTS)):
        assert_no_client_on_both_sides(data, part == number, part != number)


def assert_folds_keep_clients_whole(data, rows, seed=0):
    for train, held_out in grouped_folds(data, rows, 5, seed):
        assert_no_client_on_both_sides(data, train, held_out)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(clients, st.integers(0, 5))
def test_no_client_stands_on_both_sides_of_a_split(shape, seed):
    data = cohort_of(*shape)
    assert data.grouped_by == "client" and not data.notices()
    assert_parts_keep_clients_whole(data, seed)
    part = split_parts(data, seed=seed)
    assert_folds_keep_clients_whole(data, np.flatnonzero(part != TEST), seed)
    assert_folds_keep_clients_whole(data, np.arange(len(data.label)), seed)


def test_the_tests_above_would_see_visits_split_apart(monkeypatch):
    by_visit = lambda observations, visit, label: (pd.factorize(visit)[0], "client")  # noqa: E731
    monkeypatch.setattr(training_data, "_groups", by_visit)
    data = cohort_of([2] * 40, set(range(10)))
    with pytest.raises(AssertionError, match="clients stand on both sides"):
        assert_parts_keep_clients_whole(data)
    with pytest.raises(AssertionError, match="clients stand on both sides"):
        assert_folds_keep_clients_whole(data, np.arange(len(data.label)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(clients, st.integers(0, 5))
def test_each_part_and_each_fold_gets_septic_and_other_snapshots(shape, seed):
    data = cohort_of(*shape)
    part = split_parts(data, seed=seed)
    held_outs = [held_out for _, held_out in grouped_folds(data, np.arange(len(data.label)), 5, seed)]
    for rows in [*(np.flatnonzero(part == number) for number in range(len(PARTS))), *held_outs]:
        assert set(data.label[rows]) == {0, 1}


def test_folds_are_a_partition_of_the_rows():
    data = cohort_of([2] * 40, set(range(10)))
    rows = np.flatnonzero(split_parts(data) != TEST)
    held_outs = []
    for train, held_out in grouped_folds(data, rows, 4):
        assert sorted([*train, *held_out]) == rows.tolist()
        held_outs += held_out.tolist()
    assert sorted(held_outs) == rows.tolist()


def test_parts_have_the_wanted_sizes_and_depend_on_the_seed_alone():
    data = cohort_of([1] * 100, set(range(20)))
    part = split_parts(data, test=0.2, validation=0.1, seed=4)
    assert np.bincount(part[data.as_of == data.as_of.min()]).tolist() == [70, 10, 20]
    assert np.array_equal(part, split_parts(data, test=0.2, validation=0.1, seed=4))
    assert not np.array_equal(part, split_parts(data, test=0.2, validation=0.1, seed=5))


@pytest.mark.parametrize(
    ("n_clients", "n_septic", "grouped_by"), [(30, 6, "client"), (29, 6, "visit"), (30, 5, "visit"), (2, 2, "visit")]
)
def test_too_few_clients_are_grouped_by_visit_and_it_is_said(n_clients, n_septic, grouped_by):
    data = cohort_of([3] * n_clients, set(range(n_septic)))
    assert data.grouped_by == grouped_by
    assert any("Too few clients" in line for line in data.notices()) == (grouped_by == "visit")
    part = split_parts(data)
    visits = [set(data.visit[part == number]) for number in range(len(PARTS))]
    assert sum(map(len, visits)) == len(set.union(*visits))  # a visit stays whole either way


# ------------------------------------------------------------------------------------------------ causality


@pytest.fixture(scope="module")
def hospital(cohort):
    """(observations of 60 visits, their labels), the septic ones among them, and the data made of both."""
    observations, labels = cohort
    chosen = labels.sort_values("sepsis", ascending=False, kind="stable").head(60)
    return observations[observations["visit_id"].isin(chosen["visit_id"])].reset_index(drop=True), chosen


def all_features(data):
    names = [name for block in BLOCKS for name in block_features(block, data.observations.codes)]
    return data.evaluate(names)


def cut_moments(data, rows):
    """One moment of a snapshot for each visit, drawn at random, and that of each of `rows`."""
    as_of = pd.Series(data.as_of).groupby(data.visit).agg(lambda s: s.sample(random_state=len(s)).iloc[0])
    keys = data.observations.visit_text[as_of.index]
    return as_of, rows["visit_id"].astype(str).map(dict(zip(keys, as_of.astype("datetime64[us]"), strict=True)))


def altered(rows):
    """Rows with other values and ranges, at later times."""
    generator = np.random.default_rng(0)
    value = rows["observation_value"] * generator.uniform(0.7, 1.2, len(rows))
    later = rows["observation_date"] + pd.to_timedelta(generator.integers(0, 600, len(rows)), unit="min")
    return rows.assign(observation_value=value, observation_date=later, reference_range_min=np.nan)


@pytest.mark.parametrize("change", [altered, lambda rows: rows.head(0)], ids=["altered", "dropped"])
def test_nothing_after_a_snapshot_changes_its_features_or_its_label(hospital, change):
    observations, labels = hospital
    data = load_training_data(observations, labels)
    cut, moment = cut_moments(data, observations)
    after = observations["observation_date"] > moment
    assert 0.2 < after.mean() < 0.9
    other = pd.concat([observations[~after], change(observations[after])])
    before = data.as_of <= cut.loc[data.visit].to_numpy()

    expected = all_features(data)[before]
    changed = replace(data, observations=in_order_of_names(read_observations(other)))
    assert changed.observations.keys() == data.observations.keys()
    assert np.array_equal(all_features(changed)[before], expected, equal_nan=True)
    # the test sees features that look ahead
    ahead = replace(changed, as_of=data.as_of + 3_600_000_000)
    assert not np.array_equal(all_features(ahead)[before], expected, equal_nan=True)

    def labels_of(data, rows):
        keys = zip(data.visit[rows].tolist(), data.as_of[rows].tolist(), strict=True)
        return dict(zip(keys, data.label[rows].tolist(), strict=True))

    made_anew = load_training_data(other, labels)
    first, second = labels_of(data, before), labels_of(made_anew, slice(None))
    common = first.keys() & second.keys()
    assert len(common) > 0.5 * len(first)
    assert all(first[key] == second[key] for key in common)


# ---------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_changes_with_a_value_a_label_or_a_setting(hospital):
    observations, labels = hospital
    original = load_training_data(observations, labels).fingerprint
    assert load_training_data(observations.copy(), labels.copy()).fingerprint == original

    row = observations.index[observations["observation_type_code"] == "HR"][7]
    moved = observations.copy()
    moved.loc[row, "observation_value"] += 1
    shifted = observations.copy()
    shifted.loc[row, "observation_date"] += pd.Timedelta(seconds=1)
    renamed = observations.copy()
    renamed.loc[row, "observation_type_code"] = "HR2"
    ranged = observations.copy()
    ranged.loc[row, "reference_range_max"] = 101.5
    fewer = observations.drop(index=row)
    for other in (moved, shifted, renamed, ranged, fewer):
        assert load_training_data(other, labels).fingerprint != original

    septic = labels.index[labels["sepsis"] == 1][0]
    late = labels.copy()
    late.loc[septic, "sepsis_onset"] += pd.Timedelta(hours=12)
    healthy = labels.assign(sepsis=labels["sepsis"].where(labels.index != septic, 0))
    other_client = labels.index[-1]
    for other in (late, healthy, labels.drop(index=other_client)):
        assert load_training_data(observations, other).fingerprint != original
    for setting in (SnapshotSettings(5), SnapshotSettings(6, 7), SnapshotSettings(after_onset=True)):
        assert load_training_data(observations, labels, setting).fingerprint != original


def test_neither_fingerprint_nor_split_depends_on_the_order_of_rows(cohort):
    observations, labels = cohort

    def by_visit(data):
        part = split_parts(data)
        return dict(zip(data.observations.visit_text[data.visit], part, strict=True))

    data = load_training_data(observations, labels)
    within = observations.sample(frac=1, random_state=1).sort_values("visit_id", kind="stable")
    whole = observations.sample(frac=1, random_state=2)
    for rows, other_labels in ((observations, labels[::-1]), (within, labels), (whole, labels)):
        other = load_training_data(rows, other_labels)
        assert by_visit(other) == by_visit(data)
        assert other.fingerprint == data.fingerprint
