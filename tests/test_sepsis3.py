"""Sepsis-3 labels of visits on small cases that were worked out by hand: one rule, one case."""

from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest

from common.labels import read_labels
from feature_pipeline import BadConfig
from sources.labels import PUBLISHED, report_parts, summary, table_of, write_labels
from sources.sepsis3 import DEFINITIONS, ONSETS, LabelSettings
from tests.hospital import Hospital, at

# ----------------------------------------------------------------------------------------------------- sepsis


def suspected(hours: float = 100, **settings) -> Hospital:
    """A hospital in which an infection is suspected at `hours`."""
    hospital = Hospital(**settings)
    hospital.culture(hours)
    hospital.antibiotic(hours + 1)
    return hospital


@pytest.mark.parametrize(
    ("hours", "sofa_time"),
    [
        pytest.param(27.5, None, id="the last hour is 51, before the window"),
        pytest.param(28.5, 52, id="counted up to the hour 52, the window's first"),
        pytest.param(123.5, 124, id="in the hour 124, the window's last"),
        pytest.param(124.5, None, id="after the window"),
    ],
)
def test_both_ends_of_the_window_are_in_it(hours, sofa_time):
    hospital = suspected(100)
    hospital.measure("platelets", (hours, 60))
    visit = hospital.judge().loc["v"]
    if sofa_time is None:
        assert visit["sepsis"] == 0 and pd.isna(visit["sofa_time"])
    else:
        assert visit["sepsis"] == 1 and visit["sofa_time"] == at(sofa_time)


@pytest.mark.parametrize(
    ("values", "absolute", "rise"),
    [
        pytest.param([(90, 40)], None, None, id="3 points in the first known hour"),
        pytest.param([(60, 40), (90, 40)], 60, 60, id="from unknown, counted as 0, to 3"),
        pytest.param([(51, 140), (70, 140), (90, 60)], 90, None, id="from 1 to 2: a rise of 1"),
        pytest.param([(51, 140), (70, 140), (90, 40)], 90, 90, id="from 1 to 3"),
        pytest.param([(51, 140), (90, 60)], 90, 90, id="1 is forgotten after 24 h: from 0 to 2"),
        pytest.param([(51, 40), (70, 60), (95, 15)], 52, 95, id="from 3 over 2 to 4: against the lowest so far"),
    ],
)
def test_two_points_or_a_rise_of_two(values, absolute, rise):
    first_known = values == [(90, 40)]
    hospital = suspected(100, stay_hours=(90, 240) if first_known else (0, 240))
    hospital.measure("platelets", *((hours if first_known else hours - 0.5, value) for hours, value in values))
    if first_known:  # the stay begins with 3 points: septic by 2 points, but nothing rises
        assert hospital.judge(definition="sepsis3").loc["v", "sofa_time"] == at(90)
        assert hospital.judge(definition="sepsis3-rise").loc["v", "sepsis"] == 0
        return
    for definition, expected in (("sepsis3", absolute), ("sepsis3-rise", rise)):
        visit = hospital.judge(definition=definition).loc["v"]
        assert visit["sepsis"] == (expected is not None)
        if expected is not None:
            assert visit["sofa_time"] == at(expected)


def test_sepsis3_takes_the_first_suspicion_with_dysfunction_and_the_rise_only_the_first():
    hospital = Hospital()
    for hours in (10, 150):
        hospital.culture(hours)
        hospital.antibiotic(hours + 1)
    hospital.measure("platelets", (9, 200), (160, 40))
    visit = hospital.judge().loc["v"]
    assert (visit["sepsis"], visit["suspicion_time"], visit["sofa_time"]) == (1, at(150), at(160))
    visit = hospital.judge(definition="sepsis3-rise").loc["v"]
    assert (visit["sepsis"], visit["suspicion_time"]) == (0, at(10))


@pytest.mark.parametrize(
    ("sofa", "onsets"),
    [
        (90, {"earlier": 90, "suspicion": 100, "sofa": 90, "later": 100}),
        (110, {"earlier": 100, "suspicion": 100, "sofa": 110, "later": 110}),
    ],
)
def test_onset_is_the_time_that_is_asked_for_and_both_times_are_kept(sofa, onsets):
    for onset, hours in onsets.items():
        hospital = suspected(100)
        hospital.measure("platelets", (sofa, 60))
        visit = hospital.judge(onset=onset).loc["v"]
        assert visit["sepsis_onset"] == at(hours)
        assert (visit["suspicion_time"], visit["sofa_time"]) == (at(100), at(sofa))


def test_labels_say_which_parts_were_known():
    hospital = suspected(100)
    hospital.measure("platelets", (99.5, 60))
    hospital.measure("mean_bp", (99.5, 80))
    hospital.add("urine", "p", "v", at(1), 100)
    visit = hospital.judge().loc["v"]
    assert (visit["sofa"], visit["coagulation"], visit["cardiovascular"]) == (2, 2, 0)
    assert visit[["respiration", "liver", "nervous", "renal"]].isna().all()
    assert visit[["urine_known", "ventilation_known", "vasopressors_known"]].tolist() == [True, False, False]


# ------------------------------------------------------------------------------------------ visits and stays


def test_visits_that_cannot_be_judged_are_left_out_and_counted():
    hospital = suspected(100)  # nothing of SOFA was measured
    hospital.visit("ward", 300, 400)  # no stay in intensive care
    judged = hospital.judge()
    assert judged["left_out"].to_dict() == {
        "v": "infection suspected, but nothing of SOFA measured near it",
        "ward": "no stay in intensive care",
    }
    assert table_of(judged.reset_index()).empty
    figures = summary(judged.reset_index(), LabelSettings())
    assert figures["visits"] == figures["septic"] == 0 and sum(figures["left_out"].values()) == 2


def test_without_a_suspicion_a_visit_is_not_septic_whatever_was_measured():
    hospital = Hospital()
    hospital.culture(10)
    hospital.antibiotic(200)
    visit = hospital.judge().loc["v"]
    assert visit["sepsis"] == 0 and visit["left_out"] is None


@pytest.mark.parametrize(("cultures", "reason"), [(True, "antibiotics"), (False, "antibiotics and no cultures")])
def test_a_source_without_cultures_or_antibiotics_gives_no_labels(cultures, reason):
    hospital = Hospital()
    if cultures:
        hospital.culture(10)
    assert hospital.judge()["left_out"].tolist() == [f"the source has no {reason}"]


def test_in_the_whole_hospital_stay_sofa_needs_no_intensive_care():
    hospital = suspected(100, icu=False)
    hospital.measure("platelets", (99.5, 60))
    for sofa_hours in ("icu", "hospital"):  # without stays in intensive care both are the whole visit
        assert hospital.judge(sofa_hours=sofa_hours).loc["v", "sepsis"] == 1
    hospital.add("icu_stays", "s", "v", "p", at(200), at(210))
    assert hospital.judge(sofa_hours="icu").loc["v", "sepsis"] == 0
    assert hospital.judge(sofa_hours="hospital").loc["v", "sepsis"] == 1


def test_a_visit_that_is_not_over_is_judged():
    hospital = suspected(100, icu=False)
    hospital.con.execute("UPDATE visits SET visit_end = NULL")
    hospital.measure("platelets", (99.5, 60))
    assert hospital.judge().loc["v", "sofa_time"] == at(100)


def test_labels_of_stays_in_intensive_care():
    hospital = suspected(100, stay_hours=(90, 120))
    hospital.add("icu_stays", "later", "v", "p", at(150), at(200))
    hospital.measure("platelets", (99.5, 60))
    judged = hospital.judge(visits="icu")
    assert judged["sepsis"].to_dict() == {"s": 1, "later": 0}
    assert hospital.judge()["sepsis"].to_dict() == {"v": 1}


def test_a_visit_or_a_stay_that_stands_twice_counts_once():
    hospital = suspected(100)
    hospital.measure("platelets", (99.5, 60))
    hospital.con.execute("INSERT INTO visits FROM visits")
    hospital.con.execute("INSERT INTO icu_stays FROM icu_stays")
    assert hospital.judge()["sepsis"].tolist() == [1]
    assert hospital.judge(visits="icu")["sepsis"].tolist() == [1]


def test_of_several_septic_stays_the_visit_has_the_earliest_onset():
    hospital = Hospital(stay_hours=(150, 200))
    hospital.add("icu_stays", "first", "v", "p", at(50), at(100))
    for hours in (60, 160):
        hospital.culture(hours)
        hospital.antibiotic(hours + 1)
    hospital.measure("platelets", (62, 60), (161, 15))
    visit = hospital.judge().loc["v"]
    assert (visit["sepsis_onset"], visit["sofa"]) == (at(60), 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"definition": "sepsis2"},
        {"onset": "first"},
        {"definition": "ase", "visits": "icu"},
        {"sofa_hours": "hospital", "visits": "icu"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(BadConfig, match="--"):
        LabelSettings(**settings)


def test_the_summary_counts_when_in_the_stay_sepsis_began():
    hospital = Hospital(icu=False)
    for number, hours in enumerate((-1, 3, 30, 100)):
        client, visit = f"p{number}", f"v{number}"
        hospital.visit(visit, 0, 240, client=client)
        hospital.culture(hours, client=client, visit=None)
        hospital.antibiotic(hours + 2, client=client, visit=visit)
        hospital.add("measurements", client, visit, None, at(hours + 5), "platelets", 30.0)
    judged = hospital.judge().reset_index()
    figures = summary(judged, LabelSettings())
    assert (figures["visits"], figures["septic"], figures["septic_share"]) == (5, 4, 0.8)
    assert {name: n for name, n in figures["when"].items() if n} == {
        "before the visit": 1,
        "from 0 to 6 h": 1,
        "from 24 to 48 h": 1,
        "after 72 h": 1,
    }
    assert figures["at_arrival_share"] == 0.5 and figures["first_two_days_share"] == 0.75
    assert figures["median_hours_to_onset"] == 16.5
    assert all(entry["source"] for entry in figures["published"])


def test_the_report_warns_where_the_source_seems_to_lack_antibiotics_or_cultures(caplog, tmp_path):
    hospital = Hospital(icu=False)
    for number in range(9):
        hospital.visit(f"v{number}", 0, 240, client=f"p{number}")
    hospital.culture(10)
    for hours in (11, 150, 160, 170):
        hospital.antibiotic(hours)
    hospital.measure("platelets", (10, 40))
    arguments = Namespace(labels="sepsis3", onset="earlier", visits="hospital", sofa_hours="icu", ase_lactate=False)
    arguments.out = tmp_path
    figures = write_labels(hospital.con, arguments)
    assert (figures["antibiotic_share"], figures["culture_share"]) == (0.1, 0.25)
    page = "".join(report_parts(figures))
    for found in (caplog.text, page):
        assert "only 10% of the patients have an antibiotic" in found
        assert "only 25% of the antibiotic orders have a culture near them" in found
    labels = read_labels(tmp_path / "labels.parquet")
    assert labels["sepsis"].sum() == 1 and len(labels) == 10


def test_no_labels_are_written_where_none_can_be_made(caplog, tmp_path):
    arguments = Namespace(labels="ase", onset="earlier", visits="hospital", sofa_hours="icu", ase_lactate=False)
    arguments.out = tmp_path
    figures = write_labels(Hospital().con, arguments)
    assert "the source has no antibiotics and no cultures" in caplog.text
    assert not list(tmp_path.iterdir()) and "without a label" in "".join(report_parts(figures))
    arguments.labels = "none"
    assert write_labels(Hospital().con, arguments) is None and report_parts(None) == []


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_the_page_for_clinicians_explains_every_column_and_every_choice(definition):
    page = (Path(__file__).resolve().parents[1] / "docs" / "labels.md").read_text(encoding="utf-8")
    columns = table_of(Hospital().judge(definition=definition).reset_index()).columns
    assert not [name for name in (definition, *columns, *ONSETS) if f"`{name}`" not in page]
    assert not [entry["source"] for entry in PUBLISHED[definition] if entry["source"].split(" et al")[0] not in page]
