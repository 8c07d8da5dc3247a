"""Who may ask: named API keys, or, where none is set, programs on the same machine alone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

from flask import Request

from feature_pipeline import BadConfig
from serving.api.settings import Settings

HOW_TO_SET_A_KEY = (
    "this service has no API key and answers programs on its own machine only; on the server run "
    "`python api_server.py --new-key NAME`, put the line it prints into a file and name the file in SEPSIS_API_KEYS"
)
SEND_THE_KEY = "send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
EXPECTED = "name:sha256, a line as `python api_server.py --new-key NAME` prints"
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


class Refused(Exception):
    """The client may not ask; `status` is 401 (not known) or 403 (a wrong key)."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def new_key(name: str) -> tuple[str, str]:
    """(a new key, the line ``name:sha256`` to store).

    Keys are 256 random bits, so a plain SHA-256 of one cannot be guessed back: a slow password hash would add nothing.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise BadConfig(f"key name {name!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    key = "sepsis_" + secrets.token_urlsafe(32)
    return key, f"{name}:{_hashed(key)}"


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(source: str) -> dict[str, str]:
    """SHA-256 to name, from a file of ``name:sha256`` lines (# begins a comment) or such lines with commas between."""
    if not source:
        return {}
    lines, where = source.split(","), "SEPSIS_API_KEYS"
    if not re.search(r":[0-9a-fA-F]{64}", source):
        try:
            data = Path(source).read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", "") or "no file's name"
            # it may be a key, which must not be shown
            raise BadConfig(f"SEPSIS_API_KEYS names no file that can be read ({why}); expected {EXPECTED}") from None
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
        match = re.fullmatch(r"([A-Za-z0-9_.-]{1,64}):([0-9a-fA-F]{64})", line)
        if not match:
            raise BadConfig(f"{where}, line {number}: expected {EXPECTED}")
        keys[match[2].lower()] = match[1]
    if not keys:
        raise BadConfig(f"{where} holds no key; make one with `python api_server.py --new-key NAME`")
    return keys


_kept: dict[str, dict[str, str]] = {}  # of each source, in gunicorn's master and the workers that it forks


def keep_keys(source: str) -> None:
    """Reads the keys for all workers to come; what was kept stays where that fails. Raises as `read_keys`.

    A worker that is renewed at some time must not meet a file that somebody is editing just then.
    """
    _kept[source] = read_keys(source)


class Gate:
    """Tells who a request comes from, or refuses it."""

    def __init__(self, settings: Settings):
        kept = _kept.get(settings.api_keys)
        self.keys = read_keys(settings.api_keys) if kept is None else kept
        self.open_to_all = settings.insecure

    def client(self, request: Request) -> str:
        """The name of the client's key, ``local``, or ``anyone`` in an insecure service. Raises `Refused`."""
        if self.keys:
            return self._by_key(request)
        if self.open_to_all:
            return "anyone"
        if is_local(request):
            return "local"
        raise Refused(401, HOW_TO_SET_A_KEY)

    def _by_key(self, request: Request) -> str:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        key = request.headers.get("X-API-Key", "") or (token.strip() if scheme.lower() == "bearer" else "")
        if not key:
            raise Refused(401, SEND_THE_KEY)
        hashed, found = _hashed(key), None
        for stored, name in self.keys.items():  # all of them, each in constant time
            if hmac.compare_digest(hashed, stored):
                found = name
        if found is None:
            raise Refused(403, "this API key is not known here")
        return found


def is_local(request: Request) -> bool:
    """Does the request come from a program on this machine?

    A browser may be tricked into asking under another name for this machine's address, and a proxy speaks for others:
    what shows either is not local. Not every proxy shows itself, so behind one there must be keys.
    """
    if request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0":  # as nginx asks, unless told otherwise
        return False
    try:
        address = ipaddress.ip_address(request.remote_addr or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    host = re.sub(r":\d+$", "", request.host).lower()
    from_here = address.is_loopback or bool(mapped and mapped.is_loopback)
    return from_here and host in _LOCAL_NAMES and not any(name in request.headers for name in _FORWARDED)
