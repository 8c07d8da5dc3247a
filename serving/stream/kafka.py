"""Kafka: observations from one topic, results and alerts to two others, at least once, and no alert twice.

Observations must be keyed by client and visit, so that one consumer sees the whole of a visit. State survives by
replay. For a partition, the committed offset is that of the oldest observation of any open visit; the metadata of the
commit hold the offset up to which results were written. A consumer that gets the partition reads from the first offset,
writes nothing up to the second, and continues. A compacted changelog would write each visit's whole state at every
score (some 7 kB for 200 observations), and need a second topic that agrees with the first. The replay needs only the
topic's own retention, which must be longer than the longest stay with its idle time.

Alerts are appended to a topic of their own, from which a consumer that gets partitions learns what was alerted: an
alert that is in the topic is never sent again. From another one it learns which visits were dropped: their later
observations are set aside, since a score of a part would be a wrong number.

Where the topic has lost observations of open visits (a retention shorter than the stay, a log that was truncated or
restored), nobody knows which visits these were. So every visit first seen in the next `idle_hours` (by then the lost
ones would have been dropped) is UNKNOWN, ``incomplete``, and dropped. The metadata of the commit hold until when.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from common.command_line import log
from feature_pipeline import BadConfig
from serving.evidence import unused_text
from serving.stream.alerts import AlertBook, AlertSinks, visit_of
from serving.stream.processor import StreamProcessor
from serving.stream.visits import Visit, mark_of

BATCH = 5000  # messages at once
WAIT = 0.05  # seconds for the first of them
COMMIT_EVERY = 1.0
IDLE_EVERY = 60.0
PATIENCE = 30.0  # for answers of a broker
STOP_PATIENCE = 10.0  # once it was told to stop
LIBRARY_LOG_EVERY = 60.0  # seconds between lines of a kind
Answer = TypeVar("Answer")


class Undelivered(OSError):
    """Results could not be brought to Kafka; nothing of them is committed, a restart gives them again."""


class Unanswered(OSError):
    """A broker does not tell what must be known before a partition is read."""


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


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """librdkafka's settings for this broker and the file of --kafka-config."""
    settings: dict[str, Any] = {"bootstrap.servers": arguments.kafka}
    if arguments.kafka_config:
        try:
            settings |= json.loads(Path(arguments.kafka_config).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise BadConfig(f"--kafka-config cannot be read as a JSON object: {error}") from None
    return settings


class Sparing(logging.Filter):
    """Lets one line of each kind through a minute: librdkafka says at every attempt that a broker is away."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = str(record.args[0]) if record.args else record.getMessage()
        if record.created - self._last.get(kind, -LIBRARY_LOG_EVERY) < LIBRARY_LOG_EVERY:
            return False
        self._last[kind] = record.created
        return True


library_log = log.getChild("kafka")  # takes facility, client, text
library_log.addFilter(Sparing())


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
        self._undelivered: list[str] = []  # why
        self._abandoned = False
        self._taken: dict[int, int] = {}  # partition -> offset up to which observations were taken
        self._done: dict[int, int] = {}  # partition -> offset up to which results are out
        self._replaying: dict[int, int] = {}  # partition -> offset at which its replay ends
        self._next: dict[int, int] = {}  # partition -> offset of the next message
        self._lossy: dict[int, float] = {}  # partition -> until when its visits may lack observations, since 1970
        self._committed = self._looked = time.monotonic()
        self._moved = False
        self._ended: float | None = None  # when it was first seen that the work should stop
        group = {
            "group.id": arguments.group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
        }
        try:
            self._producer = Producer(
                {"enable.idempotence": True, "linger.ms": 5, **self._settings}, logger=library_log
            )
            self._consumer = Consumer({"session.timeout.ms": 10_000, **self._settings, **group}, logger=library_log)
        except KafkaException as error:
            raise BadConfig(f"Kafka's settings are not usable: {error.args[0].str()}") from None
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
        if self._moved and now - self._committed > COMMIT_EVERY:
            self._commit(list(self._done))

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
        for message in messages:
            partition = message.partition()
            self._look_for_loss(partition, message.offset())
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
                if visit is None and self._lossy.get(message.partition(), 0.0) > self.processor.time.now():
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

    def _look_for_loss(self, partition: int, offset: int) -> None:
        """Says where messages are missing that were there, and gives up the visits that were open then."""
        expected, self._next[partition] = self._next.get(partition, offset), offset + 1
        if offset == expected:
            return
        place = TopicPartition(self.arguments.topic, partition)
        if offset > expected:  # markers of transactions take places too
            low, _ = self._asked(lambda: self._consumer.get_watermark_offsets(place, STOP_PATIENCE))
            if low <= expected:
                return
        self._note_loss(partition, f"goes on at {offset} where {expected} was due")
        theirs = [visit for visit in self.processor.visits.values() if visit.origin[0] == partition]
        self._give_up([(visit.client, visit.visit_id) for visit in theirs])

    def _note_loss(self, partition: int, what: str) -> None:
        log.error(
            "error: partition %d of %s %s: it has lost observations (its retention is shorter than the stays, or its "
            "log was truncated or restored); visits that begin in the next %g hours are UNKNOWN",
            partition,
            self.arguments.topic,
            what,
            self.processor.idle_hours,
        )
        self._lossy[partition] = self.processor.time.now() + self.processor.idle_hours * 3600
        self._replaying.pop(partition, None)

    def _give_up(self, visits: Sequence[tuple[Any, Any]]) -> None:
        """Says of visits that may lack observations that their risk is unknown, and drops them."""
        for client, visit_id in visits:
            about = {"visit_id": visit_id, "client": client}
            key = visit_of(about)
            if self.processor.was_dropped(key):
                continue
            self.processor.forget([key])
            self.processor.remember_dropped([mark_of(key)])
            self._produce(self.arguments.dropped_topic, {"client": client, "visit_id": visit_id})
            unknown = {"sepsis_probability": None, "risk_level": "UNKNOWN", "reason": "incomplete", "missing": []}
            nothing = {"num_observations": 0, "unused_codes": {}, "timestamp": None, "as_of": None}
            nothing |= {"hours_since_newest": None, "model_version": self.processor.pipeline.model_version}
            self._produce(self.arguments.out, {**about, **unknown, **nothing})
            self.book.forget([key])

    def _trouble(self, what: str) -> None:
        self.trouble[what] += 1
        if self.trouble[what] in (1, 10, 100) or self.trouble[what] % 1000 == 0:
            log.warning("%d messages %s", self.trouble[what], what)

    def _give(self, results: Sequence[Mapping[str, Any]]) -> None:
        dropped = self.processor.newly_dropped()
        if not results and not dropped:
            return
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
        self._delivered()

    def _produce(self, topic: str, content: Mapping[str, Any]) -> None:
        key = json.dumps(visit_of(content))
        while True:
            try:
                self._producer.produce(topic, json.dumps(content), key, on_delivery=self._on_delivery)
                return
            except BufferError:
                self._producer.poll(0.1)
                self._look_whether_out_of_time()
            except KafkaException as error:  # it knows at once that it cannot be
                raise self._undeliverable(error.args[0].str()) from None

    def _on_delivery(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._undelivered.append(error.str())

    def _delivered(self) -> None:
        """Waits until everything is out."""
        told = time.monotonic()
        while self._producer.flush(1.0):
            if time.monotonic() - told > PATIENCE:
                told = time.monotonic()
                log.warning("Kafka does not accept the results; trying again")
            self._look_whether_out_of_time()
        self._ended = None
        if self._undelivered:
            raise self._undeliverable(self._undelivered[0])

    def _undeliverable(self, why: str) -> Undelivered:
        return Undelivered(
            f"{len(self._undelivered) or 'some'} results could not be brought to Kafka ({why}); "
            "nothing of them is committed: start again to go on"
        )

    def _look_whether_out_of_time(self) -> None:
        if not self._stopped():
            return
        self._ended = self._ended or time.monotonic()
        if time.monotonic() - self._ended > STOP_PATIENCE:
            raise Undelivered(
                "Kafka does not take the last results; nothing of them is committed: start again to go on"
            )

    # -------------------------------------------------------------------------------- offsets, partitions

    def _commit(self, partitions: Sequence[int]) -> None:
        oldest: dict[int, int] = {}
        for visit in self.processor.visits.values():
            partition, offset = visit.origin
            oldest[partition] = min(offset, oldest.get(partition, offset))
        offsets = [
            TopicPartition(
                self.arguments.topic, p, min(oldest.get(p, done), done), f"{done} {self._lossy.get(p, 0):.0f}"
            )
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
            for committed in self._asked(lambda: _sound(consumer.committed(partitions, STOP_PATIENCE))):
                place = next(p for p in partitions if p.partition == committed.partition)
                place.offset = committed.offset if committed.offset >= 0 else OFFSET_BEGINNING
                told = [int(word) for word in (committed.metadata or "").split() if word.isdigit()]
                ends = told[0] if told else 0
                self._lossy[committed.partition] = told[1] if len(told) > 1 else 0.0
                if committed.offset >= 0:
                    self._done[committed.partition] = max(ends, committed.offset)
                    low, high = self._asked(lambda p=place: consumer.get_watermark_offsets(p, STOP_PATIENCE))
                    if low > committed.offset or high < self._done[committed.partition]:
                        needed = f"{committed.offset} to {self._done[committed.partition]}"
                        self._note_loss(committed.partition, f"holds {low} to {high} where {needed} was read")
                        place.offset = min(max(ends, committed.offset, low), high)
                        self._done[committed.partition] = place.offset
                        self._moved = True
                    elif ends > committed.offset:
                        self._replaying[committed.partition] = ends
                if place.offset >= 0:
                    self._next[committed.partition] = place.offset
            self._learn(self.arguments.alerts_topic, self.book.note_alert)
            self._learn(self.arguments.dropped_topic, self._note_dropped)
            log.info("partitions taken: %s", ", ".join(str(p.partition) for p in partitions))
        consumer.incremental_assign(partitions)

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        """What a broker answers, asked for a while."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return ask()
            except KafkaException as error:
                if self._stopped() or time.monotonic() > end:
                    raise Unanswered(
                        f"Kafka does not tell where to go on ({error.args[0].str()}); start again to go on"
                    ) from None
                time.sleep(0.5)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        leaving = [p.partition for p in partitions]
        if self._abandoned:
            consumer.incremental_unassign(partitions)
            return
        self._give(self.processor.predict_due(lambda visit: visit.origin[0] not in self._replaying))
        self._commit(leaving)
        self._leave(leaving)
        consumer.incremental_unassign(partitions)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._leave([p.partition for p in partitions])
        consumer.incremental_unassign(partitions)

    def _leave(self, partitions: Sequence[int]) -> None:
        gone = set(partitions)

        def theirs(visit: Visit) -> bool:
            return visit.origin[0] in gone

        leaving = [key for key, visit in self.processor.visits.items() if theirs(visit)]
        self.processor.forget(leaving)
        self.book.forget(leaving)  # whoever gets the partitions learns their alerts from the topic
        for partition in partitions:
            self._done.pop(partition, None)
            for by_partition in (self._replaying, self._next, self._lossy):
                by_partition.pop(partition, None)
        if partitions:
            log.info("partitions given up: %s", ", ".join(map(str, partitions)))

    def _note_dropped(self, record: Mapping[str, Any]) -> None:
        self.processor.remember_dropped([mark_of(visit_of(record))])

    def _learn(self, topic: str, note: Callable[[Any], None]) -> None:
        """Reads a topic of this program's own up to its present end."""
        reader = Consumer(
            {**self._settings, "group.id": f"{self.arguments.group}-reader", "enable.auto.commit": False},
            logger=library_log,
        )
        try:
            ends = self._asked(lambda: _ends(reader, topic))
            reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in ends])
            last = time.monotonic()
            while ends:
                messages = [message for message in reader.consume(BATCH, WAIT) if message.error() is None]
                for message in messages:
                    if message.value() is None:
                        continue  # deleted
                    try:
                        note(json.loads(message.value()))
                    except (ValueError, TypeError, KeyError, RecursionError):
                        self._trouble(f"of {topic} are not of this program")
                for place in reader.position([TopicPartition(topic, partition) for partition in ends]):
                    if place.offset >= ends[place.partition]:
                        del ends[place.partition]
                if messages:
                    last = time.monotonic()
                elif self._stopped() or time.monotonic() - last > PATIENCE:
                    raise Unanswered(f"the topic {topic} cannot be read to its end; start again to go on")
        finally:
            reader.close()

    def close(self) -> None:
        """Gives what is due, commits, leaves the group: the others take over at once."""
        self._give(self.processor.predict_due(lambda visit: visit.origin[0] not in self._replaying))
        self._commit(list(self._done))
        n_open = len(self.processor.visits)
        self._consumer.close()
        self._producer.flush(STOP_PATIENCE)
        unused = self.processor.unused_codes
        log.info("%d visits were open; %d observations set aside", n_open, self.set_aside)
        if unused:
            log.info("%s", unused_text(unused))

    def abandon(self) -> None:
        """Leaves the group and commits nothing: whoever takes the partitions gives what is not out."""
        self._abandoned = True
        self._producer.purge()
        with contextlib.suppress(RuntimeError, KafkaException):  # closed already, or not in a state to be
            self._consumer.close()

    @property
    def set_aside(self) -> int:
        return sum(self.processor.set_aside.values()) + sum(self.trouble.values())


def _sound(places: list[TopicPartition]) -> list[TopicPartition]:
    """The places, where no partition of them has an error."""
    for place in places:
        if place.error is not None:
            raise KafkaException(place.error)
    return places


def _ends(reader: Consumer, topic: str) -> dict[int, int]:
    """The end of each partition of a topic that is not empty."""
    ends = {}
    for partition in reader.list_topics(topic, timeout=STOP_PATIENCE).topics[topic].partitions:
        low, high = reader.get_watermark_offsets(TopicPartition(topic, partition), STOP_PATIENCE)
        if high > low:
            ends[partition] = high
    return ends
