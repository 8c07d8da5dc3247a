"""Counters for Prometheus, right across gunicorn's workers (see gunicorn.conf.py)."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

SCORES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
registry = CollectorRegistry()
REQUESTS = Counter("sepsis_requests", "Requests answered", ["route", "status"], registry=registry)
LATENCY = Histogram("sepsis_request_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=registry)
STAGES = Histogram("sepsis_stage_seconds", "Time of a stage", ["stage"], buckets=SECONDS, registry=registry)
PREDICTIONS = Counter("sepsis_predictions", "Visits scored", ["risk_level"], registry=registry)
UNKNOWN = Counter("sepsis_unknown_risk", "Visits whose risk is unknown", ["reason"], registry=registry)
SCORE = Histogram("sepsis_score", "Probabilities given", buckets=SCORES, registry=registry)
SET_ASIDE = Counter("sepsis_rows_set_aside", "Observations not used", ["reason"], registry=registry)
UNUSED = Counter("sepsis_unused_observations", "Observations of codes that the model does not use", registry=registry)
UNLOGGED = Counter("sepsis_predictions_not_logged", "Rows that the prediction log lost", registry=registry)
CARD_ANSWERS = Counter("sepsis_card_answers", "Answers of clinicians to cards", ["outcome"], registry=registry)
LOG_ERRORS = Counter("sepsis_log_errors", "Lines that a log could not take", ["log"], registry=registry)
LAST_USE = Gauge(
    "sepsis_key_last_use_seconds",
    "When an API key was used last, seconds since 1970",
    ["client"],
    registry=registry,
    **({"multiprocess_mode": "max"} if _shared else {}),
)
MODEL = Gauge(
    "sepsis_model_info",
    "1 for the model version that workers serve",
    ["version"],
    registry=registry,
    **({"multiprocess_mode": "livemax"} if _shared else {}),
)


def exposition() -> bytes:
    """All counters in Prometheus' text format; under gunicorn the sum over the workers."""
    if not _shared:
        return generate_latest(registry)
    together = CollectorRegistry()
    multiprocess.MultiProcessCollector(together)
    return generate_latest(together)
