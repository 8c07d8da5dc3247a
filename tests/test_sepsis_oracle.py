"""Sepsis-3 labels of random hospitals against plain Python that follows the definitions word by word."""

from datetime import timedelta

import numpy as np
import pandas as pd
import pytest

from feature_pipeline import SOFA_BANDS
from tests.hospital import Hospital, at

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
CONCEPTS = ("platelets", "creatinine", "gcs")


def random_hospital(seed: int) -> Hospital:
    """Eight patients with one visit each. Times are multiples of 6 h or 1 h, so that limits are often met exactly."""
    rng = np.random.default_rng(seed)
    hospital = Hospital(icu=False)
    hospital.con.execute("DELETE FROM visits")
    for number in range(8):
        client, visit = f"p{number}", f"v{number}"
        hospital.visit(visit, 0, 240, client=client)
        for hours in rng.integers(0, 40, rng.integers(0, 4)) * 6:
            hospital.antibiotic(float(hours), client=client, visit=visit)
        for hours in rng.integers(0, 40, rng.integers(0, 4)) * 6:
            hospital.culture(float(hours), has_time=rng.random() < 0.7, client=client, positive=rng.random() < 0.3)
        for concept in CONCEPTS:
            edges = SOFA_BANDS[concept][0]
            for hours in rng.integers(0, 240, rng.integers(0, 9)):
                value = float(rng.choice([*edges, *(edge - 0.01 for edge in edges), 2 * edges[-1]]))
                hospital.add("measurements", client, visit, None, at(float(hours)), concept, value)
    return hospital


def rows_of(hospital, table, client):
    return hospital.con.execute(f"SELECT * FROM {table} WHERE client = ?", [client]).df().to_dict("records")


def suspicion_of(antibiotic, cultures):
    """The time of suspicion of one order; None without a culture near it."""
    before, after = [], []
    for culture in cultures:
        time, taken = culture["time"], antibiotic["start"]
        if culture["has_time"]:
            is_before, is_after = time < taken <= time + 72 * HOUR, time - DAY <= taken < time
        else:
            days = (taken.normalize() - time).days
            is_before, is_after = 0 <= days <= 3, -1 <= days <= 0
        before += [time] * is_before
        after += [time] * is_after
    return min(before) if before else antibiotic["start"] if after else None


def points_of(concept, value):
    edges, points = SOFA_BANDS[concept]
    return points[sum(value >= edge for edge in edges)]


def sofa_at(hour, measurements):
    """The score at the end of an hour: of each part the worst of the 24 hours before it."""
    worst = dict.fromkeys(CONCEPTS, 0)
    for row in measurements:
        if hour - DAY < row["time"] <= hour:
            worst[row["concept"]] = max(worst[row["concept"]], points_of(row["concept"], row["value"]))
    return sum(worst.values())


def judged_by_hand(hospital, client, rise):
    """(is septic, time of suspicion, time of SOFA)"""
    cultures, measurements = rows_of(hospital, "cultures", client), rows_of(hospital, "measurements", client)
    times = [suspicion_of(order, cultures) for order in rows_of(hospital, "antibiotics", client)]
    times = sorted({time for time in times if time is not None})
    for time in times[:1] if rise else times:
        scores = []
        hours = [at(h) for h in range(241) if time - 2 * DAY <= at(h) <= time + DAY]
        for hour in hours:
            scores.append(sofa_at(hour, measurements))
            if scores[-1] - (min(scores) if rise else 0) >= 2:
                return True, time, hour
    return False, times[0] if times else None, None


@pytest.mark.parametrize("definition", ["sepsis3", "sepsis3-rise"])
@pytest.mark.parametrize("seed", range(6))
def test_random_hospitals_are_judged_as_by_hand(seed, definition):
    hospital = random_hospital(seed)
    judged = hospital.judge(definition=definition)
    for visit in judged.itertuples():
        septic, suspicion, sofa = judged_by_hand(hospital, visit.client, definition == "sepsis3-rise")
        found = [None if pd.isna(time) else time for time in (visit.suspicion_time, visit.sofa_time)]
        assert (visit.sepsis, *found) == (septic, suspicion, sofa), visit.Index


def test_the_random_hospitals_have_septic_visits_and_others():
    septic = [hospital.judge()["sepsis"] for hospital in map(random_hospital, range(6))]
    assert 0.2 < np.mean(septic) < 0.8
