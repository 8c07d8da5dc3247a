"""Requests a second and latency of the REST service under gunicorn on loopback, beside a first draft of it.

Load comes from wrk (a C program: it leaves the cores to the server), 8 connections that each wait for their answer.
Latency at a given rate comes from 8 connections of this script that send at fixed moments and count waiting as latency.
The service runs as it is deployed: access log, audit log and prediction log are written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.features import clean
from common.command_line import COULD_NOT_START, DONE, log, make_parser, number, run
from sources.demo_cohort import make_demo_cohort

CONNECTIONS = 8
SCRIPT = """
local file = io.open(os.getenv("BODY"), "r"); wrk.body = file:read("*a"); file:close()
wrk.method = "POST"; wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency, requests)
  for _, p in ipairs({50, 95, 99}) do io.write(string.format("p%d %.0f us\\n", p, latency:percentile(p))) end
end
"""


def bodies() -> dict[str, bytes]:
    """A visit of 40 observations, and 100 visits of 40."""
    frame = clean(make_demo_cohort(n_patients=400, seed=3)[0])
    frame["observation_date"] = frame["observation_date"].astype(str)
    frame = frame.astype(object).where(frame.notna(), None)
    sizes = frame["visit_id"].value_counts()
    visits = sizes[sizes >= 40].index[:100]
    rows = [row for visit in visits for row in frame[frame["visit_id"] == visit].head(40).to_dict("records")]
    for row in rows:
        row["visit_id"] = int(row["visit_id"])
    return {"1 visit": json.dumps(rows[:40]).encode(), "100 visits": json.dumps(rows).encode()}


@contextlib.contextmanager
def served(
    app: str, port: int, folder: Path, arguments: argparse.Namespace, options: Sequence[str] = (), **more: str
) -> Iterator[psutil.Process]:
    """gunicorn with two workers."""
    env = {
        **os.environ,
        "SEPSIS_INSECURE": "1",  # on loopback
        "SEPSIS_CONFIG": str(Path(arguments.config).resolve()),
        "SEPSIS_MODEL": str(Path(arguments.model).resolve()),
        "SEPSIS_RATE_LIMIT": "100000000/minute",
        "SEPSIS_ACCESS_LOG": str(folder / "access.jsonl"),
        "SEPSIS_AUDIT_LOG": str(folder / "audit.jsonl"),
        "SEPSIS_MONITOR_URL": f"sqlite:///{folder}/log.db",
        "SEPSIS_PSEUDONYM_KEY": "benchmark key of no importance",
        **more,
    }
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-w",
        "2",
        "-b",
        f"127.0.0.1:{port}",
        "--log-level",
        "error",
        *options,
        app,
    ]
    if "draft" in app:  # as gunicorn comes
        (folder / "plain.py").write_text("")
        command[3:3] = ["-c", str(folder / "plain.py")]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                http.client.HTTPConnection("127.0.0.1", port, timeout=5).request("GET", "/health")
                break
            if time.monotonic() > end:
                raise RuntimeError("gunicorn does not start")
            time.sleep(0.1)
        time.sleep(2)  # until each worker has its model
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def wrk(port: int, body: bytes, seconds: int, folder: Path) -> dict[str, float]:
    """Throughput and latency (ms) under full load; `failed` counts answers other than 2xx, and broken connections."""
    (folder / "body").write_bytes(body)
    (folder / "post.lua").write_text(SCRIPT)
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "20s"]
    command += ["-s", str(folder / "post.lua"), f"http://127.0.0.1:{port}/predict?as_of=last"]
    env = {**os.environ, "BODY": str(folder / "body")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    text = done.stdout
    if done.returncode:
        raise OSError(f"wrk fails: {done.stderr.strip()}")
    out = {"rate": float(re.search(r"Requests/sec:\s+(\S+)", text)[1])}
    out["requests"] = float(re.search(r"(\d+) requests in", text)[1])
    for name, microseconds in re.findall(r"^(p\d+) (\d+) us$", text, re.M):
        out[name] = float(microseconds) / 1e3
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    out["failed"] = (int(bad[1]) if bad else 0) + (sum(map(int, broken.groups())) if broken else 0)
    return out


def at_rate(port: int, body: bytes, rate: float, seconds: float) -> tuple[np.ndarray, int]:
    """(latencies in ms, failed) of requests sent at fixed moments; one that had to wait its turn counts its waiting."""
    latencies: list[float] = []
    failed = 0
    head = "POST /predict?as_of=last HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    message = head.encode() + b"\r\n\r\n" + body

    async def client(k: int, start: float) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for n in range(k, int(rate * seconds), CONNECTIONS):
            due = start + n / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            writer.write(message)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", answer)[1]))
            latencies.append((time.perf_counter() - due) * 1e3)
            if b"connection: close" in answer.lower():
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            failed += not answer.startswith(b"HTTP/1.1 200")
        writer.close()

    async def clients() -> None:
        start = time.perf_counter() + 0.5
        await asyncio.gather(*(client(k, start) for k in range(CONNECTIONS)))

    asyncio.run(clients())
    return np.array(latencies), failed


def memory(server: psutil.Process) -> float:
    """MB of the workers, together."""
    return sum(p.memory_info().rss for p in server.children()) / 1e6


def line(name: str, r: dict[str, float]) -> None:
    latency = "   ".join(f"{p} {r[p]:7.2f} ms" for p in ("p50", "p95", "p99"))
    print(f"  {name:<44s} {r['rate']:8.1f} requests/s   {latency}   failed {r['failed']:.0f} of {r['requests']:.0f}")


def watch_memory(body: bytes, port: int, folder: Path, arguments: argparse.Namespace) -> None:
    """Memory of the same two workers over many requests."""
    more = ("--max-requests", "0")
    with served("api_server:app", port, folder, arguments, options=more) as server:
        done = 0.0
        print(f"  at the start: {memory(server):.0f} MB", flush=True)
        while done < arguments.many:
            done += wrk(port, body, 20, folder)["requests"]
            print(f"  after {done:9,.0f} requests: {memory(server):.0f} MB", flush=True)


def large_bundle() -> bytes:
    """A FHIR Bundle of 11,500 heart rates, 6.5 MB: legal, and close to what the service takes."""
    entries = []
    for n in range(11_500):
        coding = {"system": "http://loinc.org", "code": "8867-4", "display": "Heart rate"}
        quantity = {"value": 60 + n % 60, "unit": "beats/minute", "system": "http://unitsofmeasure.org", "code": "/min"}
        resource = {
            "resourceType": "Observation",
            "id": f"o{n}",
            "status": "final",
            "code": {"coding": [coding], "text": "Heart rate"},
            "subject": {"reference": f"Patient/p{n // 10}"},
            "encounter": {"reference": f"Encounter/e{n // 10}"},
            "effectiveDateTime": f"2024-07-{1 + n % 28:02d}T{n % 24:02d}:00:00Z",
            "valueQuantity": quantity,
            "referenceRange": [{"low": {"value": 60}, "high": {"value": 100}}],
        }
        entries.append({"fullUrl": f"urn:uuid:{n}", "resource": resource})
    return json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries}).encode()


@contextlib.contextmanager
def attacked(port: int, path: str, body: bytes) -> Iterator[Counter[int]]:
    """Four clients that send a large request again and again; gives the statuses of their answers."""
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                status = connection.getresponse().status
                statuses[status] += 1
                stop.wait(1 if status == 503 else 0)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def watch_attacks(small: bytes, port: int, folder: Path, arguments: argparse.Namespace) -> None:
    """Latency of small requests, 20 a second, in quiet and while others send large ones."""
    objects = b"[" + b",".join([b"{}"] * 2_700_000) + b"]"
    kinds = [("quiet", "", b""), ("large bundles", "/fhir/predict", large_bundle()), ("objects", "/predict", objects)]
    with served("api_server:app", port, folder, arguments) as server:
        at_rate(port, small, 20, 3)
        for what, path, body in kinds:
            with attacked(port, path, body) if body else contextlib.nullcontext(Counter()) as statuses:
                times, failed = at_rate(port, small, 20, arguments.rate_seconds)
            p50, p99 = np.percentile(times, [50, 99])
            print(f"  {what:<16s} p50 {p50:8.1f} ms   p99 {p99:8.1f} ms   failed {failed} of {len(times)}", end="   ")
            print(f"answers to the attack: {dict(statuses)}   memory {memory(server):.0f} MB", flush=True)


def benchmark(arguments: argparse.Namespace) -> int:
    if not shutil.which("wrk") and not arguments.attack:
        log.error("error: wrk is not installed (Debian's package wrk)")
        return COULD_NOT_START
    given, seconds, port = bodies(), arguments.seconds, arguments.port
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.many:
            watch_memory(given["1 visit"], port, folder, arguments)
            return DONE
        if arguments.attack:
            watch_attacks(given["1 visit"], port, folder, arguments)
            return DONE
        ratio = {}
        with served("benchmarks.draft_api:app", port, folder, arguments) as server:
            for what, body in given.items():
                found = wrk(port, body, max(seconds // 3, 5), folder)
                ratio[what] = found["rate"]
                line(f"first draft, {what}", found)
        with served("api_server:app", port + 1, folder, arguments) as server:
            before = memory(server)
            for what, body in given.items():
                found = wrk(port + 1, body, seconds, folder)
                line(f"api_server, {what}", found)
                print(f"  {'':<44s} {found['rate'] / ratio[what]:8.1f} times the draft")
                if what == "1 visit":
                    peak = found["rate"]
            for share in (0.5, 0.75):
                times, failed = at_rate(port + 1, given["1 visit"], share * peak, arguments.rate_seconds)
                p50, p95, p99 = np.percentile(times, [50, 95, 99])
                print(
                    f"  1 visit at {share:.0%} of that rate ({share * peak:.0f}/s)"
                    f"     p50 {p50:.2f} ms   p95 {p95:.2f} ms   p99 {p99:.2f} ms   failed {failed} of {len(times)}"
                )
            print(f"  memory of the two workers: {before:.0f} MB at the start, {memory(server):.0f} MB now")
        rates = []
        for what, url in (("off", "off"), ("on", f"sqlite:///{folder}/log2.db"), ("off", "off"), ("on", "")):
            url = url or f"sqlite:///{folder}/log3.db"
            with served("api_server:app", port + 3 + len(rates), folder, arguments, SEPSIS_MONITOR_URL=url):
                rates.append(wrk(port + 3 + len(rates), given["1 visit"], max(seconds // 3, 5), folder)["rate"])
                print(f"  prediction log {what:<3s} {rates[-1]:8.1f} requests/s")
        cost = 1 - (rates[1] + rates[3]) / (rates[0] + rates[2])
        print(f"  the prediction log costs {cost:.1%} of the throughput")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/api.py --many 100000", "config", "model")
    parser.add_argument("--seconds", type=number(int, 1, 600), default=60, help="of each full load")
    parser.add_argument("--rate-seconds", type=number(int, 1, 600), default=20, help="of each load at a given rate")
    parser.add_argument("--many", type=number(int, 0), default=0, help="only watch memory over so many requests")
    parser.add_argument("--attack", action="store_true", help="only the latency while others send large requests")
    parser.add_argument("--port", type=number(int, 1024, 65000), default=18500, help="the first of some on loopback")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
