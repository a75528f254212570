import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import symbol_database
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.core import errors
from baton.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    link_pb2,
    link_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from baton.wire import interceptors
from baton.wire.interceptors import AuthInterceptor, ErrorInterceptor
from baton.wire.server import BETWEEN_SERVICES, add_health_and_reflection, bind, build_server
from baton.wire.tls import bearer

SERVICES = ("baton.v1.InferenceService", "baton.v1.LinkService", "baton.v1.WorkerService")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Body = Callable[[Any], Awaitable[None]]


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Answers as the test says, unary and streaming."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.before: Body = self.nothing
        self.after: Body = self.nothing

    async def nothing(self, context: Any) -> None:
        pass

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            await self.before(context)
            yield inference_pb2.GenerateResponse(request_id=request.request_id)
            await self.after(context)
        finally:
            self.closed.set()

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Any) -> inference_pb2.CancelResponse:
        await self.before(context)
        return inference_pb2.CancelResponse(found=True)


class Links(link_pb2_grpc.LinkServiceServicer):
    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[link_pb2.ConnectResponse]:
        async for _ in request_iterator:
            yield link_pb2.ConnectResponse()


@asynccontextmanager
async def serving(servicer: Inference, *more: Any) -> AsyncIterator[grpc.aio.Channel]:
    server = build_server([ErrorInterceptor(), *more], BETWEEN_SERVICES)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    link_pb2_grpc.add_LinkServiceServicer_to_server(Links(), server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker_pb2_grpc.WorkerServiceServicer(), server)
    await add_health_and_reflection(server, SERVICES)
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel
    finally:
        await server.stop(None)


def raising(error: BaseException) -> Body:
    async def body(context: Any) -> None:
        raise error

    return body


async def failed(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drain(call) if hasattr(call, "read") else call)
    return caught.value


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def all_errors() -> list[type[errors.BatonError]]:
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__base__ is errors.BatonError]


def test_every_error_has_a_status() -> None:
    assert set(interceptors.STATUS) == set(all_errors())
    assert not {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} & set(interceptors.STATUS.values())


@pytest.mark.parametrize("kind", all_errors())
async def test_each_error_becomes_its_status_and_can_be_raised_again(kind: type[errors.BatonError]) -> None:
    servicer = Inference()
    servicer.before = raising(kind("what the client reads"))
    async with serving(servicer) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for call in (stub.Cancel(inference_pb2.CancelRequest()), stub.Generate(inference_pb2.GenerateRequest())):
            if kind is errors.Cancelled:  # grpc raises CancelledError for this status of a unary call
                assert await call.code() is grpc.StatusCode.CANCELLED
                continue
            error = await failed(call)
            assert error.code() is interceptors.STATUS[kind]
            assert dict(error.trailing_metadata())[interceptors.ERROR_KEY] == kind.__name__
            assert error.details() == "what the client reads"


async def test_an_overloaded_server_says_when_to_come_back() -> None:
    servicer = Inference()
    async with serving(servicer) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        servicer.before = raising(errors.Overloaded("full"))
        error = await failed(stub.Cancel(inference_pb2.CancelRequest()))
        assert dict(error.trailing_metadata())[interceptors.RETRY_KEY] == str(interceptors.RETRY_AFTER_MS)
        servicer.before = raising(errors.UnknownModel("none"))
        error = await failed(stub.Cancel(inference_pb2.CancelRequest()))
        assert interceptors.RETRY_KEY not in dict(error.trailing_metadata())


async def test_an_unexpected_error_is_logged_and_its_text_kept_from_the_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    servicer = Inference()
    servicer.before = raising(RuntimeError("/etc/secret"))
    async with serving(servicer) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for call in (stub.Cancel(inference_pb2.CancelRequest()), stub.Generate(inference_pb2.GenerateRequest())):
            error = await failed(call)
            assert error.code() is grpc.StatusCode.INTERNAL
            assert error.details() == interceptors.INTERNAL_TEXT
            assert "secret" not in str(error.trailing_metadata())
    assert [record.levelname for record in caplog.records if record.name == interceptors.__name__] == ["ERROR"] * 2


async def test_an_error_after_the_first_message_still_becomes_its_status() -> None:
    servicer = Inference()
    servicer.after = raising(errors.WorkerLost("gone"))
    async with serving(servicer) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest(request_id="r"))
        assert (await call.read()).request_id == "r"
        assert (await failed(call)).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("away", ["cancel", "deadline", "disconnect"])
async def test_a_caller_who_goes_ends_the_generator_and_is_no_error(
    away: str, caplog: pytest.LogCaptureFixture
) -> None:
    servicer = Inference()
    never = asyncio.Event()

    async def wait(context: Any) -> None:
        await never.wait()

    servicer.after = wait
    async with serving(servicer) as channel:
        timeout = 0.3 if away == "deadline" else None
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(), timeout=timeout
        )
        await call.read()
        if away == "cancel":
            call.cancel()
        if away == "disconnect":
            await channel.close()
        async with asyncio.timeout(10):
            await servicer.closed.wait()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_caller_who_goes_while_it_is_written_to_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    servicer = Inference()
    gone = asyncio.Event()

    async def flood(context: Any) -> None:
        try:
            while not context.done():
                await context.write(inference_pb2.GenerateResponse(request_id="x" * 10000))
        finally:
            gone.set()

    servicer.before = flood
    async with serving(servicer) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest())
        await call.read()
        call.cancel()
        async with asyncio.timeout(10):
            await gone.wait()
            await servicer.closed.wait()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_bytes_that_are_no_message_are_an_invalid_argument() -> None:
    async with serving(Inference()) as channel:
        for path, make in (
            ("/baton.v1.InferenceService/Cancel", channel.unary_unary),
            ("/baton.v1.InferenceService/Generate", channel.unary_stream),
        ):
            error = await failed(make(path)(b"\xff\xff\xff"))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

        async def requests() -> AsyncIterator[bytes]:
            yield link_pb2.ConnectRequest().SerializeToString()
            yield b"\xff\xff\xff"

        call = channel.stream_stream("/baton.v1.LinkService/Connect")(requests())
        assert await call.read() == b""
        assert (await failed(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_long_error_text_still_reaches_the_caller() -> None:
    servicer = Inference()
    servicer.before = raising(errors.InvalidRequest("\U0001f300" * 5000))
    async with serving(servicer) as channel:
        error = await failed(inference_pb2_grpc.InferenceServiceStub(channel).Cancel(inference_pb2.CancelRequest()))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "\U0001f300" * interceptors.MAX_TEXT


def every_method() -> list[tuple[str, bool, bool]]:
    """Path, whether requests stream, whether responses do: of all services whose descriptors are loaded."""
    pool = symbol_database.Default().pool
    found = []
    for service in (*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"):
        for method in pool.FindServiceByName(service).methods:
            found.append((f"/{service}/{method.name}", method.client_streaming, method.server_streaming))
    return found


def test_the_list_of_methods_is_whole() -> None:
    modules = (inference_pb2, link_pb2, worker_pb2)
    services = {f"baton.v1.{name}" for module in modules for name in module.DESCRIPTOR.services_by_name}
    assert services == set(SERVICES)
    assert len(every_method()) == 7 + 1 + 3 + 3 + 1


@pytest.mark.parametrize(
    "metadata",
    [(), bearer("wrong"), bearer("Token"), (("authorization", "token"),), (("authorization", "Basic token"),)],
)
async def test_no_method_but_health_answers_without_the_key(metadata: Any) -> None:
    async with serving(Inference(), AuthInterceptor(["token"])) as channel:
        for path, requests_stream, responses_stream in [*every_method(), ("/unknown.Service/Method", False, False)]:
            if path.startswith(interceptors.HEALTH_PREFIX):
                continue
            kinds = {(False, False): "unary_unary", (False, True): "unary_stream"}
            kinds |= {(True, False): "stream_unary", (True, True): "stream_stream"}
            method = getattr(channel, kinds[requests_stream, responses_stream])(path)
            call = method(metadata=metadata) if requests_stream else method(b"", metadata=metadata)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED, path
            assert "token" not in (await call.details() or "").lower(), path


async def test_health_answers_strangers() -> None:
    async with serving(Inference(), AuthInterceptor(["token"])) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_each_of_several_keys_is_let_in() -> None:
    async with serving(Inference(), AuthInterceptor(["one", "two"])) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for key in ("one", "two"):
            assert (await stub.Cancel(inference_pb2.CancelRequest(), metadata=bearer(key))).found


@pytest.mark.parametrize("keys", [[], [""], ["a", ""]])
def test_authentication_without_keys_is_refused_at_start(keys: list[str]) -> None:
    with pytest.raises(errors.ConfigError):
        AuthInterceptor(keys)


async def test_trace_context_and_deadline_are_read_from_a_call() -> None:
    servicer = Inference()
    seen: list[tuple[str, float | None]] = []

    async def note(context: Any) -> None:
        seen.append((interceptors.traceparent_of(context), interceptors.timeout_of(context)))

    servicer.before = note
    async with serving(servicer) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await stub.Cancel(inference_pb2.CancelRequest(), metadata=(("traceparent", TRACEPARENT),), timeout=60)
        await stub.Cancel(inference_pb2.CancelRequest(), metadata=(("traceparent", "nonsense"),))
    assert [parent for parent, _ in seen] == [TRACEPARENT, ""]
    first, second = (timeout for _, timeout in seen)
    assert first is not None
    assert 0 < first < 90  # it crosses rounded
    assert second is None
