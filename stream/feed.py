"""What every feed does with observations: keep, score in micro-batches, give results and alerts, close idle visits."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from command_line import log
from feature_pipeline import BadConfig
from stream.alerts import AlertBook, AlertSinks
from stream.journal import Journal
from stream.processor import StreamProcessor

COMPACT_LINES = 1_000_000
IDLE_EVERY = 60.0  # seconds between looks for idle visits


class Feed:
    """Joins a processor to its journal, its alerts and the place of its results."""

    def __init__(
        self,
        processor: StreamProcessor,
        book: AlertBook,
        sinks: AlertSinks,
        journal: Journal | None = None,
        results: TextIO = sys.stdout,
    ):
        self.processor, self.book, self.sinks, self.journal, self.results = processor, book, sinks, journal, results
        self.accepted = self.unreadable = self.scored = self.alerted = 0
        self._alerts: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._looked = time.monotonic()
        if journal is not None:
            self._restore()

    def _restore(self) -> None:
        entries = self.journal.load()
        observations = entries["observation"]
        if any(synonyms != self.processor.pipeline.config["synonyms"] for synonyms in entries["synonyms"]):
            raise BadConfig(
                f"state file {str(self.journal.path)!r} was written with a model that gives codes other meanings; "
                "deploy that model again until its visits have ended, or move the file away and lose them"
            )
        self.processor.add_observations(observations)
        self.processor.settle()
        for visit in entries["visit"]:
            self.processor.restrict((visit["client"], visit["visit_id"]), visit["full"], visit["folded"])
        for alert in entries["alert"]:
            self.book.note_alert(alert)
            self._remember(alert)
        if observations:
            self.processor.predict_due()  # the levels from which a rise counts; their scores were given before
            log.info("resumed %d open visits", len(self.processor.visits))

    def _remember(self, alert: dict[str, Any]) -> None:
        self._alerts.setdefault((str(alert["client"]), str(alert["visit_id"])), []).append(alert)

    def accept(self, observations: Sequence[Mapping[str, Any]]) -> None:
        """Takes observations; when it returns they survive a kill (with a journal)."""
        if self.journal is not None:
            self.journal.append("observation", observations)
        self.processor.add_observations(observations)
        self.accepted += len(observations)

    def accept_lines(self, lines: Sequence[str | bytes]) -> None:
        """Takes JSON lines; what is not JSON is counted and reported."""
        records = []
        unreadable = 0
        for line in lines:
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                unreadable += 1
        if unreadable:
            self.unreadable += unreadable
            log.warning("set aside: %d lines that are not JSON", unreadable)
        self.accept(records)

    def score(self) -> None:
        """Scores what changed, writes results and alerts."""
        self._give(self.processor.predict_due())
        if time.monotonic() - self._looked > IDLE_EVERY:
            self._looked = time.monotonic()
            self._give(self.processor.close_idle())
            if self.journal is not None and self.journal.lines > COMPACT_LINES:
                self._compact()

    def _give(self, results: Sequence[Mapping[str, Any]]) -> None:
        if not results:
            return
        alerts = self.book.rises(results)
        if self.journal is not None:  # noted before they are sent: never twice
            self.journal.append("alert", alerts)
        for result in results:
            shown = {name: value for name, value in result.items() if name != "previous_level"}
            self.results.write(json.dumps(shown) + "\n")
        self.results.flush()
        for alert in alerts:
            self._remember(alert)
        self.sinks.send(alerts)
        self.scored += len(results)
        self.alerted += len(alerts)

    def _compact(self) -> None:
        still = {(str(v.client), str(v.visit_id)) for v in self.processor.visits.values()}
        self._alerts = {key: alerts for key, alerts in self._alerts.items() if key in still}
        self.journal.compact(self.processor, [alert for alerts in self._alerts.values() for alert in alerts])

    def finish(self) -> None:
        """Scores what was accepted, saves the open visits."""
        self.processor.settle()
        self._give(self.processor.predict_due())
        if self.journal is not None:
            self._compact()
        log.info("%s", self.account())

    def account(self) -> str:
        """One line on what was done."""
        aside = sum(self.processor.set_aside.values()) + self.unreadable
        return (
            f"{self.accepted:,} observations, {aside:,} set aside, {self.scored:,} scores, {self.alerted:,} alerts, "
            f"{len(self.processor.visits):,} visits open"
        )

    @property
    def failed(self) -> bool:
        """Was something not usable or not sent?"""
        return bool(self.unreadable or self.processor.set_aside or self.sinks.failed)


def read_lines(feed: Feed, descriptor: int, stopped: Callable[[], bool], wait: float = 0.02) -> None:
    """Feeds JSON lines from a file descriptor until it ends or `stopped` says so: whatever is there at once is a
    micro-batch."""
    rest = b""
    while not stopped():
        if not select.select([descriptor], [], [], wait)[0]:
            feed.score()
            continue
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            feed.accept_lines([rest])
            break
        *lines, rest = (rest + chunk).split(b"\n")
        feed.accept_lines(lines)
        feed.score()
