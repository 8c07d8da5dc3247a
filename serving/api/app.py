"""The Flask application: its routes for JSON, the pages and the service's own state; errors; logs."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from random import getrandbits
from typing import Any

from flask import Flask, Response, current_app, g, jsonify, request, send_from_directory
from werkzeug.exceptions import BadRequest, RequestURITooLarge, TooManyRequests, UnprocessableEntity

from common.command_line import log
from common.pseudonyms import Pseudonyms
from feature_pipeline import COLUMNS, BadConfig, BadObservations, to_micros
from monitoring.log import OFF, url_of
from serving.api import cds_hooks, conformance, feedback, fetching, fhir, metrics
from serving.api.bodies import FHIR_TYPES, JSON_TYPES, parse_json, read_body
from serving.api.errors import explained, problem
from serving.api.limits import Limits, check_rate_limit
from serving.api.openapi import document
from serving.api.records import Lines
from serving.api.security import Gate
from serving.api.service import Service, Waiting
from serving.api.settings import Settings
from serving.api.stages import Stages, otlp_provider, trace_of
from serving.deployed import LAST, NOW, Unlogged

STATIC = Path(__file__).with_name("static")
EXAMPLE = Path(__file__).parents[2] / "examples"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(settings: Settings | None = None) -> Flask:
    """The service as a WSGI application. The model is loaded at the first request that needs it, or by
    ``app.service.pipeline()``. Raises `BadConfig` for settings that cannot be right."""
    settings = settings or Settings.from_environment()
    check_rate_limit(settings)
    if settings.log_required and url_of(settings.monitor_url) == OFF:
        raise BadConfig("SEPSIS_LOG_REQUIRED is set, but SEPSIS_MONITOR_URL is off; name a database")
    app = Flask("sepsis", static_folder=None)
    app.json.sort_keys = False
    app.settings, app.stages = settings, Stages(otlp_provider() if settings.otel else None)
    app.service = Service(settings, app.stages)
    app.access_log, app.audit_log = Lines(settings.access_log, "access"), Lines(settings.audit_log, "audit")
    app.pseudonyms = Pseudonyms.from_environment()
    if settings.insecure and not settings.api_keys:
        log.warning("warning: SEPSIS_INSECURE is set: this service answers everybody who can reach it")
    app.limits = Limits(settings)
    app.gate = Gate(settings, app.limits.too_many_wrong_keys)
    app.before_request(_begin)
    app.after_request(_finish)
    app.teardown_request(_end)
    app.register_error_handler(Exception, _error)

    for rule, view, method in (
        ("/predict", predict, "POST"),
        ("/fhir/predict", fhir_predict, "POST"),
        *((f"/fhir/{name}/${conformance.OPERATION}", fhir_predict, "POST") for name in conformance.TYPES),
        *((f"/cds-services/{name}", cds_card, "POST") for name in cds_hooks.HOOKS),
        *((f"/cds-services/{name}/feedback", cds_feedback, "POST") for name in cds_hooks.HOOKS),
    ):
        app.add_url_rule(rule, view_func=view, methods=[method])
    for rule, view in (
        ("/", page),
        ("/docs", docs),
        ("/static/<path:name>", static),
        ("/demo-patients", demo_patients),
        ("/health", health),
        ("/ready", ready),
        ("/model", model),
        ("/metrics", prometheus),
        ("/openapi.json", openapi),
        ("/cds-services", cds_services),
        ("/fhir/metadata", fhir_metadata),
        (f"/fhir/OperationDefinition/{conformance.OPERATION}", fhir_operation),
    ):
        app.add_url_rule(rule, view_func=view, methods=["GET"])
    return app


LONGEST_PATH = 2_000
# what a key must be for
PROTECTED = {
    **dict.fromkeys(("predict", "fhir_predict", "cds_card", "cds_feedback"), "score"),
    "model": None,
    "prometheus": "metrics",
}


def _who() -> str:
    """Whom a rate limit counts for."""
    return f"key:{g.client}" if g.client not in ("local", "anyone") else f"address:{request.remote_addr or '127.0.0.1'}"


def _begin() -> None:
    g.start = time.perf_counter()
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else f"{getrandbits(128):032x}"
    traceparent, route = request.headers.get("traceparent", ""), request.url_rule.rule if request.url_rule else "none"
    g.trace = trace_of(traceparent)
    g.span_context = current_app.stages.request(route, request.method, traceparent if g.trace else "")
    g.span = g.span_context.__enter__()
    if request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1" and not request.headers.get("Host"):
        raise BadRequest("the request has no Host (RFC 9112, section 3.2)")
    if len(request.full_path) > LONGEST_PATH:
        raise RequestURITooLarge(f"the path and query are longer than {LONGEST_PATH:,} characters")
    if request.endpoint in PROTECTED and request.method != "OPTIONS":  # a browser asks with it whether it may ask
        signed = current_app.gate.signed(request) if request.endpoint.startswith("cds_") else None
        g.client = signed or current_app.gate.client(request, PROTECTED[request.endpoint])
        if PROTECTED[request.endpoint] == "score":
            g.headers, exceeded = current_app.limits.count(_who())
            if exceeded:
                raise TooManyRequests(f"more than {exceeded}; ask again later")


def _finish(response: Response) -> Response:
    seconds = time.perf_counter() - g.get("start", time.perf_counter())
    route = request.url_rule.rule if request.url_rule else "none"
    metrics.REQUESTS.labels(route, str(response.status_code)).inc()
    metrics.LATENCY.labels(route).observe(seconds)
    if (span := g.get("span")) is not None:
        span.set_attribute("http.response.status_code", response.status_code)
    response.headers["X-Request-ID"] = g.get("request_id", "")
    response.headers.update(g.pop("headers", {}))
    _allow_origin(response)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", "no-store")
    if route not in ("/health", "/ready"):  # asked every few seconds by those who watch
        current_app.access_log.write(
            request_id=g.get("request_id"),
            **_traced(),
            client=g.get("client"),
            address=request.remote_addr,
            method=request.method,
            route=route,
            status=response.status_code,
            milliseconds=round(seconds * 1e3, 2),
        )
    return response


def _allow_origin(response: Response) -> None:
    """CORS for CDS Hooks, from the origins that are allowed."""
    if request.path.partition("/cds-services")[0] or not current_app.settings.cors_origins:
        return
    response.headers.add("Vary", "Origin")
    if (origin := request.headers.get("Origin")) in current_app.settings.cors_origins.replace(" ", "").split(","):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
        response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        response.headers["Access-Control-Expose-Headers"] = "Retry-After, X-Request-ID"
        response.headers["Access-Control-Max-Age"] = "600"
        response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"


def _read_body(types: tuple[str, ...] = JSON_TYPES) -> bytes:
    return read_body(request, current_app.settings, types)


def _take_turn(size: int, records: Callable[[], list[Any]] | None = None, as_of: str = NOW) -> Waiting:
    """The turn of this request of `size` bytes, which lasts to its end; see `Service.take_turn`."""
    waiting = current_app.service.take_turn(records, as_of, size)
    if not waiting.settled:
        g.turn = waiting
    return waiting


def _leave(_: BaseException | None = None) -> None:
    """Passes the turn on, if this request has it."""
    if (turn := g.pop("turn", None)) is not None:
        current_app.service.leave(turn)


def _end(error: BaseException | None) -> None:
    _leave()
    if (span_context := g.pop("span_context", None)) is not None:
        span_context.__exit__(None, None, None)


def _traced() -> dict[str, str]:
    """What a log says of the trace that a request belongs to."""
    return dict(zip(("trace_id", "parent_id"), g.get("trace") or (), strict=False))


def _audit(outcome: str, scored: Any = None, user: Any = None) -> None:
    """One line a request that concerns patients: who asked, about whom (as pseudonyms), with what outcome."""
    if not current_app.audit_log.path:
        return
    names = current_app.pseudonyms
    keys = scored.observations.keys() if scored else []
    current_app.audit_log.write(
        request_id=g.request_id,
        **_traced(),
        client=g.client,
        address=request.remote_addr,
        route=request.url_rule.rule,
        outcome=outcome,
        model_version=scored.pipeline.model_version if scored else None,
        **({"user_pseudonym": names.digest("user", user).hex()[:16]} if isinstance(user, str) else {}),
        visits=len(keys),
        visit_pseudonyms=[names.visit(client, visit) for client, visit in keys],
    )


# ---------------------------------------------------------------------------------------------------- errors


def _error(error: Exception) -> Response:
    """Every error as a document of its route's own kind, with the right status and no detail of ours."""
    status, message, more, headers = explained(error)
    if request.endpoint in PROTECTED and "client" in g and request.method == "POST":
        _audit(f"error {status}")
    if request.path.startswith("/fhir"):
        response = fhir.outcome_response(status, message, more)
    else:
        response = problem(status, message, more)
    g.headers = {**g.get("headers", {}), **headers}
    return response


def _number(name: str, most: int) -> int:
    text = request.args.get(name, "0")
    if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) or int(text) > most:
        raise UnprocessableEntity(f"?{name}= is not a whole number from 0 to {most}")
    return int(text)


def _as_of(given: str | None = None) -> str:
    """The moment that is `given`, or ``?as_of=``: now, last (each visit's last observation), or a time."""
    as_of = request.args.get("as_of", NOW) if given is None else given
    if as_of not in (NOW, LAST):
        try:
            to_micros(as_of)
        except BadObservations:
            raise UnprocessableEntity("as_of is neither now, nor last, nor an ISO 8601 time") from None
    return as_of


# ---------------------------------------------------------------------------------------------------- routes


def predict() -> Response:
    """Observations to scores; ``?as_of=`` chooses their moment, ``?explain=N`` adds reasons, ``?trajectory=N`` the
    score at earlier moments, ``?series=1`` the observations as the model reads them."""
    top, points, series = _number("explain", 20), _number("trajectory", 100), _number("series", 1)
    service, as_of, body = current_app.service, _as_of(), _read_body()
    scored = service.scored(_take_turn(len(body), lambda: _records(body), as_of))
    predictions, remarks = scored.predictions(), scored.warnings()
    if top:
        reasons, remark = scored.reasons(top)
        remarks += [remark] if remark else []
        for prediction, own in zip(predictions, reasons, strict=True):
            prediction["reasons"] = own
    if points:
        for prediction, own in zip(predictions, scored.trajectories(points), strict=True):
            prediction["trajectory"] = own
    if series:
        for prediction, own in zip(predictions, scored.series(), strict=True):
            prediction["series"] = own
    _audit("scored", scored)
    return jsonify(
        {
            "status": "success",
            "model_version": scored.pipeline.model_version,
            "predictions": predictions,
            "unused_codes": scored.unused_codes,
            "set_aside": scored.set_aside(),
            "warnings": remarks,
        }
    )


def _records(body: bytes) -> list[Any]:
    records = parse_json(body, 2 * current_app.settings.max_rows)  # a unit may be {beats}/min
    if not isinstance(records, list):
        raise BadRequest(f"expected a JSON list of observations: {', '.join(COLUMNS)}")
    for name in ("visit_id", "client"):
        kinds = {type(row.get(name)) for row in records if type(row) is dict}
        if not kinds <= {str, int}:
            return [_named(row) for row in records]
    return records


def _named(row: Any) -> Any:
    """A row without a visit or client that is no text or number: true, a list, or 1e400, which JSON cannot answer."""
    if not isinstance(row, dict):
        return row
    bad = {
        name: None
        for name in ("visit_id", "client")
        if (value := row.get(name)) is not None
        and (isinstance(value, bool) or not isinstance(value, str | int | float) or value in (math.inf, -math.inf))
    }
    return {**row, **bad} if bad else row


def _resources(body: bytes) -> Any:
    """FHIR resources: a small Observation has eight objects, and 400 bytes."""
    return parse_json(body, 4 * current_app.settings.max_rows)


def fhir_predict() -> Response:
    """A FHIR R4 Bundle of Observations, or Parameters with one, to a Bundle of RiskAssessments."""
    conformance.check_media_type(request)
    service, as_of, body = current_app.service, _as_of(), _read_body(FHIR_TYPES)
    turn = _take_turn(len(body), as_of=as_of)
    bundle, moment = conformance.parameters_of(_resources(body))
    if moment is not None:
        turn.as_of = _as_of(moment)
    found = fhir.observations_of(bundle, turn.model.pipeline)
    turn.records = lambda: found.records
    scored = service.scored(turn)
    _audit("scored", scored)
    return fhir.response(fhir.risk_assessments(found, scored))


def fhir_metadata() -> Response:
    """The CapabilityStatement."""
    conformance.check_media_type(request)
    return fhir.response(conformance.capability_statement(f"{request.host_url}fhir"))


def fhir_operation() -> Response:
    """The OperationDefinition of $sepsis-risk."""
    conformance.check_media_type(request)
    return fhir.response(conformance.operation_definition(f"{request.host_url}fhir"))


def cds_services() -> Response:
    """CDS Hooks discovery."""
    return jsonify(cds_hooks.SERVICES)


def cds_card() -> Response:
    """CDS Hooks: prefetched observations to cards."""
    service, body = current_app.service, _read_body()
    turn = _take_turn(len(body))
    call = _resources(body)
    cds_hooks.check(call, request.path.rpartition("/")[2])
    if lacking := fetching.lacking(call, cds_hooks.PREFETCH):
        _leave()  # nobody waits for another server
        found_there, size = fetching.fetched(call, lacking, current_app.settings)
        call["prefetch"] = (call.get("prefetch") or {}) | found_there
        turn = _take_turn(len(body) + size)
    pipeline = turn.model.pipeline
    found = cds_hooks.observations_of(call, pipeline, service.clock())
    user, scored = call["context"].get("userId"), None
    if found.rows:
        turn.records = lambda: found.records
        scored = service.scored(turn)
        shown = cds_hooks.cards(found, scored)
    else:
        shown = cds_hooks.no_cards(call, found, pipeline.model_version)
    logged = turn.model.log.record_cards((s.card["uuid"], s.client, s.visit, s.level) for s in shown)
    if current_app.settings.log_required and not logged:
        raise Unlogged("cards cannot be logged, and must not be returned unlogged")
    _audit("scored" if scored else "no observations", scored, user)
    return jsonify({"cards": [s.card for s in shown]})


def cds_feedback() -> Response:
    """CDS Hooks: how clinicians answered cards."""
    body = parse_json(_read_body(), current_app.settings.max_visits)
    service = current_app.service
    answers = feedback.answers_of(body, datetime.fromtimestamp(service.clock(), UTC))
    known = service.model().log.record_answers(answers)
    if known is None:
        if url_of(current_app.settings.monitor_url) != OFF:
            raise Unlogged("feedback cannot be stored now")
        known = [False] * len(answers)
    for answer, is_known in zip(answers, known, strict=True):
        metrics.CARD_ANSWERS.labels(answer.outcome if is_known else "unknown card").inc()
    _audit("feedback")
    return jsonify({})


def health() -> Response:
    """The process answers."""
    return jsonify({"status": "alive"})


def ready() -> Response:
    """The model is loaded and reproduces its golden example; are predictions logged? The numbers are this worker's."""
    model_ = current_app.service.model()
    works, waiting, lost = model_.log.works, model_.log.waiting, model_.log.lost
    if not works and current_app.settings.log_required:
        raise Unlogged("predictions cannot be logged, and must not be returned unlogged")
    version = model_.pipeline.model_version
    told = {"predictions_logged": works, "predictions_waiting": waiting, "predictions_not_logged": lost}
    return jsonify({"status": "ready", "model_version": version, **told})


def model() -> Response:
    """What the model is, what it was trained on, and how good it was on patients that no choice was made on."""
    pipeline, settings = current_app.service.pipeline(), current_app.settings
    config = pipeline.config
    source = config.training_source
    return jsonify(
        {
            "model_version": pipeline.model_version,
            "feature_set": config.feature_set,
            "n_features": len(config.feature_names),
            "model": config.model["name"],
            "trained_at": config.trained_at,
            "trained_on": source["description"],
            "synthetic": source["synthetic"],
            "horizon_hours": config.snapshots.horizon_hours,
            "retrospective": config.snapshots.retrospective,
            "risk_thresholds": config.risk_thresholds,
            "decision_threshold": config.decision_threshold,
            "metrics": config.metrics,
            "codes": config.codes,
            "site_codes": pipeline.site_codes or {},
            "minimum_evidence": asdict(config.minimum_evidence) if config.minimum_evidence else None,
            "code_prevalence": config.code_prevalence,
            "loss_without_code": config.loss_without_code,
            "limits": {name: getattr(settings, f"max_{name}") for name in ("bytes", "rows", "visits")},
            "library_versions": config.library_versions,
        }
    )


def prometheus() -> Response:
    """Counters for Prometheus."""
    return Response(metrics.exposition(), mimetype="text/plain; version=0.0.4")


def openapi() -> Response:
    """The OpenAPI document of this service."""
    return jsonify(document(current_app.settings))


def page() -> Response:
    """The page for a ward or a data scientist."""
    return send_from_directory(STATIC, "index.html")


def docs() -> Response:
    """The OpenAPI document, to read."""
    return send_from_directory(STATIC, "docs.html")


def static(name: str) -> Response:
    """Styles and scripts of the pages."""
    return send_from_directory(STATIC, name)


def demo_patients() -> Response:
    """Synthetic patients for the page's first try."""
    return send_from_directory(EXAMPLE, "new_patient_data.json")
