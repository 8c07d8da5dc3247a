"""The CDC's Adult Sepsis Event on small cases that were worked out by hand: one rule, one case.

Days count from the day of admission, 1 March 2180, which is day 0 here; its visit starts at 8:00.
"""

import pytest

from tests.hospital import Hospital, at


def day(number: float, hour: float = 12) -> float:
    """Hours from the start of the visit to an hour of a day."""
    return 24 * number + hour - 8


def infected(days=(5, 6, 7, 8), culture=5, dysfunction=True, **dose) -> Hospital:
    """A blood culture, an antimicrobial on some days, and a new vasopressor on the day of the culture."""
    hospital = Hospital(icu=False)
    hospital.culture(day(culture))
    for number in days:
        hospital.antibiotic(day(number), given=True, **dose)
    if dysfunction:
        hospital.add("vasopressors", "p", "v", at(day(culture, 15)), at(day(culture, 20)), "norepinephrine", 0.1)
    return hospital


def judge(hospital: Hospital, **settings):
    return hospital.judge(definition="ase", **settings).loc["v"]


# ------------------------------------------------------------------------------------------- presumed infection


@pytest.mark.parametrize(
    ("days", "sepsis"),
    [
        pytest.param((5, 6, 7, 8), 1, id="4 days"),
        pytest.param((5, 6, 7), 0, id="3 days"),
        pytest.param((5, 7, 8), 1, id="a day between two doses counts"),
        pytest.param((5, 7), 0, id="a day between counts, but there are 3"),
        pytest.param((5, 8, 9, 10), 0, id="two days without end the course; the next begins 3 days after the culture"),
        pytest.param((5, 5, 5, 5), 0, id="doses of one day are one day"),
        pytest.param((3, 4, 5, 6), 1, id="2 days before the culture"),
        pytest.param((2, 3, 4, 5, 6, 7), 0, id="3 days before the culture: no new antimicrobial near it"),
        pytest.param((7, 8, 9, 10), 1, id="2 days after the culture"),
        pytest.param((8, 9, 10, 11), 0, id="3 days after the culture"),
    ],
)
def test_four_qualifying_days_start_near_the_culture(days, sepsis):
    visit = judge(infected(days, name="Cefepime"))
    assert visit["sepsis"] == sepsis
    if sepsis:
        assert visit["qualifying_days"] == 4 and visit["antimicrobials"] == "given"


def test_an_infection_without_a_failing_organ_is_no_sepsis_and_its_times_are_kept():
    visit = judge(infected(dysfunction=False))
    assert (visit["sepsis"], visit["suspicion_time"], visit["qualifying_days"]) == (0, at(day(5)), 4)


def test_days_of_several_new_antimicrobials_add_up():
    hospital = infected((5, 6), name="Cefepime")
    hospital.antibiotic(day(7), given=True, name="Meropenem")
    assert judge(hospital)["sepsis"] == 0
    hospital.antibiotic(day(8), given=True, name="Levofloxacin", route="PO")
    assert judge(hospital)["qualifying_days"] == 4


def test_a_day_without_any_between_two_drugs_is_a_gap():
    hospital = infected((5, 6), name="Cefepime")
    for number in (8, 9):
        hospital.antibiotic(day(number), given=True, name="Meropenem")
    assert judge(hospital)["sepsis"] == 0


def test_days_of_a_drug_that_is_not_new_do_not_count():
    hospital = infected((1, 2, 3, 4, 5, 6, 7, 8), name="Cefepime")
    hospital.antibiotic(day(5), given=True, name="Vancomycin")
    assert judge(hospital)["sepsis"] == 0


@pytest.mark.parametrize(
    ("name", "route", "sepsis"),
    [
        ("Cefepime", "IV", 1),
        ("Ceftriaxone", "IM", 1),
        ("Ceftriaxone", "Intravenous route", 1),
        ("Levofloxacin", "PO", 0),
        ("Levofloxacin", None, 1),  # an unknown route
        ("Ertapenem", "IV", 1),
        ("Acyclovir", "IV", 1),
        ("Micafungin", "IVPB", 1),
        ("Aspirin", "IV", 0),
    ],
)
def test_the_first_day_has_a_new_parenteral_antimicrobial(name, route, sepsis):
    assert judge(infected(name=name, route=route))["sepsis"] == sepsis


def test_vancomycin_by_mouth_is_another_drug_than_into_a_vein():
    hospital = infected((3, 4, 5), culture=6, name="Vancomycin Oral Liquid", route="PO")
    for number in (6, 7, 8, 9):
        hospital.antibiotic(day(number), given=True, name="Vancomycin", route="IV")
    assert judge(hospital)["antibiotic_time"] == at(day(6))


def test_a_brand_is_the_same_drug_as_its_substance():
    hospital = infected((2, 3, 4), culture=7, name="Zosyn")
    for number in (5, 6, 7, 8, 9, 10):
        hospital.antibiotic(day(number), given=True, name="Piperacillin-Tazobactam")
    assert judge(hospital)["sepsis"] == 0  # not new: given on the two days before


def test_only_blood_cultures_count():
    hospital = infected()
    hospital.con.execute("UPDATE cultures SET blood = false")
    assert judge(hospital)["left_out"] == "the source has no blood cultures"
    hospital.culture(day(20))  # a blood culture, but not near anything
    assert judge(hospital)["sepsis"] == 0


@pytest.mark.parametrize(
    ("end", "sepsis"),
    [
        ({"died": True, "last": 6}, 1),
        ({"died": True, "last": 7}, 1),  # the day after the last dose
        ({"died": True, "last": 8}, 0),  # a day without a dose before the day of death
        ({"died": False, "last": 6}, 0),
        ({"died": False, "last": 6, "discharge": "hospice"}, 1),
        ({"died": False, "last": 6, "discharge": "acute_care"}, 1),
        ({"died": False, "last": 6, "discharge": "home"}, 0),
        ({"died": None, "last": 6}, 0),
    ],
)
def test_fewer_days_do_where_death_hospice_or_another_hospital_comes_first(end, sepsis):
    hospital = infected((5, 6))
    hospital.con.execute("ALTER TABLE visits ADD COLUMN discharge VARCHAR")
    hospital.con.execute(
        "UPDATE visits SET visit_end = ?, died = ?, discharge = ?",
        [at(day(end["last"], 18)), end["died"], end.get("discharge")],
    )
    assert judge(hospital)["sepsis"] == sepsis


@pytest.mark.parametrize(("stop", "sepsis"), [(8, 1), (7, 0), (None, 0)])
def test_without_administrations_the_days_of_an_order_count(stop, sepsis):
    hospital = infected(())
    hospital.antibiotic(day(5), name="Cefepime", stop=None if stop is None else day(stop))
    visit = judge(hospital)
    assert visit["sepsis"] == sepsis and visit["antimicrobials"] == "ordered"


def test_where_there_are_administrations_orders_do_not_count():
    hospital = infected((5, 6), name="Cefepime")
    hospital.antibiotic(day(5), name="Cefepime", stop=day(12))
    assert judge(hospital)["sepsis"] == 0


# ----------------------------------------------------------------------------------------------- failing organs


def labs(concept, *points, culture=5, **settings):
    hospital = infected(tuple(range(culture, culture + 4)), culture=culture, dysfunction=False)
    hospital.measure(concept, *((day(number), value) for number, value in points))
    return judge(hospital, **settings)


@pytest.mark.parametrize(
    ("offset", "sepsis"),
    [(-3, 0), (-2, 1), (0, 1), (2, 1), (3, 0)],
)
def test_an_organ_fails_within_two_days_of_the_culture(offset, sepsis):
    hospital = infected(dysfunction=False)
    time = day(5 + offset)
    hospital.add("vasopressors", "p", "v", at(time), at(time + 1), "norepinephrine", 0.1)
    assert judge(hospital)["sepsis"] == sepsis


@pytest.mark.parametrize(
    ("earlier", "drug", "sepsis"),
    [
        (None, "norepinephrine", 1),
        (None, "vasopressin", 1),
        (None, "phenylephrine", 1),
        (None, "dobutamine", 0),
        ((day(2), day(4, 1)), "norepinephrine", 0),  # still on the day before
        ((day(2), day(3, 23)), "norepinephrine", 1),  # not on the day before
    ],
)
def test_a_vasopressor_is_new(earlier, drug, sepsis):
    hospital = infected(dysfunction=False)
    if earlier:
        hospital.add("vasopressors", "p", "v", at(earlier[0]), at(earlier[1]), "norepinephrine", 0.1)
        hospital.con.execute("UPDATE cultures SET time = ?", [at(day(7))])  # its window starts on day 5
        for number in (9, 10):
            hospital.antibiotic(day(number), given=True)
    hospital.add("vasopressors", "p", "v", at(day(5)), at(day(5, 20)), drug, 0.1)
    visit = judge(hospital)
    assert visit["sepsis"] == sepsis and (not sepsis or visit["cardiovascular"])


def test_ventilation_is_new():
    hospital = infected(dysfunction=False)
    hospital.add("ventilation", "p", "v", at(day(0)), at(day(9)))
    assert judge(hospital)["sepsis"] == 0
    hospital.con.execute("DELETE FROM ventilation")
    hospital.add("ventilation", "p", "v", at(day(6)), at(day(9)))
    visit = judge(hospital)
    assert visit["respiratory"] and visit["dysfunction_time"] == at(day(6))


@pytest.mark.parametrize(
    ("points", "culture", "organ"),
    [
        # hospital onset: the baseline is the best value of the 5 days around the culture
        pytest.param([(4, 1.0), (6, 2.0)], 5, "renal", id="doubled in the window"),
        pytest.param([(4, 1.0), (6, 1.9)], 5, None, id="not doubled"),
        pytest.param([(1, 1.0), (6, 2.0)], 5, None, id="the lower value is before the window"),
        pytest.param([(6, 2.0), (10, 1.0)], 5, None, id="the lower value is after the window"),
        # community onset: of the whole stay
        pytest.param([(1, 2.0), (8, 1.0)], 1, "renal", id="falls to half later in the stay"),
        pytest.param([(1, 2.0), (8, 1.1)], 1, None, id="does not fall to half"),
        pytest.param([(2, 2.0), (8, 1.0)], 2, None, id="the third day is hospital onset"),
    ],
)
def test_creatinine_doubles_from_its_baseline(points, culture, organ):
    visit = labs("creatinine", *points, culture=culture)
    assert visit["sepsis"] == (organ is not None)
    if organ:
        assert visit["renal"] and not visit["liver"] and visit["community_onset"] == (culture == 1)


def test_creatinine_does_not_count_in_end_stage_kidney_disease():
    hospital = infected(dysfunction=False)
    hospital.measure("creatinine", (day(4), 3.0), (day(6), 7.0))
    assert judge(hospital)["sepsis"] == 1
    hospital.con.execute("ALTER TABLE visits ADD COLUMN esrd BOOLEAN")
    hospital.con.execute("UPDATE visits SET esrd = true")
    assert judge(hospital)["sepsis"] == 0


@pytest.mark.parametrize(
    ("concept", "before", "after", "sepsis"),
    [
        ("bilirubin_total", 1.0, 2.0, 1),
        ("bilirubin_total", 0.8, 1.9, 0),  # below 2.0
        ("bilirubin_total", 1.5, 2.9, 0),  # not doubled
        ("platelets", 190, 95, 1),
        ("platelets", 200, 100, 0),  # not below 100
        ("platelets", 180, 95, 0),  # a fall of less than half
        ("platelets", 99, 40, 0),  # the baseline is below 100
    ],
)
def test_bilirubin_and_platelets(concept, before, after, sepsis):
    assert labs(concept, (4, before), (6, after))["sepsis"] == sepsis


def test_lactate_counts_where_it_is_asked_for():
    assert labs("lactate", (5, 2.0))["sepsis"] == 0
    visit = labs("lactate", (5, 2.0), lactate=True)
    assert visit["sepsis"] == 1 and visit["lactate"]
    assert labs("lactate", (5, 1.9), lactate=True)["sepsis"] == 0


# -------------------------------------------------------------------------------------------------------- onset


def test_onset_is_the_earliest_of_culture_antimicrobial_and_failing_organ():
    hospital = infected((4, 5, 6, 7), dysfunction=False)
    hospital.add("vasopressors", "p", "v", at(day(3, 9)), at(day(3, 20)), "norepinephrine", 0.1)
    times = {"earlier": day(3, 9), "sofa": day(3, 9), "suspicion": day(4), "later": day(4)}
    for onset, hours in times.items():
        visit = judge(hospital, onset=onset)
        assert visit["sepsis_onset"] == at(hours)
        assert (visit["suspicion_time"], visit["culture_time"], visit["dysfunction_time"]) == (
            at(day(4)),
            at(day(5)),
            at(day(3, 9)),
        )


def test_the_first_event_of_a_visit_counts():
    hospital = infected((5, 6, 7, 8))
    hospital.culture(day(1))
    for number in (1, 2):  # no infection: 2 days
        hospital.antibiotic(day(number), given=True)
    hospital.culture(day(6))
    assert judge(hospital)["culture_time"] == at(day(5))


def test_a_culture_in_the_emergency_department_belongs_to_the_visit_that_follows():
    hospital = infected((0, 1, 2, 3), culture=-0.25, dysfunction=False)
    hospital.con.execute("UPDATE cultures SET visit_id = NULL")
    hospital.add("vasopressors", "p", "v", at(day(0, 15)), at(day(0, 20)), "norepinephrine", 0.1)
    visit = judge(hospital)
    assert visit["sepsis"] == 1 and visit["community_onset"]


def test_what_happens_in_another_visit_does_not_count():
    hospital = infected()
    hospital.visit("w", 0, 240)
    hospital.con.execute("UPDATE vasopressors SET visit_id = 'w'")
    judged = hospital.judge(definition="ase")
    assert judged["sepsis"].tolist() == [0, 0]
