"""Hypothesis strategies for visits with everything that makes them awkward: ties, window edges, duplicates, gaps."""

from datetime import datetime, timedelta

import hypothesis.strategies as st

START = datetime(2024, 2, 28, 21, 30)  # nights and a leap day follow
TICK = timedelta(microseconds=1)

# Edges of the scores' bands stand among ordinary values.
VALUES = {
    "HR": (40, 50, 90, 90.5, 110, 130, 131, 72.3),
    "8867-4": (90, 91, 64.7, 130),
    "Temp": (35, 36, 35.9, 38, 38.1, 39, 36.6),
    "8310-5": (38, 40.2),
    "Resp": (8, 11, 20, 21, 22, 24, 25),
    "SBP": (90, 100, 110, 219, 220, 121.1),
    "DBP": (60, 55.5),
    "MAP": (69.9, 70, 88),
    "O2Sat": (91, 93, 95, 96, 99.3),
    "FiO2": (0.21, 0.22, 0.4, 1.0),
    "PaO2": (60, 84, 120),
    "PaCO2": (31.9, 32, 40),
    "WBC": (3.9, 4, 12, 12.1),
    "Platelets": (19, 20, 50, 100, 150, 151),
    "PLT": (49, 99),
    "Bilirubin_total": (1.1, 1.2, 2.0, 6.0, 12.0),
    "Creatinine": (0.0, 1.2, 2.0, 3.5, 5.0, 0.7),
    "BUN": (14, 33.3),
    "GCS": (3, 5, 6, 10, 13, 14, 15),
    "Age": (61, 61.5),
    "Gender": (0, 1),
    "unknown": (0, 0.1, -0.3, 1e-6, 1e6, -1e6),
    "X__min": (1, 2, 1 / 3),
}
ABSENT = "never measured"
CODES = (*VALUES, ABSENT)


def values(code: str) -> st.SearchStrategy[float]:
    low, high = min(VALUES[code]), max(VALUES[code])
    return st.sampled_from(VALUES[code]) | st.floats(low, high).map(lambda v: 0.0 if abs(v) < 1e-6 else v)


# Half hours, so that values often stand exactly 6, 12 or 24 h apart; sometimes a microsecond beside.
half_hours = st.integers(0, 100).map(lambda n: START + timedelta(minutes=30 * n))
near_start = st.integers(0, 4).map(lambda n: START + timedelta(minutes=30 * n))
times = near_start | half_hours | st.builds(lambda t, n: t + n * TICK, half_hours, st.sampled_from((-1, 1)))
bounds = st.none() | st.sampled_from((0, 1, 4.1, 36.6, 60, 90, 100))  # one-sided, inverted and equal ones too


@st.composite
def observations(draw, codes=tuple(VALUES)):
    code = draw(st.sampled_from(codes))
    return {
        "observation_date": draw(times),
        "observation_type_code": code,
        "observation_value": draw(values(code)),
        "reference_range_min": draw(bounds),
        "reference_range_max": draw(bounds),
    }


@st.composite
def visits(draw, visit_id="7", client="a", max_size=16):
    """The records of one visit, in any order: few codes (long runs of each) or many, and some rows twice."""
    codes = draw(st.lists(st.sampled_from(tuple(VALUES)), min_size=1, max_size=6, unique=True))
    if draw(st.booleans()):
        codes = tuple(VALUES)
    rows = draw(st.lists(observations(codes), min_size=1, max_size=max_size))
    rows += draw(st.lists(st.sampled_from(rows), max_size=2))
    return [{"visit_id": visit_id, "client": client} | row for row in draw(st.permutations(rows))]


@st.composite
def cohorts(draw, max_visits=4, max_size=8):
    """The records of several visits, mixed; two clients may use one visit number."""
    keys = st.tuples(st.sampled_from(("7", "8")), st.sampled_from(("a", "b", "007")))
    chosen = draw(st.lists(keys, min_size=1, max_size=max_visits, unique=True))
    rows = [row for key in chosen for row in draw(visits(*key, max_size=max_size))]
    return draw(st.permutations(rows))


def moments_of(records: list[dict]) -> list[datetime]:
    """Before the first observation; at each, a microsecond before and after; and where each leaves a window."""
    moments = set()
    for time in {record["observation_date"] for record in records}:
        moments |= {time - TICK, time, time + TICK, time + timedelta(minutes=17)}
        moments |= {time + timedelta(hours=hours) + n * TICK for hours in (6, 24) for n in (-1, 0)}
    return sorted(moments)
