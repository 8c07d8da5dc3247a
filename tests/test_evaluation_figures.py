"""Evaluation by hand: resampling, ward scores, net benefit, calibration, groups."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from stays import HOUR, scored_of, stays_of

from common.alerts import Scored, judged_moments
from common.metrics import sensitivity_at_alert_rate
from evaluation.calibration import by_hours, by_month, calibration, log_odds, logistic_fit
from evaluation.comparators import COMPARATORS, Ranked, compare_with_ward_score
from evaluation.evaluate import significant
from evaluation.net_benefit import best_ranges, decision_curve, net_benefit
from evaluation.resampling import Clients, banded, called_at_rate, interval, ranking, ratio_interval
from evaluation.scoring import past_of, ward_scores_of
from evaluation.subgroups import FEWEST_VISITS, differences, group_table, named_groups, observed_groups
from feature_pipeline import NO_TIME, BadConfig, read_observations

ONE_RESAMPLE = 4  # of figures whose intervals do not matter


# ------------------------------------------------------------------------------------------ resampling, ranking

scores = st.lists(
    st.tuples(st.sampled_from([0, 1]), st.sampled_from([np.nan, 0, 1, 2, 5, 7]), st.integers(0, 4)), min_size=4
)


@settings(max_examples=200, deadline=None)
@given(scores)
def test_histograms_rank_as_scikit_learn_does(rows):
    label, score, client = (np.array(column) for column in zip(*rows, strict=True))
    client = np.unique(client, return_inverse=True)[1]
    if not 0 < label.sum() < len(label):
        return
    clients = Clients(client, ONE_RESAMPLE)
    band, edges = banded(score)
    positive, negative = clients.histograms(band, len(edges) + 1, label, client)
    found = ranking(positive[:1], negative[:1])
    plain = np.nan_to_num(score, nan=-1)
    assert found["roc_auc"][0] == pytest.approx(roc_auc_score(label, plain))
    assert found["average_precision"][0] == pytest.approx(average_precision_score(label, plain))
    for rate in (0.1, 0.37, 1.0):
        sensitivity, ppv = called_at_rate(positive[:1], negative[:1], np.array([rate]))
        assert sensitivity[0] == pytest.approx(sensitivity_at_alert_rate(label, plain, rate))
        assert ppv[0] == pytest.approx(sensitivity[0] * label.sum() / (rate * len(label)))


def test_an_interval_needs_half_of_the_resamples():
    assert interval(np.array([1.0, 1.0, np.nan])) == [1, 1]
    assert interval(np.array([1.0, np.nan, np.nan])) is None and interval(np.array([])) is None


def test_resamples_draw_whole_clients():
    client = np.array([0, 0, 1, 2])
    clients = Clients(client, 200, seed=5)
    assert (clients.weights.sum(axis=1) == 3).all()
    drawn = clients.sums({"n": np.ones(4), "x": np.array([1.0, 2, 10, 100])})
    for weight, n, x in zip(clients.weights, drawn["n"], drawn["x"], strict=True):
        assert n == 2 * weight[0] + weight[1] + weight[2]
        assert x == 3 * weight[0] + 10 * weight[1] + 100 * weight[2]
    part = clients.sums({"x": np.array([1.0, 2, 10, 100])}, np.array([True, False, False, True]))
    assert (part["x"] == clients.weights @ np.array([1, 0, 100])).all()


def test_medians_of_resamples_by_hand():
    clients = Clients(np.array([0, 1, 2, 2]), 50, seed=1)
    values = np.array([10.0, np.nan, 4, 6])
    found = clients.medians(values)
    assert found[0] == 6
    for weight, median in zip(clients.weights, found[1:], strict=True):
        drawn = [10] * int(weight[0]) + [4, 6] * int(weight[2])
        assert np.isnan(median) if not drawn else median == np.sort(drawn)[(len(drawn) - 1) // 2]
    assert np.isnan(clients.medians(np.full(4, np.nan))).all()


def test_bands_of_a_continuous_score_keep_its_order():
    score = np.random.default_rng(0).random(5000)
    band, edges = banded(score)
    assert len(edges) <= 200 and band.min() == 1
    order = np.argsort(score)
    assert (np.diff(band[order]) >= 0).all()
    assert (score >= edges[band - 1]).all()
    assert banded(np.array([3.0, np.nan, 1.0, 3.0]))[0].tolist() == [2, 0, 1, 2]


# ------------------------------------------------------------------------------------------ against ward scores


def hand_case():
    """Two visits of ten clients' kind: visit 0 septic at 10 h, visit 1 not; six moments each."""
    stays = stays_of((5, 10), (5, None))
    model = scored_of(
        stays,
        dict(enumerate([0.1, 0.2, 0.3, 0.6, 0.7, 0.8])),
        dict(enumerate([0.1, 0.1, 0.2, 0.5, 0.2, 0.1])),
        threshold=0.55,
    )
    news2 = np.array([3, 4, 5, 6, np.nan, 7, 1, 5, 5, 6, 0, np.nan], dtype=float)
    return model, news2


def test_a_ward_score_by_hand():
    """Horizon 6 h: positive moments are those from 4 h on, 4 and 5 of visit 0. NEWS2 >= 5 calls 6 of 12 moments, one
    of two positives (the other is missing, and ranks lowest); the model's six highest hold both."""
    model, news2 = hand_case()
    judged = judged_moments(model, 6, False)
    assert judged.label.tolist() == [0, 0, 0, 0, 1, 1] + [0] * 6
    client = model.stays.client[model.visit[judged.rows]]
    clients = Clients(model.stays.client, ONE_RESAMPLE)
    ours, theirs = (Ranked.of(s[judged.rows], judged.label, client, clients) for s in (model.probability, news2))
    found = compare_with_ward_score("news2", model, news2, ours, theirs, clients)
    assert found["called_share"] == 0.5 and found["without_input"] == pytest.approx(2 / 12)
    gap = found["differences"]
    assert (gap["moment_sensitivity"]["comparator"], gap["moment_sensitivity"]["model"]) == (0.5, 1)
    assert (gap["moment_ppv"]["comparator"], gap["moment_ppv"]["model"]) == (1 / 6, 2 / 6)
    assert gap["roc_auc"]["model"] == found["ranking"]["model"]["roc_auc"] == 1
    # NEWS2 alerts at 2 h of visit 0 and 1 h of visit 1; the model gives as many at 0.1
    equal = found["equal_alerts"]
    assert equal["comparator"]["sums"]["alerts"] == equal["model"]["sums"]["alerts"] == 2
    assert equal["threshold"] == 0.1
    assert equal["comparator"]["ppv_48h"] == 0.5


def test_the_equal_alert_threshold_gives_no_more_alerts():
    generator = np.random.default_rng(1)
    n, hours = 60, 30
    stays = stays_of(*((hours, 25 if i % 3 == 0 else None) for i in range(n)))
    visit, time = np.repeat(np.arange(n), hours), np.tile(np.arange(hours), n) * HOUR
    p = generator.random(n * hours)
    model = Scored.of(stays, visit, time, p, p > 0.9)
    score = generator.integers(0, 10, n * hours).astype(float)
    judged = judged_moments(model, 6, False)
    client, clients = stays.client[visit[judged.rows]], Clients(stays.client, 50)
    ours, theirs = (Ranked.of(s[judged.rows], judged.label, client, clients) for s in (p, score))
    found = compare_with_ward_score("mews", model, score, ours, theirs, clients)["equal_alerts"]
    assert found["model"]["sums"]["alerts"] <= found["comparator"]["sums"]["alerts"]
    assert found["model"]["sums"]["alerts"] > 0.9 * found["comparator"]["sums"]["alerts"]
    low, high = found["differences"]["ppv_48h"]["difference_95"]
    assert low < 0 < high  # noise against noise


def test_ward_scores_of_a_visit_and_what_they_lack():
    rows = [(0, "HR", 131), (0, "Resp", 25), (0, "SBP", 90), (0, "Temp", 39.1), (30, "HR", 80)]
    records = [
        {
            "visit_id": 1,
            "client": "a",
            "observation_date": (pd.Timestamp("2024-01-01") + pd.Timedelta(hours=hour)).isoformat(),
            "observation_type_code": code,
            "observation_value": value,
        }
        for hour, code, value in rows
    ]
    labels = pd.DataFrame({"visit_id": ["1"], "client": ["a"], "sepsis": [0], "sepsis_onset": NO_TIME})
    past = past_of(read_observations(records), labels, 30.0)
    assert (past.time - past.time[0]).tolist() == [0, 30 * HOUR]
    found, lacking = ward_scores_of(past)
    assert found["news2"].tolist() == [3 + 3 + 3 + 2, 0]
    assert found["mews"].tolist() == [2 + 3 + 1 + 2, 0]
    assert found["sirs"].tolist() == [3, 0] and found["qsofa"][0] == 2 and np.isnan(found["qsofa"][1])
    assert np.isnan(found["sofa"]).all()
    assert lacking["news2"]["respiration"] == 0.5 and lacking["news2"]["pulse"] == 0
    assert lacking["sofa"] == dict.fromkeys(COMPARATORS["sofa"].parts, 1)


# ------------------------------------------------------------------------------------------ net benefit


def test_net_benefit_by_hand():
    """10 moments, 2 positive. At t = 0.2 a needless response costs a quarter of a timely one. The model calls 3 with
    both positives: 2/10 - 1/10/4 = 0.175. All: 2/10 - 8/10/4 = 0. A test that calls 5 with one: 1/10 - 4/10/4 = 0."""
    label = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    p = np.array([0.9, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, np.nan, 0.19])
    test = np.array([1, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
    curve = decision_curve(label, p, {"news2": test}, np.array([0.2, 0.5]))
    assert curve["model"] == pytest.approx([0.175, 0.1])
    assert curve["all"] == pytest.approx([0, 0.2 - 0.8]) and curve["none"] == [0, 0]
    assert curve["news2"] == pytest.approx([0, 0.1 - 0.4])
    assert net_benefit(2, 1, 10, 0.2) == pytest.approx(0.175)
    assert best_ranges(curve) == [(0.2, 0.5)]


def test_ranges_in_which_the_model_is_best():
    curve = {"threshold": [0.1, 0.2, 0.3, 0.4], "model": [0.2, 0, 0.1, 0.1], "all": [0.1] * 4, "none": [0.0] * 4}
    assert best_ranges(curve) == [(0.1, 0.1)]
    curve["all"] = [0.1, 0.1, 0.05, 0.05]
    assert best_ranges(curve) == [(0.1, 0.1), (0.3, 0.4)]


def test_nobody_can_be_worth_more_than_knowing_and_no_test_beats_its_own_threshold():
    generator = np.random.default_rng(0)
    p = generator.random(2000) ** 2
    label = (generator.random(2000) < p).astype(int)
    curve = decision_curve(label, p, {})
    assert max(curve["model"]) <= label.mean()
    calibrated = np.array(curve["model"])
    assert (calibrated >= np.maximum(curve["all"], curve["none"]) - 0.01).all()


# ------------------------------------------------------------------------------------------ calibration


def test_calibration_by_hand():
    label = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    p = np.array([0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.9, 0.9])
    found = calibration(label, p)
    assert found["expected_over_observed"] == pytest.approx(3.2 / 4)
    assert found["brier"] == pytest.approx((3 * 0.01 + 0.81 + 2 * 0.25 + 2 * 0.01) / 8)


def test_slope_and_intercept_as_scikit_learn_fits_them():
    generator = np.random.default_rng(2)
    x = generator.normal(size=4000)
    label = (generator.random(4000) < 1 / (1 + np.exp(-(0.6 * x - 1)))).astype(int)
    intercept, slope = logistic_fit(x, label)
    other = LogisticRegression(C=np.inf, tol=1e-10).fit(x[:, None], label)
    assert (intercept, slope) == pytest.approx((other.intercept_[0], other.coef_[0, 0]), abs=1e-5)
    large, one = logistic_fit(x, label, slope=False)
    assert one == 1 and (1 / (1 + np.exp(-(large + x)))).mean() == pytest.approx(label.mean())


def test_slope_of_a_rare_outcome_with_a_wide_score():
    """Here plain Newton jumps past the optimum and never comes back."""
    generator = np.random.default_rng(36)
    mean, spread = generator.uniform(-7, -4), generator.uniform(0.2, 1.5)
    x = generator.normal(mean, spread, 18_840)
    label = (generator.random(len(x)) < 1 / (1 + np.exp(-x * generator.uniform(0.5, 1.5)))).astype(int)
    assert label.sum() == 16
    intercept, slope = logistic_fit(x, label)
    other = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], label)
    assert (intercept, slope) == pytest.approx((other.intercept_[0], other.coef_[0, 0]), abs=0.01)


@pytest.mark.parametrize("label", [[0, 0, 0], [1, 1, 1]])
def test_calibration_without_two_kinds_of_outcome_is_not_known(label):
    found = calibration(np.array(label), np.array([0.1, 0.2, 0.3]))
    assert found["slope"] is None and found["intercept"] is None


def test_perfect_separation_has_no_slope():
    assert all(np.isnan(logistic_fit(log_odds(np.array([0.1, 0.2, 0.8, 0.9])), np.array([0, 0, 1, 1]))))


def test_stretches_and_months_by_hand():
    n = 12
    label = np.tile([0, 1], n)
    p = np.where(label == 1, 0.8, 0.2)
    visit = np.arange(2 * n)
    hours = np.full(2 * n, 6.0)
    rows = by_hours(label, p, hours, visit)
    assert [row["moments"] for row in rows] == [0, 24, 0, 0, 0, 0]
    assert rows[1]["roc_auc"] == 1 and rows[1]["expected_over_observed"] == pytest.approx(12 / 12)
    assert rows[0]["roc_auc"] is None
    time = np.repeat([np.datetime64("2024-01-31T23:59", "us"), np.datetime64("2024-02-01", "us")], n).astype(np.int64)
    assert [row["month"] for row in by_month(label, p, time, visit)] == ["2024-01", "2024-02"]


# ------------------------------------------------------------------------------------------ groups


def group_sums(n, worse):
    """`n` visits, half septic; in group b (the second half) a share `worse` of the septic ones is caught."""
    septic = np.tile([1.0, 0], n // 2)
    b = np.arange(n) >= n // 2
    caught = septic * np.where(b, np.arange(n) % 20 < 20 * worse, 1)
    one = np.ones(n)
    sums = {"visits": one, "septic": septic, "days": 2 * one, "alerts": one, "true": caught, "judged": one}
    sums |= {"caught": caught, "at_risk": septic, "expected": septic * 0.9, "observed": septic}
    return sums, {"site": np.where(b, "b", "a").astype(object)}


def test_groups_by_hand():
    sums, groups = group_sums(400, worse=0.5)
    clients = Clients(np.arange(400), 200)
    a, b = group_table(sums, groups, clients)
    assert (a["sensitivity"], b["sensitivity"]) == (1, 0.5) and (a["ppv"], b["ppv"]) == (0.5, 0.25)
    assert a["alerts_per_100_patient_days"] == 50 and a["expected_over_observed"] == pytest.approx(0.9)
    assert b["sensitivity_95"][0] < 0.5 < b["sensitivity_95"][1]
    found = differences(sums, groups, clients)
    assert {row["group"] for row in found} == {"a"}  # two groups are one comparison
    assert {row["measure"] for row in found if row["exceeds_chance"]} == {"sensitivity", "ppv"}


def test_equal_groups_differ_by_chance_only():
    generator = np.random.default_rng(7)
    sums, _ = group_sums(600, worse=1)
    sums["caught"] = sums["septic"] * (generator.random(600) < 0.5)
    named = 0
    for seed in range(20):
        texts = np.random.default_rng(seed).choice(["a", "b", "c"], 600).astype(object)
        found = differences(sums, {"ward": texts}, Clients(np.arange(600), 200, seed))
        named += any(row["exceeds_chance"] for row in found)
    assert named <= 3  # 5% of 20 are aimed at


def test_none_and_all_of_a_few_are_not_certain():
    """Every resample of "5 of 5" is 5 of 5: its interval and its differences would show no doubt at all."""
    values, few = np.ones(200), np.arange(5)
    all_of_5 = ratio_interval(values, np.ones(5), np.ones(5), few, 1.0, is_rate=False)
    assert all_of_5 == [pytest.approx(binomtest(5, 5).proportion_ci(method="exact").low), 1]
    none_of_5 = ratio_interval(0 * values, np.zeros(5), np.ones(5), few, 100.0, is_rate=False)
    assert none_of_5 == [0, pytest.approx(100 * binomtest(0, 5).proportion_ci(method="exact").high)]
    # no event in 10 days: exp(-10 x rate) = 0.025
    rate = ratio_interval(0 * values, np.zeros(5), 2 * np.ones(5), few, 100.0, is_rate=True)
    assert rate == [0, pytest.approx(36.89, abs=0.01)]

    def named(caught_a, n_a, caught_b, n_b):
        """Does sensitivity differ beyond chance between groups with so many caught of so many septic visits?"""
        n = 2 * (n_a + n_b)
        septic, a = np.tile([1.0, 0], n_a + n_b), np.arange(n) < 2 * n_a
        place = np.arange(n) // 2 - np.where(a, 0, n_a)
        sums = {"visits": np.ones(n), "septic": septic, "days": np.ones(n), "alerts": septic, "at_risk": septic}
        sums |= {"caught": septic * (place < np.where(a, caught_a, caught_b)), "expected": septic, "observed": septic}
        found = differences(sums, {"ward": np.where(a, "a", "b").astype(object)}, Clients(np.arange(n), 200))
        return {row["measure"] for row in found if row["exceeds_chance"]}

    assert named(7, 7, 90, 150) == set()  # p = 0.04 by Fisher's test; three comparisons are made
    assert named(40, 40, 0, 40) == {"sensitivity"}
    assert named(40, 40, 40, 40) == set()


def test_small_groups_are_held_back():
    sums, _ = group_sums(100, worse=1)
    texts = np.array(["rare"] * (FEWEST_VISITS - 1) + [""] * 31 + ["usual"] * 50, dtype=object)
    rows = group_table(sums, {"ward": texts}, Clients(np.arange(100), ONE_RESAMPLE))
    assert [(row["group"], row["visits"]) for row in rows] == [("rare", None), ("usual", 50), ("not known", 31)]
    assert "sensitivity" not in rows[0]
    assert differences(sums, {"ward": texts}, Clients(np.arange(100), ONE_RESAMPLE)) == []


def test_one_group_only_is_compared_with_nobody():
    sums, _ = group_sums(100, worse=1)
    groups = {"ward": np.full(100, "all", dtype=object)}
    assert differences(sums, groups, Clients(np.arange(100), ONE_RESAMPLE)) == []


def test_groups_of_a_file(tmp_path):
    (tmp_path / "g.csv").write_text("visit_id,client,ward,site\n1,a,ICU,x\n2.0,b,,y\n9,z,ER,x\n")
    found = named_groups(str(tmp_path / "g.csv"), [("a", "1"), ("b", "2"), ("c", "3")])
    assert {name: texts.tolist() for name, texts in found.items()} == {"ward": ["ICU", "", ""], "site": ["x", "y", ""]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("visit,client,ward\n1,a,x\n", "missing column 'visit_id'"),
        ("visit_id,client\n1,a\n", "at least one other column"),
        ("visit_id,client,ward\n7,q,x\n", "none of its visits"),
    ],
)
def test_bad_groups_are_refused_in_words(tmp_path, text, told):
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(BadConfig, match=told):
        named_groups(str(tmp_path / "g.csv"), [("a", "1")])


def test_observed_groups_of_the_cohort(cohort):
    observations = read_observations(cohort[0])
    found = observed_groups(observations, np.arange(observations.n_visits))
    assert set(found) == {"age", "sex"} and set(found["sex"]) == {"code 0", "code 1"}
    age = {key: text for key, text in zip(observations.keys(), found["age"], strict=True)}
    row = cohort[0][cohort[0]["observation_type_code"] == "Age"].iloc[0]
    low, _, high = age[str(row["client"]), str(row["visit_id"])].partition(" to ")
    assert int(low) <= float(row["observation_value"]) and (not high or float(row["observation_value"]) < int(high) + 1)


def test_significant_digits_are_rounded_up():
    assert significant(0.123449) == 0.1235 and significant(0.12) == 0.12 and significant(0.0012341) == 0.001235
