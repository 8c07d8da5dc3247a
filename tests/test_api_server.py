"""The service as it is deployed: gunicorn, curl, a browser, workers that die, a model that is replaced."""

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from feature_pipeline import ProductionPipeline
from serving.api import workers
from serving.api.security import new_key
from serving.api.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "new_patient_data.json"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60


MINIMUM = {
    "inputs": ["heart_rate", "respiratory_rate", "systolic_bp", "temperature"],
    "at_least": 3,
    "within_hours": 24.0,
    "newest_hours": 8.0,
}


def model_with(models_dir, folder, minimum):
    """The paths of a copy of the session's model in `folder`, with another minimum of evidence."""
    shutil.copytree(models_dir, folder)
    config = json.loads((folder / "best_model_config.json").read_text())
    (folder / "best_model_config.json").write_text(json.dumps({**config, "minimum_evidence": minimum}))
    return folder / "best_model_config.json", folder / "best_model.pkl"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(condition, what):
    """Waits for a condition, with a limit far beyond what it takes."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if result := condition():
                return result
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {PATIENCE} s")


class Server:
    """gunicorn on loopback, with a models directory of its own."""

    def __init__(self, folder, models_dir, *options, minimum=None, **settings):
        self.models, self.port, self.folder = folder / "models", free_port(), folder
        model_with(models_dir, self.models, minimum)
        env = {
            **os.environ,
            "SEPSIS_CONFIG": str(self.models / "best_model_config.json"),
            "SEPSIS_MODEL": str(self.models / "best_model.pkl"),
            "SEPSIS_RATE_LIMIT": "1000000/minute",
            "SEPSIS_AUDIT_LOG": str(folder / "audit.jsonl"),
            "SEPSIS_MONITOR_URL": f"sqlite:///{folder}/log.db",
            "SEPSIS_ACCESS_LOG": "",
            "SEPSIS_INSECURE": "" if "SEPSIS_API_KEYS" in settings else "1",
            "TMPDIR": str(folder),
            **settings,
        }
        env.pop("PROMETHEUS_MULTIPROC_DIR", None)
        command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", f"127.0.0.1:{self.port}", *options]
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen([*command, "api_server:app"], cwd=ROOT, env=env, stderr=self.log)
        until(lambda: self.get("/ready")[0] == 200, "the server is ready")

    def request(self, path, data=None, **headers):
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path):
        return self.request(path)

    def predict(self, data=None):
        status, text = self.request("/predict?as_of=last", EXAMPLE.read_bytes() if data is None else data)
        return status, json.loads(text)

    def workers(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    def stop(self):
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0
        self.log.close()


@pytest.fixture(scope="module")
def pipeline(models_dir, tmp_path_factory):
    """The model that the services have."""
    return ProductionPipeline(*model_with(models_dir, tmp_path_factory.mktemp("pipeline") / "models", None))


@pytest.fixture(scope="module")
def server(models_dir, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@contextlib.contextmanager
def load(server, threads=4):
    """Requests without pause while the body runs; gives the list of (status, model version) that grows."""
    answers, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                status, body = server.predict()
            except (OSError, http.client.HTTPException):  # a broken connection
                status, body = "broken", {}
            answers.append((status, body.get("model_version")))

    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(ask) for _ in range(threads)]
        try:
            until(lambda: len(answers) > 10, "the first answers")
            yield answers
        finally:
            stop.set()
        for task in tasks:
            task.result()


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl_as_in_the_readme(server, pipeline):
    command = re.search(r"^\$ (curl -s -X POST \S+/predict\S* .*?) \|", (ROOT / "README.md").read_text(), re.M)[1]
    command = command.replace("localhost:5000", f"localhost:{server.port}")
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    expected = pipeline.predict(json.loads(EXAMPLE.read_text()))["sepsis_probability"].tolist()
    assert [p["sepsis_probability"] for p in answer["predictions"]] == expected


def test_metrics_are_the_sum_over_workers(server):
    def total():
        line = r'^sepsis_requests_total{route="/predict",status="200"} (\S+)$'
        return sum(float(n) for n in re.findall(line, server.get("/metrics")[1], re.M))

    before = total()
    with ThreadPoolExecutor(8) as pool:
        assert {status for status, _ in pool.map(lambda _: server.predict(), range(40))} == {200}
    assert total() - before == 40


@pytest.fixture
def colleagues(monkeypatch):
    """Two workers without a master process; `held` of each is the connections it holds."""
    monkeypatch.setattr(workers, "_held", memoryview(bytearray(2 * workers.SLOTS)).cast("H"))

    def make(age, held):
        worker = workers.Worker.__new__(workers.Worker)
        worker.age, worker.nr_conns, worker.alive, worker.cfg = age, held, True, None
        worker.accepted = []
        worker.enqueue_req = worker.accepted.append
        worker._tell()
        return worker

    return make


@pytest.mark.parametrize(("own", "other", "taken"), [(0, 0, True), (3, 3, True), (3, 5, True), (3, 1, False)])
def test_a_worker_leaves_a_new_connection_to_one_that_has_fewer(own, other, taken, colleagues, monkeypatch):
    worker, freer = colleagues(7, own), colleagues(8, other)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with socket.create_connection(listener.getsockname()):
            until(lambda: select.select([listener], [], [], 0)[0], "the connection is there")
            # the other one comes while this one waits
            monkeypatch.setattr(time, "sleep", lambda seconds: freer.accepted or freer.accept(listener))
            worker.accept(listener)
            assert (bool(worker.accepted), worker.nr_conns) == (taken, own + taken)
            assert (bool(freer.accepted), freer.nr_conns) == (not taken, other + (not taken))
        for connection in worker.accepted + freer.accepted:
            connection.close()


def test_a_worker_alone_takes_every_connection_in_the_end(colleagues, monkeypatch):
    worker, stuck = colleagues(7, 3), colleagues(8, 0)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(workers.ThreadWorker, "accept", lambda self, listener: waits.append("accepted"))
    worker.accept(None)  # the other one does not come
    assert waits[-1] == "accepted" and len(waits) == workers.MOST_WAITS + 1
    stuck.forget()
    waits.clear()
    worker.accept(None)
    assert waits == ["accepted"]


def test_a_worker_with_too_many_connections_gives_some_up(colleagues, monkeypatch):
    class Request:
        closed = False

        def force_close(self):
            self.closed = True

    monkeypatch.setattr(workers.ThreadWorker, "handle_request", lambda self, req, conn: not req.closed)
    worker, _, now = colleagues(7, 5), colleagues(8, 3), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert [worker.handle_request(Request(), None) for _ in range(3)] == [False, True, True]  # one at a time
    now[0] += 1
    worker.nr_conns = 4
    assert worker.handle_request(Request(), None)  # another would only change sides


@pytest.mark.slow
def test_wrong_keys_are_counted_over_all_workers(models_dir, tmp_path):
    """The limit is exact, whichever worker answers, and holds when one of them was killed."""
    line = new_key("ward-3")[1]
    server = Server(tmp_path, models_dir, SEPSIS_API_KEYS=line)
    try:
        guess = lambda i: server.request("/predict", b"[]", **{"X-API-Key": f"guess-{i}", "Connection": "close"})[0]  # noqa: E731
        with ThreadPoolExecutor(4) as pool:
            first = list(pool.map(guess, range(12)))
        os.kill(next(iter(server.workers())), signal.SIGKILL)
        until(lambda: len(server.workers()) == 2 and server.get("/ready")[0] == 200, "the worker is replaced")
        with ThreadPoolExecutor(4) as pool:
            answers = first + list(pool.map(guess, range(12, 40)))
    finally:
        server.stop()
    assert answers.count(403) in (20, 40) and answers.count(403) + answers.count(429) == 40  # 40: a minute began


def test_a_killed_worker_is_replaced_and_the_others_answer(server):
    with load(server) as answers:
        victim = min(server.workers())
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(server.workers() - {victim}) == 2, "a new worker")
        seen = len(answers)
        until(lambda: len(answers) > seen + 20, "answers after the kill")
    # only what the killed worker had in hand may be lost, and the client sees that as a broken connection
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, "broken"} and statuses.count("broken") <= 4


def test_a_new_model_is_picked_up_without_a_lost_request(models_dir, tmp_path):
    server = Server(tmp_path, models_dir)
    try:
        old = json.loads(server.get("/ready")[1])["model_version"]
        with load(server) as answers:
            config = json.loads((server.models / "best_model_config.json").read_text())
            config["model_version"] = "20990101_000000"
            new = server.models / "new.json"
            new.write_text(json.dumps(config))
            new.replace(server.models / "best_model_config.json")
            server.process.send_signal(signal.SIGHUP)
            until(lambda: answers[-1][1] == "20990101_000000", "an answer of the new model")
            seen = len(answers)
            until(lambda: len(answers) > seen + 30, "more answers")
        assert set(answers) == {(200, old), (200, "20990101_000000")}
        assert [v for _, v in answers[-10:]] == ["20990101_000000"] * 10
        assert list(tmp_path.glob("sepsis-metrics-*"))
    finally:
        server.stop()
    assert not list(tmp_path.glob("sepsis-metrics-*"))  # also after a reload


def test_without_keys_only_the_unix_socket_answers(models_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s")  # the path of a Unix socket is short
    server = Server(folder, models_dir, "-b", f"unix:{folder}/socket", SEPSIS_INSECURE="")
    try:
        assert server.get("/ready")[0] == 200 and server.predict()[0] == 401
        for header, status in ({}, 200), ({"X-Forwarded-For": "192.0.2.7"}, 401):
            connection = http.client.HTTPConnection("localhost")
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(f"{folder}/socket")
            headers = {"Content-Type": "application/json", **header}
            connection.request("POST", "/predict?as_of=last", EXAMPLE.read_bytes(), headers)
            assert connection.getresponse().status == status
            connection.close()
    finally:
        server.stop()


def test_the_script_makes_a_key_for_its_run(browser, config_path, model_path, tmp_path):
    command = [
        sys.executable,
        "api_server.py",
        "--port",
        "0",
        "--monitor",
        "off",
        "--audit-log",
        str(tmp_path / "audit"),
    ]
    command += ["--config", str(config_path), "--model", str(model_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            shown = next(line for line in process.stderr if "http://" in line)
            address, key = re.search(r"(http://127.0.0.1:\d+)/#key=(sepsis_\S+)", shown).groups()
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}/model", timeout=PATIENCE)
            assert refused.value.code == 401
            page = browser.new_page()
            page.goto(f"{address}/#key={key}")
            page.get_by_role("button", name="Service").click()
            page.locator("#card dd").first.wait_for()
            assert "key" not in page.url
            page.close()
        finally:
            process.terminate()


# ------------------------------------------------------------------------------------------- behind nginx


NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


class Proxied(NamedTuple):
    port: int
    trusted: ssl.SSLContext  # trusts its certificate
    key: str
    folder: Path


@contextlib.contextmanager
def nginx(folder, upstream):
    """nginx with the project's own configuration, but its ports and certificate; gives its port and a context that
    trusts it."""
    port, key, certificate = free_port(), folder / "key", folder / "certificate"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    text = (ROOT / "examples" / "deployment" / "nginx.conf").read_text()
    for given, own in (
        ("127.0.0.1:5000", f"127.0.0.1:{upstream}"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/certs/sepsis-risk.pem", str(certificate)),
        ("/etc/ssl/private/sepsis-risk.key", str(key)),
    ):
        assert text.count(given) == 1
        text = text.replace(given, own)
    places = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder}/nginx.pid;\nworker_processes 1;\nerror_log {folder}/nginx.log warn;\n"
        f"events {{ worker_connections 1024; }}\nhttp {{\naccess_log off;\n{places}{text}}}\n"
    )
    folder.chmod(0o755)  # nginx's workers may be of another user
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        until(lambda: socket.create_connection(("127.0.0.1", port)).close() is None, "nginx listens")
        yield port, ssl.create_default_context(cafile=str(certificate))
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def proxied(models_dir, tmp_path_factory):
    """nginx in front of the service."""
    if not NGINX or not shutil.which("openssl"):
        pytest.skip("no nginx or no openssl here")
    key, line = new_key("ward")
    folder = tmp_path_factory.mktemp("proxied")
    server = Server(folder, models_dir, SEPSIS_API_KEYS=line)
    (folder / "nginx").mkdir()
    try:
        with nginx(folder / "nginx", server.port) as (port, trusted):
            yield Proxied(port, trusted, key, folder / "nginx")
    finally:
        server.stop()


def predicted(proxied, body=None):
    """An answer through nginx."""
    headers = {"Content-Type": "application/json", "X-API-Key": proxied.key}
    body = EXAMPLE.read_bytes() if body is None else body
    request = urllib.request.Request(f"https://localhost:{proxied.port}/predict?as_of=last", body, headers)
    with urllib.request.urlopen(request, timeout=PATIENCE, context=proxied.trusted) as answer:
        return answer.status, json.loads(answer.read())


def test_400_stalled_clients_behind_nginx_make_nobody_wait(proxied, pipeline):
    """Silent, in mid-handshake, in mid-head, in mid-body: each kind alone outnumbers the threads of the workers."""
    port, trusted, *_ = proxied
    stalled = [socket.create_connection(("localhost", port)) for _ in range(400)]
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    try:
        for s in stalled[100:200]:
            s.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        stalled[200:] = [trusted.wrap_socket(s, server_hostname="localhost") for s in stalled[200:]]
        for s in stalled[200:300]:
            s.sendall(head)
        for s in stalled[300:]:
            s.sendall(head + b"Content-Length: 9\r\n\r\n[1,2,")
        expected = pipeline.predict(json.loads(EXAMPLE.read_text()))["sepsis_probability"].tolist()
        for _ in range(4):
            status, answer = predicted(proxied)
            assert status == 200 and [p["sepsis_probability"] for p in answer["predictions"]] == expected
        gone = select.select(stalled[:200], [], [], 0)[0] + [s for s in stalled[200:] if not still_open(s)]
        assert not gone  # nobody had to be cut off before
        stalled[300].sendall(b"3,4]")  # who goes on is answered
        assert stalled[300].recv(12).startswith(b"HTTP/1.1 4")
    finally:
        for s in stalled:
            s.close()


def still_open(connection):
    """Has the server neither closed this TLS connection nor answered?"""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1)) and False
    except ssl.SSLWantReadError:
        return True
    finally:
        connection.settimeout(PATIENCE)


def test_clients_that_read_slowly_or_never_close_behind_nginx_make_nobody_wait(proxied):
    port, trusted, *_ = proxied
    ends = []
    try:
        for _ in range(100):
            s = trusted.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost")
            ends.append(s)
            s.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert predicted(proxied)[0] == 200  # none of them has read a byte
        assert all(s.recv(12) == b"HTTP/1.1 200" for s in ends)
    finally:
        for s in ends:
            s.close()


def test_large_bodies_pass_nginx_and_touch_no_disk(proxied):
    rows = json.loads(EXAMPLE.read_text())
    many = [{**row, "visit_id": f"{row['visit_id']}-{i}"} for i in range(60) for row in rows]
    body = json.dumps(many).encode()
    assert 7_000_000 < len(body) < Settings.max_bytes
    status, answer = predicted(proxied, body)
    assert status == 200 and len(answer["predictions"]) == 480
    assert "temporary file" not in (proxied.folder / "nginx.log").read_text()
    with pytest.raises(urllib.error.HTTPError) as refused:
        predicted(proxied, body.ljust(Settings.max_bytes + 1))
    assert refused.value.code == 413 and "send fewer visits" in json.loads(refused.value.read())["detail"]


def test_a_body_that_waits_to_be_asked_for(server):
    body = EXAMPLE.read_bytes()
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(PATIENCE)
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        s.sendall(f"{head}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert s.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(body)
        assert s.recv(12) == b"HTTP/1.1 200"


def test_chunks_and_requests_behind_one_another(server):
    body = EXAMPLE.read_bytes()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = b"%x\r\n%s\r\n" % (len(body), body)
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(PATIENCE)
        s.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
        s.sendall(b"0\r\n\r\n")
        assert http.client.HTTPResponse(s).begin() is None
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(PATIENCE)
        one = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        s.sendall(one + one + one[:-5])
        text = b""
        while text.count(b"HTTP/1.1 200") < 2:
            text += s.recv(1 << 16)
        s.sendall(one[-5:])
        while text.count(b"HTTP/1.1 200") < 3:
            text += s.recv(1 << 16)
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(PATIENCE)
        s.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n" + one)
        text = b""
        while text.count(b"HTTP/1.1 200") < 2:
            part = s.recv(1 << 16)
            assert part
            text += part


@pytest.mark.parametrize(
    "rest", [b"zz\r\nabc\r\n0\r\n\r\n", b"3\r\nabcdef\r\n0\r\n\r\n", b"-1\r\n\r\n"], ids=["size", "end", "sign"]
)
def test_malformed_chunks_are_a_bad_request(server, rest):
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(PATIENCE)
        s.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + rest)
        assert s.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /planted\x1b[31m HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\nHost: a\r\nX-Planted\x1b: a\r\n\r\n", 400),
        (b"GET /" + b"planted" * 2000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: planted\r\n\r\n", 501),
        (b"planted\r\n\r\n", 400),
    ],
    ids=["line", "header", "length", "encoding", "no line"],
)
def test_what_is_no_request_is_neither_quoted_nor_logged(server, raw, status):
    with socket.create_connection(("127.0.0.1", server.port)) as s, s.makefile("rb") as answer:
        s.settimeout(PATIENCE)
        s.sendall(raw)
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"application/problem+json" in head
    assert json.loads(body)["status"] == status and b"planted" not in head + body
    log = (server.folder / "log").read_bytes()
    assert b"planted" not in log.lower() and b"\x1b" not in log


def test_a_request_without_host_is_a_bad_request(server):
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(PATIENCE)
        s.sendall(b"GET /ready HTTP/1.1\r\n\r\n")
        assert s.recv(12) == b"HTTP/1.1 400"


def test_the_prediction_log_has_what_was_answered(server):
    with contextlib.closing(sqlite3.connect(server.folder / "log.db")) as database:
        count = lambda: database.execute("select count(*) from predictions").fetchone()[0]  # noqa: E731
        before = count()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.predict(), range(24)))
        assert count() - before == sum(len(body["predictions"]) for _, body in answers) == 24 * 8


def test_all_workers_and_both_logs_have_one_name_for_a_visit(server):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: server.predict(), range(24)))
    lines = [json.loads(line) for line in (server.folder / "audit.jsonl").read_text().splitlines()]
    audited = {name for line in lines for name in line["visit_pseudonyms"]}
    with contextlib.closing(sqlite3.connect(server.folder / "log.db")) as database:
        logged = {name for (name,) in database.execute("select distinct visit from predictions")}
    assert audited == logged and len(logged) == 8


def test_a_bad_line_in_the_key_file_ends_nothing(models_dir, tmp_path):
    (first, line), (second, other) = new_key("ward-1"), new_key("ward-2")
    keys = tmp_path / "keys"
    keys.write_text(line)
    server = Server(tmp_path, models_dir, SEPSIS_API_KEYS=str(keys))

    def status(key):
        return server.request("/predict", EXAMPLE.read_bytes(), **{"X-API-Key": key})[0]

    try:
        keys.write_text(f"{line}\nward-2 without a key")
        old = server.workers()

        def renewed():
            for worker in server.workers() & old:  # again, since one that is just starting does not listen yet
                os.kill(worker, signal.SIGTERM)
            return len(server.workers() - old) == 2 and not server.workers() & old

        until(renewed, "new workers")
        until(lambda: server.get("/ready")[0] == 200, "the new ones are ready")
        assert status(first) == 200
        server.process.send_signal(signal.SIGHUP)
        until(lambda: b"keys stay as they were" in (tmp_path / "log").read_bytes(), "it is told")
        assert status(first) == 200
        keys.write_text(f"{line}\n{other}")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: status(second) == 200, "the new key is known")
        assert b"Traceback" not in (tmp_path / "log").read_bytes()
    finally:
        server.stop()


@pytest.mark.parametrize("door", ["gunicorn", "script"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEPSIS_RATE_LIMIT", "abc"),
        ("SEPSIS_RATE_STORAGE", "nothing://user:password@host"),
        ("SEPSIS_API_KEYS", "sepsis_password"),
        ("SEPSIS_PSEUDONYM_KEY", "password"),
    ],
)
def test_settings_that_cannot_be_are_one_line(door, name, value, tmp_path):
    command = [sys.executable, "api_server.py", "--port", "0"]
    if door == "gunicorn":
        command = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:0", "api_server:app"]
    env = {**os.environ, "TMPDIR": str(tmp_path), "SEPSIS_PSEUDONYM_KEY": "k" * 32, name: value}
    env.pop("PROMETHEUS_MULTIPROC_DIR", None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    errors = [line for line in done.stderr.splitlines() if not re.match(r"\[.*\[INFO\]", line)]
    assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith(f"error: {name}")
    assert "password" not in errors[0] and not list(tmp_path.glob("sepsis-metrics-*"))


def test_the_script_tells_that_a_port_is_taken(config_path, model_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "api_server.py", "--port", str(taken.getsockname()[1]), "--monitor", "off"]
        command += ["--config", str(config_path), "--model", str(model_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "choose another with --port" in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    trouble = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if str(server.port) not in request.url else None)
    page.goto(f"http://localhost:{server.port}/")
    yield page
    context.close()
    assert not trouble


def test_a_person_tries_the_demo_patients(page, pipeline):
    page.get_by_role("button", name="Try the demo patients").click()
    visits = page.locator("#visits button")
    visits.first.wait_for()
    scores = pipeline.predict(json.loads(EXAMPLE.read_text()))
    best = scores.sort_values("sepsis_probability").iloc[-1]
    assert visits.count() == 8 and f"visit {best['visit_id']}" in visits.first.inner_text()
    level = pipeline.risk_level(best["sepsis_probability"])
    assert level in visits.first.locator(".badge").inner_text()  # a word, not a colour alone
    visits.nth(3).focus()
    page.keyboard.press("Enter")
    assert visits.nth(3).get_attribute("aria-pressed") == "true"
    number = re.search(r"visit (\d+)", visits.nth(3).inner_text())[1]
    assert f"Visit {number}" in page.locator("#detail h3").inner_text()
    assert page.locator("#detail .reasons li").count() == 6 and page.locator("#detail svg").count() >= 4
    assert "__" not in page.locator("#detail").inner_text()  # a ward's words
    chart = page.locator("#detail figure", has_text="heart rate (HR) in /min").first
    labels = chart.locator(".tick").all_text_contents()
    assert any(re.fullmatch(r"\d\d:\d\d|\d\d-\d\d", text) for text in labels)  # a time axis
    assert sum(re.fullmatch(r"\d+", text) is not None for text in labels) >= 2, labels  # and one of values
    assert page.locator("#detail .band").count() >= 1  # a reference range
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390  # nothing beyond a phone's edge


def test_a_person_pastes_csv_with_a_bad_row(page):
    header = "visit_id,client,observation_date,observation_type_code,observation_value\n"
    rows = '1,"Doe, J",2024-01-01 08:00,HR,120\n1,"Doe, J",2024-01-01 09:00,Temp,39.5\n2,x,2024-01-01 09:00,HR,?\n'
    page.get_by_label("Observations, as CSV").fill(header + rows)
    page.get_by_role("button", name="Score").click()
    page.locator("#visits button").first.wait_for()
    assert page.locator("#visits button").count() == 2
    assert "not a number (row 3)" in page.locator("#remarks").inner_text()
    unknown = page.locator("#visits .UNKNOWN")
    assert unknown.count() == 1 and "nothing usable" in unknown.inner_text()


@pytest.mark.parametrize("next_one", ["[{]", '[{"visit_id": 1}]'])
def test_what_cannot_be_scored_clears_the_patients_before(page, next_one):
    page.get_by_role("button", name="Try the demo patients").click()
    page.locator("#detail h3").wait_for()
    page.get_by_label("Observations, as CSV").fill(next_one)
    page.get_by_role("button", name="Score").click()
    page.locator("#status.bad").wait_for()
    assert page.locator("#visits button").count() == 0 and not page.locator("#results").is_visible()
    assert page.locator("#detail").text_content() == ""


@pytest.fixture
def strict_page(browser, models_dir, tmp_path):
    """The page of a service whose model needs three of four vital signs, and that has a site map."""
    (tmp_path / "codes.csv").write_text("code,concept,unit\nTEMPERATUR,temperature,[degF]\n")
    server = Server(tmp_path, models_dir, minimum=MINIMUM, SEPSIS_CODES=str(tmp_path / "codes.csv"))
    page = browser.new_page()
    page.goto(f"http://localhost:{server.port}/")
    yield page
    page.close()
    server.stop()


def test_unknown_and_stale_visits_look_like_no_low_risk(strict_page):
    page, now = strict_page, datetime.now(UTC)

    def rows(visit, hours, **values):
        time_ = (now - timedelta(hours=hours)).isoformat(timespec="seconds")
        return [f"{visit},x,{time_},{code.replace('_', ' ')},{value}" for code, value in values.items()]

    vitals = {"HR": 72, "SBP": 124, "Temp": 36.8, "Resp": 14}
    lines = ["visit_id,client,observation_date,observation_type_code,observation_value"]
    lines += rows(1, 1, PULSE_OXI=71, BLOOD_PRESSURE="70/40") + rows(2, 20, **vitals) + rows(3, 1, **vitals)
    lines += rows(4, -50, **vitals) + rows(3, 1, **{"8302-2": 180})
    page.get_by_label("Observations, as CSV").fill("\n".join(lines))
    page.get_by_role("button", name="Score").click()
    page.locator("#visits button").first.wait_for()

    def shown(visit):
        return page.locator("#visits button", has_text=f"visit {visit}")

    def look(visit):
        style = "e => [getComputedStyle(e).borderTopStyle, getComputedStyle(e).backgroundImage]"
        return shown(visit).evaluate(style)

    for visit, why in ((1, "too little measured"), (2, "data too old"), (4, "nothing usable")):
        text = shown(visit).inner_text()
        assert "UNKNOWN" in text and why in text and "%" not in text and "LOW" not in text
        assert look(visit) != look(3)
    assert "%" in shown(3).inner_text()
    shown(1).click()
    page.locator("#detail h3", has_text="Visit 1").wait_for()
    detail = page.locator("#detail").inner_text()
    assert "missing: heart rate, respiratory rate, temperature" in detail and "not mean that the risk is low" in detail
    assert "systolic blood pressure" in detail and "70 mmHg" in detail and "SpO2" in detail
    remarks = page.locator("#remarks").inner_text()
    assert "8302-2 (1)" in remarks and "4 not used: observation_date is more than 5 minutes later than now" in remarks
    page.get_by_role("button", name="Service").click()
    page.locator("#site td").first.wait_for()
    assert "TEMPERATUR" in page.locator("#site").inner_text()
    assert "3 of heart rate" in page.locator("#card").inner_text()
    assert "data too old" in page.locator("#unknown").inner_text()


def test_a_person_pastes_nonsense(page):
    page.get_by_label("Observations, as CSV").fill("[{]")
    page.get_by_role("button", name="Score").click()
    page.locator("#status.bad").wait_for()
    assert "cannot be read" in page.locator("#status").inner_text()


def test_a_person_pastes_many_visits_and_opens_one(page):
    """More than there are scores over time for at once; numbers that JavaScript would round; a row that is none."""
    row = {"client": "x", "observation_type_code": "HR", "observation_value": 90}
    rows = [
        {**row, "visit_id": 2**53 + i, "observation_date": f"2024-01-01T0{hour}:00:00"}
        for i in range(140)
        for hour in (1, 2)
    ]
    page.get_by_label("Observations, as CSV").fill("\ufeff" + json.dumps([None, *rows]))
    page.get_by_role("button", name="Score").click()
    page.locator("#visits button").first.wait_for()
    assert page.locator("#visits button").count() == 140
    assert "1 not used: not a row of the expected form" in page.locator("#remarks").inner_text()
    page.locator("#visits button", has_text="visit 9007199254740993").click()
    page.locator("#detail h3", has_text="Visit 9007199254740993").wait_for()
    assert page.locator("#detail .reasons li").count() == 6
    assert page.locator("#detail h4", has_text="Score over time").count() == 1


def test_a_person_looks_at_a_service_with_keys(browser, models_dir, tmp_path):
    key, line = new_key("ward")
    server = Server(tmp_path, models_dir, SEPSIS_API_KEYS=line)
    try:
        page = browser.new_page()
        page.goto(f"http://localhost:{server.port}/")
        page.get_by_role("button", name="Service").click()
        page.locator("#requests", has_text="needs an API key").wait_for()
        page.get_by_label("API key").fill(key)
        page.get_by_label("API key").press("Enter")
        page.locator("#card dd").first.wait_for()
        page.close()
    finally:
        server.stop()


def test_a_person_looks_at_the_service(page, pipeline):
    page.get_by_role("button", name="Service").click()
    page.locator("#card dd").first.wait_for()
    assert pipeline.model_version in page.locator("#card").inner_text()
    assert "/predict 200" in page.locator("#requests").inner_text()
    page.get_by_role("link", name="API").click()
    page.locator("#operations article").first.wait_for()
    assert "POST /predict" in page.locator("#operations").inner_text()


# --------------------------------------------------------------------------------------------- the script


def test_the_script_makes_keys_and_refuses_a_missing_model(tmp_path):
    command = [sys.executable, str(ROOT / "api_server.py")]
    made = subprocess.run(
        [*command, "--new-key", "ward", "--quiet"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert re.fullmatch(r"ward:[0-9a-f]{64}:score\+metrics\n", made.stdout) and re.search(r"sepsis_\S{43}", made.stderr)
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and "error: " in failed.stderr and "Traceback" not in failed.stderr
