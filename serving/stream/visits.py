"""An open visit, and the key that identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Key = tuple[str, str]  # client, visit_id as texts
ROW = np.dtype([("code", "i4"), ("time", "i8"), ("value", "f8"), ("low", "f8"), ("high", "f8")])
RAW = np.dtype(f"V{ROW.itemsize}")  # the bytes of a `ROW`, which NumPy copies at once and not field by field
REMEMBERED = 1_000_000  # dropped visits, some 150 bytes each


@dataclass
class Visit:
    """One open visit. `rows` are its validated observations, in pieces of `RAW` without copies; `origin` is the feed's
    own."""

    client: Any  # as given
    visit_id: Any
    rows: list[np.ndarray] = field(default_factory=list)
    changed: bool = False  # since its last score
    full: bool = False
    folded: float | None = None  # observations older than so many hours may be no longer here
    seen: float = 0.0  # by the processor's steady clock
    level: str | None = None  # of the last score
    fresh_until: float = np.inf  # seconds since 1970; from then on its data are stale, whatever the last score said
    origin: Any = None
    # of a journal
    number: int = 0
    kept: bytes = b""  # its `content`
    fresh: list[np.ndarray] = field(default_factory=list)  # rows that are not kept yet
    rewrite: bool = False  # are kept rows gone from `rows`?
    pieces: int = 0  # in which the rows are kept
    n_rows_kept: int = 0  # when they were last written as one

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.rows))

    def content(self) -> bytes:
        """What must be known of it beside its rows."""
        names = ("client", "visit_id", "full", "folded", "level", "origin")
        return json.dumps({name: getattr(self, name) for name in names}).encode()


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all pieces, as `ROW`s."""
    return np.concatenate(pieces).view(ROW)


def mark_of(key: Key) -> bytes:
    """8 bytes by which a visit is told from a million others."""
    return hashlib.blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
