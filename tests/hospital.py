"""A small hospital as a source fills it, for the tests of labels. Times are hours after the start of the visit."""

from datetime import datetime, timedelta

import duckdb

from sources.prepare import CONTRACT, MACROS
from sources.sepsis3 import LabelSettings, judge_visits

START = datetime(2180, 3, 1, 8)


def at(hours: float) -> datetime:
    """So many hours after the start of the visit, Wednesday 8:00."""
    return START + timedelta(hours=hours)


class Hospital:
    """A database with the tables of a source: patient `p`, visit `v` of ten days, all of it in intensive care (`s`)."""

    def __init__(self, icu: bool = True, stay_hours: tuple[float, float] = (0, 240)):
        self.con = duckdb.connect()
        self.con.execute(MACROS)
        for name, columns in CONTRACT.items():
            self.con.execute(f"CREATE TABLE {name} ({columns})")
        self.con.execute(
            "CREATE TABLE measurements (client VARCHAR, visit_id VARCHAR, stay_id VARCHAR, time TIMESTAMP, "
            "concept VARCHAR, value DOUBLE)"
        )
        self.visit("v", 0, 240)
        if icu:
            self.add("icu_stays", "s", "v", "p", at(stay_hours[0]), at(stay_hours[1]))
        self.n = 0

    def add(self, table: str, *cells) -> None:
        self.con.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(cells))})", cells)

    def visit(self, visit: str, start: float, end: float, client: str = "p", died: bool = False) -> None:
        self.add("visits", visit, client, at(start), at(end), died)

    def antibiotic(self, hours, name="Vancomycin", route="IV", client="p", visit="v", stop=None, given=False) -> None:
        stop = None if stop is None else at(stop)
        self.add("antibiotics", client, visit, None, at(hours), stop, name, route, given, f"o{self.n}")
        self.n += 1

    def culture(
        self, hours, has_time=True, client="p", visit="v", blood=True, positive=False, specimen="BLOOD"
    ) -> None:
        time = at(hours) if has_time else at(hours).replace(hour=0, minute=0)
        self.add("cultures", client, visit, time, has_time, specimen, True, positive, str(self.n))
        self.n += 1

    def measure(self, concept: str, *points: tuple[float, float], visit="v", stay=None) -> None:
        """Values as (hours, value)."""
        for hours, value in points:
            self.add("measurements", "p", visit, stay, at(hours), concept, value)

    def judge(self, **settings):
        """All visits as judged, by visit_id."""
        return judge_visits(self.con, LabelSettings(**settings)).set_index("visit_id")

    def suspicions(self) -> list[tuple]:
        """(time of the antibiotic, time of the suspicion) of each order, in hours after the start."""
        self.judge()
        rows = self.con.execute("SELECT antibiotic_time, suspicion_time FROM suspicions ORDER BY number").fetchall()
        return [tuple(None if t is None else (t - START).total_seconds() / 3600 for t in row) for row in rows]

    def sofa(self, hours: float) -> dict:
        """SOFA and its parts at the end of an hour. Suspects an infection, because SOFA is counted only near one."""
        self.antibiotic(hours)
        self.culture(hours - 0.5)
        self.judge()
        found = self.con.execute("SELECT * FROM sofa WHERE hour = ?", [at(hours)])
        names = [column[0] for column in found.description]
        (row,) = found.fetchall()
        return dict(zip(names, row, strict=True))
