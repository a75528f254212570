import logging
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from baton.core.errors import ConfigError, Overloaded
from baton.core.ids import SequenceId
from baton.core.request import TimedPart
from baton.observe import names, tracing
from baton.observe.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Tracing:
    return Tracing("baton-router", SimpleSpanProcessor(exporter), "router-1")


def the_part(traceparent: str) -> TimedPart:
    return TimedPart(
        sequence_id=SequenceId("r/0"),
        name=names.SPAN_TRANSFER,
        traceparent=traceparent,
        start_ns=1_000,
        end_ns=3_000,
        attributes=((names.TRANSFER_BYTES, 42), (names.TRANSFER_TRANSPORT, "loopback")),
    )


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return format_span_id(span.parent.span_id)


def test_a_request_is_one_trace_of_root_parts_and_workers_spans(
    traces: Tracing, exporter: InMemorySpanExporter
) -> None:
    request = traces.request(names.OPERATION_CHAT, "m", attributes={names.GEN_AI_REQUEST_MAX_TOKENS: 5})
    request.part(names.SPAN_PLACE, 10, 20, {names.DECODE_WORKER: "d"})
    traces.emit(the_part(request.traceparent))
    request.set({names.GEN_AI_USAGE_OUTPUT: 3, names.GEN_AI_RESPONSE_FINISH: ["stop"]})
    request.end()
    place, transfer, root = exporter.get_finished_spans()
    assert [place.name, transfer.name, root.name] == ["place", "kv_transfer", "chat m"]
    assert root.parent is None
    assert root.kind is SpanKind.SERVER
    for span in (place, transfer, root):
        assert format_trace_id(span.context.trace_id) == request.trace_id
    assert parent_of(place) == parent_of(transfer) == format_span_id(root.context.span_id)
    assert (place.start_time, place.end_time) == (10, 20)
    assert (transfer.start_time, transfer.end_time) == (1_000, 3_000)
    assert dict(transfer.attributes or {}) == {
        "baton.sequence.id": "r/0",
        "baton.transfer.bytes": 42,
        "baton.transfer.transport": "loopback",
    }
    assert dict(root.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert root.resource.attributes["service.name"] == "baton-router"
    assert root.resource.attributes["service.instance.id"] == "router-1"


def test_a_callers_trace_goes_on(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    request = traces.request(names.OPERATION_TEXT, "m", PARENT)
    request.end()
    (root,) = exporter.get_finished_spans()
    assert request.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert request.traceparent.split("-")[1] == request.trace_id
    assert parent_of(root) == "b7ad6b7169203331"
    assert root.name == "text_completion m"


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", PARENT + "x" * 500])
def test_a_malformed_parent_starts_a_new_trace(
    traces: Tracing, exporter: InMemorySpanExporter, traceparent: str
) -> None:
    assert tracing.valid_traceparent(traceparent) == ""
    traces.request(names.OPERATION_CHAT, "m", traceparent).end()
    traces.emit(the_part(traceparent))
    assert [span.parent for span in exporter.get_finished_spans()] == [None, None]


def test_a_well_formed_parent_is_kept() -> None:
    assert tracing.valid_traceparent(PARENT) == PARENT


def test_a_request_ends_once_and_says_why(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    request = traces.request(names.OPERATION_CHAT, "m")
    request.end(Overloaded("full"))
    request.end()
    request.set({"late": 1})
    request.event("late")
    (root,) = exporter.get_finished_spans()
    assert root.status.status_code is StatusCode.ERROR
    assert root.status.description == "full"
    assert (root.attributes or {})["error.type"] == "Overloaded"
    assert "late" not in (root.attributes or {})


def test_the_text_of_an_unexpected_error_is_not_recorded(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    traces.request(names.OPERATION_CHAT, "m").end(RuntimeError("secret"))
    (root,) = exporter.get_finished_spans()
    assert root.status.description == "RuntimeError"


def test_a_request_may_end_in_another_thread(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    request = traces.request(names.OPERATION_CHAT, "m")
    thread = threading.Thread(target=request.end)
    thread.start()
    thread.join()
    assert len(exporter.get_finished_spans()) == 1


def test_without_an_endpoint_traces_have_ids_all_the_same() -> None:
    traces = tracing.setup("baton-router")
    request = traces.request(names.OPERATION_CHAT, "m")
    assert int(request.trace_id, 16) != 0
    assert tracing.valid_traceparent(request.traceparent)
    request.end()
    traces.shutdown()


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError):
        tracing.setup("baton-router", "localhost:4317")


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[str] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [span.name for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Receiver, str]]:
    receiver = Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def test_spans_reach_an_otlp_receiver(collector: tuple[Receiver, str]) -> None:
    receiver, endpoint = collector
    traces = tracing.setup("baton-decode", endpoint, "decode-0")
    traces.emit(the_part(PARENT))
    assert traces.flush()
    traces.shutdown()
    assert receiver.spans == ["kv_transfer"]


def test_a_collector_that_is_away_is_said_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Away(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.FAILURE

    now = 1000.0
    monkeypatch.setattr(tracing.time, "monotonic", lambda: now)
    exporter = tracing.CalmExporter(Away(), "http://away:4317")
    span = ReadableSpan("s")
    for _ in range(3):
        assert exporter.export([span]) is SpanExportResult.FAILURE
    now += tracing.SAY_AGAIN_S
    exporter.export([span, span])
    assert [record.getMessage() for record in caplog.records] == [
        f"traces do not reach the OTLP collector at http://away:4317: {lost} spans lost" for lost in (1, 4)
    ]
    assert not logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").isEnabledFor(logging.ERROR)
