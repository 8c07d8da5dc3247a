"""Where chunks are scored: here, in processes, on a Dask cluster."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from serving.batch.scoring import Deployment, Scores, install

MODEL_PREFIX = ".model."


CONNECT_SECONDS = 20  # to the Dask scheduler


class Here:
    """Computes in this process, at once."""

    slots = 1
    sends_content = False
    lost: tuple[type[Exception], ...] = ()

    def __init__(self, deployment: Deployment):
        install(deployment)

    def submit(self, function: Callable[..., Scores], *arguments: Any) -> Any:
        future: Future[Scores] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


def _start_worker(deployment: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a worker of a killed parent would wait for work forever
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    install(pickle.loads(deployment.read_bytes()))


class Processes(Here):
    """A pool of processes with the model loaded in each. Spawned, not forked: LightGBM hangs after fork."""

    lost = (BrokenProcessPool,)

    def __init__(self, deployment: Deployment, jobs: int, output_dir: Path):
        self.slots = jobs
        # by file: what a worker is started with goes through a pipe, and blocks for good where the worker dies first;
        # in the output directory, where the next run finds what a killed one has left
        self.folder = tempfile.TemporaryDirectory(dir=output_dir, prefix=MODEL_PREFIX)
        self.deployment = Path(self.folder.name, "deployment.pickle")
        self.deployment.write_bytes(pickle.dumps(deployment))
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(self.slots, context, initializer=_start_worker, initargs=(self.deployment,))

    def submit(self, function: Callable[..., Scores], *arguments: Any) -> Any:
        try:
            return self.pool.submit(function, *arguments)
        except BrokenProcessPool:  # a worker died, and the pool with it
            self._start()
            return self.pool.submit(function, *arguments)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.folder.cleanup()


class Dask(Here):
    """A Dask cluster. Files and parts travel as bytes, so workers need no common disk; a worker without this
    project's modules is sent them, and the model."""

    sends_content = True
    rooms = ("feature_pipeline.py", "common", "monitoring", "serving")

    def __init__(self, deployment: Deployment, scheduler: str):
        from distributed import Client, WorkerPlugin
        from distributed.client import FutureCancelledError
        from distributed.diagnostics.plugin import UploadFile
        from distributed.scheduler import KilledWorker

        self.lost = (KilledWorker, FutureCancelledError)
        self.client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        root = Path(__file__).parents[2]
        files = [path for room in self.rooms for path in (root / room, *(root / room).rglob("*.py")) if path.is_file()]
        expected = {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
        }

        def lacks_modules() -> bool:  # nested, so that its code travels
            import hashlib
            import importlib.util
            from pathlib import Path

            spec = importlib.util.find_spec("feature_pipeline")
            here = Path(spec.origin).parent if spec and spec.origin else None
            return not here or any(
                not (here / name).is_file() or hashlib.sha256((here / name).read_bytes()).hexdigest() != digest
                for name, digest in expected.items()
            )

        class LoadModel(WorkerPlugin):
            name = f"sepsis-model-{deployment.key}"

            def setup(self, worker: Any) -> None:
                from serving.batch.scoring import install

                install(deployment_there)

        deployment_there = deployment
        if any(self.client.run(lacks_modules).values()):
            with tempfile.TemporaryDirectory(prefix="sepsis-code-") as folder:
                archive = Path(folder, "sepsis_risk.zip")  # workers put it on their path
                with zipfile.ZipFile(archive, "w") as code:
                    for name in expected:
                        code.write(root / name, name)
                self.client.register_plugin(UploadFile(str(archive)))  # not client.upload_file: only workers need it
        self.client.register_plugin(LoadModel())
        self.slots = max(1, sum(self.client.nthreads().values()))

    def submit(self, function: Callable[..., Scores], *arguments: Any) -> Any:
        with warnings.catch_warnings():  # that a file is large; kept with its task, it outlives a lost worker
            warnings.filterwarnings("ignore", "Sending large graph")
            return self.client.submit(function, *arguments, pure=False)

    def close(self) -> None:
        self.client.close()


def in_order(backend: Here, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """The futures of the calls (function, arguments...), in order, with only so many at once in memory."""
    waiting: deque[Any] = deque()
    for call in calls:
        waiting.append(backend.submit(*call))
        if len(waiting) > 2 * backend.slots - 1:
            yield waiting.popleft()
    yield from waiting
