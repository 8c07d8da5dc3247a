"""The reader: whatever form observations come in, the same rows mean the same; dirt is counted, never fatal."""

import gzip
import json
import os
from datetime import UTC, date, datetime, timedelta

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

import feature_pipeline as fp

DEFAULTS = {
    "visit_id": "v",
    "client": "c",
    "observation_date": "2024-01-02T03:04:05",
    "observation_type_code": "X",
    "observation_value": 1.5,
}
HEADER = ",".join(fp.COLUMNS)
ARRAYS = ("group_visit", "group_code", "group_start", "time", "value", "low", "high")


def record(**changes) -> dict:
    return DEFAULTS | changes


def read(*records, **options) -> fp.Observations:
    return fp.read_observations(list(records), **options)


def times(observations: fp.Observations) -> list[str]:
    return [pd.Timestamp(time, unit="us").isoformat() for time in observations.time.tolist()]


def write(path, content: str | bytes):
    """A file with these bytes, compressed where its name says so."""
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def read_csv(folder, *lines: str, header: str = HEADER) -> fp.Observations:
    return fp.read_observations(write(folder / "o.csv", "\n".join([header, *lines]) + "\n"))


def assert_same(a: fp.Observations, b: fp.Observations) -> None:
    """To the last bit."""
    assert a.keys() == b.keys()
    assert a.codes == b.codes
    assert [concept and concept.name for concept in a.concepts] == [concept and concept.name for concept in b.concepts]
    for name in ARRAYS:
        assert getattr(a, name).dtype == getattr(b, name).dtype, name
        assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name in ("low", "high")), name
    assert (a.set_aside, a.set_aside_rows, a.remarks) == (b.set_aside, b.set_aside_rows, b.remarks)


# ----------------------------------------------------------------------------------------- forms of the input


def forms(frame: pd.DataFrame, folder) -> dict[str, fp.Observations]:
    """The same table read from every form that the reader takes."""
    frame.to_csv(folder / "o.csv", index=False)
    frame.to_csv(folder / "o.csv.gz", index=False)
    frame.to_parquet(folder / "o.parquet")
    sources = {
        "csv": folder / "o.csv",
        "csv.gz": folder / "o.csv.gz",
        "parquet": str(folder / "o.parquet"),
        "frame": frame,
        "shuffled index": frame.set_axis(np.zeros(len(frame), dtype=int)),
        "records": json.loads(frame.to_json(orient="records", double_precision=15)) if len(frame) < 5 else None,
        "objects": frame.astype(object).to_dict(orient="records"),
        "other columns": frame[frame.columns[::-1]].assign(ward="x"),
    }
    return {name: fp.read_observations(source) for name, source in sources.items() if source is not None}


def test_sodium_survives_every_form(tmp_path):
    frame = pd.DataFrame([record(observation_type_code="NA", observation_value=140.0, client="NA", visit_id="null")])
    for name, observations in forms(frame, tmp_path).items():
        assert observations.codes == ("NA",), name
        assert observations.concepts[0].name == "sodium", name
        assert observations.keys() == [("NA", "null")], name


def test_clients_with_leading_zeros_stay_apart(tmp_path):
    frame = pd.DataFrame([record(client="007"), record(client="7", visit_id="0012")])
    for name, observations in forms(frame, tmp_path).items():
        assert observations.keys() == [("007", "v"), ("7", "0012")], name


def test_all_forms_give_the_same_observations(tmp_path):
    """More than a thousand rows, hard decimals, gaps, texts among the numbers, known codes and unknown ones."""
    random = np.random.default_rng(5)
    n = 1500
    codes = np.array(["HR", "Temp", "NA", "X", "x", "FiO2", "A b", "é"])[random.integers(0, 8, n)]
    value = random.lognormal(3, 1, n)
    frame = pd.DataFrame(
        {
            "visit_id": random.integers(1, 20, n).astype(str),
            "client": np.array(["7", "007", "NA"])[random.integers(0, 3, n)],
            "observation_date": np.datetime64("2024-01-01", "us") + random.integers(0, 10**12, n),
            "observation_type_code": codes,
            "observation_value": np.where(random.random(n) < 0.1, np.nan, value),
            "reference_range_min": np.where(random.random(n) < 0.3, np.nan, value - random.random(n)),
            "reference_range_max": np.where(random.random(n) < 0.3, np.nan, value + random.random(n) - 0.1),
        }
    )
    for table in (frame, frame.assign(observation_date=frame["observation_date"].astype(str))):
        found = forms(table, tmp_path)
        assert {"no_value", "implausible"} <= set(found["frame"].set_aside)
        for observations in found.values():
            assert_same(observations, found["frame"])


numbers = st.floats(min_value=-1e30, max_value=1e30, width=64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(numbers, min_size=1, max_size=8))
def test_any_decimal_keeps_its_bits_in_csv_and_json(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()
    records = [record(visit_id=str(n), observation_value=value) for n, value in enumerate(values)]
    found = read_csv(folder, *(f"{n},c,2024-01-02T03:04:05,X,{value!r},," for n, value in enumerate(values)))
    assert_same(found, fp.read_observations(records))
    assert_same(found, fp.read_observations(json.loads(json.dumps(records))))
    assert_same(found, fp.read_observations([r | {"observation_value": repr(r["observation_value"])} for r in records]))
    assert_same(found, fp.read_observations(pd.DataFrame(records)))
    assert found.value.tolist() == [value + 0.0 for value in values]


def test_text_among_numbers_changes_no_number(tmp_path):
    """A column with one text arrives as texts."""
    hard = ["0.1", "36.6", "8.41", "1e-7", "123456789.123456789", "5e-324"]
    lines = [f"{n},c,2024-01-01,X,{text},," for n, text in enumerate(hard)]
    assert read_csv(tmp_path, *lines).value.tolist() == [float(text) for text in hard]
    assert read_csv(tmp_path, *lines, "t,c,2024-01-01,X,n/a,,").value.tolist() == [float(text) for text in hard]


@pytest.mark.parametrize(
    "dtype", ["float64", "Float64", "int64", "Int64", "uint8", "object", "str", "category", "float32"]
)
def test_columns_of_any_type(dtype):
    frame = pd.DataFrame([record(observation_value=2), record(observation_value=3, observation_date="2024-01-03")])
    frame["observation_value"] = frame["observation_value"].astype(dtype)
    assert fp.read_observations(frame).value.tolist() == [2, 3]


def test_a_frame_of_categories():
    rows = [record(), record(client="d", observation_date="2024-01-03")]
    assert_same(fp.read_observations(pd.DataFrame(rows).astype("category")), read(*rows))


def test_the_input_is_not_changed():
    frame = pd.DataFrame([record(observation_type_code="Temp", observation_value=100.4, reference_range_max=99.5)])
    before = frame.copy(deep=True)
    fp.read_observations(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_observations_are_given_back_as_they_are():
    observations = read(record())
    assert fp.read_observations(observations) is observations


def test_the_order_of_rows_leaves_the_arrays_the_same():
    rows = [
        record(observation_value=value, observation_date=f"2024-01-0{day}") for day in (3, 1, 2) for value in (2, 1)
    ]
    rows += [rows[0] | {"reference_range_max": 5.0}]
    expected = read(*rows)
    assert_same(read(*rows[::-1]), expected)
    assert expected.value.tolist() == [1, 2, 1, 2, 1, 2, 2]
    assert expected.high.tolist()[5] == 5.0  # ranges before none


# ----------------------------------------------------------------------------------------------------- visits


@pytest.mark.parametrize("number", [7, 7.0, "7", " 7 ", np.int64(7), np.float64(7.0), np.float32(7.0)])
def test_one_visit_number_in_any_dress(number):
    """A column of whole numbers with a gap arrives as floats."""
    assert read(record(visit_id=number, client=number)).keys() == [("7", "7")]
    assert read(record(visit_id="7"), record(visit_id=number)).n_visits == 1
    assert fp.read_observations(pd.DataFrame([record(visit_id=number)])).keys() == [("c", "7")]


def test_one_visit_in_a_column_with_gaps():
    frame = pd.DataFrame([record(visit_id=7), record(visit_id=None), record(visit_id=8)])
    assert frame["visit_id"].dtype == "float64"
    observations = fp.read_observations(frame)
    assert observations.keys() == [("c", "7"), ("c", "8")]
    assert observations.set_aside == {"no_visit": 1}


def test_two_clients_may_use_one_visit_number():
    assert read(record(client="a"), record(client="b"), record(client="a")).keys() == [("a", "v"), ("b", "v")]


def test_joined_identities_do_not_collide():
    pairs = [("1", "11"), ("11", "1"), ("a", "b_c"), ("a_b", "c"), ("", "x")]
    observations = read(*(record(client=client, visit_id=visit) for client, visit in pairs))
    assert observations.keys() == pairs[:4]
    assert observations.set_aside == {"no_client": 1}


def test_visits_stand_in_order_of_first_appearance_even_with_nothing_usable():
    observations = read(
        record(visit_id="z", observation_value="text"),
        record(visit_id=None),
        record(visit_id="m"),
        record(visit_id="a", observation_date=None),
        record(visit_id="z", observation_value=None),
        record(visit_id="a"),
        record(visit_id="q", observation_type_code=""),
    )
    assert observations.keys() == [("c", "z"), ("c", "m"), ("c", "a"), ("c", "q")]
    assert observations.visit_id.tolist() == ["z", "m", "a", "q"]
    none = fp.NO_TIME
    assert [time == none for time in observations.first_time] == [True, False, False, True]
    assert [time == none for time in observations.last_time] == [True, False, False, True]
    plan = fp.FeaturePlan(["X__last", "X__count", "context__hours"])
    found = plan.evaluate(observations, np.arange(4), observations.last_time)
    assert np.isnan(found[[0, 3]]).all()
    assert found[[1, 2]].tolist() == [[1.5, 1, 0]] * 2


def test_first_and_last_time_are_over_all_codes():
    observations = read(
        record(observation_type_code="B", observation_date="2024-01-03"),
        record(observation_type_code="A", observation_date="2024-01-02"),
        record(observation_type_code="A", observation_date="2024-01-05", observation_value="n/a"),
        record(observation_type_code="C", observation_date="2024-01-01"),
    )
    first_and_last = [observations.first_time[0], observations.last_time[0]]
    assert [pd.Timestamp(time, unit="us").isoformat()[:10] for time in first_and_last] == ["2024-01-01", "2024-01-03"]


# ------------------------------------------------------------------------------------------------------ dates

DATES = {
    "2024-01-02T03:04:05": "2024-01-02T03:04:05",
    "2024-01-02 03:04:05": "2024-01-02T03:04:05",
    "2024-01-02T03:04": "2024-01-02T03:04:00",
    "2024-01-02": "2024-01-02T00:00:00",
    "20240102T030405": "2024-01-02T03:04:05",
    "2024-01-02T03:04:05Z": "2024-01-02T03:04:05",
    "2024-01-02T03:04:05+02:00": "2024-01-02T01:04:05",
    "2024-01-02 03:04:05+0200": "2024-01-02T01:04:05",
    "2024-01-01T23:30:00-05:00": "2024-01-02T04:30:00",
    "2024-01-02T03:04:05.5": "2024-01-02T03:04:05.500000",
    "2024-01-02T03:04:05.123456Z": "2024-01-02T03:04:05.123456",
    "2024-01-02T03:04:05.123456789": "2024-01-02T03:04:05.123456",
    " 2024-01-02T03:04:05": "2024-01-02T03:04:05",
    "2024-01-02T03:04:05 ": "2024-01-02T03:04:05",
    "1900-01-01": "1900-01-01T00:00:00",
    "2299-12-31T23:59:59.999999": "2299-12-31T23:59:59.999999",
}
NO_DATES = [
    "01/02/2024",
    "2 Jan 2024",
    "January 2, 2024",
    "2024",
    "2024-01",
    "1704067200",
    "1704067200000",
    "20240102.0",
]
NO_DATES += [
    "45293.5",
    "2024-13-01",
    "2024-02-30",
    "2024-01-02T25:00",
    "yesterday",
    "now",
    "today",
    "text",
    "NaT",
    "nan",
]
NO_DATES += ["1899-12-31", "2300-01-01", "0024-01-02", "03:04:05", "1e9", "<2024-01-02", "2024-01-02T03:04:05+99:00"]
NO_DATES += [2024, 1704067200, 1704067200.0, 45293.5, True, np.int64(2024), np.int64(1704067200)]


@pytest.mark.parametrize(("text", "expected"), DATES.items())
def test_dates(text, expected, tmp_path):
    assert times(read(record(observation_date=text))) == [expected]
    assert times(read_csv(tmp_path, f"v,c,{text},X,1,,")) == [expected]


def test_all_dates_in_one_column(tmp_path):
    rows = [record(visit_id=n, observation_date=text) for n, text in enumerate(DATES)]
    assert times(read(*rows)) == list(DATES.values())
    lines = [f"{n},c,{text},X,1,," for n, text in enumerate(DATES)]
    assert times(read_csv(tmp_path, *lines)) == list(DATES.values())


@pytest.mark.parametrize("cell", NO_DATES)
def test_what_is_no_date(cell):
    observations = read(record(observation_date=cell), record(visit_id="w"))
    assert observations.set_aside == {"bad_date": 1}
    assert observations.set_aside_rows == {"bad_date": [0]}
    assert times(observations) == ["2024-01-02T03:04:05"]


@pytest.mark.parametrize("cell", [1704067200, 1704067200000000, 45293.5])
def test_a_column_of_numbers_holds_no_date(cell):
    """As in records: a number may be an epoch in any unit, so it is not guessed."""
    frame = pd.DataFrame([record(observation_date=cell), record(observation_date=cell)])
    with pytest.raises(fp.BadObservations) as caught:
        fp.read_observations(frame).check_usable()
    assert caught.value.set_aside == {"bad_date": 2}


def test_a_basic_date_is_the_same_as_a_number(tmp_path):
    """In a csv nothing tells the text 20240102 from the number."""
    expected = read(record(observation_date="20240102"))
    assert times(expected) == ["2024-01-02T00:00:00"]
    for cell in (20240102, np.int64(20240102)):
        assert_same(read(record(observation_date=cell)), expected)
        assert_same(fp.read_observations(pd.DataFrame([record(observation_date=cell)])), expected)
    assert_same(read_csv(tmp_path, "v,c,20240102,X,1.5,,"), expected)


@pytest.mark.parametrize("cell", [None, "", float("nan"), pd.NaT, pd.NA])
def test_an_empty_date(cell):
    assert read(record(observation_date=cell), record()).set_aside == {"no_date": 1}


def test_good_and_bad_dates_in_one_column():
    cells = ["2024-01-02T03:04:05+02:00", "01/02/2024", "2024-01-02", None, 5, "2024-01-02T03:04:05.25", "2024"]
    observations = read(*(record(visit_id=n, observation_date=cell) for n, cell in enumerate(cells)))
    assert observations.set_aside == {"no_date": 1, "bad_date": 3}
    assert observations.set_aside_rows == {"no_date": [3], "bad_date": [1, 4, 6]}
    assert times(observations) == ["2024-01-02T01:04:05", "2024-01-02T00:00:00", "2024-01-02T03:04:05.250000"]


ODD_DATES = [
    " 2024-01-05T10:00 ",
    "2024-01-05T10:00:00Z",
    "2024-01-05T10:00:00+02:00",
    "2024-01-05 10:00:00.1234567",
    "2024-02-30 10:00:00",
    "2024-01-05",
    "20240105",
    "2024-01",
    "yesterday",
    "",
    "  ",
    None,
]


@pytest.mark.parametrize("odd", [[], ODD_DATES[:3], ODD_DATES])
def test_a_date_means_the_same_among_few_and_many(odd):
    plain = pd.date_range("2024-03-01", periods=fp._LONG, freq="7min").strftime("%Y-%m-%d %H:%M:%S").tolist()
    cells = plain + odd
    alone = [fp.parse_times([cell]) for cell in cells]
    for column in (pd.Series(cells, dtype="str"), pd.Series(cells, dtype=object), cells):
        micros, empty = fp.parse_times(column)
        assert micros.tolist() == [time[0] for time, _ in alone]
        assert empty.tolist() == [was_empty[0] for _, was_empty in alone]


def test_dates_as_python_and_pandas_have_them():
    cells = [
        datetime(2024, 1, 2, 3, 4, 5),
        datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC),
        pd.Timestamp("2024-01-02T04:04:05", tz="Europe/Vienna"),
        np.datetime64("2024-01-02T03:04:05"),
        pd.Timestamp("2024-01-02T03:04:05"),
    ]
    observations = read(*(record(visit_id=n, observation_date=cell) for n, cell in enumerate(cells)))
    assert times(observations) == ["2024-01-02T03:04:05"] * len(cells)
    assert read(record(), record(observation_date=np.datetime64("NaT"))).set_aside == {"no_date": 1}
    assert times(read(record(observation_date=date(2024, 1, 2)))) == ["2024-01-02T00:00:00"]


@pytest.mark.parametrize("dtype", ["datetime64[s]", "datetime64[ms]", "datetime64[us]", "datetime64[ns]"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata"])
def test_dates_of_every_unit_and_zone(dtype, zone):
    moments = pd.Series(["2024-01-02T03:04:05", None]).astype(dtype)
    if zone:
        moments = moments.dt.tz_localize("UTC").dt.tz_convert(zone)
    observations = fp.read_observations(pd.DataFrame([record(), record()]).assign(observation_date=moments))
    assert times(observations) == ["2024-01-02T03:04:05"]
    assert observations.set_aside == {"no_date": 1}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.datetimes(datetime(1900, 1, 2), datetime(2299, 12, 30)),
    st.integers(-14 * 60, 14 * 60),
    st.sampled_from(["T", " "]),
)
def test_a_zone_is_converted_to_utc(moment, minutes, separator):
    sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
    zoned = f"{moment.isoformat(separator)}{sign}{hours:02d}:{rest:02d}"
    expected = (moment - datetime(1970, 1, 1) - timedelta(minutes=minutes)) // timedelta(microseconds=1)
    assert read(record(observation_date=zoned)).time.tolist() == [expected]


# ----------------------------------------------------------------------------------------------------- values

NUMBERS = {
    "<0.5": 0.5,
    ">200": 200,
    "> 200": 200,
    "<=0.5": 0.5,
    "≥ 3": 3,
    " 7.5 ": 7.5,
    "+7.5": 7.5,
    "-7.5": -7.5,
    "7.": 7,
    ".5": 0.5,
    "1e3": 1000,
    "007": 7,
    "-0.0": 0.0,
}
NOT_NUMBERS = [
    "1_000",
    "nan",
    "NaN",
    "text",
    "n/a",
    "7,5",
    "1,000",
    "0x10",
    "12 mg",
    "<",
    "--5",
    "True",
    "5/6",
    "1e",
    "½",
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS.items())
@pytest.mark.parametrize("others", [0, 1200])
def test_numbers_in_texts(text, expected, others):
    rows = [record(visit_id="other", observation_value=f"{n}.25") for n in range(others)]
    observations = read(record(observation_value=text), *rows)
    assert observations.set_aside == {}
    assert observations.value[0] == expected
    assert not np.signbit(observations.value[0]) or expected < 0


@pytest.mark.parametrize(("text", "expected"), NUMBERS.items())
def test_numbers_in_csv(text, expected, tmp_path):
    for others in ([], ["w,c,2024-01-01,X,1.25,,"], ["w,c,2024-01-01,X,text,,"]):
        observations = read_csv(tmp_path, f"v,c,2024-01-01,X,{text},,", *others)
        assert observations.value[0] == expected


@pytest.mark.parametrize("cell", [*NOT_NUMBERS, True, False, np.True_, [1], {"value": 1}, datetime(2024, 1, 1), 1j])
@pytest.mark.parametrize("others", [1, 1200])
def test_what_is_no_number(cell, others):
    rows = [record(visit_id="w", observation_value=float(n)) for n in range(others)]
    observations = read(record(observation_value=cell), *rows)
    assert observations.set_aside == {"bad_value": 1}
    assert len(observations.value) == others


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_no_number_in_csv(text, tmp_path):
    observations = read_csv(tmp_path, "v,c,2024-01-01,X,1.5,,", f'v,c,2024-01-01,X,"{text}",,')
    assert observations.set_aside == {"bad_value": 1}
    assert observations.value.tolist() == [1.5]


@pytest.mark.parametrize("cell", ["inf", "-inf", "Infinity", ">inf", float("inf"), -np.inf, "1e999"])
def test_infinite_values(cell):
    assert read(record(observation_value=cell), record()).set_aside == {"infinite": 1}


@pytest.mark.parametrize("text", ["inf", "-inf", "Infinity", "1e999"])
def test_infinite_values_in_csv(text, tmp_path):
    observations = read_csv(tmp_path, "v,c,2024-01-01,X,1.5,,", f"v,c,2024-01-01,X,{text},,")
    assert observations.set_aside == {"infinite": 1}


@pytest.mark.parametrize("cell", [None, "", float("nan"), np.nan, pd.NA])
@pytest.mark.parametrize("others", [1, 1200])
def test_empty_values(cell, others):
    rows = [record(visit_id="w", observation_value=str(n)) for n in range(others)]
    assert read(record(observation_value=cell), *rows).set_aside == {"no_value": 1}


def test_every_reason_is_counted_once_a_row_in_order():
    observations = read(
        record(),
        record(visit_id=None, client=None),
        record(client=" "),
        record(observation_type_code=None, observation_date=None),
        record(client="M\ufffdller", observation_date=None),
        record(observation_date="", observation_value="text"),
        record(observation_date="soon", observation_value=None),
        record(observation_date="2299-01-01", observation_value=None),
        record(observation_value=""),
        record(observation_value="text"),
        record(observation_value="inf"),
        record(observation_type_code="HR", observation_value=4000, unit="furlongs"),
        record(observation_type_code="HR", observation_value=4000),
        "not a record",
        now=fp.to_micros("2024-02-01"),
    )
    assert set(observations.set_aside) == set(fp.SET_ASIDE_REASONS)
    assert set(observations.set_aside.values()) == {1}
    assert {reason: rows for reason, rows in observations.set_aside_rows.items() if reason != "malformed"} == {
        reason: [n + 1] for n, reason in enumerate(list(fp.SET_ASIDE_REASONS)[1:])
    }


def test_the_rows_named_are_the_first_few():
    observations = read(record(), *(record(observation_value="text") for _ in range(9)))
    assert observations.set_aside == {"bad_value": 9}
    assert observations.set_aside_rows == {"bad_value": [1, 2, 3, 4, 5]}


@pytest.mark.parametrize("column", fp.REQUIRED_COLUMNS)
@pytest.mark.parametrize("cell", [[1], {"a": 1}, {1}])
def test_a_cell_that_is_a_list_or_an_object_never_stops_the_other_rows(column, cell):
    observations = read(record(observation_value=2.5), record(**{column: cell}))
    assert 2.5 in observations.value[observations.group_start[:-1]]
    assert len(observations.value) + sum(observations.set_aside.values()) == 2


# --------------------------------------------------------------------------------- duplicates, limits, ranges


def test_exact_duplicates_count_once():
    twice = [record(), record(), record(observation_value="1.5"), record(observation_date="2024-01-02 05:04:05+02:00")]
    observations = read(*twice, record(observation_value=1.6), record(reference_range_max=2), record(visit_id="w"))
    assert observations.value.tolist() == [1.5, 1.5, 1.6, 1.5]
    assert observations.remarks == {"duplicate": 3}


def test_impossible_values_are_set_aside():
    observations = read(
        record(observation_type_code="Temp", observation_value=370),
        record(observation_type_code="temperature", observation_value=37),
        record(observation_type_code="8867-4", observation_value=9.99),
        record(observation_type_code="HR", observation_value=350),
        record(observation_type_code="O2Sat", observation_value=100.1),
    )
    assert observations.set_aside == {"implausible": 3}
    assert observations.set_aside_rows == {"implausible": [0, 2, 4]}
    assert sorted(observations.value.tolist()) == [37, 350]


def test_unknown_codes_have_no_limits():
    assert read(record(observation_value=1e30), record(observation_value=-1e30)).value.tolist() == [-1e30, 1e30]


def test_numbers_too_large_to_compute_with_count_as_infinite():
    observations = read(record(observation_value=2.0), record(observation_value=1e31))
    assert observations.value.tolist() == [2.0]
    assert observations.set_aside == {"infinite": 1}


@pytest.mark.parametrize("concept", fp.CONCEPTS, ids=lambda concept: concept.name)
def test_limits_of_each_concept_are_allowed(concept):
    code = concept.codes.split(",")[0]
    for limit, beyond in ((concept.low, -np.inf), (concept.high, np.inf)):
        if np.isfinite(limit):
            past = np.nextafter(limit, beyond)
            values = [record(observation_type_code=code, observation_value=float(v)) for v in (limit, past)]
            observations = read(*values)
            assert observations.value.tolist() == [limit]
            assert observations.set_aside == {"implausible": 1}


def test_each_synonym_names_one_concept():
    for concept in fp.CONCEPTS:
        for text in (*concept.codes.split(","), *",".join(concept.coded_in.values()).split(","), concept.name):
            assert not text or fp.concept_of(text) is concept, text


@pytest.mark.parametrize("code", ["Temp", "TEMP", "temperature", "8310-5", "body_temperature", "Body Temperature"])
def test_synonyms_in_any_spelling(code):
    observations = read(record(observation_type_code=code, observation_value=37))
    assert observations.concepts[0].name == "temperature"
    assert observations.codes == (code,)  # as given


def test_own_synonyms_come_first():
    row = record(observation_type_code="HR", observation_value=8)
    assert read(row, record()).set_aside == {"implausible": 1}
    assert read(row, record(), codes={"HR": "respiratory_rate"}).set_aside == {}


def test_own_synonyms_bring_limits():
    rows = [record(observation_type_code="Körper", observation_value=value) for value in (370, 37)]
    assert read(*rows).set_aside == {}
    assert read(*rows, codes={"Körper": "temperature"}).set_aside == {"implausible": 1}
    with pytest.raises(fp.BadConfig, match="'warmth'"):
        read(*rows, codes={"Körper": "warmth"})


@pytest.mark.parametrize(
    ("code", "value", "expected"),
    [
        ("Temp", 100.4, 38.0),
        ("8310-5", "98.6", 37.0),
        ("Temp", 77, 25.0),
        ("Temp", 113, 45.0),
        ("Temp", 38, 38.0),
        ("Temp", 45, 45.0),
        ("FiO2", 21, 0.21),
        ("FiO2", 100, 1.0),
        ("FiO2", 0.21, 0.21),
        ("FiO2", 1, 1.0),
    ],
)
def test_units_told_by_their_numbers(code, value, expected):
    observations = read(record(observation_type_code=code, observation_value=value))
    assert observations.value.tolist() == [expected]
    assert observations.remarks == ({"unit_converted": 1} if float(value) != expected else {})


@pytest.mark.parametrize(("code", "value"), [("Temp", 60), ("Temp", 113.1), ("Temp", 76.9), ("FiO2", 5), ("FiO2", 101)])
def test_numbers_that_tell_no_unit_are_implausible(code, value):
    assert read(record(observation_type_code=code, observation_value=value), record()).set_aside == {"implausible": 1}


def test_a_range_is_converted_with_its_value():
    fahrenheit = {"reference_range_min": 95, "reference_range_max": 100.4}
    rows = [record(observation_type_code="Temp", observation_value=101.3) | fahrenheit]
    rows += [record(observation_type_code="Temp", observation_value=37, reference_range_min=36, reference_range_max=38)]
    rows += [record(observation_value=101.3) | fahrenheit]  # an unknown code stays
    observations = read(*rows)
    assert observations.value.tolist() == [37, 38.5, 101.3]
    assert observations.low.tolist() == [36, 35, 95]
    assert observations.high.tolist() == [38, 38, 100.4]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 2, (1, 2)),
        ("1", " 2 ", (1, 2)),
        (None, 2, (None, 2)),
        (1, "", (1, None)),
        (None, None, (None, None)),
        ("text", 2, (None, 2)),
        (2, 1, (None, None)),
        (2, 2, (None, None)),
        (float("-inf"), 2, (None, 2)),
        (1, float("inf"), (1, None)),
    ],
)
def test_ranges(low, high, expected):
    observations = read(record(reference_range_min=low, reference_range_max=high))
    found = (float(observations.low[0]), float(observations.high[0]))
    assert tuple(None if np.isnan(bound) else bound for bound in found) == expected
    assert observations.set_aside == {}
    inverted = {"range_ignored": 1} if (low, high) in ((2, 1), (2, 2)) else {}
    assert observations.remarks == inverted


def test_range_columns_may_be_absent_or_empty(tmp_path):
    expected = read(record(observation_date="2024-01-01"))
    assert_same(read_csv(tmp_path, "v,c,2024-01-01,X,1.5", header=",".join(fp.REQUIRED_COLUMNS)), expected)
    assert_same(read_csv(tmp_path, "v,c,2024-01-01,X,1.5,,"), expected)
    only_max = [*fp.REQUIRED_COLUMNS, "reference_range_max"]
    assert read_csv(tmp_path, "v,c,2024-01-01,X,1.5,9", header=",".join(only_max)).high.tolist() == [9]


# ------------------------------------------------------------------------------------------------ broken files

EXPECTED = ", ".join(fp.COLUMNS)


def refusal(source) -> str:
    with pytest.raises(fp.BadObservations) as caught:
        fp.read_observations(source).check_usable()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize("column", fp.REQUIRED_COLUMNS)
def test_a_missing_column_is_named(column, tmp_path):
    frame = pd.DataFrame([record()]).drop(columns=column)
    frame.to_parquet(tmp_path / "o.parquet")
    frame.to_csv(tmp_path / "o.csv", index=False)
    sources = [frame, frame.to_dict(orient="records"), tmp_path / "o.parquet", tmp_path / "o.csv"]
    for source in sources:
        message = refusal(source)
        assert f"missing column '{column}';" in message
        assert EXPECTED in message
    assert "o.csv" in message


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_guessed_at(separator, tmp_path):
    lines = f"{HEADER}\nv,c,2024-01-01,X,1.5,,\n".replace(",", separator)
    assert "comma" in refusal(write(tmp_path / "o.csv", lines))


@pytest.mark.parametrize("name", ["o.csv", "o.csv.gz"])
@pytest.mark.parametrize("content", ["", "\n", "\n\n\n"])
def test_an_empty_file(name, content, tmp_path):
    message = refusal(write(tmp_path / name, content))
    assert "is empty" in message and EXPECTED in message


def test_a_header_alone(tmp_path):
    assert "no usable observation in 0 rows" in refusal(write(tmp_path / "o.csv", HEADER + "\n"))
    assert "no usable observation in 0 rows" in refusal(write(tmp_path / "o.csv", HEADER))
    empty = pd.DataFrame([record()]).iloc[:0]
    assert "no usable observation in 0 rows" in refusal(empty)
    assert "no usable observation in 0 rows" in refusal(pd.DataFrame(columns=list(fp.COLUMNS)))
    empty.to_parquet(tmp_path / "o.parquet")
    assert "no usable observation in 0 rows" in refusal(tmp_path / "o.parquet")


def test_no_records():
    assert refusal([])
    assert refusal([None, 3, "text"])
    assert refusal([{}])


@pytest.mark.parametrize("name", ["o.csv", "o.csv.gz", "o.parquet"])
def test_junk(name, tmp_path):
    for junk in (bytes(range(256)) * 20, b"\x00" * 100, b"PAR1", b"\x1f\x8b\x08", "Ä;ö".encode("utf-16"), b'"' * 9):
        (tmp_path / name).write_bytes(junk)
        assert name in refusal(tmp_path / name)


def test_a_file_cut_off_or_damaged(tmp_path):
    """Half a gzip, a flipped byte anywhere: refused, or read in full where the damage is in the file's header."""
    lines = "".join(f"v,c,2024-01-01T00:00:00.{n:06d},X,{n * 0.37},,\n" for n in range(2000))
    path = write(tmp_path / "o.csv.gz", f"{HEADER}\n{lines}")
    whole = path.read_bytes()
    for keep in (len(whole) // 2, len(whole) - 4, 15):
        path.write_bytes(whole[:keep])
        assert "o.csv.gz" in refusal(path)
    for place in (12, 20, len(whole) // 3, len(whole) // 2, len(whole) - 6):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        assert "o.csv.gz" in refusal(path)
    frame = pd.DataFrame([record()])
    frame.to_parquet(tmp_path / "o.parquet")
    content = (tmp_path / "o.parquet").read_bytes()
    (tmp_path / "o.parquet").write_bytes(content[: len(content) // 2])
    assert "o.parquet" in refusal(tmp_path / "o.parquet")


def test_what_is_no_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.csv")
    assert "does not exist" in refusal(tmp_path / "none.parquet")
    assert "expected .csv, .csv.gz or .parquet" in refusal(write(tmp_path / "o.xlsx", "x"))
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.csv")
    assert refusal(5)
    assert refusal({"visit_id": 1})


def test_a_byte_order_mark(tmp_path):
    content = f"{HEADER}\nv,c,2024-01-01,X,1.5,,\n"
    for encoding in ("utf-8", "utf-8-sig"):
        assert fp.read_observations(write(tmp_path / "o.csv", content.encode(encoding))).keys() == [("c", "v")]
        assert fp.read_observations(write(tmp_path / "o.csv.gz", content.encode(encoding))).keys() == [("c", "v")]


@pytest.mark.parametrize("column", ["visit_id", "client", "observation_type_code"])
@pytest.mark.parametrize("others", [1, 1200])
def test_bytes_that_are_no_utf8_merge_no_two_patients_and_stop_no_other_row(column, others, tmp_path):
    """Two names that differ in such a byte alone would look the same."""
    rows = [record(visit_id=n) for n in range(others)]
    rows += [record(**{column: name}) for name in ("M\xfcller", "M\xf6ller")]
    lines = [",".join(str(row[name]) for name in fp.REQUIRED_COLUMNS) for row in rows]
    content = "\n".join([",".join(fp.REQUIRED_COLUMNS), *lines])
    observations = fp.read_observations(write(tmp_path / "o.csv", content.encode("latin-1")))
    assert observations.set_aside == {"not_utf8": 2}
    assert observations.set_aside_rows == {"not_utf8": [others, others + 1]}
    assert len(observations.value) == others
    assert not any("\ufffd" in text for key in observations.keys() for text in key)  # noqa: SIM118 (a method)
    whole = fp.read_observations(write(tmp_path / "o.csv", content))
    assert len(whole.value) == others + 2 and not whole.set_aside


@pytest.mark.filterwarnings("ignore::feature_pipeline.MissingCodesWarning")
def test_half_a_character_sets_its_row_aside(pipeline):
    """JSON may hold half of a surrogate pair, which no file and no answer can."""
    rows = [record(observation_type_code="HR", observation_value=80), record(client=json.loads(r'"\ud83d"'))]
    with pytest.warns(fp.SetAsideWarning, match="not UTF-8"):
        scores = pipeline.predict(rows)
    assert scores["client"].tolist() == ["c"] and scores["sepsis_probability"].notna().all()


@pytest.mark.parametrize("column", ["visit_id", "client", "observation_type_code"])
def test_whole_numbers_with_a_gap_mean_the_same_in_every_form(column, tmp_path):
    """A gap makes pandas keep whole numbers as floats, and write them with their .0."""
    frame = pd.DataFrame([record(**{column: n}) for n in (7, None, 1234567)])
    frame.to_csv(tmp_path / "o.csv", index=False)
    frame.to_parquet(tmp_path / "o.parquet")
    assert "7.0" in (tmp_path / "o.csv").read_text()
    sources = [frame, tmp_path / "o.csv", tmp_path / "o.parquet", frame.to_dict("records")]
    for read_again in map(fp.read_observations, sources):
        assert_same(read_again, fp.read_observations(frame))
    texts = ["7.0", "7", "07.0", "7.00", "-7.0", "0.0", "0", "v.0", "7.5"]
    assert fp.text_places(texts)[1] == ["7", "07.0", "7.00", "-7", "0", "v.0", "7.5"]


def test_bounds_that_no_value_can_reach_are_none():
    observations = read(*(record(reference_range_min=-b, reference_range_max=b) for b in (1.7e308, 1e31, 1e30)))
    assert np.isnan(observations.low).tolist() == [False, True] and observations.high[0] == 1e30
    assert observations.remarks == {"duplicate": 1}


@pytest.mark.parametrize("newline", ["\r\n", "\r", "\n", "\n\n"])
def test_line_ends(newline, tmp_path):
    lines = [HEADER, "v,c,2024-01-01,X,1.5,,", "v,c,2024-01-02,X,2.5,,", ""]
    assert fp.read_observations(write(tmp_path / "o.csv", newline.join(lines))).value.tolist() == [1.5, 2.5]


def test_quotes(tmp_path):
    observations = read_csv(tmp_path, '"v","c, d","2024-01-01","X ""y""","1.5","",""')
    assert observations.keys() == [("c, d", "v")]
    assert observations.codes == ('X "y"',)


GOOD = ["v,c,2024-01-01,X,1.5,,", "v,c,2024-01-02,X,2.5,,"]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "long", ["v,c,2024-01-03,X,1,000,,,", "v,c,2024-01-03,X,3.5,,,,,", "v,c,2024-01-03,X,3.5,,,,9,9,9"]
)
def test_lines_with_too_many_fields_are_malformed(place, long, tmp_path):
    """No field can be trusted there: ``1,000`` would be a value of 1 with a range from 0."""
    observations = read_csv(tmp_path, *GOOD[:place], long, *GOOD[place:])
    assert observations.keys() == [("c", "v")]
    assert observations.value.tolist() == [1.5, 2.5]
    assert observations.set_aside == {"malformed": 1}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("short", "reason"),
    [("v,c,2024-01-03,X", "no_value"), ("v,c,2024-01-03", "no_code"), ("v,c", "no_code"), ("v", "no_client")],
)
def test_lines_with_too_few_fields_are_set_aside(place, short, reason, tmp_path):
    observations = read_csv(tmp_path, *GOOD[:place], short, *GOOD[place:])
    assert observations.value.tolist() == [1.5, 2.5]
    assert sum(observations.set_aside.values()) == 1
    assert set(observations.set_aside) <= {reason, "malformed"}


def test_a_line_without_its_range_is_used(tmp_path):
    assert read_csv(tmp_path, *GOOD, "v,c,2024-01-03,X,3.5").value.tolist() == [1.5, 2.5, 3.5]


def test_a_comma_at_the_end_of_every_line_shifts_no_column(tmp_path):
    """Either used as meant or refused; never read with the columns moved by one."""
    path = write(tmp_path / "o.csv", "\n".join([HEADER, *(f"{line}," for line in GOOD)]))
    try:
        observations = fp.read_observations(path)
    except fp.BadObservations as error:
        assert error.set_aside == {"malformed": 2}
    else:
        assert observations.keys() == [("c", "v")]
        assert observations.value.tolist() == [1.5, 2.5]


def test_columns_in_another_order_and_columns_that_are_not_ours(tmp_path):
    header = "ward,observation_value,observation_type_code,client,note,observation_date,visit_id"
    observations = read_csv(tmp_path, 'A,1.5,X,c,"a, b",2024-01-01,v', "A,2.5,X,c,,2024-01-02,v", header=header)
    assert observations.keys() == [("c", "v")]
    assert observations.value.tolist() == [1.5, 2.5]


def test_a_column_that_stands_twice_is_refused(tmp_path):
    frame = pd.DataFrame([record()])
    assert "twice" in refusal(pd.concat([frame, frame[["client"]]], axis=1))
    assert "twice" in refusal(write(tmp_path / "o.csv", f"{HEADER},client\nv,c,2024-01-01,X,1.5,,,d\n"))


# --------------------------------------------------------------------------------------------------- messages


def test_nothing_usable_says_why():
    rows = [record(observation_value="text"), record(observation_date="soon"), record(observation_value="text")]
    with pytest.raises(fp.BadObservations) as caught:
        fp.read_observations(rows).check_usable()
    assert caught.value.set_aside == {"bad_date": 1, "bad_value": 2}
    assert caught.value.code == "bad_observations"
    assert "no usable observation in 3 rows" in str(caught.value)
    assert f"2 x {fp.SET_ASIDE_REASONS['bad_value']}" in str(caught.value)
    assert f"1 x {fp.SET_ASIDE_REASONS['bad_date']}" in str(caught.value)


SECRETS = ("Mustermann", "8675.309", "1987-06-05")


def secret(**changes) -> dict:
    return record(client="Mustermann", observation_value="8675.309 mg", observation_date="1987-06-05") | changes


def secret_sources(folder):
    line = "v,Mustermann,1987-06-05,X,8675.309 mg,8675.309,8675.309"
    yield [secret()]
    yield [secret(observation_date="1987-06-05 at noon")]
    yield [{"client": "Mustermann", "observation_value": "8675.309"}]
    yield pd.DataFrame([secret()])
    files = {
        "nothing usable": f"{HEADER}\n{line}\n",
        "no header": f"{line}\n{line}\n",
        "no header, semicolons": f"{line}\n{line}\n".replace(",", ";"),
        "an open quote": f'{HEADER}\n{line}\n"{line}\n{line}\n',
        "too many fields": f"{HEADER}\n{line},Mustermann\n",
        "a column missing": f"{HEADER}\n{line}\n".replace("client", "patient"),
    }
    for n, content in enumerate(files.values()):
        yield write(folder / f"{n}.csv", content)


def test_no_message_holds_a_value_a_client_or_a_date(tmp_path):
    for source in secret_sources(tmp_path):
        message = refusal(source)
        assert not [text for text in SECRETS if text in message], message


def test_set_aside_rows_are_described_without_their_values():
    observations = read(record(), secret(), secret(observation_value=8675.309, observation_date="5 June 1987"))
    text = fp.describe_set_aside(observations)
    bad_date, bad_value = fp.SET_ASIDE_REASONS["bad_date"], fp.SET_ASIDE_REASONS["bad_value"]
    assert text == f"1 rows: {bad_date}; 1 rows: {bad_value}"
    assert fp.describe_set_aside(read(record())) == ""


# -------------------------------------------------------------------------------------------------- any dirt

cells = (
    st.none() | st.text(max_size=5) | st.integers() | st.floats() | st.booleans() | st.just("2024-01-01") | st.just("v")
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.sampled_from(fp.COLUMNS), cells) | st.integers(), max_size=6))
def test_dirt_never_stops_a_good_row_and_never_vanishes(dirt):
    good = record(visit_id="a visit of its own", observation_date="2024-02-03", observation_value=0.1)
    observations = read(*dirt, good)
    assert observations.keys()[-1] == ("c", "a visit of its own")
    used = len(observations.time) + observations.remarks.get("duplicate", 0)
    assert used + sum(observations.set_aside.values()) == len(dirt) + 1
    assert np.isfinite(observations.value).all()
    assert (np.diff(observations.group_start) > 0).all()
    assert_same(read(*dirt, good), observations)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path / "o.csv", HEADER)
    path.chmod(0)
    assert "cannot be read" in refusal(path)
