import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from baton.core.errors import ConfigError
from baton.core.frames import Carried, Report
from baton.core.request import Load
from baton.observe import metrics, names
from baton.observe.metrics import RouterMetrics, WorkerMetrics


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_a_router_counts_requests_by_outcome_and_those_in_flight() -> None:
    router = RouterMetrics()
    for _ in range(3):
        router.started()
    router.ended("stop", 0.2)
    router.ended("Overloaded", 0.1)
    router.refused("InvalidRequest")
    router.queued(4)
    router.workers("decode", 2)
    registry = router.registry
    assert value(registry, names.ROUTER_IN_FLIGHT) == 1
    for outcome in ("stop", "Overloaded", "InvalidRequest"):
        assert value(registry, names.ROUTER_REQUESTS, outcome=outcome) == 1
    assert value(registry, names.ROUTER_DURATION + "_sum", outcome="stop") == 0.2
    assert value(registry, names.ROUTER_QUEUED) == 4
    assert value(registry, names.ROUTER_WORKERS, role="decode") == 2


def test_a_router_counts_tokens_and_the_time_between_them() -> None:
    router = RouterMetrics()
    router.prompt(100, cached=32)
    router.first_token(0.05)
    router.completion(1)
    router.completion(4, gap_s=0.04)  # four tokens that came together count as four steps
    registry = router.registry
    assert value(registry, names.ROUTER_TOKENS, kind="prompt") == 100
    assert value(registry, names.ROUTER_TOKENS, kind="cached") == 32
    assert value(registry, names.ROUTER_TOKENS, kind="completion") == 5
    assert value(registry, names.ROUTER_FIRST_TOKEN + "_sum") == 0.05
    assert value(registry, names.ROUTER_INTER_TOKEN + "_count") == 4
    assert value(registry, names.ROUTER_INTER_TOKEN + "_sum") == pytest.approx(0.04)


def test_a_worker_adds_its_reports_up_and_shows_the_latest_gauges() -> None:
    worker = WorkerMetrics()
    report = Report(
        batch_sizes=(1, 3),
        step_s=(0.01, 0.03),
        tokens=4,
        prefill_tokens=50,
        cached_tokens=16,
        carried=(
            Carried(transport="mapped", pieces=2, num_bytes=3_000_000_000, seconds=1.0),
            Carried(transport="ray_store", pieces=1, num_bytes=1_000_000_000, seconds=1.0),
        ),
        load=Load(running=3, waiting=2, waiting_tokens=70, free_blocks=90, total_blocks=100),
        cached_blocks=20,
        held_blocks=10,
        lent_blocks=5,
        preempted_swap=1,
        preempted_recompute=2,
        swap_bytes=1000,
        unused_slots=7,
        device_busy_s=0.5,
        device_idle_s=0.25,
    )
    worker.observe(report)
    worker.observe(report)
    assert value(worker.registry, names.WORKER_UNUSED_SLOTS) == 7
    worker.observe(Report(load=Load(running=1, free_blocks=100, total_blocks=100)))
    registry = worker.registry
    assert value(registry, names.WORKER_STEPS) == 4
    assert value(registry, names.WORKER_STEP + "_sum") == pytest.approx(0.08)
    assert value(registry, names.WORKER_BATCH + "_sum") == 8
    assert value(registry, names.WORKER_DEVICE, state="busy") == 1.0
    assert value(registry, names.WORKER_DEVICE, state="idle") == 0.5
    assert value(registry, names.WORKER_TOKENS, kind="sampled") == 8
    assert value(registry, names.WORKER_TOKENS, kind="prefill") == 100
    assert value(registry, names.WORKER_TOKENS, kind="cached") == 32
    assert value(registry, names.WORKER_PREEMPTIONS, kind="swap") == 2
    assert value(registry, names.WORKER_PREEMPTIONS, kind="recompute") == 4
    assert value(registry, names.WORKER_SWAP_BYTES) == 2000
    assert value(registry, names.WORKER_UNUSED_SLOTS) == 0
    assert value(registry, names.WORKER_TRANSFERS, transport="mapped") == 4
    assert value(registry, names.WORKER_TRANSFERS, transport="ray_store") == 2
    assert value(registry, names.WORKER_TRANSFER_BYTES, transport="mapped") == 6_000_000_000
    assert value(registry, names.WORKER_TRANSFER_SECONDS, transport="ray_store") == 2
    assert value(registry, names.WORKER_TRANSFER_RATE) == 2  # of the last report that had a transfer
    assert value(registry, names.WORKER_SEQUENCES, state="running") == 1
    assert value(registry, names.WORKER_SEQUENCES, state="waiting") == 0
    assert value(registry, names.WORKER_BLOCKS, state="free") == 100
    assert value(registry, names.WORKER_BLOCKS, state="held") == 0


def test_free_blocks_are_those_that_hold_nothing() -> None:
    worker = WorkerMetrics()
    worker.observe(Report(load=Load(free_blocks=90, total_blocks=100), cached_blocks=20, held_blocks=10))
    states = {state: value(worker.registry, names.WORKER_BLOCKS, state=state) for state in ("free", "cached", "held")}
    assert states == {"free": 70, "cached": 20, "held": 10}


def test_metrics_are_served_over_http_each_instance_its_own() -> None:
    one, two = RouterMetrics(), WorkerMetrics()
    servers = [metrics.start_http(one), metrics.start_http(two)]
    try:
        pages = [
            urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10).read().decode() for server in servers
        ]
    finally:
        for server in servers:
            server.close()
    assert [names.ROUTER_QUEUED in page for page in pages] == [True, False]
    assert [names.WORKER_STEPS in page for page in pages] == [False, True]


def test_a_metrics_port_that_is_taken_is_a_config_error() -> None:
    server = metrics.start_http(RouterMetrics())
    try:
        with pytest.raises(ConfigError):
            metrics.start_http(RouterMetrics(), port=int(server.address.rpartition(":")[2]))
    finally:
        server.close()
