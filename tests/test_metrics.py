"""The figures of the reports, against scikit-learn, plain loops and examples worked by hand."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from common.metrics import (
    SENSITIVITIES,
    bootstrap_intervals,
    brier_score,
    calibration_table,
    describe_figures,
    figures,
    fit_platt,
    operating_point,
    operating_points,
    ranking_scores,
    threshold_for_sensitivity,
)


@st.composite
def scored_groups(draw):
    """(label, score, group): few distinct scores, hence many ties; both labels are there."""
    n = draw(st.integers(2, 40))
    label = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda y: 0 < sum(y) < n))
    score = draw(st.lists(st.sampled_from([-2.5, 0.0, 0.125, 0.3, 1.0]), min_size=n, max_size=n))
    group = draw(st.lists(st.integers(0, 7), min_size=n, max_size=n))
    return np.array(label), np.array(score), np.array(group)


# -------------------------------------------------------------------------------------------------- ranking


@settings(max_examples=50, deadline=None)
@given(scored_groups())
def test_ranking_scores_are_those_of_scikit_learn(example):
    label, score, _ = example
    scores = ranking_scores(label, score)
    assert scores["roc_auc"] == roc_auc_score(label, score)
    assert scores["average_precision"] == average_precision_score(label, score)
    assert scores["score"] == scores["roc_auc"] + scores["average_precision"]


def resampled_by_hand(label, score, group, n_resamples, seed):
    """The figures of each resample with its rows written out, from the same draws."""
    generator = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(group == g) for g in np.unique(group)]
    out = []
    for _ in range(n_resamples):
        rows = np.concatenate([rows_of[g] for g in generator.integers(0, len(rows_of), len(rows_of))])
        if 0 < label[rows].sum() < len(rows):
            out.append((roc_auc_score(label[rows], score[rows]), average_precision_score(label[rows], score[rows])))
    return np.array(out)


@settings(max_examples=60, deadline=None)
@given(scored_groups(), st.integers(0, 3))
def test_each_resample_agrees_with_scikit_learn_on_its_rows(example, seed):
    for n_resamples in (1, 7):  # one resample alone: the interval is that resample's figure
        expected = resampled_by_hand(*example, n_resamples, seed)
        intervals = bootstrap_intervals(*example, n_resamples=n_resamples, seed=seed)
        if len(expected):
            low, high = np.percentile(expected, [2.5, 97.5], axis=0)
            assert np.allclose(intervals["roc_auc"], (low[0], high[0]), rtol=0, atol=1e-12)
            assert np.allclose(intervals["average_precision"], (low[1], high[1]), rtol=0, atol=1e-12)
        else:
            assert np.isnan([*intervals["roc_auc"], *intervals["average_precision"]]).all()


def test_intervals_hold_the_figure_and_widen_where_rows_repeat_one_another():
    generator = np.random.default_rng(0)
    label = (np.arange(400) % 10 == 0).astype(int)
    score = generator.normal(size=400) + 1.2 * label
    alone = bootstrap_intervals(label, score, np.arange(400), 200)["roc_auc"]
    assert alone[0] < roc_auc_score(label, score) < alone[1]

    label, score, group = (np.repeat(column, 9) for column in (label, score, np.arange(400)))
    grouped = bootstrap_intervals(label, score, group, 200)["roc_auc"]
    assert grouped == pytest.approx(alone, abs=1e-12)  # nine copies of a group's row add nothing
    by_row = bootstrap_intervals(label, score, np.arange(len(label)), 200)["roc_auc"]
    assert by_row[1] - by_row[0] < 0.5 * (grouped[1] - grouped[0])
    named = bootstrap_intervals(label, score, np.array([f"c{g:04d}" for g in group]), 200)["roc_auc"]
    assert named == grouped  # groups may be of any kind


def test_figures_gather_what_a_report_shows():
    label, p = np.array([0, 1, 0, 1]), np.array([0.1, 0.8, 0.3, 0.2])
    shown = figures(label, p, group=np.array([0, 0, 1, 2]), visit=np.array([5, 5, 6, 7]))
    assert shown["roc_auc"] == 0.75 and shown["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert (shown["n_snapshots"], shown["n_visits"], shown["positive_rate"]) == (4, 3, 0.5)
    assert shown["brier"] == pytest.approx((0.01 + 0.04 + 0.09 + 0.64) / 4)
    texts = describe_figures(shown)
    assert texts["ROC AUC"].startswith("0.7500 (") and texts["Brier score"] == "0.19500"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_brier_score_is_that_of_scikit_learn(pairs):
    label, p = map(np.array, zip(*pairs, strict=True))
    assert brier_score(label, p) == pytest.approx(brier_score_loss(label, p, labels=[0, 1]), abs=1e-15)


# ---------------------------------------------------------------------------------------------- calibration


def drawn(slope, intercept, n=40_000, spread=2.0, seed=0):
    """Log-odds of a model, and labels of which ``slope * log_odds + intercept`` are the true log-odds."""
    generator = np.random.default_rng(seed)
    log_odds = generator.normal(-1, spread, n)
    label = (generator.random(n) < 1 / (1 + np.exp(-(slope * log_odds + intercept)))).astype(int)
    return log_odds, label


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.5, -1), (2.5, 1), (0.8, -3), (0.2, 0.5)])
def test_platt_recovers_a_known_slope_and_intercept(slope, intercept):
    log_odds, label = drawn(slope, intercept)
    assert fit_platt(log_odds, label) == pytest.approx((slope, intercept), abs=0.1)


@pytest.mark.parametrize("spread", [0.01, 0.3, 3, 30, 300])
@pytest.mark.parametrize("steepness", [0.3, 1, 3])
def test_platt_is_the_maximum_of_the_likelihood(spread, steepness):
    """Also for models far too sure or far too timid, where Newton's method starts far from the solution."""
    log_odds, label = drawn(steepness / spread, -1.5, n=3000, spread=spread)
    positives = label.sum()
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (len(label) - positives + 2))
    rows, weights = np.r_[log_odds, log_odds] / spread, np.r_[target, 1 - target]
    both = np.repeat([1, 0], len(label))
    known = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(rows[:, None], both, sample_weight=weights)
    slope, intercept = fit_platt(log_odds, label)
    assert (slope * spread, intercept) == pytest.approx((known.coef_[0, 0], known.intercept_[0]), rel=1e-3, abs=1e-3)


def test_platt_makes_the_mean_probability_the_positive_rate():
    log_odds, label = drawn(0.6, -3)
    slope, intercept = fit_platt(log_odds, label)
    assert (1 / (1 + np.exp(-(slope * log_odds + intercept)))).mean() == pytest.approx(label.mean(), rel=0.01)


def test_platt_refuses_to_turn_the_ranking_round():
    log_odds, label = drawn(-1.0, 0.3)
    slope, intercept = fit_platt(log_odds, label)
    assert slope == 1.0
    # the shift at least brings the middle of the scores to the positive rate
    assert 1 / (1 + math.exp(-(log_odds.mean() + intercept))) == pytest.approx(label.mean(), abs=0.2)


def test_platt_survives_perfect_and_constant_scores():
    label = np.repeat([0, 1], 50)
    for log_odds in (np.where(label == 1, 4.0, -4.0), np.zeros(100), np.linspace(-1e-9, 1e-9, 100)):
        slope, intercept = fit_platt(log_odds, label)
        assert slope > 0 and math.isfinite(slope) and math.isfinite(intercept)


def test_calibration_table_by_hand():
    p = np.array([0.9, 0.1, 0.4, 0.2, 0.8, 0.3])
    label = np.array([1, 0, 0, 1, 1, 0])
    table = calibration_table(label, p, bins=3)
    assert table["n"].tolist() == [2, 2, 2]
    assert table["mean_probability"].tolist() == pytest.approx([0.15, 0.35, 0.85])
    assert table["observed_rate"].tolist() == [0.5, 0, 1]


def test_calibration_table_with_fewer_rows_than_bins_holds_every_row_once():
    table = calibration_table(np.array([0, 1, 1]), np.array([0.2, 0.5, 0.6]), bins=10)
    assert table["n"].tolist() == [1, 1, 1] and table["observed_rate"].tolist() == [0, 1, 1]


# ----------------------------------------------------------------------------------------- operating points


def test_operating_point_by_hand():
    """Three visits: one called in time, one called in vain, one missed."""
    visit = np.array([1, 1, 1, 2, 2, 3, 3, 3])
    label = np.array([0, 0, 1, 0, 0, 0, 1, 1])
    p = np.array([0.1, 0.5, 0.7, 0.6, 0.2, 0.1, 0.2, 0.3])
    point = operating_point(label, p, visit, 0.5)
    assert point.threshold == 0.5
    assert point.sensitivity == pytest.approx(1 / 3)
    assert point.specificity == pytest.approx(3 / 5)  # the 0.5 itself is called
    assert point.ppv == pytest.approx(1 / 3)
    assert point.visits_alerted_per_100 == pytest.approx(100 * 2 / 3)
    assert point.septic_visits_alerted == 0.5
    none = operating_point(label, p, visit, 0.9)
    assert (none.sensitivity, none.specificity, none.visits_alerted_per_100) == (0, 1, 0) and math.isnan(none.ppv)


positives_and_others = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=60).filter(
    lambda pairs: any(y for y, _ in pairs)
)


@settings(max_examples=200, deadline=None)
@given(positives_and_others, st.integers(1, 20))
def test_threshold_is_the_highest_that_reaches_the_sensitivity(pairs, twentieths):
    label, score = map(np.array, zip(*pairs, strict=True))
    p = score / 20
    threshold = threshold_for_sensitivity(label, p, twentieths / 20)

    def reaches(t):  # in whole numbers
        return 20 * int((p[label == 1] >= t).sum()) >= twentieths * int(label.sum())

    assert threshold == max(t for t in p[label == 1] if reaches(t))


def test_threshold_is_the_highest_for_the_usual_sensitivities_too():
    """0.55 times 100 is 55.00000000000001 in floating point."""
    for n in range(1, 300):
        p, label = np.arange(1, n + 1) / (n + 1), np.ones(n, dtype=int)
        for sensitivity in (*SENSITIVITIES, 0.55):
            called = int((p >= threshold_for_sensitivity(label, p, sensitivity)).sum())
            assert called == max(-(-round(100 * sensitivity) * n // 100), 1), (n, sensitivity)


def test_operating_points_reach_the_usual_sensitivities_in_falling_order():
    log_odds, label = drawn(1, -2, n=2000)
    p = 1 / (1 + np.exp(-log_odds))
    points = operating_points(label, p, np.arange(2000) // 4)
    assert [point.sensitivity >= s for point, s in zip(points, SENSITIVITIES, strict=True)] == [True] * len(
        SENSITIVITIES
    )
    thresholds = [point.threshold for point in points]
    assert thresholds == sorted(thresholds)
