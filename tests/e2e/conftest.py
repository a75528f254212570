"""One cluster for all end-to-end tests that need nothing special: float32, with an OTLP receiver beside it.

`python -m pytest tests/e2e --device cuda` runs them on this machine's GPUs; tests/gpu/cluster.sh runs the main ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from baton.v1 import inference_pb2_grpc

from .cluster import ROOT, Cluster, serve
from .otlp import Receiver

MODEL = ROOT / "models" / "baton-docs-6m"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="what the clusters under test serve on")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--device", "cpu"))  # not known where this file was found late


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver, device: str) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    flags = ["--model", str(MODEL), "--dtype", "float32", "--otlp-endpoint", f"http://{receiver.address}"]
    with serve(folder, "--device", device, *flags) as running:
        yield running


@pytest.fixture
def stub(cluster: Cluster) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)
