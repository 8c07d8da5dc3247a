"""A FHIR R4 server as a client sees it: SMART Backend Services, searches with pages, faults that pass."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from common.artifacts import read_toml
from common.fhir import next_page
from common.web import Answer, Unreachable, ask, is_safe
from feature_pipeline import BadConfig, FeaturePipelineError

MIME = "application/fhir+json"
ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_SECONDS = 240  # the standard allows 300
SCOPE = "system/Encounter.rs system/Observation.rs system/Patient.rs system/RiskAssessment.crus"
SECONDS = 30.0  # for one request
TRIES = 3
LONGEST_WAIT = 60.0  # for a server that asks to be left alone; for longer, the next run comes
MOST_PAGES = 2_000
ABOUT_ONE = (400, 404, 405, 409, 410, 412, 413, 422)  # others concern every request


class FhirError(FeaturePipelineError):
    """The FHIR server cannot be used now; what was done stays done. The text holds no id, token or data."""

    code = "fhir_error"

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status  # of the server's answer, if it is about this one resource


@dataclass(frozen=True)
class ServerSettings:
    """What a site says of its FHIR server, in a TOML file."""

    base: str  # URL
    client_id: str = ""  # of SMART Backend Services; empty for a server that asks for no token
    key: str = ""  # file of the private key, PEM: RSA, or EC on P-384
    kid: str = ""  # the key's id in the key set that the server knows
    token_url: str = ""  # found by the server's smart-configuration if not given
    scope: str = SCOPE
    encounters: str = ""  # more search parameters of the encounters to score, such as class=IMP,ACUTE
    state: str = "data/fhir_feed.db"
    overlap_seconds: int = 300  # by which a run looks back beyond the one before: servers index late

    @classmethod
    def read(cls, path: str) -> ServerSettings:
        """Raises `BadConfig`."""
        content, where = read_toml(path, "FHIR server file"), f"FHIR server file {path!r}"
        kinds = {f.name: int if f.type == "int" else str for f in fields(cls)}
        if unknown := [name for name in content if name not in kinds]:
            raise BadConfig(f"{where}: unknown {', '.join(map(repr, unknown))}; expected {', '.join(kinds)}")
        for name, value in content.items():
            if type(value) is not kinds[name]:
                raise BadConfig(f"{where}: {name} is no {'whole number' if kinds[name] is int else 'text'}")
        settings = cls(**{"base": "", **content})
        for name in ("base", "token_url"):
            url = getattr(settings, name)
            if (url or name == "base") and not is_safe(url):
                raise BadConfig(f"{where}: {name} is no https URL (http is for this machine only)")
        if settings.client_id and not (settings.key and settings.kid):
            raise BadConfig(f"{where}: client_id needs key, the file of a private key, and kid, its id")
        return settings


class FhirServer:
    """Asks a FHIR server. `sleep` and `clock` (seconds since 1970) are the time's."""

    def __init__(
        self,
        settings: ServerSettings,
        sleep: Callable[[float], Any] = time.sleep,
        clock: Callable[[], float] = time.time,
    ):
        self.base = settings.base.rstrip("/")
        self._settings, self._sleep, self._clock = settings, sleep, clock
        self._key, self._algorithm = self._read_key() if settings.client_id else (None, "")
        self._token, self._token_end, self._token_url = "", 0.0, settings.token_url
        self._not_before = 0.0  # a server asked to be left alone until then
        self.date: float | None = None  # the server's time at its last answer, as far as it says

    def _read_key(self) -> tuple[Any, str]:
        where = f"the private key {self._settings.key!r}"
        try:
            key = load_pem_private_key(Path(self._settings.key).read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise BadConfig(f"{where} cannot be read ({type(error).__name__}); expected PEM without password") from None
        if isinstance(key, rsa.RSAPrivateKey):
            return key, "RS384"
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1":
            return key, "ES384"
        raise BadConfig(f"{where} is neither RSA nor EC on P-384, which SMART Backend Services takes")

    # ------------------------------------------------------------------------------------------------ requests

    def call(
        self, method: str, path: str, resource: Any = None, headers: Mapping[str, str] | None = None, expected=(200,)
    ) -> Answer:
        """One request below the base URL, or to a URL of the same server. Waits and asks again where the server says
        so, gets a new token where the old one is refused. Raises `FhirError` for an answer that is not `expected`."""
        url = path if path.startswith(("https://", "http://")) else f"{self.base}/{path}"
        body = None if resource is None else json.dumps(resource, allow_nan=False).encode()
        given = {"Accept": MIME, **({"Content-Type": MIME} if body else {}), **(headers or {})}
        renewed = False
        for attempt in range(1, TRIES + 1):
            if self._clock() < self._not_before:
                raise FhirError(f"the FHIR server asks to be left alone for {self._not_before - self._clock():.0f} s")
            if self._key is not None:
                given["Authorization"] = f"Bearer {self._current_token()}"
            last = attempt == TRIES
            try:
                answer = ask(url, method, body, given, SECONDS)
            except Unreachable as error:
                # whether it was created is not known: the next run looks
                if last or method == "POST":
                    raise FhirError(f"the FHIR server cannot be reached ({error})") from None
                self._sleep(attempt)
                continue
            self.date = _date(answer)
            if answer.status in expected:
                return answer
            if answer.status == 401 and self._key is not None and not renewed:
                self._token, renewed = "", True
            elif answer.status in (429, 503) and not last:
                self._wait(answer, attempt)
            elif answer.status >= 500 and method == "GET" and not last:
                self._sleep(attempt)
            else:
                break
        text = f"the FHIR server answers {answer.status} to {method} {_kind(url, self.base)}"
        raise FhirError(text, answer.status if answer.status in ABOUT_ONE else None)

    def _wait(self, answer: Answer, attempt: int) -> None:
        """As long as the server wishes; raises `FhirError` where that is long."""
        wish = (answer.headers.get("Retry-After") or "").strip()
        seconds = float(2**attempt)
        if wish.isascii() and wish.isdigit():
            seconds = float(min(int(wish), 86_400))
        elif wish and (moment := _moment(wish)) is not None:
            seconds = max(moment - self._clock(), 0.0)
        if seconds > LONGEST_WAIT:
            self._not_before = self._clock() + seconds
            raise FhirError(f"the FHIR server answers {answer.status} and asks to be left alone for {seconds:.0f} s")
        self._sleep(seconds)

    def search(self, kind: str, parameters: Mapping[str, str], more: str = "") -> Iterator[dict[str, Any]]:
        """The entries of all pages of a search that have a resource; see `FhirError` for pages that never end. `more`
        are parameters as text."""
        url: str | None = f"{kind}?{urlencode(parameters)}" + (f"&{more}" if more else "")
        seen: set[str] = set()
        while url is not None:
            bundle = self.call("GET", url).body
            if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle":
                raise FhirError(f"the FHIR server answers no Bundle to a search of {kind}")
            entries = bundle.get("entry")
            for entry in entries if isinstance(entries, list) else []:
                resource = entry.get("resource") if isinstance(entry, dict) else None
                if isinstance(resource, dict) and resource.get("resourceType") == kind:
                    yield entry
            seen.add(url)
            url = next_page(bundle)
            if url is None:
                return
            if not url.startswith((f"{self.base}/", f"{self.base}?")):  # the token is for this server
                raise FhirError("the FHIR server's next page is on another server")
            if url in seen or len(seen) >= MOST_PAGES:
                raise FhirError(f"the pages of a search of {kind} do not end")

    # ------------------------------------------------------------------------------------------------ the token

    def _current_token(self) -> str:
        if not self._token or self._clock() >= self._token_end:
            self._token, seconds = self._new_token()
            self._token_end = self._clock() + max(seconds - 30, 0)
        return self._token

    def _new_token(self) -> tuple[str, float]:
        settings, now = self._settings, int(self._clock())
        if not self._token_url:
            self._token_url = self._discovered()
        claims = {
            "iss": settings.client_id,
            "sub": settings.client_id,
            "aud": self._token_url,
            "iat": now,
            "exp": now + ASSERTION_SECONDS,
            "jti": str(uuid.uuid4()),
        }
        form = {
            "grant_type": "client_credentials",
            "scope": settings.scope,
            "client_assertion_type": ASSERTION,
            "client_assertion": jwt.encode(claims, self._key, self._algorithm, {"kid": settings.kid}),
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        try:
            answer = ask(self._token_url, "POST", urlencode(form).encode(), headers, SECONDS, 100_000)
        except Unreachable as error:
            raise FhirError(f"the token endpoint cannot be reached ({error})") from None
        given = answer.body if isinstance(answer.body, dict) else {}
        token, seconds = given.get("access_token"), given.get("expires_in", 300)
        if answer.status != 200 or not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise FhirError(f"the token endpoint answers {answer.status} and gives no token")
        return token, float(seconds) if isinstance(seconds, int | float) else 300.0

    def _discovered(self) -> str:
        try:
            answer = ask(f"{self.base}/.well-known/smart-configuration", seconds=SECONDS, most_bytes=1_000_000)
        except Unreachable as error:
            raise FhirError(f"the FHIR server cannot be reached ({error})") from None
        url = answer.body.get("token_endpoint") if answer.status == 200 and isinstance(answer.body, dict) else None
        if not isinstance(url, str) or not is_safe(url):
            raise FhirError("the FHIR server's smart-configuration names no token endpoint; give token_url")
        return url


def _kind(url: str, base: str) -> str:
    """The type of resource that a URL is about, without any id."""
    return url.removeprefix(base).strip("/").partition("?")[0].partition("/")[0] or "its base"


def _date(answer: Answer) -> float | None:
    return _moment(answer.headers.get("Date") or "")


def _moment(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError):
        return None
