"""What was accepted, on disk: a killed process loses nothing that it acknowledged."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from artifacts import atomic_file
from command_line import log
from feature_pipeline import iso_times
from stream.processor import StreamProcessor


class Journal:
    """A file of JSON lines: the accepted observations, the alerts that were given; and, where it was written anew,
    which visits are not whole and what the codes meant (units are converted by it).

    Lines are written with one system call before they are acknowledged, so a process that is killed leaves at most a
    torn last line of what it never acknowledged. `compact` writes the file anew with the open visits alone.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._file: int | None = None
        self.lines = 0

    def load(self) -> dict[str, list[Any]]:
        """What an earlier process left, by kind: ``observation``, ``alert``, ``visit``, ``synonyms``."""
        entries: dict[str, list[Any]] = {"observation": [], "alert": [], "visit": [], "synonyms": []}
        torn = 0
        with contextlib.suppress(FileNotFoundError), self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    kind, content = json.loads(line)
                except ValueError:
                    torn += 1
                    continue
                entries[kind].append(content)
                self.lines += 1
        if torn:
            log.warning("%s: %d torn lines, never acknowledged, are left out", self.path.name, torn)
            with self.path.open("a") as file:
                file.write("\n")
        return entries

    def append(self, kind: str, entries: Iterable[Mapping[str, Any]]) -> None:
        """Writes ``observation`` or ``alert`` entries."""
        text = "".join(json.dumps([kind, entry]) + "\n" for entry in entries)
        if not text:
            return
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        rest = text.encode()
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self.lines += text.count("\n")

    def compact(self, processor: StreamProcessor, alerts: Iterable[Mapping[str, Any]]) -> None:
        """Keeps the observations of open visits, and their alerts."""
        kinds = {
            "synonyms": [processor.pipeline.config["synonyms"]],
            "observation": open_observations(processor),
            "visit": incomplete_visits(processor),
            "alert": alerts,
        }
        with atomic_file(self.path) as file:
            self.lines = 0
            for kind, entries in kinds.items():
                for entry in entries:
                    file.write((json.dumps([kind, entry]) + "\n").encode())
                    self.lines += 1
        self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


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


def incomplete_visits(processor: StreamProcessor) -> Iterable[dict[str, Any]]:
    """The open visits whose observations are not all kept."""
    for (client, visit_id), visit in processor.visits.items():
        if visit.full or visit.folded is not None:
            yield {"client": client, "visit_id": visit_id, "full": visit.full, "folded": visit.folded}
