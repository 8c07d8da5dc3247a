"""What MIMIC-IV's own tables mean for the labels, on small cases that were worked out by hand."""

from datetime import timedelta

import duckdb
import pytest

from sources.mimic_iv import TABLES
from sources.prepare import CONTRACT, MACROS, run_sql
from tests.hospital import START, at

STAY = {"subject_id": "1", "hadm_id": "20", "stay_id": "30"}
MOTOR, VERBAL, EYES, HEART_RATE, PRESSURE, FIO2 = "223901", "223900", "220739", "220045", "220052", "223835"
DEVICE, MODE, HAMILTON = "226732", "223849", "229314"


class Mimic:
    """The tables of mimic_iv.sql, all text, with one admission (20) and one stay in intensive care (30)."""

    def __init__(self):
        self.con = duckdb.connect()
        self.con.execute(MACROS)
        for table in TABLES:
            columns = ", ".join(f"{name} VARCHAR" for name in (*table.needs, *table.also))
            self.con.execute(f"CREATE TABLE {table.name} ({columns})")
        for name in ("visits", "icu_stays"):
            self.con.execute(f"CREATE TABLE {name} ({CONTRACT[name]})")
        self.con.execute("INSERT INTO visits VALUES ('20', '1', ?, ?, false)", [at(0), at(240)])
        self.con.execute("INSERT INTO icu_stays VALUES ('30', '20', '1', ?, ?)", [at(0), at(240)])

    def add(self, table: str, **cells) -> None:
        names, texts = ", ".join(cells), [None if cell is None else str(cell) for cell in cells.values()]
        self.con.execute(f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(texts))})", texts)

    def chart(self, hours: float, item: str, value=None, number=None) -> None:
        if number is None and isinstance(value, int | float):
            number = value
        self.add("chartevents", **STAY, charttime=at(hours), itemid=item, value=value, valuenum=number)

    def lab(self, hours, item, value, specimen="s", hadm_id="20", number=None) -> None:
        number = value if number is None and isinstance(value, int | float) else number
        cells = {"subject_id": "1", "hadm_id": hadm_id, "specimen_id": specimen}
        self.add("labevents", **cells, charttime=at(hours), itemid=item, value=value, valuenum=number)

    def measurements(self, concept: str) -> list[tuple[float, float]]:
        """(hours, value)"""
        run_sql(self.con, "mimic_iv_labels")
        rows = self.con.execute("SELECT time, value FROM measurements WHERE concept = ? ORDER BY ALL", [concept])
        return [((time - START) / timedelta(hours=1), pytest.approx(value)) for time, value in rows.fetchall()]

    def ventilation(self) -> list[tuple[float, float]]:
        run_sql(self.con, "mimic_iv_labels")
        rows = self.con.execute("SELECT start, stop FROM ventilation ORDER BY start").fetchall()
        return [tuple((time - START) / timedelta(hours=1) for time in row) for row in rows]


# ------------------------------------------------------------------------------------------------- coma scale


def test_the_coma_scale_is_the_sum_of_its_parts():
    mimic = Mimic()
    for item, score in ((MOTOR, 5), (VERBAL, 4), (EYES, 3)):
        mimic.chart(10, item, "text", score)
    assert mimic.measurements("gcs") == [(10, 12)]


@pytest.mark.parametrize(
    ("hours", "total"),
    [
        pytest.param(15.9, 3 + 2 + 1, id="the parts of at most 6 h ago"),
        pytest.param(16, 3 + 5 + 4, id="6 h are too old: normal"),
    ],
)
def test_a_missing_part_is_that_of_the_last_record(hours, total):
    mimic = Mimic()
    for item, score in ((MOTOR, 6), (VERBAL, 2), (EYES, 1)):
        mimic.chart(10, item, "text", score)
    mimic.chart(hours, MOTOR, "text", 3)
    assert mimic.measurements("gcs")[-1] == (hours, total)


def test_a_patient_with_a_tube_counts_as_awake_and_leaves_nothing_to_the_next_record():
    mimic = Mimic()
    for item, text, score in ((MOTOR, "No response", 1), (VERBAL, "No Response-ETT", 1), (EYES, "None", 1)):
        mimic.chart(10, item, text, score)
    mimic.chart(11, MOTOR, "Obeys", 2)  # still no word: the tube of the record before
    mimic.chart(12, VERBAL, "Confused", 4)
    mimic.chart(13, VERBAL, "Oriented", 5)
    # at 12 the record before has no verbal part of its own, so its motor score counts
    assert mimic.measurements("gcs") == [(10, 15), (11, 15), (12, 2 + 4 + 4), (13, 6 + 5 + 4)]


@pytest.mark.parametrize(
    ("text", "ventilated", "total"),
    [(None, True, 15), (None, False, 3), ("No Response", True, 3)],
)
def test_a_lost_text_is_told_by_ventilation(text, ventilated, total):
    mimic = Mimic()
    for item in (MOTOR, EYES):
        mimic.chart(10, item, "text", 1)
    mimic.chart(10, VERBAL, text, 1)
    if ventilated:
        mimic.add("procedureevents", subject_id="1", itemid="225792", starttime=at(9), endtime=at(11))
    assert mimic.measurements("gcs") == [(10, total)]


# ------------------------------------------------------------------------------------------------ oxygen ratio


def gas(mimic, hours=10, specimen="ART.", fio2=None, hadm_id="20", number="s"):
    mimic.lab(hours, "52033", specimen, number, hadm_id)
    mimic.lab(hours, "50821", 80, number, hadm_id)
    if fio2 is not None:
        mimic.lab(hours, "50816", fio2, number, hadm_id)


@pytest.mark.parametrize(
    ("charted", "of_gas", "ratio"),
    [
        ([(9, 40)], None, 200),
        ([(9, 0.4)], None, 200),
        ([(9, 40)], 50, 160),  # the laboratory's own comes first
        ([(9, 40)], 0.5, 160),
        ([(9, 40)], 10, 200),  # a flow in litres
        ([(6, 40)], None, 200),  # exactly 4 h
        ([(5.9, 40)], None, None),
        ([(10.1, 40)], None, None),
        ([(8, 100), (9, 40), (9.5, 10)], None, 200),  # 10 is none: the last one that is
        ([], None, None),
    ],
)
def test_the_oxygen_of_a_ratio(charted, of_gas, ratio):
    mimic = Mimic()
    gas(mimic, fio2=of_gas)
    for hours, value in charted:
        mimic.chart(hours, FIO2, value)
    assert mimic.measurements("pf_ratio") == ([] if ratio is None else [(10, ratio)])


def test_only_arterial_samples_have_a_ratio_with_or_without_an_admission():
    mimic = Mimic()
    gas(mimic, 10, "VEN.", 50, number="a")
    gas(mimic, 11, "ART.", 50, hadm_id=None, number="b")
    assert mimic.measurements("pf_ratio") == [(11, 160)]


# -------------------------------------------------------------------------------------------------- ventilation


@pytest.mark.parametrize(
    ("records", "intervals"),
    [
        pytest.param([(1, MODE, "CMV/ASSIST"), (5, MODE, "CPAP/PSV")], [(1, 5)], id="two modes are one interval"),
        pytest.param([(1, DEVICE, "Endotracheal tube"), (5, MODE, "SIMV"), (7, DEVICE, "Nasal cannula")], [(1, 7)]),
        pytest.param([(1, MODE, "SIMV")], [], id="one single record is none"),
        pytest.param([(1, MODE, "SIMV"), (3, DEVICE, "Face tent")], [], id="nor with another status after it"),
        pytest.param(
            [(1, MODE, "SIMV"), (2, MODE, "SIMV"), (16, MODE, "SIMV"), (17, MODE, "SIMV")], [(1, 2), (16, 17)]
        ),
        pytest.param([(1, MODE, "SIMV"), (2, MODE, "SIMV"), (15.9, MODE, "SIMV")], [(1, 15.9)]),
        pytest.param([(1, MODE, "SIMV"), (2, MODE, "SIMV"), (2, DEVICE, "Tracheostomy tube")], [], id="tracheostomy"),
        pytest.param([(1, DEVICE, "Bipap mask "), (5, DEVICE, "CPAP mask ")], [], id="a mask is not invasive"),
        pytest.param([(1, HAMILTON, "NIV"), (5, HAMILTON, "NIV-ST")], []),
        pytest.param([(1, HAMILTON, "APV (cmv)"), (5, HAMILTON, "ASV")], [(1, 5)]),
        pytest.param([(1, MODE, "Standby"), (5, MODE, "Standby")], [], id="a mode that is none"),
    ],
)
def test_invasive_ventilation_from_the_chart(records, intervals):
    mimic = Mimic()
    for hours, item, value in records:
        mimic.chart(hours, item, value)
    assert mimic.ventilation() == intervals


# ------------------------------------------------------------------------------------------------- other values


def test_laboratory_values_need_an_admission_and_a_number_that_can_be():
    mimic = Mimic()
    for hours, value, hadm_id in ((1, 1.5, "20"), (2, 0, "20"), (3, 151, "20"), (4, 2.5, None), (5, "___", "20")):
        mimic.lab(hours, "50912", value, hadm_id=hadm_id)
    assert mimic.measurements("creatinine") == [(1, 1.5)]


def test_mean_pressures_of_one_time_are_averaged():
    mimic = Mimic()
    mimic.chart(10, PRESSURE, 60)
    mimic.chart(10, "220181", 80)
    mimic.chart(11, PRESSURE, 0)
    mimic.chart(12, PRESSURE, 999)
    assert mimic.measurements("mean_bp") == [(10, 70)]


def test_the_hours_of_a_stay_are_those_with_a_heart_rate():
    mimic = Mimic()
    for hours in (3.5, 9, 50.2):
        mimic.chart(hours, HEART_RATE, 80)
    run_sql(mimic.con, "mimic_iv_labels")
    assert mimic.con.execute("SELECT hours_from, hours_to FROM icu_stays").fetchall() == [(at(3.5), at(50.2))]


@pytest.mark.parametrize(
    ("place", "code", "expected"),
    [
        ("HOSPICE", "N186", ("hospice", True)),
        ("ACUTE HOSPITAL", "5856", ("acute_care", True)),
        ("HOME", "I10", (None, False)),
    ],
)
def test_where_the_patient_went_and_end_stage_kidney_disease(place, code, expected):
    mimic = Mimic()
    mimic.add("admissions", subject_id="1", hadm_id="20", discharge_location=place)
    mimic.add("diagnoses_icd", hadm_id="20", icd_code=code)
    run_sql(mimic.con, "mimic_iv_labels")
    assert mimic.con.execute("SELECT discharge, esrd FROM visits").fetchall() == [expected]
