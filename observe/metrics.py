"""Prometheus metrics: what a router and a worker count, and the small HTTP server that shows it."""

import threading
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ..core.errors import ConfigError
from ..core.frames import Report
from . import names

SHORT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class RouterMetrics:
    """What a router counts. Thread-safe."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(names.ROUTER_REQUESTS, "Requests that ended.", ["outcome"], registry=registry)
        self._in_flight = Gauge(names.ROUTER_IN_FLIGHT, "Requests accepted and not ended.", registry=registry)
        self._queued = Gauge(names.ROUTER_QUEUED, "Requests that wait for a place.", registry=registry)
        self._duration = Histogram(
            names.ROUTER_DURATION, "Arrival to end.", ["outcome"], buckets=LONG_S, registry=registry
        )
        self._first = Histogram(names.ROUTER_FIRST_TOKEN, "Arrival to first token.", buckets=LONG_S, registry=registry)
        self._inter = Histogram(
            names.ROUTER_INTER_TOKEN, "Between tokens of one answer.", buckets=SHORT_S, registry=registry
        )
        self._tokens = Counter(names.ROUTER_TOKENS, "Tokens of prompts and answers.", ["kind"], registry=registry)
        self._workers = Gauge(names.ROUTER_WORKERS, "Workers with an open link.", ["role"], registry=registry)

    def started(self) -> None:
        """A request was accepted."""
        self._in_flight.inc()

    def ended(self, outcome: str, duration_s: float) -> None:
        """An accepted request ended. `outcome`: a FinishReason's value or the name of an error in core/errors.py."""
        self._in_flight.dec()
        self._requests.labels(outcome).inc()
        self._duration.labels(outcome).observe(duration_s)

    def refused(self, outcome: str) -> None:
        """A request was refused before it was accepted; it counts as ended."""
        self._requests.labels(outcome).inc()

    def queued(self, requests: int) -> None:
        self._queued.set(requests)

    def prompt(self, tokens: int, cached: int = 0) -> None:
        """`cached` of them prefill did not compute."""
        self._tokens.labels("prompt").inc(tokens)
        self._tokens.labels("cached").inc(cached)

    def first_token(self, seconds: float) -> None:
        """Since arrival."""
        self._first.observe(seconds)

    def completion(self, tokens: int, gap_s: float | None = None) -> None:
        """New tokens of one answer, `gap_s` after its last ones; None: the first ones."""
        self._tokens.labels("completion").inc(tokens)
        if gap_s is not None:
            for _ in range(tokens):
                self._inter.observe(gap_s / tokens)

    def workers(self, role: str, linked: int) -> None:
        self._workers.labels(role).set(linked)


class WorkerMetrics:
    """What a worker counts, from its step loop's reports. Thread-safe."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._steps = Counter(names.WORKER_STEPS, "Steps run.", registry=registry)
        self._step = Histogram(names.WORKER_STEP, "Duration of a step.", buckets=SHORT_S, registry=registry)
        self._device = Counter(names.WORKER_DEVICE, "A GPU at steps and between them.", ["state"], registry=registry)
        self._batch = Histogram(names.WORKER_BATCH, "Sequences in a step.", buckets=BATCH, registry=registry)
        self._tokens = Counter(names.WORKER_TOKENS, "Tokens sampled, computed, found.", ["kind"], registry=registry)
        self._sequences = Gauge(names.WORKER_SEQUENCES, "Sequences here.", ["state"], registry=registry)
        self._waiting = Gauge(names.WORKER_WAITING_TOKENS, "Prompt tokens still to compute.", registry=registry)
        self._blocks = Gauge(names.WORKER_BLOCKS, "KV blocks; lent ones are held too.", ["state"], registry=registry)
        self._unused = Gauge(
            names.WORKER_UNUSED_SLOTS, "Token slots of held KV blocks that hold no token.", registry=registry
        )
        self._preemptions = Counter(
            names.WORKER_PREEMPTIONS,
            "Sequences that made room, by what became of their KV.",
            ["kind"],
            registry=registry,
        )
        self._swapped = Counter(names.WORKER_SWAP_BYTES, "Bytes to and from host memory.", registry=registry)
        by = ["transport"]
        self._transfers = Counter(names.WORKER_TRANSFERS, "Pieces pulled.", by, registry=registry)
        self._bytes = Counter(names.WORKER_TRANSFER_BYTES, "Bytes pulled.", by, registry=registry)
        self._seconds = Counter(names.WORKER_TRANSFER_SECONDS, "Time spent in pulls.", by, registry=registry)
        self._rate = Gauge(names.WORKER_TRANSFER_RATE, "GB/s of the latest reported pulls.", registry=registry)

    def observe(self, report: Report) -> None:
        self._steps.inc(report.steps)
        for seconds, size in zip(report.step_s, report.batch_sizes, strict=True):
            self._step.observe(seconds)
            self._batch.observe(size)
        for state, seconds in (("busy", report.device_busy_s), ("idle", report.device_idle_s)):
            self._device.labels(state).inc(seconds)
        kinds = (("sampled", report.tokens), ("prefill", report.prefill_tokens), ("cached", report.cached_tokens))
        for kind, tokens in kinds:
            self._tokens.labels(kind).inc(tokens)
        for kind, sequences in (("swap", report.preempted_swap), ("recompute", report.preempted_recompute)):
            self._preemptions.labels(kind).inc(sequences)
        self._swapped.inc(report.swap_bytes)
        self._unused.set(report.unused_slots)
        for one in report.carried:
            self._transfers.labels(one.transport).inc(one.pieces)
            self._bytes.labels(one.transport).inc(one.num_bytes)
            self._seconds.labels(one.transport).inc(one.seconds)
        seconds = sum(one.seconds for one in report.carried)
        if seconds > 0:
            self._rate.set(sum(one.num_bytes for one in report.carried) / seconds / 1e9)
        load = report.load
        self._sequences.labels("running").set(load.running)
        self._sequences.labels("waiting").set(load.waiting)
        self._waiting.set(load.waiting_tokens)
        self._blocks.labels("free").set(load.free_blocks - report.cached_blocks)  # the load counts evictable ones too
        self._blocks.labels("cached").set(report.cached_blocks)
        self._blocks.labels("held").set(report.held_blocks)
        self._blocks.labels("lent").set(report.lent_blocks)


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """Serves /metrics on a daemon thread."""

    address: str  # "host:port"
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        """Closes the port. Again changes nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def start_http(metrics: RouterMetrics | WorkerMetrics, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Shows `metrics` over plain HTTP; port 0: any free one. Raises ConfigError when the port can't be had."""
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError:
        raise ConfigError(
            f"can't listen on {host}:{port} for metrics: stop what uses the port, or choose another"
        ) from None
    where = f"[{host}]" if ":" in host else host
    return MetricsServer(f"{where}:{server.server_port}", server, thread)
