"""What the client of a FHIR server remembers from run to run, in a SQLite file: where it stopped, what it wrote."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from feature_pipeline import BadConfig

_TABLES = """
CREATE TABLE IF NOT EXISTS place (one INTEGER PRIMARY KEY CHECK (one = 1), base TEXT NOT NULL, since REAL);
CREATE TABLE IF NOT EXISTS seen (observation TEXT PRIMARY KEY, version TEXT NOT NULL, run REAL NOT NULL);
CREATE TABLE IF NOT EXISTS encounters (
    encounter TEXT PRIMARY KEY, pending INTEGER NOT NULL, assessment TEXT, version TEXT, stale_at REAL);
"""


class Written(NamedTuple):
    """The RiskAssessment of an encounter on the server."""

    id: str
    version: str  # empty where the server tells none


class State:
    """`since` is where the next run looks from, in seconds since 1970 by the server's clock; None before the first."""

    def __init__(self, path: str, base: str):
        Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        try:
            Path(path).touch(mode=0o600)
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.executescript(_TABLES)
            self._database.execute("INSERT OR IGNORE INTO place VALUES (1, ?, NULL)", (base,))
            ((known, self.since),) = self._database.execute("SELECT base, since FROM place")
        except (OSError, sqlite3.Error) as error:
            raise BadConfig(f"state file {path!r} cannot be used: {error}") from None
        if known != base:
            self.close()
            raise BadConfig(f"state file {path!r} belongs to another FHIR server; name another file in `state`")

    def note(
        self, since: float, run: float, versions: dict[str, str], in_progress: set[str], changed: set[str]
    ) -> None:
        """Notes in one transaction what a run at the server's time `run` has listed: the `versions` of Observations,
        the encounters in progress, and those that changed. The next one looks from `since` on."""
        execute = self._database.execute
        execute("BEGIN IMMEDIATE")
        try:
            known = {encounter for (encounter,) in execute("SELECT encounter FROM encounters")}
            for gone in known - in_progress:
                execute("DELETE FROM encounters WHERE encounter = ?", (gone,))
            for new in in_progress - known:
                execute("INSERT INTO encounters (encounter, pending) VALUES (?, 1)", (new,))
            for encounter in changed & known & in_progress:
                execute("UPDATE encounters SET pending = 1 WHERE encounter = ?", (encounter,))
            execute("UPDATE encounters SET pending = 1 WHERE stale_at <= ?", (run,))
            rows = [(observation, version, run) for observation, version in versions.items()]
            self._database.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", rows)
            execute("DELETE FROM seen WHERE run < ?", (since,))  # they are not listed again
            execute("UPDATE place SET since = ?", (since,))
            execute("COMMIT")
        except BaseException:
            execute("ROLLBACK")
            raise
        self.since = since

    def is_new(self, observation: str, version: str) -> bool:
        row = self._database.execute("SELECT version FROM seen WHERE observation = ?", (observation,)).fetchone()
        return row is None or row[0] != version

    def pending(self) -> list[str]:
        return [
            e for (e,) in self._database.execute("SELECT encounter FROM encounters WHERE pending ORDER BY encounter")
        ]

    def written(self, encounter: str) -> Written | None:
        query = "SELECT assessment, version FROM encounters WHERE encounter = ? AND assessment IS NOT NULL"
        row = self._database.execute(query, (encounter,)).fetchone()
        return Written(*row) if row else None

    def done(self, encounter: str, written: Written | None, stale_at: float | None = None) -> None:
        """The encounter is scored, and `written` is on the server; at `stale_at` its score says nothing any more."""
        values = (*(written or (None, None)), stale_at, encounter)
        update = "UPDATE encounters SET pending = 0, assessment = ?, version = ?, stale_at = ? WHERE encounter = ?"
        self._database.execute(update, values)

    def settle(self, encounters: Iterable[str]) -> None:
        """Nothing is to be done for these any more."""
        rows = [(encounter,) for encounter in encounters]
        self._database.executemany("UPDATE encounters SET pending = 0, stale_at = NULL WHERE encounter = ?", rows)

    def close(self) -> None:
        self._database.close()
