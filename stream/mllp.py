"""HL7 v2 over MLLP: ORU^R01 messages of an interface engine to observations, acknowledged once they are kept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import hl7
from hl7.mllp import start_hl7_server

from command_line import log
from feature_pipeline import ProductionPipeline
from stream.feed import Feed
from units import own_terms

SCORE_SECONDS = 0.05  # what arrives meanwhile is one micro-batch
NOT_A_RESULT = {
    "D",
    "I",
    "N",
    "W",
    "X",
    "O",
    "R",
}  # OBX-11: deleted, pending, wrong, ...
NUMERIC = {"NM", "SN", "ST", ""}


class Rejected(Exception):
    """A message that cannot be used; `code` is AE (its content) or AR (its kind)."""

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code


def observations_of(message: hl7.Message, pipeline: ProductionPipeline) -> tuple[list[dict[str, Any]], list[str]]:
    """(observations in the model's own terms, why other OBX were not used). Raises `Rejected`.

    Client is PID-3.1, visit PV1-19.1, time OBX-14 or else OBR-7, code OBX-3.1 (or the alternative OBX-3.4 where the
    model knows only that), range OBX-7. Results that are pending, wrong or deleted (OBX-11) are left out.
    """
    kind = (_text(message, "MSH", 9, 1), _text(message, "MSH", 9, 2))
    if kind != ("ORU", "R01"):
        raise Rejected("AR", "message type is not ORU^R01")
    client, visit = _text(message, "PID", 3, 1), _text(message, "PV1", 19, 1)
    if not client:
        raise Rejected("AE", "PID-3 names no patient")
    if not visit:
        raise Rejected("AE", "PV1-19 names no visit")
    records, left_out, asked = [], [], ""
    n = 0
    for segment in message:
        name = str(segment(0))
        if name == "OBR":
            asked = _part(segment, 7)
        if name != "OBX":
            continue
        n += 1
        record = _observation(segment, asked, pipeline)
        if isinstance(record, str):
            left_out.append(f"OBX {n}: {record}")
        else:
            records.append({"visit_id": visit, "client": client, **record})
    if not records:
        raise Rejected("AE", "; ".join(left_out[:5]) or "no OBX segment")
    return records, left_out


def _text(message: hl7.Message, segment: str, field: int, component: int) -> str:
    try:
        return _part(message.segment(segment), field, component)
    except KeyError:
        return ""


def _part(segment: Any, field: int, component: int = 1) -> str:
    """One component of a field's first repetition; empty where there is none."""
    try:
        repetition = segment(field)[0]
    except (IndexError, KeyError):
        return ""
    if isinstance(repetition, str):
        return repetition.strip() if component == 1 else ""
    try:
        return str(repetition(component)).strip()
    except (IndexError, KeyError):
        return ""


def _observation(segment: Any, asked: str, pipeline: ProductionPipeline) -> dict[str, Any] | str:
    if _part(segment, 11) in NOT_A_RESULT:
        return "its status (OBX-11) says that it is no result"
    if _part(segment, 2) not in NUMERIC:
        return "its type (OBX-2) is no number"
    code, other = _part(segment, 3, 1), _part(segment, 3, 4)
    known = pipeline.config["codes"]
    if other and pipeline.own_code(code) not in known and pipeline.own_code(other) in known:
        code = other
    if not code:
        return "no code (OBX-3)"
    time = iso_time(_part(segment, 14) or asked)
    if time is None:
        return "no time of day (OBX-14, OBR-7)"
    # a structured number is comparator^number
    text = _part(segment, 5, 2) if _part(segment, 2) == "SN" else _part(segment, 5, 1)
    value = _number(text)
    if value is None:
        return "its value (OBX-5) is not a number"
    low, high = reference_range(_part(segment, 7))
    record = own_terms(pipeline, code, value, _part(segment, 6), low, high)
    return record if isinstance(record, str) else {"observation_date": time, **record}


def _number(text: str) -> float | None:
    try:
        return float(text.lstrip("<>=≤≥~ "))
    except ValueError:
        return None


_RANGE = re.compile(r"\s*(-?[\d.]+)\s*(?:-|–|to)\s*(-?[\d.]+)\s*$")


def reference_range(text: str) -> tuple[float | None, float | None]:
    """(low, high) of a range as laboratories write it.

    >>> reference_range("36.0-37.5"), reference_range("<5"), reference_range(">60"), reference_range("negative")
    ((36.0, 37.5), (None, 5.0), (60.0, None), (None, None))
    """
    if match := _RANGE.match(text):
        return _number(match[1]), _number(match[2])
    if text.startswith(("<", "≤")):
        return None, _number(text)
    if text.startswith((">", "≥")):
        return _number(text), None
    return None, None


_TIME = re.compile(r"(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(?:(\d\d)(\.\d{1,4})?)?([+-]\d{4})?$")


def iso_time(text: str) -> str | None:
    """An HL7 time (YYYYMMDDHHMM[SS[.S]][+ZZZZ]) as ISO 8601; None without a time of day.

    >>> iso_time("20240301083015.5+0100"), iso_time("20240301")
    ('2024-03-01T08:30:15.5+01:00', None)
    """
    match = _TIME.match(text)
    if not match:
        return None
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    offset = f"{zone[:3]}:{zone[3:]}" if zone else ""
    return f"{year}-{month}-{day}T{hour}:{minute}:{second or '00'}{fraction or ''}{offset}"


def acknowledgement(message: hl7.Message, code: str, reason: str = "") -> hl7.Message:
    """ACK with MSA-1 `code` and MSA-3 `reason`."""
    answer = message.create_ack(ack_code=code)
    if reason:
        answer.segment("MSA").assign_field(hl7_escaped(reason), 3)
    return answer


def hl7_escaped(text: str) -> str:
    return re.sub(r"[|^&~\\\r\n]", " ", text)[:200]


async def serve(feed: Feed, host: str, port: int, stop: asyncio.Event, started: Callable[[int], None]) -> None:
    """Receives messages until `stop`, then finishes those in hand. `started` is told the port."""
    counts = {"AA": 0, "AE": 0, "AR": 0}

    def answer(message: hl7.Message) -> hl7.Message:
        try:
            records, left_out = observations_of(message, feed.processor.pipeline)
            feed.accept(records)  # kept before it is acknowledged
        except Rejected as refused:
            counts[refused.code] += 1
            log.warning("message refused (%s): %s", refused.code, refused)
            return acknowledgement(message, refused.code, str(refused))
        counts["AA"] += 1
        for text in left_out:
            log.warning("set aside: %s", text)
        return acknowledgement(message, "AA", "; ".join(left_out))

    async def connected(reader: Any, writer: Any) -> None:
        try:
            while not (reader.at_eof() or stop.is_set()):
                try:
                    message = await reader.readmessage()
                except asyncio.IncompleteReadError as half:
                    if half.partial.strip():
                        log.warning("a connection ended in mid-message: nothing of it was taken")
                    break
                except (hl7.HL7Exception, UnicodeDecodeError, ValueError, LookupError) as error:
                    counts["AR"] += 1
                    log.warning("a frame is no HL7 message (%s)", type(error).__name__)
                    writer.write(b"\x0bMSH|^~\\&|||||||ACK||P|2.5\rMSA|AR||not an HL7 message\r\x1c\r")
                    await writer.drain()
                    continue
                try:
                    reply = answer(message)
                except (KeyError, IndexError, hl7.HL7Exception) as error:
                    counts["AR"] += 1
                    log.warning("a message without a usable MSH (%s)", type(error).__name__)
                    writer.write(b"\x0bMSH|^~\\&|||||||ACK||P|2.5\rMSA|AR||no usable MSH\r\x1c\r")
                else:
                    writer.writemessage(reply)
                await writer.drain()
        except ConnectionError:
            pass  # the sender sends again what was not acknowledged
        finally:
            writer.close()

    async with await start_hl7_server(connected, host, port) as server:
        started(server.sockets[0].getsockname()[1])
        while not stop.is_set():
            feed.score()
            try:
                await asyncio.wait_for(stop.wait(), SCORE_SECONDS)
            except TimeoutError:
                continue
        server.close()
    log.info("messages: %(AA)d accepted, %(AE)d refused for their content, %(AR)d for their kind", counts)
