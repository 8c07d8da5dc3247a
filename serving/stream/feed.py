"""What every feed does with observations: keep, score in micro-batches, give results and alerts, close idle visits."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from common.command_line import log
from feature_pipeline import BadConfig
from serving.evidence import unused_text
from serving.stream.alerts import AlertBook, AlertSinks, visit_of
from serving.stream.journal import Journal
from serving.stream.processor import StreamProcessor
from serving.stream.visits import mark_of

IDLE_EVERY = 60.0  # seconds between looks for idle visits
LONGEST_LINE = 1 << 20  # bytes; an observation has some 200


class Feed:
    """Joins a processor to its journal, its alerts and the place of its results.

    With a journal everything is given at least once: what was accepted and not yet scored when a process was killed is
    scored by the next, and its alerts that were not sent are sent. An alert is kept before it is sent, so a restart
    sends the same one (of the same ``alert_id``) and never another one of the same rise.
    """

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
        self.not_kept = 0  # times that the journal could not take what was decided
        self._sent: list[str] = []  # ids of alerts that are everywhere, which the journal does not know yet
        self._dropped: list[bytes] = []  # marks of visits that were dropped, which the journal does not know yet
        self._giving = self._failing = False
        self._looked = time.monotonic()
        if journal is not None:
            self._restore(journal)

    def _restore(self, journal: Journal) -> None:
        processor = self.processor
        kept = journal.load()
        if kept.visits and kept.meaning != processor.pipeline.reproducer.codes.meaning_sha256:
            raise BadConfig(
                f"state file {str(journal.path)!r} was written with a model that gives codes other meanings; "
                "deploy that model again until its visits have ended, or move the file away and lose them"
            )
        processor.adopt(kept.visits, kept.codes)
        processor.remember_dropped(kept.dropped)
        processor.journaled = True
        for alert in kept.alerts:
            self.book.note_alert(alert)
        self.sinks.send(alert for alert in kept.alerts if alert["alert_id"] in kept.unsent)
        if kept.visits or kept.raw:
            log.info("resumed %d open visits", len(processor.visits))
        processor.add_observations(kept.raw)
        self._give(processor.predict_due)
        self.book.forget(key for key in map(visit_of, kept.alerts) if key not in processor.visits)

    def accept(self, observations: Sequence[Mapping[str, Any]]) -> None:
        """Takes observations; when it returns they survive a kill (with a journal). Raises `OSError` where they cannot
        be kept; nothing of them is taken then."""
        if self.journal is not None:
            self.journal.accept(observations)
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
                if len(line) > LONGEST_LINE:
                    raise ValueError
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                unreadable += 1
        if unreadable:
            self.unreadable += unreadable
            self.processor.deployed.current.log.record_error("unreadable", unreadable)
            log.warning("set aside: %d lines that are not JSON or longer than %d bytes", unreadable, LONGEST_LINE)
        self.accept(records)

    def score(self) -> None:
        """Scores what changed, writes results and alerts."""
        self._give(self.processor.predict_due)
        if time.monotonic() - self._looked > IDLE_EVERY:
            self._looked = time.monotonic()
            self._give(self.processor.close_idle)

    def _give(self, scores: Callable[[], list[dict[str, Any]]]) -> None:
        """Takes scores and gives them. An exception on the way leaves them due for the next process."""
        self._giving = True
        if results := scores():
            alerts = self.book.rises(results)
            self._keep(lambda journal: journal.keep_alerts(alerts))  # before they are sent: a restart sends these
            for result in results:
                shown = {name: value for name, value in result.items() if name != "previous_level"}
                self.results.write(json.dumps(shown) + "\n")
            self.results.flush()
            self.sinks.send(alerts)
            self.scored += len(results)
            self.alerted += len(alerts)
        dropped = self.processor.newly_dropped()
        self.book.forget(dropped)
        if self.journal is not None:
            self._dropped += map(mark_of, dropped)
            self._settle()
        else:
            self.sinks.sent.clear()
        self._giving = False

    def _settle(self) -> None:
        """Keeps what was given, in one transaction."""
        processor = self.processor
        while self.sinks.sent:
            self._sent.append(self.sinks.sent.popleft())
        if not (processor.changed or processor.closed or self._sent or self.journal.accepted):
            return
        if self._keep(
            lambda journal: journal.settle(
                list(processor.changed.values()),
                processor.closed,
                self._dropped,
                processor.codes,
                set(self._sent),
                processor.visits,
                processor.pipeline.reproducer.codes.meaning_sha256,
            )
        ):
            processor.changed, processor.closed, self._dropped, self._sent = {}, [], [], []

    def _keep(self, keep: Callable[[Journal], None]) -> bool:
        """Keeps what was decided; says whether that was possible. Patients' alerts still go out if it was not: a
        restart may give them again."""
        if self.journal is None:
            return True
        try:
            keep(self.journal)
            self._failing = False
        except OSError as error:
            self.not_kept += 1
            if not self._failing:
                log.error("error: %s; scores and alerts still go out, a restart may give them again", error)
            self._failing = True
        return not self._failing

    def finish(self) -> None:
        """Scores what was accepted, waits for the alerts, and closes the state file."""
        try:
            if not self._giving:  # else something went wrong with them: they stay due
                self._give(self.processor.predict_due)
            self.sinks.close()
            if self.journal is not None and not self._giving:
                self._settle()
        finally:
            if self.journal is not None:
                self.journal.close()
        log.info("%s", self.account())

    def account(self) -> str:
        """One line on what was done."""
        aside = sum(self.processor.set_aside.values()) + self.unreadable
        unused = self.processor.unused_codes
        told = (
            f"{self.accepted:,} observations, {aside:,} set aside, {self.scored:,} scores, {self.alerted:,} alerts, "
            f"{len(self.processor.visits):,} visits open"
        )
        not_logged = str(self.processor.deployed.current.log)
        return "; ".join(filter(None, [told, unused_text(unused) if unused else "", not_logged]))

    @property
    def failed(self) -> bool:
        """Was something not usable or not sent?"""
        return bool(self.unreadable or self.processor.set_aside or self.sinks.failed or self.not_kept)


def read_lines(feed: Feed, descriptor: int, stopped: Callable[[], bool], wait: float = 0.02) -> None:
    """Feeds JSON lines from a file descriptor until it ends or `stopped` says so: whatever is there at once is a
    micro-batch. A line longer than `LONGEST_LINE` is counted as unreadable."""
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
        rest = rest[: LONGEST_LINE + 1]  # of a longer one no more is needed than that it is too long
        feed.accept_lines(lines)
        feed.score()
