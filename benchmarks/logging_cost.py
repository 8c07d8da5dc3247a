"""What the prediction log costs the REST service: requests a second with it and without it, in turns.

Two servers of one gunicorn worker each serve the same model, one with the log (SQLite) and one without. Each round
loads one, then the other; the figure is the median of the rounds' ratios. It also times one `record` of one visit.

    python benchmarks/logging_cost.py --config models/best_model_config.json --model models/best_model.pkl
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.command_line import DONE, make_parser, number, run
from feature_pipeline import ProductionPipeline, resolve_snapshots
from monitoring.log import OFF, PredictionLog

BODY = json.dumps(json.loads((ROOT / "examples" / "new_patient_data.json").read_text())[:40]).encode()
PATIENCE = 60  # seconds until a server must be ready
HEADERS = {"Content-Type": "application/json"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(arguments: argparse.Namespace, folder: Path, monitor: str) -> Iterator[int]:
    """A gunicorn on loopback while the body runs; gives its port."""
    port = free_port()
    environment = {
        **os.environ,
        "SEPSIS_INSECURE": "1",  # on loopback
        "SEPSIS_CONFIG": str(Path(arguments.config).resolve()),
        "SEPSIS_MODEL": str(Path(arguments.model).resolve()),
        "SEPSIS_RATE_LIMIT": "100000000/minute",
        "SEPSIS_AUDIT_LOG": str(folder / "audit.jsonl"),
        "SEPSIS_MONITOR_URL": monitor,
    }
    command = [sys.executable, "-m", "gunicorn", "-w", "1", "-b", f"127.0.0.1:{port}", "--max-requests", "0"]
    process = subprocess.Popen([*command, "api_server:app"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                connection.request("GET", "/ready")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            if time.monotonic() > end or process.poll() is not None:
                raise OSError("the server does not start; try api_server.py by hand")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE)


def requests_a_second(port: int, seconds: float, threads: int = 2) -> float:
    """Of clients that keep their connections and ask without pause. Raises `OSError` on any answer but 200."""

    def ask(end: float) -> int:
        connection, n = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE), 0
        while time.perf_counter() < end:
            connection.request("POST", "/predict?as_of=last", BODY, HEADERS)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise OSError(f"the server answers {answer.status}")
            n += 1
        return n

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        n = sum(pool.map(ask, [start + seconds] * threads))
    return n / (time.perf_counter() - start)


def record_microseconds(arguments: argparse.Namespace, url: str, times: int = 2000) -> float:
    """Median of one `PredictionLog.record` of one visit."""
    pipeline = ProductionPipeline(arguments.config, arguments.model)
    observations = pipeline.reproducer.read(json.loads(BODY))
    visit, moments, _ = resolve_snapshots(observations)
    visit, moments = visit[:1], moments[:1]
    found = pipeline.assess(observations, visit, moments)
    log, taken = PredictionLog.open(url, pipeline, "api"), []
    for _ in range(times):
        start = time.perf_counter()
        log.record(observations, visit, moments, found, 0.001)
        taken.append(time.perf_counter() - start)
    log.close()
    return statistics.median(taken) * 1e6


def work(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as servers:
        folder = Path(name)
        url = f"sqlite:///{folder}/log.db"
        ports = [servers.enter_context(server(arguments, folder, monitor)) for monitor in (OFF, url)]
        for port in ports:
            requests_a_second(port, 1)  # warm
        rates = []
        for n in range(arguments.rounds):
            order = (0, 1) if n % 2 else (1, 0)
            found = {k: requests_a_second(ports[k], arguments.seconds) for k in order}
            rates.append((found[0], found[1]))
        off, on = (statistics.median(rate) for rate in zip(*rates, strict=True))
        costs = sorted(1 - with_log / without for without, with_log in rates)
        print(f"requests a second, one worker: {off:.0f} without the log, {on:.0f} with it")
        print(
            f"cost of the log: {statistics.median(costs):.1%} of the throughput "
            f"(rounds from {costs[0]:.1%} to {costs[-1]:.1%})"
        )
        print(f"one record of one visit: {record_microseconds(arguments, f'sqlite:///{folder}/alone.db'):.0f} µs")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/logging_cost.py --rounds 10", "config", "model")
    parser.add_argument("--rounds", type=number(int, 1), default=10, help="pairs of measurements")
    parser.add_argument("--seconds", type=number(float, 0.1), default=2.0, help="of each measurement")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
