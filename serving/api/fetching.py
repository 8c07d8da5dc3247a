"""Data that a CDS Hooks call leaves out: fetched from the EHR's FHIR server with the token that the call brings."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from werkzeug.exceptions import BadRequest, PreconditionFailed

from common.fhir import next_page
from common.web import Unreachable, ask
from serving.api.service import Busy
from serving.api.settings import Settings

SECONDS = 5.0  # for all that a call lacks
MOST_PAGES = 10  # of one search
AT_ONCE = 4  # calls of a worker that wait for FHIR servers
_lane = threading.Semaphore(AT_ONCE)


def lacking(call: dict[str, Any], templates: dict[str, str]) -> dict[str, str]:
    """The templates whose key the call's prefetch does not have; a key with null says that there are no data."""
    prefetch = call.get("prefetch")
    return {name: t for name, t in templates.items() if not isinstance(prefetch, dict) or name not in prefetch}


def fetched(call: dict[str, Any], templates: dict[str, str], settings: Settings) -> tuple[dict[str, Any], int]:
    """(the resource for each of `templates`, their size in bytes). A Patient that does not come is left out. Raises
    412 where other data cannot be had, 400 for an id that FHIR does not have, and `Busy`."""
    server, given = call.get("fhirServer"), call.get("fhirAuthorization")
    token = given.get("access_token") if isinstance(given, dict) else None
    allowed = [url.strip().rstrip("/") for url in settings.fhir_servers.split(",") if url.strip()]
    base = server.rstrip("/") if isinstance(server, str) else None
    needed = [name for name, template in templates.items() if not template.startswith("Patient/")]
    if base not in allowed or not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,8000}", token):
        if not needed:
            return {}, 0
        why = "fhirServer is not on this service's list" if base not in allowed and token else "no fhirAuthorization"
        raise PreconditionFailed(f"the prefetch lacks {', '.join(needed)}, which cannot be fetched: {why}")
    patient = call["context"]["patientId"]
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,64}", patient) or not patient.strip("."):
        raise BadRequest("context.patientId is no id that FHIR has")
    if not _lane.acquire(blocking=False):
        raise Busy("the service fetches data for other calls; ask again, or send the prefetch")
    try:
        end, found, size = time.monotonic() + SECONDS, {}, 0
        for name, template in templates.items():
            path = template.replace("{{context.patientId}}", patient)
            try:
                found[name], n = _resource(f"{base}/{path}", base, token, end, settings.max_bytes - size)
                size += n
            except Unreachable as error:
                if name in needed:
                    raise PreconditionFailed(f"{name} cannot be fetched from fhirServer: {error}") from None
        return found, size
    finally:
        _lane.release()


def _resource(url: str, base: str, token: str, end: float, most_bytes: int) -> tuple[dict[str, Any], int]:
    """A resource, or a search's Bundle with its further pages, and its size. Raises `Unreachable`."""
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/fhir+json"}
    whole: dict[str, Any] = {}
    size = 0
    for _ in range(MOST_PAGES):
        answer = ask(url, headers=headers, seconds=max(end - time.monotonic(), 0.01), most_bytes=most_bytes - size)
        if answer.status != 200 or not isinstance(answer.body, dict):
            raise Unreachable(f"it answers {answer.status}")
        size += answer.size
        entries = answer.body.get("entry")
        if whole:
            whole["entry"] = [*whole["entry"], *(entries if isinstance(entries, list) else [])]
            whole["link"] = answer.body.get("link")
        else:
            whole = {**answer.body, "entry": entries} if isinstance(entries, list) else answer.body
        following = next_page(answer.body)
        if following is None or "entry" not in whole:
            break
        if not following.startswith((f"{base}/", f"{base}?")):  # the token is for this server
            raise Unreachable("its next page is on another server")
        url = following
    return whole, size
