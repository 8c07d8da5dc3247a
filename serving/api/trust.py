"""CDS Hooks 2.0, "Trusting CDS Clients": each call is signed by a client of an allow-list, and counts once.

SEPSIS_CDS_CLIENTS names a JSON file: ``audience``, the URLs that clients may call the service by, and ``clients``, each
with its issuer ``iss``, and either ``keys`` (JSON Web Keys) or ``jku``, the address of its key set.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt

from common.command_line import log
from common.web import ask, is_safe
from feature_pipeline import BadConfig

ALGORITHMS = {"EC": "ES384", "RSA": "RS384"}  # by the type of the key: a token cannot choose another one
LEEWAY = 30  # seconds by which clocks may differ
LONGEST_LIFE = 600  # seconds from iat to exp
KEYS_SECONDS, ASK_SECONDS, FETCH_SECONDS = 300, 10, 3  # key sets are kept so long, asked for again, waited for
OLDEST_KEYS = 86_400  # seconds for which keys are used whose set cannot be fetched any more
SHORTEST_RSA = 2048  # bits
MOST_BYTES = 100_000  # of a key set


class BadToken(Exception):
    """A token that is not accepted; the text says why, without anything of the token."""


@dataclass
class Client:
    """One issuer and its keys, by key id."""

    iss: str
    tenant: str
    jku: str = ""
    keys: dict[str, jwt.PyJWK] = field(default_factory=dict)
    fetched: float = -1e9  # by the monotonic clock: when the key set came, and when it was asked for last
    asked: float = -1e9
    lock: threading.Lock = field(default_factory=threading.Lock)

    def key(self, kid: str, now: float) -> jwt.PyJWK | None:
        """The key of this id. A key set is fetched again when it is old, or does not have the key; nobody waits for a
        set that another thread is fetching."""
        known = self.keys.get(kid)
        old = now - self.fetched > KEYS_SECONDS
        if self.jku and (old or known is None) and now - self.asked > ASK_SECONDS and self.lock.acquire(blocking=False):
            try:
                self.asked = now
                self.keys, self.fetched = parse_keys(fetch(self.jku)), now
            except (OSError, BadConfig) as error:
                log.error("error: the key set of a CDS client cannot be read (%s)", type(error).__name__)
            finally:
                self.lock.release()
        return None if self.jku and now - self.fetched > OLDEST_KEYS else self.keys.get(kid)


def fetch(url: str) -> Any:
    """The JSON document at `url`. Raises OSError; takes `FETCH_SECONDS` at most."""
    answer = ask(url, seconds=FETCH_SECONDS, most_bytes=MOST_BYTES)
    if answer.status != 200:
        raise OSError("no key set is there")
    return answer.body


def parse_keys(key_set: Any) -> dict[str, jwt.PyJWK]:
    """The keys of a JSON Web Key Set that may sign calls, by their ids. Raises `BadConfig` where it is none."""
    keys = key_set.get("keys") if isinstance(key_set, dict) else None
    if not isinstance(keys, list):
        raise BadConfig("expected a JSON Web Key Set with `keys`")
    found = {}
    for key in keys:
        kind = key.get("kty") if isinstance(key, dict) else None
        if kind not in ALGORITHMS or not isinstance(key.get("kid"), str) or key.get("use", "sig") != "sig":
            continue
        try:
            known = jwt.PyJWK(key, algorithm=ALGORITHMS[kind])
        except (jwt.PyJWTError, ValueError, TypeError):  # a curve or a number that is none
            continue
        if key.get("crv") == "P-384" if kind == "EC" else known.key.key_size >= SHORTEST_RSA:
            found[key["kid"]] = known
    return found


class Clients:
    """The allow-list. `seen` tells whether an identity was given before, in whatever worker."""

    def __init__(self, path: str, seen: Callable[[str], bool] | None = None):
        where = f"SEPSIS_CDS_CLIENTS, file {path!r}"
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadConfig(f"{where} cannot be read as JSON ({type(error).__name__})") from None
        audience, clients = (given.get(name) if isinstance(given, dict) else None for name in ("audience", "clients"))
        if not isinstance(audience, list) or not audience or not isinstance(clients, list):
            raise BadConfig(f"{where}: expected the lists `audience` (URLs of this service) and `clients`")
        # the feedback on a card is sent to an address below the service's
        self.audience: list[str] = [f"{url}{below}" for url in audience for below in ("", "/feedback")]
        self.clients: dict[str, Client] = {}
        for number, client in enumerate(clients):
            iss, jku = (client.get(name) if isinstance(client, dict) else None for name in ("iss", "jku"))
            fetched = isinstance(jku, str)
            safe = not fetched or is_safe(jku)
            if not isinstance(iss, str) or not iss or not safe or fetched == ("keys" in client):
                raise BadConfig(f"{where}, client {number}: expected `iss`, and `keys` or `jku` (an https URL)")
            keys = {} if fetched else parse_keys({"keys": client["keys"]})
            if not fetched and not keys:
                raise BadConfig(f"{where}, client {number}: no key for {' or '.join(ALGORITHMS.values())} with a `kid`")
            self.clients[iss] = Client(iss, str(client.get("tenant") or iss), jku or "", keys)
        self._seen = seen or Once().seen

    def verify(self, token: str) -> str:
        """The tenant of the client that signed the token. Raises `BadToken`."""
        try:
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(token, options={"verify_signature": False})
            client = self.clients.get(claims.get("iss"))
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise BadToken("it is no JSON Web Token") from None
        if client is None:
            raise BadToken("its issuer is not on the list of allowed CDS clients")
        if client.jku and header.get("jku", client.jku) != client.jku:
            raise BadToken("its jku is not the issuer's")
        kid = header.get("kid")
        key = client.key(kid, time.monotonic()) if isinstance(kid, str) else None
        if key is None:
            raise BadToken("its key is not in the issuer's key set")
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHMS[key.key_type]],
                audience=self.audience,
                issuer=client.iss,
                leeway=LEEWAY,
                options={"require": ["iss", "aud", "exp", "iat", "jti"]},
            )
        except jwt.PyJWTError as error:
            raise BadToken(_REFUSALS.get(type(error), "its signature or its claims are wrong")) from None
        if not claims["exp"] - claims["iat"] <= LONGEST_LIFE:
            raise BadToken(f"it is valid for more than {LONGEST_LIFE} s")
        if not isinstance(claims["jti"], str) or not claims["jti"] or self._seen(f"{client.iss}\0{claims['jti']}"):
            raise BadToken("it was used before")
        return client.tenant


_REFUSALS = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidAudienceError: "it is for another audience",
    jwt.InvalidAlgorithmError: "its algorithm is not the key's",
    jwt.MissingRequiredClaimError: "it lacks one of iss, aud, exp, iat, jti",
}


class Once:
    """Remembers what was given, for as long as a token may live: a file for each in a folder of all workers."""

    def __init__(self):
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        self._folder = Path(shared, "tokens") if shared else Path(tempfile.mkdtemp(prefix="sepsis-tokens-"))
        self._folder.mkdir(exist_ok=True, mode=0o700)
        self._swept = time.monotonic()

    def seen(self, identity: str) -> bool:
        if time.monotonic() - self._swept > LONGEST_LIFE:
            self._sweep()
        name = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            os.close(os.open(self._folder / name, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return True
        return False

    def _sweep(self) -> None:
        self._swept = time.monotonic()
        late = time.time() - 2 * LONGEST_LIFE - 2 * LEEWAY
        for entry in os.scandir(self._folder):
            if entry.stat().st_mtime < late:
                Path(entry.path).unlink(missing_ok=True)
