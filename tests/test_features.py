"""Features: against a naive oracle, under changes that must not matter, and by hand."""

import gc
import itertools
import math
import pickle
import weakref
from datetime import datetime, timedelta

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import assume, given, settings

import feature_pipeline as fp

few = settings(max_examples=20, deadline=None, derandomize=True)
many = settings(max_examples=40, deadline=None, derandomize=True)

NAMES = [name for block in fp.BLOCKS for name in fp.block_features(block, strategies.CODES, oracle.WINDOWS)]
PLAN = fp.FeaturePlan(NAMES)
HOUR_OF_DAY = NAMES.index("context__hour_of_day")
MICROSECOND = timedelta(microseconds=1)


def micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1)) // MICROSECOND


def every_snapshot(n_visits: int, moments: list[datetime]) -> tuple[np.ndarray, np.ndarray]:
    """Each visit at each moment."""
    as_of = [micros(moment) for moment in moments]
    return np.repeat(np.arange(n_visits), len(as_of)), np.tile(np.array(as_of, dtype=np.int64), n_visits)


def features(records, moments, plan=PLAN) -> dict[tuple[str, str], np.ndarray]:
    """(client, visit) -> (n_moments, n_features)."""
    observations = fp.read_observations(records)
    matrix = plan.evaluate(observations, *every_snapshot(observations.n_visits, moments))
    return dict(zip(observations.keys(), np.split(matrix, observations.n_visits), strict=True))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """To the last bit."""
    return np.array_equal(a, b, equal_nan=True)


def assert_same(a: dict[tuple[str, str], np.ndarray], b: dict[tuple[str, str], np.ndarray], names=tuple(NAMES)) -> None:
    assert a.keys() == b.keys()
    for key, matrix in a.items():
        differs = [name for name, x, y in zip(names, matrix.T, b[key].T, strict=True) if not same(x, y)]
        assert not differs


# ---------------------------------------------------------------------------------------------------- oracle


def tolerance(feature: fp.Feature, rows: list[oracle.Row]) -> float:
    """What rounding may take, beyond 1e-9 of the result.

    The mean of floats is off by a few units in the last place of the largest value. What is measured from the mean
    (a deviation, a slope) is off by as much, however small it is: the std of three equal values need not be 0. A slope
    divides by a spread of hours, which carries the rounding of the hours themselves.
    """
    rounding = 1e-13 * max((abs(row.value) for row in rows), default=0.0)
    if feature.name == "cv":
        mean = abs(oracle.exact_mean(rows)) if rows else 0
        return rounding * float(2 * rounding / 1e-13 / mean**2) if mean else 0.0
    if feature.name == "slope" and len(rows) > 1:
        hours = float(oracle.hours(rows[-1].time - rows[0].time))
        return rounding / hours * (1 + 200 / hours) if hours else 0.0
    return rounding


def cancels(feature: fp.Feature, rows: list[oracle.Row]) -> bool:
    """Is the mean (or the deviation) so near 0, beside the values, that what is divided by it is rounding alone?"""
    if feature.name not in ("cv", "zscore") or not rows:
        return False
    divisor = abs(oracle.exact_mean(rows)) if feature.name == "cv" else oracle.exact_sqrt(oracle.variance(rows))
    return divisor <= 1e-8 * max(abs(row.value) for row in rows)


PARSED = [fp.parse_feature(name) for name in NAMES]


def disagreements(records, moment, row) -> list[tuple]:
    expected = oracle.evaluate(records, moment, strategies.CODES)
    known = oracle.rows_by_code(records, moment)
    wrong = []
    for name, feature, found in zip(NAMES, PARSED, row.tolist(), strict=True):
        wanted = expected[name]
        if found == wanted or (wanted is None and math.isnan(found)):
            continue
        rows = known.get(feature.code, [])
        if cancels(feature, rows):
            continue
        if wanted is None or not math.isclose(found, wanted, rel_tol=1e-9, abs_tol=tolerance(feature, rows)):
            wrong.append((name, found, wanted))
    return wrong


@many
@given(strategies.visits())
def test_the_oracle_agrees_at_every_prefix(records):
    moments = strategies.moments_of(records)
    (matrix,) = features(records, moments).values()
    for moment, row in zip(moments, matrix, strict=True):
        assert disagreements(records, moment, row) == []


@few
@given(strategies.cohorts())
def test_the_oracle_agrees_on_visits_that_share_the_call(records):
    moments = strategies.moments_of(records)[::5]
    for (client, visit), matrix in features(records, moments).items():
        own = [record for record in records if (record["client"], record["visit_id"]) == (client, visit)]
        for moment, row in zip(moments, matrix, strict=True):
            assert disagreements(own, moment, row) == []


def test_the_oracle_knows_every_feature():
    """When this fails, give the new feature a function in oracle.py."""
    start = datetime(2024, 1, 1)
    record = {"observation_date": start, "observation_type_code": "X", "observation_value": 1.0}
    known = set(oracle.evaluate([record], start, strategies.CODES))
    assert set(fp.STATISTICS) - set(oracle.STATISTICS) == set()
    assert set(NAMES) - known == set()
    assert known - set(NAMES) == set()


# ------------------------------------------------------------------------------------------ what must not matter


@many
@given(strategies.cohorts(), st.data())
def test_the_order_of_rows_does_not_matter(records, data):
    moments = strategies.moments_of(records)
    shuffled = data.draw(st.permutations(records))
    assert_same(features(records, moments), features(shuffled, moments))


@few
@given(strategies.cohorts(), st.data())
def test_a_row_that_comes_again_does_not_matter(records, data):
    moments = strategies.moments_of(records)
    again = data.draw(st.lists(st.sampled_from(records), min_size=1))
    assert_same(features(records, moments), features([*records, *again], moments))


@few
@given(strategies.cohorts())
def test_other_visits_in_the_call_do_not_matter(records):
    moments = strategies.moments_of(records)
    for key, together in features(records, moments).items():
        alone = features([r for r in records if (r["client"], r["visit_id"]) == key], moments)
        assert_same({key: together}, alone)


@few
@given(st.lists(strategies.cohorts(), min_size=2, max_size=4))
def test_readings_that_are_stacked_keep_their_numbers(readings):
    parts = [fp.read_observations(records) for records in readings]
    stacked = fp.Observations.stacked(parts)
    assert stacked.keys() == [*itertools.chain(*(part.keys() for part in parts))]
    assert stacked.codes == tuple(sorted({code for part in parts for code in part.codes}))
    moments = [strategies.START + timedelta(hours=6), strategies.START + timedelta(hours=60)]
    alone = [PLAN.evaluate(part, *every_snapshot(part.n_visits, moments)) for part in parts]
    assert same(PLAN.evaluate(stacked, *every_snapshot(stacked.n_visits, moments)), np.concatenate(alone))


@few
@given(strategies.cohorts())
def test_a_snapshot_alone_and_among_others_is_the_same(records):
    observations = fp.read_observations(records)
    visit, as_of = every_snapshot(observations.n_visits, strategies.moments_of(records)[::9])
    together = PLAN.evaluate(observations, visit, as_of)
    for i in range(len(visit)):
        assert same(PLAN.evaluate(observations, visit[i : i + 1], as_of[i : i + 1])[0], together[i])


@few
@given(strategies.cohorts(), st.integers(1, 7), st.integers(1, 7))
def test_chunks_do_not_matter(records, pairs, rows):
    moments = strategies.moments_of(records)
    whole = features(records, moments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp, "_PAIRS_AT_ONCE", pairs)
        patch.setattr(fp, "_ROWS_AT_ONCE", rows)
        assert_same(features(records, moments), whole)


def test_long_runs_have_the_same_bits_alone_among_others_and_in_chunks(monkeypatch):
    """Long enough for sums by halves and by eights."""
    random = np.random.default_rng(1)
    records = [
        {
            "visit_id": visit,
            "client": "a",
            "observation_date": strategies.START + timedelta(minutes=int(minute)),
            "observation_type_code": code,
            "observation_value": random.lognormal(sigma=4),
        }
        for visit, length in enumerate((1, 7, 300, 8, 129, 9, 17))
        for code in ("unknown", "X__min")
        for minute in random.integers(0, 3000, length)
    ]
    moments = [strategies.START + timedelta(hours=hours) for hours in (1, 7, 25, 50, 200)]
    together = features(records, moments)
    for key in together:
        assert_same(features([r for r in records if str(r["visit_id"]) == key[1]], moments), {key: together[key]})
    monkeypatch.setattr(fp, "_ROWS_AT_ONCE", 100)
    monkeypatch.setattr(fp, "_PAIRS_AT_ONCE", 3)
    assert_same(features(records, moments), together)


@many
@given(strategies.cohorts(), st.data())
def test_nothing_after_the_moment_is_seen(records, data):
    cut = data.draw(st.sampled_from(strategies.moments_of(records)))
    past = [r for r in records if r["observation_date"] <= cut]
    future = [r for r in records if r["observation_date"] > cut]
    assume(past)
    moments = [moment for moment in strategies.moments_of(records) if moment <= cut]
    known = features(past, moments)
    late = data.draw(st.lists(strategies.observations(), max_size=4))
    late = [{"visit_id": "7", "client": "a"} | r for r in late if r["observation_date"] > cut]
    changed = [r | {"observation_value": r["observation_value"] / 2, "observation_type_code": "new"} for r in future]
    for other_future in (future, changed, [*future, *late]):
        seen = features(data.draw(st.permutations([*past, *other_future])), moments)
        assert_same({key: seen[key] for key in known}, known)
        for key in seen.keys() - known.keys():  # visits that begin later
            assert np.isnan(seen[key]).all()


@few
@given(strategies.cohorts(), st.timedeltas(timedelta(days=-20_000), timedelta(days=20_000)))
def test_shifting_all_times_changes_the_hour_of_day_alone(records, shift):
    moments = strategies.moments_of(records)
    shifted = [record | {"observation_date": record["observation_date"] + shift} for record in records]
    before, after = features(records, moments), features(shifted, [moment + shift for moment in moments])
    for key, matrix in after.items():
        started = ~np.isnan(matrix[:, HOUR_OF_DAY])
        day = timedelta(days=1)
        hours = [((moment + shift - datetime.min) % day) / timedelta(hours=1) for moment in moments]
        assert matrix[started, HOUR_OF_DAY] == pytest.approx(np.array(hours)[started], rel=1e-12)
        before[key][:, HOUR_OF_DAY] = matrix[:, HOUR_OF_DAY] = 0
    assert_same(before, after)


@few
@given(strategies.cohorts(), st.lists(st.sampled_from(NAMES), unique=True, max_size=12))
def test_a_plan_of_some_features_gives_the_numbers_of_the_full_plan(records, names):
    moments = strategies.moments_of(records)
    columns = [NAMES.index(name) for name in names]
    full = {key: matrix[:, columns] for key, matrix in features(records, moments).items()}
    assert_same(features(records, moments, fp.FeaturePlan(names)), full, names)


def test_each_feature_alone_gives_the_numbers_of_the_full_plan():
    records = [
        {"visit_id": "7", "client": "a", "observation_type_code": code, "observation_value": value}
        | {"observation_date": strategies.START + timedelta(hours=hour), "reference_range_min": 36.5}
        for code in strategies.VALUES
        for hour, value in enumerate(strategies.VALUES[code])
    ]
    moments = [strategies.START + timedelta(hours=3), strategies.START + timedelta(hours=9)]
    (full,) = features(records, moments).values()
    for column, name in enumerate(NAMES):
        if PARSED[column].code not in (None, "HR", "unknown", "Age"):  # a few codes stand for all
            continue
        (alone,) = features(records, moments, fp.FeaturePlan([name])).values()
        assert same(alone[:, 0], full[:, column]), name


@few
@given(strategies.cohorts(), st.data())
def test_the_order_of_snapshots_does_not_matter(records, data):
    observations = fp.read_observations(records)
    visit, as_of = every_snapshot(observations.n_visits, strategies.moments_of(records)[::5])
    order = np.array(data.draw(st.permutations(range(len(visit)))))
    expected = PLAN.evaluate(observations, visit, as_of)[order]
    assert same(PLAN.evaluate(observations, visit[order], as_of[order]), expected)
    out = np.empty((len(NAMES), len(visit)))
    PLAN.evaluate(observations, visit[order], as_of[order], out)
    assert same(out.T, expected)


def test_observations_survive_a_trip_to_another_process():
    """Workers get their observations pickled; clinical scores must not get lost on the way."""
    records = [
        {"visit_id": 1, "client": "a", "observation_date": "2024-01-01", "observation_type_code": code}
        | {"observation_value": strategies.VALUES[code][0]}
        for code in strategies.VALUES
    ]
    observations = fp.read_observations(records)
    snapshots = every_snapshot(1, [datetime(2024, 1, 1)])
    travelled = pickle.loads(pickle.dumps(observations))
    assert same(PLAN.evaluate(travelled, *snapshots), PLAN.evaluate(observations, *snapshots))


# --------------------------------------------------------------------------------------------------- names

ODD_CODES = ["A__B", "A_", "_A", "A__", "__", "two words", "min", "6h", "clinical", "context", "x__min", "x__min__6h"]
ODD_CODES += ["clinical__sirs", "context__hours", "last", "2951-2", "°", "NA", "a\nb", ","]


def assert_names_parse_back(codes):
    names = []
    for block in fp.BLOCKS:
        for name in fp.block_features(block, codes):
            feature = fp.parse_feature(name)
            assert str(feature) == name
            assert feature.block == block
            if block in ("clinical", "context"):
                assert feature.code is None and feature.window is None
            else:
                assert feature.code in codes
                assert (feature.window in fp.DEFAULT_WINDOWS) if block == "windows" else feature.window is None
            names.append(name)
    assert len(set(names)) == len(names)  # no two features share a name
    per_code = len(fp.STATISTICS) + len(fp.DEFAULT_WINDOWS) * sum(s.windowed for s in fp.STATISTICS.values())
    in_block = set(fp.CLINICAL) - fp.FOR_COMPARISON
    assert len(names) == len(in_block) + len(fp.CONTEXT) + per_code * len(codes)
    assert {f"clinical__{name}" for name in in_block} <= set(names)


def test_features_are_freed_with_their_last_name():
    """And not when the garbage collector comes: a night of scoring would hold gigabytes until then."""
    observations = fp.read_observations(visit_of((0, "HR", 80), (1, "HR", 90)))
    gc.disable()
    try:
        out = fp.FeaturePlan(["HR__last"]).evaluate(observations, np.array([0]), observations.last_time)
        memory = weakref.ref(out.base)
        del out
        assert memory() is None
    finally:
        gc.enable()


def test_scores_for_comparison_are_features_that_no_block_makes():
    assert {name.partition("_")[0] for name in fp.FOR_COMPARISON} == {"mews"}
    assert not {f"clinical__{name}" for name in fp.FOR_COMPARISON} & set(fp.block_features("clinical", []))
    assert fp.parse_feature("clinical__mews") == fp.Feature("clinical", "mews")


def test_names_of_odd_codes_parse_back():
    assert_names_parse_back(ODD_CODES)


@settings(many, max_examples=100)
@given(st.lists(st.text(min_size=1) | st.text("_A6h", min_size=1), min_size=1, max_size=3, unique=True))
def test_names_parse_back(codes):
    assume(not any(concept and concept.static for concept in map(fp.concept_of, codes)))
    assert_names_parse_back(codes)


@pytest.mark.parametrize("code", ODD_CODES)
def test_features_of_odd_codes_are_computed(code):
    record = {"visit_id": 1, "client": "a", "observation_date": "2024-01-01", "observation_type_code": code}
    names = fp.block_features("last", [code]) + fp.block_features("windows", [code], [6])
    (row,) = features([record | {"observation_value": 100.5}], [datetime(2024, 1, 1)], fp.FeaturePlan(names)).values()
    found = dict(zip(names, row[0], strict=True))
    assert found[f"{code}__last"] == found[f"{code}__max__6h"] == 100.5


UNKNOWN_NAMES = ["", "HR", "HR__", "__last", "HR__median", "HR_last", "HR__last__6h", "HR__slope__6h", "HR__MEAN"]
UNKNOWN_NAMES += ["HR__mean__0h", "HR__mean__06h", "HR__mean__-6h", "HR__mean__6", "HR__mean__6.5h", "HR__mean__h"]
UNKNOWN_NAMES += ["__mean__6h", "HR__mean__6h ", "HR__mean__6h\n", "HR__mean__٦h", "HR__mean__1٢h"]
UNKNOWN_NAMES += ["clinical__", "clinical__apache", "clinical__sirs__6h", "context__x"]


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
def test_unknown_names_are_bad_config(name):
    with pytest.raises(fp.BadConfig):
        fp.parse_feature(name)
    with pytest.raises(fp.BadConfig):
        fp.FeaturePlan([name])


def test_a_name_that_stands_twice_is_bad_config():
    with pytest.raises(fp.BadConfig, match="twice"):
        fp.FeaturePlan(["HR__last", "SBP__last", "HR__last"])


def test_an_unknown_block_is_bad_config():
    with pytest.raises(fp.BadConfig, match="'colour'"):
        fp.block_features("colour", ["HR"])


@pytest.mark.parametrize("window", [10**6, 10**13, 10**30])
def test_a_window_of_any_length_is_the_visit_so_far_or_bad_config(window):
    record = {"visit_id": 1, "client": "a", "observation_date": "2024-01-01", "observation_type_code": "X"}
    try:
        plan = fp.FeaturePlan([f"X__max__{window}h"])
    except fp.BadConfig:
        return
    (row,) = features([record | {"observation_value": 3.5}], [datetime(2024, 1, 1)], plan).values()
    assert row[0, 0] == 3.5


def test_no_name_is_a_statistic_and_a_score():
    assert not set(fp.STATISTICS) & (set(fp.CLINICAL) | set(fp.CONTEXT))


def test_static_codes_are_last_only():
    for block in set(fp.BLOCKS) - {"clinical", "context"}:
        expected = ["Age__last", "46098-0__last"] if block == "last" else []
        assert fp.block_features(block, ["Age", "46098-0"]) == expected
    assert fp.block_features("summary", ["years"], synonyms={"years": "age"}) == []
    assert "years__mean" in fp.block_features("summary", ["years"])


# ---------------------------------------------------------------------------------------------------- by hand

T0 = datetime(2024, 1, 1, 6)


def visit_of(*rows) -> list[dict]:
    """Records from (hour, code, value[, low, high])."""
    return [
        {"visit_id": "v", "client": "c", "observation_date": T0 + timedelta(hours=hour)}
        | {"observation_type_code": code, "observation_value": value}
        | dict(zip(("reference_range_min", "reference_range_max"), bounds, strict=False))
        for hour, code, value, *bounds in rows
    ]


def feature(name: str, records: list[dict], hour: float = 0.0, synonyms=None) -> float:
    observations = fp.read_observations(records, synonyms)
    as_of = np.array([micros(T0 + timedelta(hours=hour))])
    return float(fp.FeaturePlan([name]).evaluate(observations, np.array([0]), as_of)[0, 0])


def equals(found: float, expected: float | None) -> bool:
    return math.isnan(found) if expected is None else found == pytest.approx(expected, rel=1e-12, abs=1e-12)


# Seen at hour 8, so that the 6 h window (2, 8] holds the last two values.
FOUR_VALUES = visit_of((0, "X", 2.0, 1, 5), (1, "X", 6.0, 1, 5), (4, "X", 4.0), (7, "X", 0.0, 1, 5), (9, "X", 50.0))
# weights 2^(-7/12), 2^(-6/12), 2^(-3/12), 1 of the values 2, 6, 4, 0
EWM_OF_FOUR = (2 * 2 ** (-7 / 12) + 6 * 2**-0.5 + 4 * 2**-0.25) / (2 ** (-7 / 12) + 2**-0.5 + 2**-0.25 + 1)
BY_HAND = {
    "last": 0.0,
    "min": 0.0,
    "max": 6.0,
    "mean": 3.0,  # (2 + 6 + 4 + 0) / 4
    "std": math.sqrt(5),  # (1 + 9 + 1 + 9) / 4
    "count": 4.0,
    "slope": -14 / 30,  # hours -3 -2 1 4, deviations -1 3 1 -3 from their means
    "change": -2.0,
    "delta": -4.0,
    "age": 1.0,
    "measured": 1.0,
    "rate": 0.5,  # 4 in 8 h
    "outside": -0.25,  # 1 below a range of 4
    "share_below": 1 / 3,  # of the three with a range
    "share_above": 1 / 3,
    "range": 6.0,
    "cv": math.sqrt(5) / 3,
    "mean_abs_change": 10 / 3,  # 4, 2, 4
    "departure": -3.0,
    "gap": 3.0,
    "zscore": -3 / math.sqrt(5),
    "ewm": EWM_OF_FOUR,
    "departure_ewm": -EWM_OF_FOUR,
    "hours_since_max": 7.0,
    "hours_since_min": 1.0,
}
BY_HAND_6H = {"min": 0.0, "max": 4.0, "mean": 2.0, "std": 2.0, "count": 2.0, "departure": -2.0}

ONE_VALUE = visit_of((0, "X", 5.0, 1, 3))
BY_HAND_ONE = {
    "last": 5.0,
    "min": 5.0,
    "max": 5.0,
    "mean": 5.0,
    "std": 0.0,
    "count": 1.0,
    "slope": None,
    "change": 0.0,
    "delta": None,
    "age": 0.5,
    "measured": 1.0,
    "rate": 1.0,  # the first hour counts whole
    "outside": 1.0,  # 2 above a range of 2
    "share_below": 0.0,
    "share_above": 1.0,
    "range": 0.0,
    "cv": 0.0,
    "mean_abs_change": None,
    "departure": 0.0,
    "gap": None,
    "zscore": None,
    "ewm": 5.0,
    "departure_ewm": 0.0,
    "hours_since_max": 0.5,
    "hours_since_min": 0.5,
}


@pytest.mark.parametrize("table", [BY_HAND, BY_HAND_ONE], ids=["four values", "one value"])
def test_every_statistic_has_a_row_by_hand(table):
    assert set(fp.STATISTICS) - set(table) == set()
    assert {name for name, s in fp.STATISTICS.items() if s.windowed} - set(BY_HAND_6H) == set()


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_of_four_values(name):
    assert equals(feature(f"X__{name}", FOUR_VALUES, 8), BY_HAND[name])


@pytest.mark.parametrize("name", BY_HAND_6H)
def test_statistic_of_a_window(name):
    assert equals(feature(f"X__{name}__6h", FOUR_VALUES, 8), BY_HAND_6H[name])


@pytest.mark.parametrize("name", BY_HAND_ONE)
def test_statistic_of_one_value(name):
    assert equals(feature(f"X__{name}", ONE_VALUE, 0.5), BY_HAND_ONE[name])


@pytest.mark.parametrize("name", fp.STATISTICS)
def test_statistic_of_no_value(name):
    zero = name in ("count", "measured", "rate")
    assert equals(feature(f"Y__{name}", ONE_VALUE, 0.5), 0.0 if zero else None)
    if fp.STATISTICS[name].windowed:
        assert equals(feature(f"X__{name}__6h", ONE_VALUE, 7), 0.0 if zero else None)
    assert equals(feature(f"X__{name}", ONE_VALUE, -1), None)  # before the visit nothing is known, not even a count


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (5, 4, 6, 0.0),
        (4, 4, 6, 0.0),
        (6, 4, 6, 0.0),
        (7, 4, 6, 0.5),
        (3, 4, 6, -0.5),
        (12, None, 10, 0.2),
        (8, None, 10, 0.0),
        (3, 4, None, -0.25),
        (5, 4, None, 0.0),
        (-12, -10, None, -0.2),
        (1, 0, None, None),  # no width
        (1, None, 0, None),
        (1, None, None, None),
        (1, 6, 4, None),  # inverted
        (1, 4, 4, None),
        (9, -math.inf, 10, 0.0),  # an infinite bound is none
        (12, -math.inf, 10, 0.2),
        (3, 4, math.inf, -0.25),
        (3, -math.inf, math.inf, None),
    ],
)
def test_outside(value, low, high, expected):
    assert equals(feature("X__outside", visit_of((0, "X", value, low, high))), expected)


def test_no_feature_is_too_large_for_a_model():
    """A range next to nothing, values a microsecond apart, a divisor that is hardly one: empty rather than endless."""
    rows = [
        {"observation_date": f"2024-01-01T00:00:00.{micro:06d}", "observation_type_code": code} | values
        for micro in (0, 1)
        for code, values in {
            "X": {"observation_value": 1e30 * (-1) ** micro, "reference_range_min": 0, "reference_range_max": 1e-300},
            "Y": {"observation_value": 1e30, "reference_range_min": -1.7e308, "reference_range_max": 1.7e308},
            "BUN": {"observation_value": 300},
            "Creatinine": {"observation_value": 1e-320},
        }.items()
    ]
    observations = fp.read_observations([{"visit_id": 1, "client": "a"} | row for row in rows])
    names = [name for block in fp.BLOCKS for name in fp.block_features(block, observations.codes)]
    visit, moments, _ = fp.resolve_snapshots(observations)
    found = dict(zip(names, fp.FeaturePlan(names).evaluate(observations, visit, moments)[0], strict=True))
    assert np.isfinite(np.array([v for v in found.values() if not np.isnan(v)], dtype=np.float32)).all()
    assert np.isnan(
        [found[name] for name in ("X__outside", "X__slope", "clinical__bun_creatinine", "Y__outside")]
    ).all()


def test_a_value_on_a_bound_is_inside():
    rows = visit_of((0, "X", 4.0, 4, 6), (1, "X", 6.0, 4, 6), (2, "X", 3.9, 4, 6), (3, "X", 6.1, 4, None))
    assert feature("X__share_below", rows, 3) == 1 / 4
    assert feature("X__share_above", rows, 3) == 0 / 3
    assert feature("X__share_above", [*rows, *visit_of((1.5, "X", 6.1, 4, 6))], 3) == 1 / 4


def test_ties_are_ordered_by_value():
    tie = visit_of((0, "X", 3.0), (0, "X", 1.0), (2, "X", 5.0), (2, "X", 9.0), (2, "X", 7.0))
    assert feature("X__last", tie, 2) == 9
    assert feature("X__change", tie, 2) == 8
    assert feature("X__delta", tie, 2) == 2
    assert feature("X__mean_abs_change", tie, 2) == 2
    assert math.isnan(feature("X__slope", tie, 0))


def test_duplicates_count_once_and_another_range_is_another_row():
    rows = visit_of((0, "X", 3.0, 1, 2), (0, "X", 3.0, 1, 2), (0, "X", 3.0, 1, 4))
    assert feature("X__count", rows) == 2
    assert feature("X__share_above", rows) == 0.5


def test_the_slope_of_neighbouring_times_long_ago_is_exact():
    """A minute apart, seen a year later: hours before as_of alone would lose digits."""
    rows = visit_of((0, "X", 1.0), (1 / 60, "X", 2.0), (2 / 60, "X", 4.0))
    assert feature("X__slope", rows, 24 * 365) == pytest.approx(90, rel=1e-9)


@pytest.mark.parametrize("values", [[0.1] * 3, [36.6] * 7, [1 / 3] * 10])
def test_equal_values_spread_little(values):
    rows = visit_of(*((hour, "X", value) for hour, value in enumerate(values)))
    assert feature("X__std", rows, 20) <= 1e-15 * values[0]
    assert feature("X__mean", rows, 20) == pytest.approx(values[0], rel=1e-15)


@pytest.mark.parametrize("window", [1, 6, 12, 24])
def test_a_value_leaves_the_window_after_exactly_its_length(window):
    records = visit_of((0, "X", 1.0))
    now = T0 + timedelta(hours=window)
    plan = fp.FeaturePlan([f"X__count__{window}h"])
    (matrix,) = features(records, [now - MICROSECOND, now, now + MICROSECOND], plan).values()
    assert matrix[:, 0].tolist() == [1, 0, 0]


def test_a_value_is_in_the_window_one_microsecond_after_its_begin():
    records = visit_of((0, "X", 1.0))
    records += [records[0] | {"observation_date": T0 + MICROSECOND, "observation_value": 2.0}]
    assert feature("X__max__6h", records, 6) == feature("X__min__6h", records, 6) == 2
    assert feature("X__count__6h", records, 6) == feature("context__observations_6h", records, 6) == 1


def test_a_value_exactly_at_the_moment_is_in_and_a_microsecond_later_is_not():
    records = visit_of((0, "X", 1.0), (6, "X", 2.0))
    records += [records[0] | {"observation_date": T0 + timedelta(hours=6) + MICROSECOND, "observation_value": 3.0}]
    assert feature("X__last", records, 6) == 2
    assert feature("X__max__6h", records, 6) == 2
    assert feature("X__age", records, 6) == 0
    assert feature("context__observations_6h", records, 6) == 1


CONTEXT_BY_HAND = [
    ("context__hours", 8.0),
    ("context__types", 2.0),
    ("context__observations_6h", 3.0),
    ("context__observations_24h", 5.0),
    ("context__types_6h", 2.0),
    ("context__types_24h", 2.0),
    ("context__hour_of_day", 14.0),  # the visit began at six
]


@pytest.mark.parametrize(("name", "expected"), CONTEXT_BY_HAND)
def test_context_by_hand(name, expected):
    rows = [(0, "X", 1), (2, "X", 2), (3, "X", 2), (3, "X", 5), (8, "Y", 1), (9, "Z", 1)]
    assert feature(name, visit_of(*rows), 8) == expected


def test_every_context_feature_has_a_row_by_hand():
    assert {f"context__{name}" for name in fp.CONTEXT} - {name for name, _ in CONTEXT_BY_HAND} == set()


def test_hour_of_day_before_1970_and_with_its_fraction():
    record = {"visit_id": 1, "client": "a", "observation_type_code": "X", "observation_value": 1}
    observations = fp.read_observations([record | {"observation_date": "1969-12-31T22:30:00+00:00"}])
    plan = fp.FeaturePlan(["context__hour_of_day"])
    assert plan.evaluate(observations, [0], observations.last_time)[0, 0] == 22.5


# --------------------------------------------------------------------------------------------------- clinical


def bands(name: str, code: str, *rows: tuple[float, float]) -> list[tuple[str, dict, float]]:
    return [(name, {code: value}, points) for value, points in rows]


NEWS2_CHART = {"Resp": 18, "O2Sat": 97, "FiO2": 0.21, "SBP": 120, "HR": 70, "GCS": 15, "Temp": 37}
NEWS2_WORST = {"Resp": 25, "O2Sat": 91, "FiO2": 0.4, "SBP": 90, "HR": 131, "GCS": 14, "Temp": 35}
SOFA_WORST = {"PaO2": 60, "FiO2": 0.5, "Platelets": 19, "Bilirubin_total": 12.1, "MAP": 60, "GCS": 5, "Creatinine": 5.1}

CLINICAL_BY_HAND: list[tuple[str, dict[str, float], float | None]] = [
    # SIRS, Bone 1992: > 38 or < 36; > 90; > 20 or PaCO2 < 32; > 12 or < 4
    *bands("sirs_temperature", "Temp", (35.9, 1), (36, 0), (38, 0), (38.1, 1)),
    *bands("sirs_heart_rate", "HR", (90, 0), (90.1, 1), (91, 1)),
    *bands("sirs_respiration", "Resp", (20, 0), (20.1, 1), (21, 1)),
    *bands("sirs_respiration", "PaCO2", (31.9, 1), (32, 0), (40, 0)),
    ("sirs_respiration", {"Resp": 12, "PaCO2": 31}, 1),
    ("sirs_respiration", {"Resp": 24, "PaCO2": 40}, 1),
    ("sirs_respiration", {"Resp": 12, "PaCO2": 40}, 0),
    ("sirs_respiration", {"HR": 80}, None),
    *bands("sirs_wbc", "WBC", (3.9, 1), (4, 0), (12, 0), (12.1, 1)),
    ("sirs", {"Temp": 38.5, "HR": 110, "Resp": 24, "WBC": 15}, 4),
    ("sirs", {"Temp": 37, "HR": 80, "Resp": 14, "WBC": 8}, 0),
    ("sirs", {"HR": 110}, 1),
    ("sirs", {"GCS": 15}, None),
    ("sirs_parts", {"HR": 110, "PaCO2": 40}, 2),
    ("sirs_parts", {"GCS": 15}, 0),
    # qSOFA, Seymour and Singer 2016: >= 22; <= 100; altered mentation
    *bands("qsofa_respiration", "Resp", (21, 0), (21.9, 0), (22, 1)),
    *bands("qsofa_blood_pressure", "SBP", (100, 1), (100.1, 0), (101, 0)),
    *bands("qsofa_mentation", "GCS", (15, 0), (14, 1), (3, 1)),
    ("qsofa", {"Resp": 22, "SBP": 100, "GCS": 14}, 3),
    ("qsofa", {"Resp": 22}, 1),
    ("qsofa", {"HR": 80}, None),
    ("qsofa_parts", {"Resp": 22, "GCS": 15}, 2),
    # NEWS2, RCP 2017, chart 1
    *bands("news2_respiration", "Resp", (8, 3), (9, 1), (11, 1), (12, 0), (20, 0), (21, 2), (24, 2), (25, 3)),
    *bands("news2_oxygen_saturation", "O2Sat", (91, 3), (92, 2), (93, 2), (94, 1), (95, 1), (96, 0), (100, 0)),
    *bands("news2_oxygen", "FiO2", (0.21, 0), (0.22, 2), (1.0, 2), (21, 0), (24, 2)),
    *bands("news2_blood_pressure", "SBP", (90, 3), (91, 2), (100, 2), (101, 1), (110, 1), (111, 0), (219, 0), (220, 3)),
    *bands("news2_pulse", "HR", (40, 3), (41, 1), (50, 1), (51, 0), (90, 0), (91, 1), (110, 1), (111, 2), (130, 2)),
    *bands("news2_pulse", "HR", (131, 3)),
    *bands("news2_consciousness", "GCS", (15, 0), (14, 3), (3, 3)),
    *bands("news2_temperature", "Temp", (35, 3), (35.1, 1), (36, 1), (36.1, 0), (38, 0), (38.1, 1), (39, 1), (39.1, 2)),
    ("news2", NEWS2_CHART, 0),
    ("news2", NEWS2_WORST, 20),  # the most NEWS2 can reach: 3 + 3 + 2 + 3 + 3 + 3 + 3
    ("news2", {"HR": 131, "Temp": 39.1}, 5),
    ("news2", {"WBC": 8}, None),
    ("news2_parts", NEWS2_CHART, 7),
    ("news2_parts", {"HR": 70, "WBC": 8}, 1),
    # SOFA, Vincent 1996; respiration without ventilation, circulation without vasopressors
    ("sofa_respiration", {"PaO2": 84, "FiO2": 0.21}, 0),  # 400
    ("sofa_respiration", {"PaO2": 83.9, "FiO2": 0.21}, 1),
    ("sofa_respiration", {"PaO2": 150, "FiO2": 0.5}, 1),  # 300
    ("sofa_respiration", {"PaO2": 149, "FiO2": 0.5}, 2),
    ("sofa_respiration", {"PaO2": 40, "FiO2": 1.0}, 2),
    ("sofa_respiration", {"O2Sat": 64, "FiO2": 0.25}, 2),  # 256
    ("sofa_respiration", {"O2Sat": 100, "FiO2": 0.25}, 1),  # 400
    ("sofa_respiration", {"O2Sat": 98, "FiO2": 0.21}, 1),  # 467: no room air reaches 512
    ("sofa_respiration", {"O2Sat": 89.25, "FiO2": 0.25}, 1),  # 357
    ("sofa_respiration", {"O2Sat": 89, "FiO2": 0.25}, 2),  # 356
    ("sofa_respiration", {"O2Sat": 60, "PaO2": 100, "FiO2": 0.21}, 0),  # PaO2 comes first
    ("sofa_respiration", {"PaO2": 100}, None),
    *bands("sofa_coagulation", "Platelets", (150, 0), (149, 1), (100, 1), (99, 2), (50, 2), (49, 3), (20, 3), (19, 4)),
    *bands("sofa_liver", "Bilirubin_total", (1.1, 0), (1.2, 1), (1.9, 1), (2.0, 2), (5.9, 2), (6.0, 3), (11.9, 3)),
    *bands("sofa_liver", "Bilirubin_total", (12.1, 4)),
    *bands("sofa_cardiovascular", "MAP", (70, 0), (69.9, 1), (30, 1)),
    *bands("sofa_nervous", "GCS", (15, 0), (14, 1), (13, 1), (12, 2), (10, 2), (9, 3), (6, 3), (5, 4), (3, 4)),
    *bands("sofa_renal", "Creatinine", (1.1, 0), (1.2, 1), (1.9, 1), (2.0, 2), (3.4, 2), (3.5, 3), (4.9, 3), (5.1, 4)),
    ("sofa", SOFA_WORST, 19),  # 2 + 4 + 4 + 1 + 4 + 4
    ("sofa", {"Platelets": 60, "MAP": 80}, 2),
    ("sofa", {"HR": 80}, None),
    ("sofa_parts", SOFA_WORST, 6),
    ("sofa_parts", {"Platelets": 60, "FiO2": 0.5}, 1),
    # MEWS, Subbe 2001
    *bands("mews_respiration", "Resp", (8, 2), (9, 0), (14, 0), (15, 1), (20, 1), (21, 2), (29, 2), (30, 3)),
    *bands("mews_pulse", "HR", (40, 2), (41, 1), (50, 1), (51, 0), (100, 0), (101, 1), (110, 1), (111, 2), (129, 2)),
    *bands("mews_pulse", "HR", (130, 3)),
    *bands("mews_blood_pressure", "SBP", (70, 3), (71, 2), (80, 2), (81, 1), (100, 1), (101, 0), (199, 0), (200, 2)),
    *bands("mews_temperature", "Temp", (34.9, 2), (35, 0), (38.4, 0), (38.5, 2)),
    *bands("mews_consciousness", "GCS", (15, 0), (14, 1), (11, 1), (10, 2), (7, 2), (6, 3), (3, 3)),
    ("mews", {"Resp": 30, "HR": 130, "SBP": 70, "Temp": 38.5, "GCS": 6}, 14),  # the most MEWS can reach
    ("mews", {"SBP": 210}, 2),
    ("mews", {"WBC": 8}, None),
    ("mews_parts", {"HR": 80, "SBP": 120, "WBC": 8}, 2),
    # ratios
    ("shock_index", {"HR": 120, "SBP": 80}, 1.5),
    ("shock_index", {"HR": 120}, None),
    ("pulse_pressure", {"SBP": 120, "DBP": 80}, 40),
    ("pulse_pressure", {"SBP": 120}, None),
    ("bun_creatinine", {"BUN": 30, "Creatinine": 1.5}, 20),
    ("bun_creatinine", {"BUN": 30, "Creatinine": 0}, None),
    ("sf_ratio", {"O2Sat": 90, "FiO2": 0.5}, 180),
    ("sf_ratio", {"O2Sat": 90, "FiO2": 50}, 180),  # percent
    ("sf_ratio", {"O2Sat": 90}, None),
    ("pf_ratio", {"PaO2": 60, "FiO2": 0.3}, 200),
    ("pf_ratio", {"PaO2": 60}, None),
]


@pytest.mark.parametrize(("name", "values", "expected"), CLINICAL_BY_HAND)
def test_clinical_by_hand(name, values, expected):
    records = visit_of(*((0, code, value) for code, value in values.items()))
    assert equals(feature(f"clinical__{name}", records), expected)


def test_every_clinical_feature_has_a_row_by_hand():
    assert set(fp.CLINICAL) - {name for name, _, _ in CLINICAL_BY_HAND} == set()


@pytest.mark.parametrize("score", ["sirs", "qsofa", "news2", "sofa", "mews"])
def test_a_score_is_the_sum_of_its_parts(score):
    values = NEWS2_WORST | SOFA_WORST | {"WBC": 15}
    records = visit_of(*((0, code, value) for code, value in values.items()))
    parts = [n for n in fp.CLINICAL if n.startswith(f"{score}_") and n != f"{score}_parts"]
    assert sum(feature(f"clinical__{part}", records) for part in parts) == feature(f"clinical__{score}", records)
    assert feature(f"clinical__{score}_parts", records) == len(parts)


@pytest.mark.parametrize(("first", "second"), [("HR", "8867-4"), ("8867-4", "HR")])
def test_two_codes_of_a_concept_are_one(first, second):
    rows = visit_of((0, first, 120), (1, second, 80), (0, "SBP", 100))
    assert feature("clinical__shock_index", rows, 0.5) == 1.2
    assert feature("clinical__shock_index", rows, 1) == 0.8  # the latest wins
    assert feature("clinical__news2_pulse", rows, 24) == 0  # the 120 has left


@pytest.mark.parametrize(("first", "second"), [("HR", "8867-4"), ("8867-4", "HR")])
def test_two_codes_of_a_concept_at_one_time_are_ordered_by_value(first, second):
    """Like two values of one code: the larger counts, whichever code carries it."""
    rows = visit_of((0, first, 120), (0, second, 80), (0, "SBP", 100))
    assert feature("clinical__shock_index", rows) == 1.2


def test_the_worst_of_24_hours_is_over_all_codes_of_a_concept():
    rows = visit_of((0, "Platelets", 45), (1, "PLT", 95), (23, "Platelets", 200), (23, "PLT", 160))
    assert feature("clinical__sofa_coagulation", rows, 23) == 3
    assert feature("clinical__sofa_coagulation", rows, 24) == 2
    assert feature("clinical__sofa_coagulation", rows, 25) == 0


def test_own_synonyms_join_a_concept():
    rows = visit_of((0, "Puls", 120), (0, "SBP", 80))
    assert math.isnan(feature("clinical__shock_index", rows))
    assert feature("clinical__shock_index", rows, synonyms={"Puls": "heart_rate"}) == 1.5


def test_the_latest_value_expires_after_24_hours():
    moments = [T0 + timedelta(hours=24) + n * MICROSECOND for n in (-1, 0)]
    plan = fp.FeaturePlan(["clinical__qsofa_respiration", "clinical__qsofa", "clinical__qsofa_parts", "Resp__last"])
    (matrix,) = features(visit_of((0, "Resp", 22)), moments, plan).values()
    assert matrix[0].tolist() == [1, 1, 1, 22]
    assert np.isnan(matrix[1, :2]).all()
    assert matrix[1, 2:].tolist() == [0, 22]


# ------------------------------------------------------------------------------------------------- snapshots


def test_resolve_snapshots():
    observations = fp.read_observations(visit_of((0, "X", 1), (2, "X", 2)))
    six, eight = micros(T0), micros(T0) + 2 * fp.MICROSECONDS_PER_HOUR
    for as_of, expected in [
        (None, [eight]),
        ("2024-01-01T06:00", [six]),
        ("2024-01-01T08:00+02:00", [six]),
        (T0, [six]),
        ([T0, "2024-01-01 08:00"], [six, eight]),
    ]:
        visit, moments, several = fp.resolve_snapshots(observations, as_of)
        assert visit.tolist() == [0] * len(expected)
        assert moments.tolist() == expected
        assert several == isinstance(as_of, list)


@pytest.mark.parametrize("as_of", ["yesterday", "2024", 5, [], [T0, None]])
def test_moments_that_are_none_are_refused(as_of):
    observations = fp.read_observations(visit_of((0, "X", 1)))
    with pytest.raises(fp.BadObservations, match="as_of"):
        fp.resolve_snapshots(observations, as_of)


def test_no_snapshots_give_no_rows():
    observations = fp.read_observations(visit_of((0, "X", 1)))
    assert PLAN.evaluate(observations, [], []).shape == (0, len(NAMES))


def test_one_wrong_year_does_not_matter_to_other_visits():
    """One stay of centuries makes times that do not fit one integer key with many visits."""
    records = [
        {"visit_id": visit, "client": "a", "observation_date": date, "observation_type_code": code}
        | {"observation_value": visit}
        for visit in range(80)
        for code in strategies.VALUES
        for date in ("1900-01-01" if visit == 3 else "2299-12-31", "2299-12-31T01:00")
    ]
    records = [record | {"observation_type_code": record["observation_type_code"] + "?"} for record in records]
    codes = [f"{code}?" for code in strategies.VALUES]
    plan = fp.FeaturePlan([*(f"{code}__count" for code in codes), *(f"{code}__mean" for code in codes)])
    moments = [datetime(2299, 12, 31, 0, 30), datetime(2299, 12, 31, 2)]
    together = features(records, moments, plan)
    for visit in (0, 3, 4, 79):
        alone = features([record for record in records if record["visit_id"] == visit], moments, plan)
        assert_same(alone, {("a", str(visit)): together["a", str(visit)]}, plan.names)


def test_many_codes_in_a_stay_of_centuries():
    """Either the numbers or an error, never other numbers."""
    dates = ("1900-01-01", "2299-12-31")
    codes = [f"code {n}" for n in range(800)]
    records = [
        {"visit_id": 1, "client": "a", "observation_date": date, "observation_type_code": code}
        | {"observation_value": 1}
        for code in codes
        for date in dates
    ]
    plan = fp.FeaturePlan([f"{code}__count" for code in codes])
    try:
        (matrix,) = features(records, [datetime(2299, 12, 31)], plan).values()
    except fp.BadObservations:
        return
    assert (matrix == 2).all()
