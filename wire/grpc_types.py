"""Names for grpc's types that its stubs make generic and its runtime does not."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

if TYPE_CHECKING:
    ServerInterceptor: TypeAlias = grpc.aio.ServerInterceptor[Any, Any]
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
else:
    ServerInterceptor = grpc.aio.ServerInterceptor
    Context = grpc.aio.ServicerContext

Handler: TypeAlias = Any
"""A grpc.RpcMethodHandler; the stubs hide its fields."""
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]
