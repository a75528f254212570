"""A cluster lets in who it should: this machine alone, and nobody who does not bring the right token."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import sys

import grpc
import pytest

from baton.v1 import link_pb2, worker_pb2

from .cluster import Cluster
from .ledgers import workers
from .processes import command, descendants, environment, listening, that_know

ASK_RAY = """
import sys
from ray._raylet import GcsClient
assert GcsClient(sys.argv[1]).get_all_node_info(timeout=20)
"""


def raylet(cluster: Cluster) -> int:
    return next(pid for pid in that_know(cluster.token) if "/raylet " in command(pid))


def test_every_port_is_on_this_machine_alone(cluster: Cluster) -> None:
    pids = descendants(cluster.process.pid)
    ports = listening(pids)
    assert len({pid for _, pid in ports}) >= 6, "router, two services and two ranks, Ray"
    open_to_others = [(at, command(pid)) for at, pid in ports if not ipaddress.ip_address(at).is_loopback]
    assert open_to_others == []


def test_no_secret_is_on_a_command_line(cluster: Cluster) -> None:
    secrets = {cluster.token, environment(raylet(cluster))["RAY_AUTH_TOKEN"]}
    assert all(len(secret) >= 32 for secret in secrets)
    pids = descendants(cluster.process.pid) | {cluster.process.pid}
    assert [command(pid) for pid in pids if any(secret in command(pid) for secret in secrets)] == []


@pytest.mark.parametrize("brings", ["nothing", "another token", "its token"])
def test_ray_asks_for_its_token(cluster: Cluster, brings: str) -> None:
    node = raylet(cluster)
    gcs = re.search(r"--gcs-address=(\S+)", command(node))
    assert gcs
    token = {"nothing": None, "another token": "f" * 64, "its token": environment(node)["RAY_AUTH_TOKEN"]}[brings]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    asked = subprocess.run(
        [sys.executable, "-c", ASK_RAY, gcs[1]], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert (asked.returncode == 0) is (brings == "its token"), asked.stderr
    if brings != "its token":
        assert "InvalidAuthToken" in asked.stderr


def methods() -> list[str]:
    """Every method that a worker serves, but health, which is open to all."""
    services = [link_pb2.DESCRIPTOR.services_by_name.values(), worker_pb2.DESCRIPTOR.services_by_name.values()]
    found = [f"/{one.full_name}/{method.name}" for group in services for one in group for method in one.methods]
    return [*found, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]


@pytest.mark.parametrize("token", ["", "wrong"])
def test_every_method_of_a_worker_asks_for_the_cluster_token(cluster: Cluster, token: str) -> None:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    assert len(methods()) >= 5
    for record in workers(cluster).values():
        with grpc.insecure_channel(record.address) as channel:
            for method in methods():
                with pytest.raises(grpc.RpcError) as refusal:
                    list(channel.stream_stream(method)(iter([b""]), metadata=metadata, timeout=20))
                assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
