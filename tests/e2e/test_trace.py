"""One request is one trace, over router, prefill, transfer and decode."""

from __future__ import annotations

import secrets
from typing import Any

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from .cluster import Cluster
from .otlp import Receiver


def test_one_trace_holds_router_prefill_transfer_and_decode(
    cluster: Cluster, stub: inference_pb2_grpc.InferenceServiceStub, receiver: Receiver
) -> None:
    name = f"traced-{secrets.token_hex(4)}"
    request = pb.GenerateRequest(
        request_id=name, text="Return a list of", sampling=pb.SamplingParams(max_tokens=8, ignore_eos=True)
    )
    usage = list(stub.Generate(request, timeout=60))[-1].usage
    trace_id = stub.Explain(pb.ExplainRequest(request_id=name), timeout=10).trace_id

    wanted = {"router", "prefill", "transfer", "decode"}

    def complete(spans: list[tuple[str, object]]) -> bool:
        return wanted <= parts(spans) and len(roots_of(spans)) == 1  # a span may come before its parent

    spans = receiver.trace(trace_id, complete)
    assert wanted <= parts(spans), [(service, span.name) for service, span in spans]
    roots = roots_of(spans)
    assert len(roots) == 1, [span.name for span in roots]
    attributes = {a.key: a.value for a in roots[0].attributes}
    assert attributes["gen_ai.usage.input_tokens"].int_value == usage.prompt_tokens
    assert attributes["gen_ai.usage.output_tokens"].int_value == 8


def roots_of(spans: list[tuple[str, Any]]) -> list[Any]:
    ids = {span.span_id for _, span in spans}
    return [span for _, span in spans if span.parent_span_id not in ids]


def parts(spans: list[tuple[str, object]]) -> set[str]:
    """Which parts of the path a trace shows, by the services' and spans' names."""
    found = set()
    for service, span in spans:
        found |= {part for part in ("router", "prefill", "decode") if part in service}
        found |= {"transfer"} if "transfer" in span.name else set()  # type: ignore[attr-defined]
    return found
