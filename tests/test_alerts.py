"""When an alert starts, what it is worth, and figures worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stays import HOUR, scored_of, starts, stays_of

from common.alerts import Scored, figures_of, lead_times, per_visit, quartiles, totals
from evaluation.alerts import at_alert_rates, before_antibiotics, hours_of_day, left_out, random_alerts

# ------------------------------------------------------------------------------------------ when an alert starts


def test_a_visit_with_three_alerts():
    """HIGH at 1, 2, 9, 14, 15, 21 h with 6 h of silence: 1 silences 2, 9 silences 14, 15 stands alone 6 h after 9,
    21 is 6 h after 15."""
    scores = {t: 0.9 if t in (1, 2, 9, 14, 15, 21) else 0.1 for t in range(24)}
    scored = scored_of(stays_of((23, None)), scores)
    assert starts(scored) == [(0, 1), (0, 9), (0, 15), (0, 21)]
    assert starts(scored_of(stays_of((23, None)), scores, cooldown=8)) == [(0, 1), (0, 9), (0, 21)]
    assert len(scored_of(stays_of((23, None)), scores, cooldown=0).alerts) == 6


def test_a_visit_that_stays_high_alerts_again_after_the_silence_and_rises_once():
    scored = scored_of(stays_of((20, None)), {t: 0.9 for t in range(20)})
    assert starts(scored) == [(0, 0), (0, 6), (0, 12), (0, 18)]
    assert len(scored.rises) == 1
    after_unknown = {0: 0.9, 1: np.nan, 2: 0.9, 8: 0.9}  # UNKNOWN is a lower level for the stream, too
    assert len(scored_of(stays_of((20, None)), after_unknown).rises) == 1  # 2 is within the silence, 8 no rise
    assert len(scored_of(stays_of((20, None)), after_unknown, cooldown=1).rises) == 2


def test_the_silence_of_one_visit_is_not_that_of_another():
    scored = scored_of(stays_of((9, None), (9, None)), {8: 0.9, 9: 0.9}, {0: 0.9, 1: 0.9})
    assert starts(scored) == [(0, 8), (1, 0)]


def test_a_score_at_the_threshold_is_high_and_unknown_is_not():
    scored = scored_of(stays_of((3, None)), {0: 0.5, 1: np.nan, 2: 0.4999})
    assert starts(scored) == [(0, 0)]
    assert per_visit(scored)["unknown"].tolist() == [1]


def test_of_several_scores_of_one_moment_the_highest_counts():
    stays = stays_of((3, None))
    scored = Scored.of(
        stays,
        np.array([0, 0, 0]),
        np.array([HOUR, HOUR, 0]),
        np.array([0.2, 0.8, np.nan]),
        np.array([False, True, False]),
    )
    assert scored.probability[1] == 0.8 and starts(scored) == [(0, 1)] and len(scored.visit) == 2


# ------------------------------------------------------------------------------------------ figures by hand


def test_true_false_late_by_hand():
    """Onset at 50 h. Alerts at 1 (49 h before: false at 48 h), 10 (40 h: true at 48 only), 30 (20 h: true at 24, 48),
    45 (5 h: true), 52 (2 h after: true), 53.5 (3.5 h after: late). Another visit without sepsis has one: false."""
    stays = stays_of((60, 50), (48, None))
    hot = (1, 10, 30, 45, 52, 53.5)
    scored = scored_of(stays, {t: 0.9 for t in hot} | {0: 0.1, 60: 0.1}, {4: 0.9, 48: 0.1}, cooldown=1)
    sums = totals(per_visit(scored))
    assert sums["alerts"] == 7 and sums["late"] == 1 and sums["judged"] == 6
    assert (sums["true_12h"], sums["true_24h"], sums["true_48h"]) == (2, 3, 4)
    assert sums["days"] == 60 / 24 + 2
    found = figures_of(sums)
    assert found["ppv_48h"] == 4 / 6 and found["ppv_12h"] == 2 / 6
    assert found["alerts_per_100_patient_days"] == pytest.approx(100 * 7 / 4.5)
    assert found["false_alerts_per_100_patient_days_48h"] == pytest.approx(100 * 2 / 4.5)
    assert found["sensitivity_12h"] == found["sensitivity_48h"] == 1
    assert found["visits_alerted_per_100"] == 100 and found["visit_ppv"] == 0.5
    assert [lead_times(scored, w)[0] for w in (12, 24, 48, 100)] == [5, 20, 40, 49]


@pytest.mark.parametrize(("at", "true"), [(2, True), (1.99, False), (53, True), (53.01, None), (50, True)])
def test_the_edges_of_the_window_belong_to_it(at, true):
    """Onset at 50 h, window 48 h, up to 3 h after."""
    sums = totals(per_visit(scored_of(stays_of((60, 50)), {0: 0.1, at: 0.9, 60: 0.1}), (48,)))
    assert (sums["true_48h"], sums["false_48h"], sums["late"]) == {
        True: (1, 0, 0),
        False: (0, 1, 0),
        None: (0, 0, 1),
    }[true]


def test_an_alert_at_onset_is_true_but_does_not_come_before_it():
    sums = totals(per_visit(scored_of(stays_of((10, 5)), {0: 0.1, 5: 0.9}), (48,)))
    assert (sums["true_48h"], sums["caught_48h"], sums["at_risk"]) == (1, 0, 1)


def test_onset_before_the_first_score_cannot_be_caught():
    stays = stays_of((30, -2), (30, 20))
    scored = scored_of(stays, {0: 0.9, 6: 0.9}, {0: 0.1, 10: 0.9})
    found = figures_of(totals(per_visit(scored, (48,))), (48,))
    assert found["sensitivity_48h"] == 1  # of the one that could be
    assert left_out(scored) == {
        "septic visits with onset at or before their first score": 1,
        "alerts later than 3 h after onset": 1,
    }


def test_onset_after_the_record_is_counted_apart():
    scored = scored_of(stays_of((20, 30), (20, 10), (20, None)), *[{0: 0.1, 5: 0.2}] * 3)
    assert left_out(scored) == {"septic visits with onset after the end of their record": 1}


def test_no_septic_visit_at_all():
    scored = scored_of(stays_of((24, None), (24, None)), {0: 0.9}, {0: 0.1})
    found = figures_of(totals(per_visit(scored)))
    assert found["ppv_48h"] == 0 and np.isnan(found["sensitivity_48h"]) and np.isnan(found["visit_sensitivity"])
    assert quartiles(lead_times(scored, 48)) is None


def test_no_alert_at_all():
    scored = scored_of(stays_of((24, 20)), {0: 0.1})
    found = figures_of(totals(per_visit(scored)))
    assert np.isnan(found["ppv_48h"]) and found["sensitivity_48h"] == 0
    assert random_alerts(scored) == {}


def test_hours_of_the_day_and_antibiotics_by_hand():
    stays = stays_of((60, 50), (60, None), (60, 50))
    scored = scored_of(stays, {26: 0.9, 40: 0.9}, {2: 0.9}, {49: 0.9})
    assert [hour for hour, n in enumerate(hours_of_day(scored)) for _ in range(n)] == [1, 2, 2, 16]
    antibiotic = np.array([44 * HOUR, 10 * HOUR, 48 * HOUR])  # the second visit is not septic
    assert before_antibiotics(scored, antibiotic, 24) == {
        "septic_visits_with_antibiotic": 2,
        "alerted_before": 1,
        "lead_hours": [18, 18, 18],
        "window_hours": 24,
    }


# ------------------------------------------------------------------------------------------ thresholds


def test_the_threshold_for_a_budget_by_hand():
    """Scores 0.1, 0.2, 0.3 in visits of one day each: at most 2 alerts from 0.2 on, 1 from 0.3 on."""
    stays = stays_of((24, None), (24, None), (24, 20))
    scored = scored_of(stays, {0: 0.1}, {0: 0.2}, {0: 0.3})
    assert [scored.threshold_for(n) for n in (3, 2, 1, 0)] == [0.1, 0.2, 0.3, np.inf]
    rows = at_alert_rates(scored, (10, 34, 67, 100, 500), beds=30)
    assert [row["threshold"] for row in rows] == [0.3, 0.2, 0.1]
    assert rows[0]["alerts_per_100_patient_days"] == pytest.approx(100 / 3)
    assert rows[0]["alerts_a_day"] == pytest.approx(10)
    assert rows[0]["ppv"] == 1 and rows[1]["ppv"] == 0.5 and rows[0]["lead_hours"] == 20


def test_tied_scores_are_called_together():
    scored = scored_of(stays_of((24, None), (24, None), (24, 20)), {0: 0.2}, {0: 0.2}, {0: 0.2})
    assert scored.threshold_for(3) == 0.2 and scored.threshold_for(2) == np.inf


visits = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 80)),
        st.dictionaries(
            st.integers(0, 72), st.one_of(st.just(np.nan), st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5])), min_size=1
        ),
    ),
    min_size=1,
    max_size=6,
)


def cohort(drawn, cooldown):
    stays = stays_of(*((72, onset) for onset, _ in drawn))
    return scored_of(stays, *(scores for _, scores in drawn), cooldown=cooldown)


@settings(max_examples=200, deadline=None)
@given(visits, st.sampled_from([0, 1, 6, 24, 100]))
def test_alerts_never_rise_when_the_threshold_does(drawn, cooldown):
    scored = cohort(drawn, cooldown)
    counts = [len(scored.at_threshold(t).alerts) for t in (0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0
    alerted = [per_visit(scored.at_threshold(t))["alerted"].sum() for t in (0.1, 0.3, 0.5)]
    assert alerted == sorted(alerted, reverse=True)
    assert all(len(scored.at_threshold(t).rises) <= len(scored.at_threshold(t).alerts) for t in (0.2, 0.4))
    for most in range(counts[0] + 1):
        threshold = scored.threshold_for(most)
        assert len(scored.at_threshold(threshold).alerts) <= most


@settings(max_examples=100, deadline=None)
@given(visits, st.sampled_from([0, 6, 24]))
def test_alert_starts_as_a_plain_loop_has_them(drawn, cooldown):
    scored = cohort(drawn, cooldown)
    expected = []
    for visit, (_, scores) in enumerate(drawn):
        last = None
        for t in sorted(scores):
            if scores[t] >= 0.5 and (last is None or t - last >= cooldown):
                expected.append((visit, t))
                last = t
    assert starts(scored) == expected


@settings(max_examples=50, deadline=None)
@given(visits, st.randoms(use_true_random=False))
def test_figures_do_not_depend_on_the_order_of_rows(drawn, chance):
    scored = cohort(drawn, 6)
    order = list(range(len(scored.visit)))
    chance.shuffle(order)
    other = Scored.of(
        scored.stays, scored.visit[order], scored.time[order], scored.probability[order], scored.high[order], 6
    )
    ours, theirs = totals(per_visit(scored)), totals(per_visit(other))
    assert ours == theirs and at_alert_rates(scored) == at_alert_rates(other)


# ------------------------------------------------------------------------------------------ chance


def test_random_scores_are_no_better_than_random_scores():
    """Sepsis without any signal: the figures of the scores lie within those of chance at the same number of alerts."""
    generator = np.random.default_rng(3)
    n, hours = 400, 60
    stays = stays_of(*((hours, int(generator.integers(20, 60)) if i % 4 == 0 else None) for i in range(n)))
    visit, time = np.repeat(np.arange(n), hours), np.tile(np.arange(hours), n) * HOUR
    p = generator.random(n * hours)
    scored = Scored.of(stays, visit, time, p, p >= 0.97)
    ours, chance = figures_of(totals(per_visit(scored))), random_alerts(scored)
    assert abs(chance["alerts_per_100_patient_days"] / ours["alerts_per_100_patient_days"] - 1) < 0.01
    for name in ("ppv_48h", "sensitivity_48h"):
        low, high = chance[f"{name}_range"]
        assert low * 0.9 < ours[name] < high * 1.1
    # the trap: chance has a lead time, too
    assert chance["lead_hours_48h"] > 10


def test_a_score_that_knows_beats_chance():
    generator = np.random.default_rng(4)
    n, hours = 200, 60
    onset = [int(generator.integers(20, 60)) if i % 4 == 0 else None for i in range(n)]
    stays = stays_of(*((hours, o) for o in onset))
    visit, time = np.repeat(np.arange(n), hours), np.tile(np.arange(hours), n) * HOUR
    lead = np.array([np.inf if onset[v] is None else onset[v] - t / HOUR for v, t in zip(visit, time, strict=True)])
    p = np.where((lead > 0) & (lead < 12), 0.9, 0.1)
    scored = Scored.of(stays, visit, time, p, p >= 0.5)
    ours, chance = figures_of(totals(per_visit(scored))), random_alerts(scored)
    assert ours["ppv_48h"] == 1 and ours["sensitivity_12h"] == 1
    assert ours["ppv_48h"] > chance["ppv_48h_range"][1]
