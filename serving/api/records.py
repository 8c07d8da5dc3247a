"""Who asked what: JSON lines for the access log and the audit log, without values and without names of patients."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import stat
import sys
import traceback
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.command_line import log
from common.pseudonyms import KEY_VARIABLE
from serving.api import metrics


class Lines:
    """Appends JSON objects to a file, each by one system call, so that processes never mix theirs.

    The file stays open until it is no longer at its path: a log that was rotated away is begun anew. ``-`` is stderr,
    empty is none.
    """

    def __init__(self, path: str, name: str):
        self.path, self.name = path, name
        self._opened: tuple[io.FileIO, os.stat_result] | None = None

    def write(self, **entry: Any) -> None:
        if not self.path:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "log": self.name, **entry}, separators=(",", ":")) + "\n"
        if self.path == "-":
            sys.stderr.write(line)
            return
        try:
            self._append(line.encode())
        except OSError as error:
            metrics.LOG_ERRORS.labels(self.name).inc()
            log.error("error: the %s log cannot be written: %s", self.name, error.strerror)

    def _append(self, line: bytes) -> None:
        opened = self._opened
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            found = None
        if found is None or opened is None or not os.path.samestat(found, opened[1]):
            opened = self._opened = self._open()
            found = opened[1]
        file, size = opened[0], found.st_size if stat.S_ISREG(found.st_mode) else 0
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # a line that was torn by a full disk
            line = b"\n" + line
        file.write(line)

    def _open(self) -> tuple[io.FileIO, os.stat_result]:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            descriptor = os.open(self.path, flags, 0o600)
        file = io.FileIO(descriptor, "r+", closefd=False)
        weakref.finalize(file, os.close, descriptor)  # when no thread writes to it any more
        return file, os.fstat(descriptor)


def plain_log() -> None:
    """The log on stderr, for gunicorn's processes, where no script has set it up."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stderr))
        log.setLevel(logging.INFO)


def share_pseudonym_key() -> None:
    """Makes a key where none is set: both logs, and all workers that are forked, then have one name for a visit."""
    if not os.environ.get(KEY_VARIABLE):
        os.environ[KEY_VARIABLE] = secrets.token_urlsafe(32)
        log.info(
            "%s is not set: a random key is used for this run; visits in the audit log and the prediction log cannot "
            "be looked up, or joined to outcomes, later",
            KEY_VARIABLE,
        )


def code_places(error: BaseException) -> str:
    """An unexpected error for the log: its type and the lines of code, the innermost first. Its text may hold names."""
    places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' < '.join(reversed(places))}"
