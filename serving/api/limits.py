"""Counts of requests for the rate limit, in this process' memory."""

from __future__ import annotations

import threading
import time
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


class ThreadSafeMemory(Storage):
    """Counters of fixed windows, for many threads.

    The library's own `MemoryStorage` starts a timer at nearly every request, and where two threads meet it starts the
    same timer twice, which costs a request ("threads can only be started once"). Here a lock and a look at the clock
    do the same.
    """

    STORAGE_SCHEME: ClassVar[list[str]] = ["threads"]
    MOST_KEYS: ClassVar[int] = 10_000  # expired ones are dropped when so many are there

    def __init__(self, uri: str | None = None, wrap_exceptions: bool = False, **options: float | str | bool):
        super().__init__(uri, wrap_exceptions, **options)
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[int, float]] = {}  # key: (requests in the window, end of the window)

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        now = time.time()
        with self._lock:
            count, end = self._counts.get(key, (0, 0.0))
            if end <= now:
                if len(self._counts) >= self.MOST_KEYS:
                    self._counts = {k: v for k, v in self._counts.items() if v[1] > now}
                count, end = 0, now + expiry
            self._counts[key] = count + amount, end
        return count + amount

    def get(self, key: str) -> int:
        count, end = self._counts.get(key, (0, 0.0))
        return count if end > time.time() else 0

    def get_expiry(self, key: str) -> float:
        return self._counts.get(key, (0, time.time()))[1]

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        with self._lock:
            n, self._counts = len(self._counts), {}
        return n

    def clear(self, key: str) -> None:
        with self._lock:
            self._counts.pop(key, None)
