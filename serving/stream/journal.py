"""What was accepted, on disk: a killed process loses nothing that it acknowledged."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import atomic_file, locked
from common.command_line import log
from feature_pipeline import BadConfig, iso_times
from serving.stream.processor import StreamProcessor, Visit

# what the content of an entry must have, by kind
KINDS: dict[str, frozenset[str]] = {
    "observation": frozenset(),  # as it came, be it what it may
    "visit": frozenset({"client", "visit_id"}),
    "alert": frozenset({"alert_id", "client", "visit_id", "risk_level", "timestamp"}),
    "sent": frozenset(),  # the ids of alerts that need not be sent again
    "dropped": frozenset(),  # marks of dropped visits
    "given": frozenset(),  # the scores of all that stands before are out
    "synonyms": frozenset(),
}
MARKS_A_LINE = 1000


class Journal:
    """A file of JSON lines: the accepted observations, the alerts that were given, the risk levels of visits, which
    visits were dropped; and, where it was written anew, which visits are not whole and what the codes meant (units are
    converted by it).

    Lines are written with one system call before they are acknowledged, so a process that is killed leaves at most a
    torn last line of what it never acknowledged. `compact` writes the file anew with the open visits alone. One process
    has a journal at a time: a lock file beside it says so. Raises `BadConfig` where another has it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._file: int | None = None
        self.lines = 0
        self._lock = contextlib.ExitStack()
        if not self._lock.enter_context(locked(f"{self.path}.lock", wait=False)):
            self._lock.close()
            raise BadConfig(
                f"state file {str(self.path)!r} belongs to a stream that runs just now; give each its own --state"
            )

    def load(self) -> dict[str, list[Any]]:
        """What an earlier process left, by kind; ``given`` holds how many observations stood before its last mark.

        Raises `BadConfig` for a file that is no journal: nothing in it is changed.
        """
        entries: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        torn = 0
        with contextlib.suppress(FileNotFoundError), self.path.open(encoding="utf-8", errors="replace") as file:
            for n, line in enumerate(file, 1):
                if not line.strip():
                    continue
                entry = _read(line)
                if entry is None and not _torn(line, self.lines):
                    raise BadConfig(
                        f"{str(self.path)!r} is not a state file of this program (line {n}); it is left as it is: "
                        "give --state another name"
                    )
                if entry is None:
                    torn += 1
                    continue
                kind, content = entry
                if kind == "given":
                    entries["given"] = [len(entries["observation"])]
                else:
                    entries[kind].append(content)
                self.lines += 1
        if torn:
            log.warning("%s: %d torn lines, never acknowledged, are left out", self.path.name, torn)
            self._write(b"\n")
        return entries

    def append(self, kind: str, entries: Iterable[Any]) -> None:
        """Writes entries of one of the `KINDS`. Raises `OSError`, with nothing left of them in the file."""
        text = "".join(json.dumps([kind, entry]) + "\n" for entry in entries)
        if not text:
            return
        self._write(text.encode())
        self.lines += text.count("\n")

    def _write(self, rest: bytes) -> None:
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        end = os.fstat(self._file).st_size
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, end)  # on a full disk half a line, to which the next would be glued
            raise OSError(error.errno, f"the state cannot be kept: {error.strerror}", str(self.path)) from None

    def compact(self, processor: StreamProcessor, alerts: Iterable[Mapping[str, Any]], unsent: Container[str]) -> None:
        """Keeps the observations of open visits, and their alerts; of these `unsent` names those still to be sent.

        All scores that were due must be out.
        """
        alerts = list(alerts)
        marks = [mark.hex() for mark in processor.dropped_marks()]
        kinds = {
            "synonyms": [processor.pipeline.config.synonyms],
            "observation": open_observations(processor),
            "visit": (
                visit_entry(visit) for visit in processor.visits.values() if visit.level or visit.full or visit.folded
            ),
            "alert": alerts,
            "sent": [[alert["alert_id"] for alert in alerts if alert["alert_id"] not in unsent]],
            "dropped": (marks[i : i + MARKS_A_LINE] for i in range(0, len(marks), MARKS_A_LINE)),
            "given": [None],
        }
        with atomic_file(self.path) as file:
            lines = 0
            for kind, entries in kinds.items():
                for entry in entries:
                    file.write((json.dumps([kind, entry]) + "\n").encode())
                    lines += 1
        self.lines = lines
        self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Lets another process have the file."""
        self._end_file()
        self._lock.close()


def _read(line: str) -> tuple[str, Any] | None:
    """(kind, content) of a line; None where it is no entry."""
    try:
        kind, content = json.loads(line)
        needed = KINDS[kind]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if needed and not (isinstance(content, dict) and needed <= content.keys()):
        return None
    if kind in ("sent", "dropped") and not (isinstance(content, list) and all(isinstance(c, str) for c in content)):
        return None
    return kind, content


def _torn(line: str, before: int) -> bool:
    """Can it be what a killed process left of an entry, `before` whole ones standing before it?"""
    if not line.endswith("\n") and before:
        return True
    start = line.strip()[:2]
    whole = True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        whole = False
    return not whole and '["'.startswith(start)


def visit_entry(visit: Visit) -> dict[str, Any]:
    """What `StreamProcessor.restore` takes."""
    return {
        "client": visit.client,
        "visit_id": visit.visit_id,
        "full": visit.full,
        "folded": visit.folded,
        "level": visit.level,
    }


def open_observations(processor: StreamProcessor) -> Iterable[dict[str, Any]]:
    """The observations of all open visits as records that read back to the same numbers."""
    codes = processor.codes
    for visit in processor.visits.values():
        for rows in visit.rows:
            times = iso_times(rows["time"])
            bounds = [[None if np.isnan(v) else v for v in rows[name].tolist()] for name in ("low", "high")]
            for code, time, value, low, high in zip(
                rows["code"].tolist(), times, rows["value"].tolist(), *bounds, strict=True
            ):
                yield {
                    "visit_id": visit.visit_id,
                    "client": visit.client,
                    "observation_date": time,
                    "observation_type_code": codes[code],
                    "observation_value": value,
                    "reference_range_min": low,
                    "reference_range_max": high,
                }
