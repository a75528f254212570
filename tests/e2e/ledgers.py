"""Asks every worker of a cluster for its ledger, as an operator would."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from baton.v1 import worker_pb2, worker_pb2_grpc
from baton.wire.registry import Registry

from .cluster import Cluster


def workers(cluster: Cluster) -> dict[str, Any]:
    """The workers' records in Redis, by worker id."""

    async def read() -> dict[str, Any]:
        registry = Registry(cluster.redis_url, "baton")
        fleet: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        registry.watch(lambda records: fleet.done() or not records or fleet.set_result(records))
        try:
            return {str(key): record for key, record in (await asyncio.wait_for(fleet, 20)).items()}
        finally:
            await registry.close()

    return asyncio.run(read())


def dump(cluster: Cluster, *, drop_cached: bool = False) -> dict[str, Any]:
    """GetLedgerResponse of every worker."""
    answers = {}
    for worker_id, record in workers(cluster).items():
        with grpc.insecure_channel(record.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            answers[worker_id] = stub.GetLedger(
                worker_pb2.GetLedgerRequest(drop_cached=drop_cached),
                metadata=(("authorization", f"Bearer {cluster.token}"),),
                timeout=30,
            )
    return answers


def faults(cluster: Cluster) -> list[str]:
    """What is not as it must be when nothing runs. Empty: clean."""
    found = []
    for worker_id, ledger in dump(cluster, drop_cached=True).items():
        found += [f"{worker_id}: {violation}" for violation in ledger.violations]
        if ledger.free_blocks != ledger.total_blocks or ledger.lent_blocks or ledger.holders:
            found.append(f"{worker_id}: {ledger}")
        if ledger.transport_objects:
            found.append(f"{worker_id}: {ledger.transport_objects} transport objects live on")
    return found


def assert_clean(cluster: Cluster, timeout_s: float = 30.0) -> None:
    """Every block of every worker is free within the time, and nothing of a transfer lives on."""
    assert workers(cluster)
    deadline = time.monotonic() + timeout_s
    while (found := faults(cluster)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not found, "\n".join(found)
