"""CDS Hooks feedback: how a clinician answered a card, and why one was overridden."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

from werkzeug.exceptions import BadRequest

SYSTEM = "urn:sepsis-risk:override-reason"
# what a clinician may choose; the codes go to the prediction log
REASONS = {
    "treated": "Sepsis is known and treated",
    "other-cause": "Another cause explains the findings",
    "wrong-data": "The observations are wrong or too old",
    "goals-of-care": "Treatment is limited by the goals of care",
    "unlikely": "Sepsis is unlikely in my judgement",
}
OVERRIDE_REASONS = [{"system": SYSTEM, "code": code, "display": text} for code, text in REASONS.items()]
OTHER = "other"  # a reason of the EHR's own; its text and the user's comment may name a patient and are not kept
OUTCOMES = ("accepted", "overridden")
MOST_ANSWERS = 100  # in a request


class Given(NamedTuple):
    """The answer to one card."""

    card: str
    outcome: str
    reason: str | None
    moment: datetime  # UTC, naive


def answers_of(body: Any, now: datetime) -> list[Given]:
    """The answers in a feedback request. Raises 400. An answer of later than `now` is one of now."""
    feedback = body.get("feedback") if isinstance(body, dict) else None
    if not isinstance(feedback, list) or not 1 <= len(feedback) <= MOST_ANSWERS:
        raise BadRequest(f"expected an object with `feedback`, a list of 1 to {MOST_ANSWERS} answers to cards")
    return [_answer(given, f"feedback[{i}]", now) for i, given in enumerate(feedback)]


def _answer(given: Any, where: str, now: datetime) -> Given:
    given = given if isinstance(given, dict) else {}
    card, outcome = given.get("card"), given.get("outcome")
    if not isinstance(card, str) or not 1 <= len(card) <= 36:
        raise BadRequest(f"{where}.card is not the uuid of a card")
    if outcome not in OUTCOMES:
        raise BadRequest(f"{where}.outcome is neither {' nor '.join(OUTCOMES)}")
    try:
        moment = datetime.fromisoformat(given.get("outcomeTimestamp"))
        moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"{where}.outcomeTimestamp is no ISO 8601 time") from None
    own = given.get("overrideReason")
    reason = own.get("reason") if isinstance(own, dict) else None
    known = None
    if outcome == "overridden" and reason is not None:
        ours = isinstance(reason, dict) and reason.get("system") == SYSTEM and reason.get("code") in [*REASONS]
        known = reason["code"] if ours else OTHER
    return Given(card, outcome, known, min(moment, now).replace(tzinfo=None))
