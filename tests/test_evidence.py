"""A probability only where the evidence carries one, and nothing from the future."""

import json
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings

import feature_pipeline as fp
from feature_pipeline import CONTEXT, STATISTICS, FeaturePlan, ProductionPipeline, UnknownRiskWarning, to_micros
from tests.strategies import moments_of, visits

NOW = datetime(2024, 3, 2, 8, 0)
VITALS = {"HR": 130, "Resp": 32, "SBP": 78, "Temp": 39.4, "O2Sat": 86}
MINIMUM = {
    "inputs": ["heart_rate", "respiratory_rate", "systolic_bp", "temperature", "spo2"],
    "at_least": 3,
    "within_hours": 24.0,
    "newest_hours": 12.0,
}


@pytest.fixture(scope="module")
def careful(config_path, model_path, tmp_path_factory):
    """The tests' model with a minimum of evidence."""
    path = tmp_path_factory.mktemp("careful") / "best_model_config.json"
    path.write_text(json.dumps(json.loads(config_path.read_text()) | {"minimum_evidence": MINIMUM}))
    return ProductionPipeline(path, model_path)


def rows(values, hours_ago=1.0, visit="1"):
    return [
        {
            "visit_id": visit,
            "client": "a",
            "observation_date": NOW - timedelta(hours=hours_ago),
            "observation_type_code": code,
            "observation_value": value,
        }
        for code, value in values.items()
    ]


def assessed(pipeline, records, now=NOW):
    observations = pipeline.reproducer.read(records, to_micros(now))
    visit, moments, _ = fp.resolve_snapshots(observations, now)
    return pipeline.assess(observations, visit, moments)


def test_enough_recent_vital_signs_give_the_models_probability(careful, pipeline):
    found = assessed(careful, rows(VITALS))
    assert found.reason.tolist() == [None] and found.missing() == [[]]
    assert found.probability.tolist() == assessed(pipeline, rows(VITALS)).probability.tolist()
    assert found.level.tolist() == [careful.risk_level(float(found.probability[0]))]
    assert found.newest.tolist() == [to_micros(NOW - timedelta(hours=1))]


def test_a_lone_body_height_is_no_evidence(careful):
    found = assessed(careful, rows({"8302-2": 181.0}))
    assert np.isnan(found.probability).all() and found.level.tolist() == ["UNKNOWN"]
    assert found.reason.tolist() == ["insufficient_evidence"] and found.missing() == [MINIMUM["inputs"]]
    assert found.newest.tolist() == [fp.NO_TIME]


def test_what_is_missing_is_named(careful):
    found = assessed(careful, rows({"HR": 130, "Lactate": 6.0, "Temp": 39}))
    assert found.reason.tolist() == ["insufficient_evidence"]
    assert found.missing() == [["respiratory_rate", "systolic_bp", "spo2"]]


@pytest.mark.parametrize(
    ("hours_ago", "reason"),
    [(12.0, None), (12.0 + 1 / 3600, "stale"), (23.99, "stale"), (24.0, "stale"), (7 * 365 * 24, "stale")],
)
def test_old_data_are_stale(careful, hours_ago, reason):
    assert assessed(careful, rows(VITALS, hours_ago)).reason.tolist() == [reason]


def test_an_unused_code_does_not_make_a_visit_fresh(careful):
    records = rows(VITALS, 13) + rows({"HEIGHT": 181.0}, 0.1)
    assert assessed(careful, records).reason.tolist() == ["stale"]


def test_a_static_code_does_not_make_a_visit_fresh(careful):
    assert assessed(careful, rows(VITALS, 13) + rows({"Age": 70}, 0.1)).reason.tolist() == ["stale"]


def test_evidence_within_a_window_ends_at_its_edge(careful):
    just_outside = rows(VITALS, 24) + rows({"HR": 100, "Resp": 20}, 1)
    assert assessed(careful, just_outside).reason.tolist() == ["insufficient_evidence"]
    assert assessed(careful, rows(VITALS, 23.999) + rows({"HR": 100}, 1)).reason.tolist() == [None]


def test_each_visit_by_itself(careful):
    records = rows(VITALS, 1, "1") + rows({"HEIGHT": 181}, 1, "2") + rows(VITALS, 20, "3")
    records += [r | {"observation_value": None} for r in rows({"HR": 1}, 1, "4")]
    found = assessed(careful, records)
    assert found.reason.tolist() == [None, "insufficient_evidence", "stale", "nothing_usable"]
    assert found.remark().startswith("3 of 4 risks are UNKNOWN: 1 x too little")


def test_predict_warns_and_leaves_the_score_empty(careful):
    with pytest.warns(UnknownRiskWarning, match="1 of 2 risks are UNKNOWN"), pytest.warns(fp.MissingCodesWarning):
        table = careful.predict(rows(VITALS, 1, "1") + rows({"HEIGHT": 181}, 1, "2"), details=True)
    assert table["sepsis_probability"].isna().tolist() == [False, True]
    assert table["reason"].isna().tolist() == [True, False] and table["reason"][1] == "insufficient_evidence"
    assert table["missing"].tolist() == ["", ", ".join(MINIMUM["inputs"])]
    assert careful.explain(rows(VITALS, 1, "1") + rows({"HEIGHT": 181}, 1, "2"))["visit_id"].unique().tolist() == ["1"]


def test_codes_known_by_their_concept_are_evidence(careful):
    other = {"8889-8": 130, "9279-1": 32, "76215-3": 78, "8331-1": 39.4, "2708-6": 86}
    found, expected = assessed(careful, rows(other)), assessed(careful, rows(VITALS))
    assert found.reason.tolist() == [None] and found.probability.tolist() == expected.probability.tolist()


# --------------------------------------------------------------------------------------------------- the future


def test_rows_of_the_future_are_set_aside_and_change_nothing(careful):
    expected = assessed(careful, rows(VITALS))
    for code in ("HR", "HEIGHT"):
        observations = careful.reproducer.read(rows(VITALS) + rows({code: 50.0}, -48), to_micros(NOW))
        assert observations.set_aside == {"future": 1}
        visit, moments, _ = fp.resolve_snapshots(observations, NOW)
        assert careful.assess(observations, visit, moments).probability.tolist() == expected.probability.tolist()


def test_clocks_may_differ_by_five_minutes():
    records = rows({"HR": 80}, -5 / 60) + rows({"HR": 81}, -5 / 60 - 1e-6)
    observations = fp.read_observations(records, now=to_micros(NOW))
    assert observations.value.tolist() == [80] and observations.set_aside == {"future": 1}
    assert fp.read_observations(records).set_aside == {}  # files of past stays have no now


# ----------------------------------------------------------------------------------------------------- look-back


def every_feature():
    codes = ["HR", "X"]
    for block in fp.BLOCKS:
        yield from fp.block_features(block, codes)


def test_the_look_back_of_a_plan_is_the_longest_of_its_features():
    def look_back(*names):
        return FeaturePlan(names).look_back

    assert look_back("HR__last") == 0 and look_back("HR__last", "HR__mean__6h", "HR__min__24h") == 24
    assert look_back("HR__mean") is None and look_back("context__observations_6h") == 6
    assert look_back("clinical__sirs") == 24 and look_back("context__types") is None


def test_a_context_feature_cannot_be_declared_without_its_look_back():
    with pytest.raises(TypeError, match="look_back"):
        fp.context("observations_48h")


@settings(max_examples=60, deadline=None)
@given(visits())
def test_nothing_beyond_the_look_back_changes_a_feature(records):
    """Beyond it only the latest observation of each code counts: with all older ones left out nothing changes."""
    for name in every_feature():
        plan = FeaturePlan([name])
        if plan.look_back is None:
            continue
        for moment in moments_of(records)[::7]:
            known = [r for r in records if r["observation_date"] <= moment]
            horizon = moment - timedelta(hours=plan.look_back)
            latest = {}
            for r in known:
                latest[r["observation_type_code"]] = max(
                    latest.get(r["observation_type_code"], r["observation_date"]), r["observation_date"]
                )
            kept = [
                r
                for r in known
                if r["observation_date"] > horizon or r["observation_date"] == latest[r["observation_type_code"]]
            ]
            if not known or min(r["observation_date"] for r in kept) > moment:
                continue
            values = []
            for rows_ in (known, kept):
                observations = fp.read_observations(rows_)
                if not len(observations.time):
                    break
                visit, moments, _ = fp.resolve_snapshots(observations, moment)
                values.append(plan.evaluate(observations, visit, moments)[0, 0])
            assert len(values) < 2 or np.array_equal(values[0], values[1], equal_nan=True), name


def test_every_feature_has_a_look_back_of_its_own():
    assert all(isinstance(s.of_latest, bool) for s in STATISTICS.values())
    assert all(c.look_back is None or c.look_back >= 0 for c in CONTEXT.values())
