"""Reads request bodies, and checks their type, size, time and JSON."""

from __future__ import annotations

import json
import time
from typing import Any, NoReturn

from flask import Request
from gunicorn.http.errors import ChunkMissingTerminator, InvalidChunkExtension, InvalidChunkSize
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, RequestTimeout, UnsupportedMediaType

from serving.api.settings import Settings

JSON_TYPES = ("application/json",)
FHIR_TYPES = ("application/fhir+json", "application/json")


def read_body(request: Request, settings: Settings, types: tuple[str, ...] = JSON_TYPES) -> bytes:
    """The body of a request that shall hold JSON. Raises werkzeug's 408, 413 and 415."""
    if request.mimetype not in types:
        raise UnsupportedMediaType(f"Content-Type is {request.mimetype[:80]!r}; expected {types[0]}")
    if request.content_encoding:
        raise UnsupportedMediaType("Content-Encoding is not supported; send the body as it is")
    return _body(request, settings)


def parse_json(body: bytes, most_objects: int) -> Any:
    """The JSON value of a body. Raises werkzeug's 400, and 413 before anything is parsed where the body may hold more
    objects."""
    if body.count(b"{") > most_objects:
        raise RequestEntityTooLarge(f"the body has more than {most_objects:,} opening braces; send fewer visits")
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_refuse)
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deep") from None
    except ValueError:  # a number of more digits than Python takes
        raise BadRequest("the body is not JSON: a number is too long, or not a number (NaN, Infinity)") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _body(request: Request, settings: Settings) -> bytes:
    """The whole body, within its limits of size and time: a client that sends a byte now and then is cut off."""
    too_large = RequestEntityTooLarge(f"the body is larger than {settings.max_bytes:,} bytes; send fewer visits")
    if (request.content_length or 0) > settings.max_bytes:
        raise too_large
    late = time.monotonic() + settings.body_seconds
    chunks, size = [], 0
    try:
        while chunk := request.stream.read(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > settings.max_bytes:
                raise too_large
            if time.monotonic() > late:
                raise RequestTimeout(f"the body did not arrive within {settings.body_seconds} s")
    except (InvalidChunkSize, InvalidChunkExtension, ChunkMissingTerminator):
        raise BadRequest("the chunks of the body are malformed") from None
    except OSError:  # the socket's own timeout, or the client is gone
        raise RequestTimeout("the body did not arrive") from None
    return b"".join(chunks)
