"""Every error of the service: its status, its sentence, its headers. JSON routes answer RFC 9457 problem details."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from flask import Response, g, jsonify
from werkzeug.exceptions import HTTPException

from common.command_line import log
from feature_pipeline import COLUMNS, BadObservations
from serving.api.records import code_places
from serving.api.security import Refused
from serving.api.service import Busy, NoModel
from serving.deployed import Unlogged
from serving.fhir.reading import TooDeep
from serving.scored import TooMuch, described_set_aside

PROBLEM = "application/problem+json"
RETRY_SOON = {"Retry-After": "2"}


def explained(error: Exception) -> tuple[int, str, dict[str, Any], dict[str, str]]:
    """(status, a sentence without any detail of ours, what else the answer says, headers) of an error."""
    if isinstance(error, Refused):
        wanted = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "60"}}.get(error.status, {})
        return error.status, str(error), {}, wanted
    if isinstance(error, NoModel):
        # why it cannot be loaded names files of this machine: that is for the log
        return 503, "there is no usable model; the service's log says why", {}, {"Retry-After": "30"}
    if isinstance(error, Unlogged):
        return 503, str(error), {}, RETRY_SOON
    if isinstance(error, Busy):
        return 503, str(error), {}, RETRY_SOON
    if isinstance(error, TooDeep):
        return 400, str(error), {}, {}
    if isinstance(error, TooMuch):
        return 413, str(error), {}, {}
    if isinstance(error, BadObservations):
        aside = described_set_aside(error.set_aside, error.set_aside_rows)
        return 422, str(error), {"set_aside": aside, "expected": list(COLUMNS)}, {}
    if isinstance(error, HTTPException):
        headers = {name: value for name, value in error.get_headers() if name not in ("Content-Type", "Content-Length")}
        return error.code or 500, error.description or error.name, {}, headers
    log.error("error: request %s failed: %s", g.get("request_id"), code_places(error))
    return 500, "an error of this service", {}, {}


def problem_body(status: int, detail: str) -> dict[str, Any]:
    """RFC 9457; the type ``about:blank`` means: what the status says."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}


def problem(status: int, detail: str, more: dict[str, Any]) -> Response:
    """A problem document; `more` is added to it."""
    response = jsonify({**problem_body(status, detail), **more, "request_id": g.get("request_id")})
    response.status_code, response.mimetype = status, PROBLEM
    return response
