"""One request is one trace, over router, prefill, transfer and decode."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from .cluster import Cluster, serve
from .otlp import Receiver
from .statuses import statuses
from .test_lifecycle import until


def test_one_trace_holds_router_prefill_transfer_and_decode(
    cluster: Cluster, stub: inference_pb2_grpc.InferenceServiceStub, receiver: Receiver, device: str
) -> None:
    settled(cluster, stub, device)
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
    assert carriers(spans) == {carried_by(device)}
    assert carried_by(device) in carried_ways(cluster)


def test_pinned_to_the_object_store_it_carries_the_bytes(tmp_path: Path, receiver: Receiver, device: str) -> None:
    flags = ["--device", device, "--transport", "ray_store", "--otlp-endpoint", f"http://{receiver.address}"]
    with serve(tmp_path, *flags) as cluster, cluster.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        name = f"traced-{secrets.token_hex(4)}"
        request = pb.GenerateRequest(request_id=name, text="Return a list of", sampling=pb.SamplingParams(max_tokens=8))
        list(stub.Generate(request, timeout=60))
        trace_id = stub.Explain(pb.ExplainRequest(request_id=name), timeout=10).trace_id
        spans = receiver.trace(trace_id, lambda spans: {"transfer", "decode"} <= parts(spans))
        assert carriers(spans) == {"ray_store"}
        assert carried_ways(cluster) == {"ray_store"}


def carried_by(device: str) -> str:
    """The fastest that there is between two workers of this machine."""
    return "mapped" if device == "cpu" else "ray_store"


def settled(cluster: Cluster, stub: inference_pb2_grpc.InferenceServiceStub, device: str) -> None:
    """The workers have met: their first KV goes by the object store, whatever the others do.

    Other tests leave peers in their status that are dead; a mapped one is alive.
    """
    request = pb.GenerateRequest(text="The workers have to meet", sampling=pb.SamplingParams(max_tokens=2))
    list(stub.Generate(request, timeout=60))
    until(lambda: carried_by(device) in carried_ways(cluster))


def carriers(spans: list[tuple[str, Any]]) -> set[str]:
    """What carried KV, by the spans of its transfers."""
    transfers = [span for _, span in spans if span.name == "kv_transfer"]
    assert transfers
    return {a.value.string_value for span in transfers for a in span.attributes if a.key == "baton.transfer.transport"}


def carried_ways(cluster: Cluster) -> set[str]:
    """The same, as the workers' own status has it."""
    return {way.transport for status in statuses(cluster).values() for way in status.ways}


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
