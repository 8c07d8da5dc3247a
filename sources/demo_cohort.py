"""A synthetic cohort of hospital visits, for trying the project out and for its tests.

No real patient is in it. Its numbers are made so that the problem looks like the real one: irregular times,
units with different habits, missing laboratory values, a little dirt, sepsis that announces itself more or
less clearly, and other illnesses that look like it. Figures reached on it say nothing about real patients.

    observations, labels = make_demo_cohort()

or, as files, ``python prepare_data.py demo --observations observations.parquet --labels labels.csv``. The same
arguments give the same cohort on every machine.
"""

import argparse
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from common.artifacts import write_tables
from common.command_line import DONE, add_command, log, number, table_path

DEMO_NOTICE = "synthetic demo cohort (no real patients)"
YEAR_START = np.datetime64("2024-01-01T00:00", "m")
YEAR_DAYS = 366
SEPSIS_SHARE = 0.2  # of visits
SECOND_VISIT_SHARE = 0.12  # of patients
STAY_HOURS = (12.0, 240.0)  # shortest and longest
EARLIEST_ONSET_HOURS = 4.0


class Signal(NamedTuple):
    """How one code behaves. Logarithmic signals have all spreads and changes as natural logarithms."""

    typical: float  # in the code's own unit
    between: float  # standard deviation between patients
    within: float  # slow wandering inside a visit
    noise: float  # from one measurement to the next
    sepsis: float  # change at full severity of sepsis, of another inflammation, of a bleeding
    inflammation: float
    bleeding: float
    low: float  # what a device or laboratory can report
    high: float
    decimals: int
    logarithmic: bool = False


SIGNALS = {
    "HR": Signal(80, 10, 5, 3, 22, 18, 24, 30, 220, 0),  # beats/min
    "SBP": Signal(126, 14, 7, 4, -24, 4, -24, 50, 240, 0),  # mm Hg
    "Resp": Signal(16.5, 1.8, 1.0, 1.4, 6.5, 4, 4, 6, 50, 0),  # breaths/min
    "Temp": Signal(36.8, 0.2, 0.2, 0.12, 1.2, 1.1, -0.2, 33, 42, 1),  # deg C
    "O2Sat": Signal(96.8, 1.3, 0.7, 0.7, -3, -1, -1, 70, 100, 0),  # %
    "GCS": Signal(14.8, 0.6, 0.3, 0.3, -2.2, -0.3, -1, 3, 15, 0),  # points
    "FiO2": Signal(0.25, 0.2, 0.1, 0.05, 0.5, 0.1, 0.1, 0.21, 1, 2, True),  # fraction
    "pH": Signal(7.39, 0.03, 0.015, 0.01, -0.08, 0, -0.06, 6.9, 7.7, 2),
    "PaCO2": Signal(40, 4, 2, 1.5, -4, -1, -3, 15, 100, 0),  # mm Hg
    "Lactate": Signal(1.2, 0.25, 0.15, 0.1, 0.85, 0.25, 0.8, 0.3, 20, 1, True),  # mmol/L
    "WBC": Signal(8.5, 0.28, 0.1, 0.06, 0.5, 0.4, 0.15, 0.3, 80, 1, True),  # 1000/uL
    "Platelets": Signal(235, 0.28, 0.06, 0.04, -0.4, 0.05, -0.25, 8, 900, 0, True),  # 1000/uL
    "Hgb": Signal(11.8, 1.5, 0.2, 0.2, -0.6, -0.3, -2.8, 4, 19, 1),  # g/dL
    "Creatinine": Signal(0.95, 0.32, 0.06, 0.04, 0.45, 0.05, 0.2, 0.2, 12, 2, True),  # mg/dL
    "BUN": Signal(16, 0.35, 0.06, 0.05, 0.35, 0.05, 0.25, 3, 150, 0, True),  # mg/dL
    "Glucose": Signal(120, 0.2, 0.12, 0.08, 0.2, 0.2, 0.15, 40, 600, 0, True),  # mg/dL
    "Potassium": Signal(4.1, 0.3, 0.2, 0.12, 0.2, 0, 0, 2, 8, 1),  # mmol/L
    "NA": Signal(139, 2.5, 1.2, 0.8, -1.5, -0.5, 0, 115, 165, 0),  # sodium, mmol/L
    "HCO3": Signal(24.5, 2, 0.9, 0.7, -4, -0.5, -3, 6, 40, 0),  # mmol/L
    "Bilirubin_total": Signal(0.7, 0.4, 0.08, 0.08, 0.5, 0, 0, 0.1, 30, 1, True),  # mg/dL
    "CRP": Signal(18, 0.9, 0.25, 0.1, 1.2, 1.2, 0.2, 0.5, 450, 0, True),  # mg/L
}
# TEMP is what one unit calls Temp; DBP, MAP (mm Hg) and Hct (%) follow from other signals.
CODES = ("Age", "Gender", *SIGNALS, "DBP", "MAP", "Hct", "TEMP")
CODE_INDEX = {code: index for index, code in enumerate(CODES)}
VITALS = ("HR", "O2Sat", "Temp", "SBP", "MAP", "DBP", "Resp", "GCS")
PANELS = {
    "chemistry": ("Creatinine", "BUN", "Potassium", "NA", "Glucose", "HCO3"),
    "blood count": ("WBC", "Hgb", "Hct", "Platelets"),
    "liver": ("Bilirubin_total",),
    "inflammation": ("CRP",),
    "lactate": ("Lactate",),
    "blood gas": ("pH", "PaCO2", "FiO2"),
}
VITAL_RANGES = {
    "HR": (60, 100),
    "O2Sat": (95, 100),
    "Temp": (36.1, 37.2),
    "SBP": (90, 140),
    "MAP": (70, 105),
    "DBP": (60, 90),
    "Resp": (12, 20),
}
CENTRAL_LAB_RANGES = {
    "WBC": (4.0, 11.0),
    "Platelets": (150, 450),
    "Hgb": (12, 17.5),
    "Hct": (36, 50),
    "Creatinine": (0.5, 1.3),
    "BUN": (8, 20),
    "Glucose": (70, 99),
    "Potassium": (3.5, 5.0),
    "NA": (135, 145),
    "HCO3": (22, 28),
    "Bilirubin_total": (0.3, 1.0),
    "CRP": (0, 5),
    "Lactate": (0.5, 2.0),
    "pH": (7.35, 7.45),
    "PaCO2": (35, 45),
}
RAPID_LAB_RANGES = CENTRAL_LAB_RANGES | {
    "WBC": (3.9, 10.6),
    "Creatinine": (0.6, 1.2),
    "Glucose": (74, 106),
    "Potassium": (3.6, 5.2),
    "NA": (136, 146),
    "Lactate": (0.6, 1.8),
}


class Unit(NamedTuple):
    """The habits of a hospital unit."""

    share: float  # of visits
    vitals_every: float  # hours
    vitals_done: dict[str, float]  # chance in a round, where it is not the usual one
    night_skip: float  # chance that a round between 23:00 and 06:00 is left out
    draws_a_day: float  # chance of the morning blood draw
    panels: dict[str, float]  # chance that a draw orders the panel; those not named are never done
    ranges: dict[str, tuple[float, float]]
    sepsis_risk: float  # relative
    inflammation_risk: float
    temperature_code: str = "Temp"
    fahrenheit: bool = False


UNITS = (
    Unit(  # intensive care
        share=0.18,
        vitals_every=2.2,
        vitals_done={"Temp": 0.5, "GCS": 0.4},
        night_skip=0.05,
        draws_a_day=0.98,
        panels={
            "chemistry": 1,
            "blood count": 0.95,
            "liver": 0.3,
            "inflammation": 0.3,
            "lactate": 0.6,
            "blood gas": 0.8,
        },
        ranges=VITAL_RANGES | CENTRAL_LAB_RANGES,
        sepsis_risk=1.5,
        inflammation_risk=0.4,
    ),
    Unit(  # medical ward
        share=0.36,
        vitals_every=4.5,
        vitals_done={"GCS": 0.05, "O2Sat": 0.8},
        night_skip=0.5,
        draws_a_day=0.7,
        panels={"chemistry": 0.9, "blood count": 0.9, "liver": 0.25, "inflammation": 0.6, "lactate": 0.05},
        ranges=CENTRAL_LAB_RANGES,
        sepsis_risk=1.0,
        inflammation_risk=0.25,
    ),
    Unit(  # surgical ward
        share=0.26,
        vitals_every=3.8,
        vitals_done={"GCS": 0},
        night_skip=0.4,
        draws_a_day=0.6,
        panels={"chemistry": 0.7, "blood count": 1, "inflammation": 0.7},
        ranges=VITAL_RANGES | CENTRAL_LAB_RANGES,
        sepsis_risk=0.8,
        inflammation_risk=0.6,
        fahrenheit=True,
    ),
    Unit(  # emergency and short stay
        share=0.20,
        vitals_every=2.8,
        vitals_done={"GCS": 0.3, "Temp": 0.6},
        night_skip=0.2,
        draws_a_day=0.6,
        panels={"chemistry": 0.95, "blood count": 0.9, "lactate": 0.35, "blood gas": 0.25},
        ranges=RAPID_LAB_RANGES,
        sepsis_risk=0.8,
        inflammation_risk=0.3,
        temperature_code="TEMP",
    ),
)
USUAL_VITAL = 0.93


class Visits(NamedTuple):
    """One entry a visit, in order of admission. Hours count from admission; NaN for no such event."""

    patient: np.ndarray  # index of the patient
    start: np.ndarray  # minutes since the start of the year
    hours: np.ndarray  # length of the stay
    unit: np.ndarray  # index into UNITS
    age: np.ndarray  # years
    gender: np.ndarray  # 0 or 1
    onset: np.ndarray  # hours
    lead: np.ndarray  # hours over which sepsis builds up before onset
    sepsis_strength: np.ndarray
    inflammation_start: np.ndarray  # hours
    inflammation_strength: np.ndarray
    bleeding_start: np.ndarray  # hours
    bleeding_strength: np.ndarray


class Moments(NamedTuple):
    """Times at which something is measured in a visit."""

    visit: np.ndarray  # index into the visits
    hour: np.ndarray


class Rows(NamedTuple):
    """Observations before they become a frame."""

    visit: np.ndarray  # index into the visits
    hour: np.ndarray
    code: np.ndarray  # index into CODES
    value: np.ndarray


def make_demo_cohort(n_patients: int = 1000, seed: int = 2019) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Observations and labels of a synthetic cohort; some patients have two visits.

    Observations have the project's seven columns, in the units that `SIGNALS` names (but one ward writes its
    temperatures in deg F, and one calls them TEMP); Age is in years, Gender 0 or 1. Labels are `visit_id`,
    `client`, `sepsis` (0 or 1) and `sepsis_onset` (NaT without sepsis). Dates lie in 2024 and bear no zone.
    """
    if n_patients < 1:
        raise ValueError(f"n_patients is {n_patients}, expected at least 1")
    # Only uniform and normal draws, and rounded results: nothing that differs between platforms.
    rng = np.random.default_rng(seed)
    visits = _draw_visits(rng, n_patients)
    bodies = _Bodies(rng, visits)
    worries = _worries(rng, visits, bodies)
    # In this order, since each draws from the same generator.
    parts = [
        *_static_rows(visits),
        *_vital_rows(rng, visits, bodies, worries),
        *_lab_rows(rng, visits, bodies, worries),
    ]
    rows = Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return _observations(rng, visits, rows), _labels(visits)


def _draw_visits(rng: np.random.Generator, n_patients: int) -> Visits:
    has_second = rng.random(n_patients) < SECOND_VISIT_SHARE
    age = np.round(np.clip(66 + 16 * rng.standard_normal(n_patients), 18, 95))
    gender = (rng.random(n_patients) < 0.54).astype(float)
    patient = np.concatenate([np.arange(n_patients), np.flatnonzero(has_second)])
    n = len(patient)

    hours = np.clip(np.exp(np.log(54) + 0.75 * rng.standard_normal(n)), *STAY_HOURS)
    hours = np.round(hours * 60) / 60
    longest_days = STAY_HOURS[1] / 24
    gap_days = 2 + 28 * rng.random(n_patients)
    last_day = YEAR_DAYS - longest_days - 1 - has_second * (longest_days + 31)
    day = np.floor(rng.random(n_patients) * last_day)
    clock = np.where(rng.random(n) < 0.7, 8 + 12 * rng.random(n), 24 * rng.random(n))
    first_day = day[patient]
    first_day[n_patients:] += np.ceil(hours[:n_patients][has_second] / 24 + gap_days[has_second])
    start = np.floor((first_day * 24 + clock) * 60).astype(np.int64)

    unit = np.searchsorted(np.cumsum([unit.share for unit in UNITS])[:-1], rng.random(n))
    risk = np.array([unit.sepsis_risk for unit in UNITS])[unit] * (0.4 + 0.6 * age[patient] / 66)
    septic = rng.random(n) < SEPSIS_SHARE * risk
    # Stays are drawn without regard to sepsis, onset anywhere inside: a stay's length and end tell nothing.
    onset = EARLIEST_ONSET_HOURS + (hours - EARLIEST_ONSET_HOURS - 1) * rng.random(n)
    inflamed = rng.random(n) < np.array([unit.inflammation_risk for unit in UNITS])[unit]
    bleeding = rng.random(n) < 0.06
    visits = Visits(
        patient=patient,
        start=start,
        hours=hours,
        unit=unit,
        age=age[patient],
        gender=gender[patient],
        onset=np.where(septic, np.round(onset * 60) / 60, np.nan),
        lead=6 + 18 * rng.random(n),
        # The lowest tenth or so hardly shows its sepsis.
        sepsis_strength=np.clip(0.95 + 0.5 * rng.standard_normal(n), 0.05, 2),
        inflammation_start=np.where(inflamed, 0.8 * hours * rng.random(n) ** 1.5, np.nan),
        inflammation_strength=0.4 + 1.1 * rng.random(n),
        bleeding_start=np.where(bleeding, 0.8 * hours * rng.random(n), np.nan),
        bleeding_strength=0.4 + 0.9 * rng.random(n),
    )
    by_admission = np.argsort(start, kind="stable")
    return Visits(*(column[by_admission] for column in visits))


class _Bodies:
    """What a measurement finds: each patient's own level, slow wandering, illness, and noise."""

    def __init__(self, rng: np.random.Generator, visits: Visits):
        n, n_patients = len(visits.start), visits.patient.max() + 1
        self.rng, self.visits = rng, visits
        self.level = {code: rng.standard_normal(n_patients)[visits.patient] for code in SIGNALS}
        self.phase = {code: rng.random(n) for code in SIGNALS}
        self.period = {code: 10 + 40 * rng.random(n) for code in SIGNALS}  # hours
        # No septic patient shows every sign.
        self.expression = {code: 0.2 + 1.6 * rng.random(n) for code in SIGNALS}
        self.expression["Temp"] *= np.where(rng.random(n) < 0.2, -0.8, 1)

    def illness(self, visit: np.ndarray, hour: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Severity of sepsis, inflammation and bleeding at these moments; about 1 is full severity."""
        v = self.visits
        onset, lead = v.onset[visit], v.lead[visit]
        rise = np.clip((hour - onset + lead) / lead, 0, 1)
        sepsis = v.sepsis_strength[visit] * rise**1.3 * np.exp(-np.maximum(hour - onset, 0) / 40)
        inflammation = v.inflammation_strength[visit] * _episode(hour - v.inflammation_start[visit], 4, 30)
        bleeding = v.bleeding_strength[visit] * _episode(hour - v.bleeding_start[visit], 2, 24)
        return np.nan_to_num(sepsis), inflammation, bleeding

    def measure(self, codes: tuple[str, ...], visit: np.ndarray, hour: np.ndarray) -> dict[str, np.ndarray]:
        """Values of the codes at these moments, each in its own unit."""
        values = {code: self._signal(code, visit, hour) for code in codes if code in SIGNALS}
        noise = self.rng.standard_normal(len(visit))
        if "SBP" in values:
            values["DBP"] = np.round(values["SBP"] * np.clip(0.57 + 0.04 * noise, 0.4, 0.75))
            values["MAP"] = np.round(values["DBP"] + (values["SBP"] - values["DBP"]) / 3)
        if "Hgb" in values:
            values["Hct"] = np.round(3 * values["Hgb"] + 0.5 * noise, 1)
        return values

    def _signal(self, code: str, visit: np.ndarray, hour: np.ndarray) -> np.ndarray:
        signal = SIGNALS[code]
        sepsis, inflammation, bleeding = self.illness(visit, hour)
        wander = np.sin(2 * np.pi * (hour / self.period[code][visit] + self.phase[code][visit]))
        change = (
            signal.between * self.level[code][visit]
            + signal.within * wander
            + signal.noise * self.rng.standard_normal(len(visit))
            + signal.sepsis * sepsis * self.expression[code][visit]
            + signal.inflammation * inflammation
            + signal.bleeding * bleeding
        )
        value = signal.typical * np.exp(change) if signal.logarithmic else signal.typical + change
        return np.round(np.clip(value, signal.low, signal.high), signal.decimals)


def _episode(since: np.ndarray, rise: float, fade: float) -> np.ndarray:
    """An illness that comes within `rise` hours and goes within `fade`; 0 where it has not begun."""
    since = np.nan_to_num(np.maximum(since, 0))
    return (1 - np.exp(-since / rise)) * np.exp(-since / fade)


def _every(rng: np.random.Generator, visits: Visits, interval: np.ndarray) -> Moments:
    """About every `interval` hours of each visit, from its first hours to its end, now early and now late."""
    counts = np.floor(visits.hours / interval).astype(np.int64)
    visit = np.repeat(np.arange(len(counts)), counts)
    turn = np.arange(len(visit)) - np.repeat(np.cumsum(counts) - counts, counts)
    hour = (turn + 0.3 + 0.4 * rng.random(len(visit))) * interval[visit]
    return Moments(visit, hour)


def _worries(rng: np.random.Generator, visits: Visits, bodies: _Bodies) -> Moments:
    """When somebody looks in on a patient out of turn: now and then on anyone, more often on the ill."""
    looks = _every(rng, visits, np.full(len(visits.start), 3.0))
    severity = np.minimum(np.max(bodies.illness(*looks), axis=0), 1)
    noticed = rng.random(len(looks.visit)) < 0.02 + 0.15 * severity
    return Moments(*(column[noticed] for column in looks))


def _static_rows(visits: Visits) -> list[Rows]:
    index, zeros = np.arange(len(visits.start)), np.zeros(len(visits.start))
    return [
        Rows(index, zeros, np.full(len(index), CODE_INDEX["Age"]), visits.age),
        Rows(index, zeros, np.full(len(index), CODE_INDEX["Gender"]), visits.gender),
    ]


def _vital_rows(rng: np.random.Generator, visits: Visits, bodies: _Bodies, worries: Moments) -> list[Rows]:
    rounds = _every(rng, visits, _of_unit("vitals_every")[visits.unit])
    clock = (visits.start[rounds.visit] / 60 + rounds.hour) % 24
    night = (clock >= 23) | (clock < 6)
    kept = ~(night & (rng.random(len(clock)) < _of_unit("night_skip")[visits.unit[rounds.visit]]))
    everyone = np.arange(len(visits.start))
    # Everybody is looked at on arrival and before leaving.
    visit = np.concatenate([everyone, rounds.visit[kept], worries.visit, everyone])
    hour = np.concatenate([np.zeros(len(everyone)), rounds.hour[kept], worries.hour, visits.hours])
    parts = []
    for code, value in bodies.measure(VITALS, visit, hour).items():
        usual = 1 if code == "HR" else USUAL_VITAL
        chance = np.array([unit.vitals_done.get(code, usual) for unit in UNITS])[visits.unit[visit]]
        done = rng.random(len(visit)) < chance
        parts.append(_rows(visits, code, visit[done], hour[done], value[done]))
    return parts


def _lab_rows(rng: np.random.Generator, visits: Visits, bodies: _Bodies, worries: Moments) -> list[Rows]:
    n = len(visits.start)
    # Mornings at about six, the first of them on the day after admission.
    days = np.floor((visits.start / 60 % 24 + visits.hours) / 24).astype(np.int64)
    visit = np.repeat(np.arange(n), days)
    day = 1 + np.arange(len(visit)) - np.repeat(np.cumsum(days) - days, days)
    hour = day * 24 + 6 + 1.5 * (rng.random(len(visit)) - 0.5) - visits.start[visit] / 60 % 24
    drawn = rng.random(len(visit)) < _of_unit("draws_a_day")[visits.unit[visit]]
    drawn &= hour < visits.hours[visit]
    visit = np.concatenate([np.arange(n), visit[drawn], worries.visit])
    hour = np.concatenate([0.3 + 1.7 * rng.random(n), hour[drawn], worries.hour + 0.25])
    hour = np.minimum(hour, visits.hours[visit])
    parts = []
    for panel, codes in PANELS.items():
        chance = np.array([unit.panels.get(panel, 0) for unit in UNITS])[visits.unit[visit]]
        ordered = rng.random(len(visit)) < chance
        for code, value in bodies.measure(codes, visit[ordered], hour[ordered]).items():
            parts.append(_rows(visits, code, visit[ordered], hour[ordered], value))
    return parts


def _of_unit(habit: str) -> np.ndarray:
    return np.array([getattr(unit, habit) for unit in UNITS])


def _rows(visits: Visits, code: str, visit: np.ndarray, hour: np.ndarray, value: np.ndarray) -> Rows:
    """Rows as the visits' units write them down."""
    index = np.full(len(visit), CODE_INDEX[code])
    if code == "Temp":
        unit = visits.unit[visit]
        index = np.array([CODE_INDEX[unit.temperature_code] for unit in UNITS])[unit]
        value = np.where(_of_unit("fahrenheit")[unit], np.round(value * 1.8 + 32, 1), value)
    return Rows(visit, hour, index, value)


def _reference_ranges() -> np.ndarray:
    """Low and high by unit and code, shape (n_units, n_codes, 2); NaN where the unit gives none."""
    ranges = np.full((len(UNITS), len(CODES), 2), np.nan)
    for index, unit in enumerate(UNITS):
        for code, limits in unit.ranges.items():
            if code == "Temp" and unit.fahrenheit:
                limits = np.round(np.array(limits) * 1.8 + 32, 1)
            ranges[index, CODE_INDEX[unit.temperature_code if code == "Temp" else code]] = limits
    return ranges


def _observations(rng: np.random.Generator, visits: Visits, rows: Rows) -> pd.DataFrame:
    """The rows as a feed would hand them over: by visit and time, with a little dirt."""
    minute = visits.start[rows.visit] + np.floor(rows.hour * 60 + 1e-6).astype(np.int64)
    order = np.lexsort((rows.code, minute, rows.visit))
    visit, minute, code, value = rows.visit[order], minute[order], rows.code[order], rows.value[order]

    luck = rng.random(len(value))
    static = np.isin(code, [CODE_INDEX["Age"], CODE_INDEX["Gender"]])
    slipping = np.isin(code, [CODE_INDEX[name] for name in ("HR", "O2Sat", "Temp", "Potassium")])
    value = np.where((luck < 0.003) & ~static, np.nan, value)  # an empty field
    value = np.where((luck > 0.998) & slipping, np.round(value * 10, 1), value)  # a slipped decimal point
    # Some rows come late, after their visit's others, and some are sent twice.
    luck = rng.random(len(value))
    twice = np.flatnonzero(luck < 0.003)
    late = np.concatenate([luck > 0.997, np.ones(len(twice), dtype=bool)])
    source = np.concatenate([np.arange(len(value)), twice])
    source = source[np.lexsort((source, late, visit[source]))]
    visit, minute, code, value = visit[source], minute[source], code[source], value[source]

    ranges = _reference_ranges()[visits.unit[visit], code]
    return pd.DataFrame(
        {
            "visit_id": _visit_ids(visits)[visit],
            "client": _clients(visits).take(visit).array,
            "observation_date": _dates(minute),
            "observation_type_code": pd.Series(CODES, dtype="str").take(code).array,
            "observation_value": value,
            "reference_range_min": ranges[:, 0],
            "reference_range_max": ranges[:, 1],
        }
    )


def _labels(visits: Visits) -> pd.DataFrame:
    septic = ~np.isnan(visits.onset)
    onset = _dates(visits.start + np.round(np.nan_to_num(visits.onset) * 60).astype(np.int64))
    onset[~septic] = np.datetime64("NaT")
    return pd.DataFrame(
        {
            "visit_id": _visit_ids(visits),
            "client": _clients(visits),
            "sepsis": septic.astype(np.int64),
            "sepsis_onset": onset,
        }
    )


def _visit_ids(visits: Visits) -> np.ndarray:
    return 10_001 + np.arange(len(visits.start), dtype=np.int64)


def _clients(visits: Visits) -> pd.Series:
    return pd.Series([f"demo-{patient + 1:05d}" for patient in visits.patient], dtype="str")


def _dates(minutes: np.ndarray) -> np.ndarray:
    return (YEAR_START + minutes.astype("timedelta64[m]")).astype("datetime64[us]")


def work(arguments: argparse.Namespace) -> int:
    observations, labels = make_demo_cohort(arguments.patients, arguments.seed)
    if arguments.client_prefix:
        observations["client"], labels["client"] = (
            arguments.client_prefix + table["client"] for table in (observations, labels)
        )
    write_tables({arguments.observations: observations, arguments.labels: labels})
    log.info("%d visits (%d septic), %d observations", len(labels), labels["sepsis"].sum(), len(observations))
    return DONE


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py demo``."""
    command = add_command(
        commands,
        "demo",
        "Writes a synthetic cohort: data to try the scripts on. No real patient is in it.",
        "python prepare_data.py demo --patients 300 --seed 7 --observations new.parquet --labels new_labels.csv",
        work,
    )
    for name in ("observations", "labels"):
        command.add_argument(f"--{name}", required=True, type=table_path, metavar="OUT", help=f"{name} to write")
    command.add_argument("--patients", type=number(int, 1), default=1000, help="some of them have two visits")
    command.add_argument("--seed", type=number(int, 0), default=2019, help="another one gives other patients")
    command.add_argument(
        "--client-prefix", metavar="TEXT", default="", help="put before every client, for another site"
    )
