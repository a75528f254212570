"""gRPC statuses as the errors of `core/errors.py`: a caller catches classes and never looks at codes."""

from collections.abc import Iterable
from typing import Any

import grpc

from ..core import errors
from ..core.errors import BatonError, Unavailable


class ServerFault(BatonError):
    """The server failed in a way it should not; its log says more."""


class NoAnswer(Unavailable):
    """Nothing answers at the address, or the connection broke."""


_BY_STATUS: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.ContextExceeded,
    grpc.StatusCode.NOT_FOUND: errors.UnknownModel,
    grpc.StatusCode.ALREADY_EXISTS: errors.RequestConflict,
    grpc.StatusCode.UNAUTHENTICATED: errors.NotAuthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: NoAnswer,  # a router names the error
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.DATA_LOSS: errors.CorruptPiece,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ConfigError,
}
STREAM_BROKE = "The stream ended before its last message."
_ERROR_KEY = "baton-error"  # trailing metadata: the error's name in core/errors.py
_TOO_LONG = "larger than max"
_RETRY_KEY = "retry-after-ms"  # of Overloaded


def from_status(code: grpc.StatusCode, details: str | None, trailing: Iterable[Any] | None) -> BatonError:
    """The error that the server named in its trailing metadata (key and value pairs), else the status's own."""
    text = details or code.name
    said = {key: str(value) for key, value in trailing or ()}
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LONG in text:
        return errors.InvalidRequest(text)  # gRPC's own word for it; another try would end the same way
    error = errors.from_code(said[_ERROR_KEY], text) if _ERROR_KEY in said else _BY_STATUS.get(code, ServerFault)(text)
    if isinstance(error, errors.Overloaded) and said.get(_RETRY_KEY, "").isdecimal():
        error.retry_after_s = int(said[_RETRY_KEY]) / 1000
    return error
