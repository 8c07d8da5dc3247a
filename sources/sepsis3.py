"""Sepsis labels from a hospital's own tables: Sepsis-3 in two forms, and the CDC's Adult Sepsis Event.

The definitions are in the SQL files beside this one, each with its sources: `suspicion.sql`, `sofa.sql`,
`sepsis3.sql`, `ase.sql`. This file passes them their settings, and turns their results into one row for each visit.
`docs/labels.md` explains all of it for clinicians.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from feature_pipeline import SOFA_BANDS, SOFA_UNVENTILATED, BadConfig

if TYPE_CHECKING:
    import duckdb

HERE = Path(__file__).parent

DEFINITIONS = {
    "sepsis3": "Sepsis-3 as in mimic-code: suspicion of infection, and SOFA of 2 or more near it",
    "sepsis3-rise": "Sepsis-3 as in ricu: suspicion of infection, and a rise of SOFA by 2 or more near it",
    "ase": "CDC Adult Sepsis Event: blood culture, 4 days of antimicrobials, a failing organ; by calendar day",
}
ONSETS = ("earlier", "suspicion", "sofa", "later")
SOFA_PARTS = ("respiration", "coagulation", "liver", "cardiovascular", "nervous", "renal")
ASE_ORGANS = ("cardiovascular", "respiratory", "renal", "liver", "coagulation", "lactate")


@dataclass(frozen=True)
class LabelSettings:
    """Which definition, and what of it a hospital chooses. Raises `BadConfig` for what does not go together."""

    definition: str = "sepsis3"
    onset: str = "earlier"  # of the suspicion and the organ dysfunction
    visits: str = "hospital"  # what a label is for: a hospital stay, or a stay in intensive care ("icu")
    sofa_hours: str = "icu"  # where SOFA is counted: in intensive care, or in the whole hospital stay ("hospital")
    lactate: bool = False  # does lactate count as an organ of the Adult Sepsis Event?

    def __post_init__(self):
        for name, value, allowed in (
            ("labels", self.definition, tuple(DEFINITIONS)),
            ("onset", self.onset, ONSETS),
            ("visits", self.visits, ("hospital", "icu")),
            ("sofa-hours", self.sofa_hours, ("icu", "hospital")),
        ):
            if value not in allowed:
                raise BadConfig(f"--{name} {value!r} is unknown; choose from {', '.join(allowed)}")
        if self.visits == "icu" and (self.definition == "ase" or self.sofa_hours == "hospital"):
            what = "--labels ase" if self.definition == "ase" else "--sofa-hours hospital"
            raise BadConfig(f"{what} is about hospital stays and does not go with --visits icu; take --visits hospital")


def judge_visits(con: duckdb.DuckDBPyConnection, settings: LabelSettings) -> pd.DataFrame:
    """One row for each visit in `con`, a database with the tables that the sources fill.

    The columns are those of the labels, `visit_start`, and `left_out`: why the definition cannot be judged in this
    visit, empty where it can.

    Reads `visits` (with `discharge` and `esrd` where it has these columns), `icu_stays` (with `hours_from` and
    `hours_to`), `antibiotics`, `cultures`, `vasopressors`, `ventilation`, `urine`, and `measurements`, which is made
    from `rows` and `meanings` where the source did not make it.
    """
    _prepare(con, settings)
    if settings.definition == "ase":
        _run(con, "ase")
        judged = con.execute(_ASE_LABELS).df()
    else:
        _run(con, "suspicion")
        con.execute(_HOURS)
        _run(con, "sofa")
        _run(con, "sepsis3")
        _run(con, "labels")
        judged = con.execute("FROM labelled ORDER BY client, visit_id").df()
    for kind in ("vasopressors", "ventilation", "urine"):
        judged[f"{kind}_known"] = not _is_empty(con, kind)
    absent = [kind for kind in ("antibiotics", "cultures") if _is_empty(con, kind)]
    if settings.definition == "ase" and not absent and not con.execute(_ANY_BLOOD).fetchone():
        absent = ["blood cultures"]
    if absent:
        judged["left_out"] = f"the source has no {' and no '.join(absent)}"
    return judged


def shares_of_evidence(con: duckdb.DuckDBPyConnection, settings: LabelSettings) -> dict[str, float | None]:
    """After `judge_visits`: the share of the patients who have an antibiotic, and the share of the antibiotic orders
    (for the Adult Sepsis Event: of the courses of 4 days and more) that have a culture near them; None for none."""
    is_ase = settings.definition == "ase"
    given = "antimicrobial_days JOIN judged_visits USING (visit_id)" if is_ase else "antibiotic_orders"
    clients = con.execute("SELECT count(DISTINCT client) FROM judged_visits").fetchone()[0]
    with_antibiotic = con.execute(
        f"SELECT count(DISTINCT client) FROM {given} WHERE client IN (SELECT client FROM judged_visits)"
    ).fetchone()[0]
    with_culture = con.execute(_COURSES_WITH_CULTURE if is_ase else _ORDERS_WITH_CULTURE).fetchone()[0]
    return {"antibiotic_share": with_antibiotic / clients if clients else None, "culture_share": with_culture}


def _run(con: duckdb.DuckDBPyConnection, name: str) -> None:
    con.execute((HERE / f"{name}.sql").read_text(encoding="utf-8"))


def _is_empty(con: duckdb.DuckDBPyConnection, table: str) -> bool:
    return con.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is None


def _prepare(con: duckdb.DuckDBPyConnection, settings: LabelSettings) -> None:
    """Variables and macros, and the tables `judged_visits` and `episodes`."""
    con.execute(f"SET VARIABLE rise = {settings.definition == 'sepsis3-rise'}")
    con.execute(f"SET VARIABLE onset = '{settings.onset}'")
    by_stay = settings.visits == "icu"
    con.execute(f"SET VARIABLE by_stay = {by_stay}")
    con.execute(f"SET VARIABLE lactate = {settings.lactate}")
    _run(con, "antimicrobials")
    con.execute(_DRUGS)
    for measured, (edges, points) in SOFA_BANDS.items():
        bands = " ".join(f"WHEN x < {edge} THEN {point}" for edge, point in zip(edges, points, strict=False))
        con.execute(
            f"CREATE OR REPLACE MACRO sofa_{measured}(x) AS CASE {bands} WHEN x IS NOT NULL THEN {points[-1]} END"
        )
    con.execute(f"CREATE OR REPLACE MACRO sofa_unventilated() AS {SOFA_UNVENTILATED}")
    if not con.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'measurements'").fetchone():
        _run(con, "measurements")
    of_visits, of_stays = _columns(con, "visits"), _columns(con, "icu_stays")
    discharge, esrd = (name if name in of_visits else "NULL" for name in ("discharge", "esrd"))
    hours = [name if name in of_stays else "NULL::TIMESTAMP" for name in ("hours_from", "hours_to")]
    con.execute(_JUDGED_STAYS if by_stay else _JUDGED_VISITS.format(discharge=discharge, esrd=esrd))
    if settings.sofa_hours == "icu" and (by_stay or not _is_empty(con, "icu_stays")):
        judged_id = "stay_id" if by_stay else "visit_id"
        con.execute(_STAY_EPISODES.format(hours_from=hours[0], hours_to=hours[1], judged_id=judged_id))
    else:
        con.execute(_VISIT_EPISODES)


def _columns(con: duckdb.DuckDBPyConnection, table: str) -> set[str]:
    return {row[0] for row in con.execute(f"DESCRIBE {table}").fetchall()}


_DRUGS = """
CREATE OR REPLACE TABLE drugs AS
SELECT name, antimicrobial(name) AS substance, is_reference_antibiotic(name) AS reference
FROM (SELECT DISTINCT name FROM antibiotics WHERE name IS NOT NULL);
"""

# A visit_id that stands twice counts once, as for the observations.
_JUDGED_VISITS = """
CREATE OR REPLACE TABLE judged_visits AS
SELECT visit_id, client, visit_start, visit_end, visit_start::DATE AS first_day, visit_end::DATE AS last_day,
       coalesce(died, false) OR coalesce({discharge}::VARCHAR IN ('hospice', 'acute_care'), false) AS ended_early,
       {esrd}::BOOLEAN AS esrd
FROM visits
WHERE visit_id IS NOT NULL AND client IS NOT NULL AND visit_start IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY visit_id ORDER BY visit_start, visit_end, client) = 1;
"""

_JUDGED_STAYS = """
CREATE OR REPLACE TABLE judged_visits AS
SELECT stay_id AS visit_id, client, stay_start AS visit_start, stay_end AS visit_end
FROM icu_stays
WHERE stay_id IS NOT NULL AND client IS NOT NULL AND stay_start IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY stay_id ORDER BY stay_start, stay_end, client) = 1;
"""

# Where SOFA is counted: a stay in intensive care, or a whole visit. `judged_id` is the visit that the label is for.
_STAY_EPISODES = """
CREATE OR REPLACE TABLE episodes AS
SELECT stay_id AS episode_id, stay_id, visit_id, client, {judged_id} AS judged_id, false AS whole_visit,
       stay_start AS episode_start, coalesce(stay_end, 'infinity'::TIMESTAMP) AS episode_end,
       coalesce({hours_from}, stay_start) AS hours_from, coalesce({hours_to}, stay_end) AS hours_to
FROM icu_stays
WHERE {judged_id} IN (SELECT visit_id FROM judged_visits)
QUALIFY row_number() OVER (PARTITION BY stay_id ORDER BY stay_start, stay_end, visit_id) = 1;
"""

_VISIT_EPISODES = """
CREATE OR REPLACE TABLE episodes AS
SELECT visit_id AS episode_id, NULL::VARCHAR AS stay_id, visit_id, client, visit_id AS judged_id, true AS whole_visit,
       visit_start AS episode_start, coalesce(visit_end, 'infinity'::TIMESTAMP) AS episode_end,
       visit_start AS hours_from, visit_end AS hours_to
FROM judged_visits;
"""

# SOFA is counted in the hours of an episode that lie in the window of one of its suspicions.
_HOURS = """
CREATE OR REPLACE MACRO end_of_hour(t) AS date_trunc('hour', t - INTERVAL 1 MICROSECOND) + INTERVAL 1 HOUR;
CREATE OR REPLACE TABLE hours AS
SELECT DISTINCT e.episode_id, unnest(generate_series(
           greatest(end_of_hour(e.hours_from), end_of_hour(s.suspicion_time - INTERVAL 48 HOURS)),
           least(end_of_hour(e.hours_from) + date_diff('hour', e.hours_from, e.hours_to) * INTERVAL 1 HOUR,
                 date_trunc('hour', s.suspicion_time + INTERVAL 24 HOURS)),
           INTERVAL 1 HOUR)) AS hour
FROM suspicions s JOIN episodes e USING (episode_id)
WHERE s.suspicion_time IS NOT NULL;
"""

_ANY_BLOOD = "SELECT 1 FROM cultures WHERE blood LIMIT 1"

_ORDERS_WITH_CULTURE = "SELECT avg((suspicion_time IS NOT NULL)::INTEGER) FROM suspicions"

_COURSES_WITH_CULTURE = """
SELECT avg(EXISTS (FROM cultures c WHERE c.client = v.client AND c.blood
                   AND c.time::DATE BETWEEN a.course_start - 2 AND a.course_start + 2)::INTEGER)
FROM antimicrobial_courses a JOIN judged_visits v USING (visit_id)
WHERE a.days >= 4
"""

_ASE_LABELS = f"""
SELECT v.visit_id, v.client, (e.visit_id IS NOT NULL)::TINYINT AS sepsis,
       CASE getvariable('onset') WHEN 'suspicion' THEN e.suspicion_time WHEN 'sofa' THEN e.dysfunction_time
            WHEN 'later' THEN greatest(e.suspicion_time, e.dysfunction_time)
            ELSE least(e.suspicion_time, e.dysfunction_time) END AS sepsis_onset,
       coalesce(e.suspicion_time, i.suspicion_time) AS suspicion_time,
       coalesce(e.antibiotic_time, i.antibiotic_time) AS antibiotic_time,
       coalesce(e.culture_time, i.culture_time) AS culture_time, e.dysfunction_time,
       coalesce(e.qualifying_days, i.qualifying_days) AS qualifying_days, e.community_onset,
       {", ".join(f"e.{organ}" for organ in ASE_ORGANS)},
       CASE WHEN d.administered THEN 'given' WHEN d.visit_id IS NOT NULL THEN 'ordered' END AS antimicrobials,
       v.visit_start, NULL::VARCHAR AS left_out
FROM judged_visits v
LEFT JOIN adult_sepsis_events e USING (visit_id)
LEFT JOIN first_infections i USING (visit_id)
LEFT JOIN (SELECT visit_id, bool_and(administered) AS administered FROM antimicrobial_days GROUP BY visit_id) d
     USING (visit_id)
ORDER BY v.client, v.visit_id
"""
