"""The stream's own time, which a step of the system's clock does not move."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.command_line import log

SLEW = 60.0  # seconds by which the system's clock may differ without having been stepped
NEAR = 3600.0  # seconds from an observation to the time at which it arrives


class OwnTime:
    """Goes on from the first reading of the system's clock by a steady one.

    If the system's clock was stepped, `judge` follows it only if newly arrived observations agree with it.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic):
        self.wall, self.steady = wall, steady
        self._offset = wall() - steady()
        self._told = False

    def now(self) -> float:
        """Seconds since 1970."""
        return self._offset + self.steady()

    def latest(self) -> float:
        """The later of this time and the system's: no observation can be of a later one."""
        return max(self.now(), self.wall())

    def judge(self, newest: float) -> None:
        """Compares both times with the newest observation (seconds since 1970) of those that have just arrived."""
        wall, own = self.wall(), self.now()
        if abs(wall - own) <= SLEW:
            self._offset, self._told = wall - self.steady(), False
        elif abs(newest - wall) < NEAR < abs(newest - own):
            self._offset, self._told = wall - self.steady(), False
            log.warning("the stream follows the system's clock, which was stepped by %.0f s", wall - own)
        elif not self._told:
            self._told = True
            log.warning("the system's clock was stepped by %.0f s; the stream goes by its own time", wall - own)
