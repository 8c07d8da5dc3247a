"""Adult Sepsis Events of random hospitals against plain Python that follows the definition word by word."""

from datetime import timedelta

import numpy as np
import pandas as pd
import pytest

from tests.hospital import Hospital, at

DAY = timedelta(days=1)
DRUGS = {"Cefepime": "cefepime", "Vancomycin": "vancomycin", "Fluconazole": "fluconazole", "Aspirin": None}
LABS = {"creatinine": (0.6, 0.9, 1.2, 1.8), "platelets": (40, 90, 100, 210), "bilirubin_total": (0.7, 1.0, 2.0, 4.0)}
PRESSORS = ("norepinephrine", "phenylephrine", "dobutamine")
ORGANS = {"creatinine": "renal", "platelets": "coagulation", "bilirubin_total": "liver"}


def random_hospital(seed: int) -> Hospital:
    """Ten patients with a visit of ten days each; half of the antimicrobials come in runs with gaps."""
    rng = np.random.default_rng(seed)
    hospital = Hospital(icu=False)
    hospital.con.execute("DELETE FROM visits")
    for number in range(10):
        client, visit = f"p{number}", f"v{number}"
        hospital.visit(visit, 0, 24 * int(rng.integers(3, 11)), client=client, died=rng.random() < 0.3)
        for _ in range(rng.integers(2, 5)):
            name, route = rng.choice([*DRUGS]), rng.choice(["IV", "PO"], p=[0.8, 0.2])
            first = int(rng.integers(-2, 8))
            for day in range(first, first + int(rng.integers(2, 8))):
                if rng.random() < 0.8:
                    hospital.antibiotic(24 * day + int(rng.integers(0, 24)), name, route, client, visit, given=True)
        for _ in range(rng.integers(0, 3)):
            hospital.culture(float(rng.integers(0, 200)), client=client, visit=visit)
        for concept, values in LABS.items():
            for hours in rng.integers(0, 200, rng.integers(2, 8)):
                value = float(rng.choice(values))
                hospital.add("measurements", client, visit, None, at(float(hours)), concept, value)
        for _ in range(rng.integers(0, 3)):
            start = float(rng.integers(0, 220))
            span = at(start), at(start + float(rng.integers(1, 40)))
            hospital.add("vasopressors", client, visit, *span, rng.choice(PRESSORS), 0.1)
    return hospital


def rows_of(hospital, table, client):
    return hospital.con.execute(f"SELECT * FROM {table} WHERE client = ?", [client]).df().to_dict("records")


def courses(doses):
    """{first day: (number of qualifying days, time of the first dose of a new parenteral drug on it)}"""
    given = {}  # drug -> day -> doses
    for dose in doses:
        drug = DRUGS[dose["name"]]
        if drug == "vancomycin" and dose["route"] == "PO":
            drug = "vancomycin by mouth"
        if drug:
            given.setdefault(drug, {}).setdefault(dose["start"].normalize(), []).append(dose)
    runs = []  # (days from the first to the last, doses of the first)
    for of_drug in given.values():
        for day in sorted(of_drug):
            if any(day - n * DAY in of_drug for n in (1, 2)):
                runs[-1][0].update({day, day - DAY})
            else:
                runs.append(({day}, of_drug[day]))
    out = {}
    for first in {min(days) for days, doses in runs if any(dose["route"] == "IV" for dose in doses)}:
        covered = set().union(*(days for days, _ in runs if min(days) >= first))
        n = 0
        while first + n * DAY in covered:
            n += 1
        new = [doses for days, doses in runs if min(days) == first and any(dose["route"] == "IV" for dose in doses)]
        out[first] = n, min(dose["start"] for doses in new for dose in doses)
    return out


def failing(labs, pressors, culture, community):
    """[(time, organ)] within 2 days of the culture"""

    def near(time):
        return abs((time.normalize() - culture.normalize()).days) <= 2

    found = []
    for row in labs:
        same = [o["value"] for o in labs if o["concept"] == row["concept"] and (community or near(o["time"]))]
        value = row["value"]
        if not near(row["time"]):
            continue
        if {
            "creatinine": value >= 2 * min(same),
            "bilirubin_total": value >= 2 and value >= 2 * min(same),
            "platelets": value < 100 <= max(same) and value <= max(same) / 2,
        }[row["concept"]]:
            found.append((row["time"], ORGANS[row["concept"]]))
    for row in pressors:
        day = row["start"].normalize()
        before = any(
            o["drug"] == row["drug"] and o["start"].normalize() < day and o["stop"].normalize() >= day - DAY
            for o in pressors
        )
        if row["drug"] != "dobutamine" and near(row["start"]) and not before:
            found.append((row["start"], "cardiovascular"))
    return found


def events_of(hospital, visit):
    """[(onset day, culture, first antimicrobial, first dysfunction)] of a visit"""
    client = visit["client"]
    labs, pressors = rows_of(hospital, "measurements", client), rows_of(hospital, "vasopressors", client)
    first_day, last_day = visit["visit_start"].normalize(), visit["visit_end"].normalize()
    found = []
    for culture in (row["time"] for row in rows_of(hospital, "cultures", client)):
        for start, (n, time) in courses(rows_of(hospital, "antibiotics", client)).items():
            ended = visit["died"] and start + n * DAY >= last_day
            if abs((start - culture.normalize()).days) > 2 or not (n >= 4 or ended):
                continue
            community = (min(culture.normalize(), start) - first_day).days < 2
            if organs := failing(labs, pressors, culture, community):
                onset = min(culture, time, min(organs)[0])
                found.append((onset.normalize(), culture, start, time, min(organs)[0]))
    return sorted(found)


@pytest.mark.parametrize("seed", range(4))
def test_random_hospitals_are_judged_as_by_hand(seed):
    hospital = random_hospital(seed)
    judged = hospital.judge(definition="ase")
    visits = {row["visit_id"]: row for row in hospital.con.execute("SELECT * FROM visits").df().to_dict("records")}
    for row in judged.itertuples():
        events = events_of(hospital, visits[row.Index])
        assert row.sepsis == bool(events), row.Index
        if events:
            _, culture, _, antimicrobial, dysfunction = events[0]
            assert (row.culture_time, row.antibiotic_time, row.dysfunction_time) == (
                culture,
                antimicrobial,
                dysfunction,
            )
            assert row.sepsis_onset == min(culture, antimicrobial, dysfunction)


def test_the_random_hospitals_have_septic_visits_and_others():
    septic = pd.concat(random_hospital(seed).judge(definition="ase")["sepsis"] for seed in range(4))
    assert 0.1 < septic.mean() < 0.9
