"""Counts of requests for the rate limit, over all workers of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import time
from pathlib import Path
from typing import ClassVar

from limits import RateLimitItem, parse, parse_many
from limits.errors import ConfigurationError
from limits.storage import storage_from_string

from common.command_line import log
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


WRONG_KEYS = parse("20/minute")  # from one address; beyond them wrong keys are not even looked at
AWAY_SECONDS = 10  # until a store of counts that failed is asked again


class Limits:
    """Counts requests, and refuses those of a client that are too many.

    A store of counts that fails costs no request: until it is back, this machine counts alone.
    """

    def __init__(self, settings: Settings):
        self._limits = sorted(parse_many(settings.rate_limit))
        self._own = SharedCounts()
        self._store = storage_from_string(settings.rate_storage) if settings.rate_storage else None
        self._away_until = 0.0  # by the monotonic clock

    def count(self, who: str) -> tuple[dict[str, str], RateLimitItem | None]:
        """Counts a request. Returns the headers that tell a client its limit, and a limit that is exceeded, if any."""
        headers: dict[str, str] = {}
        for limit in self._limits:
            n, end = self._hit(limit, who)
            exceeded = n > limit.amount
            if exceeded or not headers:
                headers = {
                    "X-RateLimit-Limit": str(limit.amount),
                    "X-RateLimit-Remaining": str(max(limit.amount - n, 0)),
                    "X-RateLimit-Reset": str(int(end) + 1),
                }
            if exceeded:
                return {**headers, "Retry-After": str(max(int(end - time.time()) + 1, 1))}, limit
        return headers, None

    def too_many_wrong_keys(self, address: str) -> bool:
        """Counts a wrong key that came from this address."""
        return self._hit(WRONG_KEYS, f"wrong-key:{address}")[0] > WRONG_KEYS.amount

    def _hit(self, limit: RateLimitItem, who: str) -> tuple[int, float]:
        """(requests of the window with this one, the window's end); 0 requests if nothing can be counted."""
        key = limit.key_for(who)
        if self._store is not None and time.monotonic() >= self._away_until:
            try:
                return self._store.incr(key, limit.get_expiry()), self._store.get_expiry(key)
            except Exception as error:  # each kind of store has its own
                self._away_until = time.monotonic() + AWAY_SECONDS
                log.warning(
                    "the store of counts for rate limits fails: %s; this machine counts alone", type(error).__name__
                )
        try:
            return self._own.hit(key, limit.get_expiry())
        except OSError as error:
            log.error("error: requests cannot be counted: %s", type(error).__name__)
            return 0, time.time()


class SharedCounts:
    """Counters of fixed windows in memory that all threads and all of gunicorn's workers share. The lock is one of a
    file: the system releases it where a worker is killed."""

    SLOTS: ClassVar[int] = 16_384  # of a key each: its hash, its count, the end of its window
    PROBES: ClassVar[int] = 16  # slots that a key may have; where all are taken, the smallest count is lost

    def __init__(self):
        self._threads = threading.Lock()
        shared, size = os.environ.get("PROMETHEUS_MULTIPROC_DIR"), self.SLOTS * _SLOT.size
        self._file = os.open(Path(shared, "limits"), os.O_RDWR | os.O_CREAT, 0o600) if shared else None
        if self._file is not None:
            os.ftruncate(self._file, size)
        self._slots = mmap.mmap(-1 if self._file is None else self._file, size)

    def hit(self, key: str, seconds: float) -> tuple[int, float]:
        """Counts one more: (the count of the key's window, the window's end). A new window takes `seconds`."""
        own = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        with self._threads:
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                now = time.time()
                offset, count, end = self._place(own, now)
                count, end = count + 1, end if count else now + seconds
                _SLOT.pack_into(self._slots, offset, own, count, end)
            finally:
                if self._file is not None:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
        return count, end

    def _place(self, own: int, now: float) -> tuple[int, int, float]:
        """(offset of the slot of a hash, its count, the end of its window); a count of 0 where it has none."""
        best, least = 0, 1 << 62
        for probe in range(self.PROBES):
            offset = (own + probe) % self.SLOTS * _SLOT.size
            hashed, count, end = _SLOT.unpack_from(self._slots, offset)
            if hashed == own and end > now:
                return offset, count, end
            if (value := count if end > now else -1) < least:
                best, least = offset, value
        return best, 0, now


_SLOT = struct.Struct("<QQd")
