"""Keyed hashes that stand for clients and visits wherever names must not appear: logs, metrics, exports.

``pseudonymized`` makes a table of observations or labels fit to be handed on.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

import numpy as np
import pandas as pd

from feature_pipeline import COLUMNS, MICROSECONDS_PER_HOUR, NO_TIME, BadConfig, iso_times, parse_times, text_places

KEY_VARIABLE = "SEPSIS_PSEUDONYM_KEY"
SHORTEST_KEY = 16  # characters
LONGEST_SHIFT = 3652  # days
DATES = ("observation_date", "sepsis_onset")
MICROSECONDS_PER_DAY = 24 * MICROSECONDS_PER_HOUR
UNREADABLE = "unreadable"  # stands for what a date should have been, and may be anything


class Pseudonyms:
    """HMAC-SHA256 under one key: the same name gives the same pseudonym, and nobody without the key can tell whose.

    `lasting` says whether the key outlives this process; without one, pseudonyms cannot be joined to outcomes later.
    """

    def __init__(self, key: str | None = None):
        if key and len(key) < SHORTEST_KEY:
            raise BadConfig(f"{KEY_VARIABLE} is shorter than {SHORTEST_KEY} characters; make one of random characters")
        self.lasting = bool(key)
        self._key = key.encode() if key else secrets.token_bytes(32)

    @classmethod
    def from_environment(cls) -> Pseudonyms:
        """Under the key in the environment variable `KEY_VARIABLE`, or a random one where it is not set."""
        return cls(os.environ.get(KEY_VARIABLE))

    def digest(self, *texts: str) -> bytes:
        """(32 bytes) of texts that together name one thing; ("a", "bc") and ("ab", "c") differ."""
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, message, hashlib.sha256)

    def visit(self, client: str, visit_id: str) -> str:
        """16 hexadecimal digits for a visit, from its client and visit number as texts."""
        return self.digest("visit", client, visit_id).hex()[:16]

    def client(self, client: str) -> str:
        """16 hexadecimal digits for a client."""
        return self.digest("client", client).hex()[:16]

    def shift_days(self, client: str) -> int:
        """By how many days all dates of a client are moved into the past, 1 to `LONGEST_SHIFT`: whole days, since the
        hour of the day is a feature."""
        return 1 + int.from_bytes(self.digest("shift", client)[:8], "big") % LONGEST_SHIFT


def lasting_pseudonyms() -> Pseudonyms:
    """Those of the environment. Raises `BadConfig` without a key: files made apart from one another would not fit."""
    pseudonyms = Pseudonyms.from_environment()
    if not pseudonyms.lasting:
        raise BadConfig(f"{KEY_VARIABLE} is not set: pseudonyms need a key, kept apart from the files")
    return pseudonyms


def pseudonymized(frame: pd.DataFrame, pseudonyms: Pseudonyms, also: tuple[str, ...] = ()) -> pd.DataFrame:
    """A table of observations or labels with client and visit replaced and its dates shifted by client.

    Intervals within a client and the hour of the day (UTC) stay, so features and labels stay the same. What the reader
    sets aside stays as unusable as it was: an empty client or visit stays empty, a date that is none becomes
    `UNREADABLE`; without a client there is no shift, and the date becomes empty. (Dates of the first ten years that the
    reader takes, from 1900 on, may be shifted out of them.) Columns that are neither observations'
    nor labels' nor named in `also` are dropped. Raises `BadConfig` where the table has no client or visit.
    """
    own = [column for column in frame.columns if column in (*COLUMNS, "sepsis", *DATES, *also)]
    for name in ("client", "visit_id"):
        if name not in own:
            raise BadConfig(f"nothing can be pseudonymized without the column {name!r}")
    if len(set(own)) < len(own):
        raise BadConfig("a column stands twice; which one counts cannot be told")
    client, clients = text_places(frame["client"])
    visit, visits = text_places(frame["visit_id"])
    # what stands last is for empty cells, whose place is -1; with a letter before the digits they are no number
    new_client = np.array([*(f"c{pseudonyms.client(name)}" for name in clients), None], dtype=object)
    days = np.array([*map(pseudonyms.shift_days, clients), 0])
    clients.append("")
    pairs = list(zip(client.tolist(), visit.tolist(), strict=True))
    new_visit = {(c, v): f"v{pseudonyms.visit(clients[c], visits[v])}" if v >= 0 else None for c, v in set(pairs)}
    out = frame[own].assign(client=new_client[client], visit_id=[new_visit[pair] for pair in pairs])
    for column in set(DATES) & set(own):
        times, empty = parse_times(frame[column])
        known = (times != NO_TIME) & (client >= 0)
        times = np.where(known, times - MICROSECONDS_PER_DAY * days[client], NO_TIME)
        unreadable = ~known & ~empty & (client >= 0)
        moments = times.view("datetime64[us]")  # NO_TIME is its empty one
        if unreadable.any():
            moments = [UNREADABLE if bad else text for bad, text in zip(unreadable, iso_times(times), strict=True)]
        out[column] = pd.Series(moments, index=frame.index)
    return out
