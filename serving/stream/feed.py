"""What every feed does with observations: keep, score in micro-batches, give results and alerts, close idle visits."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TextIO

from common.command_line import log
from feature_pipeline import BadConfig, as_text
from serving.stream.alerts import AlertBook, AlertSinks, visit_of
from serving.stream.journal import Journal, visit_entry
from serving.stream.processor import Key, StreamProcessor, mark_of

COMPACT_LINES = 1_000_000
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
        self.not_kept = 0  # entries that the journal could not take
        self._alerts: dict[Key, list[dict[str, Any]]] = {}  # that the journal keeps
        self._unsent: set[str] = set()  # ids of those among them that are not everywhere yet
        self._giving = self._failing = False
        self._looked = time.monotonic()
        if journal is not None:
            self._restore(journal)

    def _restore(self, journal: Journal) -> None:
        entries = journal.load()
        if any(synonyms != self.processor.pipeline.config.synonyms for synonyms in entries["synonyms"]):
            raise BadConfig(
                f"state file {str(journal.path)!r} was written with a model that gives codes other meanings; "
                "deploy that model again until its visits have ended, or move the file away and lose them"
            )
        try:
            dropped = [bytes.fromhex(mark) for marks in entries["dropped"] for mark in marks]
            for alert in entries["alert"]:
                self.book.note_alert(alert)
                self._remember(alert)
        except (ValueError, TypeError, KeyError) as error:
            raise BadConfig(
                f"state file {str(journal.path)!r} holds an entry that this program did not write "
                f"({type(error).__name__}); move the file away"
            ) from None
        observations, given = entries["observation"], sum(entries["given"])
        gone = set(dropped)
        observations = [(row, n < given) for n, row in enumerate(observations) if not _is_of(row, gone)]
        self.processor.add_observations([row for row, out in observations if out])
        self.processor.settle()
        for visit in self.processor.visits.values():
            visit.changed = False  # their scores are out
        for entry in entries["visit"]:
            self.processor.restore(visit_of(entry), entry.get("full"), entry.get("folded"), entry.get("level"))
        self.processor.add_observations([row for row, out in observations if not out])
        self.processor.settle()
        self.processor.remember_dropped(dropped)
        if observations:
            log.info("resumed %d open visits", len(self.processor.visits))
        self._unsent -= {alert for sent in entries["sent"] for alert in sent}
        again = [alert for alerts in self._alerts.values() for alert in alerts if alert["alert_id"] in self._unsent]
        self.sinks.send(again)
        self._give(self.processor.predict_due)
        self.book.forget(key for key in self._alerts if key not in self.processor.visits)

    def _remember(self, alert: dict[str, Any]) -> None:
        if self.journal is None:
            return
        self._alerts.setdefault(visit_of(alert), []).append(alert)
        self._unsent.add(alert["alert_id"])

    def accept(self, observations: Sequence[Mapping[str, Any]]) -> None:
        """Takes observations; when it returns they survive a kill (with a journal). Raises `OSError` where they cannot
        be kept; nothing of them is taken then."""
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
                if len(line) > LONGEST_LINE:
                    raise ValueError
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                unreadable += 1
        if unreadable:
            self.unreadable += unreadable
            log.warning("set aside: %d lines that are not JSON or longer than %d bytes", unreadable, LONGEST_LINE)
        self.accept(records)

    def score(self) -> None:
        """Scores what changed, writes results and alerts."""
        self._give(self.processor.predict_due)
        if time.monotonic() - self._looked > IDLE_EVERY:
            self._looked = time.monotonic()
            self._give(self.processor.close_idle)
            if self.journal is not None and self.journal.lines > COMPACT_LINES:
                try:
                    self._compact()
                except OSError as error:
                    self.not_kept += 1
                    log.error("error: the state file was not written anew, the old one goes on: %s", error)

    def _give(self, scores: Callable[[], list[dict[str, Any]]]) -> None:
        """Takes scores and gives them. An exception on the way leaves them due for the next process."""
        self._giving = True
        if results := scores():
            alerts = self.book.rises(results)
            self._keep("alert", alerts)  # before they are sent: a restart sends these, not others
            for result in results:
                shown = {name: value for name, value in result.items() if name != "previous_level"}
                self.results.write(json.dumps(shown) + "\n")
            self.results.flush()
            for alert in alerts:
                self._remember(alert)
            self.sinks.send(alerts)
            self.scored += len(results)
            self.alerted += len(alerts)
            visits = [self.processor.visits.get(visit_of(r)) for r in results if r["risk_level"] != r["previous_level"]]
            self._keep("visit", [visit_entry(visit) for visit in visits if visit is not None])
        if dropped := self.processor.newly_dropped():
            self.book.forget(dropped)
            self._keep("dropped", [[mark_of(key).hex() for key in dropped]])
        self._keep_sent()
        if results:
            self._keep("given", [None])
        self._giving = False

    def _keep_sent(self) -> None:
        sent = []
        while self.sinks.sent:
            sent.append(self.sinks.sent.popleft())
        if sent:
            self._unsent -= set(sent)
            self._keep("sent", [sent])

    def _keep(self, kind: str, entries: Sequence[Any]) -> None:
        """Notes what was decided. Where that fails patients' alerts still go out: a restart may give them again."""
        if self.journal is None:
            return
        try:
            self.journal.append(kind, entries)
            self._failing = False
        except OSError as error:
            self.not_kept += 1
            if not self._failing:
                log.error("error: %s; scores and alerts still go out, a restart may give them again", error)
            self._failing = True

    def _compact(self) -> None:
        for key in [key for key in self._alerts if key not in self.processor.visits]:
            self._alerts[key] = [alert for alert in self._alerts[key] if alert["alert_id"] in self._unsent]
            if not self._alerts[key]:
                del self._alerts[key]
        alerts = [alert for alerts in self._alerts.values() for alert in alerts]
        self.journal.compact(self.processor, alerts, self._unsent)

    def finish(self) -> None:
        """Scores what was accepted, waits for the alerts, saves the open visits and lets go of the state file."""
        try:
            if not self._giving:  # else something went wrong with them: they stay due
                self._give(self.processor.predict_due)
            self.sinks.close()
            self._keep_sent()
            if self.journal is not None and not self._giving:
                self._compact()
        finally:
            if self.journal is not None:
                self.journal.close()
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
        return bool(self.unreadable or self.processor.set_aside or self.sinks.failed or self.not_kept)


def _is_of(record: Any, gone: Container[bytes]) -> bool:
    """Is it an observation of one of these visits?"""
    try:
        return bool(gone) and mark_of((as_text(record["client"]), as_text(record["visit_id"]))) in gone
    except (KeyError, TypeError):
        return False


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
