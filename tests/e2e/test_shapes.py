"""Prefill and decode workers of different shape: other ranks, other blocks, and the answers of transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from baton.v1 import inference_pb2_grpc

from ..near_ties import NearTies
from .cluster import serve
from .ledgers import assert_clean
from .test_equality import compare, generate, prompts, reference
from .test_tensor_parallel import flags_of
from .test_trace import carried_by, carried_ways, settled


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(["--tp", "1", "--prefill-tp", "2", "--prefill-block-tokens", "32"], id="2 ranks to 1"),
        pytest.param(["--tp", "2", "--prefill-tp", "1", "--block-tokens", "48"], id="1 rank to 2"),
    ],
)
def test_greedy_tokens_equal_those_of_transformers_between_workers_of_different_shape(
    tmp_path_factory: pytest.TempPathFactory, device: str, shape: list[str]
) -> None:
    chosen, more = (3, 8, 9, 15, 22), (1, 5, 12, 19)
    prompts()  # here, as transformers does not like to be imported by several threads at once
    with serve(tmp_path_factory.mktemp("shapes"), *flags_of(device, 3), *shape) as cluster:
        with grpc.insecure_channel(cluster.grpc_address) as channel, ThreadPoolExecutor(5) as pool:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            found = list(pool.map(lambda index: generate(stub, index), chosen))
            settled(cluster, stub, device)  # the first went by the store
            found += list(pool.map(lambda index: generate(stub, index), more))
        assert carried_ways(cluster) == {carried_by(device)}
        assert_clean(cluster)
    near_ties = NearTies()
    for index, tokens in zip((*chosen, *more), found, strict=True):
        compare(near_ties, index, prompts()[index], tokens, reference(index))
    near_ties.report(" ".join(shape), most=1)
