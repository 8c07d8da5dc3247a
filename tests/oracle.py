"""Every feature once more, naively: plain Python over the records of one visit, exact sums, one function a feature.

Written from the definitions, not from `feature_pipeline`. Sums are exact fractions, rounded once at the end.
`None` stands for a missing feature.
"""

import math
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

WINDOWS = (6, 12, 24)
STATIC = {"Age", "Gender"}
CONCEPTS = {
    "HR": "heart_rate",
    "8867-4": "heart_rate",
    "Temp": "temperature",
    "8310-5": "temperature",
    "Resp": "respiratory_rate",
    "SBP": "systolic_bp",
    "DBP": "diastolic_bp",
    "MAP": "mean_bp",
    "O2Sat": "spo2",
    "FiO2": "fio2",
    "PaO2": "pao2",
    "PaCO2": "paco2",
    "WBC": "wbc",
    "Platelets": "platelets",
    "PLT": "platelets",
    "Bilirubin_total": "bilirubin_total",
    "Creatinine": "creatinine",
    "BUN": "bun",
    "GCS": "gcs",
}


class Row(NamedTuple):
    time: datetime
    value: float
    low: float | None
    high: float | None


def hours(span: timedelta) -> Fraction:
    return Fraction(span // timedelta(microseconds=1), 3_600_000_000)


def exact_mean(rows: list[Row]) -> Fraction:
    return sum(Fraction(row.value) for row in rows) / len(rows)


def exact_sqrt(number: Fraction) -> float:
    """The square root; scaled first, since a tiny fraction may round to 0 as a float."""
    if number == 0:
        return 0.0
    shift = 2 ** max(0, 120 - number.numerator.bit_length() + number.denominator.bit_length())
    return math.isqrt(number.numerator * shift * shift // number.denominator) / shift


# ------------------------------------------------------------------------------------------------- statistics
# f(rows, as_of, start): `rows` is never empty, oldest first, ties by value; `start` is the visit's first time.


def variance(rows):
    mean = exact_mean(rows)
    return sum((Fraction(row.value) - mean) ** 2 for row in rows) / len(rows)


def slope(rows, as_of, start):
    times = [hours(row.time - start) for row in rows]
    if len(set(times)) == 1:
        return None
    middle, mean = sum(times) / len(times), exact_mean(rows)
    together = sum((t - middle) * (Fraction(row.value) - mean) for t, row in zip(times, rows, strict=True))
    return together / sum((t - middle) ** 2 for t in times)


def delta(rows, as_of, start):
    return Fraction(rows[-1].value) - Fraction(rows[-2].value) if len(rows) > 1 else None


def rate(rows, as_of, start):
    return len(rows) / max(hours(as_of - start), Fraction(1))


def outside(rows, as_of, start):
    _, value, low, high = rows[-1]
    if low is None and high is None:
        return None
    if low is None:
        width = Fraction(abs(high))
    elif high is None:
        width = Fraction(abs(low))
    else:
        width = Fraction(high) - Fraction(low)
    if width == 0:
        return None
    if low is not None and value < low:
        return (Fraction(value) - Fraction(low)) / width
    if high is not None and value > high:
        return (Fraction(value) - Fraction(high)) / width
    return 0


def share_below(rows, as_of, start):
    bounded = [row for row in rows if row.low is not None]
    return Fraction(sum(row.value < row.low for row in bounded), len(bounded)) if bounded else None


def share_above(rows, as_of, start):
    bounded = [row for row in rows if row.high is not None]
    return Fraction(sum(row.value > row.high for row in bounded), len(bounded)) if bounded else None


def cv(rows, as_of, start):
    mean = exact_mean(rows)
    return exact_sqrt(variance(rows) / mean**2) if mean else None


def mean_abs_change(rows, as_of, start):
    values = [Fraction(row.value) for row in rows]
    steps = [abs(b - a) for a, b in pairwise(values)]
    return sum(steps) / len(steps) if steps else None


def gap(rows, as_of, start):
    return hours(rows[-1].time - rows[-2].time) if len(rows) > 1 else None


def varies(rows):
    """Beyond what rounding makes of equal values."""
    largest = max(abs(Fraction(row.value)) for row in rows)
    return variance(rows) > (Fraction(1, 10**9) * largest) ** 2


def zscore(rows, as_of, start):
    if not varies(rows):
        return None
    return float(Fraction(rows[-1].value) - exact_mean(rows)) / exact_sqrt(variance(rows))


def ewm(rows, as_of, start):
    weights = [Fraction(2.0 ** (-float(hours(rows[-1].time - row.time)) / 12)) for row in rows]
    return sum(w * Fraction(row.value) for w, row in zip(weights, rows, strict=True)) / sum(weights)


def departure_ewm(rows, as_of, start):
    return Fraction(rows[-1].value) - ewm(rows, as_of, start)


def hours_since_max(rows, as_of, start):
    largest = max(row.value for row in rows)
    return hours(as_of - [row.time for row in rows if row.value == largest][-1])


def hours_since_min(rows, as_of, start):
    smallest = min(row.value for row in rows)
    return hours(as_of - [row.time for row in rows if row.value == smallest][-1])


STATISTICS = {
    "last": lambda rows, as_of, start: rows[-1].value,
    "min": lambda rows, as_of, start: min(row.value for row in rows),
    "max": lambda rows, as_of, start: max(row.value for row in rows),
    "mean": lambda rows, as_of, start: exact_mean(rows),
    "std": lambda rows, as_of, start: exact_sqrt(variance(rows)),
    "count": lambda rows, as_of, start: len(rows),
    "slope": slope,
    "change": lambda rows, as_of, start: Fraction(rows[-1].value) - Fraction(rows[0].value),
    "delta": delta,
    "age": lambda rows, as_of, start: hours(as_of - rows[-1].time),
    "measured": lambda rows, as_of, start: 1,
    "rate": rate,
    "outside": outside,
    "share_below": share_below,
    "share_above": share_above,
    "range": lambda rows, as_of, start: (
        Fraction(max(row.value for row in rows)) - Fraction(min(row.value for row in rows))
    ),
    "cv": cv,
    "mean_abs_change": mean_abs_change,
    "departure": lambda rows, as_of, start: Fraction(rows[-1].value) - exact_mean(rows),
    "gap": gap,
    "zscore": zscore,
    "ewm": ewm,
    "departure_ewm": departure_ewm,
    "hours_since_max": hours_since_max,
    "hours_since_min": hours_since_min,
}
WINDOWED = {"min", "max", "mean", "std", "count", "departure"}
ZERO_WHEN_EMPTY = {"count", "measured", "rate"}


# --------------------------------------------------------------------------------------------------- clinical


class Patient:
    """Values of a concept in the last 24 h, whatever code they came with."""

    def __init__(self, rows_of_code: dict[str, list[Row]], as_of: datetime):
        self.rows: dict[str, list[Row]] = {}
        for code, rows in rows_of_code.items():
            recent = [row for row in rows if as_of - timedelta(hours=24) < row.time]
            self.rows.setdefault(CONCEPTS.get(code, ""), []).extend(recent)

    def latest(self, concept):
        rows = self.rows.get(concept)
        return max((row.time, row.value) for row in rows)[1] if rows else None

    def lowest(self, concept):
        return min((row.value for row in self.rows.get(concept, [])), default=None)

    def highest(self, concept):
        return max((row.value for row in self.rows.get(concept, [])), default=None)


def known(value, points):
    """`points` where the value is there, else None."""
    return None if value is None else int(points(value))


def band(value, *bands):
    """Points of the first band `(upper edge, points)` that the value does not exceed; the last has no edge."""
    if value is None:
        return None
    return next(points for edge, points in bands if edge is None or value <= edge)


def sirs(p):
    """Bone 1992: any of the four, respiration by rate or by PaCO2."""
    fast = known(p.latest("respiratory_rate"), lambda v: v > 20)
    blown_off = known(p.latest("paco2"), lambda v: v < 32)
    breathing = [criterion for criterion in (fast, blown_off) if criterion is not None]
    return {
        "temperature": known(p.latest("temperature"), lambda v: v > 38 or v < 36),
        "heart_rate": known(p.latest("heart_rate"), lambda v: v > 90),
        "respiration": max(breathing) if breathing else None,
        "wbc": known(p.latest("wbc"), lambda v: v > 12 or v < 4),
    }


def qsofa(p):
    """Seymour 2016, Singer 2016."""
    return {
        "respiration": known(p.latest("respiratory_rate"), lambda v: v >= 22),
        "blood_pressure": known(p.latest("systolic_bp"), lambda v: v <= 100),
        "mentation": known(p.latest("gcs"), lambda v: v < 15),
    }


def news2(p):
    """RCP 2017, SpO2 scale 1. A value between two printed bands (20.5 breaths) belongs to the higher one."""
    return {
        "respiration": band(p.latest("respiratory_rate"), (8, 3), (11, 1), (20, 0), (24, 2), (None, 3)),
        "oxygen_saturation": band(p.latest("spo2"), (91, 3), (93, 2), (95, 1), (None, 0)),
        "oxygen": known(p.latest("fio2"), lambda v: 2 * (v > 0.21)),
        "blood_pressure": band(p.latest("systolic_bp"), (90, 3), (100, 2), (110, 1), (219, 0), (None, 3)),
        "pulse": band(p.latest("heart_rate"), (40, 3), (50, 1), (90, 0), (110, 1), (130, 2), (None, 3)),
        "consciousness": known(p.latest("gcs"), lambda v: 3 * (v < 15)),
        "temperature": band(p.latest("temperature"), (35, 3), (36, 1), (38, 0), (39, 1), (None, 2)),
    }


def steps_reached(value, edges):
    """How many of the rising `edges` the value reaches."""
    return known(value, lambda v: sum(v >= edge for edge in edges))


def steps_undercut(value, edges):
    """How many of the `edges` the value stays below."""
    return known(value, lambda v: sum(v < edge for edge in edges))


def sofa(p):
    """Vincent 1996 without ventilation, vasopressors and urine; SpO2/FiO2 stands in for PaO2/FiO2 (Pandharipande)."""
    with_pao2 = steps_undercut(ratio(p, "pao2", "fio2"), (400, 300))
    with_spo2 = steps_undercut(ratio(p, "spo2", "fio2"), (512, 357))
    return {
        "respiration": with_spo2 if with_pao2 is None else with_pao2,
        "coagulation": steps_undercut(p.lowest("platelets"), (150, 100, 50, 20)),
        "liver": steps_reached(p.highest("bilirubin_total"), (1.2, 2.0, 6.0, 12.0)),
        "cardiovascular": steps_undercut(p.lowest("mean_bp"), (70,)),
        "nervous": steps_undercut(p.lowest("gcs"), (15, 13, 10, 6)),
        "renal": steps_reached(p.highest("creatinine"), (1.2, 2.0, 3.5, 5.0)),
    }


def ratio(p, above, below):
    a, b = p.latest(above), p.latest(below)
    return None if a is None or b is None or b <= 0 else float(Fraction(a) / Fraction(b))


def pulse_pressure(p):
    systolic, diastolic = p.latest("systolic_bp"), p.latest("diastolic_bp")
    return None if systolic is None or diastolic is None else systolic - diastolic


def clinical(p) -> dict[str, float | None]:
    out = {
        "shock_index": ratio(p, "heart_rate", "systolic_bp"),
        "pulse_pressure": pulse_pressure(p),
        "bun_creatinine": ratio(p, "bun", "creatinine"),
        "sf_ratio": ratio(p, "spo2", "fio2"),
        "pf_ratio": ratio(p, "pao2", "fio2"),
    }
    for score in (sirs, qsofa, news2, sofa):
        parts = score(p)
        observed = [points for points in parts.values() if points is not None]
        out[score.__name__] = sum(observed) if observed else None
        out[f"{score.__name__}_parts"] = len(observed)
        out |= {f"{score.__name__}_{part}": points for part, points in parts.items()}
    return out


def context(rows_of_code, as_of, start) -> dict[str, float]:
    times = [row.time for rows in rows_of_code.values() for row in rows]

    def types_within(w):
        return sum(any(row.time > as_of - timedelta(hours=w) for row in rows) for rows in rows_of_code.values())

    return {
        "hours": hours(as_of - start),
        "types": len(rows_of_code),
        "observations_6h": sum(time > as_of - timedelta(hours=6) for time in times),
        "observations_24h": sum(time > as_of - timedelta(hours=24) for time in times),
        "types_6h": types_within(6),
        "types_24h": types_within(24),
        "hour_of_day": hours(as_of - as_of.replace(hour=0, minute=0, second=0, microsecond=0)),
    }


# ------------------------------------------------------------------------------------------------- evaluation


def rows_by_code(records: list[dict], as_of: datetime) -> dict[str, list[Row]]:
    """What is known at `as_of`: duplicates once, oldest first, ties by value; a range that bounds nothing is none."""
    found: dict[str, set[Row]] = {}
    for record in records:
        if record["observation_date"] > as_of:
            continue
        low, high = record.get("reference_range_min"), record.get("reference_range_max")
        if low is not None and high is not None and low >= high:
            low = high = None
        row = Row(record["observation_date"], float(record["observation_value"]), low, high)
        found.setdefault(record["observation_type_code"], set()).add(row)

    def order(row):
        bounds = (math.inf if bound is None else bound for bound in (row.low, row.high))
        return (row.time, row.value, *bounds)

    return {code: sorted(rows, key=order) for code, rows in found.items()}


def evaluate(records: list[dict], as_of: datetime, codes) -> dict[str, float | None]:
    """Every feature of `codes` for the visit that `records` tell of, at `as_of`."""
    rows_of_code = rows_by_code(records, as_of)
    start = min((rows[0].time for rows in rows_of_code.values()), default=None)
    out: dict[str, float | None] = {}
    for code in codes:
        rows = rows_of_code.get(code, [])
        for name, function in STATISTICS.items():
            if code in STATIC and name != "last":
                continue
            for window in (None, *WINDOWS) if name in WINDOWED else (None,):
                inside = [row for row in rows if window is None or row.time > as_of - timedelta(hours=window)]
                empty = 0 if name in ZERO_WHEN_EMPTY else None
                feature = f"{code}__{name}" + (f"__{window}h" if window else "")
                out[feature] = function(inside, as_of, start) if inside else empty
    out |= {f"clinical__{name}": value for name, value in clinical(Patient(rows_of_code, as_of)).items()}
    if start is None:  # nothing observed yet: nothing is known, not even a count
        return dict.fromkeys([*out, *(f"context__{name}" for name in context({}, as_of, as_of))])
    out |= {f"context__{name}": value for name, value in context(rows_of_code, as_of, start).items()}
    return {name: None if value is None else float(value) for name, value in out.items()}
