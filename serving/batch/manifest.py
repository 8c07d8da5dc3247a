"""What the runs over a directory have finished."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from common.artifacts import write_atomic

MANIFEST = "manifest.jsonl"


class Manifest:
    """What is finished: a JSON line a file, the last one counts. A torn last line is an unfinished file."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self.entries[entry["file"]] = {"state": None, "config": None} | entry
        self._n_lines = len(lines)

    def other_input(self, input_dir: Path) -> str | None:
        """A directory other than `input_dir` that has a file of which the predictions lie here."""
        for entry in self.entries.values():
            place = entry.get("input_dir", "")
            if place not in ("", str(input_dir.resolve())) and Path(place, entry["file"]).exists():
                return place
        return None

    def keep(self, names: set[str]) -> None:
        """Forgets files that are gone, and writes the rest anew where much of it is old."""
        self.entries = {name: entry for name, entry in self.entries.items() if name in names}
        if self._n_lines > 2 * len(self.entries) + 100:
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries.values())
            write_atomic(self.path, text)
            self._n_lines = len(self.entries)

    def add(self, entry: dict[str, Any]) -> None:
        self.entries[entry["file"]] = entry
        with open(self.path, "ab+") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._n_lines += 1
