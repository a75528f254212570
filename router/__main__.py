"""`python -m baton.router`: builds the router's objects and serves until a signal comes. See config.py."""

import asyncio
import logging
import secrets
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import uvloop

from ..core.errors import ConfigError
from ..core.frames import WorkerFrame
from ..observe import logs
from ..observe.metrics import RouterMetrics, start_http
from ..observe.tracing import setup as setup_tracing
from ..text.generation_config import GenerationDefaults
from ..text.tokenizer import Tokenizer
from ..v1 import inference_pb2, inference_pb2_grpc
from ..wire.interceptors import AuthInterceptor, ErrorInterceptor
from ..wire.links import Link
from ..wire.registry import Registry, WorkerRecord
from ..wire.server import Health, Limits, add_health_and_reflection, bind, build_server
from ..wire.tls import ClientTls, ServerTls
from .config import RouterConfig
from .fleet import Fleet
from .http import HttpDoor, build_app
from .inference import Inference
from .placement import Role
from .records import Records
from .relay import Relay
from .servicer import InferenceServicer
from .telemetry import Telemetry

log = logging.getLogger("baton.router")  # not __main__

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
CLOSE_S = 2.0  # for the doors to close once all requests have ended


def main() -> None:
    try:
        config = RouterConfig.from_environment()
        logs.setup(config.log_format, config.log_level, "router")
        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(serve(config))
    except ConfigError as error:
        print(f"baton router: {error}", file=sys.stderr)
        sys.exit(2)


async def serve(config: RouterConfig) -> None:
    """Until SIGTERM or SIGINT. Raises ConfigError. What was opened last is closed first."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        tls = None
        if config.tls_certificate and config.tls_key:
            tls = ServerTls.from_files(config.tls_certificate, config.tls_key)
        tokenizer = Tokenizer.from_dir(config.model_dir)
        stack.callback(tokenizer.close)
        tracing = setup_tracing("baton-router", config.otlp_endpoint)
        stack.callback(tracing.shutdown)
        metrics = RouterMetrics()
        metrics_server = start_http(metrics, config.host, config.metrics_port)
        stack.callback(metrics_server.close)
        executor = ThreadPoolExecutor(2, "tokenise")
        stack.callback(executor.shutdown, wait=False, cancel_futures=True)
        changed = asyncio.Event()
        fleet = build_fleet(config, metrics, changed)
        stack.push_async_callback(fleet.close)
        telemetry = Telemetry(tracing, metrics, config.model_name)
        relay, inference = build_inference(config, tokenizer, fleet, telemetry, executor)
        server = build_server(
            [ErrorInterceptor(), *([AuthInterceptor(config.api_keys)] if config.api_keys else [])],
            Limits(max_message_bytes=config.max_message_bytes),
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(inference, keyed=bool(config.api_keys)), server
        )
        health = await add_health_and_reflection(server, [SERVICE])
        grpc_address = bind(server, config.host, config.grpc_port, tls)
        app = build_app(
            inference,
            api_keys=config.api_keys,
            max_body_bytes=config.max_message_bytes,
            on_refused=metrics.refused,
        )
        door = HttpDoor(app, config.host, config.http_port, config.tls_certificate, config.tls_key)
        stack.push_async_callback(door.close)
        await server.start()
        stack.push_async_callback(server.stop, CLOSE_S)
        await door.start()
        registry = Registry(config.redis_url, config.cluster_name)
        stack.push_async_callback(registry.close)
        registry.watch(fleet.update)
        watching = asyncio.create_task(show_fleet(fleet, metrics, health, changed))
        print(f"ready grpc={grpc_address} http={door.address} metrics={metrics_server.address}", flush=True)
        await stop.wait()
        log.info("stopping: running requests have %.0f s", config.drain_s)
        watching.cancel()
        await health.set_serving(False)
        await relay.drain(config.drain_s)


def build_fleet(config: RouterConfig, metrics: RouterMetrics, changed: asyncio.Event) -> Fleet:
    """`changed` is set whenever a worker came or went."""
    router_id = f"router-{secrets.token_hex(6)}"
    tls = None if config.worker_tls_ca is None else ClientTls.from_files(config.worker_tls_ca)

    def open_line(
        record: WorkerRecord, on_frame: Callable[[WorkerFrame], None], on_state: Callable[[bool], None]
    ) -> Link:
        worker = (record.worker_id, record.epoch)
        return Link(record.address, worker, router_id, config.cluster_token, on_frame, on_state, tls=tls)

    return Fleet(
        model=config.model_name,
        open_line=open_line,
        max_waiting=config.max_waiting,
        wait_s=config.placement_wait_s,
        on_change=changed.set,
        on_queue=metrics.queued,
    )


def build_inference(
    config: RouterConfig, tokenizer: Tokenizer, fleet: Fleet, telemetry: Telemetry, executor: ThreadPoolExecutor
) -> tuple[Relay, Inference]:
    """Raises ConfigError for a generation_config.json that can't be read."""
    defaults = GenerationDefaults.from_dir(config.model_dir).ending_also_with(tokenizer.eos_token_id)
    records = Records(
        max_running=config.max_running,
        max_ended=config.max_ended,
        max_ended_tokens=config.max_ended_tokens,
        keep_s=config.keep_ended_s,
    )
    relay = Relay(
        workers=fleet,
        limits=fleet.limits,
        tokenizer=tokenizer,
        defaults=defaults,
        records=records,
        telemetry=telemetry,
        executor=executor,
        max_timeout_s=config.max_timeout_s,
    )
    inference = Inference(
        model_name=config.model_name,
        relay=relay,
        records=records,
        metrics=telemetry.metrics,
        served=lambda: fleet.served,
        ready=lambda: fleet.ready and not relay.draining,
        workers=fleet.views,
    )
    return relay, inference


async def show_fleet(fleet: Fleet, metrics: RouterMetrics, health: Health, changed: asyncio.Event) -> None:
    """Tells health and metrics of each change of the fleet."""
    while True:
        await changed.wait()
        changed.clear()
        await health.set_serving(fleet.ready)
        for role in Role:
            metrics.workers(role, fleet.linked(role))


if __name__ == "__main__":
    main()
