"""Around every call of our servers: who is there, and what an error becomes.

    server = build_server([ErrorInterceptor(), AuthInterceptor([token])])

Servicers are coroutines and async generators; the health service alone answers strangers.
"""

import hmac
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from hashlib import blake2b
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ..core import errors
from ..observe.tracing import valid_traceparent
from .grpc_types import Context, Continuation, Handler, ServerInterceptor

log = logging.getLogger(__name__)

STATUS: dict[type[errors.BatonError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextExceeded: grpc.StatusCode.OUT_OF_RANGE,
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.UnknownRequest: grpc.StatusCode.NOT_FOUND,
    errors.RequestConflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.NotAuthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.WorkerLost: grpc.StatusCode.UNAVAILABLE,
    errors.TransferFailed: grpc.StatusCode.UNAVAILABLE,
    errors.LeaseExpired: grpc.StatusCode.UNAVAILABLE,
    errors.StaleEpoch: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.ModelFault: grpc.StatusCode.DATA_LOSS,
    errors.CorruptPiece: grpc.StatusCode.DATA_LOSS,
    errors.GeometryMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
}
"""The one table of what each error becomes. Anything else that is raised is a bug: INTERNAL, with a fixed text."""

ERROR_KEY = "baton-error"
"""Trailing metadata: the error's name in core/errors.py, so that a client can raise the same."""
RETRY_KEY = "retry-after-ms"
"""Trailing metadata of Overloaded: how long to wait before the next try."""
RETRY_AFTER_MS = 1000
INTERNAL_TEXT = "an internal error; the server's log has the details"
MAX_TEXT = 500  # characters of a status; trailers are bounded, and a character may take twelve bytes there
HEALTH_PREFIX = "/grpc.health.v1.Health/"

_MALFORMED = object()
_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class ErrorInterceptor(ServerInterceptor):
    """BatonErrors become their status, anything else INTERNAL and a log entry, a malformed message INVALID_ARGUMENT.

    It also closes a servicer's generator as soon as the call ends, however it ends. A caller that cancels is no error.
    """

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Handler:
        handler = await continuation(handler_call_details)
        return None if handler is None else _guard(handler, handler_call_details.method)


class AuthInterceptor(ServerInterceptor):
    """Lets in who brings one of the keys as "authorization: Bearer <key>"; denies all else, unknown methods too.

    One cluster token between services, API keys at the router. Compares digests, each time all of them, in constant
    time: neither the right key's content nor its place in the list shows.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)
        if not self._digests or _digest(b"") in self._digests:
            raise errors.ConfigError("authentication needs at least one key, and none may be empty")

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Handler:
        header = _metadata(handler_call_details.invocation_metadata, "authorization")
        if handler_call_details.method.startswith(HEALTH_PREFIX) or self._knows(header):
            return await continuation(handler_call_details)
        # This form reads nothing of the request, so it serves calls of every form.
        return grpc.stream_unary_rpc_method_handler(_deny)

    def _knows(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        digest = _digest(key.encode())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def traceparent_of(context: Context) -> str:
    """The W3C trace context that came with a call; "" when there is none or it is malformed."""
    return valid_traceparent(_metadata(context.invocation_metadata(), "traceparent"))


def authorization_of(context: Context) -> str:
    """What came with a call as "authorization"; AuthInterceptor, where there is one, has looked at it."""
    return _metadata(context.invocation_metadata(), "authorization")


def timeout_of(context: Context) -> float | None:
    """Seconds left of a call's deadline; None: it has none."""
    return context.time_remaining()


def _guard(handler: Handler, method: str) -> Handler:
    inner: Callable[[Any, Context], Any] = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    checked = _CheckedStream if handler.request_streaming else _checked

    async def one(request: Any, context: Context) -> Any:
        async with _statuses(context, method):
            return await inner(checked(request), context)

    async def many(request: Any, context: Context) -> None:
        async with _statuses(context, method), aclosing(inner(checked(request), context)) as answers:
            async for answer in answers:
                await context.write(answer)

    return _MAKERS[handler.request_streaming, handler.response_streaming](
        many if inspect.isasyncgenfunction(inner) else one,
        request_deserializer=_tolerant(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )


@asynccontextmanager
async def _statuses(context: Context, method: str) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise  # a status was set already
    except errors.BatonError as error:
        trailers = [(ERROR_KEY, error.code)]
        if isinstance(error, errors.Overloaded):
            trailers.append((RETRY_KEY, str(RETRY_AFTER_MS)))
        await context.abort(STATUS[type(error)], str(error)[:MAX_TEXT], tuple(trailers))
    except Exception:
        if context.done():  # the caller went away while it was answered
            raise
        log.exception("%s failed", method)
        await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)


class _CheckedStream:
    """Requests, with InvalidRequest raised at a malformed one. No generator: a cancelled read must not end it."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests

    def __aiter__(self) -> "_CheckedStream":
        return self

    async def __anext__(self) -> Any:
        return _checked(await anext(self._requests))


def _checked(request: Any) -> Any:
    if request is _MALFORMED:
        raise errors.InvalidRequest("the message is not of the method's type")
    return request


def _tolerant(deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    def attempt(data: bytes) -> Any:
        try:
            return deserialise(data) if deserialise else data
        except DecodeError:
            return _MALFORMED

    return attempt


async def _deny(requests: Any, context: Context) -> None:
    text = "bring a key: authorization: Bearer <key>"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, text, ((ERROR_KEY, errors.NotAuthenticated.__name__),))


def _metadata(entries: Iterable[Any] | None, key: str) -> str:
    """The value of `key`; "" when it is missing or binary."""
    values = [value for name, value in entries or () if name == key]
    return values[0] if values and isinstance(values[0], str) else ""


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()
