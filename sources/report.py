"""What was read, mapped, converted and left out: ``codes.csv``, ``report.json`` and ``report.html``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from common import pages
from common.artifacts import write_atomic, write_json, write_tables
from feature_pipeline import CONCEPT, CONCEPTS, Concept
from sources.labels import report_parts
from sources.meanings import doubts, linear, suggest
from sources.tables import duckdb

FINE, COARSE = 20_000, 30  # bins of a histogram as counted, and as drawn at most
MOST_ROWS = 40  # of a table in the page; report.json has all

BY_UNIT = """
SELECT observation_type_code AS code, coalesce(unit, '') AS unit, count(*) AS n,
       min(observation_value) AS lowest, max(observation_value) AS highest
FROM observations GROUP BY ALL ORDER BY code, n DESC, unit
"""

VISITS_OF_CODE = """
SELECT code, count(*) AS n FROM (SELECT DISTINCT observation_type_code AS code, client, visit_id FROM observations)
GROUP BY code
"""

# Values in the unit of the concept that a code may stand for.
KEPT = """
CREATE OR REPLACE VIEW kept AS
SELECT m.code, m.concept, m.unit, m.low, m.high, observation_value * m.factor + m.add_to AS value,
       observation_value * m.factor + m.add_to BETWEEN m.low AND m.high
       OR coalesce(observation_value BETWEEN m.other_low AND m.other_high, false) AS allowed
FROM observations o JOIN meanings m ON m.code = o.observation_type_code AND m.unit = coalesce(o.unit, '')
"""

HISTOGRAM = f"""
SELECT concept, least({FINE} - 1, floor((value - low) / (high - low) * {FINE}))::INTEGER AS bin, count(*) AS n
FROM kept WHERE allowed AND value BETWEEN low AND high AND isfinite(high - low) GROUP BY ALL ORDER BY ALL
"""

TIMES = """
SELECT count(*) FILTER (o.observation_date < s.visit_start) AS before_the_visit,
       count(*) FILTER (o.observation_date > s.visit_end) AS after_the_visit,
       min(o.observation_date)::VARCHAR AS first, max(o.observation_date)::VARCHAR AS last
FROM observations o JOIN stays s USING (visit_id, client)
"""


def frame(con: duckdb.DuckDBPyConnection, query: str) -> pd.DataFrame:
    return con.execute(query).df()


def tabulate_codes(con: duckdb.DuckDBPyConnection, given: Mapping[str, str]) -> pd.DataFrame:
    """One row a code, with the concept that it stands for: the one of `given`, or else the one that is suggested.

    Leaves the table `meanings` (code, unit, concept, factor, add_to, ...) and the view `kept` behind.
    """
    by_unit = frame(con, BY_UNIT)
    names = dict(con.execute("SELECT code, min(name) FROM code_names GROUP BY code").fetchall())
    visits = dict(con.execute(VISITS_OF_CODE).fetchall())
    candidates: dict[str, tuple[Concept | None, str]] = {}
    for code in by_unit["code"].unique():
        name = given.get(code)
        candidates[code] = (CONCEPT.get(name), "given") if name is not None else suggest(code, names.get(code) or "")
    _set_meanings(con, by_unit, {code: concept for code, (concept, _) in candidates.items()})
    allowed = dict(con.execute("SELECT code, count(*) FILTER (allowed) FROM kept GROUP BY code").fetchall())
    rows = []
    for code, units in by_unit.groupby("code", sort=True):
        concept, why = candidates[code]
        n, unit = int(units["n"].sum()), units["unit"].iloc[0]
        known = [r.n for r in units.itertuples() if concept is not None and linear(concept, code, r.unit)]
        convertible = int(sum(known))
        if concept is not None and why != "given":
            doubt = doubts(concept, code, unit, allowed.get(code, 0) / max(convertible, 1))
            if doubt:
                concept, why = None, f"{concept.name} by {why}, {doubt}"
        rows.append(
            {
                "code": code,
                "concept": concept.name if concept else "",
                "name": names.get(code) or "",
                "unit": unit,
                "rows": n,
                "visits": visits[code],
                "lowest": float(units["lowest"].min()),
                "highest": float(units["highest"].max()),
                "converted": int(sum(r.n for r in units.itertuples() if _converts(concept, code, r.unit))),
                "other_units": "; ".join(f"{r.unit or '(none)'} {r.n}" for r in units.iloc[1:].itertuples()),
                "unit_unknown": n - convertible if concept else 0,
                "outside_limits": convertible - allowed.get(code, 0) if concept else 0,
                "why": why,
            }
        )
    codes = pd.DataFrame(rows)
    _set_meanings(con, by_unit, {row["code"]: CONCEPT.get(row["concept"]) for row in rows})
    return codes


def _converts(concept: Concept | None, code: str, unit: str) -> bool:
    return concept is not None and linear(concept, code, unit) not in (None, (1.0, 0.0))


def _set_meanings(
    con: duckdb.DuckDBPyConnection, by_unit: pd.DataFrame, concepts: Mapping[str, Concept | None]
) -> None:
    con.execute(
        "CREATE OR REPLACE TABLE meanings (code VARCHAR, unit VARCHAR, concept VARCHAR, factor DOUBLE, add_to DOUBLE, "
        "low DOUBLE, high DOUBLE, other_low DOUBLE, other_high DOUBLE)"
    )
    rows = []
    for row in by_unit.itertuples():
        concept = concepts[row.code]
        if concept is not None and (line := linear(concept, row.code, row.unit)):
            # where no unit is named, the reader takes some numbers for another one
            other = next((unit.told for unit in concept.units if unit.told and not row.unit), (None, None))
            rows.append([row.code, row.unit, concept.name, *line, concept.low, concept.high, *other])
    if rows:
        con.executemany(f"INSERT INTO meanings VALUES ({', '.join('?' * 9)})", rows)
    con.execute(KEPT)


def write_report(
    con: duckdb.DuckDBPyConnection, arguments: argparse.Namespace, facts: dict[str, Any], reasons: Mapping[str, str]
) -> None:
    """Writes `codes.csv`, `report.json` and `report.html` from the views that `prepare` left. `reasons` are the texts
    for why a row is left out."""
    codes = facts.pop("codes")
    left_out = frame(con, "SELECT reason, code, n FROM left_out ORDER BY reason, n DESC, code")
    times = con.execute(TIMES).df().iloc[0].to_dict()
    coverage = concept_coverage(con, codes, facts["visits"])
    write_tables({arguments.out / "codes.csv": codes})
    facts |= {
        "times": times,
        "coverage": coverage.to_dict("records"),
        "left_out_by_code": left_out.astype(object).where(left_out.notna(), None).to_dict("records"),
        "codes": codes.to_dict("records"),
    }
    write_json(arguments.out / "report.json", facts)
    parts = [
        pages.heading("Read"),
        pages.facts_table(
            {
                "source": facts["source"],
                "visits": facts["visits"],
                "visits with observations": facts["visits_with_observations"],
                "rows read": facts["rows"],
                "observations": facts["observations"],
                "observations given to a visit by their time": facts["visit_by_time"],
                "observations before their visit": times["before_the_visit"],
                "observations after their visit": times["after_the_visit"],
                "first and last observation": f"{times['first']} to {times['last']}",
                "time of an observation": facts["time"],
                **{f"visits left out: {reason}": n for reason, n in facts["visits_left_out"].items()},
                **{f"lines of {name} that are no rows": n for name, n in facts["rejected_lines"].items()},
                **{f"has {kind.replace('_', ' ')}": "yes" if has else "no" for kind, has in facts["has"].items()},
            }
        ),
        *report_parts(facts["labels"]),
        pages.heading("Left out"),
        pages.facts_table({reasons[reason]: n for reason, n in facts["left_out"].items()})
        if facts["left_out"]
        else pages.paragraph("Nothing."),
        _first_rows(left_out.groupby("code", sort=False, dropna=False).head(1)[["code", "reason", "n"]]),
        pages.heading("Concepts"),
        pages.frame_table(coverage),
        pages.image(histograms(con, coverage["concept"]), "a histogram of each concept's values")
        if (coverage["rows"] > 0).any()
        else "",
        pages.heading("Codes"),
        _first_rows(codes.sort_values(["rows", "code"], ascending=[False, True])),
    ]
    write_atomic(arguments.out / "report.html", pages.page("Prepared data", facts.get("notices", []), *parts))


def _first_rows(table: pd.DataFrame) -> str:
    more = len(table) - MOST_ROWS
    values = {name: table[name].map("{:g}".format) for name in ("lowest", "highest") if name in table}
    return pages.frame_table(table.assign(**values).head(MOST_ROWS)) + (
        pages.paragraph(f"{more} more are in report.json.") if more > 0 else ""
    )


def concept_coverage(con: duckdb.DuckDBPyConnection, codes: pd.DataFrame, visits: int) -> pd.DataFrame:
    """One row a concept: its codes, rows, and the share of the visits that have it."""
    in_visits = dict(
        con.execute(
            "SELECT concept, count(*) FROM (SELECT DISTINCT m.concept, o.client, o.visit_id FROM observations o "
            "JOIN (SELECT DISTINCT code, concept FROM meanings) m ON m.code = o.observation_type_code) GROUP BY concept"
        ).fetchall()
    )
    rows = []
    for concept in CONCEPTS:
        own = codes[codes["concept"] == concept.name]
        rows.append(
            {
                "concept": concept.name,
                "unit": concept.unit,
                "codes": ", ".join(own.sort_values("rows", ascending=False)["code"].head(6)),
                "rows": int(own["rows"].sum()),
                "unit_unknown": int(own["unit_unknown"].sum()),
                "outside_limits": int(own["outside_limits"].sum()),
                "share_of_visits": round(in_visits.get(concept.name, 0) / visits, 4),
            }
        )
    return pd.DataFrame(rows)


def histograms(con: duckdb.DuckDBPyConnection, concepts: Iterable[str]) -> Any:
    """A figure with a small histogram of each concept, its rarest 1 % on either side left out."""
    from matplotlib.figure import Figure

    counted = frame(con, HISTOGRAM)
    shown = [name for name in concepts if (counted["concept"] == name).any()]
    figure = Figure(figsize=(12, 1.9 * max(1, -(-len(shown) // 5))), layout="constrained")
    for place, name in enumerate(shown, 1):
        concept, own = CONCEPT[name], counted[counted["concept"] == name]
        n = np.zeros(FINE)
        n[own["bin"].to_numpy()] = own["n"].to_numpy()
        share = np.cumsum(n) / n.sum()
        first, last = np.searchsorted(share, 0.01), np.searchsorted(share, 0.99) + 1
        edges = np.unique(np.linspace(first, last, min(COARSE, last - first) + 1).astype(int))
        axes = figure.add_subplot(-(-len(shown) // 5), 5, place)
        width = (concept.high - concept.low) / FINE
        axes.stairs(np.add.reduceat(n, edges[:-1]), concept.low + edges * width, fill=True)
        axes.set_title(f"{name} ({concept.unit})", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
    return figure
