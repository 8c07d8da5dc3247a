"""Counts of requests for the rate limit, over all workers of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from limits import parse_many
from limits.errors import ConfigurationError
from limits.storage import Storage, storage_from_string

from feature_pipeline import BadConfig
from serving.api.settings import Settings


def check_rate_limit(settings: Settings) -> None:
    """Raises `BadConfig` for a limit or a storage that cannot be: the limit would be off, and nobody would notice."""
    try:
        parse_many(settings.rate_limit)
    except ValueError:
        raise BadConfig(f"SEPSIS_RATE_LIMIT is {settings.rate_limit!r}; expected a limit as 1200/minute") from None
    if settings.rate_storage:
        try:
            storage_from_string(settings.rate_storage)
        except (ConfigurationError, ValueError) as error:  # the URL may hold a password
            missing = "prerequisite" in str(error)
            why = "needs a library that is not installed (pip install redis)" if missing else "is no storage's URL"
            raise BadConfig(f"SEPSIS_RATE_STORAGE {why}; expected redis://HOST:6379") from None


class SharedCounts(Storage):
    """Counters of fixed windows in memory that all threads and all of gunicorn's workers share.

    The library's own `MemoryStorage` counts for one process, and starts a timer at nearly every request; where two
    threads meet it starts the same timer twice, which costs a request ("threads can only be started once"). The lock is
    one of a file: the system releases it where a worker is killed.
    """

    STORAGE_SCHEME: ClassVar[list[str]] = ["workers"]
    SLOTS: ClassVar[int] = 16_384  # of a key each: its hash, its count, the end of its window
    PROBES: ClassVar[int] = 16  # slots that a key may have; where all are taken, the smallest count is lost

    def __init__(self, uri: str | None = None, wrap_exceptions: bool = False, **options: float | str | bool):
        super().__init__(uri, wrap_exceptions, **options)
        self._threads = threading.Lock()
        shared, size = os.environ.get("PROMETHEUS_MULTIPROC_DIR"), self.SLOTS * _SLOT.size
        self._file = os.open(Path(shared, "limits"), os.O_RDWR | os.O_CREAT, 0o600) if shared else None
        if self._file is not None:
            os.ftruncate(self._file, size)
        self._slots = mmap.mmap(-1 if self._file is None else self._file, size)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._threads:
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                if self._file is not None:
                    fcntl.flock(self._file, fcntl.LOCK_UN)

    def _place(self, key: str, now: float) -> tuple[int, int, int, float]:
        """(offset of the key's slot, its hash, its count, the end of its window); a count of 0 where it has none."""
        own = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        best, least = 0, 1 << 62
        for probe in range(self.PROBES):
            offset = (own + probe) % self.SLOTS * _SLOT.size
            hashed, count, end = _SLOT.unpack_from(self._slots, offset)
            if hashed == own and end > now:
                return offset, own, count, end
            if (value := count if end > now else -1) < least:
                best, least = offset, value
        return best, own, 0, now

    @property
    def base_exceptions(self) -> type[Exception]:
        return OSError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        now = time.time()
        with self._locked():
            offset, own, count, end = self._place(key, now)
            _SLOT.pack_into(self._slots, offset, own, count + amount, end if count else now + expiry)
        return count + amount

    def get(self, key: str) -> int:
        with self._locked():
            return self._place(key, time.time())[2]

    def get_expiry(self, key: str) -> float:
        with self._locked():
            return self._place(key, time.time())[3]

    def check(self) -> bool:
        return True

    def reset(self) -> None:
        with self._locked():
            self._slots[:] = bytes(len(self._slots))

    def clear(self, key: str) -> None:
        with self._locked():
            offset, own, _, _ = self._place(key, time.time())
            _SLOT.pack_into(self._slots, offset, own, 0, 0.0)


_SLOT = struct.Struct("<QQd")
