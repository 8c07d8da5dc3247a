"""Alerts: once when a visit's risk level rises, then silence for a while."""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from common.command_line import log, post_json
from common.pseudonyms import Pseudonyms
from feature_pipeline import as_text

LEVELS = {"UNKNOWN": 0, "LOW": 0, "MEDIUM": 1, "HIGH": 2}
WAITING = 1000  # alerts for the webhook at the most
FLUSH_SECONDS = 30.0  # for those that still wait at the end


class AlertBook:
    """Remembers the last alert of each visit.

    A rise is a score at a higher level than the visit's previous one (none counts as low). It gives an alert unless one
    of that level or a higher one was given less than `cooldown_hours` before, by the observations' own times, so that a
    replay of the same feed decides the same. `alert_id` is the same wherever and whenever a rise is decided again:
    those who receive an alert twice know it by that.
    """

    def __init__(self, cooldown_hours: float = 6.0):
        self.cooldown = timedelta(hours=cooldown_hours)
        self._given: dict[tuple[str, str], dict[str, datetime]] = {}  # visit -> level -> time of the latest alert

    def rises(self, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The alerts that these results of `StreamProcessor` give."""
        alerts = []
        for result in results:
            level, before = result["risk_level"], result["previous_level"] or "LOW"
            if LEVELS[level] <= LEVELS[before]:
                continue
            key = visit_of(result)
            moment = datetime.fromisoformat(result["timestamp"])
            given = [time for named, time in self._given.get(key, {}).items() if LEVELS[named] >= LEVELS[level]]
            if any(moment == time or moment - time < self.cooldown for time in given):
                continue
            self._note(key, level, moment)
            text = json.dumps([*key, level, result["timestamp"]])
            alerts.append(
                {
                    "alert_id": hashlib.sha256(text.encode()).hexdigest()[:24],
                    **{name: value for name, value in result.items() if name != "num_observations"},
                    "previous_level": before,
                }
            )
        return alerts

    def _note(self, key: tuple[str, str], level: str, moment: datetime) -> None:
        times = self._given.setdefault(key, {})
        times[level] = max(moment, times.get(level, moment))

    def note_alert(self, alert: Mapping[str, Any]) -> None:
        """Remembers an alert that was given before, here or by another process. Raises `KeyError`, `TypeError`,
        `ValueError` where it is none."""
        level, moment = alert["risk_level"], datetime.fromisoformat(alert["timestamp"])
        if LEVELS[level] and moment.tzinfo is not None:
            self._note(visit_of(alert), level, moment)

    def forget(self, keys: Iterable[tuple[str, str]]) -> None:
        """Drops what it knows of visits that are no longer scored."""
        for key in keys:
            self._given.pop(key, None)


def visit_of(result: Mapping[str, Any]) -> tuple[str, str]:
    """(client, visit number), as texts, of a result or an alert."""
    return as_text(result["client"]), as_text(result["visit_id"])


class AlertSinks:
    """Where alerts go: a file of JSON lines, a webhook, the log (there under a pseudonym).

    The webhook is called from a thread: however slow it is, nothing else waits for it. `sent` holds the ids of the
    alerts that were brought everywhere, or whose failure was reported, until someone takes them out.
    """

    def __init__(self, file: str | None = None, webhook: str | None = None):
        self.file, self.webhook = file, webhook
        self.failed = 0
        self.sent: deque[str] = deque()
        self._pseudonyms = Pseudonyms.from_environment()
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(WAITING)
        self._caller: threading.Thread | None = None

    def send(self, alerts: Iterable[Mapping[str, Any]]) -> None:
        """Sends each alert everywhere; what cannot be sent is counted and reported, the rest goes on."""
        for alert in alerts:
            log.warning("ALERT: visit %s rose to %s risk", self._pseudonym(alert), alert["risk_level"])
            if self.file:
                self._attempt("file", self._append, alert)
            if self.webhook:
                self._hand_over(alert)
            else:
                self.sent.append(alert["alert_id"])

    def _pseudonym(self, alert: Mapping[str, Any]) -> str:
        return self._pseudonyms.visit(*visit_of(alert))

    def _append(self, alert: Mapping[str, Any]) -> None:
        Path(self.file).parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(alert) + "\n")

    def _hand_over(self, alert: Mapping[str, Any]) -> None:
        if self._caller is None:
            self._caller = threading.Thread(target=self._call, daemon=True)
            self._caller.start()
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            self._report(alert, "webhook", f"{WAITING:,} others wait for it")

    def _call(self) -> None:
        while (alert := self._waiting.get()) is not None:
            self._attempt("webhook", lambda alert: post_json(self.webhook, alert), alert)
            self.sent.append(alert["alert_id"])

    def _attempt(self, name: str, send: Any, alert: Mapping[str, Any]) -> None:
        try:
            send(alert)
        except OSError as error:
            self._report(alert, name, error)

    def _report(self, alert: Mapping[str, Any], name: str, why: object) -> None:
        self.failed += 1
        log.error("error: the alert of visit %s could not be sent to the %s: %s", self._pseudonym(alert), name, why)

    def close(self, patience: float = FLUSH_SECONDS) -> None:
        """Waits for the webhook's alerts; those that are not out after `patience` seconds are counted and reported."""
        caller, self._caller = self._caller, None
        if caller is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=patience)
        caller.join(patience)
        if caller.is_alive():
            left = self._waiting.qsize()  # with the mark of the end, for the one that is under way
            self.failed += left
            log.error("error: the webhook is too slow: %d alerts were not sent to it", left)
