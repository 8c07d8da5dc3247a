"""Keyed hashes that stand for clients and visits wherever names must not appear: logs, metrics, exports."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

KEY_VARIABLE = "SEPSIS_PSEUDONYM_KEY"
SHORTEST_KEY = 16  # characters


class Pseudonyms:
    """HMAC-SHA256 under one key: the same name gives the same pseudonym, and nobody without the key can tell whose.

    `lasting` says whether the key outlives this process; without one, pseudonyms cannot be joined to outcomes later.
    """

    def __init__(self, key: str | None = None):
        if key and len(key) < SHORTEST_KEY:
            raise ValueError(f"{KEY_VARIABLE} is shorter than {SHORTEST_KEY} characters; make one of random characters")
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
