"""Spans for OpenTelemetry, where that is asked for; they go where its own environment variables say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from mixtura.errors import UserError


@final
class Tracer:
    """Makes spans, or none.

    Args:
        provider: of spans; None for no spans.
    """

    def __init__(self, provider: Any = None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("mixtura")
        self._provider = provider

    @contextmanager
    def span(self, name: str, **attributes: str | int | float | bool) -> Iterator[None]:
        """Something that takes time; never with words of a prompt or an answer."""
        if self._tracer is None:
            yield
            return
        named = {f"mixtura.{key}": value for key, value in attributes.items()}
        with self._tracer.start_as_current_span(f"mixtura.{name}", attributes=named):
            yield

    def close(self) -> None:
        """Send what waits."""
        if self._provider is not None:
            self._provider.shutdown()


def exporting() -> Tracer:
    """Spans that are exported over HTTP as OTEL_EXPORTER_OTLP_ENDPOINT says.

    Raises:
        UserError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        raise UserError("tracing needs OpenTelemetry; pip install 'mixtura[tracing]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "mixtura-gateway"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)
