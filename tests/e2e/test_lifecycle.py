"""A cluster's life with every default: it starts, mends a dead worker, and leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from .cluster import Cluster, free_port, serve, stop, wait_ready
from .ledgers import assert_clean, workers
from .processes import descendants, that_know, with_command


def until(holds: Callable[[], object], timeout_s: float = 60.0) -> object:
    deadline = time.monotonic() + timeout_s
    while not (value := holds()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)
    return value


def generate(cluster: Cluster, **sampling: object) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(text="The list methods", sampling=pb.SamplingParams(**sampling))
    with cluster.channel() as channel:
        return list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60))


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_that_is_killed_comes_back_under_a_new_epoch(cluster: Cluster, role: str) -> None:
    victim = next(record for record in workers(cluster).values() if record.role == role)
    ring = f"{victim.worker_id}.{victim.epoch}"
    (rank,) = [pid for pid in with_command("RankActor") if ring in Path(f"/proc/{pid}/maps").read_text()]
    os.kill(rank, signal.SIGKILL)
    until(lambda: any(r.role == role and r.epoch != victim.epoch for r in workers(cluster).values()), 90)
    until(lambda: answers(cluster), 60)
    assert_clean(cluster)


def answers(cluster: Cluster) -> bool:
    try:
        return generate(cluster, max_tokens=4)[-1].HasField("usage")
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error
        return False


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets need a short path, pytest's own is too long for them."""
    folder = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_the_default_cluster_serves_and_leaves_nothing_behind(tmp_path: Path, short_folder: Path) -> None:
    ports = [part for name in ("grpc", "http", "metrics") for part in (f"--{name}-port", str(free_port()))]
    env = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    token = secrets.token_hex(16)
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton.cluster.cli", "serve", *ports],
            stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True,
            env={**env, "TMPDIR": str(short_folder), "BATON_CLUSTER_TOKEN": token},
        )  # fmt: skip
    cluster = Cluster(process, log, f"127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[3]}", "", "", token)
    try:
        wait_ready(cluster)
        assert generate(cluster, max_tokens=4)[-1].usage.completion_tokens >= 1
        children = descendants(process.pid)
        assert len(children) >= 6, "Redis, Ray, a router and two workers of two processes each"
        assert len(that_know(token)) > 5
        (run,) = short_folder.glob("baton-*")
        rings = Path("/dev/shm") / run.name
        assert rings.stat().st_mode & 0o777 == run.stat().st_mode & 0o777 == 0o700
    finally:
        stop(cluster)
    assert process.returncode == 0, log.read_text()
    until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()], 30)
    assert that_know(token) == []
    assert not run.exists()
    assert not rings.exists()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_start_that_is_interrupted_leaves_nothing_behind(
    tmp_path: Path, short_folder: Path, number: signal.Signals
) -> None:
    ports = [part for name in ("grpc", "http", "metrics") for part in (f"--{name}-port", str(free_port()))]
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton.cluster.cli", "serve", *ports],
            stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True,
            env={**os.environ, "TMPDIR": str(short_folder)},
        )  # fmt: skip
    until(lambda: list(short_folder.glob("baton-*/ray/session_*")))
    children = descendants(process.pid)
    process.send_signal(number)
    assert process.wait(30) == 0, log.read_text()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert list(short_folder.iterdir()) == []
    assert "running requests" not in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--redis-url", "redis://127.0.0.1:1/0"], "127.0.0.1:1"),
        (["--kv-memory", "1KiB"], "kv-memory"),
        (["--tp", "3"], "--tp is 3: 4 heads do not split evenly"),
        (["--prefill", "0"], "prefill"),
    ],
)
def test_a_foreseeable_mistake_gives_one_line_of_what_to_do(tmp_path: Path, flags: list[str], says: str) -> None:
    ports = [part for name in ("grpc", "http", "metrics") for part in (f"--{name}-port", str(free_port()))]
    command = [sys.executable, "-m", "baton.cluster.cli", "serve", *ports, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr + ended.stdout
    assert says in ended.stderr.strip().splitlines()[-1]


def test_a_taken_port_is_named(cluster: Cluster, tmp_path: Path) -> None:
    port = cluster.grpc_address.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "baton.cluster.cli", "serve", "--grpc-port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert ended.returncode == 2, ended
    assert port in ended.stderr.strip().splitlines()[-1]


def test_two_of_each_worker_serve_together(tmp_path: Path, device: str) -> None:
    flags = ["--prefill", "2", "--decode", "2", "--dtype", "float32", "--device", device]
    with serve(tmp_path, *flags) as cluster:
        until(lambda: len(workers(cluster)) == 4)
        answered = {tuple(generate(cluster, max_tokens=6, temperature=0)[0].outputs[0].token_ids) for _ in range(6)}
        assert len(answered) == 1
        assert_clean(cluster)
