"""The REST service under a mixed load while things go wrong: JSON, FHIR and CDS Hooks from eight clients; three workers
are killed, the model is switched ten times, and the disk of the logs is full for a while.

Every answer is compared with the number that the pipeline gives. The disk is a small file system that --disk names
(such as: mount -t tmpfs -o size=8m tmpfs /mnt/small); without it that part is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.api import served
from common.artifacts import write_atomic
from common.command_line import DONE, make_parser, number, run
from feature_pipeline import ProductionPipeline

CLIENTS, KILLS, SWITCHES = 8, 3, 10
AS_OF = "2024-07-02T09:30:00Z"
VITALS = {"8867-4": (124, "/min"), "9279-1": (29, "/min"), "8480-6": (84, "mm[Hg]"), "8310-5": (39.2, "Cel")}


def observation(code: str, when: str) -> dict[str, Any]:
    value, unit = VITALS[code]
    return {
        "resourceType": "Observation",
        "id": f"o{code}",
        "status": "final",
        "code": {"coding": [{"system": "http://loinc.org", "code": code}]},
        "subject": {"reference": "Patient/p"},
        "encounter": {"reference": "Encounter/e"},
        "effectiveDateTime": when,
        "valueQuantity": {"value": value, "unit": unit, "system": "http://unitsofmeasure.org", "code": unit},
    }


def bundle(when: str) -> dict[str, Any]:
    entries = [{"fullUrl": f"urn:uuid:{i}", "resource": observation(code, when)} for i, code in enumerate(VITALS)]
    return {"resourceType": "Bundle", "type": "collection", "entry": entries}


def requests() -> list[tuple[str, bytes]]:
    """Path and body of each kind of request; the moment of the first two is fixed."""
    then, now = "2024-07-02T09:00:00Z", datetime.now(UTC).isoformat()
    rows = [
        {"visit_id": "e", "client": "p", "observation_date": then, "observation_type_code": code}
        | {"observation_value": value, "unit": unit}
        for code, (value, unit) in VITALS.items()
    ]
    call = {
        "hook": "patient-view",
        "hookInstance": "1",
        "context": {"userId": "Practitioner/1", "patientId": "p"},
        "prefetch": {"patient": None, "vitals": bundle(now), "laboratory": None},
    }
    return [
        (f"/predict?as_of={AS_OF}", json.dumps(rows).encode()),
        (f"/fhir/predict?as_of={AS_OF}", json.dumps(bundle(then)).encode()),
        ("/cds-services/sepsis-risk", json.dumps(call).encode()),
    ]


def number_of(answer: Any) -> Any:
    """The probability in an answer; of a card, whether there is one."""
    if "predictions" in answer:
        return answer["predictions"][0]["sepsis_probability"]
    if "entry" in answer:
        return answer["entry"][0]["resource"]["prediction"][0]["probabilityDecimal"]
    return len(answer["cards"])


class Load:
    """Clients that ask without pause, each over a connection that is kept open, and what came of it."""

    def __init__(self, port: int, expected: float):
        self.port, self.expected = port, expected
        self.counts: Counter[str] = Counter()
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(i,)) for i in range(CLIENTS)]

    def ask(self, n: int) -> None:
        kinds, connection = requests(), None
        while not self.stop.is_set():
            path, body = kinds[n % len(kinds)]
            n += 1
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, http.client.HTTPException):  # it was with a worker that was killed
                self.counts["lost"] += 1
                connection = None
                continue
            if answer.status != 200:
                self.counts[f"status {answer.status}"] += 1
            elif number_of(json.loads(text)) != (1 if "cds" in path else self.expected):
                self.counts["wrong"] += 1
            else:
                self.counts["right"] += 1


def benchmark(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder, logs = Path(name), Path(arguments.disk or name)
        config, model = folder / "best_model_config.json", folder / "best_model.pkl"
        content = json.loads(Path(arguments.config).read_text())
        content["minimum_evidence"] = None
        write_atomic(config, json.dumps(content))
        shutil.copy(arguments.model, model)
        rows = json.loads(requests()[0][1])
        expected = ProductionPipeline(config, model).predict(rows, as_of=AS_OF)["sepsis_probability"].iloc[0]
        arguments.config, arguments.model = str(config), str(model)
        with served("api_server:app", arguments.port, logs, arguments) as server:
            load = Load(arguments.port, float(expected))
            for thread in load.threads:
                thread.start()
            events = [(k + 0.5, "kill") for k in range(KILLS)]
            events += [(KILLS * k / SWITCHES, "switch") for k in range(SWITCHES)]
            if arguments.disk:
                events += [(KILLS * 0.4, "fill"), (KILLS * 0.6, "empty")]
            began = time.monotonic()
            for when, what in sorted(events):
                time.sleep(max(began + when * arguments.seconds / KILLS - time.monotonic(), 0))
                happen(what, server, config, content, logs)
            time.sleep(max(began + arguments.seconds - time.monotonic(), 0))
            load.stop.set()
            for thread in load.threads:
                thread.join()
            versions = metric(arguments.port, "sepsis_predictions_not_logged_total")
        told = ", ".join(f"{n:,} {what}" for what, n in load.counts.most_common())
        print(f"  {told} of {load.counts.total():,} in {arguments.seconds} s; not logged: {versions}")
    return DONE


def happen(what: str, server: psutil.Process, config: Path, content: dict[str, Any], logs: Path) -> None:
    filler = logs / "filler"
    if what == "kill":
        with contextlib.suppress(psutil.Error, IndexError):
            os.kill(server.children()[0].pid, signal.SIGKILL)
    elif what == "switch":
        content["model_version"] = f"version {time.time():.3f}"
        write_atomic(config, json.dumps(content))
    elif what == "fill":
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
    else:
        filler.unlink(missing_ok=True)


def metric(port: int, name: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return next((line.split()[1] for line in lines if line.startswith(f"{name} ")), "0")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/mixed_load.py --seconds 60", "config", "model")
    parser.add_argument("--seconds", type=number(int, 10, 600), default=60, help="of load")
    parser.add_argument("--disk", metavar="DIR", help="on a small file system, which is filled for a while")
    parser.add_argument("--port", type=number(int, 1024, 65000), default=18700, help="on loopback")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
