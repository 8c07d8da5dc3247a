"""A challenger in the shadow of the deployed model: it scores the same visits, is logged, and is shown to nobody.

It works in a thread of its own, takes a limited share of a core, and leaves out what it cannot do in time: the deployed
model neither waits for it nor fails with it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from multiprocessing.util import Finalize  # unlike atexit, also at the end of a worker of a pool
from pathlib import Path

import numpy as np

from common.command_line import log
from common.shadow import SHADOW, challenger, read_shadow
from feature_pipeline import FeaturePipelineError, Observations, ProductionPipeline
from monitoring.log import OFF, PredictionLog, url_of

SHARE = 0.25  # of one core, at most
WAITING = 64  # calls that may wait; more are left out
LOOK_SECONDS = 5.0  # between looks for another challenger
LAST_SECONDS = 15.0  # for what still waits when the process ends


class Shadow:
    """What is scored by one challenger in this process. `score` neither waits nor raises."""

    def __init__(self, pipeline: ProductionPipeline, source: str, monitor: str | None):
        self.pipeline, self.left_out = pipeline, 0
        self._log = PredictionLog.open(monitor, pipeline, source, shadow=True)
        self._waiting: queue.Queue = queue.Queue(WAITING)
        self._starting, self._thread = threading.Lock(), None
        self._ending, self._problems = threading.Event(), set()

    def score(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> None:
        try:
            self._waiting.put_nowait((observations, visit, as_of))
        except queue.Full:
            self.left_out += len(visit)
            self._tell("the challenger %s cannot keep up: it leaves out visits", self.pipeline.model_version)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, daemon=True, name="shadow")
                    self._thread.start()
                    self._at_end = Finalize(None, self.close, exitpriority=1)

    def _tell(self, text: str, *values: object) -> None:
        """Logs each problem once."""
        if text not in self._problems:
            self._problems.add(text)
            log.warning(text, *values)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            began = time.perf_counter()
            try:
                found = self.pipeline.assess(*job)
                self._log.record(*job, found, time.perf_counter() - began)
            except Exception as error:  # whatever it is, the deployed model goes on
                self._tell(f"the challenger %s fails: {type(error).__name__}", self.pipeline.model_version)
            self._ending.wait((time.perf_counter() - began) * (1 / SHARE - 1))
        self._log.close()

    def stop(self) -> None:
        """Ends the thread after what waits, without waiting for it."""
        self._ending.set()
        if self._thread is None:
            return self._log.close()
        self._at_end.cancel()
        while True:
            try:
                return self._waiting.put_nowait(None)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()

    def close(self) -> None:
        """At the end of the process: what waits is scored, for `LAST_SECONDS` at most."""
        self.stop()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)
        if self.left_out:
            log.warning("the challenger %s left out %d scores", self.pipeline.model_version, self.left_out)


class Shadows:
    """The shadow of one deployed model, as the file beside its config has it from time to time."""

    def __init__(self, pipeline: ProductionPipeline, source: str, monitor: str | None, directory: Path | None = None):
        self._deployed, self._serving = pipeline, (source, monitor)
        self._directory = directory or pipeline.directory
        self._file = self._directory / SHADOW
        self._looked, self._renewing = time.monotonic(), threading.Lock()
        self._current: Shadow | None = None
        self._stamp = _stamp(self._file)
        if self._stamp is not None:
            self._renew()

    def score(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> None:
        """Has the challenger score too, if there is one."""
        if (now := time.monotonic()) - self._looked >= LOOK_SECONDS:
            self._looked, stamp = now, _stamp(self._file)
            if stamp != self._stamp:
                self._stamp = stamp
                threading.Thread(target=self._renew, daemon=True).start()
        if (current := self._current) is not None:
            current.score(observations, visit, as_of)

    def _renew(self) -> None:
        with self._renewing:
            self.stop()
            try:
                version = read_shadow(self._directory)
                if version is None or version == self._deployed.model_version:
                    return
                if url_of(self._serving[1]) == OFF:
                    log.warning("no model runs in the shadow: there is no prediction log")
                    return
                self._current = Shadow(challenger(self._deployed, self._directory, version), *self._serving)
                log.info("model %s runs in the shadow", version)
            except Exception as error:  # whatever it is, the deployed model goes on
                text = error if isinstance(error, FeaturePipelineError) else type(error).__name__
                log.error("error: %s; no model runs in the shadow", text)

    def stop(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            current.stop()


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
