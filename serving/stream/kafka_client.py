"""What the stream asks of Kafka beside messages: settings, places, whole topics, the delivery of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource

from common.command_line import log
from feature_pipeline import BadConfig

BATCH = 5000  # messages at once
WAIT = 0.05  # seconds for the first of them
PATIENCE = 30.0  # for answers of a broker
STOP_PATIENCE = 10.0  # once it was told to stop
LIBRARY_LOG_EVERY = 60.0  # seconds between lines of a kind
Answer = TypeVar("Answer")


class Undelivered(OSError):
    """Results could not be brought to Kafka; nothing of them is committed, a restart gives them again."""


class Unanswered(OSError):
    """A broker does not tell what must be known before a partition is read."""


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


class Outbox:
    """Brings messages to Kafka. Raises `Undelivered` where it cannot."""

    def __init__(self, settings: Mapping[str, Any], stopped: Callable[[], bool]):
        self._producer = Producer({"enable.idempotence": True, "linger.ms": 5, **settings}, logger=library_log)
        self._stopped = stopped
        self._ended: float | None = None  # when it was first seen that the work should stop
        self._undelivered: list[str] = []  # why
        self.purge, self.flush = self._producer.purge, self._producer.flush

    def send(self, topic: str, content: Mapping[str, Any], key: str) -> None:
        """Hands a message over; it is out after `deliver`."""
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

    def deliver(self) -> None:
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


class Questions:
    """Asks brokers until they answer, for a while. Raises `Unanswered`."""

    def __init__(self, settings: Mapping[str, Any], group: str, stopped: Callable[[], bool]):
        self._settings, self._group, self._stopped = settings, group, stopped
        self._admin = AdminClient(dict(settings), logger=library_log)

    def ask(self, question: Callable[[], Answer]) -> Answer:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return question()
            except KafkaException as error:
                if self._stopped() or time.monotonic() > end:
                    raise Unanswered(
                        f"Kafka does not tell where to go on ({error.args[0].str()}); start again to go on"
                    ) from None
                time.sleep(0.5)

    def committed(self, consumer: Consumer, places: list[TopicPartition]) -> list[TopicPartition]:
        """The places with the offsets and metadata of the group's last commit."""

        def sound() -> list[TopicPartition]:
            found = consumer.committed(places, STOP_PATIENCE)
            for place in found:
                if place.error is not None:
                    raise KafkaException(place.error)
            return found

        return self.ask(sound)

    def bounds(self, consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
        """The first offset of a partition, and the one after its last."""
        return self.ask(lambda: consumer.get_watermark_offsets(TopicPartition(topic, partition), STOP_PATIENCE))

    def cluster(self, consumer: Consumer) -> str:
        """The name of the cluster."""
        return str(self.ask(lambda: consumer.list_topics(timeout=STOP_PATIENCE)).cluster_id)

    def cleanup_policy(self, topic: str) -> str | None:
        """``delete``, ``compact`` or both; None where the broker does not tell."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        try:
            known = self._admin.list_topics(topic, timeout=STOP_PATIENCE)
            if known.controller_id not in known.brokers:
                return None  # librdkafka would wait for it
            found = self._admin.describe_configs([resource], request_timeout=STOP_PATIENCE)[resource].result()
        except KafkaException:
            return None
        # some brokers name only what was set; `delete` is Kafka's default
        return str(found["cleanup.policy"].value) if "cleanup.policy" in found else "delete"

    def read_whole(self, topic: str, note: Callable[[Any], None], misfit: Callable[[], None]) -> None:
        """Gives the contents of a topic up to its present end to `note`; calls `misfit` for what is none."""
        with self._reader() as reader:
            partitions = self.ask(lambda: reader.list_topics(topic, timeout=STOP_PATIENCE)).topics[topic].partitions
            reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
            left, last = set(partitions), time.monotonic()
            while left:
                for message in reader.consume(BATCH, WAIT):
                    last = time.monotonic()
                    if message.error() is not None:
                        if message.error().code() == KafkaError._PARTITION_EOF:
                            left.discard(message.partition())
                    elif message.value() is not None:  # else it was deleted
                        try:
                            note(json.loads(message.value()))
                        except (ValueError, TypeError, KeyError, RecursionError):
                            misfit()
                if self._stopped() or time.monotonic() - last > PATIENCE:
                    raise Unanswered(f"the topic {topic} cannot be read to its end; start again to go on")

    def reaches(self, topic: str, partition: int, offset: int) -> bool:
        """Does the log go on to `offset` or beyond? The ends that brokers name may be too low: Tansu's are."""
        with self._reader() as reader:
            reader.assign([TopicPartition(topic, partition, offset)])
            end = time.monotonic() + STOP_PATIENCE
            while time.monotonic() < end:
                for message in reader.consume(1, WAIT):
                    if message.error() is None or message.error().code() == KafkaError._PARTITION_EOF:
                        return True
                    if message.error().code() == KafkaError._AUTO_OFFSET_RESET:
                        return False
        return False

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Consumer]:
        """A consumer of no group's partitions, which is told the ends of partitions, and when it is beyond one."""
        own = {"group.id": f"{self._group}-reader", "enable.auto.commit": False, "enable.partition.eof": True}
        reader = Consumer({**self._settings, **own, "auto.offset.reset": "error"}, logger=library_log)
        try:
            yield reader
        finally:
            reader.close()
