"""Where the time of a request goes: histograms for Prometheus and, with SEPSIS_OTEL=1, spans for OpenTelemetry.

The stages are ``queue`` (waiting for a turn), ``reading``, ``features``, ``model`` and ``logging``. Requests that are
scored together share the last three, which are then counted once. A span has no value, name or query of a request.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from feature_pipeline import BadConfig
from serving.api import metrics


def trace_of(traceparent: str) -> tuple[str, str] | None:
    """(trace id, parent id) of a W3C ``traceparent`` header; None where it is none.

    >>> trace_of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    ('4bf92f3577b34da6a3ce929d0e0e4736', '00f067aa0ba902b7')
    """
    match = re.fullmatch(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?", traceparent, re.ASCII)
    if not match or match[1] == "ff" or (match[1] == "00" and match[4]) or not int(match[2], 16) * int(match[3], 16):
        return None
    return match[2], match[3]


class Stages:
    """Times stages, as ``with stages("reading"):``. `provider` is OpenTelemetry's TracerProvider, None for no spans."""

    def __init__(self, provider: Any = None):
        self._tracer = provider.get_tracer("sepsis-risk") if provider is not None else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        span = self._tracer.start_as_current_span(name) if self._tracer else nullcontext()
        try:
            with span:
                yield
        finally:
            metrics.STAGES.labels(name).observe(time.perf_counter() - began)

    def request(self, route: str, method: str, traceparent: str) -> AbstractContextManager[Any]:
        """The span of a whole request, None without OpenTelemetry. Its parent is the span that `traceparent` names."""
        if self._tracer is None:
            return nullcontext()
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        return self._tracer.start_as_current_span(
            f"{method} {route}",
            context=TraceContextTextMapPropagator().extract({"traceparent": traceparent}),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route},
            record_exception=False,  # its text may hold names
            set_status_on_exception=False,
        )


def otlp_provider() -> Any:
    """A TracerProvider that exports over OTLP, where OTEL_EXPORTER_OTLP_ENDPOINT and its like say. Raises
    `BadConfig`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise BadConfig("SEPSIS_OTEL needs OpenTelemetry; pip install -r requirements-otel.txt") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "sepsis-risk"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
