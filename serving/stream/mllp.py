"""HL7 v2 over MLLP: ORU messages of an interface engine to observations, acknowledged once they are kept."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from typing import Any

import hl7
from hl7.mllp import start_hl7_server

from common.command_line import log
from feature_pipeline import BLOOD_PRESSURE_CODES, ProductionPipeline
from serving.stream.feed import Feed
from serving.stream.hl7_mapping import USUAL, Hl7Mapping, Place

SCORE_SECONDS = 0.05  # what arrives meanwhile is one micro-batch
LAST_ANSWERS_SECONDS = 5.0  # for senders that are slow to take them, at a stop
FRAME_BYTES = 16 << 20  # at the most: results with a PDF beside them have some megabytes
HEAD_BYTES = 4096  # in which MSH ends
START, END = b"\x0b", b"\x1c\r"
NUMERIC = {"NM", "SN", "ST", ""}
# units of medical devices (ISO/IEEE 11073, as IHE PCD-01 sends them) -> UCUM
DEVICE_UNITS = {
    "MDC_DIM_BEAT_PER_MIN": "/min",
    "MDC_DIM_RESP_PER_MIN": "/min",
    "MDC_DIM_MMHG": "mm[Hg]",
    "MDC_DIM_KILO_PASCAL": "kPa",
    "MDC_DIM_PERCENT": "%",
    "MDC_DIM_DEGC": "Cel",
    "MDC_DIM_FAHR": "[degF]",
}
# MSH-18 (HL7 table 0211) -> Python's name
CHARSETS = {
    **{f"8859/{n}": f"iso8859-{n}" for n in range(1, 16)},
    "UNICODE UTF-8": "utf-8",
    "UNICODE": "utf-8",
    "GB 18030-2000": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
    "ISO IR87": "iso2022_jp",
}
NOT_READABLE = (hl7.HL7Exception, KeyError, IndexError, TypeError, ValueError, AssertionError)  # by the library


class Rejected(Exception):
    """A message that cannot be used; `code` is AE (its content) or AR (its kind)."""

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code


def observations_of(
    message: hl7.Message, pipeline: ProductionPipeline, mapping: Hl7Mapping = USUAL
) -> tuple[list[dict[str, Any]], list[str]]:
    """(observations, why other OBX were not used). Raises `Rejected`.

    Client and visit are where `mapping` says, in the patient's own group: a message may hold several patients. Time is
    OBX-14 or else OBR-7, in the zone that it names, else that of MSH-7, else the mapping's, else UTC; code OBX-3.1 (or
    the alternative OBX-3.4 where the model uses only that; the name OBX-3.2 where there is no code); unit OBX-6; range
    OBX-7. Results that are pending, wrong or deleted (OBX-11, the mapping's `not_results`) are left out. A corrected
    one (C) counts as one more observation: what it corrects stays, as it does in a table.
    """
    event = _text(message, "MSH", 9, 2).upper()
    if _text(message, "MSH", 9, 1).upper() != "ORU" or event not in mapping.events:
        taken = ", ".join(f"ORU^{name}" if name else "ORU" for name in sorted(mapping.events))
        raise Rejected("AR", f"message type is not one of {taken}")
    zone = _ZONE.search(_text(message, "MSH", 7, 1))
    records, left_out, unnamed = [], [], ""
    found: dict[Place, str] = {}
    asked = ""
    n = 0
    for segment in message:
        name = str(segment(0)).strip()
        if name == "PID":
            found, asked = {}, ""
        if name in ("PID", "PV1"):
            found |= {p: _identifier(segment, p) for p in (*mapping.client, *mapping.visit) if p.segment == name}
        elif name == "OBR":
            asked = _part(segment, 7)
        if name != "OBX":
            continue
        n += 1
        record = _observation(segment, asked, zone[0] if zone else "", pipeline, mapping)
        client, visit = (next(filter(None, map(found.get, places)), "") for places in (mapping.client, mapping.visit))
        if isinstance(record, dict) and not (client and visit):
            places = mapping.visit if client else mapping.client
            record = unnamed = f"{', '.join(map(str, places))} names no {'visit' if client else 'patient'}"
        if isinstance(record, str):
            left_out.append(f"OBX {n}: {record}")
        else:
            records.append({"visit_id": visit, "client": client, **record})
    if unnamed and not records:
        raise Rejected("AE", unnamed)
    return records, left_out


def _identifier(segment: Any, place: Place) -> str:
    """The text at a place; of a kind of identifier the first repetition that has it."""
    if place.kind is None:
        return _part(segment, place.field, place.component)
    try:
        repetitions = len(segment(place.field))
    except (IndexError, KeyError):
        return ""
    of_kind = (i for i in range(repetitions) if _part(segment, place.field, 5, i) == place.kind)
    return next((_part(segment, place.field, place.component, i) for i in of_kind), "")


def _text(message: hl7.Message, segment: str, field: int, component: int) -> str:
    try:
        return _part(message.segment(segment), field, component)
    except KeyError:
        return ""


def _part(segment: Any, field: int, component: int = 1, repetition: int = 0) -> str:
    """One component (its first subcomponent) of a repetition of a field; empty where there is none, or null."""
    try:
        part = segment(field)[repetition]
        if not isinstance(part, str):
            part = part(component)
        elif component > 1:
            return ""
        if not isinstance(part, str):
            part = part(1)
    except (IndexError, KeyError):
        return ""
    text = _unescaped(segment, str(part)).strip()
    return "" if text == '""' else text


def _parts(segment: Any, field: int, *components: int) -> list[str]:
    """The components that are not empty."""
    return [text for component in components if (text := _part(segment, field, component))]


def _unescaped(segment: Any, text: str) -> str:
    """With the characters that separate elsewhere; the library's own way logs what it cannot read."""
    escape = segment.esc
    if escape not in text:
        return text
    meant = {**dict(zip("FRST", segment.separators[1:5], strict=True)), "E": escape}
    sign = re.escape(escape)
    return re.sub(f"{sign}([FRSTE]){sign}", lambda match: meant[match[1]], text)


def _observation(
    segment: Any, asked: str, zone: str, pipeline: ProductionPipeline, mapping: Hl7Mapping
) -> dict[str, Any] | str:
    if _part(segment, 11).upper() in mapping.not_results:
        return "its status (OBX-11) says that it is no result"
    if _part(segment, 2) not in NUMERIC:
        return "its type (OBX-2) is no number"
    codes = _parts(segment, 3, 1, 4) or _parts(segment, 3, 2)
    if not codes:
        return "no code (OBX-3)"
    code = next((code for code in codes if _is_used(pipeline, code)), codes[0])
    time = iso_time(_part(segment, 14) or asked, zone)
    if time is None:
        return "no time of day (OBX-14, OBR-7)"
    if time[19:].lstrip(".0123456789") == "":  # it names no zone
        try:
            time = mapping.in_zone(time)
        except ValueError:
            return "its time (OBX-14, OBR-7) is no date"
    structured = _part(segment, 2) == "SN"  # comparator^number^separator^number
    if _repeats(segment, 5) or (structured and (_part(segment, 5, 3) or _part(segment, 5, 4))):
        return "its value (OBX-5) is a range, a ratio or several values, not one number"
    text = _part(segment, 5, 2 if structured and _part(segment, 5, 2) else 1)
    pair = code in BLOOD_PRESSURE_CODES and _PAIR.fullmatch(text)  # the reader makes two observations of it
    value = text if pair else _number(text)
    if value is None:
        return "its value (OBX-5) is not a number"
    low, high = reference_range(_part(segment, 7))
    concept = pipeline.reproducer.codes.meaning(code)[0]
    names = _parts(segment, 6, 1, 2, 4, 5)  # code, text, alternatives; 10^3/uL, not escaped, is in two components
    units = [DEVICE_UNITS.get(name, name) for name in (*names, "^".join(names[:2]))]
    unit = next((name for name in units if concept and concept.unit_named(name)), units[0])
    if unit and concept and concept.unit_named(unit) is None:
        return f"its unit (OBX-6) is not one that {concept.name.replace('_', ' ')} can be converted from"
    return {
        "observation_date": time,
        "observation_type_code": code,
        "observation_value": value,
        "reference_range_min": low,
        "reference_range_max": high,
        "unit": unit or None,
    }


def _is_used(pipeline: ProductionPipeline, code: str) -> bool:
    return pipeline.reproducer.is_used(pipeline.own_code(code))


def _repeats(segment: Any, field: int) -> bool:
    try:
        return len(segment(field)) > 1
    except (IndexError, KeyError):
        return False


_PAIR = re.compile(r"[\d.]+ */ *[\d.]+", re.ASCII)
_NUMBER = re.compile(r"[<>=≤≥~ ]*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*", re.ASCII)


def _number(text: str) -> float | None:
    match = _NUMBER.fullmatch(text)
    return float(match[1]) if match else None


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


_TIME = re.compile(  # some devices put the signs of ISO 8601 between
    r"(\d{4})[-/]?(\d\d)[-/]?(\d\d)[T ]?(\d\d)(?::?(\d\d)(?::?(\d\d)(\.\d{1,6})?\d*)?)?(Z|[+-]\d\d:?\d\d)?",
    re.ASCII,
)
_ZONE = re.compile(r"[+-]\d{4}$", re.ASCII)


def iso_time(text: str, zone: str = "") -> str | None:
    """An HL7 time (YYYYMMDDHH[MM[SS[.S]]][+ZZZZ]) as ISO 8601, in `zone` where it names none itself; None without a
    time of day.

    >>> iso_time("20240301083015.5+0100"), iso_time("2024030108", "-0500"), iso_time("20240301")
    ('2024-03-01T08:30:15.5+01:00', '2024-03-01T08:00:00-05:00', None)
    >>> iso_time("2024-03-01T08:30:15Z"), iso_time("2024/03/01 08:30")
    ('2024-03-01T08:30:15+00:00', '2024-03-01T08:30:00')
    """
    match = _TIME.fullmatch(text)
    if not match:
        return None
    year, month, day, hour, minute, second, fraction, own_zone = match.groups()
    zone = "+0000" if own_zone == "Z" else own_zone or zone
    offset = f"{zone[:3]}:{zone[-2:]}" if zone else ""
    return f"{year}-{month}-{day}T{hour}:{minute or '00'}:{second or '00'}{fraction or ''}{offset}"


class Head:
    """The first segment of a frame: all that an answer needs, be the rest readable or not."""

    def __init__(self, frame: bytes):
        line = re.split(rb"[\r\n]", frame[:HEAD_BYTES].lstrip(), maxsplit=1)[0].decode("latin-1")
        self.found = line.startswith("MSH") and len(line) > 8
        fields = line.split(line[3]) if self.found else ["MSH", "^~\\&"]
        self._separator = line[3] if self.found else "|"
        self._fields = fields + [""] * (18 - len(fields))
        named = re.split(r"[~^]", self._fields[17])[0].strip().upper()
        self.charset = CHARSETS.get(named, "utf-8")

    def decoded(self, frame: bytes) -> str:
        """The frame as text: as MSH-18 says, else as UTF-8, else as Latin-1 (in which every byte is something)."""
        for charset in (self.charset, "utf-8"):
            with contextlib.suppress(UnicodeDecodeError):
                return frame.decode(charset)
        return frame.decode("latin-1")

    def acknowledgement(self, code: str, reason: str = "") -> bytes:
        """The ACK that names the message's MSH-10, with MSA-1 `code` and MSA-3 `reason`."""
        fields = self._fields[:12]
        component = fields[1][:1] or "^"
        if component not in fields[8]:
            fields[8] += component
        try:
            answer = hl7.parse(self._separator.join(fields) + "\r").create_ack(ack_code=code)
        except NOT_READABLE:
            fields = ["MSH", "^~\\&", *[""] * 6, "^", hl7_escaped(fields[9]), "P", "2.5"]
            answer = hl7.parse("|".join(fields) + "\r").create_ack(ack_code=code)
        if reason:
            answer.segment("MSA").assign_field(hl7_escaped(reason), 3)
        return str(answer).encode("latin-1", "replace")  # bytes of MSH go back as they came


def hl7_escaped(text: str) -> str:
    return re.sub(r"[|^&~\\\r\n]", " ", text)[:200]


async def next_frame(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    """(content of the next frame, why it cannot be used). Of one that is too large only the beginning is there.

    Raises `asyncio.IncompleteReadError` at the end.
    """
    beginning = None
    while True:
        try:
            frame = await reader.readuntil(END)
            break
        except asyncio.LimitOverrunError as over:
            dropped = await reader.readexactly(over.consumed)
            beginning = beginning or dropped[:HEAD_BYTES]
    if beginning is not None:
        return beginning[beginning.find(START) + 1 :], f"a frame of more than {FRAME_BYTES >> 20} MiB"
    # what stands before the start is what is left of a frame that was never ended
    _, start, content = frame[: -len(END)].rpartition(START)
    return content, "" if start else "a frame that does not begin with VT"


def messages_of(frame: bytes) -> list[bytes] | None:
    """The messages of a batch (between FHS, BHS and BTS, FTS); None for a frame that is no batch."""
    if not frame.lstrip().startswith((b"FHS", b"BHS")):
        return None
    _, *messages = re.split(rb"(?:^|(?<=[\r\n]))(?=MSH)", frame)
    return [re.split(rb"[\r\n](?=BTS|FTS|BHS|FHS)", message)[0] + b"\r" for message in messages]


async def serve(
    feed: Feed,
    host: str,
    port: int,
    stop: asyncio.Event,
    started: Callable[[int], None],
    mapping: Hl7Mapping = USUAL,
) -> None:
    """Receives messages until `stop`, then finishes those in hand. `started` is told the port. A batch is answered with
    a batch of acknowledgements."""
    counts = {"AA": 0, "empty": 0, "AE": 0, "AR": 0}
    writers: set[asyncio.StreamWriter] = set()

    def taken(head: Head, frame: bytes, trouble: str) -> list[str]:
        """Keeps the observations of a frame; gives why others in it were not used. Raises `Rejected`."""
        if trouble or not head.found:
            raise Rejected("AR", trouble or "not an HL7 message")
        try:
            message = hl7.parse(re.sub(r"\r?\n", "\r", head.decoded(frame)))
            records, left_out = observations_of(message, feed.processor.pipeline, mapping)
        except NOT_READABLE as error:
            raise Rejected("AR", f"not a readable HL7 message ({type(error).__name__})") from None
        try:
            feed.accept(records)  # kept before it is acknowledged
        except OSError as error:
            raise Rejected("AE", f"it cannot be kept ({error.strerror}); send it again later") from None
        counts["empty"] += not records
        return left_out

    def answer(frame: bytes, trouble: str) -> bytes:
        messages = None if trouble else messages_of(frame)
        if messages is None:
            return acknowledged(frame, trouble)
        answers = [acknowledged(message, "") for message in messages]
        return b"".join([b"BHS|^~\\&\r", *answers, b"BTS|%d\r" % len(answers)])

    def acknowledged(frame: bytes, trouble: str) -> bytes:
        head = Head(frame)
        try:
            left_out = taken(head, frame, trouble)
        except Rejected as refused:
            counts[refused.code] += 1
            log.warning("message refused (%s): %s", refused.code, refused)
            return head.acknowledgement(refused.code, str(refused))
        counts["AA"] += 1
        for text in left_out:
            log.warning("set aside: %s", text)
        return head.acknowledgement("AA", "; ".join(left_out))

    async def connected(reader: Any, writer: Any) -> None:
        writers.add(writer)
        try:
            while not (reader.at_eof() or stop.is_set()):
                writer.writeblock(answer(*await next_frame(reader)))
                await writer.drain()
        except asyncio.IncompleteReadError as half:
            if half.partial.strip():
                log.warning("a connection ended in mid-message: nothing of it was taken")
        except OSError:
            pass  # the sender sends again what was not acknowledged
        finally:
            writer.close()
            writers.discard(writer)

    server = await start_hl7_server(connected, host, port, limit=FRAME_BYTES)
    try:
        started(server.sockets[0].getsockname()[1])
        while not stop.is_set():
            feed.score()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), SCORE_SECONDS)
    finally:
        server.close()
        # since Python 3.12 a server waits for its connections, which senders keep open: they are ended here
        for writer in list(writers):
            writer.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_until(lambda: not writers), LAST_ANSWERS_SECONDS)
        for writer in list(writers):
            writer.transport.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.wait_closed(), LAST_ANSWERS_SECONDS)
    log.info(
        "messages: %(AA)d accepted (%(empty)d of them without an observation), %(AE)d refused for their content, "
        "%(AR)d for their kind",
        counts,
    )


async def _until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.01)
