"""The other doors of a running cluster: HTTP, metrics, reflection, the command line and the Python client."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
import httpx
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from baton.client import InferenceClient, Sampling
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from .cluster import Cluster
from .ledgers import workers

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = "The list methods make it easy to"


def greedy_text(stub: inference_pb2_grpc.InferenceServiceStub) -> str:
    request = pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(**GREEDY))
    return "".join(output.text for response in stub.Generate(request, timeout=60) for output in response.outputs)


def test_every_door_gives_the_same_greedy_answer(
    cluster: Cluster, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    expected = greedy_text(stub)
    assert expected.strip()

    body = {"model": "baton-docs-6m", "prompt": PROMPT, **GREEDY}
    whole = httpx.post(f"http://{cluster.http_address}/v1/completions", json=body, timeout=60).raise_for_status().json()
    assert whole["choices"][0]["text"] == expected
    assert whole["usage"]["completion_tokens"] <= 12

    streamed = ""
    with httpx.stream("POST", f"http://{cluster.http_address}/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for line in lines:
        streamed += "".join(choice["text"] for choice in json.loads(line)["choices"])
    assert streamed == expected

    with InferenceClient(cluster.grpc_address) as client:
        assert client.generate(PROMPT, sampling=Sampling(**GREEDY)).text == expected

    command = [sys.executable, "-m", "baton.cluster.cli", "generate", "--address", cluster.grpc_address]
    command += ["--temperature", "0", "--max-tokens", "12", PROMPT]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert expected.strip() in printed


def test_a_repeated_prompt_is_read_from_the_cache(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(1000, 1100)), sampling=pb.SamplingParams(max_tokens=2, ignore_eos=True)
    )
    first, second = (list(stub.Generate(request, timeout=60))[-1].usage for _ in range(2))
    assert first.cached_tokens == 0
    assert second.cached_tokens == 96  # whole blocks of 16


def test_a_repeated_request_id_is_the_same_request(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    request = pb.GenerateRequest(
        request_id="twice", text=PROMPT, sampling=pb.SamplingParams(max_tokens=20, ignore_eos=True)
    )
    first, second = (
        [token for r in stub.Generate(request, timeout=60) for output in r.outputs for token in output.token_ids]
        for _ in range(2)
    )
    assert len(first) == 20
    assert first == second, "sampled at temperature 1, so a second run would differ"


def test_metrics_of_every_service_count_what_was_done(
    cluster: Cluster, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    greedy_text(stub)
    router = httpx.get(f"http://{cluster.metrics_address}/metrics").text
    assert "baton_router" in router
    for record in workers(cluster).values():
        text = httpx.get(f"http://{record.metrics_address}/metrics").text
        steps = [line for line in text.splitlines() if line.startswith("baton_worker_steps_total")]
        assert steps, text
        assert sum(float(line.rsplit(" ", 1)[1]) for line in steps) > 0


def test_status_shows_the_workers(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "baton.cluster.cli", "status", "--address", cluster.grpc_address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for record in workers(cluster).values():
        (line,) = [line for line in shown.splitlines() if f"{record.worker_id}  {record.role}" in line]
        assert f"0 running, 0 waiting, {record.num_blocks} of {record.num_blocks} KV blocks free" in line


def test_reflection_names_the_services(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"baton.v1.InferenceService", "grpc.health.v1.Health"} <= names
