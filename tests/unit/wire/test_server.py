import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.core.errors import ConfigError
from baton.v1 import worker_pb2, worker_pb2_grpc
from baton.wire.channels import open_channel
from baton.wire.interceptors import ErrorInterceptor
from baton.wire.server import BETWEEN_SERVICES, Limits, add_health_and_reflection, bind, build_server
from baton.wire.tls import ClientTls, ServerTls

SERVICE = "baton.v1.WorkerService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.answer = asyncio.Event()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        self.called.set()
        await self.answer.wait()
        return worker_pb2.DrainResponse(drained=True)

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.GetStatusResponse:
        return worker_pb2.GetStatusResponse(worker_id="x" * 200_000)


async def test_health_says_what_the_server_says_for_each_service() -> None:
    server = build_server([ErrorInterceptor()])
    health = await add_health_and_reflection(server, [SERVICE])
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for serving, status in ((False, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
            await health.set_serving(serving)
            for name in ("", SERVICE):
                assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == status
    await server.stop(None)


async def test_reflection_lists_the_services() -> None:
    server = build_server([ErrorInterceptor()])
    await add_health_and_reflection(server, [SERVICE])
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in (await call.read()).list_services_response.service}
    await server.stop(None)
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_a_port_that_is_taken_is_a_config_error() -> None:
    first, second = build_server([]), build_server([])
    port = int(bind(first, "127.0.0.1", 0).rpartition(":")[2])
    await first.start()
    with pytest.raises(ConfigError, match=str(port)):
        bind(second, "127.0.0.1", port)
    await first.stop(None)


async def test_messages_above_the_limit_are_refused() -> None:
    server = build_server([ErrorInterceptor()], Limits(max_message_bytes=100_000))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(), server)
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(address, limits=BETWEEN_SERVICES) as channel:
        call = channel.unary_unary(f"/{SERVICE}/GetStatus")(b"\x0a" * 150_000)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop(None)


async def test_calls_above_the_limit_are_refused_at_once() -> None:
    server = build_server([ErrorInterceptor()], Limits(max_rpcs=1))
    worker = Worker()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(address) as channel, asyncio.timeout(20):
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        first = stub.Drain(worker_pb2.DrainRequest())
        await worker.called.wait()
        assert await stub.Drain(worker_pb2.DrainRequest()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        worker.answer.set()
        assert (await first).drained
    await server.stop(None)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True)
    return paths


async def test_tls_serves_those_who_trust_it_and_mutual_tls_those_it_trusts(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    for client_ca, with_key, code in (
        (None, False, grpc.StatusCode.OK),
        (cert, True, grpc.StatusCode.OK),
        (cert, False, grpc.StatusCode.UNAVAILABLE),
    ):
        server = build_server([ErrorInterceptor()])
        await add_health_and_reflection(server, [SERVICE])
        address = bind(server, "127.0.0.1", 0, ServerTls.from_files(cert, key, client_ca))
        await server.start()
        client = ClientTls.from_files(cert, cert if with_key else None, key if with_key else None)
        async with open_channel(address, client) as channel:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert await call.code() is code
        async with open_channel(address) as channel:  # without TLS nobody gets in
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
        await server.stop(None)


def test_a_certificate_with_another_s_key_is_a_config_error(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    assert openssl
    other, locked = tmp_path / "other.pem", tmp_path / "locked.pem"
    subprocess.run([openssl, "genrsa", "-out", other, "2048"], check=True, capture_output=True)
    subprocess.run(
        [openssl, "genrsa", "-aes128", "-passout", "pass:x", "-out", locked, "2048"], check=True, capture_output=True
    )
    for key in (other, locked):
        with pytest.raises(ConfigError, match="can't be used"):
            ServerTls.from_files(certificate[0], key)


def test_tls_files_that_are_missing_or_no_pem_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(ConfigError):
            ServerTls.from_files(path, path)


def test_wire_and_observe_import_neither_torch_nor_ray() -> None:
    modules = ("wire.codec", "wire.worker_codec", "wire.server", "wire.interceptors", "wire.links", "wire.registry")
    modules += ("observe.tracing", "observe.metrics", "observe.logs")
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module("baton." + name)
assert not {{"torch", "ray", "transformers", "numpy"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
