"""Keyed hashes in place of clients and visits, wherever names must not appear: logs, metrics, exports.

``pseudonymized`` prepares a table of observations or labels for other people.
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
UNREADABLE = "unreadable"  # replaces a text that is not a date, and may be anything


class Pseudonyms:
    """HMAC-SHA256 under one key. The same name gives the same pseudonym; without the key nobody can find the name.

    `lasting`: the key outlives this process, so that pseudonyms can be joined to outcomes later.
    """

    def __init__(self, key: str | None = None):
        if key and len(key) < SHORTEST_KEY:
            raise BadConfig(f"{KEY_VARIABLE} is shorter than {SHORTEST_KEY} characters; make one of random characters")
        self.lasting = bool(key)
        self._key = key.encode() if key else secrets.token_bytes(32)

    @classmethod
    def from_environment(cls) -> Pseudonyms:
        """With the key in the environment variable `KEY_VARIABLE`, or a random key if it is not set."""
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
        """The number of days by which all dates of a client move into the past, 1 to `LONGEST_SHIFT`. Whole days,
        because the hour of the day is a feature."""
        return 1 + int.from_bytes(self.digest("shift", client)[:8], "big") % LONGEST_SHIFT


def lasting_pseudonyms() -> Pseudonyms:
    """Those of the environment. Raises `BadConfig` without a key: separately made files would not match."""
    pseudonyms = Pseudonyms.from_environment()
    if not pseudonyms.lasting:
        raise BadConfig(f"{KEY_VARIABLE} is not set: pseudonyms need a key; keep it apart from the files")
    return pseudonyms


def pseudonymized(frame: pd.DataFrame, pseudonyms: Pseudonyms, also: tuple[str, ...] = ()) -> pd.DataFrame:
    """A table of observations or labels with client and visit replaced and its dates shifted by client.

    Intervals within a client and the hour of the day (UTC) stay, and so do features and labels. A row that the reader
    sets aside remains unusable: an empty client or visit stays empty, a text that is not a date becomes `UNREADABLE`,
    and a date without a client becomes empty, because no shift is known. (The reader takes dates from 1900 on; a shift
    may move the first ten years out of its range.) Columns of neither observations nor labels are dropped, unless
    `also` names them. Raises `BadConfig` if the table has no client or visit.
    """
    own = [column for column in frame.columns if column in (*COLUMNS, "sepsis", *DATES, *also)]
    for name in ("client", "visit_id"):
        if name not in own:
            raise BadConfig(f"column {name!r} is missing; a table can be pseudonymized only with client and visit_id")
    if len(set(own)) < len(own):
        raise BadConfig("a column occurs twice; leave one of the two")
    client, clients = text_places(frame["client"])
    visit, visits = text_places(frame["visit_id"])
    # the last entry is for empty cells, whose place is -1; the letter keeps hashes from being read as numbers
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
        moments = times.view("datetime64[us]")  # NO_TIME is NaT
        if unreadable.any():
            moments = [UNREADABLE if bad else text for bad, text in zip(unreadable, iso_times(times), strict=True)]
        out[column] = pd.Series(moments, index=frame.index)
    return out
