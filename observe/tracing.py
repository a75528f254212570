"""Traces: one per request, across router and workers, sent by OTLP where an endpoint is configured.

Spans name their parent by its W3C traceparent, never by what happens to be current, so that any task may start or end
them. Names and attributes: names.py.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..core.errors import BatonError, ConfigError
from ..core.request import TimedPart
from . import names

Value: TypeAlias = str | bool | int | float | Sequence[str]

EXPORT_TIMEOUT_S = 5.0
SAY_AGAIN_S = 300.0  # that a collector is away
_W3C = TraceContextTextMapPropagator()
_EXPORTER_LOGGER = "opentelemetry.exporter.otlp.proto.grpc"

log = logging.getLogger(__name__)


def setup(service_name: str, otlp_endpoint: str | None = None, instance: str = "") -> "Tracing":
    """Tracing of one process. `otlp_endpoint`: "http://host:4317", "https://..." for TLS, None: nothing is sent, but
    traces still have ids. `instance`: e.g. the worker's id. Raises ConfigError for an endpoint that is no URL.
    """
    processor = None
    if otlp_endpoint:
        if not otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"the OTLP endpoint must start with http:// or https://, unlike {otlp_endpoint!r}")
        # Imported here: a process that sends nothing has no use for it.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        exporter = OTLPSpanExporter(
            endpoint=otlp_endpoint, insecure=otlp_endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S
        )
        processor = BatchSpanProcessor(CalmExporter(exporter, otlp_endpoint), schedule_delay_millis=1000)
    return Tracing(service_name, processor, instance)


class CalmExporter(SpanExporter):
    """Says in one line that a collector takes nothing, and again some minutes later; the exporter within says it for
    each try, which is shown only at level DEBUG."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._lost = 0  # spans since it was last said
        self._said: float | None = None
        if not log.isEnabledFor(logging.DEBUG):
            logging.getLogger(_EXPORTER_LOGGER).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            now = time.monotonic()
            if self._said is None or now - self._said >= SAY_AGAIN_S:
                log.warning("traces do not reach the OTLP collector at %s: %d spans lost", self._endpoint, self._lost)
                self._said, self._lost = now, 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class Tracing:
    """Makes spans for one process. Has no global state; thread-safe."""

    def __init__(self, service_name: str, processor: SpanProcessor | None = None, instance: str = "") -> None:
        attributes = {"service.name": service_name, "service.namespace": "baton"}
        if instance:
            attributes["service.instance.id"] = instance
        self._provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
        if processor is not None:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("baton")

    def request(
        self, operation: str, model: str, traceparent: str = "", attributes: Mapping[str, Value] | None = None
    ) -> "RequestSpan":
        """Starts a request's root span, a child of the caller's `traceparent` if that is well-formed.
        `operation`: names.OPERATION_CHAT or OPERATION_TEXT.
        """
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=parent_context(traceparent),
            kind=trace.SpanKind.SERVER,
            attributes={
                names.GEN_AI_OPERATION: operation,
                names.GEN_AI_PROVIDER: names.PROVIDER,
                names.GEN_AI_REQUEST_MODEL: model,
                **(attributes or {}),
            },
        )
        return RequestSpan(self, span)

    def emit(self, part: TimedPart) -> None:
        """Records a finished span for a part of a request's life, under the parent it names."""
        attributes: dict[str, Value] = {names.SEQUENCE_ID: part.sequence_id, **dict(part.attributes)}
        self._record(part.name, part.traceparent, part.start_ns, part.end_ns, attributes)

    def flush(self, timeout_s: float = EXPORT_TIMEOUT_S) -> bool:
        """Sends what is waiting; blocks. False: the time was up first."""
        return self._provider.force_flush(round(timeout_s * 1000))

    def shutdown(self) -> None:
        """Sends what is waiting and ends; blocks for some seconds at most when the receiver is away."""
        self._provider.shutdown()

    def _record(self, name: str, traceparent: str, start_ns: int, end_ns: int, attributes: Mapping[str, Value]) -> None:
        context = parent_context(traceparent)
        span = self._tracer.start_span(name, context=context, attributes=attributes, start_time=start_ns)
        span.end(max(start_ns, end_ns))


class RequestSpan:
    """The root span of one request. Any task or thread may use it; what comes after its end changes nothing."""

    def __init__(self, tracing: Tracing, span: trace.Span) -> None:
        self._tracing = tracing
        self._span = span
        self.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        """32 hex digits."""
        self.traceparent = _traceparent(span)
        """W3C trace context that makes others' spans children of this one."""

    def set(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        self._span.add_event(name, attributes)

    def part(
        self, name: str, start_ns: int, end_ns: int | None = None, attributes: Mapping[str, Value] | None = None
    ) -> None:
        """Records a finished child span. Times are Unix nanoseconds; `end_ns` None: now."""
        self._tracing._record(name, self.traceparent, start_ns, end_ns or time.time_ns(), attributes or {})

    def end(self, error: BaseException | None = None) -> None:
        """Ends it once. `error`: why the request failed; only the text of a BatonError is recorded."""
        if not self._span.is_recording():
            return
        if error is not None:
            self._span.set_attribute(names.ERROR_TYPE, type(error).__name__)
            text = str(error) if isinstance(error, BatonError) else type(error).__name__
            self._span.set_status(trace.StatusCode.ERROR, text)
        self._span.end()


def parent_context(traceparent: str) -> Context:
    """The context that makes a span a child of `traceparent`; an empty one when that is empty or malformed."""
    return _W3C.extract({"traceparent": traceparent} if traceparent else {}, context=Context())


def valid_traceparent(traceparent: str) -> str:
    """`traceparent` when it is well-formed W3C trace context, else ""."""
    return traceparent if trace.get_current_span(parent_context(traceparent)).get_span_context().is_valid else ""


def _traceparent(span: trace.Span) -> str:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context=trace.set_span_in_context(span, Context()))
    return carrier["traceparent"]
