"""A real OTLP receiver: the collector's own gRPC contract, keeping every span it is sent."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Spans by trace id, each as (service name, span)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, list[tuple[str, Any]]] = {}
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self._spans.setdefault(span.trace_id.hex(), []).append((names["service.name"], span))
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str, until: Any, timeout_s: float = 20.0) -> list[tuple[str, Any]]:
        """The spans of a trace as soon as `until(spans)` holds, else those there are when the time is up."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                spans = list(self._spans.get(trace_id, ()))
            if until(spans) or time.monotonic() > deadline:
                return spans
            time.sleep(0.1)

    def __enter__(self) -> Receiver:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(None)
