"""Alerts: once when a visit's risk level rises, then silence for a while."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from command_line import log, post_json
from pseudonyms import Pseudonyms

LEVELS = {"unknown": 0, "low": 0, "medium": 1, "high": 2}


class AlertBook:
    """Remembers the last alert of each visit.

    A rise is a score at a higher level than the visit's previous one (none counts as low). It gives an alert unless one
    of that level or a higher one was given less than `cooldown_hours` before, by the observations' own times, so that a
    replay of the same feed decides the same.
    """

    def __init__(self, cooldown_hours: float = 6.0):
        self.cooldown = timedelta(hours=cooldown_hours)
        self._given: dict[tuple[str, str], dict[str, datetime]] = {}  # visit -> level -> time of the latest alert

    def rises(self, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The alerts that these results of `StreamProcessor` give."""
        alerts = []
        for result in results:
            level, before = result["risk_level"], result["previous_level"] or "low"
            if LEVELS[level] <= LEVELS[before]:
                continue
            key = (str(result["client"]), str(result["visit_id"]))
            moment = datetime.fromisoformat(result["timestamp"])
            given = [time for named, time in self._given.get(key, {}).items() if LEVELS[named] >= LEVELS[level]]
            if any(moment - time < self.cooldown for time in given):
                continue
            self.note(key, level, moment)
            text = json.dumps([*key, level, result["timestamp"]])
            alerts.append(
                {
                    "alert_id": hashlib.sha256(text.encode()).hexdigest()[:24],
                    **{name: value for name, value in result.items() if name != "num_observations"},
                    "previous_level": before,
                }
            )
        return alerts

    def note(self, key: tuple[str, str], level: str, moment: datetime) -> None:
        """Remembers an alert that was given, here or by another process."""
        times = self._given.setdefault(key, {})
        times[level] = max(moment, times.get(level, moment))

    def note_alert(self, alert: Mapping[str, Any]) -> None:
        key = (str(alert["client"]), str(alert["visit_id"]))
        self.note(key, alert["risk_level"], datetime.fromisoformat(alert["timestamp"]))


class AlertSinks:
    """Where alerts go: a file of JSON lines, a webhook, the log (there under a pseudonym)."""

    def __init__(self, file: str | None = None, webhook: str | None = None):
        self.file, self.webhook = file, webhook
        self.failed = 0
        self._pseudonyms = Pseudonyms.from_environment()

    def send(self, alerts: Iterable[Mapping[str, Any]]) -> None:
        """Sends each alert everywhere; what cannot be sent is counted and reported, the rest goes on."""
        for alert in alerts:
            pseudonym = self._pseudonyms.visit(str(alert["client"]), str(alert["visit_id"]))
            log.warning("ALERT: visit %s rose to %s risk", pseudonym, alert["risk_level"])
            if self.file:
                self._attempt("file", self._append, alert)
            if self.webhook:
                self._attempt("webhook", lambda alert: post_json(self.webhook, alert), alert)

    def _append(self, alert: Mapping[str, Any]) -> None:
        Path(self.file).parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(alert) + "\n")

    def _attempt(self, name: str, send: Any, alert: Mapping[str, Any]) -> None:
        try:
            send(alert)
        except OSError as error:
            self.failed += 1
            log.error("error: alert %s could not be sent to the %s: %s", alert["alert_id"], name, error)
