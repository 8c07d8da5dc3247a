"""Where an interface engine puts the visit and the client in HL7 v2 messages, which events count, and its time zone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from feature_pipeline import BadConfig, listed

EXAMPLE = '{"visit": ["PV1-19", "PID-18"], "client": ["PID-3:MR"], "zone": "Europe/Berlin", "events": ["R01", "R30"]}'
# of results: R01, from the point of care R30 to R32, waveforms and alarms R40; version 2.1 names none
EVENTS = frozenset({"", "R01", "R30", "R31", "R32", "R40"})
# OBX-11: deleted, pending, not asked, not verified, no result obtained, wrong patient or sample
NOT_RESULTS = frozenset({"D", "I", "N", "O", "R", "W", "X"})
_PLACE = re.compile(r"(PID|PV1)-(\d{1,2})(?:\.(\d{1,2}))?(?::(\w+))?")


@dataclass(frozen=True)
class Place:
    """A component of a field; with `kind` of the repetition whose identifier type code (CX.5) it is."""

    segment: str
    field: int
    component: int = 1
    kind: str | None = None

    @classmethod
    def parse(cls, text: Any) -> Place:
        """``PV1-19``, ``PID-3.1``, ``PID-3:VN``. Raises `ValueError`."""
        match = _PLACE.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise ValueError(f"{text!r} is no place such as PV1-19 or PID-3:VN")
        return cls(match[1], int(match[2]), int(match[3] or 1), match[4])

    def __str__(self) -> str:
        component = f".{self.component}" if self.component > 1 else ""
        return f"{self.segment}-{self.field}{component}" + (f":{self.kind}" if self.kind else "")


@dataclass(frozen=True)
class Hl7Mapping:
    """`visit` and `client` are looked for in these places, in their order. `zone` is that of times which name none,
    neither themselves nor in MSH-7. `events` are the values of MSH-9.2 that are taken, `not_results` those of OBX-11
    that are left out: monitors send every value as not verified (R)."""

    visit: tuple[Place, ...] = (Place("PV1", 19),)
    client: tuple[Place, ...] = (Place("PID", 3),)
    zone: tzinfo | None = None
    events: frozenset[str] = EVENTS
    not_results: frozenset[str] = NOT_RESULTS

    def in_zone(self, iso: str) -> str:
        """A wall-clock time with the offset of `zone`."""
        return iso if self.zone is None else datetime.fromisoformat(iso).replace(tzinfo=self.zone).isoformat()


USUAL = Hl7Mapping()


def read_hl7_mapping(path: str | Path | None) -> Hl7Mapping:
    """The mapping in a JSON file, such as `EXAMPLE`; what it leaves out keeps its default. Raises `BadConfig`."""
    if path is None:
        return USUAL
    where = f"HL7 mapping {str(path)!r}"
    readers: dict[str, Callable[[Any], Any]] = {
        "visit": lambda names: tuple(map(Place.parse, names)),
        "client": lambda names: tuple(map(Place.parse, names)),
        "zone": _zone,
        "events": lambda names: frozenset(str(name).upper() for name in names),
        "not_results": lambda names: frozenset(str(name).upper() for name in names),
    }
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(given, dict) or set(given) - set(readers):
            raise ValueError(f"expected an object with some of {listed(readers)}")
        if not all(isinstance(given[name], list) and given[name] for name in set(given) - {"zone"}):
            raise ValueError("visit, client, events and not_results must be lists")
        return Hl7Mapping(**{name: readers[name](value) for name, value in given.items()})
    except (OSError, ValueError, KeyError) as error:
        raise BadConfig(f"{where}: {' '.join(str(error).split())[:200]}; expected a file such as {EXAMPLE}") from None


def _zone(name: Any) -> tzinfo:
    """``+0100`` or a name of the time zone database."""
    if match := re.fullmatch(r"([+-])(\d\d):?(\d\d)", str(name)):
        offset = timedelta(hours=int(match[2]), minutes=int(match[3]))
        return timezone(-offset if match[1] == "-" else offset)
    return ZoneInfo(str(name))  # raises `KeyError` (ZoneInfoNotFoundError), `ValueError`
