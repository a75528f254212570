"""The router as a process of its own, with nobody behind it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.router.config import VARIABLE, RouterConfig
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc


def start(config: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "baton.router"],
        env={**os.environ, VARIABLE: config},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def a_config(model_dir: Path, grpc_port: int = 0) -> str:
    return RouterConfig(
        model_dir=model_dir,
        model_name="m",
        redis_url="redis://127.0.0.1:1/0",  # nobody listens there
        grpc_port=grpc_port,
        http_port=0,
        metrics_port=0,
        api_keys=("key",),
    ).to_json()


def test_it_opens_its_doors_without_workers_or_redis_and_ends_on_sigterm(model_dir: Path) -> None:
    process = start(a_config(model_dir))
    try:
        assert process.stdout
        word, *doors = process.stdout.readline().split()
        assert word == "ready"
        at = dict(door.split("=") for door in doors)
        assert httpx.get(f"http://{at['http']}/health").status_code == 503
        assert "baton_router" in httpx.get(f"http://{at['metrics']}/metrics").text
        with grpc.insecure_channel(at["grpc"]) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refusal:
                stub.ListModels(pb.ListModelsRequest(), timeout=10)
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
            key = (("authorization", "Bearer key"),)
            listed = stub.ListModels(pb.ListModelsRequest(), metadata=key, timeout=10)
            assert [(model.name, model.ready) for model in listed.models] == [("m", False)]
            tokens = stub.Tokenize(pb.TokenizeRequest(text="hi"), metadata=key, timeout=10).token_ids
            again = stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens), metadata=key, timeout=10)
            assert again.text == "hi"
            with pytest.raises(grpc.RpcError) as refusal:
                list(stub.Generate(pb.GenerateRequest(text="hi"), metadata=key, timeout=10))
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        port = int(at["grpc"].rsplit(":", 1)[1])
        second = start(a_config(model_dir, port))
        _, complaint = second.communicate(timeout=60)
        assert second.returncode == 2
        assert "choose another" in complaint
        assert "Traceback" not in complaint
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_a_wrong_configuration_is_one_line(model_dir: Path) -> None:
    process = start("{}")
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaint.startswith("baton router:")
    assert len(complaint.splitlines()) == 1


def test_it_needs_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'numpy'}"
    check = f"import sys, baton.router.__main__; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
