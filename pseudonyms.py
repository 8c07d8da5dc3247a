"""Keyed hashes that stand for clients and visits wherever names must not appear: logs, metrics, exports.

``pseudonymized`` makes a table of observations or labels fit to be handed on.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

import pandas as pd

from feature_pipeline import COLUMNS, BadConfig, as_text

KEY_VARIABLE = "SEPSIS_PSEUDONYM_KEY"
SHORTEST_KEY = 16  # characters
LONGEST_SHIFT = 3652  # days
DATES = ("observation_date", "sepsis_onset")


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

    Intervals within a client and the hour of the day (UTC) stay, so features and labels stay the same. Columns that are
    neither observations' nor labels' nor named in `also` are dropped; a date that cannot be read becomes empty. Raises
    `BadConfig` where the table has no client or visit.
    """
    if missing := [name for name in ("client", "visit_id") if name not in frame.columns]:
        raise BadConfig(f"nothing can be pseudonymized without the column {missing[0]!r}")
    # a letter before the digits: no program takes them for a number
    clients = [as_text(cell) for cell in frame["client"].tolist()]
    visits = [as_text(cell) for cell in frame["visit_id"].tolist()]
    name = {client: f"c{pseudonyms.client(client)}" for client in set(clients)}
    days = {client: pseudonyms.shift_days(client) for client in name}
    number = {pair: f"v{pseudonyms.visit(*pair)}" for pair in set(zip(clients, visits, strict=True))}
    own = [column for column in frame.columns if column in (*COLUMNS, "sepsis", *DATES, *also)]
    out = frame[own].assign(
        client=[name[client] for client in clients],
        visit_id=[number[pair] for pair in zip(clients, visits, strict=True)],
    )
    shift = pd.to_timedelta(pd.Series([days[client] for client in clients], index=frame.index, dtype="int64"), unit="D")
    for column in set(DATES) & set(out.columns):
        times = pd.to_datetime(out[column], errors="coerce", utc=True, format="ISO8601")
        out[column] = (times - shift).dt.tz_localize(None)
    return out
