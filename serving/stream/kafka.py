"""Kafka: observations from one topic, results and alerts to two others, at least once, and no alert twice.

Observations must be keyed by client and visit, so that one consumer sees the whole of a visit. State survives by
replay. For a partition, the committed offset is that of the oldest observation of any open visit; the metadata of the
commit hold the offset up to which results were written. A consumer that gets the partition reads from the first offset,
writes nothing up to the second, and continues. A compacted changelog would write each visit's whole state at every
score (some 7 kB for 200 observations), and need a second topic that agrees with the first. The replay needs only the
topic's own retention, which must be longer than the longest stay with its idle time.

With --state a file keeps the open visits, together with the offset up to which each partition was read: a restart reads
only what came after. So does a consumer that loses a partition and gets it back within `LET_GO` seconds. Another one
that gets it reads it as above. A state older than the committed offset is not used.

Alerts are appended to a topic of their own, from which a consumer that gets partitions learns what was alerted: an
alert that is in the topic is never sent again. From another one it learns which visits were dropped: their later
observations are set aside, since a score of a part would be a wrong number.

Where the topic has lost observations of open visits (a retention shorter than the stay, a log that was truncated or
restored, a compacted topic), nobody knows which visits these were. So every visit that begins in the next `idle_hours`
(by then the lost ones would have been dropped) is UNKNOWN, ``incomplete``, and dropped. Until when this lasts is
written to the topic of dropped visits, since not every broker keeps the metadata of commits.

Offsets that are missing in the middle of a log are a loss where Kafka deletes single messages (a topic with
``cleanup.policy=compact``), and else the marks of transactions or messages of a transaction that was aborted. Where the
broker does not tell its policy they count as a loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from common.command_line import log
from feature_pipeline import INCOMPLETE, BadConfig
from serving.evidence import unused_text
from serving.stream.alerts import AlertBook, AlertSinks, visit_of
from serving.stream.journal import Damaged, Journal
from serving.stream.kafka_client import (
    BATCH,
    STOP_PATIENCE,
    WAIT,
    Outbox,
    Questions,
    Unanswered,
    library_log,
    settings_of,
)
from serving.stream.processor import StreamProcessor
from serving.stream.visits import mark_of

COMMIT_EVERY = 1.0
IDLE_EVERY = 60.0
NOT_WHOLE = {"sepsis_probability": None, "risk_level": "UNKNOWN", "reason": INCOMPLETE, "missing": []}
NOT_WHOLE |= {"num_observations": 0, "unused_codes": {}, "timestamp": None, "as_of": None, "hours_since_newest": None}
LET_GO = 600.0  # seconds until the visits of a partition that is with another consumer are let go


def consume(
    processor: StreamProcessor,
    book: AlertBook,
    sinks: AlertSinks,
    arguments: argparse.Namespace,
    stopped: Callable[[], bool],
) -> bool:
    """Works until `stopped`; gives whether something was set aside. Raises `BadConfig`, `Undelivered`, `Unanswered`:
    whatever the exception, what is not out is not committed."""
    partition_feed = PartitionFeed(processor, book, sinks, arguments, stopped)
    try:
        while not stopped():
            partition_feed.step()
        partition_feed.close()
    except BaseException as error:
        partition_feed.abandon()
        if isinstance(error, KafkaException):
            raise Unanswered(f"Kafka: {error.args[0].str()}; start again to go on") from error
        raise
    return bool(processor.set_aside or partition_feed.trouble)


class PartitionFeed:
    """One member of the consumer group, with the open visits of its partitions."""

    def __init__(
        self,
        processor: StreamProcessor,
        book: AlertBook,
        sinks: AlertSinks,
        arguments: argparse.Namespace,
        stopped: Callable[[], bool],
    ):
        self.processor, self.book, self.sinks, self.arguments = processor, book, sinks, arguments
        self._stopped = stopped
        self.trouble: Counter[str] = Counter()
        self._settings = settings_of(arguments)
        self._settings["error_cb"] = self._report
        self._out_of_reach = False
        self._abandoned = False
        self._taken: dict[int, int] = {}  # partition -> offset up to which observations were taken
        self._done: dict[int, int] = {}  # partition -> offset up to which results are out
        self._replaying: dict[int, int] = {}  # partition -> offset at which its replay ends
        self._next: dict[int, int] = {}  # partition -> offset of the next message
        self._policy: str | None = None  # of the topic, since it was asked last
        self._lossy: dict[int, float] = {}  # partition -> visits that begin before may lack observations, since 1970
        # partition -> of the state of its visits the offset and `_lossy`, when to let them go
        self._put_by: dict[int, tuple[int, float, float]] = {}
        self._journal: Journal | None = None
        self._kept_meaning: str | None = None  # of the state that an earlier process kept
        self._meaning = ""  # of ours, once the cluster is known
        self._saving = True
        self._committed = self._looked = time.monotonic()
        self._moved = False
        group = {
            "group.id": arguments.group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
        }
        try:
            self._outbox = Outbox(self._settings, stopped)
            self._questions = Questions(self._settings, arguments.group, stopped)
            self._consumer = Consumer({"session.timeout.ms": 10_000, **self._settings, **group}, logger=library_log)
        except KafkaException as error:
            raise BadConfig(f"Kafka's settings are not usable: {error.args[0].str()}") from None
        if arguments.state:
            self._resume(Journal(arguments.state, arguments.durable))
        self._consumer.subscribe(
            [arguments.topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
        )
        log.info("consuming %s in group %s", arguments.topic, arguments.group)

    def _report(self, error: KafkaError) -> None:
        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE):
            if not self._out_of_reach:  # librdkafka tries again by itself, and says so each time
                log.warning("Kafka cannot be reached; trying again")
            self._out_of_reach = True
        else:
            library_log.warning("%s [%s] %s", error.name(), "Kafka", error.str())

    # -------------------------------------------------------------------------------------------- state

    def _resume(self, journal: Journal) -> None:
        """Puts the visits by that an earlier process kept, until their partitions are assigned."""
        try:
            kept = journal.load()
        except Damaged:
            journal.close()
            log.error(
                "error: the state file %s is damaged and not used: open visits are read from the topic again; move it "
                "away",
                journal.path.name,
            )
            return
        if (kept.visits or kept.raw) and not kept.positions:
            journal.close()
            raise BadConfig(f"state file {str(journal.path)!r} is not of --kafka; give --state another name")
        self._journal, self._kept_meaning = journal, kept.meaning
        self.processor.journaled = True
        self.processor.adopt(kept.visits, kept.codes)
        for partition, (offset, lossy) in kept.positions.items():
            self._put_away(partition, offset, lossy)

    def _put_away(self, partition: int, offset: int, lossy: float) -> None:
        self.processor.put_away(partition, lambda visit: visit.origin[0] == partition)
        self._put_by[partition] = offset, lossy, time.monotonic() + LET_GO

    def _let_go(self, partition: int) -> None:
        self._put_by.pop(partition, None)
        self.processor.let_go(partition)

    def _check_meaning(self, consumer: Consumer) -> None:
        """Lets go of a state that was read from another topic or by other meanings of codes."""
        if self._journal is None or self._meaning:
            return
        codes = self.processor.pipeline.reproducer.codes.meaning_sha256
        self._meaning = f"{codes} {self._questions.cluster(consumer)} {self.arguments.topic}"
        if self._put_by and self._kept_meaning != self._meaning:
            log.warning("the state file is of another topic, or of a model that gives codes other meanings: not used")
            for partition in list(self._put_by):
                self._let_go(partition)

    def _save(self) -> None:
        """Keeps the open visits and the offsets up to which they are known, in one transaction."""
        if self._journal is None or not self._meaning or self._replaying:
            return
        processor = self.processor
        positions = {partition: (offset, lossy) for partition, (offset, lossy, _) in self._put_by.items()}
        positions |= {partition: (offset, self._lossy.get(partition, 0.0)) for partition, offset in self._next.items()}
        changed = list(processor.changed.values())
        try:
            self._journal.settle(changed, processor.closed, [], processor.codes, set(), {}, self._meaning, positions)
            processor.changed, processor.closed, self._saving = {}, [], True
        except OSError as error:
            if self._saving:
                log.error("error: %s; a restart reads more from the topic", error)
            self._saving = False

    # ----------------------------------------------------------------------------------------- one round

    def step(self) -> None:
        """Takes what has arrived, scores, gives results, commits."""
        messages = self._consumer.consume(BATCH, WAIT)
        self._take([m for m in messages if self._good(m)])
        self._give(self.processor.predict_due(lambda visit: visit.origin[0] not in self._replaying))
        self._moved |= bool(self._taken)
        self._done |= self._taken  # not before their results are out
        self._taken = {}
        now = time.monotonic()
        if now - self._looked > IDLE_EVERY:
            self._looked, self._moved = now, True
            self._give(self.processor.close_idle())
            for partition in [p for p, (_, _, when) in self._put_by.items() if when < now]:
                self._let_go(partition)
        if self._moved and now - self._committed > COMMIT_EVERY:
            self._commit(list(self._done))
            self._save()

    def _good(self, message: Message) -> bool:
        if message.error() is None:
            if self._out_of_reach:
                log.warning("Kafka is reached again")
            self._out_of_reach = False
            return True
        if message.error().code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            log.warning("the topic %s does not exist yet", self.arguments.topic)
        else:
            self._report(message.error())
        return False

    def _take(self, messages: Sequence[Message]) -> None:
        old, new = [], []
        self._policy = None  # may have been changed
        for message in messages:
            partition = message.partition()
            self._look_for_loss(message)
            ends = self._replaying.get(partition)
            (old if ends is not None and message.offset() < ends else new).append(message)
        self._add(old, known=True)
        for partition, ends in list(self._replaying.items()):
            position = self._consumer.position([TopicPartition(self.arguments.topic, partition)])[0].offset
            if position >= ends:
                # their scores are out: they only say from which level a rise counts
                self.processor.relearn(lambda visit, p=partition: visit.origin[0] == p)
                del self._replaying[partition]
        self._add(new)
        for message in new:
            self._taken[message.partition()] = message.offset() + 1

    def _add(self, messages: Sequence[Message], known: bool = False) -> None:
        """Gives messages to the processor; `known` ones were all looked at before."""
        for message in messages:
            try:
                record = json.loads(message.value() or b"null")
                key = visit_of(record)
                if known and self.processor.was_dropped(key):
                    continue
                visit = self.processor.visits.get(key)
                if visit is None and self._lossy.get(message.partition(), 0.0) > self._arrived(message):
                    self._give_up([(record["client"], record["visit_id"])])
            except (ValueError, RecursionError):
                self._trouble("not JSON")
                continue
            except (KeyError, TypeError):
                visit = None  # the reader says what is wrong with it
            if visit is not None and visit.origin[0] != message.partition():
                self._trouble("of a visit that comes in several partitions: key them by client and visit")
            self.processor.add_observation(record, origin=(message.partition(), message.offset()))
        self.processor.settle()

    def _look_for_loss(self, message: Message) -> None:
        """Says where messages are missing that were there, and gives up the visits that were open then."""
        partition, offset = message.partition(), message.offset()
        expected, self._next[partition] = self._next.get(partition, offset), offset + 1
        if offset == expected:
            return
        if offset > expected:
            low, _ = self._questions.bounds(self._consumer, self.arguments.topic, partition)
            if low <= expected and not self._may_be_compacted():
                return
        self._note_loss(partition, f"goes on at {offset} where {expected} was due", self._arrived(message))
        theirs = [visit for visit in self.processor.visits.values() if visit.origin[0] == partition]
        self._give_up([(visit.client, visit.visit_id) for visit in theirs])

    def _may_be_compacted(self) -> bool:
        """Does Kafka delete single messages of the topic, or not tell?"""
        self._policy = self._policy or self._questions.cleanup_policy(self.arguments.topic) or "unknown"
        return self._policy == "unknown" or "compact" in self._policy

    def _arrived(self, message: Message) -> float:
        """When a message came to the topic, in seconds since 1970."""
        kind, milliseconds = message.timestamp()
        now = self.processor.time.now()
        return now if kind == TIMESTAMP_NOT_AVAILABLE else min(milliseconds / 1000, now)

    def _tell_policy(self) -> None:
        topic = self.arguments.topic
        if self._may_be_compacted() and self._policy == "unknown":
            log.warning(
                "Kafka does not tell how it cleans up the topic %s (allow DescribeConfigs): missing offsets, such as "
                "those of transactions, count as lost observations",
                topic,
            )
        elif self._may_be_compacted():
            log.error(
                "error: the topic %s has cleanup.policy=%s, by which Kafka deletes observations of open visits; visits "
                "that it deleted some of are UNKNOWN: set cleanup.policy=delete",
                topic,
                self._policy,
            )

    def _note_loss(self, partition: int, what: str, when: float) -> None:
        log.error(
            "error: partition %d of %s %s: it has lost observations (its retention is shorter than the stays, or its "
            "log was truncated, restored or compacted); visits that begin in the next %g hours are UNKNOWN",
            partition,
            self.arguments.topic,
            what,
            self.processor.idle_hours,
        )
        until = when + self.processor.idle_hours * 3600
        self._lossy[partition] = max(until, self._lossy.get(partition, 0.0))
        loss = {"partition": partition, "incomplete_until": self._lossy[partition]}
        self._outbox.send(self.arguments.dropped_topic, loss, json.dumps(partition))
        self._replaying.pop(partition, None)

    def _give_up(self, visits: Sequence[tuple[Any, Any]]) -> None:
        """Says of visits that may lack observations that their risk is unknown, and drops them."""
        version = self.processor.pipeline.model_version
        for client, visit_id in visits:
            about = {"visit_id": visit_id, "client": client}
            key = visit_of(about)
            if self.processor.was_dropped(key):
                continue
            self.processor.forget([key])
            self.processor.remember_dropped([mark_of(key)])
            self._produce(self.arguments.dropped_topic, {"client": client, "visit_id": visit_id})
            self._produce(self.arguments.out, {**about, **NOT_WHOLE, "model_version": version})
            self.book.forget([key])

    def _trouble(self, what: str) -> None:
        self.trouble[what] += 1
        if self.trouble[what] in (1, 10, 100) or self.trouble[what] % 1000 == 0:
            log.warning("%d messages %s", self.trouble[what], what)

    def _give(self, results: Sequence[Mapping[str, Any]]) -> None:
        dropped = self.processor.newly_dropped()
        alerts = self.book.rises(results)
        self.sinks.send(alerts)
        self.sinks.sent.clear()
        for alert in alerts:
            self._produce(self.arguments.alerts_topic, alert)
        for result in results:
            shown = {name: value for name, value in result.items() if name != "previous_level"}
            self._produce(self.arguments.out, shown)
        for client, visit_id in dropped:
            self._produce(self.arguments.dropped_topic, {"client": client, "visit_id": visit_id})
        self.book.forget(dropped)
        self._outbox.deliver()

    def _produce(self, topic: str, content: Mapping[str, Any]) -> None:
        self._outbox.send(topic, content, json.dumps(visit_of(content)))

    # -------------------------------------------------------------------------------- offsets, partitions

    def _commit(self, partitions: Sequence[int]) -> None:
        oldest: dict[int, int] = {}
        for visit in self.processor.visits.values():
            partition, offset = visit.origin
            oldest[partition] = min(offset, oldest.get(partition, offset))
        offsets = [
            TopicPartition(self.arguments.topic, p, min(oldest.get(p, done), done), str(done))
            for p, done in self._done.items()
            if p in partitions and p not in self._replaying
        ]
        self._committed, self._moved = time.monotonic(), False
        if not offsets:
            return
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:  # another member may have it by now; it gives the same results again
            log.warning("offsets not committed: %s", error.args[0].str())

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if partitions:
            topic = self.arguments.topic
            self._tell_policy()
            self._learn(self.arguments.alerts_topic, self.book.note_alert)
            self._learn(self.arguments.dropped_topic, self._note_dropped)
            self._check_meaning(consumer)
            for committed in self._questions.committed(consumer, partitions):
                partition, start = committed.partition, max(committed.offset, 0)
                done = int(committed.metadata) if (committed.metadata or "").isdigit() else start
                known, lossy, _ = self._put_by.get(partition, (-1, 0.0, 0.0))
                if known > start and lossy == self._lossy.get(partition, 0.0):  # no loss was noted since
                    start, done = known, max(done, known)
                    n_visits = len(self.processor.put_by[partition])
                    log.info("partition %d: %d open visits are known up to offset %d", partition, n_visits, known)
                else:
                    self._let_go(partition)
                if committed.offset >= 0 or start:
                    low, high = self._questions.bounds(consumer, topic, partition)
                    if low > start or (high < done and not self._questions.reaches(topic, partition, done)):
                        what = f"holds {low} to {high} where {start} to {done} was read"
                        self._note_loss(partition, what, self.processor.time.now())
                        self._let_go(partition)
                        start = done = min(max(done, low), max(low, high))
                        self._moved = True
                    elif done > start:
                        self._replaying[partition] = done
                    self._done[partition] = done
                self._next[partition] = start
                self._put_by.pop(partition, None)
                self.processor.take_back(partition)
                place = next(p for p in partitions if p.partition == partition)
                place.offset = start or OFFSET_BEGINNING
            log.info("partitions taken: %s", ", ".join(str(p.partition) for p in partitions))
        consumer.incremental_assign(partitions)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        leaving = [p.partition for p in partitions]
        if self._abandoned:
            consumer.incremental_unassign(partitions)
            return
        self._give(self.processor.predict_due(lambda visit: visit.origin[0] not in self._replaying))
        self._commit(leaving)
        self._save()
        self._leave(leaving)
        consumer.incremental_unassign(partitions)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._leave([p.partition for p in partitions])
        consumer.incremental_unassign(partitions)

    def _leave(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._put_away(partition, self._next.get(partition, 0), self._lossy.get(partition, 0.0))
            # whoever gets the partition learns its alerts from the topic
            self.book.forget(list(self.processor.put_by[partition]))
            if partition in self._replaying:
                self._let_go(partition)  # the levels of its visits are not known yet
            self._done.pop(partition, None)
            for by_partition in (self._replaying, self._next):
                by_partition.pop(partition, None)
        if partitions:
            log.info("partitions given up: %s", ", ".join(map(str, partitions)))

    def _note_dropped(self, record: Mapping[str, Any]) -> None:
        if "incomplete_until" in record:
            partition, until = int(record["partition"]), float(record["incomplete_until"])
            self._lossy[partition] = max(until, self._lossy.get(partition, 0.0))
            return
        self.processor.remember_dropped([mark_of(visit_of(record))])

    def _learn(self, topic: str, note: Callable[[Any], None]) -> None:
        self._questions.read_whole(topic, note, lambda: self._trouble(f"of {topic} are not of this program"))

    def close(self) -> None:
        """Gives what is due, commits, leaves the group: the others take over at once."""
        self._give(self.processor.predict_due(lambda visit: visit.origin[0] not in self._replaying))
        self._commit(list(self._done))
        self._save()
        n_open = len(self.processor.visits)
        self._consumer.close()
        self._outbox.flush(STOP_PATIENCE)
        if self._journal is not None:
            self._journal.close()
        unused = self.processor.unused_codes
        log.info("%d visits were open; %d observations set aside", n_open, self.set_aside)
        if unused:
            log.info("%s", unused_text(unused))

    def abandon(self) -> None:
        """Leaves the group and commits nothing: whoever takes the partitions gives what is not out."""
        self._abandoned = True
        self._outbox.purge()
        with contextlib.suppress(RuntimeError, KafkaException):  # closed already, or not in a state to be
            self._consumer.close()
        if self._journal is not None:
            self._journal.close()

    @property
    def set_aside(self) -> int:
        return sum(self.processor.set_aside.values()) + sum(self.trouble.values())
