"""Where files and their parts are scored: in threads of this process, or in processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from common.command_line import available_cores
from serving.batch.scoring import Deployment, install

MODEL_PREFIX = ".model."


class Threads:
    """Computes in this process. Arrow, NumPy and LightGBM work side by side on two cores."""

    slots = min(2, available_cores())  # more would wait for Python's lock
    lost: tuple[type[Exception], ...] = ()

    def __init__(self, deployment: Deployment):
        install(deployment)
        self.reader = self  # the threads that read a large file
        self.pool: Executor = ThreadPoolExecutor(self.slots)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.pool.submit(function, *arguments)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """As the builtin `map`, several at once."""
        return (future.result() for future in in_order(self, ((function, item) for item in items)))

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(deployment: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a worker of a killed parent would wait for work forever
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    install(pickle.loads(deployment.read_bytes()))


class Processes(Threads):
    """A pool of processes with the model loaded in each. Spawned, not forked: LightGBM hangs after fork."""

    lost = (BrokenProcessPool,)

    def __init__(self, deployment: Deployment, jobs: int, output_dir: Path):
        self.slots, self.reader = jobs, Threads(deployment)
        # by file: what a worker is started with goes through a pipe, and blocks for good where the worker dies first;
        # in the output directory, where the next run finds what a killed one has left
        self.folder = tempfile.TemporaryDirectory(dir=output_dir, prefix=MODEL_PREFIX)
        self.deployment = Path(self.folder.name, "deployment.pickle")
        self.deployment.write_bytes(pickle.dumps(deployment))
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(self.slots, context, initializer=_start_worker, initargs=(self.deployment,))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return super().submit(function, *arguments)
        except (BrokenProcessPool, BrokenPipeError):  # a worker died, at work or as it was started
            self._start()
            return super().submit(function, *arguments)

    def close(self) -> None:
        self.reader.close()
        super().close()
        self.folder.cleanup()


def in_order(backend: Threads, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """The futures of the calls (function, arguments...), in order, with only so many at once in memory."""
    waiting: deque[Any] = deque()
    for call in calls:
        waiting.append(backend.submit(*call))
        if len(waiting) > backend.slots:
            yield waiting.popleft()
    yield from waiting
