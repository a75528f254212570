"""The gRPC face of a worker: links, ledger, drain, status; registration; spans and metrics from the rank's reports."""

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ..core.errors import BatonError, InvalidRequest, Unavailable, WorkerLost
from ..core.frames import Hello, Report, Welcome, WorkerFrame
from ..observe import metrics, tracing
from ..v1 import link_pb2, link_pb2_grpc, worker_pb2, worker_pb2_grpc
from ..wire import codec
from ..wire.grpc_types import Context
from ..wire.interceptors import AuthInterceptor, ErrorInterceptor
from ..wire.registry import Registry, WorkerRecord
from ..wire.server import BETWEEN_SERVICES, Health, add_health_and_reflection, bind, build_server
from ..wire.tls import ServerTls
from .config import WorkerConfig
from .rank_client import RankClient, RankLink
from .records import Kind, Progress, Ready, Record
from .ring import RingPair

_ANSWER_S = 60.0  # a step may be long
_STOP_GRACE_S = 2.0
_RING_LOOK_S = 0.05
_HELLO_S = 10.0
_COUNT = struct.Struct("<I")
_SERVICES = ("baton.v1.LinkService", "baton.v1.WorkerService")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """Where a worker that is ready can be reached, "host:port" each."""

    grpc: str
    metrics: str
    num_blocks: int


class LinkServicer(link_pb2_grpc.LinkServiceServicer):
    def __init__(self, client: RankClient, config: WorkerConfig) -> None:
        self._client = client
        self._welcome = codec.encode_frame(WorkerFrame(welcome=Welcome(worker_id=config.worker_id, epoch=config.epoch)))

    async def Connect(  # noqa: N802 (gRPC's name)
        self, frames: AsyncIterator[link_pb2.ConnectRequest], context: Context
    ) -> AsyncIterator[link_pb2.ConnectResponse]:
        async with self._client.link() as link:
            try:
                async with asyncio.timeout(_HELLO_S):
                    commands = codec.decode_commands(await anext(frames, link_pb2.ConnectRequest()))
            except TimeoutError:
                raise InvalidRequest(f"no Hello came within {_HELLO_S:g} s") from None
            if not commands or not isinstance(commands[0], Hello):
                raise InvalidRequest("the first command on a link is Hello")
            await link.send(commands)
            yield self._welcome
            reading = asyncio.create_task(_read(frames, link))
            try:
                async for frame in link.frames():
                    yield frame
            except _Closed:
                return
            finally:
                reading.cancel()


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, client: RankClient, config: WorkerConfig) -> None:
        self._client = client
        self._config = config

    async def GetLedger(  # noqa: N802
        self, request: worker_pb2.GetLedgerRequest, context: Context
    ) -> worker_pb2.GetLedgerResponse:
        answer = await _ask(self._client, Kind.LEDGER, b"drop" if request.drop_cached else b"")
        return codec.parse(worker_pb2.GetLedgerResponse, answer)

    async def Drain(self, request: worker_pb2.DrainRequest, context: Context) -> worker_pb2.DrainResponse:  # noqa: N802
        timeout_s = min(request.timeout_ms / 1000 or self._config.drain_timeout_s, self._config.drain_timeout_s)
        remaining = await drain(self._client, timeout_s)
        return worker_pb2.DrainResponse(drained=remaining == 0, remaining=remaining)

    async def GetStatus(  # noqa: N802
        self, request: worker_pb2.GetStatusRequest, context: Context
    ) -> worker_pb2.GetStatusResponse:
        return codec.parse(worker_pb2.GetStatusResponse, await _ask(self._client, Kind.STATUS))


async def serve(
    config: WorkerConfig,
    stop: asyncio.Event,
    ready: Callable[[ServiceAddress], None],
    progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Serve one life of a worker until `stop` is set: then take no more, let what runs finish, stop the rank.

    Raises WorkerLost when the rank dies or does not come up in time, ConfigError for what a person must mend.
    """
    async with AsyncExitStack() as stack:
        rings = await _open_rings(config)
        stack.callback(rings.close)
        traces = tracing.setup(f"baton-{config.role}", config.otlp_endpoint, config.worker_id)
        stack.push_async_callback(asyncio.to_thread, traces.shutdown)
        counts = metrics.WorkerMetrics()

        def on_report(report: Report) -> None:
            counts.observe(report)
            for part in report.parts:
                traces.emit(part)

        try:
            client = RankClient(rings, on_report, progress)
        except ProcessLookupError:
            raise WorkerLost("the worker's step loop died as it started") from None
        stack.callback(client.close)
        try:
            async with asyncio.timeout(config.start_timeout_s):
                loaded = await client.ready
        except TimeoutError:
            raise WorkerLost("the worker's step loop did not load its model in time") from None
        shown = metrics.start_http(counts, config.host, config.metrics_port)
        stack.push_async_callback(asyncio.to_thread, shown.close)
        await _serve_ready(config, client, loaded, shown.address, stop, ready)


async def drain(client: RankClient, timeout_s: float) -> int:
    """Take no new sequence and wait for the running ones and the lent blocks. Gives how many are left at the end."""
    try:
        await client.ask(Kind.DRAIN, b"", timeout_s)
    except TimeoutError:
        return int(_COUNT.unpack(await _ask(client, Kind.REMAINING))[0])
    return 0


async def _serve_ready(
    config: WorkerConfig,
    client: RankClient,
    loaded: Ready,
    metrics_address: str,
    stop: asyncio.Event,
    ready: Callable[[ServiceAddress], None],
) -> None:
    server = build_server([ErrorInterceptor(), AuthInterceptor([config.cluster_token])], BETWEEN_SERVICES)
    link_pb2_grpc.add_LinkServiceServicer_to_server(LinkServicer(client, config), server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(client, config), server)
    health = await add_health_and_reflection(server, _SERVICES)
    address = bind(server, config.host, config.port, _tls(config))
    registry = Registry(config.redis_url, config.cluster_name)
    await server.start()
    try:
        await health.set_serving(True)
        registry.register(_record(config, loaded, address, metrics_address))
        ready(ServiceAddress(address, metrics_address, loaded.num_blocks))
        await _until(stop, client, health)
        await registry.unregister()
        await drain(client, config.drain_timeout_s)
        await client.put(Record(Kind.STOP))
    finally:
        await health.set_serving(False)
        await registry.unregister()
        await registry.close()
        await server.stop(_STOP_GRACE_S)


async def _until(stop: asyncio.Event, client: RankClient, health: Health) -> None:
    """Until we are told to stop; raises WorkerLost when the rank dies first."""
    stopping = asyncio.create_task(stop.wait())
    client.lost.add_done_callback(lambda _: stopping.cancel())
    await asyncio.wait([stopping])
    await health.set_serving(False)
    if client.lost.done():
        raise WorkerLost("the worker's step loop has died")


class _Closed(Exception):
    """The router has closed its side of the link: no error, and never told."""


async def _read(frames: AsyncIterator[link_pb2.ConnectRequest], link: RankLink) -> None:
    """Pass the router's frames on until it closes; what goes wrong ends the link."""
    try:
        async for frame in frames:
            await link.send(codec.decode_commands(frame))
        link.end(_Closed())
    except BatonError as error:
        link.end(error)
    except Exception:
        _log.exception("reading link %d failed", link.number)
        link.end(Unavailable("the link failed"))


async def _ask(client: RankClient, kind: Kind, body: bytes = b"") -> bytes:
    try:
        return await client.ask(kind, body, _ANSWER_S)
    except TimeoutError:
        raise Unavailable(f"the worker's step loop did not answer within {_ANSWER_S:.0f} s") from None


async def _open_rings(config: WorkerConfig) -> RingPair:
    """The ring, as soon as the rank has made it. Its files go at once, so nothing stays behind whoever dies."""
    try:
        async with asyncio.timeout(config.start_timeout_s):
            while True:
                try:
                    rings = RingPair.for_service(config.ring_dir, config.ring_name)
                    break
                except FileNotFoundError:
                    await asyncio.sleep(_RING_LOOK_S)
    except TimeoutError:
        raise WorkerLost("the worker's step loop did not start") from None
    rings.unlink()
    return rings


def _record(config: WorkerConfig, loaded: Ready, address: str, metrics_address: str) -> WorkerRecord:
    return WorkerRecord(
        worker_id=config.worker_id,
        epoch=config.epoch,
        role=config.role,
        address=address,
        model=config.model_name,
        fingerprint=loaded.geometry.fingerprint,
        model_fingerprint=loaded.geometry.model or loaded.geometry.fingerprint,
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.vocab_size,
        dtype=loaded.geometry.dtype,
        block_tokens=loaded.geometry.block_tokens,
        num_blocks=loaded.num_blocks,
        metrics_address=metrics_address,
    )


def _tls(config: WorkerConfig) -> ServerTls | None:
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return ServerTls.from_files(config.tls_certificate, config.tls_key, config.tls_client_ca)
