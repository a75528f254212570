"""A gRPC server with bounds: build it, bind it, tell its health."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.errors import ConfigError
from .grpc_types import ServerInterceptor
from .tls import ServerTls

log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one server lets its callers do. The defaults suit a port that strangers reach."""

    max_message_bytes: int = 4 << 20
    window_bytes: int = 1 << 20  # of one stream, sent and not yet read; a round trip moves no more
    max_streams: int = 256  # at once, of one connection; more wait at the client
    max_rpcs: int = 4096  # at once, of the server; more get RESOURCE_EXHAUSTED
    keepalive_s: float = 30.0  # how long a connection may be silent before it is asked for a sign of life
    keepalive_timeout_s: float = 10.0  # how long it has to give one
    min_ping_s: float = 20.0  # callers that ping more often are sent away


BETWEEN_SERVICES = Limits(
    max_message_bytes=16 << 20, window_bytes=4 << 20, keepalive_s=4.0, keepalive_timeout_s=4.0, min_ping_s=1.0
)
"""For ports that only our own services reach: prompts of a million tokens fit, a dead peer is noticed within 8 s."""


def build_server(interceptors: Sequence[ServerInterceptor], limits: Limits = Limits()) -> grpc.aio.Server:
    """A server without services or ports. The first interceptor is the outermost."""
    return grpc.aio.server(
        interceptors=list(interceptors),
        maximum_concurrent_rpcs=limits.max_rpcs,
        options=[
            ("grpc.so_reuseport", 0),  # a taken port is an error, not a second listener
            *window(limits),
            ("grpc.max_receive_message_length", limits.max_message_bytes),
            ("grpc.max_send_message_length", limits.max_message_bytes),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", limits.max_streams),
            ("grpc.keepalive_time_ms", round(limits.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.ping_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
            ("grpc.http2.min_ping_interval_without_data_ms", round(limits.min_ping_s * 1000)),
        ],
    )


def window(limits: Limits) -> list[tuple[str, int]]:
    """Channel options that hold a stream's window fixed. gRPC's own estimate of bandwidth times delay grows it as fast
    as bytes arrive, read or not: over loopback a peer that read nothing was sent 6 to over 70 MB before a write waited.
    """
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", limits.window_bytes)]


def bind(server: grpc.aio.Server, host: str, port: int, tls: ServerTls | None = None) -> str:
    """Opens a port, any free one for 0; gives the address, "host:port". Raises ConfigError when it can't be had."""
    where = f"[{host}]" if ":" in host else host
    try:
        if tls is None:
            bound = server.add_insecure_port(f"{where}:{port}")
        else:
            bound = server.add_secure_port(f"{where}:{port}", tls.credentials())
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ConfigError(f"can't listen on {where}:{port}: stop what uses the port, or choose another")
    return f"{where}:{bound}"


class Health:
    """The standard health service: whole server ("") and each service say the same."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._names = ("", *service_names)
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.servicer.set(name, status.SERVING if serving else status.NOT_SERVING)


async def add_health_and_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> Health:
    """Adds both standard services beside the named ones (full names, "baton.v1.LinkService"). Starts as NOT_SERVING."""
    state = Health(service_names)
    health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)
    reflection.enable_server_reflection((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await state.set_serving(False)
    return state
