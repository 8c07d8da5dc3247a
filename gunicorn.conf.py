"""Defaults of `gunicorn api_server:app`; options of the command line come before them.

TLS: --certfile and --keyfile, or a proxy such as examples/deployment/nginx.conf. Without API keys the service answers
through a Unix socket only (-b unix:PATH), or everybody with SEPSIS_INSECURE=1.
"""

import contextlib
import importlib
import os
import shutil
import socket
import struct
import sys
import tempfile

bind = "127.0.0.1:5000"
workers = min(os.cpu_count() or 1, 8)
# Scoring keeps one core busy a worker; the other threads read requests and write answers. A half-sent request holds its
# thread: clients that may be slow come through nginx (examples/deployment/nginx.conf), which waits for them.
worker_class = "serving.api.workers.Worker"
threads = 16
timeout = 60  # a worker that shows no life is replaced
graceful_timeout = 30  # to answer what was accepted, at a stop or a reload
keepalive = 5
max_requests = 50_000  # workers are renewed now and then, not all at once
max_requests_jitter = 5_000
preload_app = False  # the model is loaded in each worker: LightGBM's threads do not survive a fork
accesslog = None  # the service writes its own, without identifiers
control_socket_disable = True
STALLED_SECONDS = 10  # no thread waits longer for a client to send or to read
limit_request_line = 8_000  # the service itself refuses more than 2,000, in its own words
limit_request_fields = 50

# Counters of all workers are shared through files. SIGHUP reads this file again: the folder stays, and stays our own.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ["SEPSIS_METRICS_DIR"] = tempfile.mkdtemp(
        prefix="sepsis-metrics-"
    )


def on_starting(server):
    folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if name.endswith(".db"):
            os.unlink(os.path.join(folder, name))
    prepare(server)


def prepare(server):
    """Settings are checked once, before workers would fail one after the other; what workers share is made here."""
    from common.command_line import read_site_codes, spare_the_loaded
    from common.pseudonyms import Pseudonyms
    from feature_pipeline import BadConfig
    from serving.api.limits import check_rate_limit
    from serving.api.records import plain_log, share_pseudonym_key
    from serving.api.security import keep_keys
    from serving.api.settings import Settings
    from serving.api.trust import Clients

    plain_log()
    try:
        settings = Settings.from_environment()
        check_rate_limit(settings)
        read_site_codes(settings.codes)
        keep_keys(settings.api_keys)
        if settings.cds_clients:
            Clients(settings.cds_clients)
        share_pseudonym_key()
        Pseudonyms.from_environment()
    except BadConfig as error:
        print(f"error: {error}", file=sys.stderr)
        on_exit(server)
        sys.exit(2)
    # Loaded here, they cost a renewed worker no time. Nothing is used yet: LightGBM's threads do not survive a fork.
    for name in ("serving.api.app", "sklearn.linear_model", "lightgbm"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    spare_the_loaded()  # and a worker's first round of garbage collection does not copy it all


def on_reload(server):
    from common.command_line import log
    from feature_pipeline import BadConfig
    from serving.api.security import keep_keys
    from serving.api.settings import Settings

    try:
        keep_keys(Settings.from_environment().api_keys)
    except BadConfig as error:
        log.error("error: %s; the keys stay as they were", error)


def when_ready(server):
    # connections inherit the option from the socket they are accepted on
    for listener in server.LISTENERS:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            listener.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALLED_SECONDS, 0))


def post_worker_init(worker):
    """Loads the model before the first request; without one the worker still answers /health and says 503."""
    from common.command_line import spare_the_loaded
    from serving.api.service import NoModel

    sys.setswitchinterval(0.001)  # a small request waits less for a large one that is read beside it
    with contextlib.suppress(NoModel):
        worker.wsgi.service.pipeline()
    spare_the_loaded()


def child_exit(server, worker):
    from prometheus_client import multiprocess

    from serving.api.workers import Worker

    multiprocess.mark_process_dead(worker.pid)
    if isinstance(worker, Worker):  # --worker-class may name another
        worker.forget()


def on_exit(server):
    if folder := os.environ.get("SEPSIS_METRICS_DIR"):
        shutil.rmtree(folder, ignore_errors=True)
