"""Suspicion of infection, SOFA by the hour, and what they are made from, on cases that were worked out by hand."""

import numpy as np
import pytest

import feature_pipeline
from feature_pipeline import SOFA_BANDS
from tests.hospital import START, Hospital, at

# ------------------------------------------------------------------------------------- suspicion of infection

MINUTE = 1 / 60


@pytest.mark.parametrize(
    ("culture", "antibiotic", "suspicion"),
    [
        pytest.param(10, 20, 10, id="culture first"),
        pytest.param(10, 82, 10, id="culture first, exactly 72 h"),
        pytest.param(10, 82 + MINUTE, None, id="culture first, more than 72 h"),
        pytest.param(20, 10, 10, id="antibiotic first"),
        pytest.param(34, 10, 10, id="antibiotic first, exactly 24 h"),
        pytest.param(34 + MINUTE, 10, None, id="antibiotic first, more than 24 h"),
        pytest.param(10, 10, None, id="the same minute is no match"),
    ],
)
def test_suspicion_is_the_earlier_of_culture_and_antibiotic_near_one_another(culture, antibiotic, suspicion):
    hospital = Hospital()
    hospital.culture(culture)
    hospital.antibiotic(antibiotic)
    assert hospital.suspicions() == [(pytest.approx(antibiotic), suspicion and pytest.approx(suspicion))]


@pytest.mark.parametrize(
    ("antibiotic_day", "suspicion"),
    [(-2, None), (-1, "antibiotic"), (0, "culture"), (3, "culture"), (4, None)],
)
def test_a_culture_with_a_date_only_is_compared_by_calendar_day(antibiotic_day, suspicion):
    hospital = Hospital()
    hospital.culture(48, has_time=False)  # midnight of the third day, 40 h after the start
    hospital.antibiotic(48 + 24 * antibiotic_day)
    expected = {None: None, "antibiotic": 48 + 24 * antibiotic_day, "culture": 40}[suspicion]
    assert hospital.suspicions() == [(48 + 24 * antibiotic_day, expected)]


def test_a_culture_of_the_same_day_with_a_date_only_counts_as_taken_before():
    hospital = Hospital()
    hospital.culture(1, has_time=False)
    hospital.antibiotic(0.5)
    assert hospital.suspicions() == [(0.5, -8)]  # midnight of the day


def test_a_culture_before_the_antibiotic_has_precedence_and_the_earliest_one_counts():
    hospital = Hospital()
    for hours in (31, 29, 25):
        hospital.culture(hours)
    hospital.antibiotic(30)
    assert hospital.suspicions() == [(30, 25)]


def test_of_cultures_of_one_time_a_positive_one_is_named():
    hospital = Hospital()
    hospital.culture(10, specimen="URINE")
    hospital.culture(10, specimen="SPUTUM", positive=True)
    hospital.antibiotic(12)
    hospital.judge()
    assert hospital.con.execute("SELECT specimen, positive FROM suspicions").fetchall() == [("SPUTUM", True)]


def test_culture_and_antibiotic_are_joined_by_patient_not_by_visit():
    hospital = Hospital()
    hospital.culture(10, visit="an outpatient's")
    hospital.culture(11, visit=None)
    hospital.culture(5, client="another")
    hospital.antibiotic(12)
    assert hospital.suspicions() == [(12, 10)]


def test_each_order_has_a_suspicion_of_its_own():
    hospital = Hospital()
    hospital.culture(10)
    hospital.antibiotic(12)
    hospital.antibiotic(20, name="Cefepime")
    hospital.antibiotic(200)
    assert hospital.suspicions() == [(12, 10), (20, 10), (200, None)]


@pytest.mark.parametrize(
    ("name", "route", "counts"),
    [
        ("Piperacillin-Tazobactam", "IV", True),
        ("CIPROFLOXACIN HCL", "PO", True),
        ("Vancomycin Oral Liquid", "PO/NG", True),
        ("Vancomycin", None, True),
        ("Amphotericin B", "IV", True),
        ("Aspirin", "PO", False),
        ("Acyclovir", "IV", False),  # antivirals count for the Adult Sepsis Event only
        ("Ertapenem", "IV", False),  # not in mimic-code's list
        ("Tobramycin 0.3% Ophth Soln", "OU", False),
        ("Ciprofloxacin 0.3%", "BOTH EYES", False),
        ("Gentamicin Cream", "IV", False),
        ("Metronidazole Gel", "PO", False),
        ("Penicillin desensitization", "IV", False),
        ("Erythromycin 0.5% Ophth Oint", "IV", False),
        ("Mupirocin", "TP", False),
        ("Mupirocin", "Topical", False),
        ("Ceftriaxone", "subcutaneous", True),
    ],
)
def test_which_drugs_and_routes_are_antibiotics(name, route, counts):
    hospital = Hospital()
    hospital.antibiotic(12, name=name, route=route)
    assert len(hospital.suspicions()) == counts


def test_orders_count_and_administrations_only_where_there_are_no_orders():
    hospital = Hospital()
    hospital.culture(10)
    hospital.antibiotic(14, given=True)
    assert hospital.suspicions() == [(14, 10)]
    hospital.antibiotic(12)
    assert hospital.suspicions() == [(12, 10)]


def test_an_order_belongs_to_the_stay_in_which_it_starts():
    hospital = Hospital(stay_hours=(10, 20))
    hospital.culture(5)
    for hours in (9.9, 10, 19.9, 20):
        hospital.antibiotic(hours)
    hospital.judge()
    episodes = hospital.con.execute("SELECT episode_id FROM suspicions ORDER BY antibiotic_time").fetchall()
    assert episodes == [(None,), ("s",), ("s",), (None,)]


# ------------------------------------------------------------------------------------------------------- SOFA


@pytest.mark.parametrize("measured", sorted(SOFA_BANDS))
def test_points_are_those_of_the_features(measured):
    hospital = Hospital()
    hospital.judge()
    edges, points = SOFA_BANDS[measured]
    values = sorted({*edges, *(np.nextafter(edge, 0) for edge in edges), 0.0, 2 * max(edges)})
    by_sql = [hospital.con.execute(f"SELECT sofa_{measured}(?::DOUBLE)", [value]).fetchone()[0] for value in values]
    assert by_sql == list(feature_pipeline._sofa_points(measured, np.array(values)))
    assert hospital.con.execute(f"SELECT sofa_{measured}(NULL)").fetchone() == (None,)
    assert max(by_sql) == max(points) and min(by_sql) == min(points)


@pytest.mark.parametrize(
    ("concept", "value", "part", "points"),
    [
        ("platelets", 150, "coagulation", 0),
        ("platelets", 149, "coagulation", 1),
        ("platelets", 19, "coagulation", 4),
        ("bilirubin_total", 1.1, "liver", 0),
        ("bilirubin_total", 1.2, "liver", 1),
        ("bilirubin_total", 12, "liver", 4),
        ("mean_bp", 70, "cardiovascular", 0),
        ("mean_bp", 69, "cardiovascular", 1),
        ("gcs", 15, "nervous", 0),
        ("gcs", 13, "nervous", 1),
        ("gcs", 9, "nervous", 3),
        ("gcs", 5, "nervous", 4),
        ("creatinine", 1.19, "renal", 0),
        ("creatinine", 3.5, "renal", 3),
        ("creatinine", 5, "renal", 4),
        ("pf_ratio", 400, "respiration", 0),
        ("pf_ratio", 399, "respiration", 1),
        ("pf_ratio", 90, "respiration", 2),  # without ventilation no more than 2
    ],
)
def test_points_of_what_is_measured(concept, value, part, points):
    hospital = Hospital()
    hospital.measure(concept, (29.5, value))
    sofa = hospital.sofa(30)
    assert sofa[part] == points == sofa["score"]
    others = {"respiration", "coagulation", "liver", "cardiovascular", "nervous", "renal"} - {part}
    assert all(sofa[other] is None for other in others)  # not measured: unknown, and counted as normal


@pytest.mark.parametrize(("hours", "points"), [(24.9, 2), (25, 4), (27, 4), (27.1, 2)])
def test_respiration_has_more_than_2_points_only_while_ventilated(hours, points):
    hospital = Hospital()
    hospital.measure("pf_ratio", (hours, 90))
    hospital.add("ventilation", "p", "v", at(25), at(27))
    assert hospital.sofa(30)["respiration"] == points


def test_the_worst_of_a_ventilated_and_an_unventilated_ratio_counts():
    hospital = Hospital()
    hospital.measure("pf_ratio", (20, 68), (26, 120))
    hospital.add("ventilation", "p", "v", at(25), at(27))
    assert hospital.sofa(30)["respiration"] == 3


def test_a_value_at_the_end_of_an_hour_belongs_to_it():
    hospital = Hospital()
    hospital.measure("platelets", (29, 90), (30, 15))
    assert hospital.sofa(29)["coagulation"] == 2
    hospital = Hospital()
    hospital.measure("platelets", (29, 90), (30, 15))
    assert hospital.sofa(30)["coagulation"] == 4


@pytest.mark.parametrize(("hours", "points"), [(30, 3), (53, 3), (54, 1), (55, 1)])
def test_the_worst_of_24_hours_counts(hours, points):
    hospital = Hospital()
    hospital.measure("platelets", (29.5, 40), (31, 140), (50, 145))
    assert hospital.sofa(hours)["coagulation"] == points


@pytest.mark.parametrize(
    ("drug", "rate", "points"),
    [
        ("norepinephrine", 0.1, 3),
        ("norepinephrine", 0.11, 4),
        ("epinephrine", 0.05, 3),
        ("dopamine", 5, 2),
        ("dopamine", 5.1, 3),
        ("dopamine", 15.1, 4),
        ("dobutamine", 40, 2),
        ("norepinephrine", None, 3),  # the least that an unknown dose can have
        ("dopamine", None, 2),
    ],
)
def test_points_of_vasopressors(drug, rate, points):
    hospital = Hospital()
    hospital.measure("mean_bp", (29.5, 60))
    hospital.add("vasopressors", "p", "v", at(28.2), at(30), drug, rate)
    assert hospital.sofa(30)["cardiovascular"] == points


@pytest.mark.parametrize("drug", ["vasopressin", "phenylephrine"])
def test_a_vasopressor_without_a_dose_in_sofa_has_no_points(drug):
    hospital = Hospital()
    hospital.measure("mean_bp", (29.5, 60))
    hospital.add("vasopressors", "p", "v", at(28.2), at(30), drug, 2.0)
    assert hospital.sofa(30)["cardiovascular"] == 1


@pytest.mark.parametrize(
    ("name", "drug"),
    [
        ("Norepinephrine 8 mg in D5W", "norepinephrine"),
        ("Noradrenalin 1 mg/ml", "norepinephrine"),
        ("Adrenalin", "epinephrine"),
        ("Dopamin", "dopamine"),
        ("Argipressin", "vasopressin"),
        ("Phenylephrine 40 mg IV", "phenylephrine"),
        ("Lidocaine 1% - EPINEPHrine 1:100,000", None),
        ("Racepinephrine inhalation solution", None),
        ("Epinephrine auto-injector 0.3 mg", None),
        ("Phenylephrine 2.5% ophth soln", None),
        ("Desmopressin", None),
    ],
)
def test_which_drugs_are_vasopressors(name, drug):
    assert Hospital().con.execute("SELECT pressor(?)", [name]).fetchone() == (drug,)


def test_a_vasopressor_counts_in_the_hours_at_whose_end_it_runs():
    hospital = Hospital()
    hospital.add("vasopressors", "p", "v", at(29.1), at(29.9), "norepinephrine", 0.2)
    assert hospital.sofa(30)["cardiovascular"] is None


def test_an_infusion_that_never_ended_counts_to_the_end_of_the_hours():
    hospital = Hospital()
    hospital.add("vasopressors", "p", "v", at(5.5), at(24 * 365 * 500), "norepinephrine", 0.05)
    assert hospital.sofa(30)["cardiovascular"] == 3


@pytest.mark.parametrize(
    ("hourly", "hours", "points"),
    [
        (25, 24, 0),  # 600 mL
        (20, 24, 3),  # 480 mL
        (8, 24, 4),  # 192 mL
        (20, 20, None),  # fewer than 22 h recorded
    ],
)
def test_points_of_urine(hourly, hours, points):
    hospital = Hospital()
    for hour in range(1, hours + 1):
        hospital.add("urine", "p", "v", at(hour), hourly)
    assert hospital.sofa(24)["renal"] == points


def test_a_stay_has_its_own_chart_and_the_laboratory_of_the_whole_visit():
    hospital = Hospital(stay_hours=(20, 240))
    hospital.measure("platelets", (12, 40))  # on the ward
    hospital.measure("gcs", (19, 5), stay="an earlier stay")
    hospital.measure("creatinine", (19, 6), visit="another visit")
    sofa = hospital.sofa(30)
    assert (sofa["coagulation"], sofa["nervous"], sofa["renal"]) == (3, None, None)


# ----------------------------------------------------------------------------------------------- measurements


def measured(rows, meanings) -> list[tuple]:
    hospital = Hospital()
    hospital.con.execute("DROP TABLE measurements")
    hospital.con.execute(
        "CREATE TABLE meanings (code VARCHAR, unit VARCHAR, concept VARCHAR, factor DOUBLE, add_to DOUBLE, "
        "low DOUBLE, high DOUBLE, other_low DOUBLE, other_high DOUBLE)"
    )
    for meaning in meanings:
        hospital.add("meanings", *meaning)
    for hours, code, value, unit in rows:
        hospital.add("rows", "v", "p", at(hours), at(hours + 1), code, value, None, unit, None, None)
    hospital.judge()
    found = hospital.con.execute("SELECT time, concept, value FROM measurements ORDER BY ALL").fetchall()
    return [((time - START).total_seconds() / 3600, concept, value) for time, concept, value in found]


CREATININE = [
    ("crea", "mg/dL", "creatinine", 1.0, 0.0, 0, 60, None, None),
    ("crea", "umol/L", "creatinine", 0.011312, 0.0, 0, 60, None, None),
]
OXYGEN = [
    ("po2", "mmHg", "pao2", 1.0, 0.0, 10, 800, None, None),
    ("fio2", "", "fio2", 1.0, 0.0, 0.2, 1.0, 20, 100),
    ("fio2", "%", "fio2", 0.01, 0.0, 0.2, 1.0, 20, 100),
]


def test_values_come_in_the_concepts_unit_with_the_time_at_which_they_were_taken():
    rows = [(1, "crea", "2.0", "mg/dL"), (2, "crea", "<100", "umol/L"), (3, "crea", "9", "furlong")]
    rows += [(4, "crea", "999", "mg/dL"), (5, "other", "1", "mg/dL"), (6, "crea", "high", "mg/dL")]
    assert measured(rows, CREATININE) == [(1, "creatinine", 2.0), (2, "creatinine", pytest.approx(1.1312))]


@pytest.mark.parametrize(
    ("fio2", "ratio"),
    [
        ([(10, "0.5", None)], 160),
        ([(10, "50", None)], 160),
        ([(10, "50", "%")], 160),
        ([(7, "0.5", None), (9, "0.8", None)], 100),  # the last one before
        ([(6, "0.5", None)], 160),  # exactly 4 h
        ([(5.9, "0.5", None)], None),
        ([(10.1, "0.5", None)], None),  # after it
        ([(10, "5", None)], None),  # litres
    ],
)
def test_oxygen_ratio_takes_the_last_fio2_of_4_hours(fio2, ratio):
    rows = [(10, "po2", "80", "mmHg"), *((hours, "fio2", value, unit) for hours, value, unit in fio2)]
    found = [value for _, concept, value in measured(rows, OXYGEN) if concept == "pf_ratio"]
    assert found == ([] if ratio is None else [pytest.approx(ratio)])
