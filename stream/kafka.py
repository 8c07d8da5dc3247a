"""Kafka: observations from one topic, results and alerts to two others, at least once, and no alert twice.

Observations must be keyed by client and visit, so that one consumer sees the whole of a visit. State survives by
replay: what is committed for a partition is the offset of the oldest observation of any open visit, and as the commit's
metadata the offset up to which results are out. A consumer that gets the partition reads from the first, is silent up
to the second, and goes on. A compacted changelog would write each visit's whole state at every score (some 7 kB for 200
observations) and need a second topic to be right together with the first; the replay needs nothing but the topic's own
retention, which must be longer than the longest stay with its idle time.

Alerts are appended to a topic of their own, from which a consumer that gets partitions learns what was alerted: an
alert that is in the topic is never given again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from command_line import log
from feature_pipeline import BadConfig, as_text
from stream.alerts import AlertBook
from stream.processor import StreamProcessor, Visit

BATCH = 5000  # messages at once
WAIT = 0.05  # seconds for the first of them
COMMIT_EVERY = 1.0
IDLE_EVERY = 60.0
PATIENCE = 30.0  # for answers of a broker


class Undelivered(OSError):
    """Results could not be brought to Kafka; nothing of them is committed, a restart gives them again."""


def consume(
    processor: StreamProcessor, book: AlertBook, arguments: argparse.Namespace, stopped: Callable[[], bool]
) -> bool:
    """Works until `stopped`; gives whether something was set aside. Raises `BadConfig`, `Undelivered`."""
    partition_feed = PartitionFeed(processor, book, arguments)
    try:
        while not stopped():
            partition_feed.step()
    finally:
        partition_feed.close()
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


class PartitionFeed:
    """One member of the consumer group, with the open visits of its partitions."""

    def __init__(self, processor: StreamProcessor, book: AlertBook, arguments: argparse.Namespace):
        self.processor, self.book, self.arguments = processor, book, arguments
        self.trouble: Counter[str] = Counter()
        self._settings = settings_of(arguments)
        self._settings["error_cb"] = self._report
        self._out_of_reach = False
        self._undelivered = 0
        self._done: dict[int, int] = {}  # partition -> offset up to which results are out
        self._replaying: dict[int, int] = {}  # partition -> offset at which its replay ends
        self._committed = self._looked = time.monotonic()
        self._moved = False
        group = {
            "group.id": arguments.group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
        }
        try:
            self._producer = Producer({"enable.idempotence": True, "linger.ms": 5, **self._settings})
            self._consumer = Consumer({"session.timeout.ms": 10_000, **self._settings, **group})
        except KafkaException as error:
            raise BadConfig(f"Kafka's settings are not usable: {error.args[0].str()}") from None
        self._consumer.subscribe(
            [arguments.topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
        )
        log.info("consuming %s in group %s", arguments.topic, arguments.group)

    def _report(self, error: KafkaError) -> None:
        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE):
            if not self._out_of_reach:  # librdkafka tries again by itself, and says so each time
                log.warning("Kafka cannot be reached; trying on")
            self._out_of_reach = True
        else:
            log.warning("Kafka: %s", error.str())

    # ----------------------------------------------------------------------------------------- one round

    def step(self) -> None:
        """Takes what has arrived, scores, gives results, commits."""
        messages = self._consumer.consume(BATCH, WAIT)
        self._take([m for m in messages if self._good(m)])
        self._give(self.processor.predict_due(lambda visit: visit.origin[0] not in self._replaying))
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
            ends = self._replaying.get(partition)
            (old if ends is not None and message.offset() < ends else new).append(message)
        self._add(old)
        for partition, ends in list(self._replaying.items()):
            position = self._consumer.position([TopicPartition(self.arguments.topic, partition)])[0].offset
            if position >= ends:
                # their scores are out: they only say from which level a rise counts
                self.processor.predict_due(lambda visit, p=partition: visit.origin[0] == p)
                del self._replaying[partition]
        self._add(new)
        for message in new:
            self._done[message.partition()] = message.offset() + 1
        self._moved |= bool(new)

    def _add(self, messages: Sequence[Message]) -> None:
        for message in messages:
            try:
                record = json.loads(message.value() or b"null")
                visit = self.processor.visits.get((as_text(record["client"]), as_text(record["visit_id"])))
            except (ValueError, RecursionError):
                self._trouble("not JSON")
                continue
            except (KeyError, TypeError):
                visit = None  # the reader says what is wrong with it
            if visit is not None and visit.origin[0] != message.partition():
                self._trouble("of a visit that comes in several partitions: key them by client and visit")
            self.processor.add_observation(record, origin=(message.partition(), message.offset()))
        self.processor.settle()

    def _trouble(self, what: str) -> None:
        self.trouble[what] += 1
        if self.trouble[what] in (1, 10, 100) or self.trouble[what] % 1000 == 0:
            log.warning("%d messages %s", self.trouble[what], what)

    def _give(self, results: Sequence[Mapping[str, Any]]) -> None:
        if not results:
            return
        for alert in self.book.rises(results):
            self._produce(self.arguments.alerts_topic, alert)
            log.warning("ALERT %s: risk rose to %s", alert["alert_id"], alert["risk_level"])
        for result in results:
            shown = {name: value for name, value in result.items() if name != "previous_level"}
            self._produce(self.arguments.out, shown)
        self._delivered()

    def _produce(self, topic: str, content: Mapping[str, Any]) -> None:
        key = json.dumps([as_text(content["client"]), as_text(content["visit_id"])])
        while True:
            try:
                self._producer.produce(topic, json.dumps(content), key, on_delivery=self._on_delivery)
                return
            except BufferError:
                self._producer.poll(0.1)

    def _on_delivery(self, error: KafkaError | None, _: Message) -> None:
        self._undelivered += error is not None

    def _delivered(self) -> None:
        """Waits until everything is out."""
        while self._producer.flush(PATIENCE):
            log.warning("Kafka does not take the results; trying on")
        if self._undelivered:
            raise Undelivered(f"{self._undelivered} results could not be brought to Kafka; start again to go on")

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
            for committed in consumer.committed(partitions, PATIENCE):
                place = next(p for p in partitions if p.partition == committed.partition)
                place.offset = committed.offset if committed.offset >= 0 else OFFSET_BEGINNING
                ends = int(committed.metadata or 0) if (committed.metadata or "0").isdigit() else 0
                if committed.offset >= 0:
                    self._done[committed.partition] = max(ends, committed.offset)
                if committed.offset >= 0 and ends > committed.offset:
                    self._replaying[committed.partition] = ends
            self._learn_alerts()
            log.info("partitions taken: %s", ", ".join(str(p.partition) for p in partitions))
        consumer.incremental_assign(partitions)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        leaving = [p.partition for p in partitions]
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

        self.processor.forget([key for key, visit in self.processor.visits.items() if theirs(visit)])
        for partition in partitions:
            self._done.pop(partition, None)
            self._replaying.pop(partition, None)
        if partitions:
            log.info("partitions given up: %s", ", ".join(map(str, partitions)))

    def _learn_alerts(self) -> None:
        """Reads the topic of the alerts up to its present end."""
        topic = self.arguments.alerts_topic
        reader = Consumer({**self._settings, "group.id": f"{self.arguments.group}-alerts", "enable.auto.commit": False})
        try:
            ends = {}
            for partition in reader.list_topics(topic, timeout=PATIENCE).topics[topic].partitions:
                low, high = reader.get_watermark_offsets(TopicPartition(topic, partition), PATIENCE)
                if high > low:
                    ends[partition] = high
            reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in ends])
            while ends:
                for message in reader.consume(BATCH, WAIT):
                    if message.error() is None:
                        self.book.note_alert(json.loads(message.value()))
                for place in reader.position([TopicPartition(topic, partition) for partition in ends]):
                    if place.offset >= ends[place.partition]:
                        del ends[place.partition]
        finally:
            reader.close()

    def close(self) -> None:
        """Gives what is due, commits, leaves the group: the others take over at once."""
        self._give(self.processor.predict_due(lambda visit: visit.origin[0] not in self._replaying))
        self._commit(list(self._done))
        self._consumer.close()
        self._producer.flush(PATIENCE)
        log.info("%d visits were open; %d observations set aside", len(self.processor.visits), self.set_aside)

    @property
    def set_aside(self) -> int:
        return sum(self.processor.set_aside.values()) + sum(self.trouble.values())
