"""Asks every worker of a cluster how it is, as an operator would."""

from __future__ import annotations

from typing import Any

import grpc

from baton.v1 import worker_pb2, worker_pb2_grpc

from .cluster import Cluster
from .ledgers import workers


def statuses(cluster: Cluster) -> dict[str, Any]:
    """GetStatusResponse of every worker."""
    answers = {}
    for worker_id, record in workers(cluster).items():
        with grpc.insecure_channel(record.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            answers[worker_id] = stub.GetStatus(
                worker_pb2.GetStatusRequest(), metadata=(("authorization", f"Bearer {cluster.token}"),), timeout=30
            )
    return answers
