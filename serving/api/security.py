"""Who may ask, and what: named API keys, or, where none is set, programs that may open the Unix socket."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from flask import Request

from feature_pipeline import BadConfig
from serving.api import metrics
from serving.api.settings import Settings
from serving.api.trust import BadToken, Clients

HOW_TO_SET_A_KEY = (
    "this service has no API key; on the server run `python api_server.py --new-key NAME`, put the line it prints into "
    "a file and name the file in SEPSIS_API_KEYS. Without keys it answers through a Unix socket (gunicorn -b "
    "unix:PATH), or everybody who reaches it with SEPSIS_INSECURE=1"
)
SEND_THE_KEY = "send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
EXPECTED = "name:sha256[:scopes[:expires]], a line as `python api_server.py --new-key NAME` prints"
SCOPES = ("score", "metrics")  # what a key may be for; a line that names none is for both
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


@dataclass(frozen=True)
class Key:
    """Who has a key, what it is for, and its last day."""

    name: str
    scopes: tuple[str, ...] = SCOPES
    expires: date | None = None


class Refused(Exception):
    """The client may not ask; `status` is 401 (not known), 403 (a wrong key) or 429 (too many wrong keys)."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def new_key(name: str, scopes: Sequence[str] = SCOPES, expires: str = "") -> tuple[str, str]:
    """(a new key, the line ``name:sha256:scopes:expires`` to store).

    Keys are 256 random bits, so a plain SHA-256 of one cannot be guessed back: a slow password hash would add nothing.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise BadConfig(f"key name {name!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise BadConfig(f"scope {unknown[0]!r} is not known; choose {' or '.join(SCOPES)}, or both joined by +")
    try:
        expires = date.fromisoformat(expires).isoformat() if expires else ""
    except ValueError:
        raise BadConfig(f"last day {expires!r}: expected a date such as 2027-12-31") from None
    key = "sepsis_" + secrets.token_urlsafe(32)
    return key, f"{name}:{_hashed(key)}:{'+'.join(scopes)}" + (f":{expires}" if expires else "")


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(source: str) -> dict[str, Key]:
    """SHA-256 to key, from a file of ``name:sha256[:scopes[:expires]]`` lines (# begins a comment) or such lines with
    commas between. Scopes are joined by +, the last day of a key is an ISO 8601 date."""
    if not source:
        return {}
    lines, where = source.split(","), "SEPSIS_API_KEYS"
    if not re.search(r":[0-9a-fA-F]{64}", source):
        try:
            data = Path(source).read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", "") or "no file's name"
            # it may be a key, which must not be shown
            raise BadConfig(
                f"SEPSIS_API_KEYS (or --api-keys) names no file that can be read ({why}); expected {EXPECTED}"
            ) from None
        where = f"key file {source!r}"
        try:  # Windows writes UTF-16, and marks in front
            lines = data.decode("utf-16" if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise BadConfig(f"{where} is no text in UTF-8; expected {EXPECTED}") from None
    keys = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([\w.-]{1,64}):([0-9a-f]{64})(?::([a-z+]*)(?::([0-9-]+))?)?", line, re.ASCII | re.I)
        scopes = tuple((match[3] or "").lower().split("+")) if match and match[3] else SCOPES
        try:
            expires = date.fromisoformat(match[4]) if match and match[4] else None
        except ValueError:
            match = None
        if not match or not set(scopes) <= set(SCOPES):
            raise BadConfig(f"{where}, line {number}: expected {EXPECTED}; scopes are {', '.join(SCOPES)}")
        keys[match[2].lower()] = Key(match[1], scopes, expires)
    if not keys:
        raise BadConfig(f"{where} holds no key; make one with `python api_server.py --new-key NAME`")
    return keys


_kept: dict[str, dict[str, Key]] = {}  # of each source, in gunicorn's master and the workers that it forks


def keep_keys(source: str) -> None:
    """Reads the keys for all workers to come; what was kept stays where that fails. Raises as `read_keys`.

    A worker that is renewed at some time must not meet a file that somebody is editing just then.
    """
    _kept[source] = read_keys(source)


class Gate:
    """Tells who a request comes from, or refuses it. `wrong` is called with the address that a wrong key came from, and
    says whether there were too many."""

    def __init__(self, settings: Settings, wrong: Callable[[str], bool] = lambda address: False):
        self.clients = Clients(settings.cds_clients) if settings.cds_clients else None
        kept = _kept.get(settings.api_keys)
        self.keys = read_keys(settings.api_keys) if kept is None else kept
        self.open_to_all, self._wrong = settings.insecure, wrong

    def signed(self, request: Request) -> str | None:
        """The client of a signed CDS Hooks call; None where there is no signature, or none is trusted. Raises
        `Refused`."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if self.clients is None or scheme.lower() != "bearer" or token.count(".") != 2:
            return None
        try:
            return f"cds:{self.clients.verify(token.strip())}"
        except BadToken as error:
            if self._wrong(request.remote_addr or ""):
                raise Refused(429, "too many wrong tokens came from this address; ask again in a minute") from None
            raise Refused(401, f"this token is not accepted: {error}") from None

    def client(self, request: Request, scope: str | None) -> str:
        """The name of the client's key, ``local``, or ``anyone`` in an insecure service. `scope` is what the key must
        be for, if anything. Raises `Refused`."""
        if self.keys:
            return self._by_key(request, scope)
        if self.open_to_all:
            return "anyone"
        if is_local(request):
            return "local"
        raise Refused(401, HOW_TO_SET_A_KEY)

    def _by_key(self, request: Request, scope: str | None) -> str:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = request.headers.get("X-API-Key", "") or (token.strip() if scheme.lower() == "bearer" else "")
        if not given:
            raise Refused(401, SEND_THE_KEY)
        hashed, found = _hashed(given), None
        for stored, key in self.keys.items():  # all of them, each in constant time
            if hmac.compare_digest(hashed, stored):
                found = key
        if found is None:
            if self._wrong(request.remote_addr or ""):
                raise Refused(429, "too many wrong API keys came from this address; ask again in a minute")
            raise Refused(403, "this API key is not known here")
        if found.expires is not None and datetime.now(UTC).date() > found.expires:
            raise Refused(403, f"this API key was valid to {found.expires}; ask for a new one")
        if scope is not None and scope not in found.scopes:
            raise Refused(403, f"this API key is for {' and '.join(found.scopes)} only")
        metrics.LAST_USE.labels(found.name).set_to_current_time()
        return found.name


def is_local(request: Request) -> bool:
    """Does the request come through a Unix socket, whose permissions say who may open it, and from no proxy?

    A connection over TCP shows no such thing: a proxy on the same machine, or a browser that was tricked into asking
    under another name for its address, comes from loopback too.
    """
    return not request.environ.get("REMOTE_ADDR") and not any(name in request.headers for name in _FORWARDED)
